"""BERTScore by the package bert-score: raw, and the floor that raw values have on the same references.

Raw values lie high: two unrelated sentences of one field score .4 to .9, depending on the model. The floor is the
score of references against other rows' references; rescaled, a raw value x becomes (x - floor) / (1 - floor), so that
an unrelated sentence of the field has 0 and the reference itself 1.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gavamoe.errors import InputError, one_line
from gavamoe.evaluation.metrics.registry import is_empty

FLOOR_PAIRS = 500
"""Pairs of mismatched references that the floor is the mean of, at most."""

_UNBOUNDED = 2**20
"""Tokens of a text at most where the model sets no bound: a number that any tokenizer can take."""


@dataclass(frozen=True)
class BertScore:
    """BERTScore of N rows, raw, and what computed it."""

    values: np.ndarray
    """(N, 3) float64: precision, recall, F; zeros where the candidate or the reference is empty."""
    model: str
    layer: int
    floor: np.ndarray | None = None
    """(3,): means over mismatched references; None where all references are alike."""
    floor_pairs: int = 0

    def rows(self, chosen: slice) -> "BertScore":
        """The same of some of the rows."""
        return replace(self, values=self.values[chosen])

    def described(self) -> dict[str, Any]:
        """What a reader must know to compare values."""
        floor = None if self.floor is None else dict(zip(("p", "r", "f"), map(float, self.floor), strict=True))
        return {"model": self.model, "layer": self.layer, "floor": floor, "floor_pairs": self.floor_pairs}


def bert_score(
    candidates: Sequence[str],
    references: Sequence[str],
    model: str,
    layer: int = 0,
    *,
    batch_size: int = 64,
    seed: int = 0,
) -> BertScore:
    """BERTScore by bert-score: raw, without idf.

    Args:
        model: hub id, or folder of a Hugging Face encoder.
        layer: whose states are compared; 0: bert-score's own choice for ids it knows, else the model's last.
        seed: of the pairs of references that the floor is measured on.

    Raises:
        InputError: bert-score is not installed, or the model or the layer does not exist.
    """
    try:
        from bert_score import BERTScorer
    except ImportError as error:
        raise InputError("BERTScore needs the package bert-score: pip install 'gavamoe[bertscore]'") from error
    layer = _layer(model, layer)
    # bert-score fails on an empty text with some tokenizers; the score of saying nothing is 0 by definition.
    spoken = [i for i, pair in enumerate(zip(candidates, references, strict=True)) if not any(map(is_empty, pair))]
    values = np.zeros((len(candidates), 3))
    if not spoken:
        return BertScore(values, model, layer)
    mismatched = mismatched_pairs(references, FLOOR_PAIRS, seed)
    first_texts = [candidates[i] for i in spoken] + [pair[0] for pair in mismatched]
    second_texts = [references[i] for i in spoken] + [pair[1] for pair in mismatched]
    try:
        scorer = BERTScorer(model_type=model, num_layers=layer, batch_size=batch_size)
        _limit_length(scorer)
        parts = scorer.score(first_texts, second_texts, batch_size=batch_size)
    except (OSError, ValueError, AssertionError, OverflowError) as error:
        raise InputError(f"BERTScore model {model}: cannot be used ({one_line(error, 200)})") from error
    scored = np.stack([part.double().numpy() for part in parts], axis=1)
    values[spoken] = scored[: len(spoken)]
    floor = scored[len(spoken) :].mean(axis=0) if mismatched else None
    return BertScore(values, model, layer, floor, len(mismatched))


def mismatched_pairs(references: Sequence[str], most: int, seed: int) -> list[tuple[str, str]]:
    """Each of at most `most` different references with the next one in a random order; [] for fewer than two."""
    different = sorted({text for text in references if not is_empty(text)})
    if len(different) < 2:
        return []
    order = np.random.default_rng(seed).permutation(len(different))[:most]
    return [(different[one], different[other]) for one, other in zip(order, np.roll(order, 1), strict=True)]


def _limit_length(scorer: Any) -> None:
    """Have texts cut where the model's positions end, also where its tokenizer names no length, or a longer one.

    A tokenizer that names none has 10^30 for it, which its own library can't take.
    """
    tokenizer = scorer._tokenizer
    positions = getattr(scorer._model.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        positions = _UNBOUNDED  # relative positions, as T5 has them
    else:
        # RoBERTa's positions count from after the padding token's id, so that many are not used.
        table = getattr(getattr(scorer._model, "embeddings", None), "position_embeddings", None)
        unused = getattr(table, "padding_idx", None)
        positions -= 0 if unused is None else unused + 1
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)


def _layer(model: str, layer: int) -> int:
    """The layer to use, checked against the model."""
    from bert_score.utils import model2layers
    from transformers import AutoConfig

    if layer == 0 and model in model2layers:
        return int(model2layers[model])
    folder = Path(model)
    if folder.exists() and not (folder / "config.json").is_file():
        raise InputError(f"BERTScore model {model}: no Hugging Face model folder (config.json is missing)")
    try:
        # Without the word False transformers would ask whether to run code of the model's.
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise InputError(
            f"BERTScore model {model}: neither a local folder nor available from the hub ({one_line(error, 200)})"
        ) from error
    if "t5" in model and "t5" not in config.model_type:
        raise InputError(
            f"BERTScore model {model}: bert-score takes any name with 't5' for a T5 model; rename the folder"
        )
    layers = int(getattr(config, "num_hidden_layers", 0))
    if layer > layers:
        raise InputError(f"BERTScore layer {layer}: {model} has {layers} layers")
    return layer or layers
