"""The `reviews.pickle` of the PETER and PEPLER folders: plain values only, nothing in the file ever runs.

A pickle is a program, and loading one may call any function. So the file's instructions are listed first and
every one that could name or call something is refused before anything is loaded; the loader, as a second
lock, refuses every class and function.
"""

import pickle
import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from gavamoe.data.readers.batches import Numbered, Rejection, shorten
from gavamoe.data.readers.sources import check_file
from gavamoe.errors import InputError

MAX_PICKLE_BYTES = 2**30
_NAMES = frozenset(["GLOBAL", "STACK_GLOBAL", "INST"])
_FORBIDDEN = _NAMES | frozenset(
    ["OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEXT_BUFFER"]
)
_NO_TEMPLATE = "no template (feature, adjective, sentence, ...)"
_STORES = frozenset(["PUT", "BINPUT", "LONG_BINPUT"])


def read_peter(source: Path) -> Iterator[Numbered]:
    """Yield the records of `source`, a reviews.pickle or the folder that holds one.

    Each becomes {"user", "item", "rating", "text", "features"}; `template` is (feature, adjective, sentence, ...).

    Raises:
        InputError: see `load_plain`; or the file holds no list of records.
    """
    path = source / "reviews.pickle" if source.is_dir() else source
    records = load_plain(path)
    if not isinstance(records, list):
        raise InputError(f"{path}: holds a {type(records).__name__}, not a list of records")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            yield number, 100, Rejection(number, "not a record", shorten(record))
            continue
        template = record.get("template")
        if not isinstance(template, (tuple, list)) or len(template) < 3:
            yield number, 100, Rejection(number, _NO_TEMPLATE, shorten(record))
            continue
        text, features = template[2], [template[0]]
        size = 100 + (len(text) if isinstance(text, str) else 0)
        plain = {key: record.get(key) for key in ("user", "item", "rating")}
        yield number, size, {**plain, "text": text, "features": features}


def load_plain(path: Path) -> Any:
    """The value in a pickle of lists, tuples, dicts, strings and numbers.

    Raises:
        InputError: the file is missing, empty, over MAX_PICKLE_BYTES, no pickle, or it names a class or function.
    """
    check_file(path)
    size = path.stat().st_size
    if size > MAX_PICKLE_BYTES:
        raise InputError(f"{path}: {size} bytes, more than the {MAX_PICKLE_BYTES} that a pickle may have")
    try:
        with open(path, "rb") as file:
            _check_instructions(path, file)
            file.seek(0)
            return _PlainUnpickler(file, path).load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a pickle, or a damaged one ({shorten(str(error))})") from error
    except (MemoryError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: a damaged pickle ({type(error).__name__})") from error


def _check_instructions(path: Path, file: Any) -> None:
    """Refuse any instruction that could name or call something, and memo numbers that would claim gigabytes."""
    words: list[str] = []
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in _FORBIDDEN:
            named = str(argument) if opcode.name in ("GLOBAL", "INST") else " ".join(words)
            what = f"asks for {shorten(named)!r}" if opcode.name in _NAMES else f"holds the instruction {opcode.name}"
            raise _refusal(path, what)
        if opcode.name in _STORES and int(argument or 0) > count:
            raise InputError(f"{path}: a damaged pickle (memo number {argument} at instruction {count})")
        if isinstance(argument, str) and opcode.name not in _STORES:
            words = [*words[-1:], argument]


class _PlainUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise _refusal(self._path, f"asks for {shorten(f'{module_name} {global_name}')!r}")


def _refusal(path: Path, what: str) -> InputError:
    return InputError(
        f"{path}: {what}; only plain lists, tuples, dicts, strings and numbers are read, "
        "since a class or function in a pickle can run code: nothing was loaded"
    )
