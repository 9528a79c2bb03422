"""The judgment of a batch of rows: which are accepted, or why not, with cleaned values and counted words.

A function of the batch and of what was settled before it alone, so that batches can be read and judged side by side.

Shape letters: R rows of a batch, A of them accepted.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gavamoe.data.bounds import (
    MAX_EXPLANATION_CHARS,
    MAX_FEATURE_CHARS,
    MAX_ID_CHARS,
    MAX_REVIEW_CHARS,
    MAX_TITLE_CHARS,
)
from gavamoe.data.readers.batches import RawBatch, Rejection, UnreadBatch, parse_numbers, shorten
from gavamoe.data.readers.formats import TextMode
from gavamoe.data.text.cleaning import clean, clean_id, clean_review, too_long, unmarked
from gavamoe.data.text.features import CountedWords, count_words, given_features
from gavamoe.data.text.spool import FEATURE_LISTS, packed
from gavamoe.data.times import parse_times
from gavamoe.data.user_ids import UserIds

_LONG_ID = {field: f"{field} id longer than {MAX_ID_CHARS} characters" for field in ("user", "item")}
_LONG_FEATURE = f"feature longer than {MAX_FEATURE_CHARS} characters"
_NO_LIST = "features begin like a list and are none"
REASONS = (
    "",
    "user missing",
    _LONG_ID["user"],
    "user id malformed",
    "item missing",
    _LONG_ID["item"],
    "item id malformed",
    "rating missing",
    "rating not a number",
    "rating off scale",
    "text missing",
    _LONG_FEATURE,
    _NO_LIST,
)
"""Reasons of a rejection by their code, of which the first that applies is given; 0: the row is accepted."""


OrderedMap = Callable[[Callable[..., Any], tuple[Any, ...], Iterable[tuple[Any, ...]]], Iterator[Any]]
"""Calls a module-level function as `function(*shared, *job)` for every job; results come in the jobs' order."""


