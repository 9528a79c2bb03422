"""The files of a comparison of systems.

comparison.json holds everything; scores.csv one line a system, seed and score; table.md the tables (Figure 3, Table 2);
figure3.png its picture; differences.csv and differences.png the losses of the same rows (`losses`), where they were
read. All are made again from the run folders at every call.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gavamoe.artifacts.csv_files import write_csv
from gavamoe.artifacts.files import save_png, write_file, write_json
from gavamoe.evaluation.comparison import (
    COMPARISON_FILE,
    FIGURE,
    REFERENCE,
    ChosenRate,
    Comparison,
    blocks,
    difference_table,
    interval_of,
    means,
    shown_scores,
    systems_of,
    table,
)
from gavamoe.evaluation.losses.differences import LossComparison
from gavamoe.evaluation.losses.display import CSV_HEADS, csv_rows, forest_plot, loss_tables
from gavamoe.evaluation.losses.row_losses import CONDITIONS

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

SCORES_FILE, TABLE_FILE, FIGURE_FILE = "scores.csv", "table.md", "figure3.png"
DIFFERENCES_FILE, FOREST_FILE = "differences.csv", "differences.png"


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Write the files named at the top of this file into the existing `folder`."""
    write_json(folder / COMPARISON_FILE, comparison.model_dump(mode="json"))
    write_csv(folder / SCORES_FILE, ("system", "seed", "protocol", "score", "value"), _score_rows(comparison))
    with write_file(folder / TABLE_FILE) as aside:
        aside.write_text(markdown(comparison), encoding="utf-8")
    plot(comparison, folder / FIGURE_FILE)
    if comparison.losses is not None:
        write_csv(folder / DIFFERENCES_FILE, CSV_HEADS, csv_rows(comparison.losses))
        if comparison.losses.differences:
            forest_plot(comparison.losses, folder / FOREST_FILE)


def _score_rows(comparison: Comparison) -> Iterator[tuple[str, int, str, str, float | None]]:
    """Every score of every run, under each protocol."""
    first = "predicted" if comparison.config.get("evaluation", {}).get("protocol") == "predicted" else "given"
    for outcome in comparison.outcomes:
        for protocol, scores in ((first, outcome.scores), ("predicted", outcome.predicted)):
            for name, value in (scores or {}).items():
                yield outcome.system, outcome.seed, protocol, name, value


def markdown(comparison: Comparison) -> str:
    """The verdict on gates, and all tables with what their numbers are."""
    seeds = max(len(outcomes) for outcomes in systems_of(comparison).values())
    rows = comparison.outcomes[0].rows
    parts = [
        *(comparison.losses.verdict if comparison.losses else []),
        f"{comparison.dataset}, {rows:,} rows, {seeds} seed(s): mean ± half the 95 % t interval over the seeds.",
        *_markdown_blocks(comparison),
        *(_markdown_losses(comparison.losses) if comparison.losses else []),
        "\n".join(f"- {outcomes[0].label}: {outcomes[0].what}" for outcomes in systems_of(comparison).values()),
    ]
    if comparison.rates:
        parts.append("\n".join(_rate_line(name, chosen) for name, chosen in comparison.rates.items()))
    if comparison.skipped:
        parts.append("\n".join(f"- left out, {name}: {why}" for name, why in comparison.skipped.items()))
    return "\n\n".join(parts) + "\n"


def _rate_line(name: str, chosen: ChosenRate) -> str:
    """A system's learning rate and what the others gave."""
    tried = ", ".join(f"{factor:g}: {loss:.3f}" for factor, loss in sorted(chosen.losses.items()))
    edge = "; at the edge of what was tried" if chosen.at_the_edge else ""
    return f"- learning rate, {name}: times {chosen.factor:g} (validation loss {tried}{edge})"


def _markdown_blocks(comparison: Comparison) -> list[str]:
    parts = []
    for title, block in (found := blocks(comparison)):
        if len(found) > 1:
            parts.append(f"## {title}")
        parts.append(_grid(*table(block)))
        if len(systems_of(block)) > 1:
            parts.append("Differences under the same seed; * where the interval leaves out 0.")
            parts.append(_grid(*difference_table(block)))
    return parts


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
    """Figure 3 as PNG, a strip for each of `blocks`: a panel a score, a bar a system, a line its interval (see
    `interval_of`), a dot a seed."""
    from matplotlib.figure import Figure

    found = blocks(comparison)
    heights = [1.2 + 0.34 * len(systems_of(block)) for _, block in found]
    widest = max(len(shown_scores(block, FIGURE)) for _, block in found)
    figure = Figure(figsize=(3.2 + 2.6 * widest, sum(heights)), layout="constrained")
    strips = figure.subfigures(len(found), 1, height_ratios=heights, squeeze=False)[:, 0]
    for strip, (title, block) in zip(strips, found, strict=True):
        if len(found) > 1:
            strip.suptitle(title, fontsize="large")
        _plot_block(block, strip)
    save_png(figure, out)


def _plot_block(block: Comparison, strip: "SubFigure") -> None:
    systems = list(systems_of(block).values())[::-1]
    scores = shown_scores(block, FIGURE)
    panels = strip.subplots(1, len(scores), sharey=True, squeeze=False)[0]
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
