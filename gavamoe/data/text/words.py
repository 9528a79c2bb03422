"""Texts parted into words, each byte looked at once; string kernels with patterns take ten times as long.

Shape letters: R texts, T words, W distinct words of a batch.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_STRANGE = r"[^\p{L}\p{M}\p{N}\x00-\x7f]+"
"""Typographic quotes, dashes, emoji: bytes that `part_words` would otherwise take for letters."""
SPACE, PAUSE, STOP, _LETTER = range(4)
_KINDS = np.full(256, SPACE, dtype=np.uint8)
_KINDS[np.frombuffer(b",/-&", dtype=np.uint8)] = PAUSE
_KINDS[np.frombuffer(b'.!?;:()[]{}"|\n', dtype=np.uint8)] = STOP
_KINDS[np.frombuffer(b"abcdefghijklmnopqrstuvwxyz0123456789", dtype=np.uint8)] = _LETTER
_KINDS[0x80:] = _LETTER  # what is not ASCII and not strange is a letter


class Words(NamedTuple):
    """The words of a batch of texts, in order, lower case; apostrophes part words ("don", "t")."""

    distinct: pa.Array
    """string (W,)"""
    code: np.ndarray
    """int32 (T,): positions in `distinct`"""
    text: np.ndarray
    """int64 (T,): the text each word is in"""
    gap: np.ndarray
    """uint8 (T,): what follows the word: SPACE, PAUSE (comma, hyphen) or STOP (other punctuation, end of text)"""


def part_words(text: pa.Array) -> Words:
    """The words of texts (R,)."""
    text = pc.utf8_lower(text)
    strange = pc.invert(pc.string_is_ascii(text))
    if pc.any(strange).as_py():
        text = pc.replace_with_mask(text, strange, pc.replace_substring_regex(text.filter(strange), _STRANGE, " "))
    data, ends = text_bytes(text)
    kinds = np.append(_KINDS[data], np.uint8(STOP))
    starts, stops = _spans(kinds == _LETTER, ends)
    offsets = np.zeros(len(starts) + 1, dtype=np.int32)
    np.cumsum(stops - starts, out=offsets[1:])
    letters = data[kinds[:-1] == _LETTER]
    flat = pa.StringArray.from_buffers(len(starts), pa.py_buffer(offsets), pa.py_buffer(letters))
    encoded = flat.dictionary_encode()
    parent = np.searchsorted(ends, starts, side="right") - 1
    gap = np.full(len(starts), STOP, dtype=np.uint8)
    if len(starts):
        bounds = np.stack([starts, stops], axis=1).ravel()
        same_text = np.diff(parent, append=-1) == 0
        gap[same_text] = np.maximum.reduceat(kinds, bounds)[1::2][same_text]
    return Words(encoded.dictionary, encoded.indices.to_numpy(), parent, gap)


def text_bytes(text: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of texts (R,), one text after the other: uint8, and int32 (R + 1,): where each begins, and the end."""
    text = pa.concat_arrays([text])  # one buffer that starts at offset 0
    ends = np.frombuffer(text.buffers()[1], dtype=np.int32)[: len(text) + 1]
    data = np.frombuffer(text.buffers()[2] or b"", dtype=np.uint8)[ends[0] : ends[-1]]
    return data, ends - ends[0]


def _spans(letter: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of the runs in `letter` (the last byte is none); no run crosses an end of a text."""
    first, last = letter.copy(), letter[:-1] & ~letter[1:]
    first[1:] &= ~letter[:-1]
    filled = np.diff(ends) > 0
    first[ends[:-1][filled]] = letter[ends[:-1][filled]]
    last[ends[1:][filled] - 1] = letter[ends[1:][filled] - 1]
    return np.flatnonzero(first), np.flatnonzero(last) + 1


def among(distinct: pa.Array, words: frozenset[str] | set[str]) -> np.ndarray:
    """Which of the words (W,) are in a list: bool (W,)."""
    return pc.is_in(distinct, value_set=pa.array(sorted(words), pa.string())).to_numpy(zero_copy_only=False)


def distinct_keys(keys: np.ndarray) -> np.ndarray:
    """np.unique of non-negative integers; sorting is several times as fast as its hash table here."""
    keys = np.sort(keys)
    return keys[np.diff(keys, prepend=-1) > 0]
