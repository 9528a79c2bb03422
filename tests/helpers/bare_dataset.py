"""Datasets made by hand, for what synthetic data can't show."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from gavamoe.data.dataset import Dataset, open_dataset
from gavamoe.data.writer import DatasetWriter, Rows


def bare_dataset(folder: Path, texts: Sequence[str]) -> Dataset:
    """Ten implicit pairs without ratings or features; the last two are valid and test."""
    size = len(texts)
    split = np.array([0] * (size - 2) + [1, 2], dtype=np.int8)
    rows = Rows(
        users=["u", "v"],
        items=[f"i{n}" for n in range(size)],
        titles=[None] * size,
        user=np.array([n % 2 for n in range(size)], dtype=np.int32),
        item=np.arange(size, dtype=np.int32),
        rating=np.full(size, np.nan, dtype=np.float32),
        split=split,
    )
    folder.mkdir()
    with DatasetWriter(folder, rows) as writer:
        writer.write(pa.array(texts, pa.string()), pa.array([[]] * size, pa.list_(pa.string())))
        writer.finish(source="x", format="table", text_mode="explanation", seed=0, split="8:1:1", preparation={})
    return open_dataset(folder)
