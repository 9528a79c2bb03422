"""`gavamoe status RUN`: what ran, when, how far it is, what is next, as the files of the run folder say it."""

import re
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gavamoe.artifacts import remote
from gavamoe.artifacts.files import read_json
from gavamoe.artifacts.logs import read_log
from gavamoe.artifacts.manifest import read_manifest
from gavamoe.artifacts.object_store import without_keys
from gavamoe.artifacts.run import METRICS_FILE, DatasetReference, Run, RunFolder, Step, open_run, steps_of
from gavamoe.errors import InputError

State = Literal["done", "running", "stopped", "damaged", "not started"]

SECONDS_OF_SILENCE = 120.0
"""Seconds after its last line from which on a log no longer counts as that of a running step."""
_SHOWN = ("loss", "validation_loss", "elbo", "valid_rmse", "rmse", "tokens_per_second", "pairs_per_second")


@dataclass(frozen=True)
class StepStatus:
    """One step of a run."""

    name: str
    state: State
    step: int | None = None
    """Step of the newest log line."""
    steps: int | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    """The newest value of each number that tells how training goes, or the finished step's metrics."""
    finished: str | None = None
    """When the artifact was written, ISO 8601."""
    seconds: float | None = None
    """How long the step took in its last attempt."""
    idle: float | None = None
    """Seconds since the log was last written to."""
    checkpoints: list[str] = field(default_factory=list)
    """Names of the checkpoint folders, the newest last; Ray decides which of them are registered."""
    warnings: list[str] = field(default_factory=list)
    problem: str | None = None


@dataclass(frozen=True)
class RunStatus:
    """A run as its folder shows it."""

    path: str
    dataset: str
    dataset_problem: str | None
    steps: list[StepStatus]
    logs: dict[str, str]
    """Logs and the commands or files that show them, by name."""
    next: str
    """The command to continue with, or what to wait for."""


def read_status(run: Path) -> RunStatus:
    """Read a run folder.

    Raises:
        InputError: it is not a run folder, or its config can't be read.
    """
    folder = open_run(run)
    steps = [_step(folder, name) for name in steps_of(folder.config)]
    stored = remote.stored_path(folder.path)
    path = str(folder.path) if stored is None else stored.uri
    return RunStatus(
        path=path,
        dataset=without_keys(folder.reference.path),
        dataset_problem=_dataset_problem(folder.reference),
        steps=steps,
        logs=_logs(folder),
        next=_next(path, folder, steps),
    )


def _step(run: RunFolder, name: Step) -> StepStatus:
    logged = _from_log(run, name)
    folder = run.path / name
    if not folder.is_dir():
        return logged
    try:
        manifest = read_manifest(folder, name, verify=False)
        metrics = read_json(folder / METRICS_FILE)
    except InputError as error:
        return StepStatus(name, "damaged", problem=str(error))
    return StepStatus(
        name,
        "done",
        step=logged.step,
        steps=logged.steps,
        numbers=_result(name, metrics),
        finished=manifest.created,
        seconds=metrics.get("seconds"),
        warnings=logged.warnings,
    )


def _from_log(run: RunFolder, name: str) -> StepStatus:
    """The state of a step without an artifact, from its log."""
    path = run.log(name)
    lines = read_log(path)
    kept = sorted(p.name for p in run.checkpoints(name).glob("checkpoint_[0-9]*"))
    if not lines and not kept:
        return StepStatus(name, "not started")
    idle = time.time() - path.stat().st_mtime
    numbers = {n: float(line[n]) for line in lines for n in _SHOWN if isinstance(line.get(n), int | float)}
    return StepStatus(
        name,
        "running" if idle < SECONDS_OF_SILENCE else "stopped",
        step=_newest(lines, "step"),
        steps=_newest(lines, "steps"),
        numbers=numbers,
        idle=idle,
        checkpoints=kept,
        warnings=_warnings(lines),
    )


def _warnings(lines: list[dict[str, Any]]) -> list[str]:
    """The newest of each kind: one text with other numbers comes every epoch."""
    texts = [str(line["warning"]) for line in lines if "warning" in line]
    return list({re.sub(r"[\d.]+", "", text): text for text in texts}.values())


def _newest(lines: list[dict[str, Any]], name: str) -> int | None:
    values = [line[name] for line in lines if isinstance(line.get(name), int)]
    return values[-1] if values else None


def _result(name: str, metrics: dict[str, Any]) -> dict[str, float]:
    """The few numbers of a finished step that people ask for first."""
    if name == "stage1":
        test = metrics.get("test", {})
        chosen = {"rmse": test.get("rmse"), "smallest_cluster_share": metrics.get("smallest_cluster_share")}
    elif name in ("stage2", "baseline"):
        chosen = {key: metrics.get(key) for key in ("validation_loss", "tokens_per_second")}
    else:
        chosen = {key: metrics.get("metrics", {}).get(key) for key in ("bleu_4", "rouge_l", "fmr", "rmse")}
    return {key: float(value) for key, value in chosen.items() if isinstance(value, int | float)}


def _dataset_problem(reference: DatasetReference) -> str | None:
    """Whether the dataset's folder is gone. It is not opened: whoever wrote the run chose the path."""
    path = reference.path
    if remote.is_uri(path) or Path(path).is_dir():
        return None
    return f"{path}: no such dataset folder; --dataset says where it is now"


def _logs(run: Run) -> dict[str, str]:
    shown: dict[str, str] = {name: str(run.log(name)) for name in steps_of(run.config) if run.log(name).is_file()}
    if run.tensorboard.is_dir():
        shown["tensorboard"] = f"tensorboard --logdir {shlex.quote(str(run.tensorboard))}"
    if run.mlflow.is_file():
        shown["mlflow"] = f"mlflow ui --backend-store-uri sqlite:///{run.mlflow.absolute()}"
    if run.report.is_file():
        shown["report"] = str(run.report)
    return shown


def _next(path: str, run: Run, steps: list[StepStatus]) -> str:
    quoted = shlex.quote(path)
    for step in steps:
        if step.state == "damaged":
            return f"{step.name}/ is damaged ({step.problem}); remove it, then run it again"
        if step.state == "running":
            return f"{step.name} is running, or was {step.idle or 0:.0f} s ago; wait, or look at its log"
        if step.state != "done" and step.name != "evaluation":
            dataset = shlex.quote(without_keys(run.reference.path))
            config = shlex.quote(str(run.config_file))
            return f"gavamoe train {config} --dataset {dataset} --run-dir {quoted} --resume"
        if step.state != "done":
            at_uri = remote.is_uri(run.reference.path)
            dataset = f" --dataset {shlex.quote(without_keys(run.reference.path))}" if at_uri else ""
            return f"gavamoe evaluate {quoted}{dataset}"
    return f"gavamoe serve {quoted}" if run.config.system == "gavamoe" else f"gavamoe report {quoted}"
