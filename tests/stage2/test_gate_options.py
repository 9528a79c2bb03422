"""Ways to start and to gate experts: each trained on every ZeRO stage, resumed to the last bit, and written with."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.stage2_runs import Trained, close, in_two_workers, joint_batch, numbers, save_base
from helpers.tiny import TWO_WORKERS, tiny

from gavamoe.config.schema import GenerationConfig
from gavamoe.errors import InputError
from gavamoe.generation.generator import ExplanationGenerator
from gavamoe.generation.request import ExplanationRequest
from gavamoe.model.lora import ROUTED_MODULES
from gavamoe.stage2.batches import GateDropout, IdDropout
from gavamoe.stage2.expert_movement import Movement
from gavamoe.stage2.schedule import Rates
from gavamoe.stage2.setup import prepare
from gavamoe.stage2.training_engines import make_engine

pytestmark = pytest.mark.usefixtures("extensions_dir")
SHORT = ("stage2.max_steps=4", "stage2.evaluate_every=2", "stage2.checkpoint_every=2", "stage2.validation_rows=8")
SOFT = ("stage2.soft_routes=true", "stage2.gate_dropout=0.2")
OPTIONS: dict[str, tuple[str, ...]] = {
    "soft": (*SOFT, "stage2.experts.gate_bias=2", "stage2.slot_dropout=0.5"),
    "upcycle": ("stage2.experts.conversion=upcycle", "stage2.experts.load_balance_weight=0.01"),
    "lora": ("stage2.experts.conversion=lora", "stage2.experts.lora_rank=2"),
    "residual": ("stage2.shared_first=0.5", "stage2.experts.conversion=upcycle"),
    "residual-lora": ("stage2.shared_first=0.5", "stage2.experts.conversion=lora", "stage2.experts.lora_rank=2"),
    "token": ("stage2.experts.enabled=false", "stage2.prompt.cluster=true"),
    "soft-rating": ("stage2.prompt.soft_rating=true",),
    "wide": ("stage2.experts.enabled=false", "stage2.extra_width=24"),
}
ENGINES = {
    "torch": ("runtime.engine=torch",),
    "zero-0": ("runtime.engine=deepspeed", "stage2.zero_stage=0"),
    "zero-1": ("runtime.engine=deepspeed", "stage2.zero_stage=1"),
    "zero-3": ("runtime.engine=deepspeed", "stage2.zero_stage=3"),
}
FAST = (
    ("soft", "torch"),
    ("soft", "zero-3"),
    ("lora", "zero-3"),
    ("upcycle", "zero-1"),
    ("residual", "zero-1"),
    ("token", "torch"),
    ("soft-rating", "torch"),
    ("wide", "torch"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model")


@pytest.mark.parametrize(
    ("option", "engine"),
    [
        pytest.param(one, other, marks=() if (one, other) in FAST else pytest.mark.slow)
        for one in OPTIONS
        for other in ENGINES
    ],
)
def test_a_run_trains_resumes_and_writes(
    option: str, engine: str, base: Path, tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    config = tiny(f"stage2.base_model={base}", *OPTIONS[option], *ENGINES[engine], *SHORT)
    whole = Trained(config, tiny_dataset, stage1, tmp_path / "whole")
    assert whole.metrics["validation_loss"] < whole.metrics["validation_loss_at_start"]
    resumed = Trained(config, tiny_dataset, stage1, tmp_path / "resumed", resume=whole.context.checkpoints[0])
    assert resumed.lines("train") == whole.lines("train", after=2)
    close(resumed.weights(), whole.weights(), 0.0)
    for line, wanted in zip(resumed.lines("valid"), whole.lines("valid", after=2), strict=True):
        assert line == pytest.approx(wanted, rel=1e-5)  # sums of the probe follow the place of tensors in memory
    if whole.metrics["experts"]:
        ratio = whole.metrics["experts"].pop("movement_ratio")
        again = resumed.metrics["experts"].pop("movement_ratio")
        assert again == ratio or again == pytest.approx(ratio, rel=1e-5)
    generator = ExplanationGenerator.load(whole.out)
    requests = [ExplanationRequest(user=user, item=3) for user in (0, 1, 10**6)]
    for settings in (GenerationConfig(max_new_tokens=4), GenerationConfig(max_new_tokens=4, beams=2)):
        assert all(written.new_tokens for written in generator.explain(requests, settings))


def test_what_low_rank_experts_leave_frozen(base: Path, tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    config = tiny(f"stage2.base_model={base}", *OPTIONS["lora"], "stage2.alpha=0", *SHORT)
    setup = prepare(config, tiny_dataset, stage1)
    routed = [module for module in setup.model.modules() if isinstance(module, ROUTED_MODULES)]
    assert all(p.requires_grad for module in routed for p in module.parameters())
    frozen = [name for name, p in setup.model.explainer.model.named_parameters() if not p.requires_grad]
    assert {name for name, _ in setup.model.explainer.model.named_parameters() if ".mlp.shared_expert." in name} < set(
        frozen
    )
    before = {name: tensor.clone() for name, tensor in setup.model.explainer.model.state_dict().items()}
    after = ExplanationGenerator.load(Trained(config, tiny_dataset, stage1, tmp_path).out).model.model.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == set(before) - set(frozen)


@pytest.mark.parametrize("conversion", ["shared", "lora"])
@pytest.mark.parametrize("engine", ["torch", "zero-1"])
def test_residual_training_moves_the_shared_model_then_gates_and_experts_alone(
    conversion: str, engine: str, base: Path, tiny_dataset: Path, stage1: Path
) -> None:
    options = (f"stage2.experts.conversion={conversion}", "stage2.shared_first=0.5", *ENGINES[engine])
    config = tiny(f"stage2.base_model={base}", *options, "stage2.experts.lora_rank=2")
    setup = prepare(config, tiny_dataset, stage1)
    running = make_engine(config.runtime.engine, setup.model, config.stage2, world_size=1, device="cpu")
    try:
        states = [running.state_dict()]
        for rates in (Rates(1.0, 0.0), Rates(0.0, 1.0)):
            running.train_step([joint_batch(setup)], rates)
            states.append(running.state_dict())
    finally:
        running.close()
    first, then = ({name for name in one if not torch.equal(one[name], other[name])} for one, other in pairwise(states))
    routed = {name for name in states[0] if ".experts." in name or ".router." in name}
    assert any(".mlp.shared_expert." in name for name in first)  # the base model too, which lora alone would freeze
    assert first.isdisjoint(routed)
    assert then
    assert then <= routed


def test_soft_and_hard_routes_of_certain_rows_are_one(tiny_dataset: Path, stage1: Path) -> None:
    hard, soft = (prepare(tiny(*options), tiny_dataset, stage1) for options in ((), SOFT))
    share_NK = soft.clusters["valid"]
    assert np.allclose(share_NK.sum(axis=1), 1, atol=1e-5)
    assert np.array_equal(share_NK.argmax(axis=1), hard.clusters["valid"])
    random = prepare(tiny(*SOFT, "stage2.routes=random"), tiny_dataset, stage1).clusters["valid"]
    assert set(np.unique(random)) == {0.0, 1.0}


def test_soft_routes_depend_on_all_responsibilities(tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    options = ("stage2.soft_routes=true", "stage2.experts.gate_bias=4", *SHORT, "stage2.slot_dropout=0.9")
    model = ExplanationGenerator.load(Trained(tiny(*options), tiny_dataset, stage1, tmp_path).out).model
    ids = torch.full((3, 6), 5)
    logits = model(input_ids=ids, cluster_ids=torch.tensor([[1.0, 0, 0], [0.6, 0.4, 0], [0.6, 0, 0.4]])).logits
    assert not torch.allclose(logits[0], logits[1])
    assert not torch.allclose(logits[1], logits[2])


def test_gate_dropout_puts_the_clusters_shares_in_place() -> None:
    prior = torch.tensor([0.5, 0.3, 0.2])
    share = torch.eye(3).repeat(2000, 1)
    dropped = GateDropout(0.25, prior).apply(share, np.random.default_rng(0))
    replaced = (dropped == prior).all(dim=1)
    assert 0.22 < replaced.float().mean() < 0.28
    assert torch.equal(dropped[~replaced], share[~replaced])


def test_slot_dropout_hides_users_and_no_more_items(tiny_dataset: Path, stage1: Path) -> None:
    slots = prepare(tiny(), tiny_dataset, stage1).model.explainer.slots
    ids = torch.tensor([[slots.user_token(0), slots.cluster, slots.item_token(0)]]).repeat(4000, 1)
    hidden = IdDropout(0.5, 0.05, slots).apply(ids, np.random.default_rng(0))
    assert (hidden[:, 0] == slots.unknown_user).float().mean() == pytest.approx(0.5, abs=0.03)
    assert (hidden[:, 1] == slots.cluster).all()
    assert (hidden[:, 2] == slots.unknown_item).float().mean() == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize(
    "change",
    [
        "stage2.experts.conversion=upcycle",
        "stage2.experts.scale=2",
        "stage2.soft_routes=true",
        "stage2.shared_first=0.5",
    ],
)
def test_a_checkpoint_of_another_start_or_other_gates_is_refused(
    change: str, torch_run: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"the checkpoint has stage2\.(experts|soft_routes|shared_first) "):
        Trained(tiny(change), tiny_dataset, stage1, tmp_path, resume=torch_run.context.checkpoints[0])


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["stage2.soft_routes=true", "stage1.clusters=1"], r"stage2\.soft_routes: one cluster has one gate"),
        (["stage2.soft_routes=true", "stage2.experts.multi_gate=false"], "one gate or none to mix"),
        (["stage2.gate_dropout=0.1"], "needs soft_routes"),
        (["stage2.experts.gate_bias=2", "stage1.clusters=5"], "5 gates can't own one of 4 experts each"),
        (["stage2.experts.conversion=lora"], "lora would freeze base_model scratch"),
        (["stage2.extra_width=8", "stage2.experts.enabled=false"], "as wide as scratch"),
        (["stage2.shared_first=0.5", "stage2.experts.conversion=split"], "needs experts beside a dense network"),
        (["stage2.shared_first=0.5", "stage2.experts.enabled=false"], "needs experts beside a dense network"),
        (["stage2.extra_width=8", "stage2.base_model=some/model"], "extra_width: is for dense layers"),
        (
            [
                "stage2.base_model=some/model",
                "stage2.experts.conversion=lora",
                "runtime.workers=2",
                "stage2.expert_parallel=2",
            ],
            "low-rank experts share a matrix",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused_in_one_line(overrides: list[str], problem: str) -> None:
    with pytest.raises(InputError, match=problem) as error:
        tiny(*overrides)
    assert "\n" not in str(error.value)


def test_idle_experts_are_named_with_a_remedy(tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    """Experts of which nothing arrives: a warning in the log. Ones that work: none."""
    loud = Trained(tiny(), tiny_dataset, stage1, tmp_path / "loud")
    assert not [line for line in loud.context.lines if "warning" in line]
    experts = loud.metrics["experts"]
    assert len(experts["layers"]["routed_share"]) == 2
    assert experts["movement_ratio"] > 0.3
    quiet = Trained(tiny("stage2.experts.scale=1e-6"), tiny_dataset, stage1, tmp_path / "quiet")
    [*_, last] = [line for line in quiet.context.lines if line["phase"] == "valid"]
    assert "the routed experts are idle" in last["warning"]
    assert "stage2.experts.scale" in last["warning"]
    dense = Trained(tiny("stage2.experts.enabled=false", *SHORT), tiny_dataset, stage1, tmp_path / "dense")
    assert dense.metrics["experts"] is None


def test_movement_is_of_means_over_layers() -> None:
    movement = Movement([0.5, 0.0], [0.2, 0.4], [0.1, 0.5])
    assert movement.ratio == pytest.approx(1.0)
    assert not movement.idle
    assert Movement([9e-4, 1e-5], [0.0, 0.0], [0.0, 0.0]).idle
    assert Movement([1.0], [1.0], [0.0]).ratio is None
    assert movement.scalars() == pytest.approx(
        {"routed_share": 0.25, "routed_change": 0.3, "shared_change": 0.3, "routed_share_least": 0.0}
    )


@pytest.mark.slow
@pytest.mark.parametrize("option", ["soft", "upcycle"])
def test_experts_shared_out_equal_undivided_ones(
    option: str, base: Path, tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    exact = ("stage2.alpha=0", "stage1.unknown_id_rate=0", "stage2.slot_dropout=0", "stage2.gate_dropout=0")
    same = (f"stage2.base_model={base}", *OPTIONS[option], *SHORT, *exact, *TWO_WORKERS, "stage2.batch_size=8")

    def losses(*overrides: str) -> list[Any]:
        folder = tmp_path / "-".join(overrides or ("whole",))
        return numbers(in_two_workers(tiny(*same, *overrides), tiny_dataset, stage1, folder)[0]["lines"], "valid")

    for line, wanted in zip(losses("stage2.expert_parallel=2"), losses(), strict=True):
        assert line == pytest.approx(wanted, rel=1e-3)
