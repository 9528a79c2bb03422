"""`gavamoe route` and `explain`, which use a trained run: parse, call, print."""

from typing import Annotated

import typer

from gavamoe.cli.options import Json, RunPath, Set, counts_of
from gavamoe.errors import InputError


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
    from gavamoe.cli.output import summary
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
    from gavamoe.cli.output import summary
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
