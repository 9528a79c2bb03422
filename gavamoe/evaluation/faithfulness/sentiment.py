"""What sentiment a text has, and whether it agrees with the rating.

On synthetic data a text is read by the planted words. On other data a reader is learned from the training split:
logistic regression from words and parts of words to the sentiment of the rating. Its agreement on human references
says how far to trust it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gavamoe.data.dataset import Dataset, Truth
from gavamoe.data.ratings import PLANTED_SCALE, RatingScale
from gavamoe.evaluation.faithfulness.training_texts import sampled_texts
from gavamoe.evaluation.metrics.registry import FeatureMatcher, word_grams, words

LEARNED_FROM = 20_000
"""Training texts that a reader is learned from, at most."""


@dataclass(frozen=True)
class SentimentReader:
    """Reads sentiments from texts and from ratings."""

    description: str
    read: Callable[[Sequence[str]], list[str | None]]
    """None: the text has no sentiment, or two."""
    of_rating: Callable[[float], str]


def planted_reader(truth: Truth) -> SentimentReader:
    """By the words that the generator draws on; texts with none of them, or of two sentiments, have no sentiment."""
    matchers = {name: FeatureMatcher(listed) for name, listed in truth.sentiment_words.items()}

    def read(text: str) -> str | None:
        named = [name for name, matcher in matchers.items() if matcher.find(text)]
        return named[0] if len(named) == 1 else None

    return SentimentReader("planted words", lambda texts: list(map(read, texts)), PLANTED_SCALE.sentiment)


def reader_of(dataset: Dataset, seed: int) -> SentimentReader | None:
    """The planted reader of synthetic data, else one that is learned; None where there is nothing to learn it from."""
    truth = dataset.truth()
    return planted_reader(truth) if truth else learned_reader(dataset, seed)


def learned_reader(dataset: Dataset, seed: int) -> SentimentReader | None:
    """From at most LEARNED_FROM training texts; None without ratings, texts, or ratings of two sentiments."""
    if dataset.rating_range is None:
        return None
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    low, high = dataset.rating_range
    scale = RatingScale(low=low, high=high, values=dataset.rating_values)
    texts, sentiments = _training_texts(dataset, scale, seed)
    if len(set(sentiments)) < 2:
        return None
    # Balanced: with nine in ten ratings positive, a reader may not do well by saying "positive" always.
    # A strong prior, and parts of words: most ratings have few texts, and words of one text are seen once.
    model = make_pipeline(
        make_union(
            TfidfVectorizer(analyzer=word_grams, sublinear_tf=True, max_features=50_000),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, max_features=100_000),
        ),
        LogisticRegression(C=0.3, class_weight="balanced", max_iter=200),
    ).fit(texts, sentiments)

    def read(texts_read: Sequence[str]) -> list[str | None]:
        if not texts_read:
            return []
        return [
            label if words(text) else None
            for text, label in zip(texts_read, model.predict(texts_read).tolist(), strict=True)
        ]

    return SentimentReader(f"logistic regression on {len(texts):,} training texts", read, scale.sentiment)


def agreement(reader: SentimentReader, texts: Sequence[str], ratings: np.ndarray) -> np.ndarray:
    """Whether a text has the sentiment of the row's rating: (N,) 1 or 0, NaN without a rating."""
    read = reader.read(texts)
    return np.array(
        [
            np.nan if np.isnan(rating) else float(sentiment == reader.of_rating(float(rating)))
            for sentiment, rating in zip(read, ratings, strict=True)
        ]
    )


def by_sentiment(reader: SentimentReader, ratings: np.ndarray) -> dict[str, np.ndarray]:
    """Row numbers of each sentiment that a rating has."""
    names = np.array(["" if np.isnan(rating) else reader.of_rating(float(rating)) for rating in ratings])
    return {name: np.flatnonzero(names == name) for name in sorted(set(names.tolist()) - {""})}


def _training_texts(dataset: Dataset, scale: RatingScale, seed: int) -> tuple[list[str], list[str]]:
    texts, ratings = sampled_texts(dataset, LEARNED_FROM, seed, "rating", rated=True)
    pairs = [(text, scale.sentiment(float(rating))) for text, rating in zip(texts, ratings, strict=True) if words(text)]
    return [text for text, _ in pairs], [sentiment for _, sentiment in pairs]
