"""Losses of rows and their differences, made up."""

from collections.abc import Sequence

import numpy as np

from gavamoe.evaluation.losses.differences import Difference, LossComparison
from gavamoe.evaluation.losses.row_losses import CONDITIONS, RowLosses
from gavamoe.evaluation.losses.verdict import verdict

LABELS = {
    "base-active": "Base, as active",
    "base-wide": "Base, as large",
    "no-multi-gating": "w/o multi-gating",
    "random-routes": "random routes",
    "cluster-token": "cluster token",
    "gpt2": "GPT-2",
}


def row_losses(
    user: Sequence[str],
    training_rows: Sequence[int],
    tokens: Sequence[int],
    shown: Sequence[float],
    *,
    rows: Sequence[int] | None = None,
    **others: Sequence[float],
) -> RowLosses:
    """Losses under the condition shown, and under others that are named; NaN under the rest."""
    loss_N = {condition: np.full(len(user), np.nan) for condition in CONDITIONS}
    loss_N |= {condition: np.array(values, dtype=float) for condition, values in {"shown": shown, **others}.items()}
    return RowLosses(
        row_N=np.arange(len(user)) if rows is None else np.array(rows),
        user_N=np.array(user, dtype=np.str_),
        training_rows_N=np.array(training_rows, dtype=np.int64),
        tokens_N=np.array(tokens, dtype=np.int64),
        loss_N=loss_N,
        cluster_N=np.zeros(len(user), np.int16),
    )


def difference(
    system: str,
    value: float,
    half: float | None = 0.005,
    *,
    condition: str = "shown",
    group: str = "all",
    seeds: int = 3,
) -> Difference:
    """`value` ± `half`; None: no interval."""
    low, high = (None, None) if half is None else (value - half, value + half)
    return Difference(
        system=system, label=LABELS[system], condition=condition, group=group, users=50, rows=100, tokens=1500.0,
        value=value, low=low, high=high, seeds=seeds, seed_sd=0.004 if seeds > 1 else None,
    )  # fmt: skip


def loss_comparison(differences: Sequence[Difference]) -> LossComparison:
    """With the full system's own loss at 4.5 nats wherever there is a difference."""
    own: dict[str, dict[str, float]] = {}
    for each in differences:
        own.setdefault(each.condition, {})[each.group] = 4.5
    return LossComparison(
        reference="full", label="GaVaMoE", losses=own, differences=list(differences), unpaired={},
        verdict=verdict(differences),
    )  # fmt: skip
