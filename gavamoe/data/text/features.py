"""Features of explanations: the aspects of an item that a text speaks about ("room", "battery").

A statistical extractor, no downloads, two passes over the texts with bounded memory:

1. `WordCounts` counts for every word the texts it occurs in and how often it stands where a noun stands: after
   a determiner, possessive or common adjective AND before a function word or punctuation; occurrences after a
   pronoun, "to" or an auxiliary count against it. `Vocabulary.from_counts` keeps the most frequent nouns.
2. `Vocabulary.choose` picks a sentence of each review by a `SentenceRule` (ties: the first) and names its features,
   most frequent first. A review without any gives its first sentence of MIN_WORDS words.

English only, single words, surface forms ("room" and "rooms" are two features). Word lists: `lexicon`.

Shape letters: R rows (reviews), S sentences, T words, W distinct words of a batch, V features.
"""

import ast
import json
import math
import re
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gavamoe.data.bounds import MAX_FEATURE_CHARS
from gavamoe.data.text.lexicon import DESCRIBERS, DETERMINERS, JOINING, NEVER_FEATURES, OPINIONS, STOP_WORDS, VERB_CUES
from gavamoe.data.text.sentence_scores import sentence_scores
from gavamoe.data.text.words import PAUSE, SPACE, STOP, Words, among, distinct_keys, part_words

MAX_ROW_FEATURES = 5
MAX_VOCABULARY = 2_000
MAX_COUNTED_WORDS = 500_000
"""Distinct words counted at a time; beyond it, words seen in a single text are forgotten."""
MIN_WORDS = 3
"""Words that make a sentence worth choosing when none carries a feature."""
MIN_CHOSEN_WORDS = 4
"""Rule best takes a shorter sentence ("Good beer.") only where no other has a feature."""
LEAST_FEATURE_WEIGHT = 0.3
"""Weight of the rarest feature: rare ones are more often names and places than aspects of the item."""
_TIER = 100.0
"""More than sentences' scores differ by."""
MIN_TEXTS = 3
MIN_TEXTS_SHARE = 0.0002
MIN_NOUN_SHARE = 0.03
"""Least noun evidence of a feature per occurrence, after one standard error (the root of the evidence) is taken off."""
SUFFIX_NOUN_SHARES = {"ed": 0.6, "ing": 0.4, "ly": 0.4, "ful": 0.4, "ous": 0.4, "ive": 0.4, "able": 0.4, "est": 0.4}
"""Least evidence per occurrence of words that end like verbs, adverbs or adjectives ("parking" passes)."""
COMPOUND_EVIDENCE = 0.5
"""Noun evidence of a word after another content word ("gift card."), where a determiner gives 1."""

MAX_LIST_CHARS = 10_000
"""Longest string that is read as a list of features."""

_PARTED = re.compile("[,;|]")
_CLOSING = {"(": ")", "{": "}"}
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")
_NUMPY = re.compile(r"\[\s*(?:(?:'[^']*'|\"[^\"]*\")\s*)*\]")
_CANDIDATE = r"^\p{L}{3,24}$"


class CountedWords(NamedTuple):
    """What a batch of texts says of its words."""

    texts: int
    words: pa.Array
    """string (W,): the words that may be features."""
    numbers: np.ndarray
    """float64 (W, 3): texts that have each, occurrences, noun-like minus verb-like occurrences."""


def count_words(text: pa.Array) -> CountedWords:
    """Count the words of a batch of texts."""
    words = part_words(text)
    size = len(words.distinct)
    candidate = pc.match_substring_regex(words.distinct, _CANDIDATE).to_numpy(zero_copy_only=False)
    candidate &= ~among(words.distinct, NEVER_FEATURES)
    occurrences = np.bincount(words.code, minlength=size)
    balance = np.bincount(words.code, _noun_evidence(words, candidate), size)
    counted = candidate[words.code]
    pairs = distinct_keys(words.text[counted] * size + words.code[counted])
    texts = np.bincount(pairs % max(size, 1), minlength=size)
    taken = np.flatnonzero(candidate)
    numbers = np.stack([texts[taken], occurrences[taken], balance[taken]], axis=1)
    return CountedWords(len(text), words.distinct.take(pa.array(taken)), numbers)


