"""The `gavamoe` command: parse, call one function, print. Exit codes: 0 done, 1 failed, 2 wrong input or usage.

Heavy imports stand inside the commands, so that `gavamoe --help` answers at once.
"""

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from gavamoe import __version__
from gavamoe.cli_cluster import copy, jobs_app, status, submit
from gavamoe.cli_data import data_app
from gavamoe.cli_human import human_app
from gavamoe.cli_options import (
    DatasetPath,
    Json,
    RunPath,
    ScoreStyle,
    Set,
    counts_of,
    name_of,
    store_work,
    work_folder,
)
from gavamoe.cli_plan import plan
from gavamoe.errors import InputError, RunError

if TYPE_CHECKING:
    from gavamoe.pipeline import Stage
    from gavamoe.text_metrics import Style

app = typer.Typer(
    name="gavamoe",
    help="Train and serve a recommender that says WHY, in a sentence written for one user.\n\n"
    "Start with [bold]gavamoe quickstart[/]; then bring your own reviews: "
    "data prepare, train, evaluate, explain, report.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.add_typer(human_app, name="human-eval")
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(submit)
app.add_typer(jobs_app, name="jobs")
app.command()(status)
app.command()(copy)
app.command()(plan)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gavamoe {__version__}")
        raise typer.Exit


@app.callback()
def _main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and library logs.")] = False,
) -> None:
    del version, debug  # read by _print_version, and by main(), which must know it before parsing fails


@app.command()
def quickstart(
    run_dir: Annotated[Path, typer.Option(help="Where everything goes; an interrupted run there is continued.")] = Path(
        "runs/quickstart"
    ),
    config: Annotated[str, typer.Option(help="Config file or preset.")] = "quickstart",
    overrides: Set = None,
    data_seed: Annotated[int, typer.Option(help="Seed of the synthetic reviews.")] = 0,
) -> None:
    """The main job on embedded data, end to end: reviews, stage 1, stage 2, scores, report; minutes on 2 cores."""
    from gavamoe import summary
    from gavamoe.config import load_config
    from gavamoe.pipeline import quickstart as run_quickstart
    from gavamoe.terminal import TerminalProgress

    with TerminalProgress() as progress:
        run = run_quickstart(run_dir, load_config(config, overrides or []), data_seed=data_seed, progress=progress)
    summary.print_quickstart(run)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="Config file, or a preset: quickstart, smollm2, gpt2, paper.")],
    dataset: DatasetPath,
    run_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", parser=work_folder, help="Run folder or URI; default runs/CONFIG-DATASET."),
    ] = None,
    overrides: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the run folder.")] = False,
    stage: Annotated[str, typer.Option(help="1, 2 or all.")] = "all",
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Then score the test split, write report.html.")] = False,
    json_output: Json = False,
) -> None:
    """Train both stages (or one) on a dataset; progress and metrics go to the run folder."""
    from gavamoe import summary
    from gavamoe.config import load_config
    from gavamoe.pipeline import evaluate_and_report, train_run
    from gavamoe.terminal import TerminalProgress

    if stage not in ("1", "2", "all"):
        raise InputError(f"--stage {stage}: expected 1, 2 or all")
    if evaluate and stage == "1":
        raise InputError("--evaluate: needs both stages, not --stage 1 alone")
    settings = load_config(config, overrides or [])
    folder = run_dir or Path("runs") / f"{Path(config).stem}-{name_of(dataset)}"
    with TerminalProgress() as progress:
        metrics = train_run(settings, dataset, folder, stage=cast("Stage", stage), resume=resume, progress=progress)
        scores = evaluate_and_report(folder, progress=progress) if evaluate else None
    if scores is None:
        summary.print_training(metrics, folder, as_json=json_output)
    else:
        summary.print_evaluation(scores, folder, as_json=json_output)


@app.command()
def tune(
    space: Annotated[
        str, typer.Argument(help="Space file, or gates, gates_beta, stage1, experts, joint, quality_cost.")
    ],
    config: Annotated[str, typer.Argument(help="Config that the space's values are laid over: a file or a preset.")],
    dataset: DatasetPath,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", parser=work_folder, help="Search folder or URI; default runs/tune-SPACE-DATASET."
        ),
    ] = None,
    overrides: Set = None,
    trials: Annotated[int | None, typer.Option(help="Configurations to train; default: the space's budget.")] = None,
    concurrent: Annotated[int | None, typer.Option(help="Trials at once; default: as many as fit.")] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each configuration, for mean and spread.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the search in the folder.")] = False,
    final: Annotated[bool, typer.Option(help="Train the best in full and score it, once, on test.")] = True,
    json_output: Json = False,
) -> None:
    """Search a space of configurations on train and validation; test scores the best one, once."""
    from gavamoe import tune_summary
    from gavamoe.config import load_config
    from gavamoe.tune import run_search

    folder = run_dir or Path("runs") / f"tune-{Path(space).stem}-{name_of(dataset)}"
    with tune_summary.SearchTerminal() as terminal:
        result = run_search(
            space,
            load_config(config, overrides or []),
            dataset,
            folder,
            trials=trials,
            concurrent=concurrent,
            seeds=seeds,
            resume=resume,
            final=final,
            progress=terminal,
        )
    tune_summary.print_search(result, as_json=json_output)
    if result.interrupted:
        raise KeyboardInterrupt


