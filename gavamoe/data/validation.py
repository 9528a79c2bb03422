"""First pass over a source: every row is accepted or rejected with a reason; texts go to a file, the rest to arrays.

Memory: about 40 bytes a row, the distinct ids, and the batches that are being judged.
"""

import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Set
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from gavamoe.data.judging import Judged, OrderedMap, Rules, filled, judge, rejections, run_here
from gavamoe.data.readers.batches import AnyBatch, RawBatch, Rejection, UnreadBatch
from gavamoe.data.readers.formats import TextMode
from gavamoe.data.text.features import Vocabulary, WordCounts
from gavamoe.data.text.spool import TextSpool
from gavamoe.data.user_ids import UserIds
from gavamoe.data.writer import StringEncoder
from gavamoe.errors import InputError


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

    def add(self, batches: Iterable[AnyBatch], run: OrderedMap = run_here, *, pairs: bool = False) -> Iterator[int]:
        """Accept or reject the rows of all batches; yields the number of rows read, after each batch.

        Args:
            run: judges batches, and first reads those that are not read yet, perhaps side by side; what comes of it is
                taken over in their order.
            pairs: the rows are of a second file, of pairs without text.

        Raises:
            InputError: the source has no texts, or has ratings or features in later rows only.
        """
        self._of_pairs = pairs
        under_way: deque[tuple[Rules, RawBatch | None]] = deque()

        def jobs() -> Iterator[tuple[Rules, np.ndarray | None, dict[str, pa.Array] | UnreadBatch]]:
            for batch in batches:
                if isinstance(batch, UnreadBatch) and self._settled_unread(batch):
                    under_way.append((self._rules(), None))
                    yield self._rules(), None, replace(batch, glance=None)
                elif (left := self._settled(batch.read() if isinstance(batch, UnreadBatch) else batch)) is not None:
                    under_way.append((self._rules(), left))
                    yield self._rules(), left.row, left.columns

        for found in run(judge, (self.user_ids,), jobs()):
            rules, batch = under_way.popleft()
            if batch is not None:
                self._take_over(found, rejections(batch, found.code, rules))
            else:
                self._count(found.rows, found.last_row, found.notes, found.left_out)
                if not pairs and found.columns:
                    self._settle_columns(found.columns, found.first_row)
                self._take_over(found.judged, found.rejected)
            yield self.read

    def _settled_unread(self, batch: UnreadBatch) -> bool:
        """Whether it is known which columns the source has, which decides how rows are judged, if need be by a glance
        at these rows."""
        if self._featured is None and batch.glance is not None and not self._of_pairs and (found := batch.glance()):
            self._settle_columns(found, 1)
        return self._featured is not None

    def _settled(self, batch: RawBatch) -> RawBatch | None:
        """The rows that are left to be judged, with what is known of the source before them; None: there are none."""
        left, left_out = self.user_ids.apply(batch)
        self._count(len(batch.row) + len(batch.broken), batch.last_row, batch.notes, left_out)
        if not self._of_pairs and len(left.row):
            self._settle_columns(left.columns.keys(), int(left.row[0]))
        return filled(left) if len(left.row) or left.broken else None

    def _count(self, rows: int, last_row: int, notes: tuple[str, ...], left_out: np.ndarray) -> None:
        self.read += rows
        self.last_row = max(self.last_row, last_row)
        self.notes += notes
        self.user_ids.count(left_out)

    def _rules(self) -> Rules:
        return Rules(
            self._text_mode,
            self._scale,
            bool(self._rated),
            bool(self._featured),
            self._keep_textless,
            self._of_pairs,
        )

    def _take_over(self, judged: Judged, rejected: list[Rejection]) -> None:
        """Number the accepted rows' users and items, keep their values, and write down why the others were not.

        What is kept is copied: arrays of another process lie in memory that is to be free again.
        """
        self.texts_cut += judged.texts_cut
        self.pointed_ids += judged.pointed_ids
        self.times += judged.times
        self.unknown_times += judged.unknown_times
        self.first_unknown_time = self.first_unknown_time or judged.first_unknown_time
        for rejection in rejected:
            self.rejected[rejection.reason] += 1
            self.first_rejection = self.first_rejection or rejection
            self._log.write(json.dumps(rejection._asdict(), ensure_ascii=False) + "\n")
        values = (judged.row, judged.rating, judged.time, judged.has_text)
        row, rating, time, has_text = (value.copy() for value in values)
        user, item = self.users.merge(judged.user), self.items.merge(judged.item)
        self._parts.append(AcceptedRows(row, user, item, rating, time, has_text))
        if judged.titles:
            code = self.items.encode(judged.item.dictionary)
            for place, title in judged.titles.items():
                self.titles.setdefault(int(code[place]), title)
        if judged.words is not None:
            self._words.add(judged.words)
        self._spool.add(judged.block)

    def accepted(self) -> AcceptedRows:
        """All accepted rows, in order."""
        if not self._parts:
            return AcceptedRows(
                *(np.empty(0, dtype=kind) for kind in (np.int64, np.int32, np.int32, np.float32, np.float64, np.bool_))
            )
        if len(self._parts) > 1:
            self._parts = [AcceptedRows(*(np.concatenate(parts) for parts in zip(*self._parts, strict=True)))]
        return self._parts[0]

    @property
    def rated(self) -> bool:
        """Whether the rows so far have ratings."""
        return bool(self._rated)

    def vocabulary(self) -> Vocabulary | None:
        """The features found in the texts; None where the source gives them or has no texts."""
        return None if self._featured or self._text_mode == "none" else Vocabulary.from_counts(self._words)

    def spooled(self) -> Iterator[pa.Buffer]:
        """Texts and given features of the accepted rows, in order, batch by batch, packed."""
        return self._spool.read()

    def remove_spool(self) -> None:
        """Delete the file of texts."""
        self._spool.remove()

    def _settle_columns(self, columns: Set[str], row: int) -> None:
        """Take note of the columns of a batch that has rows, the first of which has the number `row`."""
        if "text" not in columns and self._text_mode != "none" and self._featured is None:
            raise InputError(
                "the source has no text column; name it with --column text=NAME, or take pairs without text with "
                "text mode none (--text-mode none)"
            )
        for name, settled in (("rating", self._rated), ("features", self._featured)):
            if settled is False and name in columns:
                raise InputError(f"row {row}: the first rows have no {name} and later rows do; map or drop it")
        self._rated = self._rated or "rating" in columns
        self._featured = self._featured or "features" in columns
        if self._featured and self._text_mode == "review":
            raise InputError(
                "text mode review chooses a sentence by the features it finds, but the source gives features: "
                "use text mode explanation or leave the features column out"
            )
