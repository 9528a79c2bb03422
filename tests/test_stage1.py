"""Stage 1's training: equal after a resume and on two workers, the best state kept, collapse noticed."""

import csv
import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from gavamoe.checkpoint import read_manifest
from gavamoe.config import RunConfig
from gavamoe.context import LocalContext
from gavamoe.dataset import open_dataset
from gavamoe.errors import InputError, RunError
from gavamoe.pairs import PairSource, global_batches, worker_slices
from gavamoe.reviews import prepare
from gavamoe.routes import read_routes, route_pairs
from gavamoe.row_adam import RowAdam, clip_gradients, sum_gradients
from gavamoe.spectral import spectral_coordinates
from gavamoe.stage1 import load_stage1, train_stage1
from gavamoe.stage1_checks import Validation, collapse_warnings, validate
from gavamoe.stage1_trainer import Trainer, rating_model
from gavamoe.synthetic import synthesize

SMALL: dict[str, Any] = {
    "embedding_size": 16, "latent_size": 4, "encoder_heads": 2, "encoder_feedforward": 16, "decoder_hidden": 8,
    "dropout": 0.0, "batch_size": 256, "pretrain_epochs": 2, "epochs": 2, "beta_warmup_epochs": 1,
}  # fmt: skip


def small_run(seed: int = 0, **changes: Any) -> RunConfig:
    return RunConfig.model_validate({"seed": seed, "stage1": {**SMALL, **changes}})


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def implicit_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs without ratings: every user takes items of its own half only."""
    folder = tmp_path_factory.mktemp("implicit")
    random = np.random.default_rng(0)
    draws = zip(random.integers(120, size=1600), random.integers(40, size=1600), strict=True)
    pairs = {(int(user), int(2 * half + user % 2)) for user, half in draws}
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "text"])
        writer.writerows([f"u{u}", f"i{i}", "a good text"] for u, i in sorted(pairs))
    prepare(folder / "pairs.csv", folder / "out", "table", columns={"user": "user", "item": "item", "text": "text"})
    return folder / "out"


def test_artifact_is_whole_and_says_what_it_measured(tiny_dataset: Path, tmp_path: Path) -> None:
    context = LocalContext()
    metrics = train_stage1(small_run(), tiny_dataset, tmp_path / "stage1", context)
    files = sorted(path.name for path in (tmp_path / "stage1").iterdir())
    assert files == ["artifact.json", "metrics.json", "routes.parquet", "vae_gmm.json", "vae_gmm.safetensors"]
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
    train_stage1(small_run(), tiny_dataset, tmp_path / "stage1", context)
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
    config = small_run(dropout=0.2)
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
    expected = train_stage1(small_run(), tiny_dataset, tmp_path / "whole", whole)
    again = LocalContext(resume_from=whole.checkpoints[-1])
    found = train_stage1(small_run(), tiny_dataset, tmp_path / "again", again)
    assert again.lines == []
    assert found["test"] == expected["test"]


def test_a_checkpoint_of_something_else_is_refused(tiny_dataset: Path, tmp_path: Path) -> None:
    context = LocalContext(storage=tmp_path)
    train_stage1(small_run(), tiny_dataset, tmp_path / "stage1", context)
    resume = LocalContext(resume_from=context.checkpoints[-1])
    other = synthesize(tmp_path / "other", users=60, items=40, ratings=1500, seed=1)
    with pytest.raises(InputError, match=r"made with dataset .*, not .*start without --resume"):
        train_stage1(small_run(), other, tmp_path / "x", resume)
    with pytest.raises(InputError, match="made with seed 0, not 1"):
        train_stage1(small_run(seed=1), tiny_dataset, tmp_path / "x", resume)
    with pytest.raises(InputError, match=r"made with stage1\.beta 0\.1, not 0\.5"):
        train_stage1(small_run(beta=0.5), tiny_dataset, tmp_path / "x", resume)
    with pytest.raises(InputError, match="no such checkpoint file"):
        train_stage1(small_run(), tiny_dataset, tmp_path / "x", LocalContext(resume_from=tmp_path))
    assert not (tmp_path / "x").exists()


def test_equal_seeds_give_equal_models(tiny_dataset: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_stage1(small_run(seed=seed), tiny_dataset, tmp_path / name, LocalContext())
    weights = [(tmp_path / name / "vae_gmm.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def _train_worker(rank: int, world_size: int, port: int, dataset: Path, out: Path, storage: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    context = LocalContext(rank=rank, world_size=world_size, storage=storage if rank == 0 else None)
    metrics = train_stage1(small_run(batch_size=255), dataset, out, context)
    (storage / f"rank{rank}.json").write_text(json.dumps({"metrics": metrics, "lines": context.lines}))
    dist.destroy_process_group()


def test_two_workers_equal_one(tiny_dataset: Path, tmp_path: Path) -> None:
    """The same global batches, cut in unequal halves: losses, weights and routes to float rounding."""
    alone = LocalContext()
    expected = train_stage1(small_run(batch_size=255), tiny_dataset, tmp_path / "one", alone)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (2, port, tiny_dataset, tmp_path / "two", tmp_path)
    torch.multiprocessing.spawn(_train_worker, arguments, nprocs=2)
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert results[0]["metrics"] == results[1]["metrics"]
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


def test_the_best_state_is_the_one_kept(tiny_dataset: Path, tmp_path: Path) -> None:
    """So many epochs that the model overfits: the artifact holds the one with the best validation ELBO."""
    config = small_run(seed=1, learning_rate=0.02, epochs=30)
    metrics = train_stage1(config, tiny_dataset, tmp_path / "stage1", LocalContext())
    elbos = {row["epoch"]: row["elbo"] for row in metrics["history"] if row["phase"] == "elbo"}
    assert metrics["best_epoch"] == max(elbos, key=lambda epoch: elbos[epoch])
    assert metrics["best_epoch"] < max(elbos) - 5  # no accident of rounding: it overfits from the middle on
    assert metrics["valid"]["elbo"] == elbos[metrics["best_epoch"]]


def test_without_validation_pairs_the_last_state_is_kept(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PairSource, "held_out", lambda source, _split: source.observed().take(slice(0, 0)))
    context = LocalContext()
    metrics = train_stage1(small_run(epochs=3, patience=1), tiny_dataset, tmp_path / "stage1", context)
    assert metrics["best_epoch"] == metrics["epochs"] - 1 == 4
    assert "valid" not in metrics
    assert not any("warning" in line for line in context.lines)


def test_training_stops_when_patience_is_over(tiny_dataset: Path, tmp_path: Path) -> None:
    config = small_run(learning_rate=0.1, epochs=30, patience=2)
    metrics = train_stage1(config, tiny_dataset, tmp_path / "stage1", LocalContext())
    assert metrics["stopped_early"]
    assert metrics["epochs"] == metrics["best_epoch"] + 1 + 2 < 32


def test_a_collapsed_cluster_is_named_or_stops_the_run(tiny_dataset: Path, tmp_path: Path) -> None:
    context = LocalContext()
    train_stage1(small_run(min_cluster_share=0.5), tiny_dataset, tmp_path / "warned", context)
    warnings = [line["warning"] for line in context.lines if "warning" in line]
    assert any("lower stage1.clusters" in warning for warning in warnings)
    with pytest.raises(RunError, match=r"holds .* of the pairs, less than stage1\.min_cluster_share 50\.0%"):
        train_stage1(
            small_run(min_cluster_share=0.5, on_collapse="stop"), tiny_dataset, tmp_path / "stopped", LocalContext()
        )
    assert not (tmp_path / "stopped").exists()


def test_each_collapse_names_its_remedy() -> None:
    terms = {"loss": 1.0, "kl": 3.0}
    config = small_run().stage1

    def found(**changes: Any) -> list[str]:
        values = {
            "terms": terms, "rmse": 0.8, "mae": 0.6, "constant_rmse": 1.3,
            "cluster_shares": [0.5, 0.3, 0.2], "active_dimensions": 4, "pairs": 100, **changes,
        }  # fmt: skip
        return collapse_warnings(Validation(**values), config)

    assert found() == []
    assert "lower stage1.clusters" in found(cluster_shares=[0.6, 0.399, 0.001])[0]
    assert "lower stage1.beta" in found(terms={"loss": 1.0, "kl": 0.01})[0]
    assert "posterior collapse" in found(active_dimensions=0)[0]
    assert "raise stage1.learning_rate" in found(rmse=1.31)[0]


def test_a_diverging_loss_is_a_failure(tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gavamoe.vae_gmm.VaeGmm.log_likelihood", lambda _self, output, _rating: output[:, 0] * np.inf)
    with pytest.raises(RunError, match=r"step 0: the gradient is not finite; lower stage1\.learning_rate"):
        train_stage1(small_run(), tiny_dataset, tmp_path / "stage1", LocalContext())


def test_validation_does_not_depend_on_the_workers(tiny_dataset: Path) -> None:
    """Sums over batches shared out over two workers add up to one worker's."""
    trainer = Trainer(small_run(), open_dataset(tiny_dataset), LocalContext())
    pairs = trainer.source.held_out("valid")
    first, second = (validate(trainer.model, pairs, 0.1, LocalContext()) for _ in range(2))
    assert first == second
    rating = trainer.model.predict_rating(torch.tensor(pairs.user), torch.tensor(pairs.item)).detach().numpy()
    assert first.rmse == pytest.approx(float(np.sqrt(np.mean((rating - pairs.rating) ** 2))), rel=1e-5)
    assert first.constant_rmse == pytest.approx(float(pairs.rating.std()), rel=1e-5)


