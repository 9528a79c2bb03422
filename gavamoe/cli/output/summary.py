"""What each command prints when it is done: tables for people, one JSON document for machines."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from rich.markup import escape

from gavamoe.artifacts.files import read_json
from gavamoe.cli.terminal import console, print_json, print_table
from gavamoe.data.catalog import Catalog
from gavamoe.data.describe import Description
from gavamoe.data.prepare import PrepareSummary
from gavamoe.evaluation.faithfulness.measure import BEYOND
from gavamoe.evaluation.metrics.registry import METRICS, Metric
from gavamoe.pipeline import Run

if TYPE_CHECKING:  # torch takes seconds to import, and most commands need none
    from gavamoe.generation.generator import Explanation, Piece

SAMPLES = 5


def print_prepared(result: PrepareSummary, out: Path, *, as_json: bool) -> None:
    """Rows read, kept and rejected, by reason."""
    if as_json:
        print_json(result.model_dump(mode="json"))
    rows = [
        ("read", result.read),
        *[(f"rejected: {reason}", count) for reason, count in result.rejected.items()],
        ("left out: a later row has the same user and item", result.repeated_pairs),
        ("left out: in no index file", result.in_no_index),
        ("kept", result.kept),
        *[(f"  {split}", count) for split, count in result.rows.items()],
        ("kept rows without a feature", result.without_feature),
        ("texts cut to the longest allowed", result.texts_cut),
    ]
    print_table(f"Dataset {out}", ["", "rows"], [row for row in rows if row[1] or row[0] in ("read", "kept")])
    console.print(
        f"{result.users:,} users, {result.items:,} items ({result.titles:,} with a title);"
        f" rejected rows are in {out / 'rejected.jsonl'}",
        markup=False,
        soft_wrap=True,
    )


def print_description(description: Description, *, as_json: bool) -> None:
    """Table 1 of the paper for one dataset, and more."""
    if as_json:
        print_json(description.model_dump(mode="json"))
    print_table("Dataset", ["", ""], description.rows())


def print_training(metrics: dict[str, Any], run_dir: Path, *, as_json: bool) -> None:
    """The stages' final metrics."""
    if as_json:
        print_json(metrics)
    for stage, values in metrics.items():
        print_table(f"{run_dir / stage}", ["", ""], _flat(values))
        if values.get("stopped_early"):
            console.print(f"{stage} stopped early: validation no longer improved ({stage}.patience)", markup=False)
    console.print(f"run: {run_dir}   next: gavamoe evaluate {run_dir}", markup=False, soft_wrap=True)


def print_evaluation(metrics: dict[str, Any], run_dir: Path, *, as_json: bool) -> None:
    """Our scores beside those of the constant explanation, with the counts they rest on."""
    if as_json:
        print_json(metrics)
    _print_scores(metrics, run_dir)
    _print_beyond(metrics)
    console.print(f"report: {run_dir / 'report.html'}", markup=False, soft_wrap=True)


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
        found = other["differences"].get(name)
        cells = (found["difference"], _span(found["interval"]), f"{found['p']:.3f}") if found else (None, "", "")
        if ours is not None:
            rows.append((_label(METRICS[name]), ours, other["metrics"][name], *cells))
    title = f"{result['predictions']} against {other['predictions']}"
    print_table(title, ["metric", "first", "second", "difference", "95 % interval", "p"], rows)
    console.print("p: approximate randomisation over rows, two-sided; it knows nothing of training seeds", markup=False)


def _label(metric: Metric) -> str:
    return f"{metric.label} {metric.arrow}"


def _span(interval: list[float] | None) -> str:
    return f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""


