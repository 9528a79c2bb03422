"""What DeepSpeed is told for a GPU, where no GPU is: overlap, buffers that fit the model's layers, what is sent."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.stage2_runs import joint_batch
from helpers.tiny import tiny
from transformers import initialization as init

from gavamoe.config.files import load_config
from gavamoe.config.schema import RunConfig
from gavamoe.model.base_config import base_shape
from gavamoe.model.build import weightless_explainer
from gavamoe.plan.parameters import draw_stage1
from gavamoe.stage2.engines.settings import MAX_BUCKET, deepspeed_config
from gavamoe.stage2.joint_model import JointModel, largest_layer
from gavamoe.stage2.schedule import PEAK
from gavamoe.stage2.setup import Setup, prepare
from gavamoe.stage2.training_engines import make_engine

LAYER = 4096 * (12 * 3 * 1280 + 2 * 4096 + 2 * 1024 + 2 + 3 * 12)
"""Numbers in a layer of the paper's model: experts, queries and output, keys and values, norms, gates."""


@pytest.fixture(scope="module")
def papers_model() -> JointModel:
    """On the meta device, with few users."""
    config = load_config("paper")
    explainer = weightless_explainer(config, base_shape(config.stage2), 10, 10)
    with torch.device("meta"), init.no_init_weights():
        return JointModel(explainer, draw_stage1(config.stage1, 10, 10), config.stage2.alpha)


def settings(config: RunConfig, model: JointModel, device: str = "cuda:0", workers: int = 8) -> dict[str, Any]:
    return deepspeed_config(config.stage2, model, device=device, world_size=workers)


def test_zero_3_of_the_papers_model_has_room_for_the_next_layer(papers_model: JointModel) -> None:
    assert largest_layer(papers_model.explainer) == LAYER > MAX_BUCKET
    zero = settings(load_config("paper"), papers_model)["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["overlap_comm"] is True
    assert zero["stage3_max_live_parameters"] == 2 * LAYER
    assert zero["stage3_prefetch_bucket_size"] >= LAYER


@pytest.mark.parametrize(
    ("stage", "device", "overlaps"),
    [(0, "cuda:0", False), (1, "cuda:0", True), (2, "cuda:3", True), (3, "cuda", True), (3, "cpu", False)],
)
def test_collectives_run_beside_the_arithmetic_on_gpus(
    stage: int, device: str, overlaps: bool, papers_model: JointModel
) -> None:
    config = load_config("paper", [f"stage2.zero_stage={stage}"])
    assert settings(config, papers_model, device)["zero_optimization"]["overlap_comm"] is overlaps


@pytest.mark.parametrize(
    ("precision", "workers", "sent"),
    [("fp32", 8, None), ("bf16", 8, "bf16"), ("bf16_weights", 8, "bf16"), ("bf16", 1, None), ("bf16_weights", 1, None)],
)
def test_gradients_of_bfloat16_arithmetic_travel_as_bfloat16(
    precision: str, workers: int, sent: str | None, papers_model: JointModel
) -> None:
    config = load_config("paper-fast", [f"stage2.precision={precision}"])
    found = settings(config, papers_model, workers=workers)
    assert found.get("communication_data_type") == sent
    assert "bf16" not in found, "DeepSpeed's own mode would cast routers and stage 1 too"


@pytest.mark.parametrize("offload", [False, True])
def test_zero_3_starts_from_shards(
    offload: bool, tiny_dataset: Path, stage1: Path, monkeypatch: pytest.MonkeyPatch, extensions_dir: Path
) -> None:
    """When DeepSpeed gets the model, no parameter is whole any more, and it doesn't move the model to a device."""
    import deepspeed

    choice = f"stage2.offload_parameters={str(offload).lower()}"
    config = tiny("runtime.engine=deepspeed", "stage2.zero_stage=3", choice)
    setup: Setup = prepare(config, tiny_dataset, stage1)
    whole = {name: parameter.shape for name, parameter in setup.model.named_parameters()}
    seen: dict[str, Any] = {}
    initialize = deepspeed.initialize

    def watched(*, model: JointModel, **options: Any) -> Any:
        seen["whole"] = sum(parameter.numel() for parameter in model.parameters())
        seen["sharded"] = {name: parameter.ds_shape for name, parameter in model.named_parameters()}
        return initialize(model=model, **options)

    monkeypatch.setattr(deepspeed, "initialize", watched)
    monkeypatch.setattr(JointModel, "to", lambda *_: pytest.fail("the whole model is moved to the device"))
    engine = make_engine("deepspeed", setup.model, config.stage2, world_size=1, device="cpu")
    try:
        assert seen == {"whole": 0, "sharded": whole}
        assert engine.train_step([joint_batch(setup)], PEAK)["loss"] > 0
    finally:
        engine.close()
