"""The main job on Ray Train with two workers and DeepSpeed, through the command line, on a tiny dataset."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.cli import Runner
from helpers.tiny import WHOLE_JOB, tiny_yaml

from gavamoe.data.dataset import open_dataset


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "tiny"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_two_workers")
def test_train_evaluate_explain_route_report(gavamoe: Runner, tiny_dataset: Path, run_dir: Path) -> None:
    config = run_dir.parent / "tiny.yaml"
    config.write_text(tiny_yaml(*WHOLE_JOB))
    command = ["train", config, "--dataset", tiny_dataset, "--run-dir", run_dir]
    trained = gavamoe(*command, "--json")
    assert trained.code == 0, trained.err
    metrics = json.loads(trained.out)
    assert set(metrics) == {"stage1", "stage2"}
    assert sorted(path.name for path in run_dir.iterdir() if path.name != "checkpoints") == [
        "config.yaml", "dataset.json", "logs", "stage1", "stage2",
    ]  # fmt: skip

    again = gavamoe(*command)
    assert again.code == 2
    assert "already holds a run; --resume continues it" in again.err
    resumed = gavamoe(*command, "--resume", "--json")
    assert json.loads(resumed.out) == metrics
    other = gavamoe(*command, "--resume", "--set", "stage1.beta=0.7")
    assert other.code == 2
    assert "was started with stage1.beta=0.1, now 0.7" in other.err

    evaluated = gavamoe("evaluate", run_dir, "--rows", 20, "--json")
    assert evaluated.code == 0, evaluated.err
    assert json.loads(evaluated.out)["rows"] == 20
    assert (run_dir / "report.html").stat().st_size > 1000

    catalog = open_dataset(tiny_dataset).catalog
    pair = ["--user", catalog.user_id(0), "--item", catalog.item_id(0)]
    known = json.loads(gavamoe("explain", run_dir, *pair, "--json").out)
    assert (known["user_known"], known["item_known"], known["rating_given"]) == (True, True, False)
    unknown = gavamoe("explain", run_dir, "--user", "nobody", "--item", "nothing", "--rating", 5)
    assert unknown.code == 0, unknown.err
    assert "user not seen in training" in unknown.err
    assert "item not seen in training" in unknown.err

    routed = json.loads(gavamoe("route", run_dir, "--user", "nobody", "--item", catalog.item_id(0), "--json").out)
    assert sum(routed["responsibilities"]) == pytest.approx(1, abs=1e-5)
    assert (routed["user_known"], routed["item_known"]) == (False, True)
    clusters = gavamoe("route", run_dir, "--json")
    assert clusters.code == 0, clusters.err
    assert len(json.loads(clusters.out)) == 3
    assert (run_dir / "clusters.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_two_workers")
def test_stage1_of_another_dataset_is_refused(
    gavamoe: Runner, tiny_dataset: Path, run_dir: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    assert gavamoe("data", "synthesize", other, "--users", 60, "--items", 40, "--ratings", 1500, "--seed", 9).code == 0
    moved = tmp_path / "run"
    shutil.copytree(run_dir, moved)
    result = gavamoe("train", moved / "config.yaml", "--dataset", other, "--run-dir", moved, "--resume")
    assert result.code == 2
    assert "was started on another dataset" in result.err
    shutil.copytree(run_dir / "stage1", tmp_path / "mixed" / "stage1")
    result = gavamoe(
        "train", moved / "config.yaml", "--dataset", other, "--run-dir", tmp_path / "mixed", "--stage", "2"
    )
    assert result.code == 2
    assert "a dataset other than" in result.err
    assert not (tmp_path / "mixed" / "stage2").exists()
