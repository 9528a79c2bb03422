"""How well each sentence of a review would stand for it as an explanation: a sum of parts that can be read.

An explanation speaks about aspects of the item, is of some length, stands alone, and says what the rating says.
It is not the writer's own story. The marks are words and characters, English; lists: `lexicon`.

Shape letters: S sentences, T words, W distinct words of a batch.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gavamoe.data.text import lexicon
from gavamoe.data.text.words import SPACE, Words, among, text_bytes

FEATURES = 1.5
"""Weight of the features that a sentence names: one with more of them explains more. It is below the weight of the
length, since mere lists name most."""
ENOUGH_FEATURES = 2.0
"""Sum of the features' weights beyond which more count nothing."""
LENGTH = 2.5
"""What most sets explanations off from exclamations ("Great beer.") and from run-on texts."""
LENGTHS, LENGTH_SHARES = (3, 12, 25, 50), (0.0, 1.0, 1.0, 0.0)
"""Words of a sentence, and its share of LENGTH; straight lines between."""
STORY = -2.5
"""As much as length: a long, rich sentence about the writer's family is no explanation."""
FULL_STORY_SHARE = 0.25
"""Share of words that are about the writer, from which on STORY counts whole."""
OWN_OPENING = -0.75
"""Begins with "I" or "my", and no opinion follows: the writer is whom the sentence is about."""
AGREEMENT, CONTRADICTION = 1.0, -2.0
"""Praise under a good rating, blame under a bad one; the opposite, a concession, misleads more than no judgement."""
JUDGEMENT = 0.5
"""Words of praise or blame at all, also where there is no rating: "the story is about a pilot" judges nothing."""
GOOD_END, GOOD_START = 0.5, 0.25
"""A full stop or exclamation mark at the end; a capital or number at the start. Half a text may lack them."""
FAULT = -1.0
"""Each of: a question, an address, capitals only, a header that ends in a colon."""
LEANS = -0.5
"""Begins with "but", "also", ... and is not well understood alone, or with "if" or "when": advice, or a story."""
ITEM_OPENING = 0.5
"""Begins with "it", "this", "the": more often about the item than others."""
OPINION_REACH = 2
"""Words after "I" within which its opinion begins ("I really like")."""
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
    "item_opening": lexicon.ITEM_OPENINGS,
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
    marks = _Marks(words, len(sentence))
    n_words_S = np.bincount(words.text, minlength=len(sentence))
    balance_S, judges_S = marks.judgement()
    own = marks.own()
    story_share_S = (marks.count(own) + marks.count(marks.at("story"))) / np.maximum(n_words_S, 1)
    return (
        FEATURES * np.minimum(features_S / ENOUGH_FEATURES, 1)
        + LENGTH * np.interp(n_words_S, LENGTHS, LENGTH_SHARES)
        + STORY * np.minimum(story_share_S / FULL_STORY_SHARE, 1)
        + OWN_OPENING * marks.count(marks.opening(own))
        + AGREEMENT * (leaning_S * balance_S > 0)
        + CONTRADICTION * (leaning_S * balance_S < 0)
        + JUDGEMENT * judges_S
        + LEANS * marks.count(marks.opening(marks.at("connective")))
        + ITEM_OPENING * marks.count(marks.opening(marks.at("item_opening")))
        + FAULT * (marks.count(marks.at("link")) > 0)
        + _form(sentence)
    )


class _Marks:
    """Where words of the lists stand in S sentences: positions among their T words, of which these are few."""

    def __init__(self, words: Words, size: int) -> None:
        self._text, self._gap, self._size = words.text, words.gap, size
        flags_W = np.zeros(len(words.distinct), dtype=np.uint16)
        for name, flag in _FLAGS.items():
            flags_W[among(words.distinct, _LISTS[name])] |= flag
        self._flags = flags_W[words.code]
        self._marked = np.flatnonzero(self._flags)

    def at(self, name: str) -> np.ndarray:
        """Positions of the words of a list."""
        return self._marked[self._flags[self._marked] & _FLAGS[name] > 0]

    def count(self, places: np.ndarray) -> np.ndarray:
        """How many of the positions are in each sentence: (S,)."""
        return np.bincount(self._text[places], minlength=self._size)

    def opening(self, places: np.ndarray) -> np.ndarray:
        """Those of the positions at which a sentence begins."""
        return places[(places == 0) | (self._text[places - 1] != self._text[places])]

    def own(self) -> np.ndarray:
        """Positions of words for the writer, but those that an opinion on the item follows ("I really like ...")."""
        places = self.at("first_person")
        opinion = np.zeros(len(places), dtype=bool)
        near, reach = places, np.arange(len(places))
        for _ in range(OPINION_REACH):
            reach = reach[self._gap[near[reach]] == SPACE]
            near = near + 1
            opinion[reach] |= self._flags[near[reach]] & _FLAGS["opinion_verb"] > 0
        return places[~opinion]

    def judgement(self) -> tuple[np.ndarray, np.ndarray]:
        """Words of praise less words of blame, and whether there are any: (S,).

        "too" blames before an adjective ("too sweet"), not at the end of a clause ("nice, too").
        """
        too = self.at("too")
        blame = np.concatenate([self.at("negative"), too[self._gap[too] == SPACE]])
        praise = self.at("positive")
        negated = np.zeros(len(self._flags), dtype=bool)
        near = self.at("negation")
        for _ in range(NEGATION_REACH):  # as far as the clause goes, and not past "only" ("not only good")
            near = near[(self._gap[near] == SPACE) & (self._flags[near] & _FLAGS["only"] == 0)] + 1
            negated[near] = True
        judged = np.concatenate([praise, blame])
        polarity = np.repeat([1, -1], [len(praise), len(blame)]) * np.where(negated[judged], -1, 1)
        return np.bincount(self._text[judged], polarity, self._size), self.count(judged) > 0


def _form(sentence: pa.Array) -> np.ndarray:
    """What the characters of each sentence add: float (S,)."""
    data, ends = text_bytes(sentence)
    filled = np.diff(ends) > 0
    score = np.zeros(len(sentence))
    start, stop = ends[:-1][filled], ends[1:][filled]
    first, last = data[start], data[stop - 1]
    second_last, third_last = (data[np.maximum(stop - back, start)] for back in (2, 3))
    closed = _one_of(last, b"\"')]")
    end, before = np.where(closed, second_last, last), np.where(closed, third_last, second_last)
    trails_off = (end == ord(".")) & (before == ord("."))
    starts_well = _one_of(first, b"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789\"'") | (first >= 0x80)
    score[filled] = (
        GOOD_START * starts_well
        + GOOD_END * (_one_of(end, b".!") & ~trails_off)
        + FAULT * (_one_of(end, b"?:"))
        + FAULT * pc.ascii_is_upper(sentence).to_numpy(zero_copy_only=False)[filled]
    )
    return score


def _one_of(byte: np.ndarray, characters: bytes) -> np.ndarray:
    table = np.zeros(256, dtype=bool)
    table[list(characters)] = True
    return table[byte]
