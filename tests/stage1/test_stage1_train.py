"""Stage 1's training: equal after a resume and on two workers, the best state kept, collapse noticed."""

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from helpers.tiny import tiny_stage1

from gavamoe.artifacts.manifest import read_manifest
from gavamoe.data.dataset import open_dataset
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.errors import InputError
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.artifact import load_stage1
from gavamoe.stage1.pair_stream import PairFile, PairSource
from gavamoe.stage1.routes import read_routes, route_pairs
from gavamoe.stage1.train import train_stage1
from gavamoe.stage1.trainer import Trainer


def test_artifact_is_whole_and_says_what_it_measured(tiny_dataset: Path, tmp_path: Path) -> None:
    context = LocalContext()
    metrics = train_stage1(tiny_stage1(), tiny_dataset, tmp_path / "stage1", context)
    files = sorted(path.name for path in (tmp_path / "stage1").iterdir())
    assert files == [
        "artifact.json", "cluster_words.parquet", "metrics.json", "routes.parquet",
        "strangers.safetensors", "vae_gmm.json", "vae_gmm.safetensors",
    ]  # fmt: skip
    assert json.loads((tmp_path / "stage1" / "metrics.json").read_text()) == metrics
    data = open_dataset(tiny_dataset)
    assert read_manifest(tmp_path / "stage1", "stage1").inputs == {"dataset": data.fingerprint}
    assert sum(metrics["cluster_shares"]) == pytest.approx(1)
    assert metrics["epochs"] == 4
    assert len(metrics["history"]) == 4
    assert -1 <= metrics["user_ari"] <= 1

    model, _ = load_stage1(tmp_path / "stage1")
    pairs = data.arrays("test")
    routes = route_pairs(model, pairs.user, pairs.item)
    assert metrics["test"]["rmse"] == pytest.approx(float(np.sqrt(np.mean((routes.rating - pairs.rating) ** 2))))
    assert metrics["test"]["mae"] == pytest.approx(float(np.mean(np.abs(routes.rating - pairs.rating))))
    written = read_routes(tmp_path / "stage1" / "routes.parquet", "test")
    np.testing.assert_allclose(written.responsibilities, routes.responsibilities, atol=1e-5)


def test_log_lines_carry_the_terms_of_the_bound(tiny_dataset: Path, tmp_path: Path) -> None:
    context = LocalContext()
    train_stage1(tiny_stage1(), tiny_dataset, tmp_path / "stage1", context)
    steps = [line for line in context.lines if line["phase"] == "stage1" and "loss" in line]
    assert steps[-1]["step"] == steps[-1]["steps"] == 4 * 5
    for line in steps:
        kl = line["log_q_z"] + line["log_q_c"] - line["log_p_z_given_c"] - line["log_p_c"]
        assert line["kl"] == pytest.approx(kl, abs=1e-3)
        assert line["loss"] == pytest.approx(line["beta"] * line["kl"] - line["reconstruction"], abs=1e-4)
    assert steps[0]["beta"] < steps[-1]["beta"] == pytest.approx(0.1)
    phases = [line["phase"] for line in context.lines]
    assert phases.index("stage1-pretrain") < phases.index("stage1")


@pytest.mark.parametrize("after", [1, 2, 3])
def test_resumed_training_equals_training_that_never_stopped(tiny_dataset: Path, tmp_path: Path, after: int) -> None:
    """Bit for bit, whether it stopped in pretraining, before the mixture was fitted, or after; with dropout."""
    config = tiny_stage1(dropout=0.2)
    whole = LocalContext(storage=tmp_path)
    expected = train_stage1(config, tiny_dataset, tmp_path / "whole", whole)
    assert len(whole.checkpoints) == 4
    torch.manual_seed(99)
    resumed = LocalContext(resume_from=whole.checkpoints[after - 1])
    found = train_stage1(config, tiny_dataset, tmp_path / "resumed", resumed)
    assert min(line["step"] for line in resumed.lines) > after * 5
    for name in ("vae_gmm.safetensors", "routes.parquet"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}


