"""Scores of any system's texts, from files: what `gavamoe score` does.

A file is plain text (a line a row), JSON lines or a JSON array, CSV or TSV, or Parquet. Predictions and
references are two files, or two columns of one.
"""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gavamoe.errors import InputError, did_you_mean, one_line
from gavamoe.evaluation.metrics.bertscore import BertScore, bert_score
from gavamoe.evaluation.metrics.text_scores import RowStatistics, Style, aggregate, count, measure
from gavamoe.evaluation.significance import RESAMPLES, compare, intervals

PREDICTION_COLUMNS = ("prediction", "generated")
REFERENCE_COLUMNS = ("reference", "explanation", "text")

Columns = dict[str, list[Any]]

_LONGEST_FIELD = 2**27


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
    """Column of feature words in either table, as lists or split at commas; the scores then have FMR, FCR and DIV."""


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
    reference_table = candidate_table if _same(path, source) else read_columns(source)
    candidates = _texts(candidate_table, _pick(candidate_table, reading.prediction, PREDICTION_COLUMNS, path), path)
    targets = _texts(reference_table, _pick(reference_table, reading.reference, REFERENCE_COLUMNS, source), source)
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


def read_columns(path: Path) -> Columns:
    """All columns of a table file, or the lines of a text file as the column "" (it has no name).

    Raises:
        InputError: the file is missing, empty, or not what its ending says.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    reader = _READERS.get(path.suffix.lower(), _read_text)
    try:
        columns = reader(path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
    if not any(columns.values()):
        raise InputError(f"{path}: no rows")
    return columns


def _read_text(path: Path) -> Columns:
    text = path.read_text(encoding="utf-8-sig")
    # Only line feeds end a row: a text may hold other Unicode line separators.
    return {"": [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]}


def _read_json(path: Path) -> Columns:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        values = _parse(text, str(path))
    else:
        lines = enumerate(text.split("\n"), start=1)
        values = [_parse(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    if all(isinstance(value, str) for value in values):
        return {"": values}
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise InputError(f"{path}, row {number}: expected an object with fields, found {type(value).__name__}")
    names = dict.fromkeys(name for value in values for name in value)
    return {name: [value.get(name) for value in values] for name in names}


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from error


def _read_csv(path: Path) -> Columns:
    csv.field_size_limit(_LONGEST_FIELD)
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            header = next(rows)
            columns: Columns = {name: [] for name in header}
            if len(columns) < len(header):
                raise InputError(f"{path}: two columns of one name in {', '.join(header)}")
            for row in rows:
                if not row and len(header) > 1:
                    continue
                row = row or [""]  # in a file of one column an empty line is an empty text
                if len(row) != len(header):
                    raise InputError(f"{path}, line {rows.line_num}: {len(row)} fields, the header has {len(header)}")
                for name, value in zip(header, row, strict=True):
                    columns[name].append(value)
        except csv.Error as error:
            raise InputError(f"{path}, line {rows.line_num}: not valid CSV ({error})") from error
    return columns


def _read_parquet(path: Path) -> Columns:
    try:
        return {str(name): column for name, column in pq.read_table(path).to_pydict().items()}
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({one_line(error)})") from error


_READERS: dict[str, Callable[[Path], Columns]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


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
        raise InputError(f"{path}: no column named {' or '.join(usual)}; name one of {', '.join(columns)}")
    if wanted not in columns:
        hint = did_you_mean(wanted, columns) or f"; it has {', '.join(columns)}"
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
        parts = value.split(",") if isinstance(value, str) else value or []
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise InputError(f"{path}, row {row}, {name}: expected a list of words, found {type(value).__name__}")
        features.append(parts)
    return features


def _same(first: Path, second: Path) -> bool:
    return first == second or (first.exists() and second.exists() and first.samefile(second))
