"""Stage 1 on hashed tables: trained, saved, resumed, on two workers; what collides is reported."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from helpers.tiny import tiny_stage1

from gavamoe.config.files import load_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import open_dataset
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.errors import InputError
from gavamoe.model.tables.hashed import HashedTable
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.artifact import layout_of, load_stage1
from gavamoe.stage1.routes import read_routes, route_pairs
from gavamoe.stage1.strangers.fold_in import Crowd, FoldIn
from gavamoe.stage1.strangers.history import Entry
from gavamoe.stage1.train import train_stage1

ITEMS = 40


def hashed(**changes: object) -> RunConfig:
    return tiny_stage1(tables="hashed", user_hash_rows=30, item_hash_rows=25, batch_size=255, **changes)


def test_a_trained_model_is_read_back_with_the_same_numbers(tiny_dataset: Path, tmp_path: Path) -> None:
    context = LocalContext()
    folder = tmp_path / "stage1"
    config = hashed(seed=3, hashes=2)  # some users share both of their rows
    metrics = train_stage1(config, tiny_dataset, folder, context)
    data = open_dataset(tiny_dataset)
    model, _ = load_stage1(folder)
    for table, rows in ((model.user_embedding, 30), (model.item_embedding, 25)):
        assert isinstance(table, HashedTable)
        assert table.weight.shape == (rows + 1, 16)
    pairs = data.arrays("test")
    routes = route_pairs(model, pairs.user, pairs.item)
    assert metrics["test"]["rmse"] == pytest.approx(float(np.sqrt(np.mean((routes.rating - pairs.rating) ** 2))))
    written = read_routes(folder / "routes.parquet", "test")
    np.testing.assert_allclose(written.responsibilities, routes.responsibilities, atol=1e-5)
    assert (layout_of(folder).kind, layout_of(folder).seed) == ("hashed", 3)

    tables = {"users": model.user_embedding, "items": model.item_embedding}
    assert metrics["collisions"] == {name: table.collisions()._asdict() for name, table in tables.items()}
    assert 0 < metrics["collisions"]["users"]["all"] < metrics["collisions"]["users"]["any"] <= 1
    [line] = [line for line in context.lines if line["phase"] == "stage1-tables"]
    assert line["users_any"] == metrics["collisions"]["users"]["any"]
    assert line["items_rows"] == 25

    crowd = Crowd.load(folder, model)
    assert crowd is not None
    fold_in = FoldIn(model, crowd, None)
    told = fold_in.routes(fold_in.stranger([Entry(0, 5.0, None), Entry(3, 5.0, None)]), np.arange(ITEMS))
    assert np.isfinite(told.rating).all()
    assert told.rating.mean() > fold_in.routes(fold_in.stranger([Entry(0, 1.0, None)]), np.arange(ITEMS)).rating.mean()


def test_moments_are_of_the_users_sums(tiny_dataset: Path, tmp_path: Path) -> None:
    train_stage1(hashed(), tiny_dataset, tmp_path / "stage1", LocalContext())
    model, _ = load_stage1(tmp_path / "stage1")
    home_U = np.arange(model.n_users) % 3
    crowd = Crowd.of(model, home_U, np.ones(model.n_users))
    vectors = model.user_embedding(torch.arange(model.n_users)).detach().double()
    for cluster in range(3):
        torch.testing.assert_close(crowd.mean_KE[cluster], vectors[home_U == cluster].mean(0))
    pooled = torch.cov(vectors.T, correction=0)
    own = torch.cov(vectors[home_U == 1].T, correction=0)
    count = (home_U == 1).sum()
    torch.testing.assert_close(crowd.spread_KEE[1], (count * own + 50 * pooled) / (count + 50))


def test_resumed_training_equals_training_that_never_stopped(tiny_dataset: Path, tmp_path: Path) -> None:
    whole = LocalContext(storage=tmp_path)
    expected = train_stage1(hashed(), tiny_dataset, tmp_path / "whole", whole)
    resumed = LocalContext(resume_from=whole.checkpoints[2])
    found = train_stage1(hashed(), tiny_dataset, tmp_path / "resumed", resumed)
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    name = "vae_gmm.safetensors"
    assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_hashed_and_replicated_are_not_mixed(tiny_dataset: Path, tmp_path: Path) -> None:
    whole = LocalContext(storage=tmp_path)
    train_stage1(hashed(), tiny_dataset, tmp_path / "stage1", whole)
    resume = LocalContext(resume_from=whole.checkpoints[0])
    with pytest.raises(InputError, match=r"made with stage1\.tables hashed, not replicated; start without --resume"):
        train_stage1(tiny_stage1(batch_size=255), tiny_dataset, tmp_path / "x", resume)
    with pytest.raises(InputError, match=r"made with stage1\.user_hash_rows 30, not 40"):
        train_stage1(
            tiny_stage1(tables="hashed", user_hash_rows=40, item_hash_rows=25, batch_size=255),
            tiny_dataset, tmp_path / "x", resume,
        )  # fmt: skip


def _worker(rank: int, world_size: int, port: int, dataset: Path, work: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    context = LocalContext(rank=rank, world_size=world_size)
    train_stage1(hashed(pretrain_epochs=1, epochs=1), dataset, work / "two", context)
    (work / f"rank{rank}.json").write_text(json.dumps(context.lines))
    dist.destroy_process_group()


def test_two_workers_equal_one(tiny_dataset: Path, tmp_path: Path) -> None:
    alone = LocalContext()
    train_stage1(hashed(pretrain_epochs=1, epochs=1), tiny_dataset, tmp_path / "one", alone)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (2, port, tiny_dataset, tmp_path), nprocs=2)
    lines = json.loads((tmp_path / "rank0.json").read_text())
    for one, two in zip(alone.lines, lines, strict=True):
        if one["phase"] == "stage1-pretrain":
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_groups_are_found_at_full_size(tmp_path: Path, seed: int) -> None:
    """As many rows as ids, of which each id reads two: nearly the ratings and clusters of a row for each."""
    dataset = synthesize(tmp_path / "data", seed=seed)
    found = {}
    for tables in ("replicated", "hashed"):
        config = load_config("quickstart", [f"seed={seed}", f"stage1.tables={tables}"])
        found[tables] = train_stage1(config, dataset, tmp_path / tables, LocalContext())
    assert found["hashed"]["collisions"]["users"]["any"] > 0.8
    assert found["hashed"]["test"]["rmse"] < MOST_LOSS * found["replicated"]["test"]["rmse"]
    assert found["hashed"]["user_ari"] > 0.9


MOST_LOSS = 1.15
