"""Systems compared with the full one by the losses of the same rows under the same seed.

A row's difference is the system's loss less the reference's, in nats: above 0, the reference finds the text likelier.
It is averaged over the seeds; what is shown is sum of differences / sum of tokens. Users are drawn whole for its
interval: a user's rows share a slot and a gate, so that rows alone would look like more evidence than they are. An
interval knows of users, not of trainings: the spread over the seeds stands beside it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from gavamoe.errors import InputError
from gavamoe.evaluation.losses.row_losses import CONDITIONS, RowLosses, groups_of
from gavamoe.evaluation.significance import ratio_intervals

RESAMPLES = 2000


class Difference(BaseModel):
    """One system less the reference, under one condition, on the rows of one group of users."""

    model_config = ConfigDict(frozen=True)
    system: str
    label: str
    condition: str
    """What the model knew of the user: one of `row_losses.CONDITIONS`."""
    group: str
    """Users that count, by their training rows: one of `row_losses.GROUPS`, or all."""
    users: int
    rows: int
    tokens: float
    """Tokens of the rows' explanations; the mean over the seeds."""
    value: float
    """Nats per token; above 0, the reference is better."""
    low: float | None
    """95 % bootstrap over users; None for fewer than two."""
    high: float | None
    seeds: int
    seed_sd: float | None
    """Standard deviation of the seeds' own values; None for one."""

    @property
    def behind(self) -> bool:
        """Whether the system is worse than the reference by more than chance."""
        return self.low is not None and self.low > 0

    @property
    def ahead(self) -> bool:
        """Whether it is better by more than chance."""
        return self.high is not None and self.high < 0


class LossComparison(BaseModel):
    """All differences of a comparison."""

    model_config = ConfigDict(frozen=True)
    reference: str
    """Name of the system that the others are compared with."""
    label: str
    losses: dict[str, dict[str, float]]
    """The reference's own loss by condition and group, in nats per token, mean over its seeds."""
    differences: list[Difference]
    unpaired: dict[str, str]
    """Systems that are not compared, with the reason."""
    verdict: list[str]
    """Sentences: do gates pay here, for whom, by how much?"""


class Reading(NamedTuple):
    """One system's losses under one seed."""

    system: str
    label: str
    seed: int
    losses: RowLosses


class _Pooled(NamedTuple):
    """A system less the reference, row by row, mean over the seeds they share."""

    user_N: np.ndarray
    training_rows_N: np.ndarray
    tokens_N: np.ndarray
    gap_N: dict[str, np.ndarray]
    """By condition; NaN where not measured."""
    by_seed: list["_Pooled"]
    """The same of each seed alone."""


def find_differences(
    readings: Sequence[Reading], reference: str, seed: int, *, resamples: int = RESAMPLES
) -> tuple[list[Difference], dict[str, str]]:
    """Differences of all systems to the reference, and the systems that can't be compared, with the reason.

    Raises:
        InputError: a system read other rows than the reference.
    """
    theirs = {reading.seed: reading.losses for reading in readings if reading.system == reference}
    labels = {reading.system: reading.label for reading in readings if reading.system != reference}
    pooled: dict[str, _Pooled] = {}
    unpaired: dict[str, str] = {}
    for system in labels:
        ours = {r.seed: r.losses for r in readings if r.system == system and r.seed in theirs}
        if not ours:
            unpaired[system] = f"no seed in common with {reference}"
        elif any(_other_tokens(system, losses, reference, theirs[number]) for number, losses in ours.items()):
            unpaired[system] = f"reads other tokens than {reference}, so that nats per token do not compare"
        else:
            pooled[system] = _pool([_gaps(losses, theirs[number]) for number, losses in ours.items()])
    found = [
        difference
        for condition in CONDITIONS
        for group in groups_of(np.zeros(0))
        for difference in _of_group(pooled, labels, condition, group, seed, resamples)
    ]
    order = list(labels)
    return sorted(found, key=lambda difference: order.index(difference.system)), unpaired