def test_resuming_a_finished_run_only_writes_it(tiny_dataset: Path, tmp_path: Path) -> None:
    whole = LocalContext(storage=tmp_path)
    expected = train_stage1(tiny_stage1(), tiny_dataset, tmp_path / "whole", whole)
    again = LocalContext(resume_from=whole.checkpoints[-1])
    found = train_stage1(tiny_stage1(), tiny_dataset, tmp_path / "again", again)
    assert [line for line in again.lines if "warning" not in line] == [], "what its artifact is warned of is said again"
    assert found["test"] == expected["test"]


def test_a_checkpoint_of_something_else_is_refused(tiny_dataset: Path, tmp_path: Path) -> None:
    context = LocalContext(storage=tmp_path)
    train_stage1(tiny_stage1(), tiny_dataset, tmp_path / "stage1", context)
    resume = LocalContext(resume_from=context.checkpoints[-1])
    other = synthesize(tmp_path / "other", users=60, items=40, ratings=1500, seed=1)
    with pytest.raises(InputError, match=r"made with dataset .*, not .*start without --resume"):
        train_stage1(tiny_stage1(), other, tmp_path / "x", resume)
    with pytest.raises(InputError, match="made with seed 0, not 1"):
        train_stage1(tiny_stage1(seed=1), tiny_dataset, tmp_path / "x", resume)
    with pytest.raises(InputError, match=r"made with stage1\.beta 0\.1, not 0\.5"):
        train_stage1(tiny_stage1(beta=0.5), tiny_dataset, tmp_path / "x", resume)
    with pytest.raises(InputError, match="no such checkpoint file"):
        train_stage1(tiny_stage1(), tiny_dataset, tmp_path / "x", LocalContext(resume_from=tmp_path))
    assert not (tmp_path / "x").exists()


