"""Stage 2's loop and both engines: the joint loss, equality of engines and workers, exact resumption, the artifact."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, multiprocessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from gavamoe.batches import Batch
from gavamoe.checkpoint import load_vae_gmm, read_manifest
from gavamoe.config import RunConfig, parse_config
from gavamoe.context import LocalContext, Metrics
from gavamoe.dataset import open_dataset
from gavamoe.engines import make_engine
from gavamoe.errors import InputError, RunError
from gavamoe.explainer import GavamoeForCausalLM, load_explainer
from gavamoe.joint import JointModel, parameter_groups
from gavamoe.routes import read_routes, route_pairs
from gavamoe.stage1 import train_stage1
from gavamoe.stage2 import rate_at, train_stage2
from gavamoe.stage2_setup import Setup, prepare
from gavamoe.synthetic import synthesize

pytestmark = pytest.mark.usefixtures("extensions_dir")

STEPS = 12
TINY: dict[str, Any] = {
    "stage1": {
        "embedding_size": 16, "latent_size": 4, "encoder_heads": 2, "encoder_feedforward": 32, "decoder_hidden": 16,
        "batch_size": 256, "pretrain_epochs": 1, "epochs": 1, "mixture_restarts": 1, "learning_rate": 5e-3,
    },
    "stage2": {
        "scratch": {"hidden_size": 32, "layers": 2, "heads": 2, "intermediate_size": 64, "vocabulary": 400},
        "experts": {"count": 4, "intermediate_size": 16}, "batch_size": 16, "elbo_batch_size": 64, "max_steps": STEPS,
        "evaluate_every": 6, "checkpoint_every": 6, "validation_rows": 24, "learning_rate": 1e-2,
        "stage1_learning_rate": 1e-3,
    },
    "runtime": {"engine": "torch"},
}  # fmt: skip
FILES = [
    "README.md", "artifact.json", "catalog/catalog.json", "catalog/items.parquet", "catalog/users.parquet",
    "config.json", "generation_config.json", "metrics.json", "model.safetensors", "prompt.json", "routes.parquet",
    "tokenizer.json", "tokenizer_config.json", "vae_gmm.json", "vae_gmm.safetensors",
]  # fmt: skip


def tiny(*overrides: str) -> RunConfig:
    return parse_config(TINY, "test", overrides)


@pytest.fixture(scope="module")
def stage1(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stage1") / "stage1"
    train_stage1(tiny(), tiny_dataset, out, LocalContext())
    return out


def numbers(lines: list[dict[str, Any]], phase: str) -> list[dict[str, Any]]:
    """The lines of a phase, without its name and without what time decides."""
    left_out = ("phase", "seconds", "tokens_per_second")
    return [{n: v for n, v in line.items() if n not in left_out} for line in lines if line["phase"] == phase]


class Trained:
    """A finished run: its context's lines and checkpoints, its folder, its metrics."""

    def __init__(self, config: RunConfig, data: Path, stage1: Path, work: Path, resume: Path | None = None) -> None:
        self.context = LocalContext(storage=work / "checkpoints", resume_from=resume)
        self.out = work / "stage2"
        self.metrics = train_stage2(config, data, stage1, self.out, self.context)

    def lines(self, phase: str, *, after: int = -1) -> list[dict[str, Any]]:
        """Numbers of log lines, without what time decides."""
        return numbers([line for line in self.context.lines if line["step"] > after], phase)

    def weights(self) -> dict[str, Tensor]:
        model, _ = load_explainer(self.out)
        vae_gmm = load_vae_gmm(self.out)
        return model.state_dict() | {f"vae.{name}": tensor for name, tensor in vae_gmm.state_dict().items()}


@pytest.fixture(scope="module")
def torch_run(tiny_dataset: Path, stage1: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tiny(), tiny_dataset, stage1, tmp_path_factory.mktemp("torch"))


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_a_run_learns_and_logs(torch_run: Trained) -> None:
    steps = [(line["phase"], line["step"]) for line in torch_run.context.lines]
    assert steps == [("valid", 0), ("train", 6), ("valid", 6), ("train", 10), ("train", 12), ("valid", 12)]
    first, middle, last = (line["validation_loss"] for line in torch_run.lines("valid"))
    assert first == pytest.approx(math.log(400), rel=0.1)
    assert first > middle > last
    train = torch_run.lines("train")[0]
    assert train["loss"] == pytest.approx(0.1 * train["elbo_loss"] + 0.9 * train["explanation_loss"], rel=1e-5)
    assert train["elbo_loss"] == pytest.approx(0.1 * train["kl"] - train["reconstruction"], rel=1e-4)
    assert torch_run.metrics["validation_loss"] == last
    assert torch_run.metrics["validation_loss_at_start"] == first
    assert torch_run.metrics["validation_perplexity"] == pytest.approx(math.exp(last))


