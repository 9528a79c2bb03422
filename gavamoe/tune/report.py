"""The results of a search for people to read: trials.parquet, best.yaml, table.md, pareto/, plots/.

Everything is derived from the study, at the end of a session however it ended, and can be made again.
"""

import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gavamoe.artifacts.files import write_file, write_folder
from gavamoe.config.files import dump_config
from gavamoe.config.schema import RunConfig
from gavamoe.tune.checks import trial_config
from gavamoe.tune.metrics import MEASURES, TRUTH, Measure
from gavamoe.tune.space import Space
from gavamoe.tune.study import Record, Study

TRIALS_FILE, BEST_FILE, TABLE_FILE, PLOTS, FRONT = "trials.parquet", "best.yaml", "table.md", "plots", "pareto"


def write_results(folder: Path, study: Study, space: Space, config: RunConfig) -> Record | None:
    """Write all files that the study has data for; returns the best trial, None when none is complete."""
    records = study.records
    with write_file(folder / TRIALS_FILE) as aside:
        pq.write_table(trials_table(records, space), aside)
    best = study.best()
    if best is None:
        return None
    _write_config(folder / BEST_FILE, trial_config(config, space, best.values, cheap=False))
    with write_file(folder / TABLE_FILE) as aside:
        aside.write_text(markdown_table(records, space), encoding="utf-8")
    if len(space.objectives) > 1:
        with write_folder(folder / FRONT, replace=True) as front:
            for record in study.front():
                name = front / f"trial_{record.number:04d}.yaml"
                _write_config(name, trial_config(config, space, record.values, cheap=False))
    _write_plots(folder / PLOTS, study, space, [record for record in records if record.objectives])
    return best


def trials_table(records: Sequence[Record], space: Space) -> pa.Table:
    """One row a trial: what was drawn, how it ended, and each measure's mean, spread and value by seed."""
    columns: dict[str, Any] = {
        "trial": pa.array([r.number for r in records], pa.int32()),
        "state": pa.array([r.state for r in records], pa.string()),
        "reason": pa.array([r.reason for r in records], pa.string()),
        "started": pa.array([r.started for r in records], pa.string()),
        "seconds": pa.array([r.seconds for r in records], pa.float64()),
    }
    for name in space.parameters:
        values = [r.values.get(name) for r in records]
        mixed = len({type(value) for value in values if value is not None}) > 1
        columns[name] = pa.array([None if v is None else str(v) for v in values] if mixed else values)
    for name in dict.fromkeys(name for r in records for name in r.measured):
        by_seed = [r.measured.get(name) for r in records]
        columns[name] = pa.array([statistics.fmean(v) if v else None for v in by_seed], pa.float64())
        columns[f"{name}_sd"] = pa.array([spread(v) for v in by_seed], pa.float64())
        columns[f"{name}_by_seed"] = pa.array(by_seed, pa.list_(pa.float64()))
    return pa.table(columns)


def spread(values: Sequence[float] | None) -> float | None:
    """Sample standard deviation over the seeds; None for fewer than two."""
    return statistics.stdev(values) if values and len(values) > 1 else None


def table_rows(records: Sequence[Record], space: Space) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the paper's Table 3 for this search: complete trials, what they drew, mean and spread.

    A search over one ordered parameter is sorted by it, any other by its first objective, best first.
    """
    complete = [record for record in records if record.objectives]
    shown = [*space.objectives, *space.recorded]
    if any(TRUTH in record.measured for record in complete):
        shown.append(Measure(TRUTH, "groups found (ARI)", "higher", "stage1"))
    names = list(space.parameters)
    if len(names) == 1:
        complete.sort(key=lambda record: str(record.values.get(names[0])).rjust(20))
    else:
        sign = -1 if shown[0].direction == "higher" else 1
        complete.sort(key=lambda record: sign * (record.objectives or [0.0])[0])
    heads = ["trial", *(short_name(name, names) for name in names), *(f"{m.label} {m.arrow}" for m in shown)]
    rows = [
        [
            str(record.number),
            *(value_text(record.values.get(name)) for name in names),
            *(mean_text(record.measured.get(measure.name)) for measure in shown),
        ]
        for record in complete
    ]
    return heads, rows


def markdown_table(records: Sequence[Record], space: Space) -> str:
    """`table_rows` as Markdown, with what the numbers are."""
    heads, rows = table_rows(records, space)
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]
    shown = [MEASURES[measure.name] for measure in (*space.objectives, *space.recorded)]
    notes = [f"- {measure.label}: {measure.definition}" for measure in shown]
    seeds = max((len(values) for record in records for values in record.measured.values()), default=1)
    head = f"Validation split, {seeds} seed(s): mean, and ± the standard deviation over the seeds."
    return "\n".join([head, "", *lines, "", *notes, ""])


def short_name(name: str, names: Sequence[str]) -> str:
    """The end of a field's path, as long as no other one ends alike."""
    ends = [other.rsplit(".", 1)[-1] for other in names]
    end = name.rsplit(".", 1)[-1]
    return end if ends.count(end) == 1 else name


