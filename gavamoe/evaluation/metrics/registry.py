"""The metrics' registry, and those of them that need no library: ratings, diversity of texts, features.

A metric has a name, a direction and a pure computation. `METRICS` is where a name is declared once;
docs/metrics.md has the definitions at length. BLEU and ROUGE are in `sacrebleu` and `peter`.

Percentages run from 0 to 100. A metric that is undefined for its input is None, never NaN.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gavamoe.evaluation.metrics.ngrams import ngrams

Scores = dict[str, float | None]

FIXED_TEXTS = 1000
"""Texts to which Distinct and USR are brought, so that corpora of different size compare."""

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


def by_name(*metrics: Metric) -> dict[str, Metric]:
    """A registry of metrics, in the order given."""
    return {metric.name: metric for metric in metrics}


METRICS = by_name(
    Metric("bleu_1", "BLEU-1", "higher", "%", "sacrebleu corpus BLEU, maximum order 1, tokenizer 13a, cased"),
    Metric("bleu_4", "BLEU-4", "higher", "%", "sacrebleu corpus BLEU, orders 1 to 4, 13a, cased, exp smoothing"),
    Metric("rouge_1", "ROUGE-1", "higher", "%", "rouge-score unigram F1, no stemmer, mean over rows"),
    Metric("rouge_l", "ROUGE-L", "higher", "%", "rouge-score longest common subsequence F1, mean over rows"),
    Metric("peter_bleu_1", "PETER BLEU-1", "higher", "%", "corpus BLEU, order 1, split at spaces, unsmoothed"),
    Metric("peter_bleu_4", "PETER BLEU-4", "higher", "%", "corpus BLEU, orders 1 to 4, split at spaces, unsmoothed"),
    Metric("peter_bleu_1_smoothed", "PETER BLEU-1, smoothed", "higher", "%", "the same, add-one smoothed (GaVaMoE's)"),
    Metric("peter_bleu_4_smoothed", "PETER BLEU-4, smoothed", "higher", "%", "the same, add-one smoothed (GaVaMoE's)"),
    Metric("peter_rouge_1", "PETER ROUGE-1", "higher", "%", "F1 of the sets of words, mean over rows"),
    Metric("peter_rouge_2", "PETER ROUGE-2", "higher", "%", "F1 of the sets of word pairs, mean over rows"),
    Metric(
        "peter_rouge_l", "PETER ROUGE-L", "higher", "%", "longest common subsequence, F with beta P/R, mean over rows"
    ),
    Metric("distinct_1", "Distinct-1", "higher", "%", "different words / words of all texts, split at white space"),
    Metric("distinct_2", "Distinct-2", "higher", "%", "different word pairs / word pairs of all texts"),
    Metric("distinct_1_at_1000", "Distinct-1 at 1,000", "higher", "%", "the same, expected of 1,000 of the texts"),
    Metric("distinct_2_at_1000", "Distinct-2 at 1,000", "higher", "%", "the same, expected of 1,000 of the texts"),
    Metric("distinct_1_sentence", "Distinct-1, sentence", "higher", "%", "different words / words of a text, mean"),
    Metric("distinct_2_sentence", "Distinct-2, sentence", "higher", "%", "different pairs / pairs of a text, mean"),
    Metric("bertscore_p", "BERTScore P", "higher", "share", "bert-score precision, raw, no idf, mean over rows"),
    Metric("bertscore_r", "BERTScore R", "higher", "share", "bert-score recall, raw, no idf, mean over rows"),
    Metric("bertscore_f", "BERTScore F", "higher", "share", "bert-score F, raw, no idf, mean over rows"),
    Metric("bertscore_p_rescaled", "BERTScore P, rescaled", "higher", "share", "(P - floor) / (1 - floor)"),
    Metric("bertscore_r_rescaled", "BERTScore R, rescaled", "higher", "share", "(R - floor) / (1 - floor)"),
    Metric("bertscore_f_rescaled", "BERTScore F, rescaled", "higher", "share", "(F - floor) / (1 - floor)"),
    Metric("usr", "USR", "higher", "%", "unique sentence ratio: different texts / rows"),
    Metric("usr_at_1000", "USR at 1,000", "higher", "%", "the same, expected of 1,000 of the texts"),
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


class DocumentFrequencies:
    """How many texts each thing occurs in; a thing is an n-gram of words split at white space, or a whole text."""

    def __init__(self, texts: Iterable[str], things: Callable[[Sequence[str]], Sequence[Hashable]]) -> None:
        """`things` lists those of a text's words, repeated ones too."""
        texts_with: Counter[Hashable] = Counter()
        self.rows = self.total = 0
        for text in texts:
            in_text = things(text.split())
            self.rows += 1
            self.total += len(in_text)
            texts_with.update(set(in_text))
        self._texts_with = np.fromiter(texts_with.values(), dtype=np.int64, count=len(texts_with))

    @property
    def different(self) -> int:
        """Different things in all texts."""
        return len(self._texts_with)

    def different_in(self, rows: int) -> float:
        """Expected number of different things in `rows` texts drawn without replacement.

        A thing of n of the N texts is missed with probability C(N - n, rows) / C(N, rows) (Hurlbert's rarefaction):
        the mean over all samples, without drawing any.
        """
        sizes, things = np.unique(self._texts_with, return_counts=True)
        missed = [_choose(self.rows - int(n), rows) - _choose(self.rows, rows) for n in sizes]
        return float(np.sum(things * (1 - np.exp(missed))))


