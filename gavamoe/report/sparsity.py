"""Figure 4: scores over the sparsity thirds and zero-shot users, for systems that may be ranked together."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from gavamoe.artifacts.files import save_png
from gavamoe.evaluation.comparison import apart_by_told
from gavamoe.evaluation.evaluated_run import RunData
from gavamoe.evaluation.metrics.registry import METRICS
from gavamoe.report.charts import COLORS, Series, line_chart

SPARSITY = {
    "ds1": "ds1 (most frequent)",
    "ds2": "ds2",
    "ds3": "ds3 (least frequent)",
    "zero_shot": "zero-shot",
}
_AXIS = "test rows by training rows of their user"
_TICKS = {"ds1": "ds1, most", "ds2": "ds2", "ds3": "ds3, fewest", "zero_shot": "zero-shot"}
"""The same for a figure's axis, where ds1 alone was read the wrong way round."""
SCORES = ("bleu_4", "bertscore_f", "rouge_l", "rmse")
"""The paper's two scores, and two more; those that were not measured are left out."""
_PANEL_INCHES = 3.4
_MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Line:
    """A system in the figure."""

    label: str
    """Its name."""
    groups: dict[str, dict[str, float | None]]
    """Its scores by group and metric; of several seeds the mean."""
    rows: dict[str, int]
    """Evaluated rows of each group, of one seed."""
    told: bool
    """Whether it reads a row's features; it guesses them where it was told user and item alone."""


@dataclass(frozen=True)
class Block:
    """Systems that were told the same."""

    title: str
    lines: list[Line]


def sparsity_blocks(runs: Sequence[RunData]) -> list[Block]:
    """The runs' lines, apart by dataset and by what was told of a row: rating and features, or user and item alone.

    Where all runs of a dataset were evaluated under both protocols, all stand in the second block too, with what they
    wrote under it.
    """
    datasets: dict[str, list[RunData]] = {}
    for run in runs:
        datasets.setdefault(run.metrics["dataset"]["fingerprint"], []).append(run)
    found = []
    for own in datasets.values():
        name = f"{own[0].metrics['dataset']['name']}: " if len(datasets) > 1 else ""
        found += [Block(name + title, lines) for title, lines in _of_one_dataset(own)]
    return found


def _of_one_dataset(runs: Sequence[RunData]) -> list[tuple[str, list[Line]]]:
    def guessed(system: tuple[RunData, list[dict[str, Any]]]) -> tuple[RunData, list[dict[str, Any]]] | None:
        run, seeds = system
        return (run, [metrics["predicted"] for metrics in seeds]) if run.metrics["predicted"] else None

    nothing = any(run.metrics["protocol"] == "predicted" for run in runs)
    found = apart_by_told([(run, run.seeds) for run in runs], lambda system: system[0].told and not nothing, guessed)
    return [(title, [_line(run, seeds) for run, seeds in systems]) for title, systems in found]


def _line(run: RunData, seeds: Sequence[dict[str, Any]]) -> Line:
    found = [metrics["sparsity"] for metrics in seeds]
    groups = {
        group: {name: _mean([one[group]["metrics"].get(name) for one in found]) for name in found[0][group]["metrics"]}
        for group in SPARSITY
    }
    return Line(run.name, groups, {group: found[0][group]["counts"]["rows"] for group in SPARSITY}, run.told)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def sparsity_rows(blocks: Sequence[Block]) -> Iterable[Sequence[Any]]:
    """(block, system, group, rows, metric, value) of all that was measured."""
    for block in blocks:
        for line in block.lines:
            for group, scores in line.groups.items():
                for name, value in scores.items():
                    if value is not None:
                        yield block.title, line.label, SPARSITY[group], line.rows[group], name, value


def sparsity_charts(blocks: Sequence[Block]) -> list[tuple[str, Markup, list[str]]]:
    """For the page: each block's title and charts, with as many of its systems as there are colors, and the names of
    those that are left out.

    The first system is shown, and of the others those that read no features before those that had to guess them.
    """
    found = []
    for block in blocks:
        first, *others = block.lines
        lines = [first, *sorted(others, key=lambda line: line.told)]
        charts = Markup("").join(_chart(name, lines[:COLORS]) for name in SCORES)
        found.append((block.title, charts, [line.label for line in lines[COLORS:]]))
    return found


def _chart(name: str, lines: Sequence[Line]) -> Markup:
    places = list(range(len(SPARSITY)))
    series = [Series(line.label, places, [line.groups[group].get(name) for group in SPARSITY]) for line in lines]
    return line_chart(_title(name), series, ticks=list(_TICKS.values()))


def _title(name: str) -> str:
    return f"{METRICS[name].label} {METRICS[name].arrow}"


def plot_sparsity(blocks: Sequence[Block], out: Path) -> None:
    """As a picture: a row of panels a block, a panel a score, a line a system; nothing where nothing was measured."""
    from matplotlib.figure import Figure

    names = [name for name in SCORES if any(_measured(block, name) for block in blocks)]
    if not names:
        return
    width = _PANEL_INCHES * len(names)
    columns = _legend_columns([line.label for block in blocks for line in block.lines], width)
    heights = [3.2 + 0.25 * math.ceil(len(block.lines) / columns) for block in blocks]
    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(blocks), 1, squeeze=False, height_ratios=heights)[:, 0]
    colors = _colors([line.label for block in blocks for line in block.lines])
    for part, block in zip(parts, blocks, strict=True):
        groups = [group for group in SPARSITY if any(line.rows[group] for line in block.lines)]
        panels = part.subplots(1, len(names), squeeze=False)[0]
        for axes, name in zip(panels, names, strict=True):
            _draw(axes, name, block.lines, groups, colors)
        if len(blocks) > 1:
            part.suptitle(block.title)
        handles, labels = panels[0].get_legend_handles_labels()
        part.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small", frameon=False)
    save_png(figure, out)


def _legend_columns(labels: Sequence[str], inches: float) -> int:
    """As many columns as the longest label leaves room for."""
    return max(1, min(7, int(inches / (0.6 + 0.08 * max(map(len, labels))))))


def _measured(block: Block, name: str) -> bool:
    return any(scores.get(name) is not None for line in block.lines for scores in line.groups.values())


def _colors(labels: Sequence[str]) -> dict[str, tuple[Any, str]]:
    """A color and a marker for each system, the same in every block."""
    from matplotlib import colormaps

    colors = colormaps["tab20"].colors  # type: ignore[attr-defined]
    names = dict.fromkeys(labels)
    return {name: (colors[number % len(colors)], _MARKERS[number % len(_MARKERS)]) for number, name in enumerate(names)}


def _draw(axes: Any, name: str, lines: Sequence[Line], groups: Sequence[str], colors: dict[str, Any]) -> None:
    for line in lines:
        values = [line.groups[group].get(name) for group in groups]
        color, marker = colors[line.label]
        shown = [float("nan") if value is None else value for value in values]
        axes.plot(range(len(groups)), shown, marker=marker, color=color, label=line.label)
    axes.set_xticks(range(len(groups)), [_TICKS[group] for group in groups], fontsize="small")
    axes.set(title=_title(name), xlabel=_AXIS, xlim=(-0.3, len(groups) - 0.7))
    axes.spines[["top", "right"]].set_visible(False)