def test_the_artifact_is_complete_and_plain_transformers_reads_it(
    torch_run: Trained, tiny_dataset: Path, stage1: Path
) -> None:
    out = torch_run.out
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == FILES
    manifest = read_manifest(out, "stage2")
    assert manifest.inputs == {
        "dataset": open_dataset(tiny_dataset).fingerprint,
        "stage1": read_manifest(stage1, "stage1").fingerprint,
    }
    assert json.loads((out / "metrics.json").read_text()) == torch_run.metrics
    model = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model, GavamoeForCausalLM)
    assert len(AutoTokenizer.from_pretrained(out)) == model.config.vocab_size
    assert torch.equal(model.user_embedding.weight, load_vae_gmm(out).user_embedding.weight)
    card = (out / "README.md").read_text()
    assert f"| validation loss (nats per token) | {torch_run.metrics['validation_loss']:.3f} |" in card
    assert "4 experts per block (shared), top 2, 3 gates" in card


def test_routes_in_the_artifact_are_those_of_its_own_parameters(torch_run: Trained, tiny_dataset: Path) -> None:
    pairs = open_dataset(tiny_dataset).arrays("test")
    saved = read_routes(torch_run.out / "routes.parquet", "test")
    again = route_pairs(load_vae_gmm(torch_run.out), pairs.user, pairs.item)
    assert (saved.cluster == again.cluster).all()
    np.testing.assert_array_equal(saved.responsibilities, again.responsibilities)


def test_deepspeed_equals_torch(
    torch_run: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path, extensions_dir: Path
) -> None:
    run = Trained(tiny("runtime.engine=deepspeed", "stage2.zero_stage=1"), tiny_dataset, stage1, tmp_path)
    check_equal_runs(run, torch_run)
    assert not torch.distributed.is_initialized()
    assert not list(extensions_dir.rglob("*.so")), "DeepSpeed compiled an operation"


@pytest.mark.parametrize(
    "overrides",
    [("0",), ("2",), ("3",), ("2", "stage2.offload_optimizer=true"), ("3", "stage2.offload_parameters=true")],
)
def test_every_zero_stage_equals_torch(
    overrides: tuple[str, ...],
    torch_run: Trained,
    tiny_dataset: Path,
    stage1: Path,
    tmp_path: Path,
    extensions_dir: Path,
) -> None:
    stage, *others = overrides
    config = tiny("runtime.engine=deepspeed", f"stage2.zero_stage={stage}", *others)
    check_equal_runs(Trained(config, tiny_dataset, stage1, tmp_path), torch_run)