class WordCounts:
    """First pass: `add` what `count_words` finds in every batch of texts."""

    def __init__(self) -> None:
        self._counts: dict[str, list[float]] = {}
        """word -> [texts, occurrences, noun-like minus verb-like occurrences]"""
        self.texts = 0

    def add(self, counted: CountedWords) -> None:
        """Add the words of the next batch."""
        self._merge(counted.words.to_pylist(), counted.numbers.tolist())
        self.texts += counted.texts

    def items(self) -> list[tuple[str, float, float, float]]:
        """(word, texts, occurrences, noun-like minus verb-like occurrences) of every counted word."""
        return [(word, texts, count, balance) for word, (texts, count, balance) in self._counts.items()]

    def _merge(self, words: list[str], numbers: list[list[float]]) -> None:
        counts = self._counts
        for word, new in zip(words, numbers, strict=True):
            old = counts.get(word)
            counts[word] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]
        if len(counts) > MAX_COUNTED_WORDS:
            self._counts = {word: numbers for word, numbers in counts.items() if numbers[0] > 1}


SentenceRule = Literal["best", "frequent"]
"""Which sentence of a review is its explanation. best: of those with a feature, the one with the highest score
(`text.sentence_scores`); frequent: the one with the most frequent feature."""


class Chosen(NamedTuple):
    """What `Vocabulary.choose` found for each of R rows."""

    text: pa.Array
    """string (R,): the chosen sentence; empty for a row without any"""
    features: pa.Array
    """list<string> (R,): its features, most frequent first, at most MAX_ROW_FEATURES"""


class Vocabulary:
    """The features of a dataset, most frequent first."""

    def __init__(self, features: list[str]) -> None:
        self.features = features
        self._array = pa.array(features, pa.string())
        share_V = np.log1p(np.arange(len(features))) / np.log1p(max(len(features), 1))
        self._weights = 1 - (1 - LEAST_FEATURE_WEIGHT) * share_V
        """float (V,): how much a feature is worth in a sentence, the most frequent 1."""

    @classmethod
    def from_counts(cls, counts: WordCounts) -> "Vocabulary":
        """The MAX_VOCABULARY most frequent noun-like words, by the number of texts they occur in."""
        least = max(MIN_TEXTS, math.ceil(MIN_TEXTS_SHARE * counts.texts))
        ranked = [
            (-texts, word)
            for word, texts, occurrences, balance in counts.items()
            if texts >= least and len(word) <= MAX_FEATURE_CHARS and _is_noun(word, balance, occurrences)
        ]
        return cls([word for _, word in sorted(ranked)[:MAX_VOCABULARY]])

    def choose(
        self,
        sentence: pa.Array,
        row: np.ndarray,
        n_rows: int,
        rule: SentenceRule = "frequent",
        leaning: np.ndarray | None = None,
    ) -> Chosen:
        """Choose one sentence for each row.

        Args:
            sentence: string (S,), in order of rows.
            row: int64 (S,) the row of each sentence.
            n_rows: R.
            rule: how.
            leaning: (R,) the sentiment of each row's rating, which rule best agrees with: -1, 0 or 1; None: none.
        """
        none = len(self.features)
        words = part_words(sentence)
        rank_T = self._ranks(words.distinct)[words.code]
        n_words_S = np.bincount(words.text, minlength=len(sentence))
        if rule == "frequent":
            worth_S = -self._best_rank(words, rank_T, len(sentence))
            worth_S[(worth_S < -none) & (n_words_S >= MIN_WORDS)] = -none
        else:
            leaning_S = np.zeros(len(sentence)) if leaning is None else leaning[row]
            worth_S = self._worth(sentence, words, rank_T, n_words_S, leaning_S)
        chosen_R = _first_of_best(worth_S, row, n_rows)
        taken_T = (rank_T < none) & (chosen_R[row[words.text]] == words.text)
        features = self._lists(row[words.text[taken_T]], rank_T[taken_T], n_rows)
        picked = sentence.take(pa.array(chosen_R, mask=chosen_R < 0))
        return Chosen(pc.fill_null(picked, ""), features)

    def _best_rank(self, words: Words, rank_T: np.ndarray, size: int) -> np.ndarray:
        """(S,) rank of each sentence's most frequent feature; V + 1 without any."""
        none = len(self.features)
        best_S = np.full(size, none + 1)
        starts = np.flatnonzero(np.diff(words.text, prepend=-1))
        if len(starts):
            best_S[words.text[starts]] = np.minimum.reduceat(np.where(rank_T < none, rank_T, none + 1), starts)
        return best_S

    def _worth(
        self, sentence: pa.Array, words: Words, rank_T: np.ndarray, n_words_S: np.ndarray, leaning_S: np.ndarray
    ) -> np.ndarray:
        """(S,) the score of each sentence, above those without a feature or of few words, whatever theirs."""
        size = max(len(self.features), 1)
        found = rank_T < len(self.features)
        keys = distinct_keys(words.text[found] * size + rank_T[found])
        weights_S = np.bincount(keys // size, self._weights[keys % size], len(sentence))
        featured_S = weights_S > 0
        score_S = sentence_scores(sentence, words, weights_S, leaning_S)
        tier_S = np.where(featured_S, 2 + (n_words_S >= MIN_CHOSEN_WORDS), n_words_S >= MIN_WORDS)
        return _TIER * tier_S + np.where(featured_S, score_S, 0)

    def _ranks(self, distinct: pa.Array) -> np.ndarray:
        found = pc.index_in(distinct, value_set=self._array)
        return pc.fill_null(found, len(self.features)).to_numpy()

    def _lists(self, row: np.ndarray, rank: np.ndarray, n_rows: int) -> pa.Array:
        size = max(len(self.features), 1)
        keys = distinct_keys(row * size + rank)
        row, rank = keys // size, keys % size
        kept = np.arange(len(row)) - np.searchsorted(row, row) < MAX_ROW_FEATURES
        offsets = np.searchsorted(row[kept], np.arange(n_rows + 1)).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), self._array.take(pa.array(rank[kept])))