def run_here(function: Callable[..., Any], shared: tuple[Any, ...], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """One job after the other, in this process."""
    return (function(*shared, *job) for job in jobs)


class Rules(NamedTuple):
    """What decides of a row, beside its values."""

    text_mode: TextMode
    scale: tuple[float, float] | None
    """Lowest and highest rating allowed; None: any."""
    rated: bool
    """Every row must have a rating."""
    featured: bool
    """The source gives features."""
    keep_textless: bool
    """A row without a text is accepted."""
    of_pairs: bool
    """The rows are of the file of pairs."""


class Judged(NamedTuple):
    """What a batch of R rows holds, of which A are accepted."""

    code: np.ndarray
    """Position of each row's reason in REASONS; 0: accepted. int8 (R,)."""
    row: np.ndarray
    """Row numbers of the accepted rows, as all that follows: int64 (A,)."""
    user: pa.DictionaryArray
    """Ids, in a dictionary in order of first appearance: (A,)."""
    item: pa.DictionaryArray
    rating: np.ndarray
    """float32 (A,), NaN where there is none."""
    time: np.ndarray
    """float64 (A,), NaN where there is none or it is not understood."""
    has_text: np.ndarray
    """Whether there is a text, or none is wanted of any row: bool (A,)."""
    block: pa.Buffer
    """Texts, string (A,), and given features, list<string> (A,), empty where the source gives none; packed."""
    titles: dict[int, str]
    """Titles by place in the dictionary of items, each the first row's."""
    texts_cut: int
    pointed_ids: int
    """Ids such as 12.0."""
    times: int
    """Rows with a time, understood or not."""
    unknown_times: int
    first_unknown_time: tuple[int, str] | None
    """Row number and value of the first time that is not understood."""
    words: CountedWords | None
    """The words of the accepted rows' texts; None where no features are sought in them."""


class Intake(NamedTuple):
    """A batch that was read and judged in one go."""

    rows: int
    """Rows of the batch, those that could not be read included."""
    first_row: int
    """Number of the first row that was read and not left out; 0 where there is none."""
    last_row: int
    """The last row number; 0 where there are no rows."""
    notes: tuple[str, ...]
    columns: frozenset[str]
    """Fields that the batch has; empty where it has no rows."""
    left_out: np.ndarray
    """What `UserIds.count` takes."""
    rejected: list[Rejection]
    """In order."""
    judged: Judged


def judge(
    ids: UserIds, rules: Rules, row: np.ndarray | None, batch: dict[str, pa.Array] | UnreadBatch
) -> Judged | Intake:
    """Judge the rows of a batch.

    Args:
        ids: which users are left out, and how ids are hashed: of a batch that is still to be read.
        row: row numbers, int64 (R,).
        batch: columns as in `RawBatch`, or the batch that is first to be read.
    """
    if isinstance(batch, dict):
        return _judged(rules, np.empty(0, dtype=np.int64) if row is None else row, batch)
    read = batch.read()
    left, left_out = ids.apply(read)
    judged = _judged(rules, left.row, filled(left).columns)
    return Intake(
        len(read.row) + len(read.broken),
        int(left.row[0]) if len(left.row) else 0,
        read.last_row,
        read.notes,
        frozenset(left.columns if len(left.row) else ()),
        left_out,
        rejections(left, judged.code, rules),
        judged,
    )


def filled(batch: RawBatch) -> RawBatch:
    """The batch with columns of ids also where all of its rows were broken or left out."""
    return (
        batch if len(batch.row) else batch._replace(columns=dict.fromkeys(("user", "item"), pa.array([], pa.string())))
    )


def rejections(batch: RawBatch, code: np.ndarray, rules: Rules) -> list[Rejection]:
    """The rows that could not be read, and those whose code, int8 (R,), says why they are rejected, in order."""
    before = "pairs: " if rules.of_pairs else ""
    judged = [
        Rejection(int(batch.row[at]), before + REASONS[code[at]], batch.show(at))
        for at in np.flatnonzero(code).tolist()
    ]
    return sorted(judged + batch.broken, key=lambda rejection: rejection.row)


def _judged(rules: Rules, row: np.ndarray, columns: dict[str, pa.Array]) -> Judged:
    count = len(row)
    reasons = _Reasons(count)
    pointed = 0
    ids = []
    for field in ("user", "item"):
        cleaned, missing, long, malformed = clean_id(columns[field])
        reasons.mark(missing, f"{field} missing")
        reasons.mark(long, _LONG_ID[field])
        reasons.mark(malformed, f"{field} id malformed")
        pointed += pc.sum(pc.match_substring_regex(cleaned, r"^\d+\.0$")).as_py() or 0
        ids.append(cleaned)
    rating = _ratings(rules, columns, count, reasons)
    text, cut = _texts(rules, columns, count, reasons)
    features = _features(rules, columns, count, reasons)
    time, times, unknown, first = _times(columns, count)
    accepted = reasons.code == 0
    mask = pa.array(accepted)
    text = text.filter(mask)
    user, item = (each.filter(mask).dictionary_encode() for each in ids)
    return Judged(
        code=reasons.code,
        row=row[accepted],
        user=user,
        item=item,
        rating=rating[accepted],
        time=time[accepted],
        has_text=pc.not_equal(text, "").to_numpy(zero_copy_only=False) | (rules.text_mode == "none"),
        block=packed(text, features.filter(mask)),
        titles=_titles(columns, item, mask),
        texts_cut=cut,
        pointed_ids=pointed,
        times=times,
        unknown_times=unknown,
        first_unknown_time=None if first is None else (int(row[first[0]]), first[1]),
        words=None if rules.featured or rules.text_mode == "none" else count_words(text),
    )


def _titles(columns: dict[str, pa.Array], item: pa.DictionaryArray, mask: pa.Array) -> dict[int, str]:
    if "title" not in columns:
        return {}
    titles = clean(columns["title"].filter(mask), MAX_TITLE_CHARS)
    places, first = np.unique(item.indices.to_numpy(), return_index=True)
    found = zip(places.tolist(), titles.take(pa.array(first)).to_pylist(), strict=True)
    return {place: title for place, title in found if title}


def _ratings(rules: Rules, columns: dict[str, pa.Array], count: int, reasons: "_Reasons") -> np.ndarray:
    if not rules.rated:
        return np.full(count, np.nan, dtype=np.float32)
    values = columns.get("rating", pa.nulls(count, pa.float64()))
    number, bad = parse_numbers(values)
    reasons.mark(_blank(values), "rating missing")
    reasons.mark(bad, "rating not a number")
    if rules.scale is not None:
        low, high = rules.scale
        reasons.mark(pc.or_(pc.less(number, low), pc.greater(number, high)), "rating off scale")
    else:  # beyond what a float32 holds
        reasons.mark(pc.greater(pc.abs(number), 1e30), "rating off scale")
    found: np.ndarray = pc.fill_null(number, float("nan")).to_numpy().astype(np.float32)
    return found


def _texts(rules: Rules, columns: dict[str, pa.Array], count: int, reasons: "_Reasons") -> tuple[pa.Array, int]:
    """The texts, and how many are too long to be kept whole."""
    if rules.text_mode == "none" or rules.of_pairs:
        return pa.array([""] * count, pa.string()), 0
    text = columns.get("text", pa.nulls(count, pa.string()))
    if rules.text_mode == "review":
        cut = too_long(text, MAX_REVIEW_CHARS)
        text = clean_review(unmarked(text))
    else:
        cut = too_long(text, MAX_EXPLANATION_CHARS)
        text = clean(text, MAX_EXPLANATION_CHARS)
    if rules.keep_textless:
        return pc.fill_null(text, ""), cut
    reasons.mark(pc.or_kleene(pc.is_null(text), pc.equal(text, "")), "text missing")
    return text, cut


def _features(rules: Rules, columns: dict[str, pa.Array], count: int, reasons: "_Reasons") -> pa.Array:
    if not rules.featured or rules.of_pairs:
        return pa.array([[]] * count, FEATURE_LISTS)
    features, long, broken = given_features(columns.get("features", pa.nulls(count, pa.string())))
    reasons.mark(long, _LONG_FEATURE)
    reasons.mark(broken, _NO_LIST)
    return features


def _times(columns: dict[str, pa.Array], count: int) -> tuple[np.ndarray, int, int, tuple[int, str] | None]:
    """Times, how many rows have one, how many of these are not understood, and the first of them; none is rejected."""
    if "time" not in columns:
        return np.full(count, np.nan), 0, 0, None
    seconds, unknown = parse_times(columns["time"])
    unknowns = pc.sum(unknown).as_py() or 0
    first = None
    if unknowns:
        at = pc.index(unknown, True).as_py()
        first = at, shorten(str(columns["time"][at].as_py()))
    known = len(seconds) - seconds.null_count
    return pc.fill_null(seconds, float("nan")).to_numpy(), known + unknowns, unknowns, first


class _Reasons:
    """The first reason that applies to each row."""

    def __init__(self, count: int) -> None:
        self.code = np.zeros(count, dtype=np.int8)

    def mark(self, mask: pa.Array, reason: str) -> None:
        """Give `reason` to the rows of `mask` (null: no) that have none yet."""
        marked = pc.fill_null(mask, False).to_numpy(zero_copy_only=False)
        self.code[marked & (self.code == 0)] = REASONS.index(reason)


def _blank(values: pa.Array) -> pa.Array:
    if pa.types.is_string(values.type):
        return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), True)
    return pc.is_null(values)