def value_text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def mean_text(values: Sequence[float] | None) -> str:
    """Mean and spread as text, such as "0.812 ± 0.004"."""
    if not values:
        return "-"
    mean, width = statistics.fmean(values), spread(values)
    if abs(mean) >= 1000:
        return f"{mean:,.0f}" + ("" if width is None else f" ± {width:,.0f}")
    return f"{mean:.4g}" + ("" if width is None else f" ± {width:.2g}")


def _write_config(path: Path, config: RunConfig) -> None:
    with write_file(path) as aside:
        aside.write_text(dump_config(config), encoding="utf-8")


def _write_plots(out: Path, study: Study, space: Space, complete: Sequence[Record]) -> None:
    """Write Optuna's own plots, as far as the study has data for them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from optuna.exceptions import ExperimentalWarning

    with write_folder(out, replace=True) as folder, warnings.catch_warnings():
        # Optuna marks its matplotlib plots as experimental, on every call.
        warnings.simplefilter("ignore", ExperimentalWarning)
        # "importances of params to achieve low values": which is what `_low_is_good` makes of any objective
        warnings.filterwarnings("ignore", message="PedAnovaImportanceEvaluator", category=UserWarning)
        for name, draw in _wanted_plots(study, space, complete).items():
            draw()
            _make_readable(plt.gcf(), list(space.parameters))
            if name == "parallel_coordinates":
                plt.gcf().set_figwidth(2 + 1.8 * len(space.parameters))
            plt.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            plt.close("all")


def _wanted_plots(study: Study, space: Space, complete: Sequence[Record]) -> dict[str, Callable[[], Any]]:
    from optuna.visualization import matplotlib as plots

    first, several = space.objectives[0], len(space.objectives) > 1
    title = f"{first.label} {first.arrow} (validation)"
    named: dict[str, Any] = {"target": (lambda trial: trial.values[0]) if several else None, "target_name": title}
    # A parameter that took one value has no axis, and no influence that could be estimated.
    varied = [name for name in space.parameters if len({record.values.get(name) for record in complete}) > 1]
    wanted: dict[str, Callable[[], Any]] = {
        "history": lambda: plots.plot_optimization_history(study.study, **named),
    }
    if varied:
        wanted["slice"] = lambda: plots.plot_slice(study.study, params=varied, **named)
    always = [name for name in varied if all(name in record.values for record in complete)]
    if len(always) > 1:
        wanted["parallel_coordinates"] = lambda: plots.plot_parallel_coordinate(study.study, params=always, **named)
        if len(complete) > 3 and len({tuple(record.objectives or ()) for record in complete}) > 1:
            low = {"target": _low_is_good(first), "target_name": title} if several else named
            wanted["importance"] = lambda: plots.plot_param_importances(study.study, params=always, **low)
    if len(space.objectives) in (2, 3):
        names = [f"{measure.label} {measure.arrow}" for measure in space.objectives]
        wanted["pareto"] = lambda: plots.plot_pareto_front(study.study, target_names=names)
    if not several and any(record.steps for record in study.records):
        wanted["curves"] = lambda: plots.plot_intermediate_values(study.study).set(
            title="Early stopping", xlabel="% of the stage's training", ylabel=title
        )
    return wanted


def _low_is_good(measure: Measure) -> Callable[[Any], float]:
    """A trial's first value, turned so that low is good."""
    sign = -1.0 if measure.direction == "higher" else 1.0
    return lambda trial: sign * float(trial.values[0])


def _make_readable(figure: Any, names: Sequence[str]) -> None:
    """Shorten the field paths below the axes, and drop minor ticks of log scales: both would overlap."""
    from matplotlib.ticker import NullFormatter

    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            if axis.get_scale() == "log" and high > 10 * low:
                axis.set_minor_formatter(NullFormatter())
        if axes.get_xlabel() in names:
            axes.set_xlabel(short_name(axes.get_xlabel(), names))
        ticks = axes.get_xticklabels()
        labels = [tick.get_text() for tick in ticks]
        if any(label.endswith("...") or label in names for label in labels):
            full = [next((n for n in names if n.startswith(label.removesuffix("..."))), label) for label in labels]
            axes.set_xticks(axes.get_xticks(), [short_name(n, names) if n in names else n for n in full])
