"""What n-gram scores hide: features, sentiment, copies, personalization, gates. Section "faithfulness" of metrics.json.

Each score is a mean over rows, with a bootstrap interval; beside it stand the same measure on the human references and
what chance would give, where either exists. Cost is bounded: TEXT_ROWS rows for what reads texts, and
`evaluation.probe_rows` for what runs the model again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gavamoe.data.dataset import Dataset
from gavamoe.evaluation.faithfulness.features import Mentions, feature_set
from gavamoe.evaluation.faithfulness.gates import GateProbe
from gavamoe.evaluation.faithfulness.memorization import MAX_TRAINING_TEXTS, NEAR, TrainingTexts
from gavamoe.evaluation.faithfulness.sentiment import SentimentReader, agreement, by_sentiment, reader_of
from gavamoe.evaluation.faithfulness.training_texts import sampled_texts
from gavamoe.evaluation.faithfulness.user_swaps import UserSwaps, Write, changed, swap_users, user_alignment
from gavamoe.evaluation.metrics.registry import Metric, by_name, is_empty, words
from gavamoe.evaluation.planted_truth import style_of
from gavamoe.evaluation.significance import balanced_interval, mean_interval
from gavamoe.generation.authorship import SingleAuthors

if TYPE_CHECKING:
    from gavamoe.generation.generator import Explanation
    from gavamoe.generation.request import ExplanationRequest

TEXT_ROWS = 2000
EXAMPLES = 5

FAITHFULNESS = by_name(
    Metric("feature_precision", "Feature precision", "higher", "%", "features a text names that are the row's own"),
    Metric("feature_recall", "Feature recall", "higher", "%", "the row's features that its text names"),
    Metric("sentiment_agreement", "Sentiment agreement", "higher", "%", "texts with the sentiment of the true rating"),
    Metric("sentiment_balanced", "The same, balanced", "higher", "%", "mean over the sentiments that ratings have"),
    Metric(
        "item_hallucination",
        "Item hallucination",
        "lower",
        "%",
        "texts with a feature that only other items have",
    ),
    Metric("repeats", "Repeats itself", "lower", "%", "texts with the same four words in a row twice"),
    Metric("memorized", "Memorized", "lower", "%", "texts that stand in the training split word for word"),
    Metric(
        "single_author",
        "One other user's text",
        "lower",
        "%",
        "texts that exactly one other user wrote in the training split, word for word",
    ),
    Metric("near_memorized", "Nearly memorized", "lower", "%", f"texts at least {NEAR:.0%} like a training text"),
    Metric("changes_with_user", "Changes with the user", "higher", "%", "texts that change when the user is swapped"),
    Metric("user_alignment", "User alignment", "higher", "%", "swaps with each text nearer to its own user"),
    Metric("style_of_group", "In the group's style", "higher", "%", "texts in the planted style of their user's group"),
    Metric(
        "wrong_gate_gap",
        "Loss through a wrong gate",
        "higher",
        "nats",
        "mean loss of the other gates less own gate's",
    ),
    Metric("route_best", "Own gate is best", "higher", "%", "references that no other gate gives a lower loss"),
    Metric("expert_entropy", "Entropy of expert use", "higher", "share", "of a gate over its experts; 1 is even"),
    Metric("gate_overlap", "Gate overlap", "lower", "share", "same experts chosen by two gates for a token"),
)

Gates = Callable[["Sequence[ExplanationRequest]", Sequence[str]], GateProbe | None]


@dataclass(frozen=True)
class Written:
    """N rows of a split, what was asked and what was written for them."""

    requests: "Sequence[ExplanationRequest]"
    explanations: "Sequence[Explanation]"
    references: Sequence[str]
    ratings: np.ndarray
    """True ones; NaN without."""
    features: Sequence[Sequence[str]]

    @property
    def texts(self) -> list[str]:
        return [explanation.text for explanation in self.explanations]

    @property
    def users(self) -> np.ndarray:
        return np.array([request.user for request in self.requests], dtype=np.int64)

    @property
    def items(self) -> np.ndarray:
        return np.array([request.item for request in self.requests], dtype=np.int64)

    def sample(self, size: int, seed: int) -> "Written":
        """At most `size` of the rows, drawn by the seed, in their order."""
        rows = np.arange(len(self.requests))
        if len(rows) > size:
            rows = np.sort(np.random.default_rng(seed).choice(len(rows), size, replace=False))
        listed = rows.tolist()
        return Written(
            [self.requests[row] for row in listed],
            [self.explanations[row] for row in listed],
            [self.references[row] for row in listed],
            self.ratings[rows],
            [self.features[row] for row in listed],
        )


def measure_faithfulness(
    written: Written, dataset: Dataset, *, write: Write, gates: Gates | None, probe_rows: int, seed: int
) -> dict[str, Any]:
    """The section "faithfulness": "scores" by name of FAITHFULNESS, and the tables that some of them summarize.

    Args:
        write: makes texts, as those of `written` were made.
        gates: `gates.measure_gates` of the model; None: the writer has none.
        probe_rows: rows whose user is swapped, and whose references are read through every gate.
    """
    texts, probed = written.sample(TEXT_ROWS, seed), written.sample(probe_rows, seed)
    scores = _Scores(seed)
    _features(scores, texts, dataset)
    reader = _sentiment(scores, texts, dataset, seed)
    ours, theirs = (
        np.array([float(repeats_itself(text)) for text in each]) for each in (texts.texts, texts.references)
    )
    scores.add("repeats", ours, references=theirs)
    distinct_training = _memorization(scores, texts, dataset, seed)
    swaps = _personalization(scores, probed, dataset, write, seed)
    gate_probe = gates(probed.requests, probed.references) if gates else None
    if gate_probe is not None:
        _gates(scores, gate_probe)
    return {
        "rows": {"texts": len(texts.requests), "probes": len(probed.requests)},
        "scores": {name: scores.measured.get(name) for name in FAITHFULNESS},
        "sentiment_reader": reader.description if reader else None,
        "training_texts": distinct_training,
        "swaps": _examples(swaps, dataset),
        "gates": gate_probe.summary() if gate_probe else None,
    }


def repeats_itself(text: str, length: int = 4) -> bool:
    """Whether a text has the same `length` words in a row twice."""
    said = words(text)
    grams = [tuple(said[start : start + length]) for start in range(len(said) - length + 1)]
    return len(set(grams)) < len(grams)


class _Scores:
    """Means over rows as they stand in metrics.json; values that are NaN don't count."""

    def __init__(self, seed: int) -> None:
        self.measured: dict[str, dict[str, Any]] = {}
        self._seed = seed

    def add(
        self,
        name: str,
        values: np.ndarray,
        *,
        references: np.ndarray | None = None,
        chance: float | None = None,
        interval: bool = True,
    ) -> None:
        """`interval`: False where the values are no rows, such as the gates."""
        scale = 100.0 if FAITHFULNESS[name].unit == "%" else 1.0
        known = scale * values[~np.isnan(values)]
        human = np.zeros(0) if references is None else scale * references[~np.isnan(references)]
        self.measured[name] = {
            "value": float(known.mean()) if known.size else None,
            "interval": mean_interval(known, seed=self._seed) if interval else None,
            "rows": int(known.size),
            "references": float(human.mean()) if human.size else None,
            "chance": chance,
        }

    def add_balanced(self, name: str, values: np.ndarray, references: np.ndarray, groups: Sequence[np.ndarray]) -> None:
        """The mean over groups of rows (row numbers) of the share of ones in each."""
        parts = [100 * values[rows] for rows in groups]
        self.measured[name] = {
            "value": float(np.mean([part.mean() for part in parts])),
            "interval": balanced_interval(parts, seed=self._seed),
            "rows": sum(map(len, parts)),
            "references": float(np.mean([100 * references[rows].mean() for rows in groups])),
            "chance": 100 / len(groups),
        }