def _other_tokens(system: str, ours: RowLosses, reference: str, theirs: RowLosses) -> bool:
    """Whether the same texts are other tokens for the two.

    Raises:
        InputError: they are not the same texts.
    """
    if not (np.array_equal(ours.row_N, theirs.row_N) and np.array_equal(ours.user_N, theirs.user_N)):
        raise InputError(
            f"losses of {system} and {reference}: {len(ours.row_N)} and {len(theirs.row_N)} rows, which are not the"
            " same; evaluate both on the same rows of one dataset"
        )
    return not np.array_equal(ours.tokens_N, theirs.tokens_N)


def _gaps(ours: RowLosses, theirs: RowLosses) -> tuple[RowLosses, dict[str, np.ndarray]]:
    return ours, {condition: ours.loss_N[condition] - theirs.loss_N[condition] for condition in CONDITIONS}


def _pool(seeds: Sequence[tuple[RowLosses, Mapping[str, np.ndarray]]]) -> _Pooled:
    """Mean over the seeds of each row's numbers; seeds that drew other rows have some rows to themselves."""
    alone = [_Pooled(r.user_N, r.training_rows_N, r.tokens_N.astype(float), dict(gaps), []) for r, gaps in seeds]
    row_N, first_N, place_M = np.unique(
        np.concatenate([losses.row_N for losses, _ in seeds]), return_index=True, return_inverse=True
    )

    def mean(columns: Sequence[np.ndarray]) -> np.ndarray:
        values_M = np.concatenate(columns)
        there_M = ~np.isnan(values_M)
        total_N = np.bincount(place_M[there_M], weights=values_M[there_M], minlength=len(row_N))
        count_N = np.bincount(place_M[there_M], minlength=len(row_N))
        return np.divide(total_N, count_N, out=np.full(len(row_N), np.nan), where=count_N > 0)

    return _Pooled(
        np.concatenate([one.user_N for one in alone])[first_N],
        np.concatenate([one.training_rows_N for one in alone])[first_N],
        mean([one.tokens_N for one in alone]),
        {condition: mean([one.gap_N[condition] for one in alone]) for condition in CONDITIONS},
        alone,
    )


def _of_group(
    pooled: Mapping[str, _Pooled], labels: Mapping[str, str], condition: str, group: str, seed: int, resamples: int
) -> list[Difference]:
    """One difference a system that has rows there. All systems are judged by the same draws of users."""
    chosen = {name: _chosen(one, condition, group) for name, one in pooled.items()}
    there = {name: rows for name, rows in chosen.items() if len(rows)}
    if not there:
        return []
    users = np.unique(np.concatenate([pooled[name].user_N[rows] for name, rows in there.items()]))
    gap_US, tokens_US = np.zeros((len(users), len(there))), np.zeros((len(users), len(there)))
    for column, (name, rows) in enumerate(there.items()):
        user_N = np.searchsorted(users, pooled[name].user_N[rows])
        gap_US[:, column] = np.bincount(user_N, weights=pooled[name].gap_N[condition][rows], minlength=len(users))
        tokens_US[:, column] = np.bincount(user_N, weights=pooled[name].tokens_N[rows], minlength=len(users))
    intervals = ratio_intervals(gap_US, tokens_US, resamples=resamples, seed=seed)
    found = []
    for column, (name, rows) in enumerate(there.items()):
        low, high = (None if np.isnan(end) else float(end) for end in intervals[column])
        seeds = [(one, _chosen(one, condition, group)) for one in pooled[name].by_seed]
        own = [_ratio(one, condition, kept) for one, kept in seeds if len(kept)]
        found.append(
            Difference(
                system=name,
                label=labels[name],
                condition=condition,
                group=group,
                users=int((tokens_US[:, column] > 0).sum()),
                rows=len(rows),
                tokens=float(tokens_US[:, column].sum()),
                value=_ratio(pooled[name], condition, rows),
                low=low,
                high=high,
                seeds=len(own),
                seed_sd=float(np.std(own, ddof=1)) if len(own) > 1 else None,
            )
        )
    return found


def _chosen(pooled: _Pooled, condition: str, group: str) -> np.ndarray:
    return np.flatnonzero(groups_of(pooled.training_rows_N)[group] & ~np.isnan(pooled.gap_N[condition]))


def _ratio(pooled: _Pooled, condition: str, rows: np.ndarray) -> float:
    return float(pooled.gap_N[condition][rows].sum() / pooled.tokens_N[rows].sum())
