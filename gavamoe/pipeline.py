"""The whole job: dataset -> stage 1 -> stage 2 -> evaluation -> report, each a folder of the run; or, where the config
names a baseline as its `system`, dataset -> baseline -> evaluation -> report.

`train_run` is `gavamoe train`; `quickstart` is the command of that name. A step whose folder is
already complete is not run again when resuming.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gavamoe.artifacts import remote
from gavamoe.artifacts.files import read_json
from gavamoe.artifacts.lock import alone_in
from gavamoe.artifacts.manifest import Kind, read_manifest
from gavamoe.artifacts.run import METRICS_FILE, Run, RunFolder, claim_run, make_run_folder, open_run, steps_of
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset, open_dataset
from gavamoe.errors import InputError
from gavamoe.runtime.progress import NoProgress, Progress
from gavamoe.runtime.ray_train import ray_session, run_tasks, run_training, was_cut_off
from gavamoe.runtime.tracking import told

if TYPE_CHECKING:
    from gavamoe.stage2.preflight import Sizes

Stage = Literal["1", "2", "all"]


@alone_in("run_dir", make=True)
def train_run(
    config: RunConfig,
    dataset: Path,
    run_dir: Path,
    *,
    stage: Stage = "all",
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train stage 1, stage 2, or both, in `run_dir`, or the config's baseline; returns the metrics of what is there.

    Args:
        resume: go on where an earlier call with the same config and dataset ended, however it ended.

    Raises:
        InputError: `run_dir` holds another config or dataset, already holds the stage and `resume` is False, or can't
            be made; stage 2 could not start from its base model, or its checkpoints have no room; `stage` names one of
            a baseline, or the baseline can't use the data.
    """
    progress = progress or NoProgress()
    opened = open_dataset(dataset)
    run = RunFolder(Path(run_dir))

    def claim() -> None:
        claim_run(run.path, config, opened.path, opened.fingerprint, continuing=resume or stage == "2")

    if run.config_file.is_file():
        claim()
    todo = [step for step in _wanted(config, stage) if not _finished(run, step, opened, resume)]
    with _empty_folder_removed(run.path):
        make_run_folder(run.path)
        if "stage2" in todo:
            _check_stage2(config, opened, run.path, progress)
        if "baseline" in todo:
            _check_baseline(config, opened, progress)
    claim()  # after the checks: a run is bound to its base model, and the user may have to name another
    remote.commit(run.path)
    if todo:
        if (tracker := told(config.runtime)) is not None:
            progress.step(f"The log goes to {tracker}")
        with ray_session(config.runtime):
            for step in todo:
                _train_step(step, config, opened, run, resume, progress)
    if config.generation.choose and run.stage2.is_dir():
        _choose_decoding(config, opened, run, progress)
    trained = [folder for folder in (run.stage1, run.stage2, run.baseline) if folder.is_dir()]
    return {folder.name: read_json(folder / METRICS_FILE) for folder in trained}


def check_base_models(configs: Sequence[RunConfig], dataset: Dataset) -> None:
    """Check that the stage 2 of each config can start from its base model; each different model is looked at once.

    For comparisons and searches, before their first training.

    Raises:
        InputError: as `stage2.preflight.check_base_model`.
    """
    different = {(config.stage2.base_model, config.stage2.scratch.family): config for config in reversed(configs)}
    for config in different.values():
        _base_model_sizes(config, dataset)


@alone_in("run_dir")
def evaluate_and_report(run_dir: Path, *, progress: Progress | None = None, **options: Any) -> dict[str, Any]:
    """Score the run's test split and write its report.html; returns the metrics."""
    from gavamoe.baselines.scores import evaluate_any
    from gavamoe.report.page import write_report

    progress = progress or NoProgress()
    progress.step("Write and score explanations")
    metrics = evaluate_any(run_dir, on_progress=progress.count, **options)
    progress.step("Write the report")
    write_report([run_dir], RunFolder(run_dir).report)
    return metrics


@alone_in("run_dir", make=True)
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


def _wanted(config: RunConfig, stage: Stage) -> list[Kind]:
    """The steps to train, in order."""
    steps: list[Kind] = [step for step in steps_of(config) if step != "evaluation"]
    if stage == "all":
        return steps
    if config.system != "gavamoe":
        raise InputError(f"--stage {stage}: {config.system} has no stages; leave it out")
    return [step for step in steps if step == f"stage{stage}"]


def _finished(run: RunFolder, step: Kind, dataset: Dataset, resume: bool) -> bool:
    """Whether the step's folder is complete and made from this dataset, and its training came to its end."""
    folder = run.path / step
    if not folder.exists():
        return False
    manifest = read_manifest(folder, step, verify=False)
    if manifest.inputs.get("dataset") != dataset.fingerprint:
        raise InputError(f"{folder}: was trained on another dataset than {dataset.path}; use another --run-dir")
    if not resume:
        raise InputError(f"{folder}: already trained; --resume keeps it, --run-dir names another folder")
    return not was_cut_off(run.path, folder.name)


