"""docs/config.md is what the generator prints, and the generator shows every setting."""

import re
from pathlib import Path

import pytest

from gavamoe.config.files import field_paths
from gavamoe.config.reference import reference
from gavamoe.config.schema import RunConfig

PAGE = Path(__file__).parent.parent.parent / "docs" / "config.md"


def fields_by_section(page: str) -> list[str]:
    """Dotted paths of the fields that a page has a row for."""
    section, found = "", []
    for line in page.splitlines():
        if line.startswith("## "):
            section = "" if line == "## Top level" else line.strip("#` ") + "."
        elif line.startswith("| `"):
            found.append(section + line.split("`")[1])
    return found


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run `make docs`"


def test_every_setting_has_a_row() -> None:
    assert sorted(fields_by_section(reference())) == sorted(field_paths(RunConfig))


@pytest.mark.parametrize(
    ("field", "cells"),
    [
        ("clusters", "whole number, ≥ 1, ≤ 64 | `3`"),
        ("zero_stage", "whole number, ≥ 0, ≤ 3 | `1`"),
        ("keep", "`best`, `last` | `best`"),
        ("gpu", "true or false | `false`"),
        ("bertscore_model", "text | empty"),
        ("top_p", "number, > 0, ≤ 1 | `1.0`"),
    ],
)
def test_types_bounds_and_defaults(field: str, cells: str) -> None:
    assert re.search(rf"^\| `{field}` \| {re.escape(cells)} \| ", reference(), flags=re.MULTILINE)


def test_every_setting_says_what_it_means() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert [row for row in rows if len(row.rsplit("|", 2)[1].split()) < 3] == []


def test_rows_have_four_cells_whatever_the_docstring_says() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {6}
