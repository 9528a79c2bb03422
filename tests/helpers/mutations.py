"""Hostile versions of a valid file: bytes changed, cut, doubled, moved, and replaced by what parsers trip over."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import strategies as st

NASTY = [
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b'"', b'""', b"'", b"\\", b'\\"', b"\n", b"\r", b"\r\n",
    b",", b"\t", b";", b"|", b"{", b"}", b"[", b"]", b"[" * 500, b'{"a":' * 200, b"null", b"true", b"NaN", b"1e999",
    b"-1", b"9" * 400, b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x80\x80\x80\x80\x10", b"&a ",
    b"*a", b"<<: ", b"!!python/object/apply:os.abort []", b"cos\nabort\n(tR.", b"\x1f\x8b", b"BZh9", b"PK\x03\x04",
    b"(\xb5/\xfd", b"\xfd7zXZ\0", b"GGUF", b"PAR1", "\u2028\u202e\ud7ff".encode(), b"=cmd|' /C calc'!A0", b"x" * 5000,
]  # fmt: skip
SECONDS = 20
"""Longest time that a file may take."""


@st.composite
def mutated(draw: st.DrawFn, valid: bytes) -> bytes:
    """`valid` after one to six changes."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.integers(0, min(64, len(data) - at)))
        kind = draw(st.sampled_from(("flip", "insert", "replace", "delete", "double", "cut", "move", "byte")))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "insert":
            data[at:at] = draw(st.sampled_from(NASTY))
        elif kind == "replace":
            data[at : at + size] = draw(st.sampled_from(NASTY))
        elif kind == "delete":
            del data[at : at + size]
        elif kind == "double":
            data[at:at] = data[at : at + size] * draw(st.integers(1, 3))
        elif kind == "cut":
            del data[at:]
        elif kind == "move":
            piece = bytes(data[at : at + size])
            del data[at : at + size]
            to = draw(st.integers(0, len(data)))
            data[to:to] = piece
        elif kind == "byte" and at < len(data):
            data[at] = draw(st.integers(0, 255))
    return bytes(data)


class TooSlow(BaseException):
    """A file took too long. No `Exception`: libraries, and we, turn those into other errors."""


@contextmanager
def time_limit(seconds: float = SECONDS) -> Iterator[None]:
    """Raise TooSlow in the block when it takes longer."""

    def stop(*_: object) -> None:
        raise TooSlow(f"over {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
