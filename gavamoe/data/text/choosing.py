"""A text and its features for each of the rows of a block: what Ray workers do in the second pass of `data prepare`."""

import numpy as np
import pyarrow as pa

from gavamoe.data.text.cleaning import sentences
from gavamoe.data.text.features import SentenceRule, Vocabulary
from gavamoe.data.text.repeats import word_sequences
from gavamoe.data.text.spool import packed, texts_of


def choose_batch(
    vocabulary: Vocabulary, rule: SentenceRule | None, comparing: bool, block: pa.Buffer, leaning: np.ndarray | None
) -> pa.Buffer:
    """Text and features of a batch of R rows, packed; a sentence of each text where there is a rule.

    Args:
        comparing: with the texts' sequences of words, by which repeated ones are found.
        block: packed texts.
        leaning: (R,) the sentiment of each row's rating, as `Vocabulary.choose` takes it.
    """
    text, _ = texts_of(block)
    size = len(text)
    if rule is None:
        chosen = vocabulary.choose(text, np.arange(size), size)
    else:
        sentence, row = sentences(text)
        chosen = vocabulary.choose(sentence, row, size, rule, leaning)
    return packed(*chosen, word_sequences(chosen.text) if comparing else None)
