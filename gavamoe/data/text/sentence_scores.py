"""How well each sentence of a review would stand for it as an explanation: a sum of parts that can be read.

An explanation speaks about aspects of the item, is of some length, stands alone, and says what the rating says.
It is not the writer's own story. The marks are words and characters, English; lists: `lexicon`.

Shape letters: S sentences, T words, W distinct words of a batch.
"""

import numpy as np
import pyarrow as pa

from gavamoe.data import lexicon
from gavamoe.data.text.words import SPACE, Words, among, text_bytes

FEATURES = 1.5
"""Of sentences alike in the rest, the one with more aspects explains more; less than what length weighs, for lists."""
ENOUGH_FEATURES = 2.0
"""Sum of the features' weights beyond which more count nothing."""
LENGTH = 2.0
"""What most sets explanations off from exclamations ("Great beer.") and from run-on texts."""
LENGTHS, LENGTH_SHARES = (3, 12, 25, 50), (0.0, 1.0, 1.0, 0.0)
"""Words of a sentence, and its share of LENGTH; straight lines between."""
STORY = -2.0
"""As much as length: a long, rich sentence about the writer's family is no explanation."""
FULL_STORY_SHARE = 0.25
"""Share of words that are about the writer, from which on STORY counts whole."""
OWN_OPENING = -0.75
"""Begins with "I" or "my", and no opinion follows: the writer is whom the sentence is about."""
AGREEMENT = 1.0
"""Praise under a good rating, blame under a bad one; against it where they differ."""
JUDGEMENT = 0.5
"""Words of praise or blame at all, also where there is no rating: "the story is about a pilot" judges nothing."""
GOOD_END, GOOD_START = 0.5, 0.25
"""A full stop or exclamation mark at the end; a capital or number at the start. Half a text may lack them."""
FAULT = -1.0
"""Each of: a question, an address, capitals only, a header that ends in a colon."""
LEANS = -0.5
"""Begins with "but", "also", ...: understood without the sentence before, but not well."""
NEGATION_REACH = 3
"""Words after a negation whose judgement it turns around ("not a very good ...")."""

_LISTS = {
    "positive": lexicon.POSITIVE,
    "negative": lexicon.NEGATIVE,
    "negation": lexicon.NEGATIONS,
    "first_person": lexicon.FIRST_PERSON,
    "story": lexicon.STORY_WORDS,
    "opinion_verb": lexicon.OPINION_VERBS,
    "connective": lexicon.CONNECTIVES,
    "link": lexicon.LINK_WORDS,
    "too": frozenset({"too"}),
    "only": frozenset({"only"}),
}
_FLAGS = {name: 1 << bit for bit, name in enumerate(_LISTS)}


def sentence_scores(sentence: pa.Array, words: Words, features_S: np.ndarray, leaning_S: np.ndarray) -> np.ndarray:
    """float (S,): the higher, the better an explanation.

    Args:
        sentence: string (S,).
        words: their words.
        features_S: sum of the weights of each sentence's different features.
        leaning_S: the sentiment of the rating: -1, 1, or 0 where it is neutral or there is none.
    """
    flags_W = np.zeros(len(words.distinct), dtype=np.uint16)
    for name, flag in _FLAGS.items():
        flags_W[among(words.distinct, _LISTS[name])] |= flag
    flags_T = flags_W[words.code]
    n_words_S = np.bincount(words.text, minlength=len(sentence))
    own_T = _own(words, flags_T)
    story_T = own_T | _has(flags_T, "story")
    story_share_S = np.bincount(words.text[story_T], minlength=len(sentence)) / np.maximum(n_words_S, 1)
    balance_S, judges_S = _judgement(words, flags_T, len(sentence))
    return (
        FEATURES * np.minimum(features_S / ENOUGH_FEATURES, 1)
        + LENGTH * np.interp(n_words_S, LENGTHS, LENGTH_SHARES)
        + STORY * np.minimum(story_share_S / FULL_STORY_SHARE, 1)
        + AGREEMENT * leaning_S * np.sign(balance_S)
        + JUDGEMENT * judges_S
        + _form(sentence)
        + _opening(words, own_T, flags_T, len(sentence))
        + FAULT * (np.bincount(words.text[_has(flags_T, "link")], minlength=len(sentence)) > 0)
    )


