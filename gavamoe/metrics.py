"""The metrics' registry, and those of them that need no library: ratings, diversity of texts, features.

A metric has a name, a direction and a pure computation. `METRICS` is where a name is declared once;
docs/metrics.md has the definitions at length. Text metrics from libraries are in `text_metrics`.

Percentages run from 0 to 100. A metric that is undefined for its input is None, never NaN.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Scores = dict[str, float | None]

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Metric:
    """What a reader and the tuner need to know of a metric."""

    name: str
    label: str
    direction: Literal["higher", "lower"]
    """Which way is better."""
    unit: str
    definition: str

    @property
    def arrow(self) -> str:
        return "↑" if self.direction == "higher" else "↓"

    def better(self, value: float, other: float) -> bool:
        """Whether `value` is strictly better than `other`."""
        return value > other if self.direction == "higher" else value < other


def _table(*metrics: Metric) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


METRICS = _table(
    Metric("bleu_1", "BLEU-1", "higher", "%", "sacrebleu corpus BLEU, maximum order 1, tokenizer 13a, cased"),
    Metric("bleu_4", "BLEU-4", "higher", "%", "sacrebleu corpus BLEU, orders 1 to 4, 13a, cased, exp smoothing"),
    Metric("rouge_1", "ROUGE-1", "higher", "%", "rouge-score unigram F1, no stemmer, mean over rows"),
    Metric("rouge_l", "ROUGE-L", "higher", "%", "rouge-score longest common subsequence F1, mean over rows"),
    Metric("distinct_1", "Distinct-1", "higher", "%", "different words / words of all texts, split at white space"),
    Metric("distinct_2", "Distinct-2", "higher", "%", "different word pairs / word pairs of all texts"),
    Metric("bertscore_p", "BERTScore P", "higher", "share", "bert-score precision, raw, no idf, mean over rows"),
    Metric("bertscore_r", "BERTScore R", "higher", "share", "bert-score recall, raw, no idf, mean over rows"),
    Metric("bertscore_f", "BERTScore F", "higher", "share", "bert-score F, raw, no idf, mean over rows"),
    Metric("usr", "USR", "higher", "%", "unique sentence ratio: different texts / rows"),
    Metric("fmr", "FMR", "higher", "%", "share of a row's features that its text names, mean over rows with features"),
    Metric("fcr", "FCR", "higher", "%", "features named in any text / features of the dataset"),
    Metric("div", "DIV", "lower", "features", "features that two texts both name, mean over all pairs of texts"),
    Metric("rmse", "RMSE", "lower", "rating points", "root of the mean squared error of the predicted rating"),
    Metric("mae", "MAE", "lower", "rating points", "mean absolute error of the predicted rating"),
)


def rmse(error: np.ndarray) -> float | None:
    """Root mean square of rating errors (N,); rows without a rating (NaN) don't count; None without any."""
    known = error[~np.isnan(error)]
    return float(np.sqrt(np.mean(known**2))) if known.size else None


def mae(error: np.ndarray) -> float | None:
    """Mean absolute rating error (N,); rows without a rating (NaN) don't count; None without any."""
    known = error[~np.isnan(error)]
    return float(np.mean(np.abs(known))) if known.size else None


def is_empty(text: str) -> bool:
    """Whether a text has nothing but white space."""
    return not text.strip()


def words(text: str) -> list[str]:
    """The words that features and sentiment are looked for in: runs of letters, digits and _, case folded, NFC."""
    return _WORD.findall(unicodedata.normalize("NFC", text).casefold())


def distinct(texts: Iterable[str], order: int) -> float | None:
    """Distinct-n of a corpus in percent: different n-grams over all n-grams of words split at white space.

    It falls with the number of texts, so only corpora of one size compare. 0 without any n-gram, None without texts.
    """
    seen: set[tuple[str, ...]] = set()
    total = rows = 0
    for text in texts:
        rows += 1
        tokens = text.split()
        grams = list(zip(*(tokens[start:] for start in range(order)), strict=False))
        total += len(grams)
        seen.update(grams)
    if not rows:
        return None
    return 100 * len(seen) / total if total else 0.0


def unique_sentence_ratio(texts: Sequence[str]) -> float | None:
    """USR in percent: different texts (white space aside) over rows; empty texts are rows but no sentences."""
    if not texts:
        return None
    return 100 * len({tuple(text.split()) for text in texts if not is_empty(text)}) / len(texts)


class FeatureMatcher:
    """Finds the features of a set in texts. A feature of several words matches as that sequence of words.

    Features that differ only in case, punctuation or spacing are one; those without any word are none.
    """

    def __init__(self, features: Iterable[str]) -> None:
        self._ids: dict[tuple[str, ...], int] = {}
        self._by_first: dict[str, list[tuple[str, ...]]] = {}
        for feature in features:
            sequence = tuple(words(feature))
            if sequence and sequence not in self._ids:
                self._ids[sequence] = len(self._ids)
                self._by_first.setdefault(sequence[0], []).append(sequence)

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self, features: Iterable[str]) -> frozenset[int]:
        """Ids of the given features, as far as they belong to the set."""
        found = (self._ids.get(tuple(words(feature))) for feature in features)
        return frozenset(index for index in found if index is not None)

    def find(self, text: str) -> frozenset[int]:
        """Ids of the features that a text names."""
        tokens = words(text)
        found = set()
        for start, token in enumerate(tokens):
            for sequence in self._by_first.get(token, ()):
                if len(sequence) == 1 or tuple(tokens[start : start + len(sequence)]) == sequence:
                    found.add(self._ids[sequence])
        return frozenset(found)


def feature_share(found: frozenset[int], wanted: frozenset[int]) -> float:
    """Share of the wanted features that were found, 0 to 1; NaN when none was wanted. FMR is its mean."""
    return len(found & wanted) / len(wanted) if wanted else float("nan")


def feature_coverage(found: Iterable[frozenset[int]], size: int) -> float | None:
    """FCR in percent: features found in any text over the `size` of the feature set; None without features."""
    covered: set[int] = set()
    rows = 0
    for row in found:
        rows += 1
        covered |= row
    return 100 * len(covered) / size if size and rows else None


def feature_diversity(found: Sequence[frozenset[int]]) -> float | None:
    """DIV: mean number of features that two texts share; None for fewer than two texts.

    The sum over pairs of |F_a & F_b| equals the sum over features of n(n-1)/2, n being the texts that name it:
    linear in the texts instead of quadratic.
    """
    rows = len(found)
    if rows < 2:
        return None
    counts = Counter(index for row in found for index in row)
    return sum(n * (n - 1) for n in counts.values()) / (rows * (rows - 1))
