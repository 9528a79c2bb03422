"""One self-contained HTML page about one or more evaluated runs: `gavamoe report`.

Reads only the run folders (config.yaml, stage*/metrics.json, evaluation/, logs/), comparisons of `gavamoe ablate`
and results of human evaluations, never the dataset. The page
holds its own style and its charts as SVG; it loads nothing and runs no script. All text is escaped.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from gavamoe.artifacts.files import write_file
from gavamoe.errors import InputError
from gavamoe.evaluation.evaluated_run import RunData
from gavamoe.evaluation.human.results import HumanResult, read_result
from gavamoe.evaluation.metrics.registry import METRICS
from gavamoe.report.charts import Series, line_chart
from gavamoe.report.faithfulness import faithfulness_section, protocol_section
from gavamoe.report.figures import write_figures
from gavamoe.report.sparsity import SPARSITY, sparsity_blocks, sparsity_charts
from gavamoe.report.systems import case_study, comparison_section, open_runs

SAMPLES = 20
"""Rows whose texts the page shows: enough to see what a model is like."""
LONGEST_TEXT = 600
"""Characters of a text that the page shows."""

_TEMPLATE = Path(__file__).with_name("report_template.html.jinja")
_GROUP_METRICS = ("bleu_4", "rouge_l", "bertscore_f", "usr", "fmr", "rmse")
_FIRST_CURVES = (
    "loss",
    "explanation_loss",
    "elbo",
    "valid_loss",
    "validation_loss",
    "valid_elbo",
    "valid_rmse",
    "valid_kl",
)
"""Curves that are shown at once, in this order; the others are folded away."""
_NOT_CURVES = {"step", "steps", "epoch", "epochs", "rank", "seconds", "time"}


def write_report(runs: Sequence[Path], out: Path, *, human: Path | None = None, figures: Path | None = None) -> Path:
    """Write the page about `runs`, side by side in the order given, to `out`; returns its path.

    Args:
        runs: run folders, or folders of `gavamoe ablate`, which stand for each system's first seed.
        human: result file of `gavamoe human-eval import`.
        figures: folder to write the tables to as CSV and the figures as PNG.

    Raises:
        InputError: no run is named, or one has not been evaluated.
    """
    if not runs:
        raise InputError("report: name at least one run folder")
    data, folders, comparisons = open_runs([Path(run) for run in runs])
    page = render(
        data,
        comparisons=[comparison_section(comparison) for comparison in comparisons],
        cases=case_study(data, folders),
        human=None if human is None else read_result(human),
    )
    if figures is not None:
        write_figures(data, case_study(data, folders), Path(figures))
    out = Path(out)
    with write_file(out) as aside:
        aside.write_text(page, encoding="utf-8")
    return out


def render(
    runs: Sequence[RunData],
    *,
    comparisons: Sequence[dict[str, Any]] = (),
    cases: Sequence[dict[str, Any]] = (),
    human: HumanResult | None = None,
) -> str:
    """The page as HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "text": _shortened}
    scores = _score_table(runs)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        runs=runs,
        comparisons=comparisons,
        cases=cases,
        human=human,
        faithfulness=faithfulness_section(runs),
        protocols=protocol_section(runs),
        headline=_headline(runs[0]),
        settings=_settings(runs),
        scores=scores,
        one_constant=all(len({cell["constant"] for cell in row["cells"]}) == 1 for row in scores),
        ratings=[_rating_table(run) for run in runs],
        planted=[_planted(run) for run in runs],
        sparsity=[_groups(run, "sparsity") for run in runs],
        sparsity_charts=sparsity_charts(sparsity_blocks(runs)),
        clusters=[_clusters(run) for run in runs],
        curves=[_curves(run) for run in runs],
        warnings=[_warnings(run) for run in runs],
        samples=_samples(runs),
        group_metrics=[METRICS[name] for name in _GROUP_METRICS if any(run.score(name) is not None for run in runs)],
        metrics=list(METRICS.values()),
        has_intervals=any(run.metrics["intervals"] for run in runs),
    )


def _headline(run: RunData) -> list[dict[str, Any]]:
    """The few numbers to see first, each beside that of a trivial baseline."""
    cards = []
    for name in ("bleu_4", "rouge_l", "bertscore_f", "fmr", "rmse"):
        value = run.score(name)
        if value is not None:
            against = "bias model" if name == "rmse" else "constant text"
            cards.append({"metric": METRICS[name], "value": value, "other": run.constant(name), "against": against})
    return cards


def _settings(runs: Sequence[RunData]) -> list[tuple[str, list[Any]]]:
    """Rows of the settings table: name, and the value of each run."""
    rows = [_settings_of(run) for run in runs]
    return [(name, [row[name] for row in rows]) for name in rows[0]]


