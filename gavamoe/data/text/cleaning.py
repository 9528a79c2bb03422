"""Cleaning of texts, ids and titles, vectorized: control characters, whitespace, bounds, sentences.

All functions take and return Arrow string arrays. Nothing here escapes or parses markup: special tokens of a
language model inside a text are dealt with where texts are tokenized.

Shape letters: R rows, S sentences.
"""

import html

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gavamoe.data.bounds import MAX_ID_CHARS, MAX_REVIEW_CHARS, MAX_SENTENCE_CHARS

SCAN_FACTOR = 4
"""Raw characters looked at per character kept, before whitespace is folded."""

# direction overrides and the byte-order mark can make a text display as something else
_INVISIBLE = "[\u202a-\u202e\u2066-\u2069\ufeff]"
_BLANKS = r"[\p{Cc}\p{Z}]+"
_NEWLINE = "\x1e"  # a control character, so none is left once blanks are folded
_DOT = "\x1f"
_ABBREVIATION = r"\b((?i:mr|mrs|ms|dr|prof|st|mt|vs|approx|e\.g|i\.e)|[A-Z])\.\s+"
_OPEN_ABBREVIATION = (
    r"\b((?i:oz|lbs?|ft|ml|cl|etc|jr|sr|ave|inc|incl|co|ltd|dept|min|max|[ap]\.m)\.)\s+([\p{Ll}\p{N}])"
    r"|\b((?i:no|vol)\.)\s+(\p{N})"
)
"""May end a sentence too; they do not where the next word has a small letter or is a number."""
_SENTENCE_END = "([.!?…]+[\"')\\]”’]*)\\s+"
_GLUED = "(\\p{Ll}\\p{Ll}|[\\p{N})\"])([.!?…]+)(\\p{Lu}[\\p{Ll}'’ ])"
"""The end of a sentence right before the next, as where paragraphs were joined ("period.Then" in Amazon's reviews)."""


def clean(text: pa.Array, max_chars: int) -> pa.Array:
    """Texts without control characters, with single blanks, at most `max_chars` long, cut between words. Nulls stay."""
    text = pc.utf8_slice_codeunits(text, 0, max_chars * SCAN_FACTOR)
    text = pc.replace_substring_regex(text, _INVISIBLE, "")
    text = pc.utf8_trim(pc.replace_substring_regex(text, _BLANKS, " "), " ")
    return cut(text, max_chars)


def cut(text: pa.Array, max_chars: int) -> pa.Array:
    """Texts of at most `max_chars`, cut before the word that crosses the bound."""
    long = pc.fill_null(pc.greater(pc.utf8_length(text), max_chars), False)
    if not pc.any(long).as_py():
        return text
    # the extra character tells a word that ends at the bound from one that crosses it
    head = pc.utf8_slice_codeunits(text.filter(long), 0, max_chars + 1)
    whole = pc.utf8_trim(pc.replace_substring_regex(head, r"\s\S*$", ""), " ")
    return pc.replace_with_mask(text, long, pc.utf8_slice_codeunits(whole, 0, max_chars))


def too_long(text: pa.Array, max_chars: int) -> int:
    """How many texts have more than `max_chars` characters."""
    return int(pc.sum(pc.greater(pc.utf8_length(text), max_chars)).as_py() or 0)


def unmarked(text: pa.Array) -> pa.Array:
    """Texts of web pages without line-break tags and character entities (`<br />` and `&amp;` in Amazon reviews)."""
    text = pc.replace_substring_regex(text, r"(?i)<br\s*/?>", "\n")
    coded = pc.fill_null(pc.match_substring(text, "&"), False)
    if not pc.any(coded).as_py():
        return text
    plain = [html.unescape(value) for value in text.filter(coded).to_pylist()]
    return pc.replace_with_mask(text, coded, pa.array(plain, pa.string()))


def clean_review(text: pa.Array) -> pa.Array:
    """Like `clean` for whole reviews, with line ends kept as sentence ends for `sentences`."""
    text = pc.utf8_slice_codeunits(text, 0, MAX_REVIEW_CHARS)
    text = pc.replace_substring_regex(text, _INVISIBLE, "")
    text = pc.replace_substring_regex(text, r"\s*[\r\n\x{2028}\x{2029}]+\s*", "\n")
    text = pc.replace_substring_regex(text, r"\n([^\p{Lu}\p{N}*•-])", r" \1")  # a wrapped line, no sentence end
    text = pc.replace_substring_regex(text, r"[^\P{Cc}\n]+|[^\P{Z}\n]+", " ")
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(text, " {2,}", " "))


def sentences(text: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Split reviews cleaned by `clean_review`.

    Returns:
        sentences string (S,), each at most MAX_SENTENCE_CHARS, and int64 (S,) the review each came from.
    """
    text = pc.replace_substring_regex(text, _GLUED, "\\1\\2\n\\3")
    text = pc.replace_substring_regex(text, _ABBREVIATION, rf"\1.{_DOT}")
    text = pc.replace_substring_regex(text, _OPEN_ABBREVIATION, rf"\1\3{_DOT}\2\4")
    text = pc.replace_substring_regex(text, _SENTENCE_END, r"\1" + "\n")
    parts = pc.split_pattern(text, "\n")
    row = pc.list_parent_indices(parts).to_numpy()
    flat = pc.utf8_trim_whitespace(pc.replace_substring(pc.list_flatten(parts), _DOT, " "))
    full = pc.not_equal(flat, "")
    return cut(flat.filter(full), MAX_SENTENCE_CHARS), row[full.to_numpy(zero_copy_only=False)]


def clean_id(raw: pa.Array) -> tuple[pa.Array, pa.Array, pa.Array, pa.Array]:
    """Trimmed ids with three masks: missing (null or blank), longer than MAX_ID_CHARS, with control
    characters or line separators."""
    trimmed = pc.utf8_trim_whitespace(raw)
    missing = pc.fill_null(pc.equal(trimmed, ""), True)
    long = pc.fill_null(pc.greater(pc.utf8_length(trimmed), MAX_ID_CHARS), False)
    malformed = pc.fill_null(pc.match_substring_regex(trimmed, r"[\p{Cc}\p{Zl}\p{Zp}]"), False)
    return trimmed, missing, long, malformed
