"""Run configuration: every setting with its bounds, as pydantic models; `files` reads and writes them.

Each value has one home here or in the section's own module; numbers that follow from others are properties. The
docstrings are the fields' descriptions: each is a sentence that makes sense without its field's name.
"""

from pydantic import model_validator

from gavamoe.config.baselines import (
    BaselinesConfig,
    CierConfig,
    GReferConfig,
    LightGcnConfig,
    NeteConfig,
    PeplerConfig,
    PeterConfig,
    PevaeConfig,
    SystemName,
    XrecConfig,
)
from gavamoe.config.evaluation import EvaluationConfig
from gavamoe.config.generation import GenerationConfig
from gavamoe.config.runtime import RuntimeConfig
from gavamoe.config.section import Count, Section
from gavamoe.config.stage1 import Stage1Config
from gavamoe.config.stage2 import ExpertsConfig, LoraConfig, PromptConfig, ScratchModelConfig, Stage2Config

__all__ = [
    "BaselinesConfig",
    "CierConfig",
    "EvaluationConfig",
    "ExpertsConfig",
    "GReferConfig",
    "GenerationConfig",
    "LightGcnConfig",
    "LoraConfig",
    "NeteConfig",
    "PeplerConfig",
    "PeterConfig",
    "PevaeConfig",
    "PromptConfig",
    "RunConfig",
    "RuntimeConfig",
    "ScratchModelConfig",
    "Stage1Config",
    "Stage2Config",
    "SystemName",
    "XrecConfig",
]


class RunConfig(Section):
    """Everything that decides a run, apart from the data."""

    seed: Count = 0
    """Seed of every random choice: equal seeds give equal runs."""
    system: SystemName = "gavamoe"
    """System that is trained: gavamoe, or a baseline. A baseline has settings of its own in `baselines`, and takes its
    base model or tokenizer, prompt, steps, batches, schedule and precision from `stage2`."""
    stage1: Stage1Config = Stage1Config()
    """The VAE with a Gaussian mixture, and its training."""
    stage2: Stage2Config = Stage2Config()
    """The explainer, and its training."""
    generation: GenerationConfig = GenerationConfig()
    """Decoding of texts."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Measures of `gavamoe evaluate`, and the rows that are evaluated."""
    baselines: BaselinesConfig = BaselinesConfig()
    """Settings of the baselines that `system` and `gavamoe ablate` train."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Workers, engine, tracking."""

    @property
    def gates(self) -> int:
        """Gates of the explainer: one per cluster, or one in all without multi-gating."""
        return self.stage1.clusters if self.stage2.experts.multi_gate else 1

    @model_validator(mode="after")
    def _gates_fit(self) -> "RunConfig":
        experts, clusters = self.stage2.experts, self.stage1.clusters
        if self.stage2.soft_routes and clusters == 1:
            raise ValueError("stage2.soft_routes: one cluster has one gate, none to mix; set stage1.clusters above 1")
        if experts.enabled and experts.gate_bias and self.gates > experts.count:
            raise ValueError(
                f"stage2.experts.gate_bias: {self.gates} gates can't own one of {experts.count} experts each; raise"
                " experts.count or set gate_bias to 0"
            )
        return self

    @model_validator(mode="after")
    def _tables_fit(self) -> "RunConfig":
        if self.stage1.tables == "sharded" and self.stage2.alpha > 0:
            raise ValueError(
                "stage1.tables: stage 2 looks sharded tables up in files and can't train them, which stage2.alpha"
                f" {self.stage2.alpha:g} asks for; set stage2.alpha to 0, or take replicated or hashed tables"
            )
        return self

    @model_validator(mode="after")
    def _expert_parallel_fits(self) -> "RunConfig":
        stage2, share = self.stage2, self.stage2.expert_parallel
        if share == 1:
            return self
        problem = None
        if not stage2.experts.enabled:
            problem = "there are no experts to share out with experts.enabled false"
        elif stage2.alpha == 1:
            problem = "alpha 1 trains no experts"
        elif stage2.experts.conversion == "lora":
            problem = "low-rank experts share a matrix, and are too small to be worth sharing out; set it to 1"
        elif stage2.experts.count % share:
            problem = (
                f"{share} workers can't share {stage2.experts.count} experts evenly; take a divisor of experts.count"
            )
        elif self.runtime.workers % share:
            problem = f"runtime.workers {self.runtime.workers} is not a multiple of {share}"
        elif stage2.zero_stage not in (1, 2):
            problem = (
                f"needs zero_stage 1 or 2, not {stage2.zero_stage}: 0 would clip each worker by a norm of its own,"
                " 3 shards the experts itself"
            )
        if problem:
            raise ValueError(f"stage2.expert_parallel: {problem}")
        return self

    @model_validator(mode="after")
    def _runtime_fits(self) -> "RunConfig":
        workers = self.runtime.workers
        if self.runtime.engine == "torch" and workers > 1:
            raise ValueError(f"runtime.engine: torch runs one worker, not {workers}; use deepspeed")
        if self.runtime.engine == "torch" and self.stage2.precision == "bf16_weights":
            raise ValueError(
                "stage2.precision: bf16_weights needs runtime.engine deepspeed, whose ZeRO keeps the float32 copies;"
                " use it, or precision bf16"
            )
        return self
