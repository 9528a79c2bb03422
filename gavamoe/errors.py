"""The two ways a command can end badly: the user's input was wrong, or the work failed; and the wording they share."""

import difflib
import reprlib
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound="BaseModel")
SHOWN_CHARS = 300
"""Characters of a foreign error that are shown."""
VALUE_CHARS = 80
"""Characters of a wrong value that are shown."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = VALUE_CHARS


class InputError(Exception):
    """Wrong input or usage. The message is one line: what, where, both values, the way out. Exit code 2."""


class RunError(Exception):
    """The input was fine and the work still failed (a worker died, training diverged). Exit code 1."""


class Stopped(RunError):
    """The training ended early because it was asked to."""


def one_line(error: BaseException, chars: int = SHOWN_CHARS) -> str:
    """The text of an error on one line of at most `chars` characters; its type's name where it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= chars else text[: chars - 1] + "…"


def printable(text: str, *, lines: bool = False) -> str:
    """Text from a file as a terminal may show it: control and other invisible characters become blanks, so that it can
    neither send escape sequences nor turn around what stands beside it.

    Args:
        lines: keep line ends.
    """
    return "".join(char if char.isprintable() or (lines and char == "\n") else " " for char in text)


def listed(names: Iterable[object], most: int = 30, chars: int = 60) -> str:
    """Names from a file for a message: printable, each shortened to `chars` characters, at most `most` of them."""
    shown = [printable(str(name)[:chars]) for name in names]
    return ", ".join(shown[:most]) + (f", ... ({len(shown) - most} more)" if len(shown) > most else "")


def shortened(value: object) -> str:
    """A value from a file as Python writes it, in at most `VALUE_CHARS` characters, however much it holds."""
    text = printable(_SHORT.repr(value))
    return text if len(text) <= VALUE_CHARS else text[: VALUE_CHARS - 1] + "…"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name that a misspelled one is closest to, whatever the case; None if none is close."""
    by_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=cutoff)
    return by_lower[close[0]] if close else None


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """`; did you mean NAME?`, to be appended to a message, or nothing."""
    close = nearest(name, known, cutoff)
    return f"; did you mean {close}?" if close else ""


def validated(model: type[Model], values: Any, source: object, what: str) -> Model:
    """Values from outside as a pydantic model.

    Args:
        source: the file that they come from, named first in the error.
        what: what they should be, such as "a prompt description".

    Raises:
        InputError: `SOURCE: not WHAT: FIELD: VALUE: PROBLEM`.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{source}: not {what}: {first_problem(error)}") from error


def first_problem(
    error: "ValidationError", *, hint: str = "", joint: str = ": ", left_out: Collection[str] = ()
) -> str:
    """The first problem that pydantic found, in one line, with the number of the others.

    Args:
        hint: follows "unknown field", such as `; did you mean beta?`.
        joint: between a field and a validator's own message; "." where such messages begin with a field's name.
        left_out: parts of a field's path that say nothing to people, such as the name of a union's member.
    """
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    field = printable(".".join(str(part) for part in first["loc"] if part not in left_out)[:VALUE_CHARS])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        text = f"{field}: unknown field{hint}"
    elif first["type"] == "value_error":  # a message of our own
        text = f"{field}{joint}{message}" if field else message
    elif isinstance(first["input"], dict):
        text = f"{field}: {message[0].lower()}{message[1:]}"
    else:
        text = f"{field}: {shortened(first['input'])}: {message[0].lower()}{message[1:]}"
    others = len(problems) - 1
    return text + (f" (and {others} more)" if others else "")