@contextmanager
def _empty_folder_removed(path: Path) -> Iterator[None]:
    """Leave no empty folder behind where the block fails, if there was none."""
    there = path.exists()
    try:
        yield
    except BaseException:
        if not there and path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        raise


def _check_stage2(config: RunConfig, dataset: Dataset, folder: Path, progress: Progress) -> None:
    """What stage 2 would fail of, before stage 1 takes its time."""
    from gavamoe.stage2.preflight import check_disk, precision_warning, scratch_warning

    if config.stage2.base_model != "scratch":
        progress.step("Check the base model")
    for warning in (precision_warning(config), scratch_warning(config, dataset)):
        if warning is not None:
            progress.line({"warning": warning})
    check_disk(config, dataset, folder, _base_model_sizes(config, dataset))


def _check_baseline(config: RunConfig, dataset: Dataset, progress: Progress) -> None:
    from gavamoe.baselines.registry import find_baseline

    if config.stage2.base_model != "scratch":
        progress.step("Check the base model")
        _base_model_sizes(config, dataset)
    find_baseline(config.system).load().check(config, dataset)


def _base_model_sizes(config: RunConfig, dataset: Dataset) -> "Sizes":
    """Check the base model where it will be loaded: on a cluster, on a machine of its workers."""
    from gavamoe.stage2.preflight import check_base_model, check_base_model_task

    users, items = dataset.catalog.known_users, dataset.catalog.known_items
    if config.stage2.base_model == "scratch" or not os.environ.get("RAY_ADDRESS"):
        return check_base_model(config, users, items)
    with ray_session(config.runtime):
        job = {"config": config, "users": users, "items": items}
        [sizes] = run_tasks(check_base_model_task, [job], config.runtime)
    found: Sizes = sizes
    return found


def _train_step(
    step: Kind, config: RunConfig, dataset: Dataset, run: RunFolder, resume: bool, progress: Progress
) -> None:
    loop, arguments, title = _loop(step, config, dataset, RunFolder(run.path.absolute()))
    if step == "stage2":
        _tokenize(config, dataset, progress)
    progress.step(title)
    out: Path = arguments["out"]
    shutil.rmtree(out, ignore_errors=True)  # of a training that was cut off, see `_finished`
    run_training(
        loop,
        arguments,
        placement=config.runtime if step != "baseline" else config.runtime.model_copy(update=_ONE_WORKER),
        folder=run.path,
        name=out.name,
        resume=resume,
        elastic=step == "stage1",
        on_line=progress.line,
    )


def _choose_decoding(config: RunConfig, dataset: Dataset, run: RunFolder, progress: Progress) -> None:
    from gavamoe.evaluation.decoding_choice import choose_decoding

    progress.step("Choose how to write, on validation rows")
    choose_decoding(run.path, config, dataset, progress.count)
    remote.commit(run.path)


def _tokenize(config: RunConfig, dataset: Dataset, progress: Progress) -> None:
    """Make the token cache of many rows, in Ray tasks, before the workers start; they tokenize few rows themselves."""
    from gavamoe.stage2.token_cache import WORTHWHILE, fill_cache

    if dataset.size("train") < WORTHWHILE:
        return
    progress.step("Tokenize rows")
    placement = config.runtime.model_copy(update={"gpu": False})
    fill_cache(config, dataset.path, lambda loop, jobs: run_tasks(loop, jobs, placement, progress.count))


_ONE_WORKER = {"workers": 1, "min_workers": 0}
"""How baselines are placed: their step has the rows of all workers, so that budgets stay equal."""


def _loop(
    step: Kind, config: RunConfig, dataset: Dataset, run: RunFolder
) -> tuple[Callable[..., Any], dict[str, Any], str]:
    """The training loop of a step, its arguments, and what it is called."""
    arguments: dict[str, Any] = {"config": config, "dataset": dataset.path.absolute()}
    if step == "baseline":
        from gavamoe.baselines.registry import find_baseline
        from gavamoe.baselines.training import train_baseline

        label = find_baseline(config.system).label
        return train_baseline, arguments | {"out": run.baseline}, f"{label}: explanations"
    if step == "stage1":
        from gavamoe.stage1.train import train_stage1

        return train_stage1, arguments | {"out": run.stage1}, "Stage 1: ratings and clusters"
    from gavamoe.stage2.train import train_stage2

    read_manifest(run.stage1, "stage1")
    return train_stage2, arguments | {"stage1": run.stage1, "out": run.stage2}, "Stage 2: explanations"
