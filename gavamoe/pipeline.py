"""The whole job: dataset -> stage 1 -> stage 2 -> evaluation -> report, each a folder of the run.

`train_run` is `gavamoe train`; `quickstart` is the command of that name. A step whose folder is
already whole is not run again when resuming.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from gavamoe.artifacts import remote
from gavamoe.artifacts.files import read_json, write_file, write_json
from gavamoe.artifacts.manifest import read_manifest
from gavamoe.config.files import dump_config, load_config, parse_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset, open_dataset
from gavamoe.errors import InputError
from gavamoe.runtime.progress import NoProgress, Progress
from gavamoe.runtime.ray_train import ray_session, run_tasks, run_training, was_cut_off

Stage = Literal["1", "2", "all"]
CONFIG_FILE = "config.yaml"
DATASET_FILE = "dataset.json"


@dataclass(frozen=True)
class Run:
    """A run folder: runs/NAME/ with config.yaml, dataset.json and the steps' folders."""

    path: Path
    config: RunConfig
    dataset: Path

    @property
    def stage1(self) -> Path:
        return self.path / "stage1"

    @property
    def stage2(self) -> Path:
        return self.path / "stage2"


def open_run(path: Path) -> Run:
    """Read a run folder's config and dataset reference.

    Raises:
        InputError: not a run folder, or its dataset has moved or changed since.
    """
    path = Path(path)
    if not (path / CONFIG_FILE).is_file():
        raise InputError(f"{path}: not a run folder ({CONFIG_FILE} is missing); `gavamoe train` makes one")
    reference = read_json(path / DATASET_FILE)
    if not isinstance(reference, dict) or not {"path", "fingerprint"} <= reference.keys():
        raise InputError(f"{path / DATASET_FILE}: expected path and fingerprint of the dataset")
    return Run(path, load_config(path / CONFIG_FILE), remote.located(str(reference["path"])))


