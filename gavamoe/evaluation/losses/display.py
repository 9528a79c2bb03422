"""Differences of losses for people: tables, a CSV file's lines, a forest plot."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gavamoe.artifacts.files import save_png
from gavamoe.evaluation.losses.differences import Difference, LossComparison
from gavamoe.evaluation.losses.row_losses import ALL, CONDITIONS, GROUPS
from gavamoe.evaluation.losses.verdict import CONTROLS

GROUP_HEADS = {**{name: f"{name} rows" for name in GROUPS}, ALL: "all users"}
_TITLES = {"shown": "user's slot shown", "hidden": "user's slot hidden", "stranger": "strangers with 3 texts"}
CSV_HEADS = (
    "system", "condition", "group", "users", "rows", "tokens", "difference", "low", "high", "seeds", "seed_sd",
)  # fmt: skip
_COLORS = ("#0b62c4", "#c4570b", "#2a8a4a", "#8a3ab9", "#b8860b", "#5b6675")
_BLOCK = 0.8
"""Share of a group's height that its systems take."""

Table = tuple[list[str], list[list[str]]]


def loss_tables(losses: LossComparison, *, brief: bool = False) -> dict[str, Table]:
    """By condition, heads and cells: the reference's own loss, then a row a system, a column a group of users.

    Args:
        brief: controls alone, without intervals, for a terminal.
    """
    shown = controls_of(losses) if brief else losses.differences
    tables = {}
    for condition, own in losses.losses.items():
        groups = [group for group in GROUP_HEADS if group in own]
        rows = [[losses.label, *(f"{own[group]:.3f}" for group in groups), *([] if brief else ["", ""])]]
        for system in dict.fromkeys(difference.system for difference in shown):
            found = {d.group: d for d in shown if (d.system, d.condition) == (system, condition)}
            if found:
                rows.append([next(iter(found.values())).label, *(_cell(found.get(group), brief) for group in groups)])
                rows[-1] += [] if brief else _seeds(found.get(ALL))
        heads = ["nats a token", *(GROUP_HEADS[group] for group in groups)]
        tables[condition] = (heads + ([] if brief else ["seeds", "sd over seeds, all users"]), rows)
    return tables


def controls_of(losses: LossComparison) -> list[Difference]:
    """The differences of the controls; of all systems where no control was run."""
    return [each for each in losses.differences if each.system in CONTROLS] or list(losses.differences)


def csv_rows(losses: LossComparison) -> Iterator[tuple[Any, ...]]:
    """A line a difference, for CSV_HEADS."""
    for each in losses.differences:
        yield (
            each.system, each.condition, each.group, each.users, each.rows, each.tokens, each.value, each.low,
            each.high, each.seeds, each.seed_sd,
        )  # fmt: skip


def _cell(difference: Difference | None, brief: bool) -> str:
    """ "+0.021 (+0.010 to +0.032) *"."""
    if difference is None:
        return "-"
    star = " *" if difference.behind or difference.ahead else ""
    if brief or difference.low is None:
        return f"{difference.value:+.3f}{star}"
    return f"{difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f}){star}"


def _seeds(difference: Difference | None) -> list[str]:
    if difference is None:
        return ["-", "-"]
    return [str(difference.seeds), "-" if difference.seed_sd is None else f"{difference.seed_sd:.3f}"]


def forest_plot(losses: LossComparison, out: Path) -> None:
    """As PNG: a panel a condition, a block a group of users, in it a line a control: its difference and interval."""
    from matplotlib.figure import Figure

    shown = controls_of(losses)
    labels = {difference.system: difference.label for difference in shown}
    groups = [group for group in GROUP_HEADS if any(difference.group == group for difference in shown)]
    conditions = [condition for condition in CONDITIONS if any(each.condition == condition for each in shown)]
    height = 1.5 + len(groups) * (0.22 * len(labels) + 0.12)
    figure = Figure(figsize=(1.6 + 3.1 * len(conditions), height), layout="constrained")
    panels = figure.subplots(1, len(conditions), sharex=True, sharey=True, squeeze=False)[0]
    for axes, condition in zip(panels, conditions, strict=True):
        for block in range(len(groups)):
            if block % 2:
                axes.axhspan(block - 0.5, block + 0.5, color="#f1f4f8", zorder=0)
        axes.axvline(0, color="#1c2430", linewidth=0.8)
        for number, system in enumerate(labels):
            found = [each for each in shown if (each.system, each.condition) == (system, condition)]
            offset = _BLOCK * ((number + 0.5) / len(labels) - 0.5)
            _draw(axes, found, groups, offset, _COLORS[number % len(_COLORS)], labels[system])
        axes.set_title(_TITLES[condition], fontsize="medium")
        axes.set_xlabel(f"nats a token over {losses.label}'s", fontsize="small")
        axes.tick_params(axis="x", labelsize="small")
        axes.margins(x=0.08)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(groups)), [GROUP_HEADS[group] for group in groups])
    panels[0].set_ylim(len(groups) - 0.5, -0.5)
    figure.suptitle(f"Right of 0: {losses.label} is better. Filled: the 95 % interval leaves out 0.", fontsize="medium")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 3), frameon=False, fontsize="small")
    save_png(figure, out)


def _draw(axes: Any, found: Sequence[Difference], groups: Sequence[str], offset: float, color: str, label: str) -> None:
    """One control's dots and intervals in a panel."""
    axes.plot([], [], "o", color=color, markersize=5, label=label)  # the legend's, also where nothing is drawn
    for each in found:
        y = groups.index(each.group) + offset
        if each.low is not None and each.high is not None:
            axes.plot([each.low, each.high], [y, y], color=color, linewidth=1.6)
        sure = each.behind or each.ahead
        axes.plot([each.value], [y], "o", color=color, markersize=5, markerfacecolor=color if sure else "white")
