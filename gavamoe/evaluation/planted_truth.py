"""What only synthetic data can tell: how much of the planted truth a run found."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gavamoe.data.dataset import Dataset, Truth
from gavamoe.data.synthetic import grammar
from gavamoe.evaluation.faithfulness.sentiment import agreement, planted_reader
from gavamoe.evaluation.metrics.registry import FeatureMatcher


def _agreement(texts: Sequence[str], ratings: np.ndarray, truth: Truth) -> float | None:
    """Percent of texts whose sentiment is that of the row's rating; rows without a rating don't count."""
    agrees_N = agreement(planted_reader(truth), texts, ratings)
    rated = agrees_N[~np.isnan(agrees_N)]
    return 100 * float(rated.mean()) if rated.size else None


def style_of(text: str) -> int | None:
    """Which group's sentiment words a text has: the group whose style it is in; None for none's, or two groups'."""
    named = [group for group, matcher in enumerate(_style_words()) if matcher.find(text)]
    return named[0] if len(named) == 1 else None


@functools.cache
def _style_words() -> list[FeatureMatcher]:
    return [FeatureMatcher([*style.positive, *style.neutral, *style.negative]) for style in grammar.STYLES]


def recovered(
    dataset: Dataset,
    routes: Path,
    *,
    generated: Sequence[str],
    references: Sequence[str],
    ratings: np.ndarray,
    seed: int = 0,
) -> dict[str, Any] | None:
    """How far texts and routes match what was planted; None for data without a truth.

    Args:
        routes: routes.parquet of the run's stage 1.
        generated, references, ratings: (N,) of the evaluated rows; ratings are the true ones.
        seed: of k-means.
    """
    truth = dataset.truth()
    if truth is None:
        return None
    from gavamoe.stage1.routes import user_group_ari, user_responsibilities

    shares = user_responsibilities(dataset, routes) if routes.is_file() else None
    return {
        "groups": int(truth.groups),
        "seed": truth.seed,
        "sentiment_agreement": _agreement(generated, ratings, truth),
        "sentiment_agreement_of_references": _agreement(references, ratings, truth),
        "user_ari": None if shares is None else user_group_ari(shares, truth.group[: len(shares)], seed),
        "noise_floor_rmse": truth.noise_floor_rmse,
        "oracle_rmse": truth.oracle_rmse,
        "bias_rmse": truth.bias_rmse,
    }