def test_implicit_data_train_with_sampled_negatives(implicit_dataset: Path, tmp_path: Path) -> None:
    metrics = train_stage1(
        small_run(epochs=4, batch_size=64, learning_rate=3e-3), implicit_dataset, tmp_path / "stage1", LocalContext()
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


def test_negatives_were_never_observed_and_differ_by_epoch(implicit_dataset: Path) -> None:
    data = open_dataset(implicit_dataset)
    source = PairSource(data, negatives=2, unknown_rate=0.0, seed=0)
    train = data.arrays("train")
    observed = set(zip(train.user.tolist(), train.item.tolist(), strict=True))
    epochs = [source.epoch(epoch) for epoch in (0, 0, 1)]
    drawn = []
    for pairs in epochs:
        negative = pairs.rating == 0
        drawn.append(sorted(zip(pairs.user[negative].tolist(), pairs.item[negative].tolist(), strict=True)))
        assert not observed & set(drawn[-1])
        assert len(drawn[-1]) == 2 * len(train.user)
    assert drawn[0] == drawn[1] != drawn[2]
    held_out = source.held_out("test")
    test = data.arrays("test")
    seen = observed | set(zip(test.user.tolist(), test.item.tolist(), strict=True))
    negative = held_out.rating == 0
    assert not seen & set(zip(held_out.user[negative].tolist(), held_out.item[negative].tolist(), strict=True))


def test_an_epoch_is_every_pair_once_in_an_order_of_its_own(tiny_dataset: Path) -> None:
    data = open_dataset(tiny_dataset)
    source = PairSource(data, negatives=4, unknown_rate=0.0, seed=5)
    train = data.arrays("train")
    expected = sorted(zip(train.user.tolist(), train.item.tolist(), train.rating.tolist(), strict=True))
    orders = []
    for epoch in (3, 3, 4):
        pairs = source.epoch(epoch)
        assert sorted(zip(*(column.tolist() for column in pairs), strict=True)) == expected
        orders.append(pairs.user.tolist())
    assert orders[0] == orders[1] != orders[2]


def test_hidden_ids_become_the_unknown_at_the_stated_rate(tiny_dataset: Path) -> None:
    data = open_dataset(tiny_dataset)
    source = PairSource(data, negatives=4, unknown_rate=0.25, seed=0)
    pairs = source.epoch(0)
    for column, unknown in ((pairs.user, data.catalog.known_users), (pairs.item, data.catalog.known_items)):
        assert 0.2 < (column == unknown).mean() < 0.3
    assert source.observed().user.max() < data.catalog.known_users


@pytest.mark.parametrize(("count", "batch_size", "workers"), [(10, 4, 3), (1, 8, 2), (4096, 4096, 4), (1001, 100, 7)])
def test_batches_and_slices_leave_no_row_out(count: int, batch_size: int, workers: int) -> None:
    batches = list(global_batches(count, batch_size))
    sizes = [rows.stop - rows.start for rows in batches]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    slices = [piece for rows in batches for piece in worker_slices(rows, workers)]
    assert len(slices) == workers * len(batches)
    assert [row for piece in slices for row in range(piece.start, piece.stop)] == list(range(count))


def test_row_adam_equals_adamw_when_every_row_is_used() -> None:
    torch.manual_seed(0)
    sparse, dense = torch.nn.Embedding(6, 3, sparse=True), torch.nn.Embedding(6, 3)
    dense.weight.data.copy_(sparse.weight.data)
    ours = RowAdam([sparse.weight], lr=0.05, weight_decay=0.1)
    theirs = torch.optim.AdamW([dense.weight], lr=0.05, weight_decay=0.1)
    for _ in range(5):
        rows = torch.cat([torch.arange(6), torch.randint(6, (4,))])
        target = torch.randn(10, 3)
        for table, optimizer in ((sparse, ours), (dense, theirs)):
            optimizer.zero_grad()
            (table(rows) - target).square().sum().backward()
        sum_gradients([], [sparse.weight], [10])
        ours.step()
        theirs.step()
        torch.testing.assert_close(sparse.weight, dense.weight)


def test_row_adam_leaves_unused_rows_alone() -> None:
    table = torch.nn.Embedding(5, 2, sparse=True)
    before = table.weight.detach().clone()
    optimizer = RowAdam([table.weight], lr=0.1, weight_decay=0.5)
    table(torch.tensor([1, 3, 3])).sum().backward()
    sum_gradients([], [table.weight], [3])
    optimizer.step()
    changed = (table.weight != before).any(dim=1)
    assert changed.tolist() == [False, True, False, True, False]


def test_clipping_equals_torchs_over_dense_and_rows() -> None:
    torch.manual_seed(0)
    linear, sparse, dense = torch.nn.Linear(3, 1), torch.nn.Embedding(6, 3, sparse=True), torch.nn.Embedding(6, 3)
    dense.weight.data.copy_(sparse.weight.data)
    rows = torch.tensor([0, 2, 2, 5])
    gradients = []
    for table in (sparse, dense):
        linear.zero_grad()
        (linear(table(rows)) * 10).square().sum().backward()
        if table is sparse:
            sum_gradients(list(linear.parameters()), [sparse.weight], [4])
            norm = clip_gradients(list(linear.parameters()), [sparse.weight], 0.5)
        else:
            expected = torch.nn.utils.clip_grad_norm_([*linear.parameters(), dense.weight], 0.5)
        assert linear.weight.grad is not None
        gradients.append(linear.weight.grad.clone())
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(*gradients)
    assert sparse.weight.grad is not None
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)


