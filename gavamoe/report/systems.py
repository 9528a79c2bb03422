"""Parts of the report that compare systems: means over seeds (Figure 3), and the case study (Table 5)."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from markupsafe import Markup

from gavamoe.artifacts.run import METRICS_FILE, RunFolder
from gavamoe.evaluation.comparison import (
    COMPARISON_FILE,
    REFERENCE,
    Comparison,
    Outcome,
    Score,
    blocks,
    difference_table,
    interval_of,
    means,
    read_comparison,
    shown_scores,
    systems_of,
    table,
)
from gavamoe.evaluation.evaluated_run import RunData, distinct_names, read_run
from gavamoe.evaluation.losses.differences import LossComparison
from gavamoe.evaluation.losses.display import GROUP_HEADS, controls_of, loss_tables
from gavamoe.evaluation.losses.row_losses import CONDITIONS
from gavamoe.evaluation.metrics_file import read_metrics
from gavamoe.report.charts import Interval, interval_chart

CHARTS = ("bleu_4", "bertscore_f", "rouge_l", "validation_loss", "rmse", "style_of_group", "wrong_gate_gap")
_CATALOGS = tuple(Path(artifact) / "catalog" / "users.parquet" for artifact in ("stage2", "baseline"))


def open_runs(paths: Sequence[Path]) -> tuple[list[RunData], list[Path], list[Comparison]]:
    """Runs to show side by side with their folders, and the comparisons among `paths`.

    A comparison stands for the first seed of each of its systems, under the system's label; Figure 4 has the mean of
    all seeds.
    """
    runs, folders, comparisons = [], [], []
    for path in paths:
        if not (path / COMPARISON_FILE).is_file():
            runs.append(read_run(path))
            folders.append(path)
            continue
        comparison = read_comparison(path)
        comparisons.append(comparison)
        for outcomes in systems_of(comparison).values():
            first, *others = outcomes
            folder = path / first.folder
            seeds = tuple(read_metrics(RunFolder(path / one.folder).evaluation / METRICS_FILE) for one in others)
            longer = f"{first.label}, {comparison.dataset}"
            runs.append(
                replace(read_run(folder), name=first.label, long_name=longer, told=first.told, other_seeds=seeds)
            )
            folders.append(folder)
    return distinct_names(runs), folders, comparisons


def comparison_section(comparison: Comparison) -> dict[str, Any]:
    """Tables and charts of a comparison, for the template."""
    systems = systems_of(comparison)
    return {
        "comparison": comparison,
        "seeds": max(len(outcomes) for outcomes in systems.values()),
        "blocks": [_block(title, block) for title, block in blocks(comparison)],
        "losses": _losses(comparison.losses) if comparison.losses else None,
        "what": [(outcomes[0].label, outcomes[0].what) for outcomes in systems.values()],
    }


def _block(title: str, block: Comparison) -> dict[str, Any]:
    """Tables and charts of systems that may be ranked together."""
    systems = systems_of(block)
    return {
        "title": title,
        "scores": table(block),
        "differences": difference_table(block) if len(systems) > 1 else None,
        "charts": Markup("").join(_chart(score, systems) for score in shown_scores(block, CHARTS)),
    }


def _losses(losses: LossComparison) -> dict[str, Any]:
    """Verdict, tables and charts of the losses of the same rows."""
    return {
        "verdict": losses.verdict,
        "label": losses.label,
        "tables": [(condition, CONDITIONS[condition], *shown) for condition, shown in loss_tables(losses).items()],
        "charts": Markup("").join(_best_controls(losses, condition) for condition in CONDITIONS),
        "unpaired": losses.unpaired,
    }


def _best_controls(losses: LossComparison, condition: str) -> Markup:
    """By group of users, how far the best control is: what a lead over all of them comes to."""
    lines = []
    for group in GROUP_HEADS:
        found = [each for each in controls_of(losses) if (each.condition, each.group) == (condition, group)]
        if found:
            best = min(found, key=lambda each: each.value)
            low, high = (best.value if end is None else end for end in (best.low, best.high))
            lines.append(Interval(f"{group}: {best.label}", best.value, low, high))
    return interval_chart(f"{condition}: the best control's loss over {losses.label}'s", lines, zero=True)


def _chart(score: Score, systems: dict[str, list[Outcome]]) -> Markup:
    """The interval chart of a score, with a line for each system."""
    intervals: list[Interval] = []
    marked = 0
    for name, outcomes in systems.items():
        one = means(outcomes, score.name)
        if one is None:
            continue
        low, high = interval_of(outcomes, score.name, one)
        marked = len(intervals) if name == REFERENCE else marked
        intervals.append(Interval(outcomes[0].label, one.mean, low, high))
    return interval_chart(f"{score.label} {score.arrow}", intervals, marked=marked)


def case_study(runs: Sequence[RunData], folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Table 5: the rows of the known users with the fewest and with the most training rows, and what each run wrote.

    It is the first such row of the split, so none is hand-picked. [] without a trained run, or where rows differ.
    """
    asked = [run.generations.select(["split", "row"]) for run in runs]
    catalogs = [path for folder in folders for catalog in _CATALOGS if (path := folder / catalog).is_file()]
    if not catalogs or not all(rows.equals(asked[0]) for rows in asked):
        return []
    users = pq.read_table(catalogs[0], columns=["id", "count"])
    count = dict(zip(users["id"].to_pylist(), users["count"].to_pylist(), strict=True))
    rows = np.array([count.get(user, 0) for user in runs[0].generations["user"].to_pylist()])
    known = np.flatnonzero(rows > 0)
    if not known.size:
        return []
    chosen = {
        "Limited interactions": int(known[rows[known].argmin()]),
        "Sufficient interactions": int(known[rows[known].argmax()]),
    }
    return [_case(name, index, int(rows[index]), runs) for name, index in chosen.items()]


def _case(name: str, index: int, training_rows: int, runs: Sequence[RunData]) -> dict[str, Any]:
    written = [run.generations.slice(index, 1).to_pylist()[0] for run in runs]
    return written[0] | {
        "name": name,
        "training_rows": training_rows,
        "texts": [(run.name, row["generated"]) for run, row in zip(runs, written, strict=True)],
    }
