"""The log of a training run: `logs/STEP.jsonl`, TensorBoard, and MLflow or Weights & Biases where configured.

Written by the process that started the training, whatever machines the workers are on. When workers are restarted from
a checkpoint, lines after it are taken back: the log never has a step twice.
"""

import json
import os
import shutil
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from gavamoe.artifacts.files import read_json, write_file, write_json
from gavamoe.artifacts.object_store import without_keys
from gavamoe.artifacts.run import RunFolder
from gavamoe.config.schema import RunConfig, RuntimeConfig
from gavamoe.errors import InputError

Line = dict[str, Any]

_NOT_PLOTTED = ("step", "steps", "epoch")


_NAMED_IN_THE_ENVIRONMENT = {"mlflow": "MLFLOW_TRACKING_URI", "wandb": "WANDB_BASE_URL"}
"""The variable in which each service's own client looks for its server."""


def check_tracking(config: RunConfig, source: Path, overrides: Sequence[str]) -> None:
    """Refuse a tracking server that only the config of a run names; of other config files it is followed.

    Whoever wrote the run chose the server, and it would get the settings, the numbers and the user's credentials for
    such servers. As with a dataset at a URI, it takes the command line, or here the environment, to name it.

    Args:
        source: the file that the config was read from.
        overrides: those of the command line, `FIELD=VALUE`.

    Raises:
        InputError: with the option that names the server.
    """
    runtime = config.runtime
    if runtime.tracking == "none" or not runtime.tracking_uri or not RunFolder(source.parent).dataset_file.exists():
        return
    variable = _NAMED_IN_THE_ENVIRONMENT[runtime.tracking]
    said = {override.partition("=")[0].strip() for override in overrides}
    if said & {"runtime", "runtime.tracking_uri"} or os.environ.get(variable) == runtime.tracking_uri:
        return
    uri = without_keys(runtime.tracking_uri)
    raise InputError(
        f"{source}: runtime.tracking_uri {uri}: a server that a run names is not told unasked: if you trust it, add"
        f" --set runtime.tracking_uri={uri} or set {variable} to it; --set runtime.tracking=none does without"
    )


def told(runtime: RuntimeConfig) -> str | None:
    """What is told the log besides the run's folder, in a few words; None: nothing."""
    if runtime.tracking == "none" or (runtime.tracking == "mlflow" and not runtime.tracking_uri):
        return None
    place = f" at {without_keys(runtime.tracking_uri)}" if runtime.tracking_uri else ", as its environment says"
    return f"{runtime.tracking}{place}"


class Tracker(Protocol):
    """A service that plots numbers against steps."""

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """The numbers of one step, named phase/name."""

    def rewind(self, step: int) -> None:
        """Steps above `step` will come again."""

    def close(self) -> None:
        """Finish: no more numbers follow."""


class RunLog:
    """The log of one step of a run, `stage1` or `stage2`."""

    def __init__(
        self, folder: Path, name: str, runtime: RuntimeConfig, config: RunConfig | None, *, keep: bool
    ) -> None:
        """Open `folder/logs/NAME.jsonl`; `keep` continues the one that is there.

        Raises:
            InputError: the folder can't be written, or the tracking service is not installed.
        """
        self.path = RunFolder(Path(folder)).log(name)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not keep:
                self.path.write_text("")
            self.path.touch()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from error
        self._trackers: list[Tracker] = [_TensorBoard(self.path.parent / "tensorboard" / name, keep=keep)]
        if runtime.tracking != "none":
            make = _MlFlow if runtime.tracking == "mlflow" else _WandB
            self._trackers.append(make(Path(folder).absolute(), name, runtime.tracking_uri, config, keep=keep))

    def __enter__(self) -> "RunLog":
        self._hook = threading.excepthook
        threading.excepthook = self._on_thread_error
        return self

    def _on_thread_error(self, failure: threading.ExceptHookArgs) -> None:
        """Say nothing of a full disk that TensorBoard's own thread met: `add` raises the same error."""
        if not (type(failure.thread).__name__ == "_AsyncWriterThread" and isinstance(failure.exc_value, OSError)):
            self._hook(failure)

    def __exit__(self, *error: object) -> None:
        for tracker in self._trackers:
            with suppress(OSError):  # a full disk; the training's own error says so
                tracker.close()
        threading.excepthook = self._hook

    def add(self, line: Line) -> None:
        """Append a line to the log, and give its numbers to the trackers."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        step = line.get("step")
        numbers = {
            f"{line.get('phase', 'train')}/{name}": float(value)
            for name, value in line.items()
            if isinstance(value, int | float) and name not in _NOT_PLOTTED
        }
        if isinstance(step, int) and numbers:
            for tracker in self._trackers:
                tracker.add(step, numbers)

    def restart(self, lines: Sequence[Line]) -> None:
        """Set the log back to `lines`, those of the checkpoint that restarted workers continue from."""
        with write_file(self.path) as aside:
            aside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        steps = [line["step"] for line in lines if isinstance(line.get("step"), int)]
        for tracker in self._trackers:
            tracker.rewind(max(steps, default=0))


class _TensorBoard:
    def __init__(self, folder: Path, *, keep: bool) -> None:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        self._folder = folder
        self._writer: Any = None

    def add(self, step: int, numbers: dict[str, float]) -> None:
        if self._writer is None:
            self.rewind(step - 1)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _MlFlow:
    """MLflow, at a server or in a file of its own. A step that comes again is there twice: the later one counts."""

    def __init__(self, folder: Path, name: str, uri: str, config: RunConfig | None, *, keep: bool) -> None:
        try:
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise InputError("runtime.tracking: mlflow is not installed; pip install 'gavamoe[mlflow]'") from error
        self._client = MlflowClient(uri or f"sqlite:///{RunFolder(folder).mlflow}")
        known = RunFolder(folder).logs / f"{name}.mlflow.json"
        if keep and known.is_file():
            self._run = str(read_json(known)["run_id"])
            return
        experiment = self._client.get_experiment_by_name("gavamoe")
        number = experiment.experiment_id if experiment else self._client.create_experiment("gavamoe")
        self._run = self._client.create_run(number, run_name=f"{folder.name}/{name}").info.run_id
        for field, value in _flat(config.model_dump(mode="json") if config else {}).items():
            self._client.log_param(self._run, field, value)
        write_json(known, {"run_id": self._run})

    def add(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._client.log_metric(self._run, name, value, step=step)

    def rewind(self, step: int) -> None:
        del step

    def close(self) -> None:
        self._client.set_terminated(self._run)


class _WandB:
    """Weights & Biases; WANDB_MODE=offline keeps everything in the run folder."""

    def __init__(self, folder: Path, name: str, uri: str, config: RunConfig | None, *, keep: bool) -> None:
        try:
            import wandb
        except ImportError as error:
            raise InputError("runtime.tracking: wandb is not installed; pip install wandb") from error
        settings = wandb.Settings(base_url=uri) if uri else None
        self._run = wandb.init(
            project="gavamoe",
            name=f"{folder.name}/{name}",
            id=f"{folder.name}-{name}",
            resume="allow" if keep else None,
            dir=str(RunFolder(folder).logs),
            config=config.model_dump(mode="json") if config else {},
            settings=settings,
        )

    def add(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers | {"step": step})  # its own counter refuses steps that come again

    def rewind(self, step: int) -> None:
        del step

    def close(self) -> None:
        self._run.finish()


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
