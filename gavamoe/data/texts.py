"""Second pass of `data prepare` over the texts: chosen, without those that a user repeats, and written."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gavamoe.data.bounds import MAX_EXPLANATION_CHARS
from gavamoe.data.judging import OrderedMap, run_here
from gavamoe.data.text.choosing import choose_batch
from gavamoe.data.text.features import SentenceRule, Vocabulary
from gavamoe.data.text.repeats import repeated_texts
from gavamoe.data.text.spool import FEATURE_LISTS, TextSpool, rows_of, sequences_of, texts_of
from gavamoe.data.validation import RowValidator
from gavamoe.data.writer import DatasetWriter

ReadBlocks = Callable[[], Iterator[pa.Buffer]]
"""Makes an iterator over text and features of all rows, batch by batch, packed."""
OnRows = Callable[[str, int], None]
"""Called with the phase ("read" or "write") and the number of rows done in it."""


class Written(NamedTuple):
    """Counts of the texts that `write_texts` wrote, of the rows to count."""

    repeated: int
    """How many were taken out, since their user wrote them before."""
    without_feature: int
    """How many of the others have no feature."""
    words: np.ndarray
    """How many have 0, 1, 2, ... words: int64."""


def write_texts(
    read: ReadBlocks, writer: DatasetWriter, counted: np.ndarray, user: np.ndarray | None, report: OnRows
) -> Written:
    """Write the chosen texts and features of all rows; counts are of the `counted` rows.

    Args:
        read: gives both, batch by batch; more than once, and with the texts' sequences of words, where there are users.
        user: the rows' users, whose repeated texts are taken out; None: they stay.
    """
    repeated = np.zeros(len(counted), dtype=bool)
    if user is not None:
        repeated = repeated_texts(partial(_sequences_of, read, counted), user)
    start = bare = 0
    words = np.zeros(MAX_EXPLANATION_CHARS, dtype=np.int64)
    for block in read():
        text, features = texts_of(block)
        span = slice(start, start + len(text))
        gone, left = pa.array(repeated[span]), counted[span] & ~repeated[span]
        text = pc.if_else(gone, "", text)
        features = pc.if_else(gone, pa.scalar([], FEATURE_LISTS), features)
        writer.write(text, features)
        empty = pc.equal(pc.list_value_length(features), 0).to_numpy(zero_copy_only=False)
        bare += int(np.count_nonzero(empty & left))
        shown = text.filter(pa.array(left))
        n_words = pc.count_substring(shown, " ").to_numpy() + pc.not_equal(shown, "").to_numpy(zero_copy_only=False)
        words += np.bincount(n_words, minlength=len(words))
        start += len(text)
        report("write", start)
    return Written(int(repeated.sum()), bare, words)


def choose_texts(
    validator: RowValidator,
    vocabulary: Vocabulary | None,
    rule: SentenceRule | None,
    leaning: np.ndarray | None,
    comparing: bool = False,
    run: OrderedMap = run_here,
) -> Iterator[pa.Buffer]:
    """Text and features of all accepted rows, batch by batch; `run` chooses them, perhaps side by side.

    Args:
        comparing: with the texts' sequences of words.
    """
    if vocabulary is None:
        return validator.spooled()
    return run(choose_batch, (vocabulary, rule, comparing), _with_leaning(validator.spooled(), leaning))


def _with_leaning(blocks: Iterator[pa.Buffer], leaning: np.ndarray | None) -> Iterator[tuple[Any, ...]]:
    start = 0
    for block in blocks:
        rows = rows_of(block)
        yield block, None if leaning is None else leaning[start : start + rows]
        start += rows


@contextmanager
def stored(path: Path, read: ReadBlocks) -> Iterator[ReadBlocks]:
    """The same texts, from a file as long as this lasts: choosing them takes longer than reading them again."""
    spool = TextSpool(path)
    try:
        for block in read():
            spool.add(block)
        yield spool.read
    finally:
        spool.remove()


def _sequences_of(read: ReadBlocks, counted: np.ndarray) -> Iterator[pa.ListArray]:
    """The texts' sequences, null but for the `counted` rows, bool (N,)."""
    start = 0
    for block in read():
        sequences = sequences_of(block)
        yield pc.if_else(pa.array(counted[start : start + len(sequences)]), sequences, None)
        start += len(sequences)
