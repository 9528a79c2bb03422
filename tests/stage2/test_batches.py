"""Stage 2's batches: order as a function of (seed, epoch), whatever the workers; labels only on answers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gavamoe.data.dataset import open_dataset
from gavamoe.model.explainer import IGNORED
from gavamoe.model.slots import SlotIds
from gavamoe.stage1.pair_stream import PairSource
from gavamoe.stage2.batches import BatchPlan, IdDropout, PairBatches, Ragged, TextRows

LENGTHS = np.random.default_rng(0).integers(5, 60, size=333)


def text_rows() -> TextRows:
    return TextRows(Ragged.pack([[10, 11], [12, 13, 14], [15]]), Ragged.pack([[1, 2], [3], [4, 5, 6]]))


def test_ragged_rows_come_back() -> None:
    packed = Ragged.pack([[1, 2], [], [3]])
    assert [packed[row].tolist() for row in range(len(packed))] == [[1, 2], [], [3]]
    assert packed.lengths.tolist() == [2, 0, 1]
    joined = Ragged.join([Ragged.pack([]), packed, Ragged.pack([[7, 8]])])
    assert [joined[row].tolist() for row in range(len(joined))] == [[1, 2], [], [3], [7, 8]]


def test_only_answers_carry_labels() -> None:
    batch = text_rows().collate(np.array([2, 0]), np.array([7, 8, 9]), pad=0)
    assert batch["input_ids"].tolist() == [[15, 4, 5, 6], [10, 11, 1, 2]]
    assert batch["labels"].tolist() == [[IGNORED, 4, 5, 6], [IGNORED, IGNORED, 1, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert batch["cluster_ids"].tolist() == [9, 7]


def test_padding_is_masked_and_not_learnt() -> None:
    batch = text_rows().collate(np.array([0, 1]), np.zeros(3, int), pad=99)
    assert batch["input_ids"].shape == (2, 4)
    short = TextRows(Ragged.pack([[1], [1, 2, 3]]), Ragged.pack([[5], [6]])).collate(np.arange(2), np.zeros(2, int), 99)
    assert short["input_ids"].tolist() == [[1, 5, 99, 99], [1, 2, 3, 6]]
    assert short["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert short["labels"].tolist() == [[IGNORED, 5, IGNORED, IGNORED], [IGNORED] * 3 + [6]]


def test_an_epoch_holds_every_row_and_full_batches() -> None:
    plan = BatchPlan(LENGTHS, batch_size=8, world_size=2, accumulation=3, seed=1)
    assert plan.steps_per_epoch == 7  # 333 rows by 48
    steps = [plan.rows(step) for step in range(7)]
    assert {rows.shape for rows in steps} == {(3, 2, 8)}
    counts = np.bincount(np.concatenate([rows.ravel() for rows in steps]), minlength=333)
    assert counts.min() == 1
    assert counts.sum() == 336


def test_order_is_a_function_of_seed_and_epoch() -> None:
    plan = BatchPlan(LENGTHS, 8, 1, 1, seed=1)
    forward = [plan.rows(step).copy() for step in range(90)]
    again = BatchPlan(LENGTHS, 8, 1, 1, seed=1)
    assert all((again.rows(step) == forward[step]).all() for step in (89, 3, 44, 0))
    assert (forward[0] != forward[plan.steps_per_epoch]).any()
    assert (BatchPlan(LENGTHS, 8, 1, 1, seed=2).rows(0) != forward[0]).any()


def test_workers_and_accumulation_share_the_same_steps() -> None:
    one = BatchPlan(LENGTHS, 8, 1, 4, seed=3)
    two = BatchPlan(LENGTHS, 8, 2, 2, seed=3)
    four = BatchPlan(LENGTHS, 8, 4, 1, seed=3)
    for step in (0, 5, 20):
        assert (one.rows(step).reshape(-1) == two.rows(step).reshape(-1)).all()
        assert (one.rows(step).reshape(-1) == four.rows(step).reshape(-1)).all()


def padding(length_N: np.ndarray, batch_size: int, accumulation: int = 1, epoch: int = 0) -> float:
    """Share of padding among the positions of an epoch's batches."""
    plan = BatchPlan(length_N, batch_size, 1, accumulation, seed=0)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    length_SB = np.concatenate([length_N[plan.rows(step)].reshape(-1, batch_size) for step in steps])
    return float(1 - length_SB.sum() / (length_SB.max(axis=1) * batch_size).sum())


