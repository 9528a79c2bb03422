"""What a human evaluation asks (section 4.6, appendix B): criteria, scale, the weights of Eq. 14, and the key.

`export` hands raters blind texts, `results` reads what they made of them; the key, which says what wrote
which text, is all that the two share and is not a rater's business.
"""

from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from gavamoe.artifacts.files import read_json
from gavamoe.errors import InputError, validated

FORMAT = 1
MAX_KEY_BYTES = 64 * 2**20
REFERENCE = "reference"
"""The name under which the references take part, where they do."""


class Criterion(NamedTuple):
    """A column of a rater's sheet."""

    name: str
    letter: str
    question: str
    levels: tuple[str, ...]
    """What 5, 4, 3, 2, 1 mean: the paper's Table 6."""


CRITERIA = (
    Criterion(
        "personalization",
        "P",
        "Does it fit this user's tastes, as their earlier reviews show them?",
        (
            "perfectly aligned with the user's preferences, deep understanding of individual tastes",
            "strong alignment, minor misalignments",
            "moderate alignment, some noticeable misalignments",
            "weak alignment, significant misalignments",
            "no alignment",
        ),
    ),
    Criterion(
        "quality",
        "Q",
        "Is it clear, coherent and correct?",
        (
            "exceptionally clear, coherent and well structured, no errors",
            "clear and coherent, minimal issues",
            "generally clear, some issues with coherence or structure",
            "notable issues with clarity, coherence or structure",
            "unclear, incoherent or poorly structured",
        ),
    ),
    Criterion(
        "satisfaction",
        "U",
        "Would it move this user to do something about the item?",
        (
            "highly engaging, likely to prompt immediate interaction or action",
            "engaging, likely to prompt interaction",
            "somewhat engaging, may prompt interaction",
            "unlikely to prompt interaction",
            "likely to discourage interaction",
        ),
    ),
)
SCALE = tuple(step / 2 for step in range(2, 11))
"""1 to 5 in half points."""
WEIGHTS = (0.4, 0.3, 0.3)
"""Lambda of Eq. 14 for personalization, quality and satisfaction."""


class KeyText(BaseModel):
    """One text and who wrote it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str
    row: int
    """Row number in the split."""
    systems: tuple[str, ...]
    """More than one where they wrote the same."""


class Key(BaseModel):
    """Content of the key file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: int
    dataset: str
    """Fingerprint."""
    split: str
    seed: int
    systems: tuple[str, ...]
    texts: tuple[KeyText, ...]


def read_key(path: Path) -> Key:
    """Read a key file.

    Raises:
        InputError: it is missing, damaged, or of a newer format.
    """
    value = read_json(path, max_bytes=MAX_KEY_BYTES)
    key = validated(Key, value, path, "the key of a human evaluation")
    if key.format > FORMAT:
        raise InputError(f"{path}: format {key.format} is newer than {FORMAT}, the newest known here; update gavamoe")
    if len({text.id for text in key.texts}) < len(key.texts):
        raise InputError(f"{path}: an id occurs twice; the key is damaged")
    return key
