"""`gavamoe quickstart`, `train` and `tune`: parse, call, print."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from gavamoe.cli.options import DatasetPath, Json, Set, local_path, name_of, training_config, work_folder
from gavamoe.errors import InputError

if TYPE_CHECKING:
    from gavamoe.pipeline import Stage


def quickstart(
    run_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            parser=local_path,
            help="Where everything goes; an interrupted run there is continued. Default: runs/quickstart.",
        ),
    ] = None,
    config: Annotated[str, typer.Option(help="Config file or preset.")] = "quickstart",
    overrides: Set = None,
    data_seed: Annotated[int, typer.Option(help="Seed of the synthetic reviews.")] = 0,
) -> None:
    """The main job on embedded data, end to end: reviews, stage 1, stage 2, scores, report; minutes on 2 cores."""
    from gavamoe.cli.output.scores import print_quickstart
    from gavamoe.cli.terminal import TerminalProgress
    from gavamoe.pipeline import quickstart as run_quickstart

    folder = run_dir or Path("runs/quickstart")
    with TerminalProgress() as progress:
        run = run_quickstart(folder, training_config(config, overrides), data_seed=data_seed, progress=progress)
    print_quickstart(run)


def train(
    config: Annotated[
        str, typer.Argument(help="Config file, or a preset: quickstart, reviews, smollm2, gpt2, paper, paper-fast.")
    ],
    dataset: DatasetPath,
    run_dir: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", parser=work_folder, help="Run folder or URI; default runs/CONFIG-DATASET."),
    ] = None,
    overrides: Set = None,
    system: Annotated[
        str | None, typer.Option(help="A baseline in GaVaMoE's place: peter, peter-plus ...; docs/baselines.md.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the run folder.")] = False,
    stage: Annotated[str, typer.Option(help="1, 2 or all.")] = "all",
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Then score the test split, write report.html.")] = False,
    json_output: Json = False,
) -> None:
    """Train both stages (or one) on a dataset; progress and metrics go to the run folder."""
    from gavamoe.cli.output.scores import print_evaluation
    from gavamoe.cli.output.training import print_training
    from gavamoe.cli.terminal import TerminalProgress
    from gavamoe.pipeline import evaluate_and_report, train_run

    if stage not in ("1", "2", "all"):
        raise InputError(f"--stage {stage}: expected 1, 2 or all")
    if evaluate and stage == "1":
        raise InputError("--evaluate: needs both stages, not --stage 1 alone")
    named = [] if system is None else [f"system={system}"]
    settings = training_config(config, [*(overrides or []), *named])
    own = "" if settings.system == "gavamoe" else f"-{settings.system}"
    folder = run_dir or Path("runs") / f"{Path(config).stem}{own}-{name_of(dataset)}"
    with TerminalProgress() as progress:
        metrics = train_run(settings, dataset, folder, stage=cast("Stage", stage), resume=resume, progress=progress)
        scores = evaluate_and_report(folder, progress=progress, dataset=dataset) if evaluate else None
    if scores is None:
        print_training(metrics, folder, as_json=json_output)
    else:
        print_evaluation(scores, folder, as_json=json_output)


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
    from gavamoe.cli.output import search
    from gavamoe.tune.search import run_search

    folder = run_dir or Path("runs") / f"tune-{Path(space).stem}-{name_of(dataset)}"
    with search.SearchTerminal() as terminal:
        result = run_search(
            space,
            training_config(config, overrides),
            dataset,
            folder,
            trials=trials,
            concurrent=concurrent,
            seeds=seeds,
            resume=resume,
            final=final,
            progress=terminal,
        )
    search.print_search(result, as_json=json_output)
    if result.interrupted:
        raise KeyboardInterrupt