def test_equal_seeds_give_equal_models(tiny_dataset: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_stage1(tiny_stage1(seed=seed), tiny_dataset, tmp_path / name, LocalContext())
    weights = [(tmp_path / name / "vae_gmm.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def _train_worker(rank: int, world_size: int, port: int, dataset: Path, out: Path, storage: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    context = LocalContext(rank=rank, world_size=world_size, storage=storage if rank == 0 else None)
    metrics = train_stage1(tiny_stage1(batch_size=255), dataset, out, context)
    (storage / f"rank{rank}.json").write_text(json.dumps({"metrics": metrics, "lines": context.lines}))
    dist.destroy_process_group()


def test_two_workers_equal_one(tiny_dataset: Path, tmp_path: Path) -> None:
    """The same global batches, cut in unequal halves: losses, weights and routes to float rounding."""
    alone = LocalContext()
    expected = train_stage1(tiny_stage1(batch_size=255), tiny_dataset, tmp_path / "one", alone)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (2, port, tiny_dataset, tmp_path / "two", tmp_path)
    torch.multiprocessing.spawn(_train_worker, arguments, nprocs=2)
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert results[1]["metrics"] == {}
    first_elbo_step = 11
    for one, two in zip(alone.lines, results[0]["lines"], strict=True):
        # Adam's first step on a gradient that is nothing but rounding is a whole step: later losses agree less.
        tolerance = 1e-5 if one["step"] <= first_elbo_step else 1e-2
        for name in ("loss", "kl", "valid_elbo"):
            if name in one:
                assert two[name] == pytest.approx(one[name], rel=tolerance), (one["step"], name)
    assert results[0]["metrics"]["test"]["rmse"] == pytest.approx(expected["test"]["rmse"], rel=1e-2)
    routes = [read_routes(tmp_path / name / "routes.parquet", "train") for name in ("one", "two")]
    assert (routes[0].cluster == routes[1].cluster).mean() > 0.98


def test_learning_rates_fall_linearly_over_all_epochs(tiny_dataset: Path) -> None:
    """Network, tables and mixture alike; the rate depends on the place alone, so a resumed run has the same."""
    trainer = Trainer(
        tiny_stage1(learning_rate=0.01, mixture_learning_rate=0.02), open_dataset(tiny_dataset), LocalContext()
    )
    groups = [*trainer.optimizer.param_groups, *trainer.row_optimizer.param_groups]
    found = []
    for trainer.epoch, place in ((0, 0.0), (2, 0.0), (3, 0.5), (3, 1.0)):
        trainer._set_rates(place)
        found.append([group["lr"] for group in groups])
    shares = [1.0, 0.525, 1 - 0.95 * 3.5 / 4, 0.05]
    assert found == [pytest.approx([share * rate for rate in (0.01, 0.02, 0.01)]) for share in shares]
    constant = Trainer(tiny_stage1(schedule="constant"), open_dataset(tiny_dataset), LocalContext())
    constant.epoch = 3
    constant._set_rates(0.9)
    assert [group["lr"] for group in constant.optimizer.param_groups] == [1e-3, 2e-3]


def test_the_best_state_is_the_one_kept(tiny_dataset: Path, tmp_path: Path) -> None:
    """So many epochs that the model overfits: the artifact holds the one with the best validation ELBO."""
    config = tiny_stage1(seed=1, learning_rate=0.02, epochs=30, likelihood="categorical")
    metrics = train_stage1(config, tiny_dataset, tmp_path / "stage1", LocalContext())
    elbos = {row["epoch"]: row["elbo"] for row in metrics["history"] if row["phase"] == "elbo"}
    assert metrics["best_epoch"] == max(elbos, key=lambda epoch: elbos[epoch])
    assert metrics["best_epoch"] < max(elbos) - 5  # no accident of rounding: it overfits from the middle on
    assert metrics["valid"]["elbo"] == elbos[metrics["best_epoch"]]


def test_without_validation_pairs_the_last_state_is_kept(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PairSource, "held_out", lambda _source, _split: PairFile())
    context = LocalContext()
    metrics = train_stage1(tiny_stage1(epochs=3, patience=1), tiny_dataset, tmp_path / "stage1", context)
    assert metrics["best_epoch"] == metrics["epochs"] - 1 == 4
    assert "valid" not in metrics
    assert not any("warning" in line for line in context.lines)


def test_training_stops_when_patience_is_over(tiny_dataset: Path, tmp_path: Path) -> None:
    config = tiny_stage1(learning_rate=0.1, epochs=30, patience=2)
    metrics = train_stage1(config, tiny_dataset, tmp_path / "stage1", LocalContext())
    assert metrics["stopped_early"]
    assert metrics["epochs"] == metrics["best_epoch"] + 1 + 2 < 32


def test_implicit_data_train_with_sampled_negatives(implicit_dataset: Path, tmp_path: Path) -> None:
    metrics = train_stage1(
        tiny_stage1(epochs=8, batch_size=64, learning_rate=3e-3), implicit_dataset, tmp_path / "stage1", LocalContext()
    )
    model, _ = load_stage1(tmp_path / "stage1")
    assert model.likelihood == "bernoulli"
    # About a third of the negatives are unobserved items of the user's own half, which nothing tells apart.
    assert metrics["test"]["auc"] > 0.7
    # Every item is drawn alike, so its count tells nothing.
    assert 0.4 < metrics["test"]["popularity_auc"] < 0.6
    assert metrics["test"]["auc"] > metrics["test"]["popularity_auc"] + 0.1
    assert metrics["test"]["rmse"] < metrics["test"]["constant_rmse"]
    routes = read_routes(tmp_path / "stage1" / "routes.parquet", "test")
    assert routes.rating.min() >= 0
    assert routes.rating.max() <= 1


@pytest.mark.parametrize("changes", [
    {"likelihood": "gaussian"}, {"likelihood": "bernoulli"}, {"clusters": 1}, {"embedding_init": "random"},
    {"user_agreement": 0.0}, {"mixture_init": "random"}, {"pretrain_epochs": 0}, {"batch_size": 5000},
])  # fmt: skip
def test_every_variant_trains(tiny_dataset: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    metrics = train_stage1(tiny_stage1(**changes), tiny_dataset, tmp_path / "stage1", LocalContext())
    assert np.isfinite(metrics["test"]["elbo"])
    assert len(metrics["cluster_shares"]) == changes.get("clusters", 3)
