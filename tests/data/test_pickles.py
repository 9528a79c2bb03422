"""Hostile `reviews.pickle` files: nothing in them ever runs, and no instruction claims memory it has not paid for."""

import io
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from helpers.reviews import peter_folder, refuse
from helpers.trap import Trap

from gavamoe.data.prepare import prepare
from gavamoe.data.readers import pickles
from gavamoe.errors import InputError


def pickled(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "reviews.pickle"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_with_a_function_never_runs(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "it_ran"
    record = {"user": "u", "item": "i", "rating": 5, "template": ("a", "b", "c", 1)}
    source = pickled(tmp_path, pickle.dumps([record, Trap(marker)], protocol=protocol))
    refuse(source, "peter", r"reviews\.pickle: asks for 'posix mkdir'; only plain .* nothing was loaded")
    assert not marker.exists()
    pickle.loads(source.read_bytes())  # noqa: S301 - the proof that it would have run
    assert marker.exists()


@pytest.mark.parametrize(
    "value", [OrderedDict(a=1), np.float64(3), Path("x"), {1, Path("y")}, print, ValueError("x"), complex(1, 2)]
)
def test_a_pickle_with_a_class_is_refused(tmp_path: Path, value: object) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        refuse(pickled(tmp_path, pickle.dumps([{"user": value}], protocol=protocol)), "peter", "asks for '")


@pytest.mark.parametrize(
    "content",
    [
        b"cposix\nsystem\n(S'true'\ntR.",
        b"(iposix\nsystem\n.",
        b"\x80\x02]q\x00P1\n.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93.",
        b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x940h\x00h\x01\x93.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02](}b.",
    ],
)
def test_hand_made_pickles_are_refused(tmp_path: Path, content: bytes) -> None:
    refuse(pickled(tmp_path, content), "peter", r"nothing was loaded$|not a pickle")


def test_the_unpickler_itself_allows_no_class(tmp_path: Path) -> None:
    path = pickled(tmp_path, pickle.dumps(OrderedDict()))
    with pytest.raises(InputError, match="asks for 'collections OrderedDict'"):
        pickles._PlainUnpickler(io.BytesIO(path.read_bytes()), path).load()


@pytest.mark.parametrize("content", [b"no pickle at all", b"\x80\x04]", b"\x80\x04.", b"\x80\x04\x8f\x00\x00", b"0."])
def test_what_is_no_pickle(tmp_path: Path, content: bytes) -> None:
    refuse(pickled(tmp_path, content), "peter", "not a pickle, or a damaged one")


def test_a_pickle_that_claims_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(pickled(tmp_path, b"\x80\x04Nr\xff\xff\xff\x7f."), "peter", "damaged pickle")
    refuse(pickled(tmp_path, b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f" + b"x."), "peter", "pickle")
    monkeypatch.setattr(pickles, "MAX_PICKLE_BYTES", 10)
    refuse(pickled(tmp_path, pickle.dumps(["x" * 100])), "peter", "more than the 10 that a pickle may have")


def test_odd_values_in_a_pickle_are_rejected_rows(tmp_path: Path) -> None:
    good = pickle.loads((peter_folder(tmp_path) / "reviews.pickle").read_bytes())  # noqa: S301 - made above
    nested: object = "x"
    for _ in range(60):  # would be 2**60 characters as text
        nested = (nested, nested)
    bad = [7, {"user": "u"}, {**good[0], "user": nested}, {**good[0], "template": "x"}, {**good[0], "template": nested}]
    source = pickled(tmp_path, pickle.dumps(good + bad))
    summary = prepare(source, tmp_path / "out", "peter", max_rejected_share=0.5)
    assert summary.kept == 20
    assert sum(summary.rejected.values()) == 5
    refuse(pickled(tmp_path, pickle.dumps({"a": 1})), "peter", "holds a dict, not a list of records")
