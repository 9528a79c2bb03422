"""Explanations that say again what the same user wrote before.

Some people write one text about several items. Such a text explains none of them, and where one copy is a test row and
another a training row, a system that copies looks brilliant by it: on real reviews of instruments, 6 such rows of 500
made half of a copying system's BLEU-4.

Shape letters: N rows, R rows of one batch, T words, G sequences of words.
"""

from collections.abc import Callable, Iterable
from hashlib import blake2b

import numpy as np
import pyarrow as pa

from gavamoe.data.text.words import part_words

SEQUENCE = 4
"""Words of the sequences by which texts are compared, as BLEU-4's longest."""
REPEATED_SHARE = 0.5
"""A text is a repeat from this share of its sequences on."""
ROWS_AT_A_TIME = 1_000_000
"""Rows of users that are compared in one pass over the texts; a pass takes some 300 bytes for each."""


def repeated_texts(
    texts: Callable[[], Iterable[pa.Array]], user_N: np.ndarray, rows_at_a_time: int = ROWS_AT_A_TIME
) -> np.ndarray:
    """Which texts are for the most part what earlier rows of the same user say: bool (N,).

    That is: at least REPEATED_SHARE of the sequences of SEQUENCE words (a shorter text is one sequence), without regard
    to case and punctuation. An empty text is no repeat.

    Args:
        texts: makes an iterator over batches, string (R,), of all N texts in order; one is made for each pass.
        user_N: codes of their users.
        rows_at_a_time: bounds the memory.
    """
    repeated_N = np.zeros(len(user_N), dtype=bool)
    if not len(user_N):
        return repeated_N
    pass_of_user = (np.cumsum(np.bincount(user_N)) - 1) // rows_at_a_time  # a user's rows are all in one
    pass_N = pass_of_user[user_N]
    for number in np.unique(pass_N).tolist():
        keys, rows, start = [], [], 0
        for text in texts():
            taken = np.flatnonzero(pass_N[start : start + len(text)] == number)
            key_G, text_G = _sequences(text.take(pa.array(taken)))
            row_G = start + taken[text_G]
            keys.append(key_G ^ _mixed(user_N[row_G].astype(np.uint64)))
            rows.append(row_G)
            start += len(text)
        key_G, row_G = np.concatenate(keys), np.concatenate(rows)
        known_N = np.bincount(row_G[_seen_before(key_G, row_G)], minlength=len(user_N))
        all_N = np.bincount(row_G, minlength=len(user_N))
        repeated_N |= (all_N > 0) & (known_N >= REPEATED_SHARE * all_N)
    return repeated_N


def _sequences(text: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the sequences of words in texts (R,), uint64 (G,), and the text of each: int64 (G,)."""
    words = part_words(text)
    digests = b"".join(blake2b(word.encode(), digest_size=8).digest() for word in words.distinct.to_pylist())
    hash_T = np.frombuffer(digests, dtype=np.uint64)[words.code]
    n_words_R = np.bincount(words.text, minlength=len(text))
    first_T = np.diff(words.text, prepend=-1) > 0
    left_T = np.cumsum(n_words_R)[words.text] - np.arange(len(words.text))  # words from here to the text's end
    begins_T = (left_T >= SEQUENCE) | (first_T & (n_words_R[words.text] < SEQUENCE))
    key_T = np.zeros(len(hash_T), dtype=np.uint64)
    for place in range(SEQUENCE):
        inside = np.flatnonzero(left_T > place)
        key_T[inside] = _mixed(key_T[inside] ^ hash_T[inside + place])
    return key_T[begins_T], words.text[begins_T]


def _mixed(value: np.ndarray) -> np.ndarray:
    """Every bit of each uint64 moves all of its hash (splitmix64's finalizer)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _seen_before(key_G: np.ndarray, row_G: np.ndarray) -> np.ndarray:
    """Whether an earlier row has the same key: bool (G,)."""
    order = np.lexsort((row_G, key_G))
    key_G, sorted_G = key_G[order], row_G[order]
    first_G = np.diff(key_G, prepend=key_G[:1] ^ np.uint64(1)) != 0
    earliest_G = sorted_G[first_G][np.cumsum(first_G) - 1]
    seen_G = np.empty(len(order), dtype=bool)
    seen_G[order] = sorted_G > earliest_G
    return seen_G