def _settings_of(run: RunData) -> dict[str, str]:
    config, data, metrics = run.config, run.metrics["dataset"], run.metrics
    experts = config.stage2.experts
    scale = "no ratings (implicit)" if data["implicit"] else "ratings {:g} to {:g}".format(*data["rating_range"])
    bert = metrics["bertscore"]
    return {
        "Dataset": f"{data['name']} ({data['format']}), fingerprint {data['fingerprint'][:12]}",
        "Users, items, rows": f"{data['users']:,}, {data['items']:,}, {data['rows']:,}; {scale}",
        "Rows per user, per item": f"{data['rows_per_user']:.2f}, {data['rows_per_item']:.2f};"
        f" density {data['density_percent']:.3g} %",
        "Split": f"{data['split']} (seed {data['seed']}): "
        + ", ".join(f"{name} {size:,}" for name, size in data["rows_by_split"].items()),
        "Zero-shot users, items": f"{data['zero_shot_users']:,}, {data['zero_shot_items']:,}",
        "Evaluated": f"{metrics['rows']:,} of {metrics['rows_in_split']:,} rows of {metrics['split']}, rating and"
        f" features {metrics['protocol']}; {metrics['counts']['empty_generations']:,} empty texts",
        "Stage 1": f"{config.stage1.clusters} clusters, latent size {config.stage1.latent_size},"
        f" beta {config.stage1.beta:g}",
        "Stage 2": f"{config.stage2.base_model}; "
        + (
            f"{experts.count} experts ({experts.conversion}), top {experts.top_k}, {config.gates} gates"
            if experts.enabled
            else "dense"
        ),
        "Joint loss": f"alpha {config.stage2.alpha:g}",
        "Decoding": "greedy"
        if config.generation.temperature == 0
        else f"temperature {config.generation.temperature:g}",
        "Seed": f"{config.seed}",
        "BERTScore model": f"{bert['model']}, layer {bert['layer']}" if bert else "not measured",
        "Written": f"{metrics['tokens_written']:,} tokens in {metrics['seconds_writing']:.1f} s",
        "Versions": ", ".join(f"{name} {version}" for name, version in run.manifest.versions.items()),
        "Evaluated on": run.manifest.created,
    }


