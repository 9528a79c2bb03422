"""The report's tables as CSV and its figures as PNG, for papers and slides: `gavamoe report RUN... --figures FOLDER`.

table1.csv datasets, table2.csv scores with intervals, figure4.csv and .png scores by sparsity, table5.csv the case
study, figure5.png the latent maps that `gavamoe route` left in the run folders.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gavamoe.artifacts.csv_files import write_csv
from gavamoe.artifacts.files import save_png
from gavamoe.evaluation.evaluated_run import RunData
from gavamoe.evaluation.metrics.registry import METRICS
from gavamoe.report.sparsity import plot_sparsity, sparsity_blocks, sparsity_rows

_DATASET = ("name", "users", "items", "rows", "rows_per_user", "rows_per_item", "density_percent", "zero_shot_users")


def write_figures(runs: Sequence[RunData], cases: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write all tables and figures that the runs have data for, in place of earlier files of these names."""
    folder.mkdir(parents=True, exist_ok=True)
    datasets = {run.metrics["dataset"]["fingerprint"]: run.metrics["dataset"] for run in runs}
    write_csv(folder / "table1.csv", _DATASET, ([data[name] for name in _DATASET] for data in datasets.values()))
    write_csv(folder / "table2.csv", ("run", "metric", "value", "low", "high", "rows"), _scores(runs))
    blocks = sparsity_blocks(runs)
    write_csv(folder / "figure4.csv", ("told", "run", "group", "rows", "metric", "value"), sparsity_rows(blocks))
    plot_sparsity(blocks, folder / "figure4.png")
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


def _case_lines(cases: Sequence[dict[str, Any]]) -> Iterable[Sequence[Any]]:
    for case in cases:
        about = (case["name"], case["user"], case["training_rows"], case["item"], ", ".join(case["features"] or ()))
        yield *about, "reference", case["reference"]
        for system, text in case["texts"]:
            yield *about, system, text


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
