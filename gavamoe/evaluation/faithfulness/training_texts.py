"""The one sampler of training texts, which faithfulness is measured against."""

import numpy as np
import pyarrow.compute as pc

from gavamoe.data.dataset import Dataset


def sampled_texts(
    dataset: Dataset, most: int, seed: int, column: str, *, rated: bool = False
) -> tuple[list[str], np.ndarray]:
    """Texts of the training split in its order, and another column of their rows: "user" or "rating".

    Args:
        most: so many rows are drawn by the seed, where there are more.
        rated: take only rows with a rating.
    """
    table = dataset.table("train", [column, "text"])
    values = table[column].to_numpy(zero_copy_only=False)
    written = pc.greater(pc.utf8_length(table["text"]), 0).fill_null(False).to_numpy()
    rows = np.flatnonzero(written & ~np.isnan(values.astype(np.float64)) if rated else written)
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
    return [text or "" for text in table["text"].take(rows).to_pylist()], values[rows]
