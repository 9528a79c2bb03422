"""What a comparison of systems found: means over seeds, differences to the full system, who may be ranked together."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from gavamoe.artifacts.files import read_json
from gavamoe.artifacts.run import METRICS_FILE, RunFolder
from gavamoe.errors import validated
from gavamoe.evaluation.faithfulness.measure import FAITHFULNESS
from gavamoe.evaluation.losses.differences import LossComparison, Reading, find_differences
from gavamoe.evaluation.losses.row_losses import RowLosses
from gavamoe.evaluation.losses.verdict import verdict
from gavamoe.evaluation.metrics.registry import METRICS
from gavamoe.evaluation.metrics_file import read_metrics, renamed

System = TypeVar("System")
COMPARISON_FILE = "comparison.json"
REFERENCE = "full"
"""What the others are compared with, where it is among them; else the first."""


class Score(NamedTuple):
    """A number that a comparison shows."""

    name: str
    label: str
    arrow: str
    definition: str


EXTRA = (
    Score("validation_loss", "valid. loss", "↓", "nats per answer token on validation rows, rating and features given"),
    Score("user_ari", "groups (ARI)", "↑", "recovery of the planted user groups by stage 1 (synthetic)"),
    Score("parameters", "parameters", "", "of explainer and stage 1 together; of a baseline, its own"),
    Score("trained_parameters", "trained", "", "parameters that are trained"),
    Score("cpu_seconds", "CPU s", "", "CPU time of all optimizer steps"),
    Score("loss_at_equal_time", "loss, equal time", "↓", "validation loss in the CPU time of the fastest system"),
    Score("tokens_written_per_second", "tokens/s written", "↑", "tokens of explanations written in a second"),
)
TABLE = (
    "bleu_4", "rouge_l", "peter_bleu_4", "bertscore_f", "distinct_2", "usr", "fmr", "rmse", "validation_loss",
    "sentiment_agreement", "style_of_group", "item_hallucination", "memorized", "changes_with_user", "wrong_gate_gap",
    "route_best", "loss_at_equal_time", "parameters", "trained_parameters", "cpu_seconds", "tokens_written_per_second",
)  # fmt: skip
"""Scores of the table, as far as they were measured; scores.csv has all."""
SHORT = ("bleu_4", "rouge_l", "fmr", "rmse", "validation_loss")
"""Scores that fit a terminal of 80 columns."""
FIGURE = ("bleu_4", "bertscore_f", "rouge_l", "validation_loss")
"""Panels of the figure, as far as they were measured: the paper's two first."""


class Outcome(BaseModel):
    """One system under one seed."""

    model_config = ConfigDict(frozen=True)
    system: str
    label: str
    what: str
    seed: int
    trained: bool
    """False: it copies, and its one outcome stands for every seed."""
    folder: str
    """Relative to the comparison's folder."""
    rows: int
    scores: dict[str, float | None]
    intervals: dict[str, list[float]]
    """95 % bootstrap over rows, by score."""
    told: bool = True
    """Whether it reads rating or features of a request."""
    predicted: dict[str, float | None] | None = None
    """Scores of the second protocol, where both were evaluated."""
    predicted_intervals: dict[str, list[float]] = {}
    curve: list[tuple[float, float]] = []
    """Its validations: CPU time until there, loss."""


class ChosenRate(BaseModel):
    """A system's learning rate, as a factor of its config's, chosen on validation."""

    model_config = ConfigDict(frozen=True)
    factor: float
    losses: dict[float, float]
    """Validation loss by factor."""

    @property
    def at_the_edge(self) -> bool:
        """Whether a factor beyond those tried might be better."""
        return self.factor in (min(self.losses), max(self.losses))


class Comparison(BaseModel):
    """Content of comparison.json."""

    model_config = ConfigDict(frozen=True)
    dataset: str
    fingerprint: str
    config: dict[str, Any]
    outcomes: list[Outcome]
    skipped: dict[str, str]
    """Systems that make no sense here, with the reason."""
    left: list[str]
    """Runs that the time limit left for a later call."""
    rates: dict[str, ChosenRate] = {}
    """Learning rates by system, where they were chosen on validation."""
    losses: LossComparison | None = None
    """Systems compared by the losses of the same rows; None where they were not read."""


class Mean(NamedTuple):
    """Over the seeds."""

    mean: float
    half: float | None
    """Half the width of the 95 % t interval; None for one seed."""
    seeds: int

    def text(self, signed: bool = False) -> str:
        """ "26.40 ± 0.21"."""
        sign = "+" if signed else ""
        if abs(self.mean) >= 1000:
            return f"{self.mean:{sign},.0f}"
        digits = 2 if abs(self.mean) >= 10 else 3
        body = f"{self.mean:{sign}.{digits}f}"
        return body if self.half is None else f"{body} ± {self.half:.{digits}f}"