def _has(flags_T: np.ndarray, name: str) -> np.ndarray:
    return flags_T & _FLAGS[name] > 0


def _judgement(words: Words, flags_T: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Words of praise less words of blame, and whether there are any: (S,).

    "too" blames before an adjective ("too sweet"), not at the end of a clause ("nice, too").
    """
    spaced = words.gap == SPACE
    negative = _has(flags_T, "negative") | (_has(flags_T, "too") & spaced)
    polarity_T = _has(flags_T, "positive").astype(np.int8) - negative.astype(np.int8)
    reach, negated = _has(flags_T, "negation"), np.zeros(len(flags_T), dtype=bool)
    passes = spaced & ~_has(flags_T, "only")  # "not only good"
    for _ in range(NEGATION_REACH):
        reach = np.roll(reach & passes, 1)
        negated |= reach
    polarity_T[negated] *= -1
    judged = np.flatnonzero(polarity_T)
    text = words.text[judged]
    judges = np.bincount(text, minlength=size) > 0
    return np.bincount(text, polarity_T[judged], size), judges


def _own(words: Words, flags_T: np.ndarray) -> np.ndarray:
    """Words that name the writer: bool (T,); not those that an opinion on the item follows ("I really like ...")."""
    opinion, spaced = _has(flags_T, "opinion_verb"), words.gap == SPACE
    follows = spaced & np.roll(opinion, -1)
    return _has(flags_T, "first_person") & ~follows & ~(spaced & np.roll(follows, -1))


def _opening(words: Words, own_T: np.ndarray, flags_T: np.ndarray, size: int) -> np.ndarray:
    """What the first word of each sentence adds: float (S,)."""
    first = np.flatnonzero(np.diff(words.text, prepend=-1))
    added = LEANS * _has(flags_T[first], "connective") + OWN_OPENING * own_T[first]
    return np.bincount(words.text[first], added, size)


def _form(sentence: pa.Array) -> np.ndarray:
    """What the characters of each sentence add: float (S,)."""
    data, ends = text_bytes(sentence)
    filled = np.diff(ends) > 0
    score = np.zeros(len(sentence))
    if not filled.any():
        return score
    start, stop = ends[:-1][filled], ends[1:][filled]
    first, last = data[start], data[stop - 1]
    before = data[np.maximum(stop - 2, start)]
    closed = _one_of(last, b"\"')]")
    end, before = np.where(closed, before, last), np.where(closed, data[np.maximum(stop - 3, start)], before)
    trails_off = (end == ord(".")) & (before == ord("."))
    upper = _counts((data >= ord("A")) & (data <= ord("Z")), start, stop)
    lower = _counts((data >= ord("a")) & (data <= ord("z")), start, stop)
    starts_well = ((first >= ord("A")) & (first <= ord("Z"))) | _one_of(first, b"0123456789\"'") | (first >= 0x80)
    score[filled] = (
        GOOD_START * starts_well
        + GOOD_END * (_one_of(end, b".!") & ~trails_off)
        + FAULT * (end == ord("?"))
        + FAULT * (end == ord(":"))
        + FAULT * (upper > lower)
    )
    return score


def _one_of(byte: np.ndarray, characters: bytes) -> np.ndarray:
    return np.isin(byte, np.frombuffer(characters, dtype=np.uint8))


def _counts(mask: np.ndarray, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """How many bytes of each span [start, stop) are in the mask."""
    total = np.concatenate([[0], np.cumsum(mask)])
    return total[stop] - total[start]
