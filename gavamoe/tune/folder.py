"""A search's folder: whose it is, and that one search at a time works in it.

tune.json       the space, the config it starts from, the dataset, the seeds
study.db        the Optuna study (tune_study)
search_data/    the dataset without its test rows (tune_data)
stage1_cache/, trials/    (tune_trial)
trials.parquet, best.yaml, table.md, plots/, pareto/    (tune_report)
final/, test.json         the best configuration trained in full, and its test scores
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gavamoe.artifacts.files import read_json, write_json
from gavamoe.artifacts.run import first_difference
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError
from gavamoe.tune.space import Space

TUNE_FILE = "tune.json"
TEST_FILE = "test.json"
_LOCK_FILE = "tune.lock"


@contextmanager
def claimed_folder(
    folder: Path, space: Space, config: RunConfig, dataset: Dataset, seeds: int, *, resume: bool
) -> Iterator[None]:
    """Make `folder` this search's, or check that it is, and keep others out of it for as long as the block runs.

    Raises:
        InputError: it holds another search or something else, a search is at work in it, or `resume` is missing.
    """
    _check(folder, space, config, dataset, seeds, resume=resume)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK_FILE).open("w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{folder}: another search is at work here; wait for it or use another --run-dir"
            ) from error
        if not (folder / TUNE_FILE).exists():
            write_json(folder / TUNE_FILE, _identity(space, config, dataset, seeds))
        yield


def _check(folder: Path, space: Space, config: RunConfig, dataset: Dataset, seeds: int, *, resume: bool) -> None:
    path = folder / TUNE_FILE
    if not path.exists():
        if folder.exists() and any(entry.name != _LOCK_FILE for entry in folder.iterdir()):
            raise InputError(f"{folder}: not empty, and not a search's folder ({TUNE_FILE} is missing); use another")
        return
    before, now = read_json(path), _identity(space, config, dataset, seeds)
    if not isinstance(before, dict):
        raise InputError(f"{path}: damaged; use another --run-dir")
    for part, name in (("dataset", "dataset"), ("space", "space"), ("config", "config"), ("seeds", "--seeds")):
        difference = first_difference(before.get(part), now[part], name)
        if difference is not None:
            field, old, new = difference
            raise InputError(
                f"{folder}: holds a search with another {name} ({field} was {_short(old)}, now {_short(new)});"
                " use the same or another --run-dir"
            )
    if not resume:
        raise InputError(f"{folder}: already holds a search; --resume continues it, --run-dir names another folder")
    if (folder / TEST_FILE).exists() and _trials(folder) < space.budget.trials:
        raise InputError(
            f"{folder}: closed: its best trial was scored on the test split, so no further trial may be chosen;"
            " use another --run-dir (--no-final keeps a search open)"
        )


def _identity(space: Space, config: RunConfig, dataset: Dataset, seeds: int) -> dict[str, Any]:
    """What must be equal for a search to be continued. The budget's size and where it runs may change."""
    described = space.model_dump(mode="json", exclude={"description"})
    described["budget"] = {"set": described["budget"]["set"]}
    return {
        "dataset": {"fingerprint": dataset.fingerprint},
        "space": described,
        "config": config.model_dump(mode="json", exclude={"runtime"}),
        "seeds": seeds,
    }


def _trials(folder: Path) -> int:
    trials: int = read_json(folder / TEST_FILE)["trials"]
    return trials


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
