"""A reader for a source format of your own, here a log file with one review a line:

    2026-03-14 | ann | teapot | 4 | Pours well, and the lid stays on.

    python examples/own_reader.py reviews.log datasets/log

A reader only says what stands where, and which lines can't be read; `prepare` validates every value, counts what it
rejects, finds the features and makes the splits. Prints how many rows were kept, and why the others were not.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from gavamoe.data.prepare import prepare
from gavamoe.data.readers.batches import Numbered, RawBatch, Rejection, batch_records
from gavamoe.data.readers.formats import FORMATS, Format
from gavamoe.data.readers.sources import SourceOptions, open_source

NAMES = ("time", "user", "item", "rating", "text")


def read_lines(source: Path, encoding: str | None) -> Iterator[Numbered]:
    """Number, size in bytes and record of each line; a line of another shape is handed on as a rejection."""
    with open_source(source, encoding) as file:  # plain or compressed
        for number, line in enumerate(file, start=1):
            text = line.decode("utf-8", "replace").strip()
            values = [value.strip() for value in text.split("|", maxsplit=len(NAMES) - 1)]
            if len(values) == len(NAMES):
                yield number, len(line), dict(zip(NAMES, values, strict=True))
            elif text:
                yield number, len(line), Rejection(number, f"not {len(NAMES)} values", text[:300])


def read_log(source: Path, options: SourceOptions) -> Iterator[RawBatch]:
    """The reader: batches of columns. `options` is what the user says about the source, such as --encoding."""
    return batch_records(source, read_lines(source, options.encoding), {name: (name,) for name in NAMES})


FORMATS["log"] = Format(read_log, scale=(1, 5), text_mode="explanation")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("dataset", type=Path, help="the dataset folder to write")
    options = parser.parse_args(arguments)

    summary = prepare(options.source, options.dataset, "log")
    print(f"{summary.kept} of {summary.read} rows kept: {summary.users} users, {summary.items} items, {summary.rows}")
    print(f"  {summary.repeated_pairs} left out: the same user and item come again later")
    for reason, count in summary.rejected.items():
        print(f"  {count} rejected: {reason} (see {options.dataset / 'rejected.jsonl'})")


if __name__ == "__main__":
    main()
