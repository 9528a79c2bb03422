"""The rows that an evaluation looks at: which ones, what is asked for them, and how they are written down."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gavamoe.data.dataset import Dataset, PairArrays
from gavamoe.errors import InputError

if TYPE_CHECKING:
    from gavamoe.generation.generator import Explanation
    from gavamoe.generation.request import ExplanationRequest


@dataclass(frozen=True)
class EvaluatedRows:
    """The evaluated rows of a split, in the split's order."""

    index: np.ndarray
    """int64 (N,): positions in the split."""
    pairs: PairArrays
    references: list[str]
    features: list[list[str]]

    def take(self, places: np.ndarray) -> "EvaluatedRows":
        """Some of the rows, by their places among these."""
        return EvaluatedRows(
            index=self.index[places],
            pairs=PairArrays(*(column[places] for column in self.pairs)),
            references=[self.references[place] for place in places],
            features=[self.features[place] for place in places],
        )


def select_rows(dataset: Dataset, split: str, limit: int, seed: int) -> EvaluatedRows:
    """All rows of a split that have a text, or `limit` of them drawn by the seed, in the split's order; all its rows
    where none has."""
    if dataset.size(split) == 0:
        raise InputError(f"{dataset.path}: the {split} split has no rows to evaluate")
    written = pc.greater(pc.utf8_length(dataset.table(split, ["text"])["text"]), 0).fill_null(False).to_numpy()
    index = np.flatnonzero(written) if written.any() else np.arange(len(written))
    if 0 < limit < len(index):
        index = np.sort(np.random.default_rng(seed).choice(index, limit, replace=False))
    table = dataset.table(split, ["text", "features"]).take(pa.array(index))
    return EvaluatedRows(
        index=index,
        pairs=PairArrays(*(column[index] for column in dataset.arrays(split))),
        references=[text or "" for text in table["text"].to_pylist()],
        features=[row or [] for row in table["features"].to_pylist()],
    )


def requests_of(rows: EvaluatedRows, protocol: str) -> "list[ExplanationRequest]":
    """given: the row's rating (if it has one) and features; predicted: neither."""
    from gavamoe.generation.request import ExplanationRequest

    pairs = zip(rows.pairs.user.tolist(), rows.pairs.item.tolist(), strict=True)
    if protocol == "predicted":
        return [ExplanationRequest(user=user, item=item) for user, item in pairs]
    return [
        ExplanationRequest(
            user=user, item=item, rating=None if np.isnan(rating) else float(rating), features=tuple(features)
        )
        for (user, item), rating, features in zip(pairs, rows.pairs.rating, rows.features, strict=True)
    ]


def sparsity_thirds(user: np.ndarray, training_rows: np.ndarray) -> dict[str, np.ndarray]:
    """Row positions of ds1 (most frequent users), ds2, ds3 (least frequent) and zero_shot (never in training).

    As in section 4.5.4: rows are ordered by their user's training rows and cut in three equal parts, which differ
    by one row at most. Ties go by user index, so a user at a border may have rows on both sides.

    Args:
        user: (N,) user index of each row; `training_rows`: (N,) training rows of that user.
    """
    known = np.flatnonzero(training_rows > 0)
    order = known[np.lexsort((user[known], -training_rows[known]))]
    thirds = {f"ds{number}": np.sort(part) for number, part in enumerate(np.array_split(order, 3), start=1)}
    return thirds | {"zero_shot": np.flatnonzero(training_rows == 0)}


def summary_of(dataset: Dataset) -> dict[str, Any]:
    """The paper's Table 1 for the dataset, so that a report needs no data."""
    meta = dataset.meta
    rows = sum(meta.rows.values())
    return {
        "name": dataset.path.name,
        "source": meta.source,
        "format": meta.format,
        "fingerprint": dataset.fingerprint,
        "users": meta.users,
        "items": meta.items,
        "rows": rows,
        "rows_by_split": dict(meta.rows),
        "rows_per_user": rows / meta.users,
        "rows_per_item": rows / meta.items,
        "density_percent": 100 * rows / (meta.users * meta.items),
        "zero_shot_users": meta.users - meta.known_users,
        "zero_shot_items": meta.items - meta.known_items,
        "rating_range": list(meta.rating_range) if meta.rating_range else None,
        "implicit": meta.implicit,
        "seed": meta.seed,
        "split": meta.split,
    }


def generations_table(
    dataset: Dataset, split: str, rows: EvaluatedRows, explanations: "Sequence[Explanation]"
) -> pa.Table:
    """One row a text: what was asked, what was written, what it should have been, and which way it went."""
    catalog = dataset.catalog
    users, items = rows.pairs.user.tolist(), rows.pairs.item.tolist()
    columns = {
        "split": pa.array([split] * len(users), pa.string()),
        "row": pa.array(rows.index, pa.int64()),
        "user": pa.array([catalog.user_id(user) for user in users], pa.string()),
        "item": pa.array([catalog.item_id(item) for item in items], pa.string()),
        "title": pa.array([catalog.item_title(item) for item in items], pa.string()),
        "rating": pa.array(rows.pairs.rating, pa.float32(), from_pandas=True),
        "predicted_rating": pa.array([e.predicted_rating for e in explanations], pa.float32(), from_pandas=True),
        "features": pa.array(rows.features, pa.list_(pa.string())),
        "prompt_features": pa.array([list(e.features) for e in explanations], pa.list_(pa.string())),
        "reference": pa.array(rows.references, pa.string()),
        "generated": pa.array([e.text for e in explanations], pa.string()),
        "cluster": pa.array([e.cluster for e in explanations], pa.int16()),
        "responsibilities": pa.array([list(e.responsibilities) for e in explanations], pa.list_(pa.float32())),
        "user_known": pa.array([e.user_known for e in explanations], pa.bool_()),
        "item_known": pa.array([e.item_known for e in explanations], pa.bool_()),
    }
    return pa.table(columns)
