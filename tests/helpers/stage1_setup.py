"""A stage-1 config small enough for tests."""

from typing import Any

from gavamoe.config.schema import RunConfig

SMALL: dict[str, Any] = {
    "embedding_size": 16, "latent_size": 4, "encoder_heads": 2, "encoder_feedforward": 16, "decoder_hidden": 8,
    "dropout": 0.0, "batch_size": 256, "pretrain_epochs": 2, "epochs": 2, "beta_warmup_epochs": 1,
}  # fmt: skip


def small_run(seed: int = 0, **changes: Any) -> RunConfig:
    return RunConfig.model_validate({"seed": seed, "stage1": {**SMALL, **changes}})
