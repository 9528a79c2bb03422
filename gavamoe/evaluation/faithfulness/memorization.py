"""How much of what was written stands in the training split already: exact copies, and near ones."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from gavamoe.evaluation.metrics.ngrams import longest_common_subsequence
from gavamoe.evaluation.metrics.registry import words

NEAR = 0.8
"""Similarity from which a text counts as a near copy."""
MAX_TRAINING_TEXTS = 200_000
_CANDIDATES = 10


class TrainingTexts:
    """An index over training texts that finds the nearest of them."""

    def __init__(self, texts: Iterable[str]) -> None:
        from sklearn.feature_extraction.text import CountVectorizer

        self._texts = sorted({tuple(words(text)) for text in texts} - {()})
        self._exact = set(self._texts)
        self._grams = CountVectorizer(analyzer=_bounded_pairs, binary=True, dtype=np.int32)
        if self._texts:
            self._matrix = self._grams.fit_transform(self._texts).tocsc()
            self._sizes = np.asarray(self._matrix.sum(axis=1)).ravel()

    def __len__(self) -> int:
        return len(self._texts)

    def has(self, text: str) -> bool:
        """Whether a training text has the same words in the same order; never for a text without words."""
        return tuple(words(text)) in self._exact

    def similarity(self, text: str) -> float:
        """Similarity to the nearest training text: 2 x (longest common subsequence) / (words of both), 0 to 1.

        Looked for among the few training texts that share most word pairs with it (Dice coefficient), which are nearly
        always the nearest.
        """
        tokens = tuple(words(text))
        if tokens in self._exact:
            return 1.0
        known = self._grams.vocabulary_ if self._texts else {}
        pairs = set(_bounded_pairs(tokens)) if tokens else set()
        columns = sorted(known[pair] for pair in pairs if pair in known)
        if not columns:
            return 0.0
        shared = np.asarray(self._matrix[:, columns].sum(axis=1)).ravel()
        dice = 2 * shared / (self._sizes + len(pairs))
        nearest = np.argsort(-dice, kind="stable")[:_CANDIDATES]
        return max(_similarity(tokens, self._texts[index]) for index in nearest)


def _similarity(first: Sequence[str], second: Sequence[str]) -> float:
    return 2 * longest_common_subsequence(first, second) / (len(first) + len(second))


def _bounded_pairs(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """Adjacent words, with the ends marked, so that a text of one word has pairs too."""
    return list(pairwise(["", *tokens, ""]))
