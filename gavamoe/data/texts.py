"""Second pass of `data prepare` over the texts: chosen, without those that a user repeats, and written."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gavamoe.data.bounds import MAX_EXPLANATION_CHARS
from gavamoe.data.judging import OrderedMap, run_here
from gavamoe.data.text.cleaning import sentences
from gavamoe.data.text.features import SentenceRule, Vocabulary
from gavamoe.data.text.repeats import repeated_texts
from gavamoe.data.text.spool import FEATURE_LISTS, TextSpool
from gavamoe.data.validation import RowValidator
from gavamoe.data.writer import DatasetWriter

ReadTexts = Callable[[], Iterator[tuple[pa.Array, pa.Array]]]
"""Makes an iterator over text and features of all rows, batch by batch."""
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
    read: ReadTexts, writer: DatasetWriter, counted: np.ndarray, user: np.ndarray | None, report: OnRows
) -> Written:
    """Write the chosen texts and features of all rows; counts are of the `counted` rows.

    Args:
        read: gives both, batch by batch; more than once where there are users.
        user: the rows' users, whose repeated texts are taken out; None: they stay.
    """
    repeated = np.zeros(len(counted), dtype=bool)
    if user is not None:
        repeated = repeated_texts(partial(_texts_of, read, counted), user)
    start = bare = 0
    words = np.zeros(MAX_EXPLANATION_CHARS, dtype=np.int64)
    for text, features in read():
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
    run: OrderedMap = run_here,
) -> Iterator[tuple[pa.Array, pa.Array]]:
    """Text and features of all accepted rows, batch by batch; `run` chooses them, perhaps side by side."""
    if vocabulary is None:
        return validator.spooled()

    def jobs() -> Iterator[tuple[pa.Array, np.ndarray | None]]:
        start = 0
        for text, _ in validator.spooled():
            yield text, None if leaning is None else leaning[start : start + len(text)]
            start += len(text)

    return run(choose_batch, (vocabulary, rule), jobs())


def choose_batch(
    vocabulary: Vocabulary, rule: SentenceRule | None, text: pa.Array, leaning: np.ndarray | None
) -> tuple[pa.Array, pa.Array]:
    """Text and features of a batch of rows; a sentence of each text where there is a rule."""
    size = len(text)
    if rule is None:
        return vocabulary.choose(text, np.arange(size), size)
    sentence, row = sentences(text)
    return vocabulary.choose(sentence, row, size, rule, leaning)


@contextmanager
def stored(path: Path, read: ReadTexts) -> Iterator[ReadTexts]:
    """The same texts, from a file as long as this lasts: choosing them takes longer than reading them again."""
    spool = TextSpool(path)
    try:
        for text, features in read():
            spool.add(text, features)
        yield spool.read
    finally:
        spool.remove()


def _texts_of(read: ReadTexts, counted: np.ndarray) -> Iterator[pa.Array]:
    """The texts, empty but for the `counted` rows, bool (N,)."""
    start = 0
    for text, _ in read():
        yield pc.if_else(pa.array(counted[start : start + len(text)]), text, "")
        start += len(text)