def read_outcome(name: str, label: str, what: str, seed: int, folder: Path, *, told: bool = True) -> Outcome:
    """The numbers of an evaluated run folder R/SYSTEM/seed-S."""
    metrics = read_metrics(RunFolder(folder).evaluation / METRICS_FILE)
    trained = [path for kind in ("stage2", "baseline") if (path := folder / kind / METRICS_FILE).is_file()]
    own: dict[str, float | None] = {}
    curve: list[tuple[float, float]] = []
    for path in trained:
        model = read_json(path)
        own |= {key: model.get(key) for key in _OF_TRAINING}
        losses = [one["loss"] for one in model.get("validation_losses", [])]
        seconds = model.get("validation_cpu_seconds", [])
        # A run that an earlier version began knows the times of its last validations alone.
        curve = list(zip(seconds, losses, strict=True)) if len(seconds) == len(losses) else []
    scores, intervals = _section_scores(metrics)
    second = metrics.get("predicted")
    predicted, predicted_intervals = _section_scores(second) if second else (None, {})
    return Outcome(
        told=told,
        predicted=None if predicted is None else predicted | own,
        predicted_intervals=predicted_intervals,
        curve=curve,
        system=name,
        label=label,
        what=what,
        seed=seed,
        trained=bool(trained),
        folder=f"{folder.parent.name}/{folder.name}",
        rows=metrics["rows"],
        scores=scores | own,
        intervals=intervals,
    )


_OF_TRAINING = ("validation_loss", "parameters", "trained_parameters", "cpu_seconds")


def _section_scores(section: dict[str, Any]) -> tuple[dict[str, float | None], dict[str, list[float]]]:
    """Scores of one protocol's texts, and the intervals of those that have one."""
    scores: dict[str, float | None] = dict(section["metrics"])
    intervals = dict(section["intervals"])
    scores["user_ari"] = (section.get("planted") or {}).get("user_ari")
    if section.get("seconds_writing"):
        scores["tokens_written_per_second"] = section["tokens_written"] / section["seconds_writing"]
    for key, score in section["faithfulness"]["scores"].items() if section.get("faithfulness") else ():
        scores[key] = score["value"] if score else None
        if score and score["interval"]:
            intervals[key] = score["interval"]
    return scores, intervals


