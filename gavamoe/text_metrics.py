"""Scores of texts: BLEU by sacrebleu, ROUGE by rouge-score, BERTScore by bert-score, beside `metrics`' own.

Every row is measured once (`measure`); the scores of any group of rows follow from sums of the rows'
statistics (`aggregate`), and so do bootstrap intervals (`intervals`) and paired comparisons (`not_better`).

Shapes: N rows, M columns of statistics that add up over rows, R bootstrap resamples.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gavamoe.errors import InputError
from gavamoe.metrics import (
    METRICS,
    FeatureMatcher,
    Scores,
    distinct,
    feature_coverage,
    feature_diversity,
    feature_share,
    is_empty,
    unique_sentence_ratio,
)

BLEU_ORDER = 4
# Above this many cells rouge-score's table of Python integers takes seconds and gigabytes for a single row.
_LCS_TABLE_CELLS = 2**20
_RESAMPLES_AT_ONCE = 16

# Columns of RowStatistics.sums. BLEU: candidate length, reference length, matches and n-grams by order.
_BLEU = slice(0, 2 + 2 * BLEU_ORDER)
_REFERENCE_LENGTH = 1
_ROUGE_1, _ROUGE_L, _FEATURE_SHARE, _HAS_FEATURES, _SQUARED, _ABSOLUTE, _RATED, _ROWS = range(
    _BLEU.stop, _BLEU.stop + 8
)
_BERT = slice(_ROWS + 1, _ROWS + 4)
_COLUMNS = _BERT.stop


@dataclass(frozen=True)
class BertScore:
    """BERTScore of N rows, raw, and what computed it."""

    values: np.ndarray
    """(N, 3) float64: precision, recall, F; zeros where the candidate or the reference is empty."""
    model: str
    layer: int


@dataclass(frozen=True)
class RowStatistics:
    """What was measured on N rows."""

    candidates: Sequence[str]
    sums: np.ndarray
    """(N, M) float64; scores of a group follow from its column sums."""
    found: Sequence[frozenset[int]]
    """Features of the feature set that each candidate names."""
    feature_set_size: int
    empty_candidates: np.ndarray
    """(N,) bool: nothing was said; such rows score 0 and stay in every mean."""
    empty_references: np.ndarray
    """(N,) bool"""
    unseen_references: np.ndarray
    """(N,) bool: references with text but without a token for rouge-score, which knows a-z and 0-9 only."""
    has_bertscore: bool

    def __len__(self) -> int:
        return len(self.candidates)


def measure(
    candidates: Sequence[str],
    references: Sequence[str],
    *,
    features: Sequence[Sequence[str]] | None = None,
    feature_set: Iterable[str] = (),
    rating_error: np.ndarray | None = None,
    bertscore: BertScore | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> RowStatistics:
    """Measure N candidates against their references, row by row.

    Args:
        features: each row's features; `feature_set`: the dataset's (the rows' own are added to it).
        rating_error: (N,) predicted minus true rating, NaN where there is no rating.
        bertscore: from `bert_score`.
        on_progress: called with rows done and rows in all.
    """
    if len(candidates) != len(references):
        raise InputError(f"{len(candidates)} candidates against {len(references)} references; the rows must pair up")
    matcher = FeatureMatcher([*feature_set, *(feature for row in features or () for feature in row)])
    wanted = [matcher.ids(row) for row in features] if features is not None else [frozenset[int]()] * len(candidates)
    found = [matcher.find(text) for text in candidates] if len(matcher) else [frozenset[int]()] * len(candidates)
    sums = np.zeros((len(candidates), _COLUMNS))
    unseen = _fill_overlap(sums, candidates, references, on_progress)
    _fill_features(sums, found, wanted)
    _fill_ratings(sums, rating_error)
    if bertscore is not None:
        sums[:, _BERT] = bertscore.values
    sums[:, _ROWS] = 1
    return RowStatistics(
        candidates=candidates,
        sums=sums,
        found=found,
        feature_set_size=len(matcher),
        empty_candidates=np.array([is_empty(text) for text in candidates], dtype=bool),
        empty_references=np.array([is_empty(text) for text in references], dtype=bool),
        unseen_references=unseen,
        has_bertscore=bertscore is not None,
    )


def aggregate(rows: RowStatistics, index: np.ndarray | None = None) -> Scores:
    """All scores of the rows at `index` (all rows if None), by name; None where undefined or not measured."""
    chosen = np.arange(len(rows)) if index is None else np.asarray(index, dtype=np.int64)
    texts = [rows.candidates[i] for i in chosen]
    found = [rows.found[i] for i in chosen]
    scores = dict.fromkeys(METRICS) | _from_sums(rows.sums[chosen].sum(axis=0), rows.has_bertscore)
    scores["distinct_1"] = distinct(texts, 1)
    scores["distinct_2"] = distinct(texts, 2)
    scores["usr"] = unique_sentence_ratio(texts)
    if rows.feature_set_size:
        scores["fcr"] = feature_coverage(found, rows.feature_set_size)
        scores["div"] = feature_diversity(found)
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


def intervals(rows: RowStatistics, *, resamples: int = 1000, seed: int = 0) -> dict[str, list[float]]:
    """95 % percentile bootstrap intervals [low, high] of the scores that are functions of sums over rows.

    Distinct, USR, FCR and DIV count different things in a set of texts: drawing a row twice biases them, so they
    have none.
    """
    drawn = _resampled(rows, resamples, seed) if len(rows) else {}
    return {
        name: [float(low), float(high)]
        for name, values in drawn.items()
        for low, high in [np.percentile(values, [2.5, 97.5])]
    }


def not_better(rows: RowStatistics, other: RowStatistics, *, resamples: int = 1000, seed: int = 0) -> dict[str, float]:
    """Paired bootstrap of two systems on the same rows: share of resamples in which `rows` is not better than `other`.

    Near 0: the advantage doesn't hang on which rows were drawn; near 1: `other` is as good or better.
    """
    if len(rows) != len(other):
        raise InputError(f"{len(rows)} rows against {len(other)}; a paired comparison needs the same rows")
    if not len(rows):
        return {}
    ours, theirs = _resampled(rows, resamples, seed), _resampled(other, resamples, seed)
    return {
        name: float(np.mean(values <= theirs[name] if METRICS[name].direction == "higher" else values >= theirs[name]))
        for name, values in ours.items()
        if name in theirs
    }


def bert_score(
    candidates: Sequence[str], references: Sequence[str], model: str, layer: int = 0, *, batch_size: int = 64
) -> BertScore:
    """BERTScore by bert-score: raw, without idf.

    Args:
        model: hub id, or folder of a Hugging Face encoder.
        layer: whose states are compared; 0: bert-score's own choice for ids it knows, else the model's last.

    Raises:
        InputError: bert-score is not installed, or the model or the layer does not exist.
    """
    if len(candidates) != len(references):
        raise InputError(f"{len(candidates)} candidates against {len(references)} references; the rows must pair up")
    try:
        from bert_score import BERTScorer
    except ImportError as error:
        raise InputError("BERTScore needs the package bert-score: pip install 'gavamoe[bertscore]'") from error
    layer = _bert_layer(model, layer)
    # bert-score fails on an empty text with some tokenizers; the score of saying nothing is 0 by definition.
    spoken = [i for i, pair in enumerate(zip(candidates, references, strict=True)) if not any(map(is_empty, pair))]
    values = np.zeros((len(candidates), 3))
    if spoken:
        try:
            scorer = BERTScorer(model_type=model, num_layers=layer, batch_size=batch_size)
            parts = scorer.score(
                [candidates[i] for i in spoken], [references[i] for i in spoken], batch_size=batch_size
            )
        except (OSError, ValueError, AssertionError, OverflowError) as error:
            raise InputError(f"BERTScore model {model}: cannot be used ({_one_line(error)})") from error
        values[spoken] = np.stack([part.double().numpy() for part in parts], axis=1)
    return BertScore(values=values, model=model, layer=layer)


def _fill_overlap(
    sums: np.ndarray,
    candidates: Sequence[str],
    references: Sequence[str],
    on_progress: Callable[[int, int], None] | None,
) -> np.ndarray:
    """BLEU and ROUGE columns; returns (N,) bool: the reference has text but no ROUGE token."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    bleu = BLEU(tokenize="13a", max_ngram_order=BLEU_ORDER, effective_order=True)  # effective: only counts are read
    rouge = RougeScorer(["rouge1", "rougeL"])
    unseen = np.zeros(len(candidates), dtype=bool)
    for row, (candidate, reference) in enumerate(zip(candidates, references, strict=True)):
        overlap = bleu.sentence_score(candidate, [reference])
        sums[row, _BLEU] = [overlap.sys_len, overlap.ref_len, *overlap.counts, *overlap.totals]
        sums[row, _ROUGE_1], sums[row, _ROUGE_L], tokens = _rouge(rouge, candidate, reference)
        unseen[row] = not tokens and not is_empty(reference)
        if on_progress and (row + 1) % 256 == 0:
            on_progress(row + 1, len(candidates))
    if on_progress:
        on_progress(len(candidates), len(candidates))
    return unseen


def _rouge(scorer: Any, candidate: str, reference: str) -> tuple[float, float, int]:
    """ROUGE-1 and ROUGE-L F1 of a row, and the number of the reference's tokens."""
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.scoring import fmeasure
    from rouge_score.tokenize import tokenize

    said, meant = tokenize(candidate, None), tokenize(reference, None)
    if len(said) * len(meant) <= _LCS_TABLE_CELLS:
        scores = scorer.score(reference, candidate)
        return scores["rouge1"].fmeasure, scores["rougeL"].fmeasure, len(meant)
    unigrams = RougeScorer(["rouge1"]).score(reference, candidate)["rouge1"].fmeasure
    common = longest_common_subsequence(meant, said)
    return unigrams, fmeasure(common / len(said), common / len(meant)), len(meant)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, by bits of one big integer (Hyyrö 2004): memory linear in `first`."""
    places: dict[str, int] = {}
    for position, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << position
    everything = (1 << len(first)) - 1
    row = everything  # a 0 bit marks a position at which the subsequence grew
    for token in second:
        matches = row & places.get(token, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(first) - row.bit_count()


def _fill_features(sums: np.ndarray, found: Sequence[frozenset[int]], wanted: Sequence[frozenset[int]]) -> None:
    shares = np.array([feature_share(*pair) for pair in zip(found, wanted, strict=True)])
    sums[:, _FEATURE_SHARE] = np.nan_to_num(shares)
    sums[:, _HAS_FEATURES] = ~np.isnan(shares)


def _fill_ratings(sums: np.ndarray, error: np.ndarray | None) -> None:
    if error is None:
        return
    sums[:, _RATED] = ~np.isnan(error)
    sums[:, _SQUARED] = np.nan_to_num(error) ** 2
    sums[:, _ABSOLUTE] = np.abs(np.nan_to_num(error))


def _from_sums(total: np.ndarray, has_bertscore: bool) -> Scores:
    """Scores from column sums (M,) over a group of rows; those without any row to rest on are left out."""
    rows, rated, featured = total[_ROWS], total[_RATED], total[_HAS_FEATURES]
    scores: Scores = {}
    if total[_REFERENCE_LENGTH]:  # without any reference text these are undefined, not 0
        scores["bleu_1"], scores["bleu_4"] = _bleu(total[_BLEU], 1), _bleu(total[_BLEU], BLEU_ORDER)
        scores["rouge_1"], scores["rouge_l"] = 100 * total[_ROUGE_1] / rows, 100 * total[_ROUGE_L] / rows
        if has_bertscore:
            precision, recall, f = total[_BERT] / rows
            scores |= {"bertscore_p": precision, "bertscore_r": recall, "bertscore_f": f}
    if featured:
        scores["fmr"] = 100 * total[_FEATURE_SHARE] / featured
    if rated:
        scores["rmse"], scores["mae"] = np.sqrt(total[_SQUARED] / rated), total[_ABSOLUTE] / rated
    return {name: None if value is None else float(value) for name, value in scores.items()}


def _bleu(statistics: np.ndarray, order: int) -> float:
    """sacrebleu's corpus BLEU from summed statistics; orders above `order` are not looked at."""
    from sacrebleu.metrics import BLEU

    whole = [int(value) for value in statistics]
    return BLEU.compute_bleu(
        correct=whole[2 : 2 + order],
        total=whole[2 + BLEU_ORDER : 2 + BLEU_ORDER + order],
        sys_len=whole[0],
        ref_len=whole[1],
        smooth_method="exp",
        max_ngram_order=order,
    ).score


def _resampled(rows: RowStatistics, resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Scores of R resamples of the rows, each (R,). The same seed and N draw the same rows: comparisons are paired."""
    drawn = [
        _from_sums(total, rows.has_bertscore)
        for weights in _weights(len(rows), resamples, seed)
        for total in np.einsum("rn,nm->rm", weights, rows.sums)  # not @: BLAS threads cost 100 times this on busy cores
    ]
    # A resample may miss every row with a feature or a rating: such a score has no interval.
    names = set.intersection(*(set(scores) for scores in drawn))
    return {name: np.array([scores[name] for scores in drawn]) for name in METRICS if name in names}


def _weights(rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """(up to 16, N) float64: how often each row is drawn; few resamples at a time bound the memory."""
    random = np.random.default_rng(seed)
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        size = min(_RESAMPLES_AT_ONCE, resamples - start)
        yield np.stack([np.bincount(random.integers(rows, size=rows), minlength=rows) for _ in range(size)]).astype(
            float
        )


def _bert_layer(model: str, layer: int) -> int:
    """The layer to use, checked against the model."""
    from bert_score.utils import model2layers
    from transformers import AutoConfig

    if layer == 0 and model in model2layers:
        return int(model2layers[model])
    folder = Path(model)
    if folder.exists() and not (folder / "config.json").is_file():
        raise InputError(f"BERTScore model {model}: no Hugging Face model folder (config.json is missing)")
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise InputError(
            f"BERTScore model {model}: neither a folder here nor to be had from the hub ({_one_line(error)})"
        ) from error
    if "t5" in model and "t5" not in config.model_type:
        raise InputError(
            f"BERTScore model {model}: bert-score takes any name with 't5' for a T5 model; rename the folder"
        )
    layers = int(getattr(config, "num_hidden_layers", 0))
    if layer > layers:
        raise InputError(f"BERTScore layer {layer}: {model} has {layers} layers")
    return layer or layers


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "…"
