"""Shared fixtures: a tiny prepared dataset, and one Ray for the whole session."""

import csv
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from helpers.cli import Runner
    from helpers.stage2_runs import Trained
    from starlette.testclient import TestClient

    from gavamoe.data.dataset import Dataset
    from gavamoe.serving.backend import LocalBackend

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray's workers unpickle functions of test modules by name.
TESTS = Path(__file__).parent
FOLDERS = [str(TESTS), *sorted({str(path.parent) for path in TESTS.glob("*/test_*.py")})]
os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, os.environ.get("PYTHONPATH", "")])
sys.path += FOLDERS
# The same examples in every run: what is green here must be green in CI.
settings.register_profile("same", derandomize=True, database=None)
settings.load_profile("same")


def pytest_unconfigure() -> None:
    from helpers.scratch import remove_scratch_folders

    remove_scratch_folders()  # xdist ends its workers so that nothing registered with atexit is called


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Side by side (`pytest -n 2`) a file's tests stay in one process, where they share what they trained.

    So do all files that use Ray: a second one would want the same two cores. (xdist's own groups don't reach pytest 9.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return "ray" if _uses_ray(config.rootpath / file) else file

    return ByFile(config, log)


@cache
def _uses_ray(file: Path) -> bool:
    return re.search(r"mark\.ray\b|ray_two_workers|extensions_dir", file.read_text(encoding="utf-8")) is not None


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic dataset of 60 users, 40 items, 1,500 ratings, 3 planted groups."""
    from gavamoe.data.synthetic.generator import synthesize

    out = tmp_path_factory.mktemp("data") / "tiny"
    synthesize(out, users=60, items=40, ratings=1500, groups=3, seed=0)
    return out


@pytest.fixture(scope="module")
def planted(tiny_dataset: Path) -> "Dataset":
    """The tiny dataset, opened; its truth is known."""
    from gavamoe.data.dataset import open_dataset

    return open_dataset(tiny_dataset)


@pytest.fixture(scope="session")
def implicit_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs without ratings: every user takes items of its own half only."""
    import numpy as np

    from gavamoe.data.prepare import prepare

    folder = tmp_path_factory.mktemp("implicit")
    random = np.random.default_rng(0)
    draws = zip(random.integers(120, size=1600), random.integers(40, size=1600), strict=True)
    pairs = {(int(user), int(2 * half + user % 2)) for user, half in draws}
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "text"])
        writer.writerows([f"u{u}", f"i{i}", "a good text"] for u, i in sorted(pairs))
    prepare(folder / "pairs.csv", folder / "out", "table", columns={"user": "user", "item": "item", "text": "text"})
    return folder / "out"


@pytest.fixture
def gavamoe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Runner":
    """Calls the command line in this process: `gavamoe("train", ...)`."""
    from helpers.cli import Runner

    return Runner(monkeypatch, capsys)


@pytest.fixture(scope="session")
def extensions_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this session for DeepSpeed's compiled operations: a lock left by a killed build can't hang it."""
    folder = tmp_path_factory.mktemp("torch_extensions")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def ray_two_workers(extensions_dir: Path) -> Iterator[None]:
    """A Ray on this machine with two CPUs, started once; `ray_session` inside the tests then uses it."""
    del extensions_dir
    from gavamoe.config.schema import RuntimeConfig
    from gavamoe.runtime.ray_train import ray_session

    with ray_session(RuntimeConfig(workers=2, threads_per_worker=1)):
        yield


@pytest.fixture(scope="module")
def backend() -> Iterator["LocalBackend"]:
    """Both stages of serving in this process, over `serve_run.tiny_artifact`."""
    from helpers.serve_run import tiny_artifact

    from gavamoe.serving.backend import LocalBackend
    from gavamoe.serving.settings import ServeArgs

    loaded = LocalBackend.load(ServeArgs(run=str(tiny_artifact())))
    yield loaded
    loaded.writer.engine.close()


@pytest.fixture(scope="module")
def http(backend: "LocalBackend") -> Iterator["TestClient"]:
    """The HTTP interface over `backend`, without a server."""
    from helpers.serve_run import client

    with client(backend) as opened:
        yield opened


@pytest.fixture(scope="session")
def stage1(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 trained on the tiny dataset for an epoch or two."""
    from helpers.tiny import tiny

    from gavamoe.runtime.context import LocalContext
    from gavamoe.stage1.train import train_stage1

    out = tmp_path_factory.mktemp("stage1") / "stage1"
    train_stage1(tiny(), tiny_dataset, out, LocalContext())
    return out


@pytest.fixture(scope="session")
def torch_run(tiny_dataset: Path, stage1: Path, tmp_path_factory: pytest.TempPathFactory) -> "Trained":
    """A finished stage-2 run of 12 steps on the torch engine, with checkpoints at 6 and 12."""
    from helpers.stage2_runs import Trained
    from helpers.tiny import tiny

    return Trained(tiny(), tiny_dataset, stage1, tmp_path_factory.mktemp("torch"))
