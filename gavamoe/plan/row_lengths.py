"""The workload of a plan, taken from a dataset."""

from pathlib import Path

import numpy as np

from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import open_dataset
from gavamoe.errors import InputError
from gavamoe.stage2.tokenized_rows import encode_rows, prompt_builder, rows_with_text

SAMPLE = 2000
"""Rows that are tokenised to know the lengths."""


def measure_dataset(
    config: RunConfig, dataset: Path, lengths: tuple[float, float]
) -> tuple[int, int, int, tuple[float, float]]:
    """Known users and items, training rows with a text, and mean tokens of prompt and answer.

    Args:
        lengths: taken where the base model's tokenizer is not at hand.
    """
    data = open_dataset(dataset)
    rows = rows_with_text(data, "train")
    chosen = np.sort(np.random.default_rng(config.seed).permutation(rows)[:SAMPLE])
    try:
        builder = prompt_builder(config, data)
    except InputError:
        pass
    else:
        sample = encode_rows(builder, data, "train", chosen)
        lengths = (float(sample.prompts.lengths.mean()), float(sample.answers.lengths.mean()))
    catalog = data.catalog
    return catalog.known_users, catalog.known_items, len(rows), lengths
