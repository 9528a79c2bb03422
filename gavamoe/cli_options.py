"""Options that several commands share, and the parsing of option values with an inner form."""

from pathlib import Path
from typing import Annotated

import typer

from gavamoe.errors import InputError

Json = Annotated[bool, typer.Option("--json", help="Print the numbers as one JSON document on standard output.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Override a config field, e.g. stage1.beta=0.2")
]
ScoreStyle = Annotated[
    str | None,
    typer.Option(
        "--style",
        help="BLEU and ROUGE: sacrebleu (and rouge-score; the default), peter (as the PETER line of papers), or both.",
    ),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as `gavamoe train` makes it.")]


def pairs_of(option: str, values: list[str] | None) -> dict[str, str] | None:
    """["user=uid"] -> {"user": "uid"}."""
    if not values:
        return None
    pairs: dict[str, str] = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not (name and equals and text):
            raise InputError(f"{option} {value}: expected FIELD=NAME, such as user=uid")
        pairs[name] = text
    return pairs


def shares_of(text: str) -> tuple[float, float, float]:
    numbers = _numbers("--split", text, 3, "8:1:1")
    if min(numbers) < 0 or numbers[0] == 0:
        raise InputError(f"--split {text}: shares are not negative, and that of train is above 0")
    return numbers[0], numbers[1], numbers[2]


def bounds_of(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    low, high = _numbers("--rating-scale", text, 2, "1:5")
    if low >= high:
        raise InputError(f"--rating-scale {text}: the first number must be below the second")
    return low, high


def counts_of(text: str) -> list[int]:
    low, high = _numbers("--sweep-clusters", text, 2, "2:8")
    if not (low.is_integer() and high.is_integer() and 1 <= low < high):
        raise InputError(f"--sweep-clusters {text}: expected two whole numbers, the first below the second")
    return list(range(int(low), int(high) + 1))


def weights_of(text: str) -> tuple[float, float, float]:
    first, second, third = _numbers("--weights", text, 3, "0.4:0.3:0.3")
    return first, second, third


def _numbers(option: str, text: str, count: int, example: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(abs(number) < 1e9 for number in numbers):
        raise InputError(f"{option} {text}: expected {count} numbers such as {example}")
    return numbers