def print_clusters(run: Run, *, as_json: bool) -> None:
    """`gavamoe route RUN`: what each cluster is, and the latent map."""
    from gavamoe.data.dataset import open_dataset
    from gavamoe.stage1.artifact import load_stage1
    from gavamoe.stage1.clusters import describe_clusters, plot_latents

    model, _ = load_stage1(run.stage1)
    dataset = open_dataset(run.dataset)
    clusters = describe_clusters(dataset, run.stage1 / "routes.parquet")
    picture = run.path / "clusters.png"
    plot_latents(model, dataset, picture, seed=run.config.seed)
    if as_json:
        print_json([cluster.model_dump(mode="json") for cluster in clusters])
    for cluster in clusters:
        number, *cells = cluster.row()
        print_table(f"Cluster {number}", ["", ""], zip(cluster.labels(), cells, strict=True))
    console.print(f"latent map: {picture}", markup=False, soft_wrap=True)


def print_cluster_sweep(run: Run, counts: Sequence[int], *, as_json: bool) -> None:
    """`gavamoe route RUN --sweep-clusters LOW:HIGH`: one row per K, and which to take."""
    from gavamoe.cli.terminal import TerminalProgress
    from gavamoe.experiments.cluster_sweep import sweep_clusters

    with TerminalProgress() as progress:
        progress.step("Train stage 1 for each number of clusters, two seeds each")
        sweep, picture = sweep_clusters(run, counts, on_done=progress.count)
    if as_json:
        print_json(sweep.model_dump(mode="json"))
    columns = ["clusters", "valid ELBO", "reconstruction", "RMSE", "smallest cluster", "stability (ARI)", "seconds"]
    planted = sweep.rows[0].user_ari is not None
    rows = [
        (str(r.clusters), r.elbo, r.reconstruction, r.rmse, f"{r.smallest_share:.1%}", r.stability, round(r.seconds))
        + ((r.user_ari,) if planted else ())
        for r in sweep.rows
    ]
    print_table("Stage 1 by number of clusters", columns + (["planted groups (ARI)"] if planted else []), rows)
    console.print(f"recommended: {sweep.recommended} clusters, {sweep.reason}", markup=False, soft_wrap=True)
    console.print(f"rule: {sweep.rule}", markup=False, soft_wrap=True)
    console.print(f"plot: {picture}", markup=False, soft_wrap=True)


def print_route(run: Run, user: str, item: str, *, as_json: bool) -> None:
    """`gavamoe route RUN --user U --item I`."""
    import numpy as np

    from gavamoe.data.dataset import open_dataset
    from gavamoe.stage1.artifact import load_stage1
    from gavamoe.stage1.routes import route_pairs

    model, _ = load_stage1(run.stage1)
    catalog = open_dataset(run.dataset).catalog
    pair = _indices(catalog, user, item)
    routes = route_pairs(model, np.array(pair[:1]), np.array(pair[1:]))
    value = {
        "user": user,
        "item": item,
        "user_known": pair[0] < catalog.known_users,
        "item_known": pair[1] < catalog.known_items,
        "cluster": int(routes.cluster[0]),
        "responsibilities": [float(share) for share in routes.responsibilities[0]],
        "predicted_rating": float(routes.rating[0]),
    }
    if as_json:
        print_json(value)
    print_table("Route of one pair", ["", ""], [(name, _text(found)) for name, found in value.items()])
    _print_unknown(pair[0] < catalog.known_users, pair[1] < catalog.known_items)