def _score_table(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """A row for each metric that a run has: its values, intervals and baselines, and which run is best."""
    rows = []
    for metric in METRICS.values():
        values = [run.score(metric.name) for run in runs]
        known = [value for value in values if value is not None]
        if not known:
            continue
        best = max(known) if metric.direction == "higher" else min(known)
        cells = [
            {
                "value": value,
                "interval": run.metrics["intervals"].get(metric.name),
                "constant": run.constant(metric.name),
                "best": len(set(known)) > 1 and value == best,
            }
            for run, value in zip(runs, values, strict=True)
        ]
        rows.append({"metric": metric, "cells": cells})
    return rows


def _rating_table(run: RunData) -> list[tuple[str, float | None, float | None]]:
    """Rows of the table of rating errors: (name, RMSE, MAE), usually from worst to best; [] without ratings."""
    baselines = run.metrics["baselines"]["ratings"]
    if not baselines:
        return []
    rows = [
        (
            f"Training mean, {run.metrics['split']} rows",
            baselines["global_mean"]["rmse"],
            baselines["global_mean"]["mae"],
        )
    ]
    rows.append(("User + item bias model", baselines["bias_model"]["rmse"], baselines["bias_model"]["mae"]))
    stage1 = run.stages.get("stage1", {}).get("test")
    if isinstance(stage1, dict) and "rmse" in stage1:
        rows.append(("Stage 1 alone, whole test split", stage1["rmse"], stage1.get("mae")))
    rows.append(("This run", run.score("rmse"), run.score("mae")))
    planted = run.metrics["planted"]
    if planted:
        rows.append(("Oracle that knows what was planted, whole test split", planted["oracle_rmse"], None))
        rows.append(("Noise floor, all rows", planted["noise_floor_rmse"], None))
    return rows


def _planted(run: RunData) -> list[tuple[str, str]]:
    """Checks against the planted truth of synthetic data, as (statement, value)."""
    planted = run.metrics["planted"]
    if not planted:
        return []
    rows = [
        ("Texts whose sentiment words agree with the rating", planted["sentiment_agreement"], " %"),
        ("The same of the references", planted["sentiment_agreement_of_references"], " %"),
        (f"Recovery of the {planted['groups']} planted user groups (adjusted Rand index)", planted["user_ari"], ""),
    ]
    error = run.score("rmse")
    for name, key in (("the bias model's", "bias_rmse"), ("the noise floor", "noise_floor_rmse")):
        if error is not None and planted[key]:
            rows.append((f"RMSE against {name}", 100 * error / planted[key], " %"))
    return [(name, _number(value) + (unit if value is not None else "")) for name, value, unit in rows]


def _groups(run: RunData, section: str) -> list[dict[str, Any]]:
    """Rows of the sparsity or cluster table, groups without rows left out."""
    return [
        {"name": SPARSITY.get(name, name), "group": group, "scores": group["metrics"]}
        for name, group in run.metrics[section].items()
        if group["counts"]["rows"]
    ]


def _clusters(run: RunData) -> list[dict[str, Any]]:
    """Each cluster's share, mean rating and scores of the evaluated rows, and the features that set it apart."""
    cluster = run.generations["cluster"].to_numpy()
    rating = run.generations["rating"].to_numpy(zero_copy_only=False)
    rows = _groups(run, "clusters")
    for row in rows:
        inside = np.flatnonzero(cluster == int(row["name"]))
        known = rating[inside][~np.isnan(rating[inside].astype(float))]
        row["share"] = 100 * len(inside) / len(cluster)
        row["rating"] = float(known.mean()) if known.size else None
        row["features"] = run.cluster_features.get(int(row["name"]), [])
    return rows


def _curves(run: RunData) -> list[dict[str, Any]]:
    """For each stage with a log, its charts: one per logged number, one line per phase."""
    titles = {"stage1": "Stage 1", "stage2": "Stage 2", "baseline": "Training"}
    stages = []
    for stage, lines in run.logs.items():
        charts = _charts(lines)
        first = [charts[name] for name in _FIRST_CURVES if name in charts]
        others = [chart for name, chart in charts.items() if name not in _FIRST_CURVES]
        if charts:
            stages.append({"title": titles[stage], "first": first, "others": others})
    return stages


def _charts(lines: Iterable[dict[str, Any]]) -> dict[str, Markup]:
    numbers: dict[str, dict[str, dict[float, float]]] = {}
    for line in lines:
        step = line.get("step")
        if not isinstance(step, int | float):
            continue
        for name, value in line.items():
            if name not in _NOT_CURVES and isinstance(value, int | float) and not isinstance(value, bool):
                # A step that was redone after a restart is logged twice: the last one counts.
                numbers.setdefault(name, {}).setdefault(str(line.get("phase", "")), {})[step] = value
    return {name: _curve(name, phases) for name, phases in numbers.items()}


def _curve(name: str, phases: dict[str, dict[float, float]]) -> Markup:
    lines = [Series(phase, *zip(*sorted(points.items()), strict=True)) for phase, points in phases.items()]
    return line_chart(name.replace("_", " "), lines, x_label="step")


def _warnings(run: RunData) -> list[str]:
    """Warnings of the training loops, each once, with the last epoch that had it."""
    last: dict[str, Any] = {}
    for line in (line for log in run.logs.values() for line in log if "warning" in line):
        last[str(line["warning"])] = line.get("epoch")
    return [text if epoch is None else f"epoch {epoch}: {text}" for text, epoch in last.items()]


def _samples(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Groups of sample rows: one group with all runs' texts where they wrote for the same rows, else one per run."""
    asked = [run.generations.select(["split", "row", "user", "item"]) for run in runs]
    together = all(table.equals(asked[0]) for table in asked)
    groups = [list(runs)] if together else [[run] for run in runs]
    return [
        {
            "name": "" if together else group[0].name,
            "rows": [_sample(group, index) for index in _sample_rows(group[0].generations)],
        }
        for group in groups
    ]


def _sample_rows(generations: pa.Table) -> list[int]:
    """Evenly spaced rows, and the first one of a zero-shot user: none is hand-picked."""
    size = generations.num_rows
    chosen = dict.fromkeys(round(i * (size - 1) / max(SAMPLES - 1, 1)) for i in range(min(SAMPLES, size)))
    strangers = np.flatnonzero(~generations["user_known"].to_numpy(zero_copy_only=False).astype(bool))
    return list(chosen | dict.fromkeys(strangers[:1].tolist()))


def _sample(runs: Sequence[RunData], index: int) -> dict[str, Any]:
    """A row of the split as the first run has it, and each run's own part of it."""
    written = [run.generations.slice(index, 1).to_pylist()[0] for run in runs]
    return written[0] | {"by_run": [row | {"run": run.name} for run, row in zip(runs, written, strict=True)]}


def _number(value: float | None) -> str:
    """Four significant digits, no exponent for ordinary sizes; a dash for what is undefined."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    digits = 2 if abs(value) >= 10 else 3
    return f"{value:,.{digits}f}"


def _shortened(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}… ({len(text):,} characters)"