def train_run(
    config: RunConfig,
    dataset: Path,
    run_dir: Path,
    *,
    stage: Stage = "all",
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train stage 1, stage 2, or both, in `run_dir`; returns the metrics of the stages that are there.

    Args:
        resume: go on where an earlier call with the same config and dataset ended, however it ended.

    Raises:
        InputError: `run_dir` holds another config or dataset, or already holds the stage and `resume` is False.
    """
    progress = progress or NoProgress()
    opened = open_dataset(dataset)
    run_dir = Path(run_dir)
    claim_run(run_dir, config, opened, continuing=resume or stage == "2")
    remote.commit(run_dir)
    wanted = ("1", "2") if stage == "all" else (stage,)
    todo = [number for number in wanted if not _finished(run_dir, number, opened, resume)]
    if todo:
        with ray_session(config.runtime):
            for number in todo:
                _train_stage(number, config, opened, run_dir, resume, progress)
    return {
        f"stage{number}": read_json(run_dir / f"stage{number}" / "metrics.json")
        for number in ("1", "2")
        if (run_dir / f"stage{number}").is_dir()
    }


def evaluate_and_report(run_dir: Path, *, progress: Progress | None = None, **options: Any) -> dict[str, Any]:
    """Score the run's test split and write its report.html; returns the metrics."""
    from gavamoe.evaluation.evaluate import evaluate_run
    from gavamoe.report.page import write_report

    progress = progress or NoProgress()
    progress.step("Write and score explanations")
    metrics = evaluate_run(run_dir, on_progress=progress.count, **options)
    progress.step("Write the report")
    write_report([run_dir], run_dir / "report.html")
    return metrics


def quickstart(run_dir: Path, config: RunConfig, *, data_seed: int = 0, progress: Progress | None = None) -> Run:
    """Synthesize the embedded default dataset, train on it, evaluate, report; resumes where it ended."""
    from gavamoe.data.synthetic.generator import synthesize

    progress = progress or NoProgress()
    dataset = run_dir / "dataset"
    if not dataset.is_dir():
        progress.step("Synthesize reviews with planted user groups")
        synthesize(dataset, seed=data_seed)
    train_run(config, dataset, run_dir, resume=True, progress=progress)
    evaluate_and_report(run_dir, progress=progress)
    return open_run(run_dir)


def claim_run(run_dir: Path, config: RunConfig, dataset: Dataset, *, continuing: bool) -> None:
    """Make `run_dir` this run's, or check that it is.

    Raises:
        InputError: it holds a run of other settings or data, or any run where `continuing` is False.
    """
    config_file = run_dir / CONFIG_FILE
    if config_file.is_file():
        if not continuing:
            raise InputError(f"{run_dir}: already holds a run; --resume continues it, --run-dir names another folder")
        _same_config(config_file, config)
        recorded = read_json(run_dir / DATASET_FILE).get("fingerprint")
        if recorded != dataset.fingerprint:
            raise InputError(
                f"{run_dir}: was started on another dataset (fingerprint {str(recorded)[:12]}, "
                f"{dataset.path} has {dataset.fingerprint[:12]}); use another --run-dir"
            )
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    stored = remote.place_of(dataset.path)
    path = str(dataset.path.absolute()) if stored is None else stored.uri
    write_json(run_dir / DATASET_FILE, {"path": path, "fingerprint": dataset.fingerprint})
    with write_file(config_file) as aside:
        aside.write_text(dump_config(config), encoding="utf-8")


def _same_config(config_file: Path, config: RunConfig) -> None:
    """What decides the numbers must be equal; where it runs and how it is evaluated may change."""
    recorded = parse_config(yaml.safe_load(config_file.read_text(encoding="utf-8")), str(config_file))
    for section in ("seed", "stage1", "stage2"):
        if getattr(recorded, section) != getattr(config, section):
            name, before, now = _first_difference(
                section, _plain(getattr(recorded, section)), _plain(getattr(config, section))
            )
            raise InputError(
                f"{config_file.parent}: was started with {name}={before}, now {now};"
                " use the same value or another --run-dir"
            )


def _plain(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


def _first_difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before:
            if before[key] != now[key]:
                return _first_difference(f"{name}.{key}", before[key], now[key])
    return name, before, now


def _finished(run_dir: Path, number: str, dataset: Dataset, resume: bool) -> bool:
    """Whether the stage's folder is there, whole, made from this dataset, and its training came to its end."""
    folder = run_dir / f"stage{number}"
    if not folder.exists():
        return False
    manifest = read_manifest(folder, "stage1" if number == "1" else "stage2", verify=False)
    if manifest.inputs.get("dataset") != dataset.fingerprint:
        raise InputError(f"{folder}: was trained on another dataset than {dataset.path}; use another --run-dir")
    if not resume:
        raise InputError(f"{folder}: already trained; --resume keeps it, --run-dir names another folder")
    return not was_cut_off(run_dir, folder.name)


def _train_stage(
    number: str, config: RunConfig, dataset: Dataset, run_dir: Path, resume: bool, progress: Progress
) -> None:
    loop, arguments, title = _stage(number, config, dataset, run_dir)
    if number == "2":
        _tokenise(config, dataset, progress)
    progress.step(title)
    shutil.rmtree(arguments["out"], ignore_errors=True)  # of a training that was cut off, see `_finished`
    run_training(
        loop,
        arguments,
        placement=config.runtime,
        folder=run_dir,
        name=f"stage{number}",
        resume=resume,
        elastic=number == "1",
        on_line=progress.line,
    )


def _tokenise(config: RunConfig, dataset: Dataset, progress: Progress) -> None:
    """Make the token cache of many rows, in Ray tasks, before the workers want it; of few they make their own."""
    from gavamoe.stage2.token_cache import WORTHWHILE, fill_cache

    if dataset.size("train") < WORTHWHILE:
        return
    progress.step("Tokenise rows")
    placement = config.runtime.model_copy(update={"gpu": False})
    fill_cache(config, dataset.path, lambda loop, jobs: run_tasks(loop, jobs, placement, progress.count))


def _stage(
    number: str, config: RunConfig, dataset: Dataset, run_dir: Path
) -> tuple[Callable[..., Any], dict[str, Any], str]:
    run_dir = run_dir.absolute()
    arguments: dict[str, Any] = {"config": config, "dataset": dataset.path.absolute()}
    if number == "1":
        from gavamoe.stage1.train import train_stage1

        return train_stage1, arguments | {"out": run_dir / "stage1"}, "Stage 1: ratings and clusters"
    from gavamoe.stage2.train import train_stage2

    read_manifest(run_dir / "stage1", "stage1")
    arguments |= {"stage1": run_dir / "stage1", "out": run_dir / "stage2"}
    return train_stage2, arguments, "Stage 2: explanations"
