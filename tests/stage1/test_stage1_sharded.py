"""Sharded tables in training: equal to whole ones on two workers, resumed on another number, read back from files."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.sharded_runs import of_kind, trained
from safetensors.torch import load_file

from gavamoe.artifacts.manifest import read_manifest
from gavamoe.data.dataset import open_dataset
from gavamoe.errors import InputError
from gavamoe.model.tables.mapped import MappedTable
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.artifact import load_stage1
from gavamoe.stage1.routes import read_routes, route_pairs
from gavamoe.stage1.sharding.row_ranges import RowRanges
from gavamoe.stage1.sharding.shard_files import SavedShards
from gavamoe.stage1.trainer import Trainer

EXACT = 1e-6


@pytest.fixture(scope="module")
def both(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The same 60 steps on two workers with whole and with sharded tables."""
    work = tmp_path_factory.mktemp("sharded")
    return work, trained([of_kind("replicated"), of_kind("sharded")], tiny_dataset, work)


def steps(lines: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The lines' numbers, without what time decides."""
    kept = [line for line in lines if "warning" not in line]
    return [{n: v for n, v in line.items() if n not in ("phase", "pairs_per_second")} for line in kept]


def rows_of(folder: Path) -> dict[str, torch.Tensor]:
    """Both tables of an artifact, whichever kind it has."""
    model, _ = load_stage1(folder)
    counts = {"user": model.n_users + 1, "item": model.n_items + 1}
    return {of: getattr(model, f"{of}_embedding")(torch.arange(n)).detach() for of, n in counts.items()}


def test_sharded_training_equals_that_of_whole_tables(both: tuple[Path, dict[str, Any]]) -> None:
    """Every logged number of 60 steps, and all weights after them."""
    work, runs = both
    whole, sharded = (steps(runs[kind][0]["lines"]) for kind in ("replicated", "sharded"))
    assert whole[-1]["step"] == 60
    for one, two in zip(whole, sharded, strict=True):
        assert two.pop("gradient_norm", 0) == pytest.approx(one.pop("gradient_norm", 0), rel=10 * EXACT)
        assert two == pytest.approx(one, rel=EXACT, abs=EXACT), one["step"]
    expected, found = (rows_of(work / kind / "stage1") for kind in ("replicated", "sharded"))
    for of in ("user", "item"):
        torch.testing.assert_close(found[of], expected[of], atol=EXACT, rtol=0)
    dense = load_file(work / "sharded" / "stage1" / "vae_gmm.safetensors")
    other = load_file(work / "replicated" / "stage1" / "vae_gmm.safetensors")
    assert set(other) - set(dense) == {"user_embedding.weight", "item_embedding.weight"}
    for name, tensor in dense.items():
        torch.testing.assert_close(tensor, other[name], atol=EXACT, rtol=0)
    test, expected_test = (runs[kind][0]["metrics"]["test"] for kind in ("sharded", "replicated"))
    for name in ("elbo", "rmse", "mae", "kl"):
        assert test[name] == pytest.approx(expected_test[name], rel=EXACT)
    assert runs["sharded"][1]["metrics"] == {}


def test_the_artifact_is_read_by_mapping_its_files(both: tuple[Path, dict[str, Any]], tiny_dataset: Path) -> None:
    work, _ = both
    folder = work / "sharded" / "stage1"
    model, manifest = load_stage1(folder)
    data = open_dataset(tiny_dataset)
    assert manifest.inputs == {"dataset": data.fingerprint}
    assert {name for name in manifest.files if name.startswith("tables/")} == {
        "tables/item_embedding-00000-of-00001.safetensors", "tables/user_embedding-00000-of-00001.safetensors",
    }  # fmt: skip
    assert isinstance(model.user_embedding, MappedTable)
    assert not any("embedding" in name for name, _ in model.named_parameters())
    pairs = data.arrays("test")
    routes = route_pairs(model, pairs.user, pairs.item)
    written = read_routes(folder / "routes.parquet", "test")
    np.testing.assert_allclose(written.responsibilities, routes.responsibilities, atol=1e-6)
    assert (written.cluster == routes.cluster).all()


@pytest.mark.parametrize(("after", "workers"), [(1, 2), (3, 1), (5, 3)])
def test_a_run_goes_on_with_any_number_of_workers(
    both: tuple[Path, dict[str, Any]], tiny_dataset: Path, tmp_path: Path, after: int, workers: int
) -> None:
    """Before the mixture is fitted, after it, and with a best state that is already kept."""
    work, runs = both
    checkpoint = work / "sharded" / "checkpoints" / str(after)
    found = trained([of_kind("sharded")], tiny_dataset, tmp_path, workers, checkpoint)["sharded"][0]
    left = [line for line in steps(runs["sharded"][0]["lines"]) if line["step"] > 10 * after]
    resumed = steps(found["lines"])
    assert len(resumed) == len(left) > 0
    # Another number of workers sums in another order, which Adam amplifies; the same one repeats the same bits.
    tolerance = 1e-9 if workers == 2 else 1e-2
    for one, two in zip(left, resumed, strict=True):
        assert two == pytest.approx(one, rel=tolerance, abs=tolerance)
    expected, rows = rows_of(work / "sharded" / "stage1"), rows_of(tmp_path / "sharded" / "stage1")
    for of in ("user", "item"):
        torch.testing.assert_close(rows[of], expected[of], atol=1e-9 if workers == 2 else 0.02, rtol=0)


def test_every_row_and_state_is_carried_to_another_number_of_workers(
    both: tuple[Path, dict[str, Any]], tiny_dataset: Path
) -> None:
    """To the bit: weights, moments and steps of all rows, and those of the best state."""
    work, _ = both
    checkpoint = work / "sharded" / "checkpoints" / "4"
    files = [load_file(checkpoint / f"tables-{rank}.safetensors") for rank in range(2)]
    best = [load_file(checkpoint / f"best-tables-{rank}.safetensors") for rank in range(2)]
    data = open_dataset(tiny_dataset)
    trainer = Trainer(of_kind("sharded"), data, LocalContext(resume_from=checkpoint))
    trainer.restore(checkpoint)
    for name in ("user_embedding", "item_embedding"):
        table = getattr(trainer.model, name)
        state = trainer.tables.optimizer.state[table.shard]
        found = {"weight": table.shard.detach(), **{each: state[each] for each in ("first", "second", "steps")}}
        for each, values in found.items():
            assert torch.equal(values, torch.cat([file[f"{name}.{each}"] for file in files])), (name, each)
        assert state["steps"].max() > 30
    trainer.tables.restore_best(trainer.best["model"])
    rows = {"user_embedding": trainer.model.n_users + 1, "item_embedding": trainer.model.n_items + 1}
    for name in ("user_embedding", "item_embedding"):
        kept = torch.cat([file[f"{name}.weight"] for file in best])
        assert torch.equal(getattr(trainer.model, name).shard.detach(), kept)
        saved = SavedShards(checkpoint, "best-tables", data.fingerprint, rows)
        parts = [
            block
            for rank in range(5)
            for block in saved.rows(f"{name}.weight", RowRanges(len(kept), 5, rank, "cpu").own).blocks
        ]
        assert np.array_equal(np.concatenate(parts), kept.numpy())


def test_one_worker_has_all_rows(both: tuple[Path, dict[str, Any]], tiny_dataset: Path, tmp_path: Path) -> None:
    """Without a process group; equal to whole tables on one worker."""
    del both
    runs = trained([of_kind("replicated"), of_kind("sharded")], tiny_dataset, tmp_path, workers=1)
    whole, sharded = (steps(runs[kind][0]["lines"]) for kind in ("replicated", "sharded"))
    for one, two in zip(whole, sharded, strict=True):
        assert two == pytest.approx(one, rel=10 * EXACT, abs=EXACT), one["step"]


def test_shards_of_something_else_are_refused(
    both: tuple[Path, dict[str, Any]], tiny_dataset: Path, tmp_path: Path
) -> None:
    work, _ = both
    checkpoints = work / "sharded" / "checkpoints"

    def resumed(checkpoint: Path, kind: str = "sharded") -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        trained([of_kind(kind)], tiny_dataset, tmp_path / "run", 1, checkpoint)

    with pytest.raises(InputError, match=r"made with stage1\.tables sharded, not replicated; start without --resume"):
        resumed(checkpoints / "3", "replicated")
    with pytest.raises(InputError, match=r"made with stage1\.tables replicated, not sharded"):
        resumed(work / "replicated" / "checkpoints" / "3")
    broken = shutil.copytree(checkpoints / "3", tmp_path / "broken")
    path = broken / "tables-1.safetensors"
    whole = path.read_bytes()
    fingerprint = open_dataset(tiny_dataset).fingerprint.encode()
    path.write_bytes(whole.replace(fingerprint, b"0" * len(fingerprint)))
    with pytest.raises(InputError, match=r"tables-1\.safetensors: holds shards of dataset 000.*start without --resume"):
        resumed(broken)
    shutil.copyfile(broken / "tables-0.safetensors", path)
    with pytest.raises(InputError, match=r"tables-1\.safetensors: is not the file of worker 1 of 2"):
        resumed(broken)
    path.write_bytes(whole[:-8])
    with pytest.raises(InputError, match=r"tables-1\.safetensors: can't be read"):
        resumed(broken)
    path.unlink()
    with pytest.raises(InputError, match=r"tables-1\.safetensors: can't be read"):
        resumed(broken)


def test_a_damaged_artifact_is_refused(both: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    work, _ = both
    folder = shutil.copytree(work / "sharded" / "stage1", tmp_path / "stage1")
    [path] = (folder / "tables").glob("user*")
    path.rename(path.with_name("user_embedding-00001-of-00002.safetensors"))
    with pytest.raises(InputError, match=r"missing file tables/user_embedding-00000-of-00001\.safetensors"):
        read_manifest(folder, "stage1")