def _choose(size: int, taken: int) -> float:
    """Logarithm of the number of ways to take `taken` out of `size`."""
    if taken > size:
        return -math.inf
    return math.lgamma(size + 1) - math.lgamma(taken + 1) - math.lgamma(size - taken + 1)


def word_grams(text: str) -> list[str]:
    """`words`, and pairs of adjacent words: what readers of texts look at ("not good" is not praise)."""
    single = words(text)
    return [*single, *(" ".join(pair) for pair in ngrams(single, 2))]


def distinct(texts: Iterable[str], order: int, fixed: int = FIXED_TEXTS) -> tuple[float | None, float | None]:
    """Distinct-n of a corpus in percent: different n-grams over all n-grams of words split at white space.

    It falls with the number of texts, so only corpora of one size compare.

    Returns:
        of all texts, and what is expected of `fixed` of them (expected different n-grams over expected n-grams); 0
        without any n-gram; the first is None without texts, the second with fewer than `fixed`.
    """
    frequencies = DocumentFrequencies(texts, lambda words: ngrams(words, order))
    of_all = _percent(frequencies.different, frequencies.total) if frequencies.rows else None
    if frequencies.rows < fixed:
        return of_all, None
    return of_all, _percent(frequencies.different_in(fixed), frequencies.total * fixed / frequencies.rows)


def distinct_in_text(text: str, order: int) -> float:
    """Different n-grams over all n-grams of one text, 0 to 1; 0 for a text without any."""
    grams = ngrams(text.split(), order)
    return len(set(grams)) / len(grams) if grams else 0.0


def unique_sentence_ratio(texts: Iterable[str], fixed: int = FIXED_TEXTS) -> tuple[float | None, float | None]:
    """USR in percent: different texts (white space aside) over rows; empty texts are rows but no sentences.

    Returns:
        of all texts, and what is expected of `fixed` of them, as `distinct` does.
    """
    frequencies = DocumentFrequencies(texts, lambda words: [tuple(words)] if words else [])
    of_all = _percent(frequencies.different, frequencies.rows) if frequencies.rows else None
    return of_all, _percent(frequencies.different_in(fixed), fixed) if frequencies.rows >= fixed else None


def _percent(count: float, total: float) -> float:
    return 100 * count / total if total else 0.0


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
        indices = (self._ids.get(tuple(words(feature))) for feature in features)
        return frozenset(index for index in indices if index is not None)

    def find(self, text: str) -> frozenset[int]:
        """Ids of the features that a text names."""
        tokens = words(text)
        named = set()
        for start, token in enumerate(tokens):
            for sequence in self._by_first.get(token, ()):
                if len(sequence) == 1 or tuple(tokens[start : start + len(sequence)]) == sequence:
                    named.add(self._ids[sequence])
        return frozenset(named)


def feature_share(named: frozenset[int], wanted: frozenset[int]) -> float:
    """Share of the wanted features that are named, 0 to 1; NaN when none was wanted. FMR is its mean."""
    return len(named & wanted) / len(wanted) if wanted else float("nan")


def feature_coverage(named: Iterable[frozenset[int]], size: int) -> float | None:
    """FCR in percent: features named in any text over the `size` of the feature set; None without features."""
    covered: set[int] = set()
    rows = 0
    for row in named:
        rows += 1
        covered |= row
    return 100 * len(covered) / size if size and rows else None


def feature_diversity(named: Sequence[frozenset[int]]) -> float | None:
    """DIV: mean number of features that two texts share; None for fewer than two texts.

    The sum over pairs of |F_a & F_b| equals the sum over features of n(n-1)/2, n being the texts that name it:
    linear in the texts instead of quadratic.
    """
    rows = len(named)
    if rows < 2:
        return None
    counts = Counter(index for row in named for index in row)
    return sum(n * (n - 1) for n in counts.values()) / (rows * (rows - 1))