def check_equal_runs(run: Trained, expected: Trained) -> None:
    """Losses to 1e-4 and weights to 1e-3: float32, whose sums the engines take in different orders."""
    for phase in ("train", "valid"):
        for line, wanted in zip(run.lines(phase), expected.lines(phase), strict=True):
            assert line == pytest.approx(wanted, rel=1e-4)
    close(run.weights(), expected.weights(), 1e-3)


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_resuming_equals_never_having_stopped(
    engine: str, torch_run: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    config = tiny(f"runtime.engine={engine}")
    whole = torch_run if engine == "torch" else Trained(config, tiny_dataset, stage1, tmp_path / "whole")
    resumed = Trained(config, tiny_dataset, stage1, tmp_path / "resumed", resume=whole.context.checkpoints[0])
    assert resumed.lines("train") == whole.lines("train", after=6)
    assert resumed.lines("valid") == whole.lines("valid", after=6)
    close(resumed.weights(), whole.weights(), 0.0)
    assert resumed.metrics["validation_losses"] == whole.metrics["validation_losses"]


def test_a_finished_run_is_only_exported_again(
    torch_run: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    again = Trained(tiny(), tiny_dataset, stage1, tmp_path, resume=torch_run.context.checkpoints[-1])
    assert again.context.lines == []
    close(again.weights(), torch_run.weights(), 0.0)
    assert again.metrics["validation_loss"] == torch_run.metrics["validation_loss"]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("runtime.engine=deepspeed", r"has runtime\.engine torch, this run has deepspeed"),
        ("stage2.zero_stage=2", r"has stage2\.zero_stage 1, this run has 2"),
        ("stage2.max_steps=20", r"has steps 12, this run has 20"),
        ("seed=4", r"has seed 0, this run has 4"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    override: str, problem: str, torch_run: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=problem):
        Trained(tiny(override), tiny_dataset, stage1, tmp_path, resume=torch_run.context.checkpoints[0])
    assert not (tmp_path / "stage2").exists()


def test_accumulated_batches_equal_one_larger_batch(tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    # alpha 0 and no hidden ids: what is drawn at random would be drawn in another order
    same = ("stage2.alpha=0", "stage1.unknown_id_rate=0", "stage2.evaluate_every=0")
    large = Trained(tiny(*same), tiny_dataset, stage1, tmp_path / "large")
    small = ("stage2.batch_size=4", "stage2.gradient_accumulation=4")
    split = Trained(tiny(*same, *small), tiny_dataset, stage1, tmp_path / "split")
    for line, wanted in zip(split.lines("train"), large.lines("train"), strict=True):
        assert line == pytest.approx(wanted, rel=1e-4)


def _worker(rank: int, config: RunConfig, data: Path, stage1: Path, work: Path) -> None:
    """One of two processes, as Ray Train would start it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{work}/meeting", rank=rank, world_size=2)
    lines: list[dict[str, Any]] = []

    class Context(LocalContext):
        def log(self, metrics: Metrics) -> None:
            lines.append(dict(metrics))

    context = Context(rank=rank, world_size=2)
    metrics = train_stage2(config, data, stage1, work / "stage2", context)
    (work / f"rank{rank}.json").write_text(json.dumps({"lines": lines, "metrics": metrics}))
    torch.distributed.destroy_process_group()


def in_two_workers(config: RunConfig, data: Path, stage1: Path, work: Path) -> list[dict[str, Any]]:
    """Both workers' log lines and metrics."""
    work.mkdir()
    multiprocessing.spawn(_worker, (config, data, stage1, work), nprocs=2)
    ranks = [json.loads((work / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["metrics"]["validation_losses"] == ranks[1]["metrics"]["validation_losses"]
    return ranks


TWO_WORKERS = ("runtime.engine=deepspeed", "runtime.workers=2", "stage2.batch_size=8")


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))])
def test_two_workers_equal_one(stage: int, tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    same = ("stage2.alpha=0", "stage1.unknown_id_rate=0")  # what is drawn at random differs by worker
    alone = Trained(tiny(*same), tiny_dataset, stage1, tmp_path)
    config = tiny(*same, *TWO_WORKERS, f"stage2.zero_stage={stage}")
    ranks = in_two_workers(config, tiny_dataset, stage1, tmp_path / "two")
    for phase in ("train", "valid"):
        for line, wanted in zip(numbers(ranks[0]["lines"], phase), alone.lines(phase), strict=True):
            assert line == pytest.approx(wanted, rel=1e-4)
    two = load_explainer(tmp_path / "two/stage2")[0].state_dict()
    close(two, load_explainer(alone.out)[0].state_dict(), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_two_workers_train_stage_1_along(
    stage: int, torch_run: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    """With random latents and hidden ids losses agree roughly; the refreshed routes are those of the weights."""
    config = tiny(*TWO_WORKERS, "stage2.elbo_batch_size=32", f"stage2.zero_stage={stage}")
    ranks = in_two_workers(config, tiny_dataset, stage1, tmp_path / "two")
    for line, wanted in zip(numbers(ranks[0]["lines"], "train"), torch_run.lines("train"), strict=True):
        assert line["explanation_loss"] == pytest.approx(wanted["explanation_loss"], rel=0.02)
        assert line["elbo_loss"] == pytest.approx(wanted["elbo_loss"], rel=0.05)
    out = tmp_path / "two/stage2"
    pairs = open_dataset(tiny_dataset).arrays("train")
    assert (
        read_routes(out / "routes.parquet", "train").cluster
        == route_pairs(load_vae_gmm(out), pairs.user, pairs.item).cluster
    ).all()


@pytest.fixture
def setup(tiny_dataset: Path, stage1: Path) -> Setup:
    return prepare(tiny(), tiny_dataset, stage1)


def joint_batch(setup: Setup) -> Batch:
    pairs = setup.pairs.epoch(0).take(slice(0, 64))
    columns = {"users": pairs.user, "items": pairs.item, "ratings": pairs.rating}
    batch = setup.train.collate(np.arange(16), setup.clusters["train"], setup.pad)
    return batch | {name: torch.from_numpy(column) for name, column in columns.items()}


def gradients(setup: Setup, alpha: float, *, text: bool = True, pairs: bool = True) -> dict[str, Tensor | None]:
    """Gradients of the joint loss at `alpha`, by name; the same random numbers at every call."""
    model = JointModel(setup.model.explainer, setup.model.vae_gmm, alpha).train()
    model.zero_grad(set_to_none=True)
    stage1_names = ("users", "items", "ratings")
    batch = {name: t for name, t in joint_batch(setup).items() if (pairs if name in stage1_names else text)}
    torch.manual_seed(0)
    model(**batch)["loss"].backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def test_shared_tables_get_both_gradients(setup: Setup) -> None:
    both = gradients(setup, 0.3)
    text, pairs = gradients(setup, 0.3, pairs=False), gradients(setup, 0.3, text=False)
    for table in ("explainer.user_embedding.weight", "explainer.item_embedding.weight"):
        parts = [part[table] for part in (text, pairs)]
        assert parts[0] is not None
        assert parts[1] is not None
        assert min(part.abs().max() for part in parts if part is not None) > 1e-8
        torch.testing.assert_close(both[table], parts[0] + parts[1])
    assert text["vae_gmm.encoder.mean.weight"] is None
    assert both["vae_gmm.encoder.mean.weight"] is not None


def test_the_loss_weighs_both_parts(setup: Setup) -> None:
    def loss(alpha: float) -> dict[str, float]:
        torch.manual_seed(0)
        model = JointModel(setup.model.explainer, setup.model.vae_gmm, alpha).train()
        return {name: float(value.detach()) for name, value in model(**joint_batch(setup)).items()}

    half = loss(0.25)
    assert half["loss"] == pytest.approx(0.25 * half["elbo_loss"] + 0.75 * half["explanation_loss"], rel=1e-5)
    assert set(loss(0.0)) == {"loss", "explanation_loss"}
    assert set(loss(1.0)) == {"loss", "elbo_loss", "reconstruction", "kl"}


def own(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    shared = ("user_embedding", "item_embedding")
    return {n: t for n, t in state.items() if n.startswith(prefix) and not n.removeprefix(prefix).startswith(shared)}


@pytest.mark.parametrize(("alpha", "idle"), [(0, "vae_gmm."), (1, "explainer.")])
@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_a_loss_without_weight_leaves_its_own_parameters_untouched(
    alpha: float, idle: str, engine: str, tiny_dataset: Path, stage1: Path
) -> None:
    config = tiny(f"stage2.alpha={alpha}", "stage2.weight_decay=0.5", f"runtime.engine={engine}")
    setup = prepare(config, tiny_dataset, stage1)
    before = {name: tensor.clone() for name, tensor in setup.model.state_dict().items()}
    running = make_engine(engine, setup.model, config.stage2, world_size=1, device="cpu")
    try:
        for _ in range(3):
            running.train_step([joint_batch(setup)], 1.0)
        after = running.state_dict()
    finally:
        running.close()
    close(own(after, idle), own(before, idle), 0.0)
    busy = "explainer." if idle == "vae_gmm." else "vae_gmm."
    moved = [name for name, tensor in own(before, busy).items() if not torch.equal(tensor, after[name])]
    assert len(moved) > 0.8 * len(own(before, busy))
    for table in ("explainer.user_embedding.weight", "vae_gmm.item_embedding.weight"):
        assert not torch.equal(before[table], after[table])


def test_decay_spares_norms_biases_tables_and_the_mixture(setup: Setup) -> None:
    names = {id(parameter): name for name, parameter in setup.model.named_parameters()}
    groups = parameter_groups(setup.model, tiny("stage2.weight_decay=0.5").stage2)
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    spared = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert decayed | spared == set(names.values())
    assert not decayed & spared
    assert {"explainer.model.layers.0.self_attn.q_proj.weight", "vae_gmm.encoder.mean.weight"} <= decayed
    assert {"explainer.model.layers.0.mlp.experts.down_proj", "explainer.model.layers.0.mlp.router.weight"} <= decayed
    assert {"explainer.model.norm.weight", "explainer.model.embed_tokens.weight", "vae_gmm.prior.means"} <= spared
    slow = {names[id(p)] for group in groups if group["lr"] == 1e-3 for p in group["params"]}
    assert slow == {n for n in names.values() if n.startswith("vae_gmm.") or "user_emb" in n or "item_emb" in n}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("cosine", [1 / 3, 2 / 3, *(0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6))]),
    ],
)
def test_learning_rate_warms_up_then_follows_the_schedule(schedule: str, expected: list[float]) -> None:
    config = tiny(f"stage2.schedule={schedule}", "stage2.warmup_share=0.25").stage2
    assert [rate_at(step, 8, config) for step in range(8)] == pytest.approx(expected)


def test_bf16_and_gradient_checkpointing_stay_close(
    torch_run: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    checkpointed = Trained(tiny("stage2.gradient_checkpointing=true"), tiny_dataset, stage1, tmp_path / "a")
    assert checkpointed.metrics["validation_loss"] == pytest.approx(torch_run.metrics["validation_loss"], rel=1e-5)
    narrow = Trained(tiny("stage2.precision=bf16"), tiny_dataset, stage1, tmp_path / "b")
    assert narrow.metrics["validation_loss"] == pytest.approx(torch_run.metrics["validation_loss"], rel=0.02)
    assert narrow.metrics["validation_loss"] != torch_run.metrics["validation_loss"]
    assert {tensor.dtype for tensor in narrow.weights().values()} == {torch.float32}


def test_router_losses_are_logged_and_weigh_in(tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    run = Trained(tiny("stage2.experts.load_balance_weight=0.5"), tiny_dataset, stage1, tmp_path)
    for line in run.lines("train"):
        assert 0.5 <= line["router_loss"] < 1.0  # 0.5 when every gate uses its experts evenly
        text = line["explanation_loss"] + line["router_loss"]
        assert line["loss"] == pytest.approx(0.1 * line["elbo_loss"] + 0.9 * text, rel=1e-4)


def test_clusters_decide_what_is_written(torch_run: Trained, setup: Setup) -> None:
    """A row's loss depends on its own cluster, and on no other row's."""
    model, _ = load_explainer(torch_run.out)
    with torch.no_grad():  # experts of the shared conversion start at zero output
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.normal_(std=0.5)
    batch = setup.train.collate(np.arange(4), setup.clusters["train"], setup.pad)
    shape = {name: batch[name] for name in ("input_ids", "attention_mask")}
    one = model(**shape, cluster_ids=torch.tensor([0, 1, 2, 0])).logits
    other = model(**shape, cluster_ids=torch.tensor([0, 1, 0, 0])).logits
    torch.testing.assert_close(one[[0, 1, 3]], other[[0, 1, 3]], rtol=1e-4, atol=1e-4)
    assert (one[2] - other[2]).abs().max() > 1e-2


def test_stage_1_of_another_dataset_is_refused(stage1: Path, tmp_path: Path) -> None:
    other = synthesize(tmp_path / "other", users=60, items=40, ratings=1500, groups=3, seed=1)
    with pytest.raises(InputError, match=r"stage1: was trained on another dataset than .*other"):
        train_stage2(tiny(), other, stage1, tmp_path / "stage2", LocalContext())
    assert not (tmp_path / "stage2").exists()


def test_other_clusters_than_stage_1_are_refused(tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has 3 clusters, the config has stage1\.clusters 4"):
        train_stage2(tiny("stage1.clusters=4"), tiny_dataset, stage1, tmp_path / "stage2", LocalContext())


def test_an_existing_folder_is_refused_before_training(torch_run: Trained, tiny_dataset: Path, stage1: Path) -> None:
    context = LocalContext()
    with pytest.raises(InputError, match="stage2: already exists"):
        train_stage2(tiny(), tiny_dataset, stage1, torch_run.out, context)
    assert context.lines == []


def test_a_loss_that_is_not_finite_stops_the_run(tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    wild = tiny("stage2.learning_rate=1e38", "stage2.clip_norm=1e30", "stage2.warmup_share=0")
    with pytest.raises(RunError, match="lower the learning rates"):
        train_stage2(wild, tiny_dataset, stage1, tmp_path / "stage2", LocalContext())
    assert list(tmp_path.iterdir()) == []


def test_torch_engine_refuses_several_workers(setup: Setup) -> None:
    with pytest.raises(InputError, match="torch runs one worker, not 2"):
        make_engine("torch", setup.model, tiny().stage2, world_size=2, device="cpu")