def print_explanation(
    run: Run,
    user: str,
    item: str,
    features: tuple[str, ...] | None,
    rating: float | None,
    *,
    overrides: Sequence[str],
    seed: int,
    stream: bool | None,
    as_json: bool,
) -> None:
    """`gavamoe explain`: the text on standard output, how it came about on standard error.

    `stream` prints the text as it is written; None: if standard output is a terminal.
    """

    from gavamoe.config.files import override_config
    from gavamoe.generation.generator import ExplanationGenerator
    from gavamoe.generation.request import ExplanationRequest

    config = override_config(run.config, overrides)
    explainer = ExplanationGenerator.load(run.stage2)
    indices = _indices(explainer.catalog, user, item)
    request = ExplanationRequest(*indices, rating=rating, features=features)
    live = sys.stdout.isatty() if stream is None else stream
    if config.generation.beams > 1 and not stream:
        [value] = explainer.explain([request], config.generation, seed=seed)
        live = False
    else:  # the same draws whether or not the text is shown as it grows
        value = _follow(explainer.stream([request], config.generation, seed=seed), live=live and not as_json)
    if as_json:
        print_json({"user": user, "item": item} | asdict(value))
        return
    print("" if live else value.text)
    _print_unknown(value.user_known, value.item_known)
    shares = ", ".join(f"{share:.2f}" for share in value.responsibilities)
    console.print(f"cluster {value.cluster} (responsibilities {shares})", markup=False)
    if value.rating is not None:
        origin = "given" if value.rating_given else f"predicted as {value.predicted_rating:.2f}"
        console.print(f"rating {value.rating:g} ({origin})", markup=False)
    if value.features:
        origin = "given" if value.features_given else "the usual ones"
        console.print(f"features {', '.join(value.features)} ({origin})", markup=False)


def _follow(pieces: "Iterator[Piece]", *, live: bool) -> "Explanation":
    """The explanation of one request's pieces, which are printed as they come if `live`."""
    explanation = None
    for piece in pieces:
        if live:
            print(piece.text, end="", flush=True)
        explanation = piece.explanation or explanation
    assert explanation is not None, "a row's last piece carries its explanation"
    return explanation


def print_quickstart(run: Run) -> None:
    """Scores beside a constant's, five samples, where the report is."""
    metrics = read_json(run.path / "evaluation" / "metrics.json")
    _print_scores(metrics, run.path)
    samples = _samples(run.path)
    _print_samples(samples)
    console.print(f"\nreport: {run.path / 'report.html'}", markup=False, soft_wrap=True)
    pair = f"--user {samples[0]['user']} --item {samples[0]['item']}"
    console.print(f"next:   gavamoe explain {run.path} {pair}", markup=False, soft_wrap=True)


def _indices(catalog: Catalog, user: str, item: str) -> tuple[int, int]:
    """Indices of raw ids; one past the last stands for an id that the dataset never saw."""
    user_index, item_index = catalog.user_index(user), catalog.item_index(item)
    return (
        catalog.n_users if user_index is None else user_index,
        catalog.n_items if item_index is None else item_index,
    )


def _print_unknown(user_known: bool, item_known: bool) -> None:
    for kind, known in (("user", user_known), ("item", item_known)):
        if not known:
            console.print(f"{kind} not seen in training: the unknown-{kind} embedding stands in", markup=False)


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


def _print_beyond(metrics: dict[str, Any]) -> None:
    """What n-gram scores hide, with each protocol's own column where both were evaluated."""
    sections = {metrics["protocol"]: metrics["beyond"]}
    if metrics["predicted"]:
        sections["predicted"] = metrics["predicted"]["beyond"]
    if not all(sections.values()):
        return
    rows = []
    for name, metric in BEYOND.items():
        found = [section["scores"][name] for section in sections.values()]
        if found[0] is not None:
            values = [each["value"] for each in found]
            rows.append((_label(metric), *values, found[0]["references"], found[0]["chance"], metric.unit))
    print_table("Beyond n-grams (intervals are in the report)", ["", *sections, "references", "chance", ""], rows)


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
    table = pq.read_table(run_dir / "evaluation" / "generations.parquet")
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


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """The numbers in nested metrics, as ("test rmse", .75) rows; series and lists are left to the files."""
    rows: list[tuple[str, object]] = []
    for name, value in values.items():
        label = prefix + name.replace("_", " ")
        if isinstance(value, dict):
            rows += _flat(value, f"{label} ")
        elif _is_number(value):
            rows.append((label, value))
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(f"{number:.3f}" for number in value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)
