"""`gavamoe tune`: search a space on a dataset, keep the best configuration, train it in full, score it once on test.

    space + config + dataset -> trials on train and validation rows -> best.yaml -> final/ -> test.json

The test rows are not in the dataset that trials see (`folder.withhold_test`). Once they have scored the best trial the
search is closed: it can't be extended and choose again.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gavamoe.artifacts.files import read_json, write_json
from gavamoe.artifacts.run import RunFolder, open_run
from gavamoe.config.files import override_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset, open_dataset
from gavamoe.errors import InputError, RunError
from gavamoe.pipeline import check_base_models, evaluate_and_report, train_run
from gavamoe.runtime.progress import Progress
from gavamoe.tune.checks import check_space, config_values, refusal, trial_config
from gavamoe.tune.folder import TEST_FILE, claimed_folder, withhold_test
from gavamoe.tune.ray_tune import run_trials
from gavamoe.tune.report import write_results
from gavamoe.tune.session import SearchObserver
from gavamoe.tune.space import Choice, Space, Values, load_space
from gavamoe.tune.study import Record, Study, full_disk_told
from gavamoe.tune.trial import Job

FINAL = "final"


class SearchProgress(SearchObserver, Progress, Protocol):
    """Observer of a whole search: of its trials, and of the training of the best configuration in full."""


@dataclass(frozen=True)
class SearchResult:
    """The state of a search at the end of a session."""

    folder: Path
    """The search's folder."""
    space: Space
    """The search space."""
    records: list[Record]
    """All trials."""
    best: Record | None
    """The best complete trial by the first objective; None without any."""
    front: list[Record]
    """The Pareto front: complete trials that no other beats in every objective."""
    left_out: list[Values]
    """The points of a grid that were not tried. Where more trials would have taken them, the search stays open."""
    interrupted: bool
    """Whether Ctrl-C ended the session."""
    test: dict[str, Any] | None
    """Content of test.json: the best trial's scores on the test split, once it was trained in full."""


def run_search(
    space: str | Path,
    config: RunConfig,
    dataset: Path,
    folder: Path,
    *,
    progress: SearchProgress,
    trials: int | None = None,
    concurrent: int | None = None,
    seeds: int = 1,
    resume: bool = False,
    final: bool = True,
) -> SearchResult:
    """Run a search, or continue one.

    Args:
        space: a file, or the name of a shipped space.
        trials: number of trials, instead of the space's own budget.
        seeds: trainings of each configuration, with the config's seed and those that follow it.
        final: train the best configuration in full and score it on the test split, which closes the search. A
            grid for which there were too few trials stays open instead: more may follow.

    Raises:
        InputError: space, config, dataset or folder are wrong or don't fit each other; raised before any training.
        RunError: no trial completed.
    """
    for name, value in (("--trials", trials), ("--concurrent", concurrent), ("--seeds", seeds)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value}: at least 1")
    opened, loaded = open_dataset(dataset), load_space(space)
    if trials is not None:
        loaded = loaded.model_copy(update={"budget": loaded.budget.model_copy(update={"trials": trials})})
    check_space(loaded, config, opened, str(space))
    folder = Path(folder).absolute()
    if loaded.stages == 2 and not (folder / TEST_FILE).exists():  # a closed search trains nothing more
        check_base_models(_base_models(loaded, config), opened)
    with claimed_folder(folder, loaded, config, opened, seeds, resume=resume):
        view = withhold_test(opened, folder / "search_data")
        job = Job(loaded, config, view.path, view.fingerprint, folder, seeds)
        fixed = config_values(trial_config(config, loaded, {}))
        with full_disk_told(folder):
            study = Study(folder, loaded, fixed, seed=config.seed, name=Path(space).stem)
            finished = run_trials(job, study, progress, concurrent=concurrent)
            best = write_results(folder, study, loaded, config)
        if finished and best is None:
            raise RunError(f"{folder}: {_nothing_found(study.records)}")
        left_out = study.left_out(lambda values: refusal(config, loaded, values))
        cut_short = left_out and len(study.records) >= loaded.budget.trials
        test = None
        if finished and final and best is not None and not cut_short:
            test = _score_once(best, job, opened, len(study.records), progress)
        return SearchResult(folder, loaded, study.records, best, study.front(), left_out, not finished, test)


def _base_models(space: Space, config: RunConfig) -> list[RunConfig]:
    """A config for each base model that the space has, without experts: whether those fit is for each trial to see."""
    dense = override_config(trial_config(config, space, {}), ["stage2.experts.enabled=false"])
    field = "stage2.base_model"
    spec = space.parameters.get(field)
    return (
        [override_config(dense, [f"{field}={name}"]) for name in spec.values] if isinstance(spec, Choice) else [dense]
    )


def _nothing_found(records: list[Record]) -> str:
    if not records:
        return "no trial was started before budget.minutes were over"
    reasons = [record.reason for record in records if record.reason]
    return f"none of {len(records)} trials came to an end; the last: {reasons[-1] if reasons else 'no reason known'}"


def _score_once(best: Record, job: Job, dataset: Dataset, trials: int, progress: Progress) -> dict[str, Any]:
    """Train the best configuration in full and score it on the test split; a second call reads what is there."""
    path = job.folder / TEST_FILE
    if path.exists():
        scored: dict[str, Any] = read_json(path)
        return scored
    config = trial_config(job.config, job.space, best.values, cheap=False)
    final = job.folder / FINAL
    if RunFolder(final).config_file.exists() and open_run(final).config != config:
        shutil.rmtree(final)  # begun for an earlier best, never scored
    both = job.space.stages == 2
    metrics = train_run(config, dataset.path, final, stage="all" if both else "1", resume=True, progress=progress)
    if both:
        scores = evaluate_and_report(final, progress=progress, dataset=dataset.path, split="test")["metrics"]
    else:
        scores = metrics["stage1"]["test"]
    scored = {"trial": best.number, "trials": trials, "split": "test", "metrics": scores}
    write_json(path, scored)
    return scored
