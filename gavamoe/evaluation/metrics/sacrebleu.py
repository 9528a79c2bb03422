"""BLEU and ROUGE as the libraries sacrebleu and rouge-score define them: `--style sacrebleu`, the default.

A row is counted once; corpus scores follow from column sums. Tokenizers, smoothing and the final formula are the
libraries' own; counting is ours: their calls for one row take twice the time, and gigabytes for very long texts.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from gavamoe.evaluation.metrics.ngrams import longest_common_subsequence, matches, ngrams
from gavamoe.evaluation.metrics.registry import Scores

BLEU_ORDER = 4

# Candidate length, reference length, matches by order, candidate n-grams by order; then ROUGE-1, ROUGE-L, and whether
# the reference has a token for rouge-score, which knows a-z and 0-9 only.
COLUMNS = 2 + 2 * BLEU_ORDER + 3
REFERENCE_LENGTH = 1
ROUGE_READS = COLUMNS - 1
_BLEU, _ROUGE_1, _ROUGE_L = slice(0, 2 + 2 * BLEU_ORDER), COLUMNS - 3, COLUMNS - 2


def statistics(candidate: str, reference: str) -> list[float]:
    """A row's COLUMNS values."""
    tokenize, read = _tokenizers()
    return [*bleu_counts(tokenize(candidate), tokenize(reference)), *_rouge(read(candidate), read(reference))]


def scores(total: np.ndarray, rows: float) -> Scores:
    """Scores of `rows` rows from their column sums (COLUMNS,); {} without any reference text: undefined, not 0."""
    if not total[REFERENCE_LENGTH]:
        return {}
    return {
        "bleu_1": _bleu(total[_BLEU], 1),
        "bleu_4": _bleu(total[_BLEU], BLEU_ORDER),
        "rouge_1": 100 * total[_ROUGE_1] / rows,
        "rouge_l": 100 * total[_ROUGE_L] / rows,
    }


def bleu_counts(candidate: Sequence[str], reference: Sequence[str]) -> list[int]:
    """Lengths, matches and n-grams of one row by order: what every corpus BLEU is a function of."""
    common = [
        matches(Counter(ngrams(candidate, order)), Counter(ngrams(reference, order)))
        for order in range(1, BLEU_ORDER + 1)
    ]
    totals = [max(len(candidate) - order + 1, 0) for order in range(1, BLEU_ORDER + 1)]
    return [len(candidate), len(reference), *common, *totals]


@functools.cache
def _tokenizers() -> tuple[Callable[[str], list[str]], Callable[[str], list[str]]]:
    """sacrebleu's 13a and rouge-score's own."""
    from rouge_score.tokenize import tokenize as read
    from sacrebleu.metrics import BLEU

    tokenizer = BLEU(tokenize="13a").tokenizer
    return lambda text: tokenizer(text.rstrip()).split(), lambda text: read(text, None)


def _rouge(candidate: list[str], reference: list[str]) -> tuple[float, float, float]:
    """F1 of single tokens and of the longest common subsequence, and whether there was anything to find."""
    if not candidate or not reference:
        return 0.0, 0.0, float(bool(reference))
    common = sum((Counter(candidate) & Counter(reference)).values())
    subsequence = longest_common_subsequence(reference, candidate)
    return _f1(common, candidate, reference), _f1(subsequence, candidate, reference), 1.0


def _f1(common: int, candidate: list[str], reference: list[str]) -> float:
    return 2 * common / (len(candidate) + len(reference))


def _bleu(statistics: np.ndarray, order: int) -> float:
    """sacrebleu's corpus BLEU from summed statistics; orders above `order` are not looked at."""
    from sacrebleu.metrics import BLEU

    counts = [int(value) for value in statistics]
    score: float = BLEU.compute_bleu(
        correct=counts[2 : 2 + order],
        total=counts[2 + BLEU_ORDER : 2 + BLEU_ORDER + order],
        sys_len=counts[0],
        ref_len=counts[1],
        smooth_method="exp",
        max_ngram_order=order,
    ).score
    return score
