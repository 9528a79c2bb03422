"""`gavamoe route` and `explain`, which use a trained run: parse, compute, print.

What is heavy to import, torch before all, is imported inside the functions.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gavamoe.cli.options import DatasetOfRun, Device, Json, Quantize, RunPath, Set, Workers, counts_of
from gavamoe.errors import InputError

if TYPE_CHECKING:
    from gavamoe.artifacts.run import Run
    from gavamoe.config.schema import GenerationConfig, RunConfig
    from gavamoe.data.catalog import Catalog
    from gavamoe.generation.generator import Explanation, Piece


def route(
    run: RunPath,
    user: Annotated[str | None, typer.Option(help="Raw user id, with --item: the route of one pair.")] = None,
    item: Annotated[str | None, typer.Option(help="Raw item id.")] = None,
    sweep_clusters: Annotated[
        str | None,
        typer.Option(metavar="LOW:HIGH", help="Train the run's stage 1 for each K; say which to take."),
    ] = None,
    dataset: DatasetOfRun = None,
    json_output: Json = False,
) -> None:
    """The clusters: sizes, what tells each apart, and the latent map (Figure 5); or the route of one pair."""
    from gavamoe.artifacts.run import open_run

    if (user is None) != (item is None):
        raise InputError("--user and --item go together")
    if sweep_clusters is not None and user is not None:
        raise InputError("--sweep-clusters and --user exclude each other")
    counts = None if sweep_clusters is None else counts_of(sweep_clusters)
    opened = open_run(run)
    opened.refuse_baseline("only GaVaMoE routes users to clusters")
    if counts is not None:
        _sweep(opened, counts, dataset, as_json=json_output)
    elif user is None or item is None:
        _clusters(opened, dataset, as_json=json_output)
    else:
        _route(opened, user, item, dataset, as_json=json_output)


def _catalog_of(run: "Run", dataset: Path | None) -> "tuple[Catalog, bool]":
    """The catalog of a run's users and items, and whether its data are implicit: of stage 2's artifact, so that no
    dataset is opened. Only a run without stage 2 is asked for its dataset."""
    from gavamoe.artifacts.manifest import read_manifest
    from gavamoe.data.catalog import Catalog
    from gavamoe.data.dataset import dataset_of_run
    from gavamoe.generation.artifact import CATALOG_FOLDER, read_prompt_spec

    if not run.stage2.is_dir():
        data = dataset_of_run(run, dataset)
        return data.catalog, data.implicit
    trained = [read_manifest(run.path / stage, stage, verify=False) for stage in ("stage1", "stage2")]
    if trained[0].inputs.get("dataset") != trained[1].inputs.get("dataset"):
        raise InputError(f"{run.path}: stage1/ and stage2/ were trained on different datasets; train it again")
    return Catalog.load(run.stage2 / CATALOG_FOLDER), read_prompt_spec(run.stage2).scale is None


def _clusters(run: "Run", dataset: Path | None, *, as_json: bool) -> None:
    from gavamoe.artifacts.files import read_json
    from gavamoe.artifacts.run import METRICS_FILE
    from gavamoe.cli.output.explanation import print_clusters
    from gavamoe.report.latent_map import plot_latents
    from gavamoe.stage1.artifact import load_stage1
    from gavamoe.stage1.clusters import describe_clusters
    from gavamoe.stage1.routes import ROUTES_FILE, TrainingPairs
    from gavamoe.stage1.user_words import ClusterWords

    model, _ = load_stage1(run.stage1)
    catalog, implicit = _catalog_of(run, dataset)
    pairs = TrainingPairs.read(run.stage1 / ROUTES_FILE, catalog.known_users)
    words = ClusterWords.load(run.stage1, pairs.clusters)
    clusters = describe_clusters(pairs, catalog, words, implicit=implicit)
    plot_latents(model, pairs, run.latent_map, seed=run.config.seed)
    print_clusters(clusters, read_json(run.stage1 / METRICS_FILE), run.latent_map, as_json=as_json)


def _sweep(run: "Run", counts: Sequence[int], dataset: Path | None, *, as_json: bool) -> None:
    from gavamoe.cli.output.explanation import print_cluster_sweep
    from gavamoe.cli.terminal import TerminalProgress
    from gavamoe.experiments.cluster_sweep import sweep_clusters

    with TerminalProgress() as progress:
        progress.step("Train stage 1 for each number of clusters, two seeds each")
        sweep, picture = sweep_clusters(run, counts, moved_to=dataset, on_done=progress.count)
    print_cluster_sweep(sweep, picture, as_json=as_json)


def _route(run: "Run", user: str, item: str, dataset: Path | None, *, as_json: bool) -> None:
    import numpy as np

    from gavamoe.cli.output.explanation import print_route
    from gavamoe.stage1.artifact import load_stage1
    from gavamoe.stage1.routes import route_pairs

    model, _ = load_stage1(run.stage1)
    catalog, _ = _catalog_of(run, dataset)
    user_index, item_index = catalog.user_or_unknown(user), catalog.item_or_unknown(item)
    routes = route_pairs(model, np.array([user_index]), np.array([item_index]))
    value = {
        "user": user,
        "item": item,
        "user_known": user_index < catalog.known_users,
        "item_known": item_index < catalog.known_items,
        "cluster": int(routes.cluster[0]),
        "responsibilities": [float(share) for share in routes.responsibilities[0]],
        "predicted_rating": float(routes.rating[0]),
    }
    print_route(value, as_json=as_json)


def explain(
    run: RunPath,
    item: Annotated[str | None, typer.Option(help="Raw item id; unknown ids are served and reported as such.")] = None,
    user: Annotated[
        str | None, typer.Option(help="Raw user id; unknown ids are served and reported as such. Or --history.")
    ] = None,
    history: Annotated[
        Path | None,
        typer.Option(
            help="Of a user that training never saw: JSON lines of item, rating, text (any may be left out; 20 lines)."
        ),
    ] = None,
    features: Annotated[str | None, typer.Option(help="Comma-separated; default: the likely ones.")] = None,
    rating: Annotated[float | None, typer.Option(help="Default: the predicted rating.")] = None,
    requests: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="In place of a pair: Parquet, JSON lines or CSV of user, item, perhaps rating, features, history.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the texts of --requests go: .parquet, .jsonl or .csv.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="With --requests: go on where it was interrupted.")] = False,
    workers: Workers = None,
    overrides: Set = None,
    seed: Annotated[int, typer.Option(min=0, help="For sampling; greedy by default.")] = 0,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Print the text as it is written; default: on a terminal."),
    ] = None,
    device: Device = None,
    quantize: Quantize = None,
    json_output: Json = False,
) -> None:
    """Write the explanation for one user and one item, or for all pairs of a file; users may be ones never seen.

    For example: gavamoe explain RUN --item I7 --history mine.jsonl, where mine.jsonl has lines such as
    {"item": "I3", "rating": 4, "text": "Short and witty."}

    Or: gavamoe explain RUN --requests pairs.csv --out texts.csv, where pairs.csv begins with user,item,rating
    """
    from gavamoe.artifacts.run import open_run
    from gavamoe.config.files import override_config
    from gavamoe.generation.placement import writing_device, writing_workers

    if requests is not None:
        if out is None:
            raise InputError("--requests needs --out FILE, for the texts")
        given = {"--user": user, "--item": item, "--history": history, "--features": features, "--rating": rating}
        if named := [name for name, value in given.items() if value is not None]:
            raise InputError(f"--requests has {', '.join(named)} in its file's rows; leave out the option")
    elif out is not None or resume or workers:
        raise InputError("--out, --resume and --workers belong to --requests FILE")
    elif item is None:
        raise InputError("explain needs --item, or --requests FILE for many pairs")
    elif user is None and history is None:
        raise InputError("explain needs --user, or --history of a user that training never saw")
    opened = open_run(run)
    if quantize is not None:
        overrides = [*(overrides or []), f"generation.quantize={quantize}"]
    config = override_config(opened.config, overrides or [])
    generation = config.generation
    if opened.config.system != "gavamoe" and generation.quantize != "none":
        raise InputError(f"{run}: {opened.config.system} is not written in fewer bits; leave out --quantize")
    place = writing_device(device, gpu=opened.config.runtime.gpu)
    if requests is not None:
        assert out is not None
        _explain_file(
            opened,
            requests,
            out,
            config,
            place,
            workers=writing_workers(config.runtime, workers, device),
            seed=seed,
            resume=resume,
            as_json=json_output,
        )
        return
    assert item is not None
    words = None if features is None else tuple(word.strip() for word in features.split(",") if word.strip())
    _explain_pair(
        opened, (user, item), rating, words, history, generation, place, seed=seed, stream=stream, as_json=json_output
    )


def _explain_pair(
    run: "Run",
    pair: tuple[str | None, str],
    rating: float | None,
    features: tuple[str, ...] | None,
    history: Path | None,
    generation: "GenerationConfig",
    device: str,
    *,
    seed: int,
    stream: bool | None,
    as_json: bool,
) -> None:
    from gavamoe.baselines.writing import BaselineWriter
    from gavamoe.cli.output.explanation import print_explanation
    from gavamoe.generation.generator import ExplanationGenerator
    from gavamoe.generation.request import ExplanationRequest
    from gavamoe.stage1.strangers.history import read_history

    user, item = pair
    if run.config.system != "gavamoe":
        if history is not None or stream:
            raise InputError(
                f"{run.path}: {run.config.system} takes no --history, and writes texts whole, not --stream"
            )
        writer = BaselineWriter.load(run.baseline, device)
        ids = writer.catalog.user_or_unknown(user or ""), writer.catalog.item_or_unknown(item)
        [value] = writer.explain([ExplanationRequest(*ids, rating, features)], generation)
        print_explanation(value, user, item, history=0, shown=False, as_json=as_json)
        return
    generator = ExplanationGenerator.load(run.stage2, device, generation.dtype, generation.quantize)
    catalog = generator.catalog
    entries = () if history is None else generator.filler.history(read_history(history))
    index = catalog.n_users if user is None else catalog.user_or_unknown(user)
    request = ExplanationRequest(index, catalog.item_or_unknown(item), rating, features, entries)
    live = sys.stdout.isatty() if stream is None else stream
    if generation.beams > 1 and not stream:
        [value] = generator.explain([request], generation, seed=seed)
        live = False
    else:
        live = live and not as_json
        value = _follow(generator.stream([request], generation, seed=seed), live=live)
    print_explanation(value, user, item, history=len(entries), shown=live, as_json=as_json)


def _explain_file(
    run: "Run",
    requests: Path,
    out: Path,
    config: "RunConfig",
    device: str,
    *,
    workers: int,
    seed: int,
    resume: bool,
    as_json: bool,
) -> None:
    import time
    from contextlib import ExitStack

    from gavamoe.artifacts.manifest import read_manifest
    from gavamoe.baselines.scores import load_writer
    from gavamoe.baselines.writing import BaselineWriter
    from gavamoe.cli.terminal import TerminalProgress, console, print_json
    from gavamoe.generation.batch.blocks import written_by, written_here
    from gavamoe.generation.batch.request_file import RequestFile, RequestRow, as_request
    from gavamoe.generation.batch.text_file import output_form, write_texts
    from gavamoe.generation.request import ExplanationRequest, RequestFiller
    from gavamoe.runtime.ray_pool import BlockPool
    from gavamoe.runtime.ray_train import ray_session

    output_form(out)
    generation, placement, own = config.generation, config.runtime, run.config.system == "gavamoe"
    with TerminalProgress() as progress, ExitStack() as stack:
        progress.step("Read the run")
        # The language model is read where it writes: with workers, not here.
        checks = RequestFiller.load(run.stage2) if own else BaselineWriter.load(run.baseline)
        entries = checks.history if isinstance(checks, RequestFiller) else None

        def to_request(row: RequestRow) -> ExplanationRequest:
            return as_request(row, checks.catalog, entries)

        progress.step("Look through the requests")
        source = RequestFile.open(requests, lambda row: checks.check(to_request(row)))
        arguments: dict[str, Any] = {"run": run.path.absolute(), "dtype": generation.dtype, "bits": generation.quantize}
        if workers:
            stack.enter_context(ray_session(placement))
            pool = BlockPool(load_writer, arguments, workers=workers, placement=placement)
            write = written_by(stack.enter_context(pool))
        else:
            write = written_here(load_writer(**arguments, device=device))
        progress.step("Write texts")
        started, first = time.monotonic(), -1

        def tell(done: int, total: int) -> None:
            nonlocal first
            first = done if first < 0 else first  # what an earlier command wrote does not count
            rate = (done - first) / max(time.monotonic() - started, 1e-9)
            progress.line({"phase": f"{rate:.1f} texts/s" if rate else "", "step": done, "steps": total})

        model = read_manifest(run.path / run.writer, run.writer, verify=False).fingerprint
        before = write_texts(
            source, out, write, to_request, generation, model=model, seed=seed, resume=resume, on_progress=tell
        )
    seconds = time.monotonic() - started
    if as_json:
        print_json({"out": str(out), "rows": source.rows, "already_written": before, "seconds": round(seconds, 3)})
    console.print(
        f"{out}: {source.rows:,} texts, {source.rows - before:,} of them now, in {seconds:.1f} s", markup=False
    )


def _follow(pieces: "Iterator[Piece]", *, live: bool) -> "Explanation":
    """The explanation of one request's pieces, which are printed as they come if `live`."""
    explanation = None
    for piece in pieces:
        if live:
            print(piece.text, end="", flush=True)
        explanation = piece.explanation or explanation
    assert explanation is not None, "a row's last piece carries its explanation"
    return explanation