def test_spectral_coordinates_find_planted_tastes(tiny_dataset: Path) -> None:
    """The two leading components separate the planted groups; the bias column follows the user's mean rating."""
    data = open_dataset(tiny_dataset)
    known = data.catalog.known_users, data.catalog.known_items
    pairs = PairSource(data, negatives=1, unknown_rate=0, seed=0).observed()
    found = spectral_coordinates(pairs, *known, components=8, seed=0)
    assert found is not None
    assert found.user.shape == (known[0], 9)
    assert found.item.shape == (known[1], 9)
    truth = data.truth()
    assert truth is not None
    points, groups = found.user[:, 1:3], truth.group[: known[0]]
    centres = np.stack([points[groups == group].mean(axis=0) for group in range(3)])
    nearest = ((points[:, None] - centres) ** 2).sum(axis=-1).argmin(axis=1)
    assert (nearest == groups).mean() > 0.9
    means = np.bincount(pairs.user, weights=pairs.rating) / np.bincount(pairs.user)
    assert np.corrcoef(found.user[:, 0], means)[0, 1] > 0.8


def test_likelihood_follows_the_data(tiny_dataset: Path, implicit_dataset: Path) -> None:
    rated, implicit = open_dataset(tiny_dataset), open_dataset(implicit_dataset)
    assert rating_model(small_run().stage1, rated) == ("categorical", (1, 2, 3, 4, 5))
    assert rating_model(small_run(likelihood="gaussian").stage1, rated) == ("gaussian", (1, 5))
    assert rating_model(small_run(likelihood="bernoulli").stage1, rated) == ("bernoulli", (1, 5))
    assert rating_model(small_run().stage1, implicit) == ("bernoulli", (0, 1))
    with pytest.raises(InputError, match=r"stage1\.likelihood: categorical needs ratings"):
        rating_model(small_run(likelihood="categorical").stage1, implicit)


