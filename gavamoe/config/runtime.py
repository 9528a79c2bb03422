"""Settings of where and how training runs."""

from typing import Literal

from pydantic import PositiveInt, model_validator

from gavamoe.config.section import Count, Positive, Section


class RuntimeConfig(Section):
    """Where and how training runs. None of it changes what is computed, but for float rounding."""

    workers: PositiveInt = 1
    """Ray Train workers that train together, each a process."""
    threads_per_worker: PositiveInt = 1
    """CPU threads, and so Ray CPUs, of each worker."""
    gpu: bool = False
    """Whether each worker gets one GPU."""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    """Engine that takes stage 2's optimizer steps. deepspeed: any number of workers, ZeRO; torch: one worker, plain
    data types, no compiler needed."""
    max_failures: Count = 2
    """Times that training is restarted from its last checkpoint after a worker died."""
    min_workers: Count = 0
    """Smallest number of workers with which stage 1 continues when machines are lost; it takes more when they come. 0:
    it waits for all. Stage 2 always waits: DeepSpeed's checkpoints belong to a number of workers."""
    collective_minutes: Positive = 30
    """Minutes that workers wait for each other in a step; then training fails. Where one worker sets up alone, as the
    clusters of many users at the start of stage 1's second part, the others wait for it."""
    wait_minutes: Positive = 4
    """Minutes that workers may take to start, also on machines that an autoscaler first has to get; then training
    fails."""
    tracking: Literal["none", "mlflow", "wandb"] = "none"
    """Service that gets the log's numbers, beside TensorBoard's files."""
    tracking_uri: str = ""
    """Address of the tracking service; empty: mlflow.db in the run's logs for mlflow, the environment's for wandb. Of a
    run's own config.yaml it is followed only if `--set` or the environment names it too."""

    @model_validator(mode="after")
    def _fewer_at_least(self) -> "RuntimeConfig":
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers: {self.min_workers} is above workers {self.workers}")
        return self
