"""`gavamoe evaluate`, `score`, `ablate` and `report`: parse, call, print."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from gavamoe.cli.options import (
    DatasetOfRun,
    DatasetPath,
    Device,
    Json,
    Quantize,
    RunPath,
    ScoreStyle,
    Set,
    Workers,
    local_path,
    name_of,
    run_folder,
    training_config,
)

if TYPE_CHECKING:
    from gavamoe.evaluation.metrics.text_scores import Style


def evaluate(
    run: RunPath,
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "test",
    protocol: Annotated[
        str | None, typer.Option(help="given: the row's rating and features; predicted: what serving faces; or both.")
    ] = None,
    style: ScoreStyle = None,
    probe_rows: Annotated[
        int | None, typer.Option(min=0, help="Rows to swap users and gates on; 0: faithfulness is not measured.")
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="At most this many rows, chosen by the seed.")] = None,
    bertscore_model: Annotated[str | None, typer.Option(help="Hub id or folder; default: not measured.")] = None,
    bertscore_layer: Annotated[int | None, typer.Option(min=1, help="Layer to compare.")] = None,
    row_losses: Annotated[
        bool | None, typer.Option("--row-losses/--no-row-losses", help="Losses of the rows' own texts, row by row.")
    ] = None,
    dataset: DatasetOfRun = None,
    device: Device = None,
    workers: Workers = None,
    quantize: Quantize = None,
    json_output: Json = False,
) -> None:
    """Write explanations for a split and score them. What a run that was cut off has written is not written again."""
    from gavamoe.cli.output import scores
    from gavamoe.cli.terminal import TerminalProgress
    from gavamoe.pipeline import evaluate_and_report

    with TerminalProgress() as progress:
        metrics = evaluate_and_report(
            run,
            progress=progress,
            dataset=dataset,
            split=split,
            protocol=protocol,
            style=style,
            probe_rows=probe_rows,
            rows=rows,
            bertscore_model=bertscore_model,
            bertscore_layer=bertscore_layer,
            row_losses=row_losses,
            device=device,
            workers=workers,
            quantize=quantize,
        )
    scores.print_evaluation(metrics, run, as_json=json_output)


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
    from gavamoe.cli.output import scores
    from gavamoe.cli.terminal import TerminalProgress
    from gavamoe.evaluation.score_files import Reading, score_files

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
    scores.print_scores(result, as_json=json_output)


def ablate(
    config: Annotated[str, typer.Argument(help="Config of the full system: a file or a preset.")],
    dataset: DatasetPath,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", parser=local_path, help="Folder of the comparison; default runs/ablate-CONFIG-DATASET."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Trainings of each system.")] = 3,
    only: Annotated[
        str | None, typer.Option(metavar="A,B", help="Systems: full, base, copy-item, gates-4 ...; default: all.")
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Factors such as 0.3,1,3: each system's learning rate, chosen on validation."),
    ] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="Start no further run after these; call again.")] = None,
    overrides: Set = None,
    json_output: Json = False,
) -> None:
    """Compare the full system with its ablations and with systems that copy (Figure 3, Tables 2 and 3), over seeds.

    Every system has the config's budget. Runs that are there are kept: call it again to go on.
    """
    from gavamoe.cli.output import systems
    from gavamoe.cli.terminal import TerminalProgress
    from gavamoe.experiments.ablate import run_ablation
    from gavamoe.experiments.rates import parse_factors

    folder = run_dir or Path("runs") / f"ablate-{Path(config).stem}-{name_of(dataset)}"
    names = [name.strip() for name in only.split(",") if name.strip()] if only else []
    with TerminalProgress() as progress:
        comparison = run_ablation(
            training_config(config, overrides),
            dataset,
            folder,
            seeds=seeds,
            only=names,
            rates=parse_factors(rates) if rates else (),
            minutes=minutes,
            progress=progress,
        )
    systems.print_comparison(comparison, folder, as_json=json_output)


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", parser=run_folder, help="Evaluated run folders, or URIs.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", parser=local_path, help="HTML file; default: report.html in the (first) run folder."
        ),
    ] = None,
    human: Annotated[Path | None, typer.Option(help="Result file of `gavamoe human-eval import`.")] = None,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", parser=local_path, help="For the tables as CSV and the figures as PNG too."),
    ] = None,
) -> None:
    """Tables and figures of one or more runs, or of an ablation, side by side: one self-contained HTML page."""
    from gavamoe.artifacts.lock import locked_folder
    from gavamoe.artifacts.run import RunFolder
    from gavamoe.cli.terminal import console
    from gavamoe.report.page import write_report

    into_run = out is None and runs[0].is_dir()  # what is no run is refused below
    with locked_folder(runs[0]) if into_run else nullcontext():
        written = write_report(runs, out or RunFolder(runs[0]).report, human=human, figures=figures)
    console.print(f"report: {written}", markup=False, soft_wrap=True)
