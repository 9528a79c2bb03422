"""What `data prepare` found and wrote, in counts."""

import numpy as np
from pydantic import BaseModel, ConfigDict


class Quartiles(BaseModel):
    """A fourth, half and three fourths of the values are at most these."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    low: int
    """Lower quartile."""
    median: int
    """Median."""
    high: int
    """Upper quartile."""

    @classmethod
    def of_counts(cls, counts: np.ndarray) -> "Quartiles | None":
        """Those of a histogram: how often 0, 1, 2, ... occur. None where nothing does."""
        if not counts.sum():
            return None
        low, median, high = np.searchsorted(np.cumsum(counts), counts.sum() * np.array([0.25, 0.5, 0.75])).tolist()
        return cls(low=low, median=median, high=high)


class PrepareSummary(BaseModel):
    """Counts of a source's rows, by what became of them, and the sizes of the dataset."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    read: int
    """Number of rows of the source."""
    kept: int
    """Number of rows in the dataset."""
    rejected: dict[str, int]
    """Number of rejected rows by reason; each row is in rejected.jsonl."""
    repeated_pairs: int
    """Number of good rows left out because a later row has the same user and item."""
    dropped: int
    """Number of rows left out because their user is to be left out."""
    in_no_index: int
    """Number of good rows that no index file names."""
    unknown_times: int
    """Number of rows whose time is not understood; of repeated pairs they count as the earliest."""
    texts_cut: int
    """Number of texts that were longer than the bound, and shortened."""
    without_text: int
    """Number of kept rows that are pairs without a text, by choice."""
    repeated_texts: int
    """Number of kept rows whose text was taken out, since their user wrote most of it about an earlier row's item."""
    without_feature: int
    """Number of kept rows in whose text no feature was found or given."""
    vocabulary: int
    """Number of features that the extractor found; 0 where the source gives them."""
    rows: dict[str, int]
    """Number of rows by split."""
    users: int
    """Number of users."""
    items: int
    """Number of items."""
    titles: int
    """Number of items with a title."""
    fingerprint: str
    """Fingerprint of the dataset: SHA-256 over its data files."""
    sentence: str | None
    """Rule that chose each review's sentence as its explanation: best or frequent; None where none was chosen."""
    words: Quartiles | None
    """Number of words of the explanations of kept rows; None without texts."""
    notes: list[str]
    """What the user should know about how the source was read."""
