"""Which way of decoding suits a trained model: a few are tried on validation rows, and the best is kept with it.

`generation.choose` asks for it at the end of training. The choice replaces `generation` in the artifact's manifest,
which `explain`, `evaluate` and the service read; the table of all ways tried stands beside it (`details.decoding`).

The rows are drawn from each sentiment alike, as far as it has rows: of 96 rows of a set that praises, three would be
negative, and chance would choose.

A way's score is the sum of what a reader wants of the texts, each from 0 to 1: nearness to the references (ROUGE-L),
given features that are named, agreement with the rating (the mean over sentiments), less the shares of texts that
repeat themselves and that are training texts word for word. A later way interferes more than an earlier one, so it must
lead by MARGIN, and by more than chance: by two standard errors of the difference, row by row. Beam search is not among
the ways: a service that writes token by token has none. Nor is a least length: a model that may not end its text after
a short sentence goes on with another prompt ("User: ... Rating: ...").
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gavamoe.artifacts.files import read_json, write_json
from gavamoe.artifacts.manifest import MANIFEST, Manifest, read_manifest
from gavamoe.artifacts.run import RunFolder
from gavamoe.config.schema import GenerationConfig, RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.evaluation.faithfulness.features import Mentions, feature_set
from gavamoe.evaluation.faithfulness.measure import repeats_itself
from gavamoe.evaluation.faithfulness.memorization import TrainingTexts
from gavamoe.evaluation.faithfulness.sentiment import SentimentReader, agreement, by_sentiment, reader_of
from gavamoe.evaluation.kept_texts import KeptTexts
from gavamoe.evaluation.metrics.text_scores import aggregate, measure
from gavamoe.evaluation.rows import EvaluatedRows, requests_of, select_rows
from gavamoe.evaluation.writers import open_writer
from gavamoe.stage2.tokenized_rows import rating_scale

ROWS = 96
"""Validation rows that are written for, at most."""
MARGIN = 0.02
"""The least lead that counts: among 96 rows one row of the rarest sentiment is worth .01."""
STANDARD_ERRORS = 2.0
"""Standard errors of the rows' differences that a lead must have as well."""
_SIGNS = {"rouge_l": 1, "feature_recall": 1, "sentiment_balanced": 1, "repeats": -1, "memorized": -1}
"""How the parts enter the score."""
DETAIL = "decoding"
"""Name of the table in the manifest's details."""


def ways(configured: GenerationConfig) -> dict[str, GenerationConfig]:
    """The ways that are tried, by name.

    Args:
        configured: how the config says; what it says of lengths and batches holds for all.
    """
    changes: dict[str, dict[str, Any]] = {
        "as configured": {},
        "no triple twice": {"no_repeat_ngram": 3},
        "penalty": {"no_repeat_ngram": 3, "repetition_penalty": 1.1},
        "sampled": {"no_repeat_ngram": 3, "temperature": 0.7, "top_p": 0.9},
    }
    return {name: configured.model_copy(update=change) for name, change in changes.items()}


def choose_decoding(
    run: Path, config: RunConfig, dataset: Dataset, on_progress: Callable[[int, int], None] | None = None
) -> GenerationConfig | None:
    """Try every way, and keep the best with the run's stage-2 artifact; None where no validation row has a text.

    A choice that was made stays: called again, it is returned.
    """
    stage2 = RunFolder(run).stage2
    manifest = read_manifest(stage2, "stage2", verify=False)
    if DETAIL in manifest.details:
        return GenerationConfig.model_validate(manifest.config["generation"])
    rows = _rows(dataset, config.seed)
    if not any(text.strip() for text in rows.references):
        return None
    tried = ways(config.generation)
    judge = _Judge(dataset, rows, config.seed)
    requests, kept = requests_of(rows, "given"), RunFolder(run).texts_under_way
    worth_N, table = {}, {}
    with open_writer(run.absolute(), config) as (writer, _, _):
        for number, (name, generation) in enumerate(tried.items()):
            texts = KeptTexts(writer, kept, manifest.fingerprint).explain(requests, generation, seed=config.seed)
            parts = judge.worth([written.text for written in texts])
            worth_N[name] = np.sum([_SIGNS[part] * values for part, values in parts.items()], axis=0)
            table[name] = {part: float(values.mean()) for part, values in parts.items()}
            table[name]["score"] = float(worth_N[name].mean())
            if on_progress is not None:
                on_progress(number + 1, len(tried))
    best = _best(worth_N)
    _keep(stage2, manifest, tried[best], {"rows": len(rows.references), "chosen": best, "tried": table})
    shutil.rmtree(kept, ignore_errors=True)
    return tried[best]


