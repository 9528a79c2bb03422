"""Training rows whose texts say their rating: what the explainer learns from, where a config asks for it.

Reviews often praise in a text of two stars, or say nothing of liking. Whoever learns from all of them writes "a bit of
a mess, but a good one" whatever the rating. A reader of sentiment (logistic regression on words) is learned on two
thirds of the rows and reads the third, so that no text is judged by a reader that has seen it; of each sentiment the
rows stay that are read most clearly as their ratings say. Only training rows are looked at.
"""

import numpy as np

from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.stage2.tokenized_rows import rating_scale, rows_with_text

_FOLDS = 3
_READ_FROM = 20_000
"""Texts that each reader is learned from, at most."""


def training_rows(config: RunConfig, data: Dataset) -> np.ndarray:
    """Numbers of the training rows whose texts are learned, ascending: int64; see `stage2.clear_share`.

    All are where there are no ratings, or ratings of one sentiment only.

    Raises:
        InputError: no row has a text.
    """
    rows, share, scale = rows_with_text(data, "train"), config.stage2.clear_share, rating_scale(data)
    if share == 1 or scale is None:
        return rows
    table = data.table("train", ["text", "rating"]).take(rows)
    sentiments = scale.leaning(table["rating"].to_numpy(zero_copy_only=False))
    if len(np.unique(sentiments)) < 2:
        return rows
    return rows[_clearest(table["text"].to_pylist(), sentiments, share, np.random.default_rng(config.seed))]


def _clearest(texts: list[str], sentiments: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """The `share` of each sentiment's texts (one at least) that other texts' reader reads as it most probably."""
    own = _own_probability(texts, sentiments, random)
    kept = []
    for sentiment in np.unique(sentiments):
        members = np.flatnonzero(sentiments == sentiment)
        count = max(1, round(share * len(members)))
        kept.append(members[np.argsort(-own[members], kind="stable")[:count]])
    return np.sort(np.concatenate(kept))


def _own_probability(texts: list[str], sentiments: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Probability that a reader of other texts gives to each text's own sentiment: (N,)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    fold = random.permutation(len(texts)) % _FOLDS
    own = np.zeros(len(texts))
    for number in range(_FOLDS):
        others, read = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        if len(others) > _READ_FROM:
            others = np.sort(random.choice(others, _READ_FROM, replace=False))
        if len(np.unique(sentiments[others])) < 2:
            continue
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=50_000, token_pattern=r"\w+")
        # Balanced, as the reader that judges texts: else "positive" would be the safe reading of most rows.
        reader = LogisticRegression(C=0.3, class_weight="balanced", max_iter=200)
        try:
            reader.fit(words.fit_transform([texts[row] for row in others]), sentiments[others])
        except ValueError:  # texts without a word: nothing tells them apart
            continue
        shares = reader.predict_proba(words.transform([texts[row] for row in read]))
        column = np.searchsorted(reader.classes_, sentiments[read])
        known = np.isin(sentiments[read], reader.classes_)
        own[read] = np.where(known, shares[np.arange(len(read)), np.minimum(column, shares.shape[1] - 1)], 0)
    return own
