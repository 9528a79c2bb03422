"""`gavamoe human-eval ...`: sheets for raters, and what they found."""

from pathlib import Path
from typing import Annotated

import typer

from gavamoe.cli.options import DatasetOfRun, Json, input_folder, local_path, weights_of

human_app = typer.Typer(help="Ask people (the paper's section 4.6): blind sheets out, scores in.", no_args_is_help=True)


@human_app.command("export")
def export_sheets(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", parser=input_folder, help="Evaluated run folders or URIs: the systems."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", parser=local_path, help="For the raters; the key is written beside it, not inside."
        ),
    ],
    rows: Annotated[int, typer.Option(min=1, help="Rows of the split, drawn by the seed.")] = 100,
    raters: Annotated[int, typer.Option(min=1, max=100, help="Sheets; each has all texts in its own order.")] = 3,
    reference: Annotated[bool, typer.Option("--reference", help="The users' own texts take part, blind too.")] = False,
    history: Annotated[int, typer.Option(min=0, max=20, help="Earlier reviews of the user to show.")] = 3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    dataset: DatasetOfRun = None,
) -> None:
    """Write a CSV sheet and an HTML form for each rater, blind and shuffled, and a key that is kept apart."""
    from gavamoe.cli.output import systems
    from gavamoe.evaluation.human.export import export_study

    key_file, key = export_study(
        runs, out, rows=rows, raters=raters, seed=seed, reference=reference, history=history, dataset=dataset
    )
    systems.print_study(out, key_file, key, raters)


@human_app.command("import")
def import_sheets(
    key: Annotated[Path, typer.Argument(help="The key file that export wrote.")],
    sheets: Annotated[list[Path], typer.Argument(metavar="SHEET...", help="The raters' CSV files.")],
    weights: Annotated[
        str, typer.Option(help="Weights of personalization, quality, satisfaction (Eq. 14).")
    ] = "0.4:0.3:0.3",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    json_output: Json = False,
) -> None:
    """Check the sheets, and print scores with intervals, the Human-Score and the raters' agreement."""
    from gavamoe.cli.output import systems
    from gavamoe.evaluation.human.results import import_study

    result, out = import_study(key, sheets, weights=weights_of(weights), seed=seed)
    systems.print_human(result, out, as_json=json_output)
