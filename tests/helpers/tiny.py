"""The one tiny run config of the tests: a run of it takes seconds on one core.

A test that needs other values names them as overrides, as `--set` does: `tiny("stage2.max_steps=4")`.
"""

from typing import Any

from gavamoe.config.files import dump_config, parse_config
from gavamoe.config.schema import RunConfig

STEPS = 12
"""Optimizer steps of the tiny stage 2."""
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
DEFAULT_RATES = ("stage1.learning_rate=1e-3", "stage2.learning_rate=1e-3", "stage2.stage1_learning_rate=1e-4")
"""The package's own learning rates, lower than those that make a tiny run learn something."""
TWO_WORKERS = ("runtime.engine=deepspeed", "runtime.workers=2")
WHOLE_JOB = (
    *TWO_WORKERS, "stage2.max_steps=6", "stage2.evaluate_every=3", "stage2.checkpoint_every=3",
    "stage2.validation_rows=16", "generation.max_new_tokens=8",
)  # fmt: skip
"""Both stages, evaluation and report through the command line, as briefly as they go."""


def tiny(*overrides: str) -> RunConfig:
    return parse_config(TINY, "test", overrides)


def tiny_yaml(*overrides: str) -> str:
    """The content of a config file that gives `tiny(*overrides)`."""
    return dump_config(tiny(*overrides))


def tiny_stage1(seed: int = 0, **changes: Any) -> RunConfig:
    """For tests of stage 1 alone: no dropout, a smaller encoder, the package's learning rate and a warm-up of beta."""
    alone = {
        "encoder_feedforward": 16, "decoder_hidden": 8, "dropout": 0.0, "pretrain_epochs": 2, "epochs": 2,
        "beta_warmup_epochs": 1, "mixture_restarts": 4, "learning_rate": 1e-3,
    }  # fmt: skip
    return RunConfig.model_validate({"seed": seed, "stage1": TINY["stage1"] | alone | changes})
