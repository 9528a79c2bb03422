"""`gavamoe submit`, `jobs ...`, `status` and `copy`: work on a cluster, and looking after it."""

from pathlib import Path
from typing import Annotated

import typer

from gavamoe.cli.options import Json, input_folder, pairs_of
from gavamoe.errors import InputError

Address = Annotated[
    str | None,
    typer.Option(help="Address of the cluster's dashboard; default RAY_API_SERVER_ADDRESS, or http://127.0.0.1:8265."),
]
ReadOnlyRun = Annotated[Path, typer.Argument(metavar="RUN", parser=input_folder, help="A run folder, or its URI.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job, as `gavamoe submit` and `jobs list` print it.")]

jobs_app = typer.Typer(help="The jobs that `gavamoe submit` started on a cluster.", no_args_is_help=True)


def submit(
    context: typer.Context,
    step: Annotated[str, typer.Argument(help="prepare, stage1, stage2, evaluate, tune, or pipeline (all of it).")],
    address: Address = None,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A variable for the job; others can read it."),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log until the job ends.")] = True,
) -> None:
    """Run a step on a Ray cluster, with the arguments that its command takes here, and follow its log.

    Configs and spaces (YAML) go along; datasets and runs do not: name them as the cluster sees them, on a shared
    path or as a URI. Example:

    gavamoe submit pipeline my.yaml --dataset s3://bucket/data --run-dir s3://bucket/run --address http://head:8265
    """
    from gavamoe.cli.output.cluster import JobTerminal
    from gavamoe.cli.terminal import console
    from gavamoe.runtime.jobs import STEPS, Jobs

    if step not in STEPS:
        raise InputError(f"{step}: no such step; there are {', '.join(STEPS)}")
    environment = pairs_of("--env", env) or {}
    jobs = Jobs(address)
    job = jobs.submit(step, context.args, environment)
    console.print(f"job: {job}", markup=False)
    at = f" --address {address}" if address else ""
    console.print(f"log: gavamoe jobs logs {job}{at}    end it: gavamoe jobs stop {job}{at}", markup=False)
    if not wait:
        typer.echo(job)
        return
    try:
        with JobTerminal() as terminal:
            ended = jobs.follow(job, terminal)
    except KeyboardInterrupt:
        console.print("no longer following; the job goes on", markup=False)
        raise typer.Exit(130) from None
    console.print(f"job {job}: {ended.status.lower()}", markup=False)
    if ended.status != "SUCCEEDED":
        raise typer.Exit(ended.exit_code or 1)


def status(run: ReadOnlyRun, json_output: Json = False) -> None:
    """Show what ran, when, how far it is, where its logs are, and the command to continue with."""
    from dataclasses import asdict

    from gavamoe.cli.output.cluster import print_status
    from gavamoe.cli.status import read_status
    from gavamoe.cli.terminal import print_json

    run_status = read_status(run)
    if json_output:
        print_json(asdict(run_status))
    else:
        print_status(run_status)


def copy(
    source: Annotated[str, typer.Argument(help="Folder or URI of a dataset or a run.")],
    target: Annotated[str, typer.Argument(help="Folder or URI that does not exist yet.")],
) -> None:
    """Copy a dataset or a run between this machine and object storage (s3://, gs://, ...), every file verified."""
    from gavamoe.artifacts import copying
    from gavamoe.cli.terminal import console

    copying.copy(source, target)
    console.print(f"copied: {target}", markup=False, soft_wrap=True)


@jobs_app.command("list")
def list_jobs(address: Address = None, json_output: Json = False) -> None:
    """List the submitted jobs, the newest first."""
    from gavamoe.cli.output.cluster import print_jobs
    from gavamoe.cli.terminal import print_json
    from gavamoe.runtime.jobs import Jobs

    jobs = Jobs(address).list()
    if json_output:
        print_json([vars(job) for job in jobs])
    else:
        print_jobs(jobs)


@jobs_app.command()
def logs(
    job: JobId,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow the log until the job ends.")] = False,
) -> None:
    """Print a job's log."""
    from gavamoe.cli.output.cluster import JobTerminal
    from gavamoe.runtime.jobs import Jobs

    jobs = Jobs(address)
    if not follow:
        typer.echo(jobs.logs(job), nl=False)
        return
    with JobTerminal() as terminal:
        jobs.follow(job, terminal)


@jobs_app.command()
def stop(job: JobId, address: Address = None) -> None:
    """End a job; `--resume` in a new one continues a training run."""
    from gavamoe.cli.terminal import console
    from gavamoe.runtime.jobs import Jobs

    stopped = Jobs(address).stop(job)
    console.print(f"{job}: {'asked to stop' if stopped else 'had ended before'}", markup=False)
