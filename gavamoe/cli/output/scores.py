"""Tables of scores: `gavamoe evaluate`, `score` and `quickstart`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.markup import escape

from gavamoe.artifacts.files import read_json
from gavamoe.artifacts.run import METRICS_FILE, Run, RunFolder
from gavamoe.cli.terminal import console, print_json, print_table
from gavamoe.evaluation.evaluate import GENERATIONS_FILE
from gavamoe.evaluation.faithfulness.measure import FAITHFULNESS
from gavamoe.evaluation.losses.display import GROUP_HEADS
from gavamoe.evaluation.metrics.registry import METRICS, Metric

SAMPLES = 5


def print_evaluation(metrics: dict[str, Any], run_dir: Path, *, as_json: bool) -> None:
    """Our scores beside those of the constant explanation, with the counts they rest on."""
    if as_json:
        print_json(metrics)
    _print_scores(metrics, run_dir)
    _print_faithfulness(metrics)
    _print_losses(metrics["losses"])
    console.print(f"report: {RunFolder(run_dir).report}", markup=False, soft_wrap=True)


def print_scores(result: dict[str, Any], *, as_json: bool) -> None:
    """`gavamoe score`."""
    if as_json:
        print_json(result)
    counts = result["counts"]
    title = f"{counts['rows']:,} rows, {counts['empty_generations']:,} of them without a generated text"
    rows = [
        (_label(METRICS[name]), value, _span(result["intervals"].get(name)), METRICS[name].unit)
        for name, value in result["metrics"].items()
        if value is not None
    ]
    print_table(title, ["metric", "value", "95 % of row samples", "unit"], rows)
    if result["against"]:
        _print_differences(result)
    if result["bertscore"]:
        console.print(f"BERTScore: {result['bertscore']}", markup=False)


def _print_differences(result: dict[str, Any]) -> None:
    """Two systems side by side, and whether their difference is more than chance."""
    other = result["against"]
    rows = []
    for name, ours in result["metrics"].items():
        gap = other["differences"].get(name)
        cells = (gap["difference"], _span(gap["interval"]), f"{gap['p']:.3f}") if gap else (None, "", "")
        if ours is not None:
            rows.append((_label(METRICS[name]), ours, other["metrics"][name], *cells))
    title = f"{result['predictions']} against {other['predictions']}"
    print_table(title, ["metric", "first", "second", "difference", "95 % interval", "p"], rows)
    console.print("p: approximate randomization over rows, two-sided; it knows nothing of training seeds", markup=False)


def _label(metric: Metric) -> str:
    return f"{metric.label} {metric.arrow}"


def _span(interval: list[float] | None) -> str:
    return f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""


def print_quickstart(run: Run) -> None:
    """Scores beside a constant's, five samples, where the report is."""
    metrics = read_json(run.evaluation / METRICS_FILE)
    _print_scores(metrics, run.path)
    samples = _samples(run.path)
    _print_samples(samples)
    console.print(f"\nreport: {run.report}", markup=False, soft_wrap=True)
    pair = f"--user {samples[0]['user']} --item {samples[0]['item']}"
    console.print(f"next:   gavamoe explain {run.path} {pair}", markup=False, soft_wrap=True)


def _print_scores(metrics: dict[str, Any], run_dir: Path) -> None:
    constant = metrics["baselines"]["constant"]["metrics"]
    names = [name for name, value in metrics["metrics"].items() if value is not None]
    rows: list[tuple[object, ...]] = [
        (_label(METRICS[name]), metrics["metrics"][name], constant.get(name)) for name in names
    ]
    title = f"{run_dir}: {metrics['rows']:,} rows of {metrics['split']}, rating and features {metrics['protocol']}"
    if metrics["predicted"]:
        other = metrics["predicted"]["metrics"]
        rows = [(*row[:2], other[name], row[2]) for name, row in zip(names, rows, strict=True)]
        print_table(title + " and predicted", ["metric", metrics["protocol"], "predicted", "constant text"], rows)
    else:
        print_table(title, ["metric", "ours", "constant text"], rows)
    _print_truth(metrics)


def _print_faithfulness(metrics: dict[str, Any]) -> None:
    """What n-gram scores hide, with each protocol's own column where both were evaluated."""
    sections = {metrics["protocol"]: metrics["faithfulness"]}
    if metrics["predicted"]:
        sections["predicted"] = metrics["predicted"]["faithfulness"]
    if not all(sections.values()):
        return
    rows = []
    for name, metric in FAITHFULNESS.items():
        cells = [section["scores"][name] for section in sections.values()]
        if cells[0] is not None:
            values = [each["value"] for each in cells]
            rows.append((_label(metric), *values, cells[0]["references"], cells[0]["chance"], metric.unit))
    print_table("Faithfulness (intervals are in the report)", ["", *sections, "references", "chance", ""], rows)


def _print_losses(losses: dict[str, Any] | None) -> None:
    """Nats per token of the rows' own texts, by what is known of the user and by the user's training rows."""
    if not losses:
        return
    rows = [
        (GROUP_HEADS[group], cells["rows"], *(losses[each].get(group, {}).get("loss") for each in losses))
        for group, cells in losses["shown"].items()
    ]
    print_table("Loss of the rows' own texts, nats a token", ["user", "texts", *losses], rows)


def _print_truth(metrics: dict[str, Any]) -> None:
    """Against what the synthetic generator planted."""
    planted = metrics.get("planted")
    if not planted:
        return
    rmse = metrics["metrics"]["rmse"]
    rows = [
        ("user groups recovered (ARI)", planted["user_ari"], "1 is perfect"),
        ("sentiment agrees with rating", planted["sentiment_agreement"], "%"),
        ("rating RMSE", rmse, f"{100 * rmse / planted['bias_rmse']:.0f} % of the user + item bias model's"),
        (
            "rating RMSE, noise floor",
            planted["noise_floor_rmse"],
            f"ours is {rmse / planted['noise_floor_rmse']:.2f} x",
        ),
    ]
    print_table("Against the planted truth", ["", "value", ""], rows)


def _samples(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of generations.parquet, evenly spread over the split."""
    table = pq.read_table(RunFolder(run_dir).evaluation / GENERATIONS_FILE)
    step = max(1, table.num_rows // SAMPLES)
    rows: list[dict[str, Any]] = table.take(list(range(0, table.num_rows, step))[:SAMPLES]).to_pylist()
    return rows


def _print_samples(samples: Sequence[dict[str, Any]]) -> None:
    for row in samples:
        rating = "" if row["rating"] is None else f"  rating {row['rating']:g}"
        console.print(
            f"\n[bold]user {escape(row['user'])}, {escape(row['title'] or row['item'])}[/]{rating}"
            f"  cluster {row['cluster']}  features: {escape(', '.join(row['prompt_features']))}",
            soft_wrap=True,
        )
        console.print(f"  ours:      {row['generated']}", markup=False, soft_wrap=True)
        console.print(f"  reference: {row['reference']}", markup=False, soft_wrap=True)
