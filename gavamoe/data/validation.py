"""First pass over a source: every row is accepted or rejected with a reason; texts go to a file, the rest to arrays.

Memory: about 40 bytes a row, the distinct ids, and one batch.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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
from gavamoe.data.readers.batches import RawBatch, Rejection, parse_numbers, shorten
from gavamoe.data.readers.formats import TextMode
from gavamoe.data.text.cleaning import clean, clean_id, clean_review, too_long, unmarked
from gavamoe.data.text.features import Vocabulary, WordCounts, given_features
from gavamoe.data.text.spool import FEATURE_LISTS, TextSpool
from gavamoe.data.times import parse_times
from gavamoe.data.user_ids import UserIds
from gavamoe.data.writer import StringEncoder
from gavamoe.errors import InputError

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


class AcceptedRows(NamedTuple):
    """The accepted rows, without their texts."""

    row: np.ndarray
    """Row numbers in the source, from 1: int64 (N,)."""
    user: np.ndarray
    """User codes: int32 (N,)."""
    item: np.ndarray
    """Item codes: int32 (N,)."""
    rating: np.ndarray
    """Ratings, NaN where there is none: float32 (N,)."""
    time: np.ndarray
    """Times, NaN where there is none: float64 (N,)."""
    has_text: np.ndarray
    """Whether there is a text, or none is wanted of any row: bool (N,)."""


class RowValidator:
    """Accepts or rejects the rows of the batches given to `add`; a context manager that closes its files."""

    def __init__(
        self,
        folder: Path,
        text_mode: TextMode,
        scale: tuple[float, float] | None,
        rated: bool,
        ids: UserIds | None = None,
        keep_textless: bool = False,
    ) -> None:
        """
        Args:
            folder: where `rejected.jsonl` stays and the spool of texts lies until it is removed.
            scale: lowest and highest rating allowed; None: any.
            rated: every row must have a rating, whether or not the source has such a column.
            ids: which users are left out, and how ids are hashed.
            keep_textless: a row without a text is accepted, as a pair that stage 1 alone trains on.
        """
        self._keep_textless = keep_textless
        self.user_ids = ids or UserIds()
        self.users, self.items = StringEncoder(), StringEncoder()
        self.titles: dict[int, str] = {}
        """Titles by item code."""
        self.read = 0
        self.last_row = 0
        """The last row number, which blank lines make larger than `read`."""
        self.rejected: Counter[str] = Counter()
        self.first_rejection: Rejection | None = None
        self.texts_cut = 0
        self.times = 0
        """Rows with a time, understood or not."""
        self.unknown_times = 0
        """Rows whose time is not understood."""
        self.first_unknown_time: tuple[int, str] | None = None
        """Row number and time of the first of these."""
        self.pointed_ids = 0
        """Ids such as 12.0, which were whole numbers before a program wrote them as fractions."""
        self.notes: list[str] = []
        """What the reader says about the source."""
        self._text_mode: TextMode = text_mode
        self._of_pairs = False
        """Whether the batch at hand is of the file of pairs."""
        self._scale = scale
        self._rated: bool | None = True if rated else None
        self._featured: bool | None = None
        self._parts: list[AcceptedRows] = []
        self._words = WordCounts()
        self._spool = TextSpool(folder / "texts.arrow")
        self._log = open(folder / "rejected.jsonl", "w", encoding="utf-8")  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> "RowValidator":
        return self

    def __exit__(self, *exception: object) -> None:
        self._spool.close()
        self._log.close()

    def add(self, batch: RawBatch, *, pairs: bool = False) -> None:
        """Accept or reject each row of a batch.

        Args:
            pairs: the rows are of a second file, of pairs without text.

        Raises:
            InputError: the source has no texts, or has ratings or features in later rows only.
        """
        self._of_pairs = pairs
        count = len(batch.row)
        self.read += count + len(batch.broken)
        ends = [rejection.row for rejection in batch.broken] + batch.row[-1:].tolist()
        self.last_row = max(self.last_row, *ends, 0)
        self.notes += batch.notes
        batch = self.user_ids.apply(batch)
        count = len(batch.row)
        if not count:
            self._reject(batch, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int8))
            return
        if not pairs:
            self._settle_columns(batch)
        reasons = _Reasons(count)
        user, item = (self._ids(batch, field, reasons) for field in ("user", "item"))
        rating = self._ratings(batch, reasons)
        text = self._texts(batch, reasons)
        features = self._features(batch, reasons)
        time = self._times(batch)
        accepted = reasons.code == 0
        self._reject(batch, np.flatnonzero(~accepted), reasons.code[~accepted])
        mask = pa.array(accepted)
        items = self.items.encode(item.filter(mask))
        self._parts.append(
            AcceptedRows(
                batch.row[accepted],
                self.users.encode(user.filter(mask)),
                items,
                rating[accepted],
                time[accepted],
                pc.not_equal(text.filter(mask), "").to_numpy(zero_copy_only=False) | (self._text_mode == "none"),
            )
        )
        self._keep_titles(batch, items, mask)
        self._spool_texts(text.filter(mask), features.filter(mask))

    def accepted(self) -> AcceptedRows:
        """All accepted rows, in order."""
        if not self._parts:
            return AcceptedRows(
                *(np.empty(0, dtype=kind) for kind in (np.int64, np.int32, np.int32, np.float32, np.float64, np.bool_))
            )
        return AcceptedRows(*(np.concatenate(parts) for parts in zip(*self._parts, strict=True)))

    @property
    def rated(self) -> bool:
        """Whether the rows so far have ratings."""
        return bool(self._rated)

    def vocabulary(self) -> Vocabulary | None:
        """The features found in the texts; None where the source gives them or has no texts."""
        return None if self._featured or self._text_mode == "none" else Vocabulary.from_counts(self._words)

    def spooled(self) -> Iterator[tuple[pa.Array, pa.Array]]:
        """text string (R,) and given features list<string> (R,) of the accepted rows, in order, batch by batch."""
        return self._spool.read()

    def remove_spool(self) -> None:
        """Delete the file of texts."""
        self._spool.remove()

    def _settle_columns(self, batch: RawBatch) -> None:
        if "text" not in batch.columns and self._text_mode != "none" and self._featured is None:
            raise InputError(
                "the source has no text column; name it with --column text=NAME, or take pairs without text with "
                "text mode none (--text-mode none)"
            )
        for name, settled in (("rating", self._rated), ("features", self._featured)):
            if settled is False and name in batch.columns:
                raise InputError(f"row {batch.row[0]}: the first rows have no {name} and later rows do; map or drop it")
        self._rated = self._rated or "rating" in batch.columns
        self._featured = self._featured or "features" in batch.columns
        if self._featured and self._text_mode == "review":
            raise InputError(
                "text mode review chooses a sentence by the features it finds, but the source gives features: "
                "use text mode explanation or leave the features column out"
            )

    def _ids(self, batch: RawBatch, field: str, reasons: "_Reasons") -> pa.Array:
        ids, missing, long, malformed = clean_id(batch.columns[field])
        reasons.mark(missing, f"{field} missing")
        reasons.mark(long, _LONG_ID[field])
        reasons.mark(malformed, f"{field} id malformed")
        self.pointed_ids += pc.sum(pc.match_substring_regex(ids, r"^\d+\.0$")).as_py() or 0
        return ids

    def _ratings(self, batch: RawBatch, reasons: "_Reasons") -> np.ndarray:
        """float32 (R,), NaN where there is none."""
        if not self._rated:
            return np.full(len(batch.row), np.nan, dtype=np.float32)
        values = batch.columns.get("rating", pa.nulls(len(batch.row), pa.float64()))
        number, bad = parse_numbers(values)
        reasons.mark(_blank(values), "rating missing")
        reasons.mark(bad, "rating not a number")
        if self._scale is not None:
            low, high = self._scale
            reasons.mark(pc.or_(pc.less(number, low), pc.greater(number, high)), "rating off scale")
        else:  # beyond what a float32 holds
            reasons.mark(pc.greater(pc.abs(number), 1e30), "rating off scale")
        return pc.fill_null(number, float("nan")).to_numpy().astype(np.float32)

    def _texts(self, batch: RawBatch, reasons: "_Reasons") -> pa.Array:
        count = len(batch.row)
        if self._text_mode == "none" or self._of_pairs:
            return pa.array([""] * count, pa.string())
        text = batch.columns.get("text", pa.nulls(count, pa.string()))
        if self._text_mode == "review":
            self.texts_cut += too_long(text, MAX_REVIEW_CHARS)
            text = clean_review(unmarked(text))
        else:
            self.texts_cut += too_long(text, MAX_EXPLANATION_CHARS)
            text = clean(text, MAX_EXPLANATION_CHARS)
        if self._keep_textless:
            return pc.fill_null(text, "")
        reasons.mark(pc.or_kleene(pc.is_null(text), pc.equal(text, "")), "text missing")
        return text

    def _features(self, batch: RawBatch, reasons: "_Reasons") -> pa.Array:
        """list<string> (R,): the given features; empty lists where the source gives none."""
        if not self._featured or self._of_pairs:
            return pa.array([[]] * len(batch.row), FEATURE_LISTS)
        features, long, broken = given_features(batch.columns.get("features", pa.nulls(len(batch.row), pa.string())))
        reasons.mark(long, _LONG_FEATURE)
        reasons.mark(broken, _NO_LIST)
        return features

    def _times(self, batch: RawBatch) -> np.ndarray:
        """float64 (R,), NaN where there is none or it is not understood; these are counted, not rejected."""
        if "time" not in batch.columns:
            return np.full(len(batch.row), np.nan)
        seconds, unknown = parse_times(batch.columns["time"])
        count = pc.sum(unknown).as_py() or 0
        self.times += len(seconds) - seconds.null_count + count
        if count and self.first_unknown_time is None:
            at = pc.index(unknown, True).as_py()
            self.first_unknown_time = int(batch.row[at]), shorten(str(batch.columns["time"][at].as_py()))
        self.unknown_times += count
        return pc.fill_null(seconds, float("nan")).to_numpy()

    def _reject(self, batch: RawBatch, rows: np.ndarray, codes: np.ndarray) -> None:
        judged = [
            Rejection(int(batch.row[row]), ("pairs: " if self._of_pairs else "") + REASONS[code], batch.show(row))
            for row, code in zip(rows.tolist(), codes.tolist(), strict=True)
        ]
        for rejection in sorted(judged + batch.broken, key=lambda rejection: rejection.row):
            self.rejected[rejection.reason] += 1
            self.first_rejection = self.first_rejection or rejection
            self._log.write(json.dumps(rejection._asdict(), ensure_ascii=False) + "\n")

    def _keep_titles(self, batch: RawBatch, items: np.ndarray, mask: pa.Array) -> None:
        if "title" not in batch.columns:
            return
        titles = clean(batch.columns["title"].filter(mask), MAX_TITLE_CHARS)
        codes, first = np.unique(items, return_index=True)
        for code, title in zip(codes.tolist(), titles.take(pa.array(first)).to_pylist(), strict=True):
            if title:
                self.titles.setdefault(code, title)

    def _spool_texts(self, text: pa.Array, features: pa.Array) -> None:
        if not self._featured and self._text_mode != "none":
            self._words.add(text)
        self._spool.add(text, features)


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