def split_features(text: str) -> list[str] | None:
    """The features that a string names: parted by , ; or |, or a list as Python, JSON or numpy print it.

    Returns:
        None where the string begins like a list and is none.
    """
    text = text.strip()
    if not (text.startswith("[") or (text[:1] in "({" and text.endswith(_CLOSING.get(text[:1], "\0")))):
        return _PARTED.split(text)
    listed = _listed(text)
    return listed if listed is not None or text.startswith("[") else _PARTED.split(text)


def _listed(text: str) -> list[str] | None:
    if len(text) > MAX_LIST_CHARS:
        return None
    for parse in (json.loads, _numpy_list, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(value, set | frozenset):
            value = sorted(value, key=str)
        if isinstance(value, list | tuple) and all(isinstance(word, str | int | float | None) for word in value):
            return [str(word) for word in value if word is not None]
    return None


def _numpy_list(text: str) -> list[str]:
    """Strings parted by blanks, which Python would read as one string."""
    if not _NUMPY.fullmatch(text):
        raise ValueError(text)
    return [first or second for first, second in _QUOTED.findall(text)]


def given_features(values: pa.Array) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Clean lists of features that a source gives, as lists or as strings (`split_features`).

    Returns:
        list<string> (R,): lower case, single blanks, no control characters, no repetitions, at most MAX_ROW_FEATURES a
        row; nulls become empty lists. And two bool (R,): the rows with a feature longer than MAX_FEATURE_CHARS, which
        is left out of their list; the rows whose string begins like a list and is none.
    """
    broken = pa.array([False] * len(values))
    if not pa.types.is_list(values.type):
        values, broken = _split_all(values)
    row_S = pc.list_parent_indices(values).to_numpy()
    flat = pc.list_flatten(values).cast(pa.string())
    flat = pc.utf8_slice_codeunits(pc.utf8_lower(flat), 0, 4 * MAX_FEATURE_CHARS)
    flat = pc.utf8_trim(pc.replace_substring_regex(flat, r"[\p{Cc}\p{Cf}\p{Z}]+", " "), " ")
    long_S = pc.fill_null(pc.greater(pc.utf8_length(flat), MAX_FEATURE_CHARS), False).to_numpy(zero_copy_only=False)
    good_S = pc.fill_null(pc.not_equal(flat, ""), False).to_numpy(zero_copy_only=False) & ~long_S
    too_long_R = np.bincount(row_S[long_S], minlength=len(values)).astype(bool)
    coded = flat.filter(pa.array(good_S)).dictionary_encode()
    row, code = row_S[good_S], coded.indices.to_numpy()
    _, first = np.unique(row * max(len(coded.dictionary), 1) + code, return_index=True)
    first.sort()
    row, code = row[first], code[first]
    kept = np.arange(len(row)) - np.searchsorted(row, row) < MAX_ROW_FEATURES
    offsets = np.searchsorted(row[kept], np.arange(len(values) + 1)).astype(np.int32)
    features = pa.ListArray.from_arrays(pa.array(offsets), coded.dictionary.take(pa.array(code[kept])))
    return features, pa.array(too_long_R), broken


def _split_all(values: pa.Array) -> tuple[pa.Array, pa.Array]:
    """`split_features` of strings (R,): list<string> (R,), and bool (R,), true where it finds none."""
    values = pc.fill_null(values, "")
    special = pc.match_substring_regex(values, r"^\s*[\[({]")
    parted = pc.split_pattern_regex(values, _PARTED.pattern)
    if not pc.any(special).as_py():
        return parted, special
    lists, broken = parted.to_pylist(), special.to_pylist()
    for row in np.flatnonzero(special.to_numpy(zero_copy_only=False)).tolist():
        found = split_features(values[row].as_py())
        lists[row], broken[row] = found or [], found is None
    return pa.array(lists, pa.list_(pa.string())), pa.array(broken)


def _first_of_best(worth_S: np.ndarray, row_S: np.ndarray, n_rows: int) -> np.ndarray:
    """(R,) the first of each row's sentences with the highest worth; -1 for a row without any."""
    chosen_R = np.full(n_rows, -1)
    starts = np.flatnonzero(np.diff(row_S, prepend=-1))
    if len(starts):
        highest = np.repeat(np.maximum.reduceat(worth_S, starts), np.diff(starts, append=len(row_S)))
        best = np.flatnonzero(worth_S == highest)[::-1]
        chosen_R[row_S[best]] = best  # of several, the assignment of the first comes last
    return chosen_R


def _is_noun(word: str, evidence: float, occurrences: float) -> bool:
    needed = next((share for suffix, share in SUFFIX_NOUN_SHARES.items() if word.endswith(suffix)), 0.0)
    sure = evidence - math.sqrt(max(evidence, 0.0))
    return sure > MIN_NOUN_SHARE * occurrences and evidence >= needed * occurrences


def _noun_evidence(words: Words, candidate: np.ndarray) -> np.ndarray:
    """float (T,): 1 in the place of a noun, COMPOUND_EVIDENCE at the end of a compound, -1 in the place of a verb.

    In "a cozy, quiet room" a comma follows an adjective, in "tasty food, fast service" a noun: after a comma or
    "and" only words that an adjective precedes count.
    """
    spaced = np.roll(words.gap, 1) == SPACE
    before, after = np.roll(words.code, 1), np.roll(words.code, -1)
    joins = (words.gap == PAUSE) | among(words.distinct, JOINING)[after]
    closes = (words.gap == STOP) | (~joins & among(words.distinct, STOP_WORDS)[after])
    noun = closes & among(words.distinct, DETERMINERS)[before]
    noun |= (closes | joins) & among(words.distinct, DESCRIBERS | OPINIONS)[before]
    compound = closes & candidate[before]
    verb = among(words.distinct, VERB_CUES)[before]
    return spaced * (noun + COMPOUND_EVIDENCE * compound - verb)
