"""Scores of any system's texts, from files: what `gavamoe score` does.

Predictions and references are two files, or two columns of one (`evaluation.text_tables`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gavamoe.data.readers.batches import shorten
from gavamoe.data.text.features import split_features
from gavamoe.errors import InputError, did_you_mean, listed
from gavamoe.evaluation.metrics.bertscore import BertScore, bert_score
from gavamoe.evaluation.metrics.text_scores import RowStatistics, Style, aggregate, count, measure
from gavamoe.evaluation.significance import RESAMPLES, compare, intervals
from gavamoe.evaluation.text_tables import Columns, read_columns

PREDICTION_COLUMNS = ("prediction", "generated")
REFERENCE_COLUMNS = ("reference", "explanation", "text")


@dataclass(frozen=True)
class _Pairs:
    """One system's texts and what they are scored against, row by row."""

    path: Path
    candidates: list[str]
    source: Path
    references: list[str]
    features: list[list[str]] | None


@dataclass(frozen=True)
class Reading:
    """Which columns of the files hold what; None: by the usual names."""

    prediction: str | None = None
    reference: str | None = None
    features: str | None = None
    """Column of feature words in either table, as `data prepare` reads them; the scores then have FMR, FCR and DIV."""


def score_files(
    predictions: Path,
    references: Path | None = None,
    *,
    against: Path | None = None,
    reading: Reading | None = None,
    style: Style = "sacrebleu",
    bertscore_model: str = "",
    bertscore_layer: int = 0,
    resamples: int = RESAMPLES,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score the texts of one file against those of another, row by row.

    Args:
        references: None or the same path: `predictions` is one table with both columns.
        against: another system's texts for the same rows; the result then says which differences are chance.
        reading: default: columns `prediction` or `generated`; `reference`, `explanation` or `text`; or the only column.
            Plain text files have none.
        style: which family of BLEU and ROUGE.
        resamples: of the bootstrap intervals; 0: none.

    Returns:
        {"predictions", "references", "style", "counts", "metrics", "intervals", "bertscore", "against"}, JSON-safe;
        "against" is None or {"predictions", "counts", "metrics", "differences": by name as `significance.compare`}.

    Raises:
        InputError: a file is missing, empty or broken, a column is unknown, or the row counts differ.
    """
    reading = reading or Reading()
    pairs = [_read_pairs(Path(predictions), references, reading)]
    if against is not None:
        pairs.append(_read_rival(Path(against), references, reading, pairs[0]))
    bert = _bert_scores(pairs, bertscore_model, bertscore_layer, seed)
    measured = [
        measure(
            each.candidates,
            each.references,
            style=style,
            features=pairs[0].features,
            bertscore=scored,
            on_progress=on_progress,
        )
        for each, scored in zip(pairs, bert, strict=True)
    ]
    return {
        "predictions": str(pairs[0].path),
        "references": str(pairs[0].source),
        "style": style,
        **_scored(measured[0]),
        "intervals": intervals(measured[0], resamples=resamples, seed=seed) if resamples else {},
        "bertscore": bert[0].described() if bert[0] else None,
        "against": None
        if against is None
        else {
            "predictions": str(pairs[1].path),
            **_scored(measured[1]),
            "differences": compare(*measured, resamples=max(resamples, 1), seed=seed),
        },
    }


def _scored(rows: RowStatistics) -> dict[str, Any]:
    return {"counts": count(rows), "metrics": aggregate(rows)}


def _bert_scores(pairs: Sequence[_Pairs], model: str, layer: int, seed: int) -> list[BertScore | None]:
    """One call for all systems: bert-score encodes a text that occurs twice only once."""
    if not model:
        return [None] * len(pairs)
    size = len(pairs[0].candidates)
    candidates = [text for each in pairs for text in each.candidates]
    references = [text for each in pairs for text in each.references]
    together = bert_score(candidates, references, model, layer, seed=seed)
    return [together.rows(slice(start, start + size)) for start in range(0, len(candidates), size)]


def _read_pairs(path: Path, references: Path | None, reading: Reading) -> _Pairs:
    source = path if references is None else Path(references)
    candidate_table = read_columns(path)
    same = _same(path, source)
    if same and len(candidate_table) == 1:
        raise InputError(f"{path}: one column only; give the references' file as second argument")
    reference_table = candidate_table if same else read_columns(source)
    prediction = _pick(candidate_table, reading.prediction, PREDICTION_COLUMNS, path)
    reference = _pick(reference_table, reading.reference, REFERENCE_COLUMNS, source)
    if same and prediction == reference:
        raise InputError(f"{path}: column {prediction} can't be both prediction and reference")
    candidates = _texts(candidate_table, prediction, path)
    targets = _texts(reference_table, reference, source)
    if len(candidates) != len(targets):
        raise InputError(
            f"{path} has {len(candidates)} rows, {source} has {len(targets)}; they must pair up row by row"
            " (in text files every line is a row, empty lines too)"
        )
    features = None
    if reading.features is not None:
        holder, owner = (candidate_table, path) if reading.features in candidate_table else (reference_table, source)
        features = _features(holder, _pick(holder, reading.features, (), owner), owner)
    return _Pairs(path, candidates, source, targets, features)


def _read_rival(path: Path, references: Path | None, reading: Reading, first: _Pairs) -> _Pairs:
    """Another system's texts for the rows of `first`; references of its own must be the same ones."""
    table = read_columns(path)
    has_references = references is None and any(name in table for name in (reading.reference, *REFERENCE_COLUMNS))
    candidates = _texts(table, _pick(table, reading.prediction, PREDICTION_COLUMNS, path), path)
    targets = first.references
    if has_references:
        targets = _texts(table, _pick(table, reading.reference, REFERENCE_COLUMNS, path), path)
    if len(candidates) != len(first.candidates):
        raise InputError(
            f"{path} has {len(candidates)} rows, {first.path} has {len(first.candidates)}; compare the same rows"
        )
    for row, (one, other) in enumerate(zip(targets, first.references, strict=True), start=1):
        if one != other:
            raise InputError(f"{path}, row {row}: another reference than in {first.source}; compare the same rows")
    return _Pairs(path, candidates, first.source, first.references, first.features)


def _pick(columns: Columns, wanted: str | None, usual: Sequence[str], path: Path) -> str:
    """The name of the column to read."""
    if list(columns) == [""]:
        return ""
    if wanted is None:
        for name in usual:
            if name in columns:
                return name
        if len(columns) == 1:
            return next(iter(columns))
        raise InputError(f"{path}: no column named {' or '.join(usual)}; name one of {listed(columns)}")
    if wanted not in columns:
        hint = did_you_mean(wanted, columns) or f"; it has {listed(columns)}"
        raise InputError(f"{path}: no column {wanted}{hint}")
    return wanted


def _texts(columns: Columns, name: str, path: Path) -> list[str]:
    """A column of texts; a missing value is an empty text, counted as such."""
    texts = []
    for row, value in enumerate(columns[name], start=1):
        if value is not None and not isinstance(value, str):
            raise InputError(f"{path}, row {row}, {name}: expected text, found {type(value).__name__}")
        texts.append(value or "")
    return texts


def _features(columns: Columns, name: str, path: Path) -> list[list[str]]:
    features = []
    for row, value in enumerate(columns[name], start=1):
        parts = split_features(value) if isinstance(value, str) else value or []
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise InputError(f"{path}, row {row}, {name}: expected a list of words, found {shorten(value)}")
        features.append(parts)
    return features


def _same(first: Path, second: Path) -> bool:
    return first == second or (first.exists() and second.exists() and first.samefile(second))