def _features(scores: _Scores, written: Written, dataset: Dataset) -> None:
    known = feature_set(dataset)
    if not known:
        return
    mentions = Mentions(dataset, known)
    wanted = mentions.wanted(written.features, written.references)
    for name, measured in (("feature_precision", mentions.precision), ("feature_recall", mentions.recall)):
        scores.add(name, measured(written.texts, wanted))
    scores.add(
        "item_hallucination",
        mentions.hallucinated(written.texts, written.items, written.features),
        references=mentions.hallucinated(written.references, written.items, written.features),
    )


def _sentiment(scores: _Scores, written: Written, dataset: Dataset, seed: int) -> SentimentReader | None:
    reader = reader_of(dataset, seed)
    if reader is None or np.isnan(written.ratings).all():
        return None
    ours = agreement(reader, written.texts, written.ratings)
    theirs = agreement(reader, written.references, written.ratings)
    groups = by_sentiment(reader, written.ratings)
    rated = sum(map(len, groups.values()))
    scores.add("sentiment_agreement", ours, references=theirs, chance=100 * max(map(len, groups.values())) / rated)
    scores.add_balanced("sentiment_balanced", ours, theirs, list(groups.values()))
    return reader


def _memorization(scores: _Scores, written: Written, dataset: Dataset, seed: int) -> int:
    """Adds the scores; returns how many different training texts there are."""
    texts, _ = sampled_texts(dataset, MAX_TRAINING_TEXTS, seed, "user")
    training = TrainingTexts(texts)
    nearest, human = (
        np.array([np.nan if is_empty(text) else training.similarity(text) for text in texts])
        for texts in (written.texts, written.references)
    )
    for name, least in (("memorized", 1.0), ("near_memorized", NEAR)):
        ours, theirs = (np.where(np.isnan(each), np.nan, each >= least) for each in (nearest, human))
        scores.add(name, ours, references=theirs)
    _single_authors(scores, written, dataset)
    return len(training)