@app.command()
def route(
    run: RunPath,
    user: Annotated[str | None, typer.Option(help="Raw user id, with --item: the route of one pair.")] = None,
    item: Annotated[str | None, typer.Option(help="Raw item id.")] = None,
    sweep_clusters: Annotated[
        str | None,
        typer.Option(metavar="LOW:HIGH", help="Train the run's stage 1 for each K; say which to take."),
    ] = None,
    json_output: Json = False,
) -> None:
    """The clusters: sizes, what tells each apart, and the latent map (Figure 5); or the route of one pair."""
    from gavamoe import summary
    from gavamoe.pipeline import open_run

    if (user is None) != (item is None):
        raise InputError("--user and --item go together")
    if sweep_clusters is not None and user is not None:
        raise InputError("--sweep-clusters and --user exclude each other")
    counts = None if sweep_clusters is None else counts_of(sweep_clusters)
    opened = open_run(run)
    if counts is not None:
        summary.print_cluster_sweep(opened, counts, as_json=json_output)
    elif user is None or item is None:
        summary.print_clusters(opened, as_json=json_output)
    else:
        summary.print_route(opened, user, item, as_json=json_output)


@app.command()
def explain(
    run: RunPath,
    user: Annotated[str, typer.Option(help="Raw user id; an unknown one is served, and said so.")],
    item: Annotated[str, typer.Option(help="Raw item id.")],
    features: Annotated[str | None, typer.Option(help="Comma-separated; default: the item's usual ones.")] = None,
    rating: Annotated[float | None, typer.Option(help="Default: the predicted rating.")] = None,
    overrides: Set = None,
    seed: Annotated[int, typer.Option(min=0, help="For sampling; greedy by default.")] = 0,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Print the text as it is written; default: on a terminal."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Write the explanation for one user and one item."""
    from gavamoe import summary
    from gavamoe.pipeline import open_run

    words = None if features is None else tuple(word.strip() for word in features.split(",") if word.strip())
    summary.print_explanation(
        open_run(run),
        user,
        item,
        words,
        rating,
        overrides=overrides or [],
        seed=seed,
        stream=stream,
        as_json=json_output,
    )


@app.command()
def evaluate(
    run: RunPath,
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    protocol: Annotated[
        str | None, typer.Option(help="given: the row's rating and features; predicted: what serving faces; or both.")
    ] = None,
    style: ScoreStyle = None,
    probe_rows: Annotated[
        int | None, typer.Option(min=0, help="Rows to swap users and gates on; 0: nothing beyond n-grams.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="At most this many rows, chosen by the seed.")] = None,
    bertscore_model: Annotated[str | None, typer.Option(help="Hub id or folder; default: not measured.")] = None,
    bertscore_layer: Annotated[int | None, typer.Option(min=1, help="Layer to compare.")] = None,
    json_output: Json = False,
) -> None:
    """Write explanations for a split and score them."""
    from gavamoe import summary
    from gavamoe.pipeline import evaluate_and_report
    from gavamoe.terminal import TerminalProgress

    with TerminalProgress() as progress:
        metrics = evaluate_and_report(
            run,
            progress=progress,
            split=split,
            protocol=protocol,
            style=style,
            probe_rows=probe_rows,
            rows=rows,
            bertscore_model=bertscore_model,
            bertscore_layer=bertscore_layer,
        )
    summary.print_evaluation(metrics, run, as_json=json_output)


@app.command()
def ablate(
    config: Annotated[str, typer.Argument(help="Config of the full system: a file or a preset.")],
    dataset: Annotated[Path, typer.Option(help="Dataset folder.")],
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of the comparison; default runs/ablate-CONFIG-DATASET.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Trainings of each system.")] = 3,
    only: Annotated[
        str | None, typer.Option(metavar="A,B", help="Systems: full, base, copy-item, gates-4 ...; default: all.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="Start no further run after these; call again.")] = None,
    overrides: Set = None,
    json_output: Json = False,
) -> None:
    """Compare the full system with its ablations and with systems that copy (Figure 3, Tables 2 and 3), over seeds.

    Every system has the config's budget. Runs that are there are kept: call it again to go on.
    """
    from gavamoe import systems_summary
    from gavamoe.ablate import run_ablation
    from gavamoe.config import load_config
    from gavamoe.terminal import TerminalProgress

    folder = run_dir or Path("runs") / f"ablate-{Path(config).stem}-{dataset.resolve().name}"
    names = [name.strip() for name in only.split(",") if name.strip()] if only else []
    with TerminalProgress() as progress:
        comparison = run_ablation(
            load_config(config, overrides or []),
            dataset,
            folder,
            seeds=seeds,
            only=names,
            minutes=minutes,
            progress=progress,
        )
    systems_summary.print_comparison(comparison, folder, as_json=json_output)


@app.command()
def score(
    predictions: Annotated[Path, typer.Argument(help="Text (a line a row), JSONL, CSV or Parquet.")],
    references: Annotated[
        Path | None, typer.Argument(help="The same; default: another column of the predictions' file.")
    ] = None,
    prediction_column: Annotated[str | None, typer.Option(help="Default: prediction or generated.")] = None,
    reference_column: Annotated[str | None, typer.Option(help="Default: reference, explanation or text.")] = None,
    features_column: Annotated[str | None, typer.Option(help="Feature words of each row, for FMR, FCR, DIV.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Another system's texts for the same rows: which differences are chance?")
    ] = None,
    style: ScoreStyle = None,
    bertscore_model: Annotated[str | None, typer.Option(help="Hub id or folder; default: not measured.")] = None,
    bertscore_layer: Annotated[int | None, typer.Option(min=1, help="Layer to compare.")] = None,
    json_output: Json = False,
) -> None:
    """Score any system's texts through the same metrics."""
    from gavamoe import summary
    from gavamoe.scoring import Reading, score_files
    from gavamoe.terminal import TerminalProgress

    with TerminalProgress() as progress:
        progress.step("Score texts")
        result = score_files(
            predictions,
            references,
            against=against,
            reading=Reading(prediction_column, reference_column, features_column),
            style=cast("Style", style or "sacrebleu"),  # checked there
            bertscore_model=bertscore_model or "",
            bertscore_layer=bertscore_layer or 0,
            on_progress=progress.count,
        )
    summary.print_scores(result, as_json=json_output)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Evaluated run folders.")],
    out: Annotated[Path | None, typer.Option(help="HTML file; default: report.html in the (first) run folder.")] = None,
    human: Annotated[Path | None, typer.Option(help="Result file of `gavamoe human-eval import`.")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Folder for the tables as CSV and the figures as PNG too.")
    ] = None,
) -> None:
    """Tables and figures of one or more runs, or of an ablation, side by side: one self-contained HTML page."""
    from gavamoe.report import write_report
    from gavamoe.terminal import console

    written = write_report(runs, out or runs[0] / "report.html", human=human, figures=figures)
    console.print(f"report: {written}", markup=False, soft_wrap=True)


@app.command()
def serve(
    run: RunPath,
    host: Annotated[str, typer.Option(help="127.0.0.1: this machine only; 0.0.0.0: everyone who can reach it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    settings: Annotated[
        Path | None, typer.Option(help="YAML with the app builder's arguments (docs/serve.md).")
    ] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="Generator replicas.")] = None,
    api_keys: Annotated[Path | None, typer.Option(help="File with one sha256:HEX of an API key a line.")] = None,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535, help="Prometheus metrics, on 127.0.0.1.")] = 8001,
    update: Annotated[bool, typer.Option("--update", help="Put RUN into the service that is up.")] = False,
) -> None:
    """Serve explanations over HTTP with Ray Serve: a page at /, the interface's description at /docs."""
    from gavamoe.serving.launch import serve_command

    serve_command(run, host, port, settings, replicas, api_keys, metrics_port, update=update)


def main() -> None:
    """Entry point: runs the app and turns errors into one line and an exit code."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    _quiet_libraries(debug)
    try:
        try:
            app()
        finally:
            store_work()
    except (InputError, RunError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        print("interrupted; --resume continues a training run", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        print(f"error: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
        sys.exit(1)


def _quiet_libraries(debug: bool) -> None:
    """Libraries log to standard error by default, in the middle of progress bars."""
    if debug:
        return
    logging.basicConfig(level=logging.ERROR)
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_ACCELERATOR_LOG_LEVEL", "ERROR")


def run_job(*command: str) -> None:
    """`main()` with the words of `command` before the script's own arguments; the scripts in jobs/ are such calls."""
    sys.argv = ["gavamoe", *command, *sys.argv[1:]]
    main()
