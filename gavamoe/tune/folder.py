"""A search's folder: it belongs to one search, which one process at a time works on.

tune.json       the space, the config it starts from, the dataset, the seeds
study.db        the Optuna study (`study`)
search_data/    the dataset without its test rows
stage1_cache/, trials/    (`trial`)
trials.parquet, best.yaml, table.md, plots/, pareto/    (`report`)
final/, test.json         the best configuration trained in full, and its test scores
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from gavamoe.artifacts.files import read_json, sha256, write_folder, write_json
from gavamoe.artifacts.lock import locked_folder
from gavamoe.artifacts.run import first_difference
from gavamoe.config.files import parse_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import DATA_FILES, ROWS_SCHEMA, Dataset, fingerprint, open_dataset
from gavamoe.errors import InputError
from gavamoe.tune.space import Space

TUNE_FILE = "tune.json"
TEST_FILE = "test.json"
_LOCK_FILE = "tune.lock"
_TRUTH_FILES = ("truth.json", "truth_users.parquet")


@contextmanager
def claimed_folder(
    folder: Path, space: Space, config: RunConfig, dataset: Dataset, seeds: int, *, resume: bool
) -> Iterator[None]:
    """Claim `folder` for this search, or check that it holds it, and lock it for as long as the block runs.

    Raises:
        InputError: it holds another search or something else, a search is running in it, or `resume` is missing.
    """
    try:
        _check(folder, space, config, dataset, seeds, resume=resume)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _LOCK_FILE).open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise InputError(f"{folder}: can't be a search's folder ({error.strerror}); use another --run-dir") from error
    with locked_folder(folder, _LOCK_FILE):
        if not (folder / TUNE_FILE).exists():
            write_json(folder / TUNE_FILE, _identity(space, config, dataset, seeds))
        yield


def withhold_test(dataset: Dataset, out: Path) -> Dataset:
    """Make (or reopen) the view `out` of a dataset without its test rows: the test split is there, and empty.

    Trials get this folder and no other, so that no trial can be chosen by test rows, whatever its code does. The files
    share the dataset's content where the disk allows it; the fingerprint differs, for the test split does.

    Raises:
        InputError: `out` is the view of another dataset.
    """
    wanted = _meta_without_test(dataset)
    if out.exists():
        view = open_dataset(out)
        if {name: view.meta.files.get(name) for name in wanted} != wanted:
            raise InputError(f"{out}: was made from a dataset other than {dataset.path}; use another --run-dir")
        return view
    with write_folder(out) as folder:
        for name in (*DATA_FILES, *_TRUTH_FILES):
            source = dataset.path.resolve() / name
            if name != "test.parquet" and source.exists():
                try:  # no symbolic link, which could not be stored with the search
                    (folder / name).hardlink_to(source)
                except OSError:  # another disk, or files of another user
                    shutil.copyfile(source, folder / name)
        pq.write_table(ROWS_SCHEMA.empty_table(), folder / "test.parquet")
        files = wanted | {"test.parquet": sha256(folder / "test.parquet")}
        meta = read_json(dataset.path / "meta.json")
        meta |= {"rows": meta["rows"] | {"test": 0}, "files": files, "fingerprint": fingerprint(files)}
        write_json(folder / "meta.json", meta)
    return open_dataset(out)


def _check(folder: Path, space: Space, config: RunConfig, dataset: Dataset, seeds: int, *, resume: bool) -> None:
    path = folder / TUNE_FILE
    if not path.exists():
        if folder.exists() and any(entry.name != _LOCK_FILE for entry in folder.iterdir()):
            raise InputError(f"{folder}: not empty, and not a search's folder ({TUNE_FILE} is missing); use another")
        return
    before, now = read_json(path), _identity(space, config, dataset, seeds)
    if not isinstance(before, dict):
        raise InputError(f"{path}: damaged; use another --run-dir")
    for key, name in (("dataset", "dataset"), ("space", "space"), ("config", "config"), ("seeds", "--seeds")):
        recorded = before.get(key)
        if key == "config" and isinstance(recorded, dict):
            recorded = _identity(space, parse_config(recorded, str(path)), dataset, seeds)["config"]
        difference = first_difference(recorded, now[key], name)
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
    """The settings that must be equal for a search to be continued. The budget's size and the runtime may change."""
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


def _meta_without_test(dataset: Dataset) -> dict[str, str]:
    """Hashes of the files that the view shares with the dataset."""
    return {name: digest for name, digest in dataset.meta.files.items() if name != "test.parquet"}
