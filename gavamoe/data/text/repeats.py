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
import pyarrow.compute as pc

from gavamoe.data.text.words import part_words

SEQUENCE = 4
"""Words of the sequences by which texts are compared, as BLEU-4's longest."""
REPEATED_SHARE = 0.5
"""A text is a repeat from this share of its sequences on."""
ROWS_AT_A_TIME = 1_000_000
"""Rows of users that are compared in one pass over the texts; a pass takes some 300 bytes for each."""


def repeated_texts(
    sequences: Callable[[], Iterable[pa.ListArray]], user_N: np.ndarray, rows_at_a_time: int = ROWS_AT_A_TIME
) -> np.ndarray:
    """Which texts are for the most part what earlier rows of the same user say: bool (N,).

    That is: at least REPEATED_SHARE of the sequences of SEQUENCE words (a shorter text is one sequence), without regard
    to case and punctuation. An empty text is no repeat.

    Args:
        sequences: makes an iterator over batches of what `word_sequences` finds in all N texts in order, list<uint64>
            (R,), where a null is a text that is not compared; one is made for each pass.
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
        for batch in sequences():
            row_G = start + pc.list_parent_indices(batch).to_numpy()
            key_G = pc.list_flatten(batch).to_numpy()
            taken_G = pass_N[row_G] == number
            row_G, key_G = row_G[taken_G], key_G[taken_G]
            keys.append(key_G ^ _mixed(user_N[row_G].astype(np.uint64)))
            rows.append(row_G)
            start += len(batch)
        key_G, row_G = np.concatenate(keys), np.concatenate(rows)
        known_N = np.bincount(row_G[_seen_before(key_G, row_G)], minlength=len(user_N))
        all_N = np.bincount(row_G, minlength=len(user_N))
        repeated_N |= (all_N > 0) & (known_N >= REPEATED_SHARE * all_N)
    return repeated_N


def word_sequences(text: pa.Array) -> pa.ListArray:
    """Hashes of the sequences of words in each of the texts (R,): list<uint64> (R,), G in all."""
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
    offsets = np.zeros(len(text) + 1, dtype=np.int32)
    np.cumsum(np.bincount(words.text[begins_T], minlength=len(text)), out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(key_T[begins_T]))


def _mixed(value: np.ndarray) -> np.ndarray:
    """Every bit of each uint64 moves all of its hash (splitmix64's finalizer)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _seen_before(key_G: np.ndarray, row_G: np.ndarray) -> np.ndarray:
    """Whether an earlier row has the same key: bool (G,)."""
    seen_G = np.zeros(len(key_G), dtype=bool)
    order = np.argsort(key_G)
    if not len(order):
        return seen_G
    same = np.diff(key_G[order]) == 0
    shared = np.append(same, False) | np.insert(same, 0, False)  # most keys stand alone
    order = order[shared]
    if len(order):
        first = np.flatnonzero(np.diff(key_G[order], prepend=~key_G[order[:1]]))
        earliest = np.minimum.reduceat(row_G[order], first)
        seen_G[order] = row_G[order] > np.repeat(earliest, np.diff(first, append=len(order)))
    return seen_G
