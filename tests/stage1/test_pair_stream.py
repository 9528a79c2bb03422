"""The pairs of an epoch: each once, in an order of its own, in buckets or not; negatives; hidden ids; batches."""

import io
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import tiny_stage1

from gavamoe.data.dataset import open_dataset
from gavamoe.errors import RunError
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1 import pair_stream as pairs_module
from gavamoe.stage1.pair_stream import Epoch, PairFile, Pairs, PairSource, global_batches, worker_slices
from gavamoe.stage1.train import train_stage1


def whole(epoch: Epoch) -> Pairs:
    return epoch.take(slice(0, epoch.size))


@pytest.fixture(params=[None, 100])
def buckets(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """One bucket in memory, or buckets of about 100 pairs on disk."""
    if request.param is not None:
        monkeypatch.setattr(pairs_module, "BUCKET_PAIRS", request.param)
        monkeypatch.setattr(pairs_module, "_MEMORY_BYTES", 0)
    return request.param


def test_negatives_were_never_observed_and_differ_by_epoch(implicit_dataset: Path, buckets: int | None) -> None:
    del buckets
    data = open_dataset(implicit_dataset)
    source = PairSource(data, negatives=2, unknown_rate=0.0, seed=0)
    train = data.arrays("train")
    observed = set(zip(train.user.tolist(), train.item.tolist(), strict=True))
    epochs = [whole(source.epoch(epoch)) for epoch in (0, 0, 1)]
    drawn = []
    for pairs in epochs:
        negative = pairs.rating == 0
        drawn.append(sorted(zip(pairs.user[negative].tolist(), pairs.item[negative].tolist(), strict=True)))
        assert not observed & set(drawn[-1])
        assert len(drawn[-1]) == 2 * len(train.user)
    assert drawn[0] == drawn[1] != drawn[2]
    held_out = source.held_out("test").all()
    test = data.arrays("test")
    seen = observed | set(zip(test.user.tolist(), test.item.tolist(), strict=True))
    negative = held_out.rating == 0
    assert not seen & set(zip(held_out.user[negative].tolist(), held_out.item[negative].tolist(), strict=True))


def test_an_epoch_is_every_pair_once_in_an_order_of_its_own(tiny_dataset: Path, buckets: int | None) -> None:
    del buckets
    data = open_dataset(tiny_dataset)
    source = PairSource(data, negatives=4, unknown_rate=0.0, seed=5)
    train = data.arrays("train")
    expected = sorted(zip(train.user.tolist(), train.item.tolist(), train.rating.tolist(), strict=True))
    orders = []
    for epoch in (3, 3, 4):
        pairs = whole(source.epoch(epoch))
        assert sorted(zip(*(column.tolist() for column in pairs), strict=True)) == expected
        orders.append(pairs.user.tolist())
    assert orders[0] == orders[1] != orders[2]


def test_hidden_ids_become_the_unknown_at_the_stated_rate(tiny_dataset: Path, buckets: int | None) -> None:
    del buckets
    data = open_dataset(tiny_dataset)
    source = PairSource(data, negatives=4, unknown_rate=0.25, seed=0)
    pairs = whole(source.epoch(0))
    for column, unknown in ((pairs.user, data.catalog.known_users), (pairs.item, data.catalog.known_items)):
        assert 0.2 < (column == unknown).mean() < 0.3
    assert max(pairs.user.max() for pairs in source.observed()) < data.catalog.known_users


@pytest.mark.parametrize(("count", "batch_size", "workers"), [(10, 4, 3), (1, 8, 2), (4096, 4096, 4), (1001, 100, 7)])
def test_batches_and_slices_leave_no_row_out(count: int, batch_size: int, workers: int) -> None:
    batches = list(global_batches(count, batch_size))
    sizes = [rows.stop - rows.start for rows in batches]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    slices = [piece for rows in batches for piece in worker_slices(rows, workers)]
    assert len(slices) == workers * len(batches)
    assert [row for piece in slices for row in range(piece.start, piece.stop)] == list(range(count))


def test_any_slice_of_an_epoch_is_that_part_of_it(
    tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also across buckets, and backwards, as a resumed worker reads them."""
    monkeypatch.setattr(pairs_module, "BUCKET_PAIRS", 100)
    epoch = PairSource(open_dataset(tiny_dataset), negatives=1, unknown_rate=0.1, seed=0).epoch(2)
    expected = whole(epoch)
    for start, stop in ((0, 256), (90, 110), (95, 431), (40, 41), (epoch.size - 3, epoch.size + 9), (7, 7)):
        for found, column in zip(epoch.take(slice(start, stop)), expected, strict=True):
            np.testing.assert_array_equal(found, column[start:stop])


def test_every_pair_may_come_anywhere_in_an_order_of_buckets(
    tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place of the first row over many epochs is uniform: mean and spread of 400 draws within 5 standard errors."""
    monkeypatch.setattr(pairs_module, "BUCKET_PAIRS", 300)
    data = open_dataset(tiny_dataset)
    source = PairSource(data, negatives=1, unknown_rate=0.0, seed=0)
    first = next(source.observed()).take(slice(0, 1))
    places = []
    for epoch in range(400):
        pairs = whole(source.epoch(epoch))
        places.append(int(((pairs.user == first.user) & (pairs.item == first.item)).argmax()) / pairs.size)
    assert abs(np.mean(places) - 0.5) < 5 * 12**-0.5 / 20
    assert abs(np.std(places) - 12**-0.5) < 0.05


def test_training_in_buckets_is_repeatable_and_resumes(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs_module, "BUCKET_PAIRS", 200)
    contexts = [LocalContext(storage=tmp_path), LocalContext()]
    for name, context in zip("ab", contexts, strict=True):
        train_stage1(tiny_stage1(dropout=0.1), tiny_dataset, tmp_path / name, context)
    resumed = LocalContext(resume_from=contexts[0].checkpoints[1])
    train_stage1(tiny_stage1(dropout=0.1), tiny_dataset, tmp_path / "c", resumed)
    weights = [(tmp_path / name / "vae_gmm.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] == weights[2]


def test_a_sample_is_of_distinct_rows_in_order(tiny_dataset: Path) -> None:
    data = open_dataset(tiny_dataset)
    source = PairSource(data, negatives=1, unknown_rate=0, seed=0)
    rows = list(zip(*(column.tolist() for column in data.arrays("train")), strict=True))
    sample = source.sample(50, np.random.default_rng(0))
    taken = list(zip(*(column.tolist() for column in sample), strict=True))
    assert len(set(taken)) == 50
    assert [row for row in rows if row in set(taken)] == taken
    assert source.sample(10**6, np.random.default_rng(0)).size == source.size


def test_a_pair_file_on_disk_reads_as_one_in_memory() -> None:
    pairs = Pairs(np.arange(9, dtype=np.int32), np.arange(9, dtype=np.int32)[::-1], np.linspace(1, 5, 9, dtype="f4"))
    for memory in (0, 10**6):
        file = PairFile(memory)
        for rows in (slice(0, 4), slice(4, 9)):
            file.append(pairs.take(rows))
        assert file.size == 9
        for found, column in zip(file.take(slice(3, 7)), pairs, strict=True):
            np.testing.assert_array_equal(found, column[3:7])
        assert file.take(slice(9, 20)).size == 0


def test_a_full_disk_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, _content: object) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile", lambda max_size: Full())
    file = PairFile()
    with pytest.raises(RunError, match=r"No space left on device; stage 1 keeps 12 bytes a pair there: .* set TMPDIR"):
        file.append(Pairs(np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.float32)))