def _single_authors(scores: _Scores, written: Written, dataset: Dataset) -> None:
    table = dataset.table("train", ["user", "text"])
    authors = SingleAuthors.of_texts((text or "" for text in table["text"].to_pylist()), table["user"].to_pylist())
    ours, theirs = (
        np.array(
            [
                np.nan if is_empty(text) else authors.another_wrote(text, user)
                for text, user in zip(texts, written.users.tolist(), strict=True)
            ]
        )
        for texts in (written.texts, written.references)
    )
    scores.add("single_author", ours, references=theirs)


def _personalization(scores: _Scores, written: Written, dataset: Dataset, write: Write, seed: int) -> UserSwaps:
    truth = dataset.truth()
    groups = truth.group if truth else None
    swaps = swap_users(dataset, written.requests, written.explanations, write, groups=groups, seed=seed)
    scores.add("changes_with_user", changed(swaps))
    scores.add("user_alignment", user_alignment(swaps, dataset, seed), chance=50.0)
    if groups is not None and truth is not None:
        by_user = [*zip(swaps.texts, swaps.users, strict=True), *zip(swaps.swapped, swaps.others, strict=True)]
        scores.add(
            "style_of_group",
            np.array([float(style_of(text) == groups[user]) for text, user in by_user]),
            references=np.array(
                [
                    float(style_of(text) == groups[user])
                    for text, user in zip(written.references, written.users, strict=True)
                ]
            ),
            chance=100 / truth.groups,
        )
    return swaps


def _gates(scores: _Scores, probe: GateProbe) -> None:
    entropy = probe.entropy_K()
    scores.add("expert_entropy", entropy, interval=False)
    gates = len(entropy)
    if gates > 1:
        scores.add("wrong_gate_gap", probe.own_gap_N(), chance=0.0)
        scores.add("route_best", probe.own_best_N(), chance=100 / gates)
        pairs = probe.shared_KK[np.triu_indices(gates, 1)]
        scores.add("gate_overlap", pairs, chance=probe.top_k / probe.used_LKE.shape[-1], interval=False)


def _examples(swaps: UserSwaps, dataset: Dataset) -> list[dict[str, Any]]:
    """The first few swaps whose texts differ, by raw ids."""
    catalog = dataset.catalog
    rows = np.flatnonzero(changed(swaps))[:EXAMPLES]
    return [
        {
            "item": catalog.item_id(int(swaps.items[row])),
            "user": catalog.user_id(int(swaps.users[row])),
            "text": swaps.texts[row],
            "other": catalog.user_id(int(swaps.others[row])),
            "swapped": swaps.swapped[row],
        }
        for row in rows
    ]
