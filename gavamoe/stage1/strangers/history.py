"""What a stranger gives of itself: at most 20 items, ratings, texts. Read from a file or a request, never kept.

An entry has an item, a rating, a text, or several of these. An item that training never saw, or none, leaves its rating
as word of the stranger's level, and its text as word of the stranger's taste.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from gavamoe.config.section import StrictNumbers
from gavamoe.data.bounds import MAX_ID_CHARS
from gavamoe.errors import InputError

MAX_HISTORY = 20
MAX_TEXT_CHARS = 2000
_MAX_FILE_BYTES = 1 << 20


class Entry(NamedTuple):
    """One entry by index."""

    item: int
    """Index of the item; the unknown one where none was given, or one that training never saw."""
    rating: float | None
    text: str | None


class Scale(Protocol):
    """What ratings are checked against."""

    def check(self, rating: float) -> None:
        """Raise InputError for a rating that is off the scale."""


def printable(text: str) -> str:
    """Refuses lone surrogates: they are not characters, and no UTF-8 answer could name them."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("contains half of a surrogate pair, which is not a character")
    return text


class HistoryEntry(StrictNumbers):
    """One thing that a stranger tells: an item, perhaps with a rating and a text; or either of these alone."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    item: Annotated[str, Field(min_length=1, max_length=MAX_ID_CHARS), AfterValidator(printable)] | None = None
    """By the dataset's own id."""
    rating: Annotated[float, Field(ge=-1e6, le=1e6)] | None = None
    text: Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS), AfterValidator(printable)] | None = None
    """What the stranger wrote, of this item or of anything."""

    @model_validator(mode="after")
    def _something(self) -> "HistoryEntry":
        if self.item is None and self.rating is None and self.text is None:
            raise ValueError("needs an item, a rating or a text")
        return self


class _History(BaseModel):
    entries: Annotated[list[HistoryEntry], Field(max_length=MAX_HISTORY)]


def indexed(
    history: Sequence[HistoryEntry], item_or_unknown: Callable[[str], int], scale: Scale | None
) -> tuple[Entry, ...]:
    """The entries by item index, their ratings checked.

    Raises:
        InputError: a rating off the scale, or one for data without ratings; the message names the entry.
    """
    entries = []
    for number, entry in enumerate(history, 1):
        if entry.rating is not None:
            if scale is None:
                raise InputError(
                    f"history: entry {number}: rating {entry.rating:g}: this model's dataset has no ratings; leave it"
                    " out"
                )
            try:
                scale.check(entry.rating)
            except InputError as error:
                raise InputError(f"history: entry {number}: {error}") from None
        item = item_or_unknown("" if entry.item is None else entry.item)
        entries.append(Entry(item, entry.rating, entry.text))
    return tuple(entries)


def read_history(path: Path) -> list[HistoryEntry]:
    """Read a history from JSON (a list of objects) or JSON lines (an object a line) with item, rating, text.

    Raises:
        InputError: no such file, not of this form, or more than 20 entries; the message names line or entry and field.
    """
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from error
    if len(raw) > _MAX_FILE_BYTES:
        raise InputError(
            f"{path}: is larger than {_MAX_FILE_BYTES >> 20} MiB; a history has at most {MAX_HISTORY} entries"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    values = _parsed(path, text)
    try:
        return _History.model_validate({"entries": values}).entries
    except ValidationError as error:
        raise InputError(f"{path}: {_problem(error, values)}") from error


def _parsed(path: Path, text: str) -> list[Any]:
    if text.lstrip()[:1] == "[":
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: is not JSON ({error})") from error
        return list(values)
    values = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise InputError(
                f'{path}: line {number}: is not JSON ({error}); expected {{"item": ..., "rating": ..., "text": ...}}'
            ) from error
    return values


def _problem(error: ValidationError, values: Sequence[Any]) -> str:
    if len(values) > MAX_HISTORY:
        return f"{len(values)} entries; a history has at most {MAX_HISTORY}, so leave out the oldest"
    first = error.errors()[0]
    place = [str(part) for part in first["loc"][1:]]
    where = f"entry {int(place[0]) + 1}: " if place else ""
    field = f"{place[1]}: " if len(place) > 1 else ""
    return f"{where}{field}{first['msg'].removeprefix('Value error, ')}"
