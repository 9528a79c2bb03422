"""Baselines that need no training to speak of, so that a score means something."""

from collections import Counter
from typing import Any

import numpy as np

from gavamoe.data.dataset import Dataset, PairArrays
from gavamoe.evaluation.metrics.registry import mae, rmse

BIAS_REGULARIZATION = 5.0
BIAS_SWEEPS = 20


def most_frequent_text(dataset: Dataset) -> str:
    """The training explanation that occurs most often; the first of them in file order. "" without any text."""
    counts: Counter[str] = Counter()
    for batch in dataset.batches("train", ["text"]):
        counts.update(text for text in batch["text"].to_pylist() if text and text.strip())
    return max(counts, key=counts.__getitem__) if counts else ""


def bias_model(train: PairArrays, users: int, items: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Fit r = mean + user bias + item bias to the rated training pairs by ridge regression, alternating.

    Returns:
        mean, user biases (U,), item biases (I,); 0 for those without a training rating.
    """
    rated = ~np.isnan(train.rating)
    user, item, rating = train.user[rated], train.item[rated], train.rating[rated].astype(np.float64)
    mean = float(rating.mean()) if rating.size else 0.0
    user_bias, item_bias = np.zeros(users), np.zeros(items)
    for _ in range(BIAS_SWEEPS):
        item_bias = _ridge_means(item, rating - mean - user_bias[user], items)
        user_bias = _ridge_means(user, rating - mean - item_bias[item], users)
    return mean, user_bias, item_bias


def rating_baselines(train: PairArrays, pairs: PairArrays, dataset: Dataset) -> dict[str, Any] | None:
    """RMSE and MAE of the training mean and of the user + item bias model on the rows `pairs`; None without ratings."""
    if dataset.implicit:
        return None
    mean, user_bias, item_bias = bias_model(train, dataset.catalog.n_users, dataset.catalog.n_items)
    predictions = {
        "global_mean": np.full(len(pairs.user), mean),
        "bias_model": mean + user_bias[pairs.user] + item_bias[pairs.item],
    }
    errors = {name: predicted - pairs.rating for name, predicted in predictions.items()}
    return {name: {"rmse": rmse(error), "mae": mae(error)} for name, error in errors.items()}


def _ridge_means(group: np.ndarray, value: np.ndarray, size: int) -> np.ndarray:
    """Mean of `value` in each group, shrunk towards 0 as if BIAS_REGULARIZATION zeros had been seen."""
    totals = np.bincount(group, weights=value, minlength=size)
    return totals / (np.bincount(group, minlength=size) + BIAS_REGULARIZATION)
