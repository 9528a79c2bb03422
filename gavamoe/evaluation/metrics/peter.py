"""BLEU and ROUGE as NETE, PETER, PEPLER and the GaVaMoE paper report them: `--style peter`.

Written from their definitions: one corpus BLEU, smoothed (GaVaMoE) or not (the others), as in Google's NMT code, and a
ROUGE on sets of n-grams. Texts are split at white space as they come: that line's data are
lower-cased and tokenized beforehand, so give tokenized text to compare with its tables.
"""

from collections.abc import Sequence

import numpy as np

from gavamoe.evaluation.metrics.ngrams import longest_common_subsequence, ngrams
from gavamoe.evaluation.metrics.registry import Scores
from gavamoe.evaluation.metrics.sacrebleu import BLEU_ORDER, bleu_counts

# As in `sacrebleu`: lengths, matches, n-grams; then ROUGE-1, ROUGE-2, ROUGE-L.
COLUMNS = 2 + 2 * BLEU_ORDER + 3
_REFERENCE_LENGTH = 1
_BLEU, _ROUGE = slice(0, 2 + 2 * BLEU_ORDER), slice(COLUMNS - 3, COLUMNS)


def statistics(candidate: str, reference: str) -> list[float]:
    """A row's COLUMNS values."""
    pair = candidate.split(), reference.split()
    rouges = [_set_f1(*pair, 1), _set_f1(*pair, 2), _subsequence_f(*pair)]
    return [*bleu_counts(*pair), *rouges]


def scores(total: np.ndarray, rows: float) -> Scores:
    """Scores of `rows` rows from their column sums (COLUMNS,); {} without any reference text: undefined, not 0."""
    if not total[_REFERENCE_LENGTH]:
        return {}
    one, two, longest = 100 * total[_ROUGE] / rows
    return {
        "peter_bleu_1": corpus_bleu(total[_BLEU], 1, smooth=False),
        "peter_bleu_4": corpus_bleu(total[_BLEU], BLEU_ORDER, smooth=False),
        "peter_bleu_1_smoothed": corpus_bleu(total[_BLEU], 1, smooth=True),
        "peter_bleu_4_smoothed": corpus_bleu(total[_BLEU], BLEU_ORDER, smooth=True),
        "peter_rouge_1": one,
        "peter_rouge_2": two,
        "peter_rouge_l": longest,
    }


def corpus_bleu(statistics: np.ndarray, order: int, *, smooth: bool) -> float:
    """Brevity penalty times geometric mean of the precisions of orders 1 to `order`, in percent.

    Smoothed, every precision is (matches + 1) / (n-grams + 1), as in Lin and Och (2004) but for order 1 too; not
    smoothed, an order without a match makes the whole 0.
    """
    candidate_length, reference_length = statistics[:2]
    if not candidate_length:
        return 0.0
    matched = statistics[2 : 2 + order] + smooth
    possible = statistics[2 + BLEU_ORDER : 2 + BLEU_ORDER + order] + smooth
    if not (matched * possible).all():
        return 0.0
    brevity = 1.0 if candidate_length > reference_length else float(np.exp(1 - reference_length / candidate_length))
    return 100 * brevity * float(np.exp(np.mean(np.log(matched / possible))))


def _set_f1(candidate: Sequence[str], reference: Sequence[str], order: int) -> float:
    """F1 of the sets of n-grams: repeated ones count once."""
    ours, theirs = set(ngrams(candidate, order)), set(ngrams(reference, order))
    return 2 * len(ours & theirs) / (len(ours) + len(theirs)) if ours and theirs else 0.0


def _subsequence_f(candidate: Sequence[str], reference: Sequence[str]) -> float:
    """(1 + b^2) R P / (R + b^2 P) of the longest common subsequence with b = P / R, as that line has it: not F1."""
    common = longest_common_subsequence(reference, candidate)
    if not common:
        return 0.0
    precision, recall = common / len(candidate), common / len(reference)
    squared = (precision / recall) ** 2
    return (1 + squared) * recall * precision / (recall + squared * precision)
