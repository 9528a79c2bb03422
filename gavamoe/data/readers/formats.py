"""The table of source formats: how each is read, its rating scale, and where its item titles lie.

To add a format, add a row to FORMATS (docs/data.md).
"""

import ast
import html
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gavamoe.data.readers.batches import FIELDS, AnyBatch, batch_records
from gavamoe.data.readers.json_lines import json_batches
from gavamoe.data.readers.pickles import read_peter
from gavamoe.data.readers.sources import NO_COLUMN, SourceOptions, content_name, open_source, plain_suffix
from gavamoe.data.readers.tables import is_parquet_folder, read_csv, read_parquet
from gavamoe.errors import InputError, did_you_mean

TextMode = Literal["explanation", "review", "none"]
"""What a source's texts are. explanation: explanations; review: reviews, of which a sentence is chosen; none: there
are none, and pairs have no text."""
MAX_TITLE_LINE_BYTES = 4 * 2**20


class Format(NamedTuple):
    """A format of sources."""

    read: Callable[[Path, SourceOptions], Iterator[AnyBatch]]
    """Reader: takes the source and what the user says about it, and yields batches."""
    scale: tuple[float, float] | None
    """Lowest and highest rating; None: those observed."""
    text_mode: TextMode
    """What the texts are, unless the user says otherwise."""
    title_keys: tuple[tuple[str, ...], str] | None = None
    """Keys of the file with item titles: those that may hold the item's id, and the title's; None: there is no file."""
    title_file: str | None = None
    """Name of the title file that is read if it lies beside the source; None: it must be named."""
    rated: bool = True
    """Whether every row must have a rating."""


def _read_amazon(source: Path, options: SourceOptions) -> Iterator[AnyBatch]:
    """Amazon reviews of 2014 and 2018 (reviewerID, asin, overall, reviewText) and 2023 (user_id, parent_asin, ...)."""
    fields = {
        "user": ("reviewerID", "user_id"),
        "item": ("parent_asin", "asin"),  # in 2023 titles belong to the parent
        "rating": ("overall", "rating"),
        "text": ("reviewText", "text"),
        "time": ("unixReviewTime", "timestamp", "sort_timestamp"),
    }
    return json_batches(source, fields, options.encoding)


def _read_yelp(source: Path, options: SourceOptions) -> Iterator[AnyBatch]:
    """The review file of Yelp's academic dataset, also inside its archive."""
    fields = {
        "user": ("user_id",),
        "item": ("business_id",),
        "rating": ("stars",),
        "text": ("text",),
        "time": ("date",),
    }
    return json_batches(source, fields, options.encoding, ("yelp_academic_dataset_review.json", "review.json"))


def _read_peter(source: Path, options: SourceOptions) -> Iterator[AnyBatch]:
    """The reviews.pickle of PETER and PEPLER."""
    del options
    fields = {field: (field,) for field in ("user", "item", "rating", "text", "features")}
    return batch_records(source, read_peter(source), fields)


def _read_table(source: Path, options: SourceOptions) -> Iterator[AnyBatch]:
    """Delimited text, JSON or Parquet, by the file's name, or that of the file in an archive."""
    if is_parquet_folder(source):
        return read_parquet(source, options)
    if source.is_dir():
        raise InputError(f"{source}: a folder without Parquet files; give one file")
    kind = plain_suffix(content_name(source))
    if kind in (".parquet", ".pq"):
        return read_parquet(source, options)
    if kind in (".csv", ".tsv", ".txt"):
        return read_csv(source, options)
    if kind in (".json", ".jsonl", ".ndjson"):
        return _read_json_table(source, options)
    raise InputError(
        f"{source}: a table is .csv .tsv .txt .json .jsonl .ndjson (also compressed) or .parquet, not {kind!r}"
    )


def _read_json_table(source: Path, options: SourceOptions) -> Iterator[AnyBatch]:
    columns = {field: options.columns.get(field, field) for field in FIELDS}
    fields = {field: (name,) for field, name in columns.items() if name != NO_COLUMN}
    named = frozenset(options.columns) & frozenset(fields)
    return json_batches(source, fields, options.encoding, named=named)


FORMATS: dict[str, Format] = {
    "amazon": Format(_read_amazon, (1, 5), "review", (("parent_asin", "asin"), "title")),
    "yelp": Format(
        _read_yelp, (1, 5), "review", (("business_id",), "name"), title_file="yelp_academic_dataset_business.json"
    ),
    "peter": Format(_read_peter, (1, 5), "explanation"),
    "table": Format(_read_table, None, "explanation", rated=False),
}


def get_format(name: str) -> Format:
    """The format of that name; InputError with the nearest known name otherwise."""
    if name in FORMATS:
        return FORMATS[name]
    hint = did_you_mean(name, FORMATS, cutoff=0.4)
    raise InputError(f"format: unknown value {name!r}; known are {', '.join(FORMATS)}{hint}")


def check_columns(format: str, columns: Mapping[str, str]) -> None:
    """Refuse a column mapping that the format would ignore or that names an unknown field."""
    if columns and format != "table":
        raise InputError(f"columns: only format table takes a mapping; format {format} has its own field names")
    for field in columns:
        if field not in FIELDS:
            hint = did_you_mean(field, FIELDS, cutoff=0.4)
            raise InputError(f"columns: unknown field {field!r}; known are {', '.join(FIELDS)}{hint}")


def read_titles(path: Path, keys: tuple[tuple[str, ...], str], wanted: Mapping[str, int]) -> dict[int, str]:
    """Titles by item code from a file of JSON (or, as Amazon's of 2014, Python literal) lines.

    Lines that can't be read, and items that are not `wanted` (raw id -> code), are skipped.
    """
    id_keys, title_key = keys
    titles: dict[int, str] = {}
    with open_source(path) as file:
        while line := file.readline(MAX_TITLE_LINE_BYTES):
            record = _literal(line)
            if not isinstance(record, dict) or not isinstance(record.get(title_key), str):
                continue
            for key in id_keys:
                code = wanted.get(str(record.get(key)).strip())
                if code is not None:
                    titles.setdefault(code, html.unescape(record[title_key]))
    return titles


def _literal(line: bytes) -> Any:
    text = line.decode("utf-8", "replace")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
