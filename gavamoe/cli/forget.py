"""`gavamoe forget`: parse, call, print."""

from pathlib import Path
from typing import Annotated

import typer

from gavamoe.cli.options import RunPath
from gavamoe.errors import InputError


def forget(
    run: RunPath,
    user: Annotated[list[str] | None, typer.Option(help="Raw user id; may be given several times.")] = None,
    users: Annotated[Path | None, typer.Option(metavar="FILE", help="Raw user ids, one a line.")] = None,
) -> None:
    """Take users out of a trained run: ids, pairs, texts, rows of embeddings. Says what stays."""
    from gavamoe.artifacts import remote
    from gavamoe.artifacts.lock import locked_folder
    from gavamoe.artifacts.run import open_run
    from gavamoe.cli.terminal import console
    from gavamoe.data.user_ids import read_ids
    from gavamoe.generation.forget import forget_users

    named = list(dict.fromkeys([*(user or []), *(sorted(read_ids(users)) if users else [])]))
    if not named:
        raise InputError("forget: name users with --user ID or --users FILE")
    opened = open_run(run)
    opened.refuse_baseline("only GaVaMoE's forget; prepare the data with --drop-users and train again")
    with locked_folder(opened.path):
        removed = forget_users(opened, named)
    remote.commit(opened.path)
    lines = (
        f"{run}: {removed.users} user(s) forgotten",
        f"removed: id and usual features; {removed.pairs:,} pairs; {removed.texts:,} texts of the evaluation; rows in"
        f" {removed.tables} embedding tables (now the unknown user's); what report.html showed",
        "stays: the weights that all users share, as their reviews among all others' shaped them; counts and scores;"
        " logs; texts of others",
        "left to do: prepare the dataset again with `gavamoe data prepare --drop-users FILE`, remove copies of this"
        " run, restart services (`gavamoe serve RUN --update`). To take their reviews out of the weights, train again.",
    )
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