def _best(worth_N: dict[str, np.ndarray]) -> str:
    """The first way, unless a later one leads it; then that, unless a still later one does."""
    names = iter(worth_N)
    best = next(names)
    for name in names:
        lead_N = worth_N[name] - worth_N[best]
        chance = STANDARD_ERRORS * lead_N.std(ddof=1) / len(lead_N) ** 0.5 if len(lead_N) > 1 else np.inf
        if lead_N.mean() >= max(MARGIN, chance):
            best = name
    return best


def _rows(dataset: Dataset, seed: int) -> EvaluatedRows:
    """At most ROWS validation rows, the same number of each sentiment, or all that it has."""
    every, scale = select_rows(dataset, "valid", 0, seed), rating_scale(dataset)
    if scale is None or len(every.references) <= ROWS:
        return select_rows(dataset, "valid", ROWS, seed)
    ratings = every.pairs.rating.tolist()
    names = np.array(["" if rating != rating else scale.sentiment(rating) for rating in ratings])
    shuffled = np.random.default_rng(seed).permutation(len(names))
    groups = sorted((shuffled[names[shuffled] == name] for name in set(names.tolist())), key=len)
    taken: list[np.ndarray] = []
    for number, group in enumerate(groups):  # the smallest first: what it lacks is the others'
        left = ROWS - sum(map(len, taken))
        taken.append(group[: left // (len(groups) - number)])
    return every.take(np.sort(np.concatenate(taken)))


class _Judge:
    """Scores texts of the same rows."""

    def __init__(self, dataset: Dataset, rows: EvaluatedRows, seed: int) -> None:
        self._rows, known = rows, feature_set(dataset)
        self._mentions = Mentions(dataset, known) if known else None
        self._reader: SentimentReader | None = None
        if not np.isnan(rows.pairs.rating).all():
            self._reader = reader_of(dataset, seed)
        self._training = TrainingTexts(text or "" for text in dataset.table("train", ["text"])["text"].to_pylist())

    def worth(self, texts: list[str]) -> dict[str, np.ndarray]:
        """By part of the score what each row adds to it: (N,), so weighted that their mean is the part."""
        rows = self._rows
        measured = measure(texts, rows.references)
        overlap = [aggregate(measured, np.array([row]))["rouge_l"] for row in range(len(texts))]
        parts = {"rouge_l": np.array([each or 0.0 for each in overlap]) / 100}
        if self._mentions is not None:
            recall = self._mentions.recall(texts, self._mentions.wanted(rows.features, rows.references))
            parts["feature_recall"] = _spread(recall, [np.flatnonzero(~np.isnan(recall))])
        if self._reader is not None:
            agreed = agreement(self._reader, texts, rows.pairs.rating)
            parts["sentiment_balanced"] = _spread(agreed, list(by_sentiment(self._reader, rows.pairs.rating).values()))
        parts["repeats"] = np.array([float(repeats_itself(text)) for text in texts])
        parts["memorized"] = np.array([float(self._training.has(text)) for text in texts])
        return parts


def _spread(values: np.ndarray, groups: list[np.ndarray]) -> np.ndarray:
    """Values (N,) so weighted that their mean over all rows is the mean of the groups' means."""
    weighted = np.zeros(len(values))
    for group in groups:
        if len(group):
            weighted[group] = values[group] * len(values) / (len(groups) * len(group))
    return weighted


def _keep(stage2: Path, manifest: Manifest, chosen: GenerationConfig, details: dict[str, Any]) -> None:
    """Rewrite the manifest, which is no part of the artifact's fingerprint, whole."""
    values = read_json(stage2 / MANIFEST)
    values["config"]["generation"] = chosen.model_dump(mode="json")
    values["details"] = manifest.details | {DETAIL: details}
    write_json(stage2 / MANIFEST, values)
