"""`gavamoe serve`: parse, start or update the service, say where it is."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gavamoe.cli.options import Quantize, RunPath


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
    single: Annotated[
        bool,
        typer.Option(
            "--single", help="Router, generator and HTTP in one replica: fewer hops, for a small model on one machine."
        ),
    ] = False,
    api_keys: Annotated[
        Path | None,
        typer.Option(help="File with one sha256:HEX of an API key a line; names and limits: docs/serve.md."),
    ] = None,
    no_api_keys: Annotated[bool, typer.Option("--no-api-keys", help="Everyone who reaches the port may ask.")] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Prometheus metrics; default 8001, or a free port where that is taken."),
    ] = None,
    quantize: Quantize = None,
    update: Annotated[
        bool, typer.Option("--update", help="Put RUN into the service that is up; all else stays.")
    ] = False,
) -> None:
    """Serve explanations over HTTP with Ray Serve: a page at /, the interface's description at /docs."""
    from gavamoe.cli.terminal import console
    from gavamoe.serving.launch import read_args, run_service, update_service

    changes: dict[str, Any] = {}
    if replicas is not None:
        changes["generator_scaling"] = {"min_replicas": replicas, "max_replicas": replicas}
    if single:
        changes["composed"] = False
    if api_keys is not None:
        changes["api_keys_file"] = str(api_keys.absolute())
    if quantize is not None:
        changes["generator"] = {"quantize": quantize}
    if no_api_keys:
        changes["no_api_keys"] = True

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    if update:
        update_service(run, settings, changes, say=say)
    else:
        run_service(read_args(run, settings, changes), host=host, port=port, metrics_port=metrics_port, say=say)
