"""`gavamoe export`: parse, write, say what is there."""

from pathlib import Path
from typing import Annotated

import typer

from gavamoe.cli.options import Json, RunPath, local_path
from gavamoe.errors import InputError

_FORMATS = ("hf", "gguf")


def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(help="New folder.", show_default=False)],
    form: Annotated[
        str,
        typer.Option("--format", help="hf: folders for transformers, vLLM; gguf: files for llama.cpp, Ollama."),
    ] = "hf",
    gate: Annotated[str, typer.Option(help="all: a model for each; K: that one's alone, for every pair.")] = "all",
    dtype: Annotated[
        str | None,
        typer.Option(help="hf: float32 (default), float16, bfloat16; gguf: q8_0 (default), q4_0, f16, f32."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Write a run as plain models that need no gavamoe: a folder or GGUF file a gate, routes, a client.

    For example: gavamoe export runs/mine exported --format gguf --dtype q8_0
    """
    from typing import cast

    from gavamoe.artifacts.run import open_run
    from gavamoe.cli.terminal import TerminalProgress, print_json
    from gavamoe.export.exported_run import Format, export_run

    if form not in _FORMATS:
        raise InputError(f"--format {form}: known are {', '.join(_FORMATS)}")
    if gate != "all" and not gate.isdecimal():
        raise InputError(f"--gate {gate}: give `all` or a gate's number, from 0")
    folder = local_path(str(out))
    with TerminalProgress() as progress:
        chosen = None if gate == "all" else int(gate)
        names = export_run(open_run(run), folder, cast("Format", form), gate=chosen, dtype=dtype, progress=progress)
    if json_output:
        print_json({"folder": str(folder), "models": names})
        return
    typer.echo(f"{folder}: {', '.join(names)}; README.md says how to ask for a text")
