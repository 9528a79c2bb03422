"""First pass over a source: every row is accepted or rejected with a reason; texts go to a file, the rest to arrays.

Memory: about 40 bytes a row, the distinct ids, and the batches that are being judged.
"""

import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gavamoe.data.bounds import MAX_TITLE_CHARS
from gavamoe.data.judging import REASONS, Judged, OrderedMap, Rules, judge, run_here
from gavamoe.data.readers.batches import RawBatch, Rejection
from gavamoe.data.readers.formats import TextMode
from gavamoe.data.text.cleaning import clean
from gavamoe.data.text.features import Vocabulary, WordCounts
from gavamoe.data.text.spool import TextSpool
from gavamoe.data.user_ids import UserIds
from gavamoe.data.writer import StringEncoder
from gavamoe.errors import InputError

_NO_STRINGS = pa.array([], pa.string())


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

    def add(self, batches: Iterable[RawBatch], run: OrderedMap = run_here, *, pairs: bool = False) -> Iterator[int]:
        """Accept or reject the rows of all batches; yields the number of rows read, after each batch.

        Args:
            run: judges batches, perhaps side by side; what comes of it is taken over in their order.
            pairs: the rows are of a second file, of pairs without text.

        Raises:
            InputError: the source has no texts, or has ratings or features in later rows only.
        """
        self._of_pairs = pairs
        under_way: deque[RawBatch] = deque()

        def jobs() -> Iterator[tuple[Rules, dict[str, pa.Array]]]:
            for batch in batches:
                if (left := self._settled(batch)) is not None:
                    under_way.append(left)
                    yield self._rules(), left.columns

        for judged in run(judge, (), jobs()):
            self._take_over(under_way.popleft(), judged)
            yield self.read

    def _settled(self, batch: RawBatch) -> RawBatch | None:
        """The rows that are left to be judged, with what is known of the source before them; None: there are none."""
        self.read += len(batch.row) + len(batch.broken)
        ends = [rejection.row for rejection in batch.broken] + batch.row[-1:].tolist()
        self.last_row = max(self.last_row, *ends, 0)
        self.notes += batch.notes
        batch = self.user_ids.apply(batch)
        if not self._of_pairs and len(batch.row):
            self._settle_columns(batch)
        if len(batch.row) or batch.broken:
            return batch if len(batch.row) else batch._replace(columns=dict.fromkeys(("user", "item"), _NO_STRINGS))
        return None

    def _rules(self) -> Rules:
        return Rules(
            self._text_mode,
            self._scale,
            bool(self._rated),
            bool(self._featured),
            self._keep_textless,
            self._of_pairs,
        )

    def _take_over(self, batch: RawBatch, judged: Judged) -> None:
        """Number the accepted rows' users and items, keep their values, and write down why the others were not."""
        self.texts_cut += judged.texts_cut
        self.pointed_ids += judged.pointed_ids
        self.times += judged.times
        self.unknown_times += judged.unknown_times
        if self.first_unknown_time is None and judged.first_unknown_time is not None:
            at, value = judged.first_unknown_time
            self.first_unknown_time = int(batch.row[at]), value
        accepted = judged.code == 0
        self._reject(batch, np.flatnonzero(~accepted), judged.code[~accepted])
        mask = pa.array(accepted)
        items = self.items.encode(judged.item.filter(mask))
        text = judged.text.filter(mask)
        self._parts.append(
            AcceptedRows(
                batch.row[accepted],
                self.users.encode(judged.user.filter(mask)),
                items,
                judged.rating[accepted],
                judged.time[accepted],
                pc.not_equal(text, "").to_numpy(zero_copy_only=False) | (self._text_mode == "none"),
            )
        )
        self._keep_titles(batch, items, mask)
        if judged.words is not None:
            self._words.add(judged.words)
        self._spool.add(text, judged.features.filter(mask))

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
