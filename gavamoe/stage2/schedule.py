"""The learning rate's schedule: warm-up, then constant, cosine or linear; shared with the baselines that train."""

import math
from dataclasses import dataclass

from gavamoe.config.schema import Stage2Config


@dataclass(frozen=True)
class Rates:
    """Shares of the peak learning rates."""

    shared: float
    """Share of all rates but those of gates and routed experts."""
    routed: float
    """Share of the rates of gates and routed experts."""


PEAK = Rates(1.0, 1.0)


def rates_at(step: int, steps: int, config: Stage2Config) -> Rates:
    """Shares at optimizer step `step` (from 0) of `steps`: equal, or one after the other (`stage2.shared_first`)."""
    first = shared_steps(steps, config)
    if not first:
        rate = rate_at(step, steps, config)
        return Rates(rate, rate)
    if step < first:
        return Rates(rate_at(step, first, config), 0.0)
    return Rates(0.0, rate_at(step - first, steps - first, config))


def shared_steps(steps: int, config: Stage2Config) -> int:
    """Steps, of `steps`, before gates and routed experts are trained."""
    return round(config.shared_first * steps)


def rate_at(step: int, steps: int, config: Stage2Config) -> float:
    """Share of the peak learning rate at optimizer step `step` (from 0) of `steps`: warm-up, then the schedule."""
    warmup = round(config.warmup_share * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if config.schedule == "linear" else 1.0
