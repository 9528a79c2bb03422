"""The learning rate's schedule: warm-up, then constant, cosine or linear; shared with the baselines that train."""

import math

from gavamoe.config.schema import Stage2Config


def rate_at(step: int, steps: int, config: Stage2Config) -> float:
    """Share of the peak learning rate at optimizer step `step` (from 0) of `steps`: warm-up, then the schedule."""
    warmup = round(config.warmup_share * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if config.schedule == "linear" else 1.0
