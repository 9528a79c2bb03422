"""How far a score hangs on which rows were drawn: bootstrap intervals, and paired comparison of two systems.

For scores that are functions of sums over rows: BLEU, ROUGE, BERTScore, sentence Distinct, FMR, RMSE, MAE. Corpus
Distinct, USR, FCR and DIV count different things in a set of texts: drawing a row twice biases them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gavamoe.errors import InputError
from gavamoe.evaluation.metrics.registry import METRICS
from gavamoe.evaluation.metrics.text_scores import RowStatistics, from_sums

RESAMPLES = 1000
_AT_ONCE = 16
"""Resamples drawn together; bounds the memory."""

Draw = Callable[[np.random.Generator, int, int], np.ndarray]


def intervals(rows: RowStatistics, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, list[float]]:
    """95 % percentile bootstrap intervals [low, high] by name of score."""
    drawn = _resampled(rows, _blocks(len(rows), resamples, seed, _with_replacement)) if len(rows) else {}
    return {name: _interval(values) for name, values in drawn.items()}


def mean_interval(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> list[float] | None:
    """95 % percentile bootstrap interval of the mean of N values; None for fewer than two."""
    if len(values) < 2:
        return None
    blocks = _blocks(len(values), resamples, seed, _with_replacement)
    means = np.concatenate([np.einsum("rn,n->r", weights, values) / len(values) for weights in blocks])
    return _interval(means)


def balanced_interval(groups: Sequence[np.ndarray], *, resamples: int = RESAMPLES, seed: int = 0) -> list[float] | None:
    """95 % interval of the mean over groups of the means of their values; rows are drawn within each group."""
    if not groups or max(map(len, groups)) < 2:
        return None
    random = np.random.default_rng(seed)
    means = [
        np.array([values[random.integers(len(values), size=len(values))].mean() for _ in range(resamples)])
        for values in groups
    ]
    return _interval(np.mean(means, axis=0))


def ratio_intervals(
    numerator_US: np.ndarray, denominator_US: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """95 % percentile bootstrap intervals of S ratios of sums over U users, who are drawn whole, the same for all S.

    Returns:
        (S, 2); NaN where fewer than two users have a denominator above 0.
    """
    draws = []
    for weights in _blocks(len(numerator_US), resamples, seed, _with_replacement) if len(numerator_US) else ():
        above, below = (np.einsum("ru,us->rs", weights, sums) for sums in (numerator_US, denominator_US))
        draws.append(np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0))
    found = np.full((numerator_US.shape[1], 2), np.nan)
    enough = (denominator_US > 0).sum(axis=0) > 1
    if enough.any():
        found[enough] = np.nanpercentile(np.concatenate(draws)[:, enough], [2.5, 97.5], axis=0).T
    return found


def not_better(
    rows: RowStatistics, other: RowStatistics, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, float]:
    """Paired bootstrap of two systems on the same rows: share of resamples in which `rows` is not better than `other`.

    Near 0: the advantage doesn't hang on which rows were drawn; near 1: `other` is as good or better.
    """
    _check_paired(rows, other)
    if not len(rows):
        return {}
    ours, theirs = _paired(rows, other, resamples, seed)
    return {
        name: float(np.mean(values <= theirs[name] if METRICS[name].direction == "higher" else values >= theirs[name]))
        for name, values in ours.items()
        if name in theirs
    }


def compare(
    rows: RowStatistics, other: RowStatistics, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Is the difference of two systems on the same rows more than chance? By name of score.

    Returns:
        "difference" (rows minus other), its 95 % paired bootstrap "interval", and the two-sided "p" of approximate
        randomization: how often a difference as large comes about when each row's two texts are swapped by a coin
        (Noreen 1989; Riezler and Maxwell 2005), (1 + as large) / (1 + R).
    """
    _check_paired(rows, other)
    if not len(rows):
        return {}
    our_scores, their_scores = from_sums(rows, rows.sums.sum(axis=0)), from_sums(other, other.sums.sum(axis=0))
    ours, theirs = _paired(rows, other, resamples, seed)
    swapped = _swapped(rows, other, resamples, seed)
    differences: dict[str, dict[str, Any]] = {}
    for name, values in ours.items():
        one, two = our_scores.get(name), their_scores.get(name)
        if name in theirs and name in swapped and one is not None and two is not None:
            # Sums in another order differ in the last digits: a difference that is equal must count as as large.
            extreme = np.sum(swapped[name] >= abs(one - two) * (1 - 1e-9) - 1e-12)
            differences[name] = {
                "difference": one - two,
                "interval": _interval(values - theirs[name]),
                "p": float((1 + extreme) / (1 + resamples)),
            }
    return differences


def _paired(
    rows: RowStatistics, other: RowStatistics, resamples: int, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Scores of both on the same R draws of rows."""
    ours, theirs = (_resampled(one, _blocks(len(one), resamples, seed, _with_replacement)) for one in (rows, other))
    return ours, theirs


def _swapped(rows: RowStatistics, other: RowStatistics, resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Absolute differences (R,) when a coin decides, row by row, which text is whose."""
    gap = other.sums - rows.sums
    ours, theirs = rows.sums.sum(axis=0), other.sums.sum(axis=0)
    drawn = []
    for coins in _blocks(len(rows), resamples, seed, _coins):
        for moved in np.einsum("rn,nm->rm", coins, gap):
            one, two = from_sums(rows, ours + moved), from_sums(other, theirs - moved)
            pairs = ((name, value, two.get(name)) for name, value in one.items())
            drawn.append({name: abs(a - b) for name, a, b in pairs if a is not None and b is not None})
    names = set.intersection(*map(set, drawn))
    return {name: np.array([gaps[name] for gaps in drawn]) for name in names}


def _resampled(rows: RowStatistics, blocks: Iterator[np.ndarray]) -> dict[str, np.ndarray]:
    """Scores of R resamples of the rows, each (R,). The same blocks draw the same rows: comparisons are paired."""
    drawn = [
        from_sums(rows, total)
        for weights in blocks
        for total in np.einsum("rn,nm->rm", weights, rows.sums)  # not @: BLAS threads cost 100 times this on busy cores
    ]
    # A resample may miss every row with a feature or a rating: such a score has no interval.
    names = set.intersection(*(set(scores) for scores in drawn))
    return {name: np.array([scores[name] for scores in drawn]) for name in METRICS if name in names}


def _blocks(rows: int, resamples: int, seed: int, draw: Draw) -> Iterator[np.ndarray]:
    """(up to 16, N) float64: how often each row counts in each resample."""
    random = np.random.default_rng(seed)
    for start in range(0, resamples, _AT_ONCE):
        yield draw(random, min(_AT_ONCE, resamples - start), rows)


def _with_replacement(random: np.random.Generator, resamples: int, rows: int) -> np.ndarray:
    drawn = [np.bincount(random.integers(rows, size=rows), minlength=rows) for _ in range(resamples)]
    return np.stack(drawn).astype(float)


def _coins(random: np.random.Generator, resamples: int, rows: int) -> np.ndarray:
    return random.integers(2, size=(resamples, rows)).astype(float)


def _interval(values: np.ndarray) -> list[float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]


def _check_paired(rows: RowStatistics, other: RowStatistics) -> None:
    if len(rows) != len(other):
        raise InputError(f"{len(rows)} rows against {len(other)}; a paired comparison needs the same rows")
