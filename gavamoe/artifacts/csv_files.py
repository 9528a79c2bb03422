"""CSV files that people open in spreadsheets: whole or not at all, and no cell is run as a formula."""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gavamoe.artifacts.files import write_file

_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")
"""How a text begins that spreadsheets read as a formula: also after blanks, also with full-width signs."""


def write_csv(path: Path, heads: Sequence[str], rows: Iterable[Sequence[Any]], *, mark: bool = False) -> None:
    """Write a table; numbers stay numbers, and a text that would be a formula gets an apostrophe in front.

    Args:
        mark: begin with a byte-order mark, by which spreadsheets know that the file is UTF-8.
    """
    encoding = "utf-8-sig" if mark else "utf-8"
    with write_file(path) as aside, aside.open("w", encoding=encoding, newline="") as file:
        lines = csv.writer(file)
        lines.writerow(heads)
        for row in rows:
            lines.writerow([harmless(value) if isinstance(value, str) else value for value in row])


def harmless(text: str) -> str:
    """Text that no spreadsheet runs: a formula gets an apostrophe in front."""
    return f"'{text}" if _FORMULA.match(text) else text
