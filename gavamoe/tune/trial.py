"""One trial of a search: train a configuration with each seed, measure it on the validation split.

Runs in a worker process of the search. One Ray worker means the loops run in this process; several mean Ray Train
inside the trial. It sees the search's view of the data only, which has no test rows.

    FOLDER/stage1_cache/KEY/              stage-1 results, shared between trials
    FOLDER/trials/0007/config.yaml        what was trained (first seed)
    FOLDER/trials/0007/seed_0/            result.json, logs/; while it runs checkpoints/ and stage2/
    FOLDER/trials/0007/stop               while it runs: it is to end early (trials of several workers)
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gavamoe.artifacts.files import read_json, write_file, write_folder, write_json
from gavamoe.artifacts.run import RunFolder
from gavamoe.artifacts.stage1_cache import STAGE1_CACHE, cached_stage1, stage1_key
from gavamoe.config.files import override_config
from gavamoe.config.schema import RunConfig
from gavamoe.errors import RunError
from gavamoe.runtime.context import Context, LocalContext, Metrics
from gavamoe.runtime.ray_train import run_tasks, run_training
from gavamoe.tune.checks import trial_config
from gavamoe.tune.metrics import curve_value, stage1_values, stage2_values, text_values
from gavamoe.tune.space import Space, Values

RESULT_FILE = "result.json"

Report = Callable[[int, float], None]
"""Called with the percent of the training done and the objective's value there."""


@dataclass(frozen=True)
class Job:
    """The settings that all trials of a search share."""

    space: Space
    """The search space."""
    config: RunConfig
    """Config that a trial's drawn values override."""
    dataset: Path
    """Folder of the search's view of the dataset, which has no test rows."""
    fingerprint: str
    """Fingerprint of that view."""
    folder: Path
    """The search's folder."""
    seeds: int
    """Trainings of each configuration, with different seeds."""

    def configs(self, values: Values) -> list[RunConfig]:
        """The trial's config for each seed."""
        config = trial_config(self.config, self.space, values)
        return [config.model_copy(update={"seed": config.seed + index}) for index in range(self.seeds)]

    def trial_folder(self, number: int) -> Path:
        return self.folder / "trials" / f"{number:04d}"

    @property
    def in_process(self) -> bool:
        """Whether trials run their loops themselves, without Ray Train: seconds less a trial."""
        config = trial_config(self.config, self.space, {})
        offload = config.stage2.offload_optimizer or config.stage2.offload_parameters
        return config.runtime.workers == 1 and not (self.space.stages == 2 and offload)


@dataclass(frozen=True)
class Outcome:
    """The results of a finished trial."""

    measured: dict[str, list[float]]
    """All measures by name, one value for each seed."""
    seconds: float
    """Wall time of all seeds, in seconds."""


def run_trial(job: Job, number: int, values: Values, report: Report) -> Outcome:
    """Train and measure all seeds; those that an earlier attempt finished are read, not repeated.

    Raises:
        Stopped: it was asked to stop (`ask_to_stop`).
        InputError, RunError: this configuration can't be trained, or an objective is undefined.
    """
    started = time.perf_counter()
    folder = job.trial_folder(number)
    configs = job.configs(values)
    RunFolder(folder).write_config(configs[0])
    results = []
    for index, config in enumerate(configs):
        # Seeds after the first are trained only once the first has survived, so pruning looks at it alone.
        first = index == 0
        seed = _Seed(
            job,
            config,
            folder / f"seed_{index}",
            report if first else None,
            _stop_file(job, number) if first else None,
        )
        results.append(seed.result())
    measured = {name: [result[name] for result in results] for name in results[0]}
    return Outcome(measured, time.perf_counter() - started)


def ask_to_stop(job: Job, number: int, percent: int) -> None:
    """Have a trial of several workers end at its next log line, because of its value at `percent` of its way."""
    with write_file(_stop_file(job, number)) as aside:
        aside.write_text(str(percent), encoding="utf-8")


def asked_at(job: Job, number: int) -> int:
    """The `percent` of `ask_to_stop`."""
    return int(_stop_file(job, number).read_text(encoding="utf-8"))


def _stop_file(job: Job, number: int) -> Path:
    return job.trial_folder(number) / "stop"


def discard_work(job: Job, number: int) -> None:
    """Remove what an ended trial no longer needs, and a stopped one could not: weights and checkpoints."""
    _stop_file(job, number).unlink(missing_ok=True)
    for folder in job.trial_folder(number).glob("seed_*"):
        _discard(folder)


def _discard(folder: Path) -> None:
    for leftover in ("stage2", "checkpoints"):
        shutil.rmtree(folder / leftover, ignore_errors=True)