def at_equal_time(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The same with the lowest validation loss that each had in the CPU time of the fastest one."""
    ends = [outcome.curve[-1][0] for outcome in outcomes if outcome.curve and outcome.curve[-1][0]]
    if len(ends) < 2:
        return list(outcomes)
    found = []
    for outcome in outcomes:
        losses = [loss for seconds, loss in outcome.curve if 0 < seconds <= min(ends)]
        equal = {"loss_at_equal_time": min(losses, default=None)} if outcome.curve else {}
        predicted = None if outcome.predicted is None else outcome.predicted | equal
        found.append(outcome.model_copy(update={"scores": outcome.scores | equal, "predicted": predicted}))
    return found


GIVEN, PAIR = "Told rating and features", "Told user and item alone"


def apart_by_told(
    systems: Sequence[System], told: Callable[[System], bool], guessed: Callable[[System], System | None]
) -> list[tuple[str, list[System]]]:
    """Systems that may be ranked together, with a title: what is told a row's features writes them, so systems that
    read these stand apart from those that don't.

    Args:
        told: whether a system was told the rating and features.
        guessed: the system with what it wrote when told user and item alone; where all have that, all stand in the
            second block too.
    """
    given, guesses = [system for system in systems if told(system)], [guessed(system) for system in systems]
    pair = [guess for guess in guesses if guess is not None]
    if len(pair) < len(systems):
        pair = [system for system in systems if not told(system)]
    return [(title, own) for title, own in ((GIVEN, given), (PAIR, pair)) if own]


def blocks(comparison: Comparison) -> list[tuple[str, Comparison]]:
    """Systems that may be ranked together, as comparisons of their own with a title."""
    protocol = comparison.config.get("evaluation", {}).get("protocol")

    def guessed(outcome: Outcome) -> Outcome | None:
        if protocol != "both" or outcome.predicted is None:
            return None
        return outcome.model_copy(update={"scores": outcome.predicted, "intervals": outcome.predicted_intervals})

    found = apart_by_told(comparison.outcomes, lambda outcome: outcome.told and protocol != "predicted", guessed)
    return [(title, comparison.model_copy(update={"outcomes": own})) for title, own in found]


def compare_losses(outcomes: Sequence[Outcome], folder: Path, seed: int) -> LossComparison | None:
    """The systems that have losses of rows, against the reference; None without two of them.

    Raises:
        InputError: systems read other rows than the reference, or a file of losses is damaged.
    """
    readings = [
        Reading(outcome.system, outcome.label, outcome.seed, losses)
        for outcome in outcomes
        if (losses := RowLosses.read(RunFolder(folder / outcome.folder).evaluation)) is not None
    ]
    names = list(dict.fromkeys(reading.system for reading in readings))
    if len(names) < 2:
        return None
    reference = REFERENCE if REFERENCE in names else names[0]
    own = [reading for reading in readings if reading.system == reference]
    differences, unpaired = find_differences(readings, reference, seed)
    return LossComparison(
        reference=reference,
        label=own[0].label,
        losses=_mean_losses([reading.losses for reading in own]),
        differences=differences,
        unpaired=unpaired,
        verdict=verdict(differences, own[0].label) if reference == REFERENCE else [],
    )


def _mean_losses(seeds: Sequence[RowLosses]) -> dict[str, dict[str, float]]:
    """Nats per token by condition and group, mean over the seeds that have it."""
    values: dict[str, dict[str, list[float]]] = {}
    for losses in seeds:
        for condition, groups in losses.summary().items():
            for group, cell in groups.items():
                values.setdefault(condition, {}).setdefault(group, []).append(cell["loss"])
    return {
        condition: {group: float(np.mean(found)) for group, found in groups.items()}
        for condition, groups in values.items()
    }


def read_comparison(folder: Path) -> Comparison:
    """What `write_comparison` left in `folder`.

    Raises:
        InputError: it is not there, or not whole.
    """
    path = Path(folder) / COMPARISON_FILE
    comparison = validated(Comparison, read_json(path), path, "a comparison of systems")
    outcomes = [
        outcome.model_copy(update={"scores": renamed(outcome.scores), "intervals": renamed(outcome.intervals)})
        for outcome in comparison.outcomes
    ]
    return comparison.model_copy(update={"outcomes": outcomes})


def systems_of(comparison: Comparison) -> dict[str, list[Outcome]]:
    """Outcomes by system, in the comparison's order."""
    by_system: dict[str, list[Outcome]] = {}
    for outcome in comparison.outcomes:
        by_system.setdefault(outcome.system, []).append(outcome)
    return by_system


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and 95 % t interval of the values of several seeds."""
    from scipy.stats import t  # type: ignore[import-untyped]  # comes with scikit-learn, without stubs

    count = len(values)
    if count < 2:
        return Mean(float(np.mean(values)), None, count)
    half = float(t.ppf(0.975, count - 1)) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Mean(float(np.mean(values)), half, count)


def means(outcomes: Sequence[Outcome], score: str) -> Mean | None:
    """A system's mean of a score; None where a seed does not have it."""
    values = [outcome.scores.get(score) for outcome in outcomes]
    known = [value for value in values if value is not None]
    return mean_of(known) if known and len(known) == len(values) else None


def interval_of(outcomes: Sequence[Outcome], score: str, mean: Mean) -> tuple[float, float]:
    """Ends of the interval over seeds; of the bootstrap over rows for one seed, where there is such an interval."""
    if mean.half is not None:
        return mean.mean - mean.half, mean.mean + mean.half
    low, high = outcomes[0].intervals.get(score, [mean.mean, mean.mean])
    return low, high


def difference(outcomes: Sequence[Outcome], reference: Sequence[Outcome], score: str) -> Mean | None:
    """Mean of the differences to the reference under the same seed; None without a common seed."""
    ours = {outcome.seed: outcome.scores.get(score) for outcome in outcomes}
    theirs = {outcome.seed: outcome.scores.get(score) for outcome in reference}
    if not outcomes[0].trained:
        ours = dict.fromkeys(theirs, next(iter(ours.values())))
    gaps = [
        value - other
        for seed, value in ours.items()
        for other in [theirs.get(seed)]
        if value is not None and other is not None
    ]
    return mean_of(gaps) if gaps else None


def shown_scores(comparison: Comparison, names: Sequence[str]) -> list[Score]:
    """Those of `names` that some outcome has."""
    extra = {score.name: score for score in EXTRA}
    measured = {**METRICS, **FAITHFULNESS}
    return [
        extra.get(name) or Score(name, measured[name].label, measured[name].arrow, measured[name].definition)
        for name in names
        if any(outcome.scores.get(name) is not None for outcome in comparison.outcomes)
    ]


def table(comparison: Comparison, names: Sequence[str] = TABLE) -> tuple[list[str], list[list[str]]]:
    """Heads and cells: a row a system, mean and interval over the seeds."""
    scores = shown_scores(comparison, names)
    rows = []
    for outcomes in systems_of(comparison).values():
        averages = [means(outcomes, score.name) for score in scores]
        cells = ["-" if one is None else one.text() for one in averages]
        rows.append([outcomes[0].label, str(len(outcomes)), *cells])
    return ["system", "seeds", *(f"{score.label} {score.arrow}".strip() for score in scores)], rows


def difference_table(comparison: Comparison, names: Sequence[str] = TABLE) -> tuple[list[str], list[list[str]]]:
    """The same, less the reference's under the same seed; a star where the interval leaves out 0."""
    systems = systems_of(comparison)
    reference = systems.get(REFERENCE) or next(iter(systems.values()))
    scores = [score for score in shown_scores(comparison, names) if score.name != "parameters"]
    rows = []
    for outcomes in systems.values():
        if outcomes is reference:
            continue
        gaps = [difference(outcomes, reference, score.name) for score in scores]
        rows.append([outcomes[0].label, *("-" if gap is None else gap.text(signed=True) + _star(gap) for gap in gaps)])
    return [f"less {reference[0].label}", *(f"{score.label} {score.arrow}".strip() for score in scores)], rows


def _star(gap: Mean) -> str:
    return " *" if gap.half is not None and abs(gap.mean) > gap.half else ""