@pytest.mark.parametrize("batch_size", [8, 16, 32])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_at_most_2_percent_of_an_epoch_is_padding(batch_size: int, accumulation: int) -> None:
    """At lengths like those of real rows, in an epoch of two windows' steps and 2 more."""
    random = np.random.default_rng(0)
    steps = 130 * accumulation
    for length_N in (random.normal(70, 20, steps * batch_size), 24 + random.gamma(2, 20, steps * batch_size)):
        assert padding(length_N.clip(24, 114).astype(int), batch_size, accumulation) < 0.02


def test_batches_are_mixed_anew_each_epoch() -> None:
    """Steps are not in order of length, and few rows that share a batch share one again."""
    lengths = np.random.default_rng(0).integers(24, 115, size=8192)
    plan = BatchPlan(lengths, 16, 1, 1, seed=0)
    epochs = [[plan.rows(epoch * plan.steps_per_epoch + step).ravel() for step in range(512)] for epoch in (0, 1)]
    shortest = [int(lengths[rows].min()) for rows in epochs[0]]
    assert shortest != sorted(shortest)
    together = [{(a, b) for rows in steps for a in rows for b in rows if a < b} for steps in epochs]
    assert len(together[0] & together[1]) < 0.1 * len(together[0])


def test_few_rows_are_repeated() -> None:
    plan = BatchPlan(np.array([5, 6, 7]), 4, 2, 1, seed=0)
    assert plan.steps_per_epoch == 1
    assert set(plan.rows(0).ravel()) == {0, 1, 2}
    with pytest.raises(ValueError, match="no rows"):
        BatchPlan(np.array([], int), 4, 1, 1, seed=0)


def test_hidden_slots_become_the_unknown_ones() -> None:
    ids = torch.tensor([[5, 103, 9, 118, 1]] * 2000)  # vocabulary 100, users 100..110, items 111..131
    hiding = IdDropout(0.25, 0.25, SlotIds(vocabulary=100, n_users=10, n_items=20))
    hidden = hiding.apply(ids, np.random.default_rng(0))
    assert (hidden[:, [0, 2, 4]] == ids[:, [0, 2, 4]]).all()
    for column, unknown in ((1, 110), (3, 131)):
        changed = hidden[:, column] != ids[:, column]
        assert set(hidden[changed, column].tolist()) == {unknown}
        assert 0.2 < changed.float().mean() < 0.3
    assert (hidden[:, 1] == 110).logical_xor(hidden[:, 3] == 131).any()
    assert torch.equal(
        IdDropout(0.0, 0.0, SlotIds(vocabulary=100, n_users=10, n_items=20)).apply(ids, np.random.default_rng(0)), ids
    )


def test_pairs_of_a_step_do_not_depend_on_the_steps_before(tiny_dataset: Path) -> None:
    source = PairSource(open_dataset(tiny_dataset), negatives=1, unknown_rate=0.1, seed=5)
    batches = PairBatches(source, pairs_per_step=512)  # 1,200 training pairs: two steps an epoch
    forward = [batches.step(step) for step in range(7)]
    fresh = PairBatches(source, 512)
    for step in (6, 1, 3):
        assert all((a == b).all() for a, b in zip(fresh.step(step), forward[step], strict=True))
    assert {pairs.size for pairs in forward} == {512}
    assert (forward[0].user != forward[2].user).any()
    second = source.epoch(0).take(slice(512, 1024))
    assert (forward[1].item == second.item).all()


def test_more_pairs_wanted_than_there_are(tiny_dataset: Path) -> None:
    source = PairSource(open_dataset(tiny_dataset), negatives=1, unknown_rate=0.0, seed=5)
    assert PairBatches(source, pairs_per_step=3000).step(4).size == 3000