class _Seed:
    """One training of a trial."""

    def __init__(
        self, job: Job, config: RunConfig, folder: Path, report: Report | None, stop_file: Path | None
    ) -> None:
        self._job, self._config, self._folder = job, config, folder
        self._report, self._stop_file = report, stop_file

    def result(self) -> dict[str, float]:
        """Everything measured, by name."""
        path = self._folder / RESULT_FILE
        if path.is_file():
            earlier: dict[str, float] = read_json(path)
            return earlier
        measured = self._train()
        self._check(measured)
        write_json(path, measured)
        _discard(self._folder)
        return measured

    def _train(self) -> dict[str, float]:
        from gavamoe.stage1.train import train_stage1

        key = stage1_key(self._config, self._job.fingerprint)
        stage1, shared = cached_stage1(
            self._job.folder / STAGE1_CACHE,
            key,
            lambda out: self._run(train_stage1, "stage1", out, {}),
        )
        measured = stage1_values(read_json(stage1 / "metrics.json")) | {"stage1.shared": float(shared)}
        if self._job.space.stages == 1:
            return measured
        from gavamoe.stage2.train import train_stage2

        out = RunFolder(self._folder).stage2
        if not out.is_dir():
            self._run(train_stage2, "stage2", out, {"stage1": stage1})
        measured |= stage2_values(read_json(out / "metrics.json")) | {"active_parameters": _active(out, self._config)}
        wanted = [*self._job.space.objectives, *self._job.space.recorded]
        if any(measure.source == "texts" for measure in wanted):
            measured |= self._texts(out)
        return measured

    def _texts(self, stage2: Path) -> dict[str, float]:
        """Scores of explanations written for the validation split."""
        # The registry's scores alone: a trial has no use for the probes, and they run the model again.
        job: dict[str, Any] = {
            "stage2": stage2,
            "dataset": self._job.dataset,
            "config": override_config(self._config, ["evaluation.probe_rows=0"]),
        }
        if self._job.in_process:
            return write_and_score(LocalContext(device=_device(self._config)), **job)
        # With Ray Train inside, the trial has reserved neither a GPU nor cores: a task of its own does.
        [scores] = run_tasks(write_and_score, [job], self._config.runtime)
        return dict(scores)

    def _run(self, loop: Callable[..., Any], name: str, out: Path, extra: Mapping[str, Path]) -> None:
        """Run one stage's loop here, or on Ray Train workers, from the last checkpoint of a killed attempt, if any."""
        arguments: dict[str, Any] = {"dataset": self._job.dataset, "out": out, **extra}
        if self._job.in_process:
            import torch

            torch.set_num_threads(self._config.runtime.threads_per_worker)
            config = override_config(self._config, ["runtime.engine=torch"])
            with _TrialContext(self._folder, name, _device(config), self._on_line) as context:
                loop(config=config, context=context, **arguments)
            return
        run_training(
            loop,
            arguments | {"config": self._config},
            placement=self._config.runtime,
            folder=self._folder,
            name=name,
            resume=True,
            on_line=self._on_line,
            stop_file=self._stop_file,
        )

    def _on_line(self, line: Mapping[str, Any]) -> None:
        """Report the objective where a log line has it."""
        objective = self._job.space.objectives[0]
        curve = objective.curve
        if self._report is None or curve is None or line.get("phase") != curve.phase:
            return
        percent, value = _percent(line, curve.unit, self._config), curve_value(objective.name, dict(line))
        # At the end there is nothing left to prune; before the first step nothing has been learned.
        if value is not None and 0 < percent < 100:
            self._report(percent, float(value))

    def _check(self, measured: Mapping[str, float]) -> None:
        for measure in self._job.space.objectives:
            value = measured.get(measure.name)
            if value is None or not math.isfinite(value):
                raise RunError(f"{measure.name} is {value}, which can't be compared")


class _TrialContext:
    """`runtime.context.Context` for one worker in this process, with a log and the last checkpoint kept on disk."""

    rank, world_size = 0, 1

    def __init__(self, folder: Path, name: str, device: str, on_line: Callable[[Mapping[str, Any]], None]) -> None:
        self.device = device
        self._kept = RunFolder(folder).checkpoints(name)
        self.resume_from: Path | None = self._kept if self._kept.is_dir() else None
        self._log_path = RunFolder(folder).log(name)
        self._on_line = on_line
        self._resources = ExitStack()
        self._log: IO[str]

    def __enter__(self) -> "_TrialContext":
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        mode = "w" if self.resume_from is None else "a"
        self._log = self._resources.enter_context(self._log_path.open(mode, encoding="utf-8"))
        return self

    def __exit__(self, *error: object) -> None:
        self._resources.close()

    def log(self, metrics: Metrics) -> None:
        self._log.write(json.dumps(dict(metrics)) + "\n")
        self._log.flush()
        self._on_line(metrics)

    def settle(self) -> None:
        pass  # it is stored at once

    def checkpoint(self, folder: Path, metrics: Metrics, unchanged: Sequence[str] = ()) -> None:
        del metrics
        with write_folder(self._kept, replace=True) as aside:
            shutil.copytree(folder, aside, dirs_exist_ok=True)
            for name in unchanged:
                shutil.copy2(self._kept / name, aside / name)


def _percent(line: Mapping[str, Any], unit: str, config: RunConfig) -> int:
    """Percent of a stage's training that is done; for stage 1, percent of the epochs on the ELBO."""
    if unit == "epoch":
        done, total = line["epoch"] - config.stage1.pretrain_epochs, config.stage1.epochs
    else:
        done, total = line["step"], line["steps"]
    return int(100 * done / total)


def _active(stage2: Path, config: RunConfig) -> float:
    """Parameters that one token uses: all but the experts that its gate leaves out."""
    from safetensors import safe_open

    experts = config.stage2.experts
    idle = 0
    for path in stage2.glob("model*.safetensors"):
        with safe_open(str(path), framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118  (no mapping)
                if ".experts." in name:
                    idle += math.prod(weights.get_slice(name).get_shape())
    parameters = read_json(stage2 / "metrics.json")["parameters"]
    return float(parameters - idle * (experts.count - experts.top_k) / experts.count)


def write_and_score(context: Context, stage2: Path, dataset: Path, config: RunConfig) -> dict[str, float]:
    """The text scores of a trial, on the context's device."""
    from gavamoe.data.dataset import open_dataset
    from gavamoe.evaluation.evaluate import evaluate
    from gavamoe.generation.generator import ExplanationGenerator

    explainer = ExplanationGenerator.load(stage2, context.device, config.generation.dtype)
    return text_values(evaluate(explainer, open_dataset(dataset), config, split="valid").metrics)


def _device(config: RunConfig) -> str:
    return "cuda:0" if config.runtime.gpu else "cpu"