@pytest.mark.parametrize("changes", [
    {"likelihood": "gaussian"}, {"likelihood": "bernoulli"}, {"clusters": 1}, {"embedding_init": "random"},
    {"user_agreement": 0.0}, {"mixture_init": "random"}, {"pretrain_epochs": 0}, {"batch_size": 5000},
])  # fmt: skip
def test_every_variant_trains(tiny_dataset: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    metrics = train_stage1(small_run(**changes), tiny_dataset, tmp_path / "stage1", LocalContext())
    assert np.isfinite(metrics["test"]["elbo"])
    assert len(metrics["cluster_shares"]) == changes.get("clusters", 3)


QUICKSTART: dict[str, Any] = {
    "embedding_size": 64, "latent_size": 32, "encoder_heads": 4, "encoder_feedforward": 128, "decoder_hidden": 64,
    "dropout": 0.0, "batch_size": 512, "pretrain_epochs": 2, "epochs": 8,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_groups_are_found(tmp_path: Path, seed: int) -> None:
    dataset = synthesize(tmp_path / "data", seed=seed)
    config = RunConfig.model_validate({"seed": seed, "stage1": QUICKSTART})
    metrics = train_stage1(config, dataset, tmp_path / "stage1", LocalContext())
    truth = open_dataset(dataset).truth()
    assert truth is not None
    assert metrics["user_ari"] > 0.9
    assert metrics["smallest_cluster_share"] > 0.2
    assert metrics["test"]["rmse"] < 0.6 * truth.bias_rmse
    assert metrics["test"]["rmse"] < 1.14 * truth.noise_floor_rmse


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "what"), [
    ({"embedding_init": "random", "mixture_init": "random", "user_agreement": 0.0}, "clusters"),
    ({"embedding_init": "random", "user_agreement": 0.0, "pretrain_epochs": 0, "epochs": 30, "batch_size": 4096,
      "learning_rate": 1e-5, "mixture_learning_rate": 1e-5}, "ratings"),
])  # fmt: skip
def test_negative_controls_learn_nothing(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    """Without a fitted mixture clusters collapse; with the paper's printed rates on small data nothing is learnt."""
    dataset = synthesize(tmp_path / "data", seed=0)
    context = LocalContext()
    config = RunConfig.model_validate({"stage1": {**QUICKSTART, **changes}})
    metrics = train_stage1(config, dataset, tmp_path / "stage1", context)
    assert metrics["user_ari"] < 0.1
    assert any("warning" in line for line in context.lines)
    if what == "clusters":
        assert metrics["smallest_cluster_share"] < 0.02
    else:
        assert metrics["test"]["rmse"] > 0.97 * metrics["test"]["constant_rmse"]
