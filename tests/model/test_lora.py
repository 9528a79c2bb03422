"""LoRA on attention: the start equals the base, the base stays frozen, the artifact is the plain model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.explainers import FAMILIES, dense_model, explainer, slot_batch
from helpers.stage2_runs import Trained, check_equal_runs, close, in_two_workers, numbers, save_base
from helpers.tiny import tiny
from torch import Tensor, nn

from gavamoe.config.schema import LoraConfig, RunConfig, ScratchModelConfig
from gavamoe.model.base_model import load_base
from gavamoe.model.build import load_explainer
from gavamoe.model.explainer import GavamoeForCausalLM
from gavamoe.model.lora import add_lora, merged_state
from gavamoe.stage2.joint_model import parameter_groups
from gavamoe.stage2.setup import prepare

pytestmark = pytest.mark.usefixtures("extensions_dir")


def adapted(family: str, lora: LoraConfig, **experts: Any) -> GavamoeForCausalLM:
    model = explainer(dense_model(family), **experts)
    add_lora(model, lora, seed=0)
    return model


def speak(model: GavamoeForCausalLM) -> None:
    """Adapters start at zero output; give them something to say."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.2)


def logits(model: GavamoeForCausalLM) -> Tensor:
    ids, mask, clusters = slot_batch(model)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, cluster_ids=clusters).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_equals_the_base(family: str) -> None:
    plain = logits(explainer(dense_model(family), conversion="shared"))
    assert torch.equal(logits(adapted(family, LoraConfig(rank=4), conversion="shared")), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_equals_unmerged(family: str) -> None:
    model = adapted(family, LoraConfig(rank=3, alpha=7))
    before = logits(model)
    speak(model)
    expected = logits(model)
    assert (expected - before).abs().max() > 0.1
    plain = explainer(dense_model(family))
    plain.load_state_dict(merged_state(model, model.state_dict()))
    torch.testing.assert_close(logits(plain), expected)


def test_adapters_follow_the_seed_and_not_the_global_generator() -> None:
    first = adapted("llama", LoraConfig(rank=2)).state_dict()
    torch.rand(5)
    close(adapted("llama", LoraConfig(rank=2)).state_dict(), first, 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_is_new_and_nothing_else(family: str) -> None:
    model = adapted(family, LoraConfig(rank=2), conversion="shared")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    new = (".lora_", ".router.", ".experts.", "user_embedding.", "item_embedding.", "user_proj", "item_proj")
    assert trained == {name for name, _ in model.named_parameters() if any(part in name for part in new)}
    adapters = sum(".lora_A." in name for name in trained)
    assert adapters == 2 * {"llama": 4, "gpt2": 2}[family]  # layers x projections


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA with a tokenizer, as a folder."""
    return save_base(tmp_path_factory.mktemp("base"))


def config_with(base: Path, *overrides: str) -> RunConfig:
    lora = ("stage2.lora.rank=4", "stage2.lora.dropout=0", f"stage2.base_model={base}")
    return tiny(*lora, *overrides)


@pytest.fixture(scope="module")
def lora_run(base: Path, tiny_dataset: Path, stage1: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(config_with(base), tiny_dataset, stage1, tmp_path_factory.mktemp("lora"))


def test_training_moves_the_adapters_and_leaves_the_base(lora_run: Trained, base: Path) -> None:
    first, *_, last = (line["validation_loss"] for line in lora_run.lines("valid"))
    assert last < first
    before = load_base(str(base), ScratchModelConfig(), [], 0)[0].base_model.state_dict()
    after = load_explainer(lora_run.out)[0].model.state_dict()  # strict: no adapter, nothing missing
    for name, tensor in before.items():
        where = name.replace(".mlp.", ".mlp.shared_expert.")
        assert torch.equal(after[where], tensor) != (".self_attn." in name), name
    experts = after["layers.0.mlp.experts.down_proj"]
    assert experts.abs().max() > 0


def test_metrics_and_model_card_say_what_was_trained(lora_run: Trained, torch_run: Trained) -> None:
    metrics = lora_run.metrics
    assert metrics["trained_parameters"] < metrics["parameters"]
    biases = sum(
        tensor.numel() for name, tensor in torch_run.weights().items() if name in ("vae.user_bias", "vae.item_bias")
    )
    assert torch_run.metrics["trained_parameters"] == torch_run.metrics["parameters"] - biases
    model = load_explainer(lora_run.out)[0]
    own = {id(parameter): parameter.numel() for parameter in model.parameters()}
    vae = sum(tensor.numel() for name, tensor in lora_run.weights().items() if name.startswith("vae."))
    tables = model.user_embedding.weight.numel() + model.item_embedding.weight.numel()
    assert metrics["parameters"] == sum(own.values()) + vae - tables
    card = (lora_run.out / "README.md").read_text()
    assert f"{metrics['trained_parameters']:,} (LoRA of rank 4 on attention, merged)" in card


def test_only_trained_parameters_reach_the_optimizer(base: Path, tiny_dataset: Path, stage1: Path) -> None:
    config = config_with(base)
    setup = prepare(config, tiny_dataset, stage1)
    groups = parameter_groups(setup.model, config.stage2)
    assert sum(parameter.numel() for group in groups for parameter in group["params"]) == setup.trained


@pytest.mark.parametrize("stage", [1, 3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2))])
def test_every_zero_stage_equals_torch(
    stage: int, lora_run: Trained, base: Path, tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    config = config_with(base, "runtime.engine=deepspeed", f"stage2.zero_stage={stage}")
    check_equal_runs(Trained(config, tiny_dataset, stage1, tmp_path), lora_run, unsettled=True)


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_resuming_equals_never_having_stopped(
    engine: str, lora_run: Trained, base: Path, tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    config = config_with(base, f"runtime.engine={engine}", "stage2.zero_stage=3")
    whole = Trained(config, tiny_dataset, stage1, tmp_path / "whole")
    resumed = Trained(config, tiny_dataset, stage1, tmp_path / "resumed", resume=whole.context.checkpoints[0])
    assert resumed.lines("train") == whole.lines("train", after=6)
    close(resumed.weights(), whole.weights(), 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_two_workers_equal_one(stage: int, base: Path, tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    same = ("stage2.alpha=0", "stage1.unknown_id_rate=0")
    alone = Trained(config_with(base, *same), tiny_dataset, stage1, tmp_path)
    two = ("runtime.engine=deepspeed", "runtime.workers=2", "stage2.batch_size=8", f"stage2.zero_stage={stage}")
    ranks = in_two_workers(config_with(base, *same, *two), tiny_dataset, stage1, tmp_path / "two")
    for line, wanted in zip(numbers(ranks[0]["lines"], "train"), alone.lines("train"), strict=True):
        assert line == pytest.approx(wanted, rel=1e-3)
    two, one = (load_explainer(folder)[0].state_dict() for folder in (tmp_path / "two/stage2", alone.out))
    close(
        two, one, 1e-2, but=1e-2
    )  # a start moved by 1e-7 of itself does as much: tokens near the border of two experts
