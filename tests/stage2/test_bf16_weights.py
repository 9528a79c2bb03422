"""Weights stored as bfloat16, float32 master copies in ZeRO's shards: what they are, and that they train as well."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.stage2_runs import HALF_BATCHES, Trained, close, in_two_workers, joint_batch, numbers, save_base, tiny
from safetensors.torch import load_file

from gavamoe.artifacts.files import read_json
from gavamoe.errors import InputError
from gavamoe.model.build import load_explainer
from gavamoe.stage2.engines.zero import _tensors_only
from gavamoe.stage2.joint_model import parameter_groups
from gavamoe.stage2.schedule import PEAK
from gavamoe.stage2.setup import prepare
from gavamoe.stage2.training_engines import make_engine

pytestmark = pytest.mark.usefixtures("extensions_dir")

HALVED = ("runtime.engine=deepspeed", "stage2.precision=bf16_weights")


def test_routers_slots_and_stage_1_stay_float32(tiny_dataset: Path, stage1: Path) -> None:
    model = prepare(tiny(*HALVED, "stage2.prompt.cluster=true"), tiny_dataset, stage1).model
    wide = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    narrow = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    assert {name for name in wide if name.startswith("explainer.model")} == {
        f"explainer.model.layers.{layer}.mlp.router.weight" for layer in (0, 1)
    }
    slots = ("user_embedding", "item_embedding", "user_projection", "item_projection", "cluster_embedding")
    assert {f"explainer.{name}.weight" for name in slots} <= wide
    assert not any(name.startswith("vae_gmm") for name in narrow)
    assert "explainer.model.embed_tokens.weight" in narrow
    assert any(".experts." in name for name in narrow)
    groups = parameter_groups(model, tiny(*HALVED).stage2)
    types = [{parameter.dtype for parameter in group["params"]} for group in groups]
    assert all(len(each) == 1 for each in types)
    assert types[0] == {torch.float32}, "the first group's type is that of ZeRO's buffers"
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(trained)


@pytest.mark.parametrize("stage", [1, 2])
def test_it_trains_like_autocast(stage: int, tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    """Validation losses of 12 steps of two accumulated batches to 1 %; they fall by a tenth at least."""
    steps = ("runtime.engine=deepspeed", f"stage2.zero_stage={stage}", "stage2.gradient_accumulation=2")
    found = {
        precision: Trained(tiny(*steps, f"stage2.precision={precision}"), tiny_dataset, stage1, tmp_path / precision)
        for precision in ("bf16", "bf16_weights")
    }
    losses = {name: [line["validation_loss"] for line in run.lines("valid")] for name, run in found.items()}
    assert losses["bf16_weights"] == pytest.approx(losses["bf16"], rel=0.01)
    assert losses["bf16_weights"] != losses["bf16"]
    assert losses["bf16_weights"][-1] < 0.9 * losses["bf16_weights"][0]


def test_steps_smaller_than_a_bfloat16_are_kept(tiny_dataset: Path, stage1: Path) -> None:
    """Eight steps of 1e-4 move weights of 1 by a fifth of a bfloat16's last digit there: the weights that compute show
    nothing of it, the float32 copies all."""
    config = tiny(*HALVED, "stage2.zero_stage=2", "stage2.learning_rate=1e-4")
    setup = prepare(config, tiny_dataset, stage1)
    norm = setup.model.explainer.model.norm.weight
    engine: Any = make_engine("deepspeed", setup.model, config.stage2, world_size=1, device="cpu")
    sharded = engine._engine.optimizer
    pairs = list(zip(sharded.single_partition_of_fp32_groups, sharded.bit16_groups_flat, strict=True))
    try:
        assert all(torch.equal(master, used.float()) for master, used in pairs)
        for _ in range(8):
            engine.train_step([joint_batch(setup)], PEAK)
        assert {master.dtype for master, _ in pairs} == {torch.float32}
        assert {used.dtype for _, used in pairs} == {torch.float32, torch.bfloat16}
        assert all(torch.equal(master.to(used.dtype), used) for master, used in pairs)
        lost = [(master != used.float()).double().mean() for master, used in pairs if used.dtype == torch.bfloat16]
        assert min(lost) > 0.5
        assert (norm == 1).all()
    finally:
        engine.close()


@pytest.mark.parametrize(
    "overrides",
    [
        ("stage2.zero_stage=1",),
        ("stage2.zero_stage=2", "stage2.gradient_accumulation=2"),
        ("stage2.zero_stage=2", "stage2.offload_optimizer=true"),
        ("stage2.zero_stage=2", "stage2.lora.rank=2"),
    ],
    ids=lambda overrides: " ".join(one.partition(".")[2] for one in overrides),
)
def test_resuming_equals_never_having_stopped(
    overrides: tuple[str, ...], tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    base = (f"stage2.base_model={save_base(tmp_path / 'base')}",) if "lora" in overrides[-1] else ()
    config = tiny(*HALVED, *overrides, *base)
    whole = Trained(config, tiny_dataset, stage1, tmp_path / "whole")
    resumed = Trained(config, tiny_dataset, stage1, tmp_path / "resumed", resume=whole.context.checkpoints[0])
    assert resumed.lines("train") == whole.lines("train", after=6)
    close(resumed.weights(), whole.weights(), 0.0)


def test_the_artifact_is_float32_as_all_are(tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    run = Trained(tiny(*HALVED, "stage2.zero_stage=2", "stage2.keep=last"), tiny_dataset, stage1, tmp_path)
    assert read_json(run.out / "config.json")["dtype"] == "float32"
    saved = load_file(run.out / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    model, _ = load_explainer(run.out)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    experts = saved["model.layers.0.mlp.experts.down_proj"]
    assert torch.equal(experts, experts.bfloat16().float()), "the weights that were validated, not their masters"
    kept = run.context.checkpoints[-1] / "engine/mp_rank_00_model_states.pt"
    with _tensors_only(kept):
        state = torch.load(kept)
    assert torch.equal(state["module"]["explainer.model.layers.0.mlp.experts.down_proj"].float(), experts)


def test_a_checkpoint_of_other_numbers_is_refused(tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    brief = ("runtime.engine=deepspeed", "stage2.zero_stage=2", "stage2.max_steps=4", "stage2.checkpoint_every=2")
    whole = Trained(tiny(*brief), tiny_dataset, stage1, tmp_path / "whole")
    with pytest.raises(InputError, match=r"has stage2\.precision fp32 or bf16, this run has bf16_weights"):
        Trained(tiny(*brief, *HALVED), tiny_dataset, stage1, tmp_path, resume=whole.context.checkpoints[0])


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            (*HALVED, "stage2.zero_stage=3"),
            r"stage2\.precision: bf16_weights needs zero_stage 1 or 2; 3 lays",
        ),
        (
            (*HALVED, "stage2.zero_stage=0"),
            r"stage2\.precision: bf16_weights needs zero_stage 1 or 2; 0 has no",
        ),
        (("stage2.precision=bf16_weights",), r"stage2\.precision: bf16_weights needs runtime\.engine deepspeed"),
    ],
)
def test_what_keeps_no_masters_is_refused(overrides: tuple[str, ...], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        tiny(*overrides)


@pytest.mark.slow
def test_two_workers_equal_one(tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    """ZeRO-2, whose gradients travel as bfloat16: validation losses of 12 steps to 1 %."""
    same = (
        *HALVED, "stage2.zero_stage=2", "stage2.evaluate_every=1", "stage2.keep=last", "stage2.alpha=0",
        "stage1.unknown_id_rate=0",
    )  # fmt: skip
    alone = Trained(tiny(*same), tiny_dataset, stage1, tmp_path / "alone")
    ranks = in_two_workers(tiny(*same, *HALF_BATCHES), tiny_dataset, stage1, tmp_path / "two")
    for line, wanted in zip(numbers(ranks[0]["lines"], "valid"), alone.lines("valid"), strict=True):
        assert line["validation_loss"] == pytest.approx(wanted["validation_loss"], rel=0.01)
