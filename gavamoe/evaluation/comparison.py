"""What a comparison of systems found: means over seeds, differences to the full system, the files behind its figure.

comparison.json holds everything; scores.csv one line a system, seed and score; table.md Figure 3's table; figure3.png
its picture; differences.csv and differences.png the losses of the same rows (`losses`), where they were read. All are
made again from the run folders at every call.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from gavamoe.artifacts.csv_files import write_csv
from gavamoe.artifacts.files import read_json, save_png, write_file, write_json
from gavamoe.artifacts.run import METRICS_FILE, RunFolder
from gavamoe.errors import validated
from gavamoe.evaluation.faithfulness.measure import FAITHFULNESS
from gavamoe.evaluation.losses.differences import LossComparison, Reading, find_differences
from gavamoe.evaluation.losses.display import CSV_HEADS, csv_rows, forest_plot, loss_tables
from gavamoe.evaluation.losses.row_losses import CONDITIONS, RowLosses
from gavamoe.evaluation.losses.verdict import verdict
from gavamoe.evaluation.metrics.registry import METRICS
from gavamoe.evaluation.metrics_file import read_metrics, renamed

COMPARISON_FILE, SCORES_FILE, TABLE_FILE, FIGURE_FILE = "comparison.json", "scores.csv", "table.md", "figure3.png"
DIFFERENCES_FILE, FOREST_FILE = "differences.csv", "differences.png"
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
    Score("parameters", "parameters", "", "of explainer and stage 1 together; PETER's own"),
)
TABLE = (
    "bleu_4", "rouge_l", "peter_bleu_4", "bertscore_f", "distinct_2", "usr", "fmr", "rmse", "validation_loss",
    "sentiment_agreement", "style_of_group", "item_hallucination", "memorized", "changes_with_user", "wrong_gate_gap",
    "route_best", "parameters",
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


def read_outcome(name: str, label: str, what: str, seed: int, folder: Path) -> Outcome:
    """The numbers of an evaluated run folder R/SYSTEM/seed-S."""
    metrics = read_metrics(RunFolder(folder).evaluation / METRICS_FILE)
    scores: dict[str, float | None] = dict(metrics["metrics"])
    trained = [path for kind in ("stage2", "baseline") if (path := folder / kind / METRICS_FILE).is_file()]
    for path in trained:
        model = read_json(path)
        scores |= {key: model[key] for key in ("validation_loss", "parameters")}
    scores["user_ari"] = (metrics["planted"] or {}).get("user_ari")
    intervals = dict(metrics["intervals"])
    for key, score in metrics["faithfulness"]["scores"].items() if metrics["faithfulness"] else ():
        scores[key] = score["value"] if score else None
        if score and score["interval"]:
            intervals[key] = score["interval"]
    return Outcome(
        system=name,
        label=label,
        what=what,
        seed=seed,
        trained=bool(trained),
        folder=f"{folder.parent.name}/{folder.name}",
        rows=metrics["rows"],
        scores=scores,
        intervals=intervals,
    )


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


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Write the files named at the top of this file into the existing `folder`."""
    write_json(folder / COMPARISON_FILE, comparison.model_dump(mode="json"))
    rows = (
        (outcome.system, outcome.seed, name, value)
        for outcome in comparison.outcomes
        for name, value in outcome.scores.items()
    )
    write_csv(folder / SCORES_FILE, ("system", "seed", "score", "value"), rows)
    with write_file(folder / TABLE_FILE) as aside:
        aside.write_text(markdown(comparison), encoding="utf-8")
    plot(comparison, folder / FIGURE_FILE)
    if comparison.losses is not None:
        write_csv(folder / DIFFERENCES_FILE, CSV_HEADS, csv_rows(comparison.losses))
        if comparison.losses.differences:
            forest_plot(comparison.losses, folder / FOREST_FILE)


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


def markdown(comparison: Comparison) -> str:
    """The verdict on gates, and all tables with what their numbers are."""
    seeds = max(len(outcomes) for outcomes in systems_of(comparison).values())
    rows = comparison.outcomes[0].rows
    parts = [
        *(comparison.losses.verdict if comparison.losses else []),
        f"{comparison.dataset}, {rows:,} rows, {seeds} seed(s): mean ± half the 95 % t interval over the seeds.",
        _grid(*table(comparison)),
        "Differences under the same seed; * where the interval leaves out 0.",
        _grid(*difference_table(comparison)),
        *(_markdown_losses(comparison.losses) if comparison.losses else []),
        "\n".join(f"- {outcomes[0].label}: {outcomes[0].what}" for outcomes in systems_of(comparison).values()),
    ]
    if comparison.skipped:
        parts.append("\n".join(f"- left out, {name}: {why}" for name, why in comparison.skipped.items()))
    return "\n\n".join(parts) + "\n"


def _markdown_losses(losses: LossComparison) -> list[str]:
    parts = [
        f"Loss of the same rows' own texts: {losses.label}'s in nats a token, then by how much the others' is higher,"
        " by the user's training rows (95 % bootstrap over users; * leaves out 0; above 0, the first is better)."
    ]
    for condition, (heads, rows) in loss_tables(losses).items():
        parts += [f"{condition.capitalize()}: {CONDITIONS[condition]}.", _grid(heads, rows)]
    if losses.unpaired:
        parts.append("\n".join(f"- not compared by loss, {name}: {why}" for name, why in losses.unpaired.items()))
    return parts


def _grid(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def plot(comparison: Comparison, out: Path) -> None:
    """Figure 3 as PNG: a panel a score, a bar a system, a line its interval (see `interval_of`), a dot a seed."""
    from matplotlib.figure import Figure

    systems = list(systems_of(comparison).values())[::-1]
    scores = shown_scores(comparison, FIGURE)
    height = 1.2 + 0.34 * len(systems)
    figure = Figure(figsize=(3.2 + 2.6 * len(scores), height), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(scores), sharey=True))
    for axes, score in zip(panels, scores, strict=True):
        averages = [means(outcomes, score.name) for outcomes in systems]
        for position, (outcomes, one) in enumerate(zip(systems, averages, strict=True)):
            if one is None:
                continue
            low, high = interval_of(outcomes, score.name, one)
            full = outcomes[0].system == REFERENCE
            axes.barh(position, one.mean, color="#0b62c4" if full else "#9fb3c8")
            axes.plot([low, high], [position, position], color="#5b6675", linewidth=1.5)
            dots = [outcome.scores[score.name] for outcome in outcomes]
            axes.plot(dots, [position] * len(dots), ".", color="#1c2430", markersize=4)
        axes.set_title(f"{score.label} {score.arrow}", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(systems)), [outcomes[0].label for outcomes in systems])
    save_png(figure, out)
