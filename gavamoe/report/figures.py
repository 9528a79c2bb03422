"""The report's tables as CSV and its figures as PNG, for papers and slides: `gavamoe report RUN... --figures FOLDER`.

table1.csv datasets, table2.csv scores with intervals, figure4.csv and .png scores by sparsity, table5.csv the case
study, figure5.png the latent maps that `gavamoe route` left in the run folders.
"""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gavamoe.artifacts.csv_files import write_csv
from gavamoe.artifacts.files import save_png
from gavamoe.evaluation.evaluated_run import RunData
from gavamoe.evaluation.metrics.registry import METRICS

SPARSITY = {
    "ds1": "ds1 (most frequent)",
    "ds2": "ds2",
    "ds3": "ds3 (least frequent)",
    "zero_shot": "zero-shot",
}
FIGURE4 = ("bleu_4", "bertscore_f", "rouge_l", "rmse")
"""Scores in Figure 4: the paper's two, and two more; those that were not measured are left out."""
_LEGEND_COLUMNS, _MARKERS = 7, "osD^vPX"
_DATASET = ("name", "users", "items", "rows", "rows_per_user", "rows_per_item", "density_percent", "zero_shot_users")


def write_figures(runs: Sequence[RunData], cases: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write all tables and figures that the runs have data for, in place of earlier files of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    datasets = {run.metrics["dataset"]["fingerprint"]: run.metrics["dataset"] for run in runs}
    write_csv(folder / "table1.csv", _DATASET, ([data[name] for name in _DATASET] for data in datasets.values()))
    write_csv(folder / "table2.csv", ("run", "metric", "value", "low", "high", "rows"), _scores(runs))
    write_csv(folder / "figure4.csv", ("run", "group", "rows", "metric", "value"), _sparsity(runs))
    _plot_sparsity(runs, folder / "figure4.png")
    if cases:
        write_csv(
            folder / "table5.csv",
            ("case", "user", "training rows", "item", "features", "system", "text"),
            _case_lines(cases),
        )
    maps = [(run.name, run.latent_map) for run in runs if run.latent_map]
    if maps:
        _plot_maps(maps, folder / "figure5.png")


def _scores(runs: Sequence[RunData]) -> Iterable[Sequence[Any]]:
    for run in runs:
        for name in METRICS:
            value = run.score(name)
            if value is not None:
                low, high = run.metrics["intervals"].get(name, ("", ""))
                yield run.name, name, value, low, high, run.metrics["rows"]


def _sparsity(runs: Sequence[RunData]) -> Iterable[Sequence[Any]]:
    for run in runs:
        for group in SPARSITY:
            scored = run.metrics["sparsity"][group]
            for name, value in scored["metrics"].items():
                if value is not None:
                    yield run.name, group, scored["counts"]["rows"], name, value


def _case_lines(cases: Sequence[dict[str, Any]]) -> Iterable[Sequence[Any]]:
    for case in cases:
        about = (case["name"], case["user"], case["training_rows"], case["item"], ", ".join(case["features"] or ()))
        yield *about, "reference", case["reference"]
        for system, text in case["texts"]:
            yield *about, system, text


def _plot_sparsity(runs: Sequence[RunData], out: Path) -> None:
    """Figure 4: a panel a score, a line a run, over ds1, ds2, ds3 and zero-shot users, where there are any."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names = [name for name in FIGURE4 if any(run.score(name) is not None for run in runs)]
    if not names:
        return
    groups = [group for group in SPARSITY if any(run.metrics["sparsity"][group]["counts"]["rows"] for run in runs)]
    lines = math.ceil(len(runs) / _LEGEND_COLUMNS)
    figure = Figure(figsize=(3.4 * len(names), 3.4 + 0.25 * lines), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    colors = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for axes, name in zip(panels, names, strict=True):
        for number, run in enumerate(runs):
            values = [run.metrics["sparsity"][group]["metrics"][name] for group in groups]
            axes.plot(
                range(len(groups)),
                [float("nan") if value is None else value for value in values],
                marker=_MARKERS[number % len(_MARKERS)],
                color=colors[number % len(colors)],
                label=run.name,
            )
        axes.set_xticks(range(len(groups)), [group.replace("_", "-") for group in groups])
        axes.set(title=f"{METRICS[name].label} {METRICS[name].arrow}", xlim=(-0.3, len(groups) - 0.7))
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=_LEGEND_COLUMNS, fontsize="small", frameon=False)
    save_png(figure, out)


def _plot_maps(maps: Sequence[tuple[str, str]], out: Path) -> None:
    """Figure 5: the runs' latent maps side by side."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    figure = Figure(figsize=(5 * len(maps), 4.6), layout="constrained")
    for axes, (name, picture) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True):
        axes.imshow(imread(io.BytesIO(base64.b64decode(picture)), format="png"))
        axes.set_title(name)
        axes.set_axis_off()
    save_png(figure, out)
