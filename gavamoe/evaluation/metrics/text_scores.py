"""Scores of texts, of any group of rows.

Every row is measured once (`measure`); the scores of a group of rows follow from sums of the rows' statistics
(`aggregate`), and so do bootstrap intervals and comparisons of systems (`significance`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import numpy as np

from gavamoe.errors import InputError
from gavamoe.evaluation.metrics import peter, sacrebleu
from gavamoe.evaluation.metrics.bertscore import BertScore
from gavamoe.evaluation.metrics.registry import (
    METRICS,
    FeatureMatcher,
    Scores,
    distinct,
    distinct_in_text,
    feature_coverage,
    feature_diversity,
    feature_share,
    is_empty,
    unique_sentence_ratio,
)

Style = Literal["sacrebleu", "peter", "both"]
"""Which family of BLEU and ROUGE: of the libraries, of the PETER line of papers, or each under its own name."""
STYLES: dict[str, tuple[ModuleType, ...]] = {
    "sacrebleu": (sacrebleu,),
    "peter": (peter,),
    "both": (sacrebleu, peter),
}

# Columns of RowStatistics.sums.
_SACREBLEU = slice(0, sacrebleu.COLUMNS)
_PETER = slice(_SACREBLEU.stop, _SACREBLEU.stop + peter.COLUMNS)
_DISTINCT_1, _DISTINCT_2, _FEATURE_SHARE, _HAS_FEATURES, _SQUARED, _ABSOLUTE, _RATED, _ROWS, _REFERENCES = range(
    _PETER.stop, _PETER.stop + 9
)
_BERT = slice(_REFERENCES + 1, _REFERENCES + 4)
_COLUMNS = _BERT.stop
_COLUMNS_OF = {sacrebleu: _SACREBLEU, peter: _PETER}


@dataclass(frozen=True)
class RowStatistics:
    """What was measured on N rows."""

    candidates: Sequence[str]
    sums: np.ndarray
    """(N, M) float64; scores of a group follow from its column sums."""
    named: Sequence[frozenset[int]]
    """Features of the feature set that each candidate names."""
    feature_set_size: int
    empty_candidates: np.ndarray
    """(N,) bool: the text is empty; such rows score 0 and stay in every mean."""
    empty_references: np.ndarray
    """(N,) bool"""
    unseen_references: np.ndarray
    """(N,) bool: references with text but without a token for rouge-score, which knows a-z and 0-9 only."""
    styles: tuple[ModuleType, ...]
    bertscore: BertScore | None

    def __len__(self) -> int:
        return len(self.candidates)


def measure(
    candidates: Sequence[str],
    references: Sequence[str],
    *,
    style: Style = "sacrebleu",
    features: Sequence[Sequence[str]] | None = None,
    feature_set: Iterable[str] = (),
    rating_error: np.ndarray | None = None,
    bertscore: BertScore | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> RowStatistics:
    """Measure N candidates against their references, row by row.

    Args:
        style: which BLEU and ROUGE.
        features: each row's features; `feature_set`: the dataset's (the rows' own are added to it).
        rating_error: (N,) predicted minus true rating, NaN where there is no rating.
        bertscore: from `bertscore.bert_score`.
        on_progress: called with rows done and rows in all.

    Raises:
        InputError: an unknown style, or candidates and references that don't pair up.
    """
    if len(candidates) != len(references):
        raise InputError(f"{len(candidates)} candidates against {len(references)} references; the rows must pair up")
    if style not in STYLES:
        raise InputError(f"style {style}: unknown; known are {', '.join(STYLES)}")
    matcher = FeatureMatcher([*feature_set, *(feature for row in features or () for feature in row)])
    wanted = [matcher.ids(row) for row in features] if features is not None else [frozenset[int]()] * len(candidates)
    named = [matcher.find(text) for text in candidates] if len(matcher) else [frozenset[int]()] * len(candidates)
    empty_references = np.array([is_empty(text) for text in references], dtype=bool)
    sums = np.zeros((len(candidates), _COLUMNS))
    _fill_texts(sums, candidates, references, STYLES[style], on_progress)
    _fill_features(sums, named, wanted)
    _fill_ratings(sums, rating_error)
    if bertscore is not None:
        sums[:, _BERT] = bertscore.values
    sums[:, _ROWS], sums[:, _REFERENCES] = 1, ~empty_references
    return RowStatistics(
        candidates=candidates,
        sums=sums,
        named=named,
        feature_set_size=len(matcher),
        empty_candidates=np.array([is_empty(text) for text in candidates], dtype=bool),
        empty_references=empty_references,
        unseen_references=_unread(sums, empty_references, STYLES[style]),
        styles=STYLES[style],
        bertscore=bertscore,
    )


def _unread(sums: np.ndarray, empty_references: np.ndarray, styles: Sequence[ModuleType]) -> np.ndarray:
    if sacrebleu not in styles:
        return np.zeros(len(sums), dtype=bool)
    unread: np.ndarray = (sums[:, _SACREBLEU][:, sacrebleu.ROUGE_READS] == 0) & ~empty_references
    return unread


def aggregate(rows: RowStatistics, index: np.ndarray | None = None) -> Scores:
    """All scores of the rows at `index` (all rows if None), by name; None where undefined or not measured."""
    chosen = np.arange(len(rows)) if index is None else np.asarray(index, dtype=np.int64)
    texts = [rows.candidates[i] for i in chosen]
    named = [rows.named[i] for i in chosen]
    scores = dict.fromkeys(METRICS) | from_sums(rows, rows.sums[chosen].sum(axis=0))
    scores["distinct_1"], scores["distinct_1_at_1000"] = distinct(texts, 1)
    scores["distinct_2"], scores["distinct_2_at_1000"] = distinct(texts, 2)
    scores["usr"], scores["usr_at_1000"] = unique_sentence_ratio(texts)
    if rows.feature_set_size:
        scores["fcr"] = feature_coverage(named, rows.feature_set_size)
        scores["div"] = feature_diversity(named)
    return scores


def count(rows: RowStatistics, index: np.ndarray | None = None) -> dict[str, int]:
    """How many rows the scores of `aggregate` rest on, and how many of them are empty or blind."""
    chosen = slice(None) if index is None else np.asarray(index, dtype=np.int64)
    return {
        "rows": int(rows.sums[chosen, _ROWS].sum()),
        "empty_generations": int(rows.empty_candidates[chosen].sum()),
        "empty_references": int(rows.empty_references[chosen].sum()),
        "references_without_rouge_tokens": int(rows.unseen_references[chosen].sum()),
        "rows_with_features": int(rows.sums[chosen, _HAS_FEATURES].sum()),
        "rows_with_rating": int(rows.sums[chosen, _RATED].sum()),
    }


def from_sums(rows: RowStatistics, total: np.ndarray) -> Scores:
    """Scores from column sums (M,) over a group of `rows`; those without any row to rest on are left out."""
    size, rated, featured = total[_ROWS], total[_RATED], total[_HAS_FEATURES]
    scores: Scores = {}
    for style in rows.styles:
        scores |= style.scores(total[_COLUMNS_OF[style]], size)
    if size:
        scores["distinct_1_sentence"] = 100 * total[_DISTINCT_1] / size
        scores["distinct_2_sentence"] = 100 * total[_DISTINCT_2] / size
    if rows.bertscore is not None and total[_REFERENCES]:
        scores |= _bertscores(rows.bertscore, total[_BERT] / size)
    if featured:
        scores["fmr"] = 100 * total[_FEATURE_SHARE] / featured
    if rated:
        scores["rmse"], scores["mae"] = np.sqrt(total[_SQUARED] / rated), total[_ABSOLUTE] / rated
    return {name: None if value is None else float(value) for name, value in scores.items()}


def _bertscores(bertscore: BertScore, means: np.ndarray) -> Scores:
    """Raw precision, recall and F, and rescaled where there is a floor; from the raw means (3,)."""
    names = ("bertscore_p", "bertscore_r", "bertscore_f")
    scores: Scores = dict(zip(names, means, strict=True))
    if bertscore.floor is not None:
        rescaled = (means - bertscore.floor) / (1 - bertscore.floor)
        scores |= {f"{name}_rescaled": value for name, value in zip(names, rescaled, strict=True)}
    return scores


def _fill_texts(
    sums: np.ndarray,
    candidates: Sequence[str],
    references: Sequence[str],
    styles: Sequence[ModuleType],
    on_progress: Callable[[int, int], None] | None,
) -> None:
    for row, (candidate, reference) in enumerate(zip(candidates, references, strict=True)):
        for style in styles:
            sums[row, _COLUMNS_OF[style]] = style.statistics(candidate, reference)
        sums[row, _DISTINCT_1], sums[row, _DISTINCT_2] = distinct_in_text(candidate, 1), distinct_in_text(candidate, 2)
        if on_progress and (row + 1) % 256 == 0:
            on_progress(row + 1, len(candidates))
    if on_progress:
        on_progress(len(candidates), len(candidates))


def _fill_features(sums: np.ndarray, named: Sequence[frozenset[int]], wanted: Sequence[frozenset[int]]) -> None:
    shares = np.array([feature_share(*pair) for pair in zip(named, wanted, strict=True)])
    sums[:, _FEATURE_SHARE] = np.nan_to_num(shares)
    sums[:, _HAS_FEATURES] = ~np.isnan(shares)


def _fill_ratings(sums: np.ndarray, error: np.ndarray | None) -> None:
    if error is None:
        return
    sums[:, _RATED] = ~np.isnan(error)
    sums[:, _SQUARED] = np.nan_to_num(error) ** 2
    sums[:, _ABSOLUTE] = np.abs(np.nan_to_num(error))
