"""A dataset, a run, a search and a served artifact that commit bf5ca7b wrote, before the package had sub-packages."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers.cli import Runner
from helpers.serve_run import client
from transformers import AutoModelForCausalLM

from gavamoe.artifacts.files import read_json, write_json
from gavamoe.artifacts.run import open_run
from gavamoe.data.dataset import dataset_of_run
from gavamoe.serving.backend import LocalBackend
from gavamoe.serving.settings import ServeArgs

ARCHIVE = Path(__file__).parent.parent / "fixtures" / "written_by_bf5ca7b.tar.xz"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The archive, unpacked, with the dataset's new place in the run's reference to it."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    for run in (tmp_path / "run", tmp_path / "search" / "final"):
        reference = read_json(run / "dataset.json")
        write_json(run / "dataset.json", reference | {"path": str(tmp_path / "dataset")})
    return tmp_path


def test_the_run_opens_and_is_explained_alike(gavamoe: Runner, old: Path) -> None:
    run = open_run(old / "run")
    assert dataset_of_run(run).size("train") > 1000
    expected = json.loads((old / "explained.json").read_text())
    asked = ("--user", expected["user"], "--item", expected["item"], "--json")
    answer = json.loads(gavamoe("explain", old / "run", *asked).out)
    for name, value in expected.items():
        rounded = name in ("responsibilities", "predicted_rating")
        assert answer[name] == (pytest.approx(value, rel=1e-4) if rounded else value)
    assert answer["text"]
    assert json.loads(gavamoe("status", old / "run", "--json").out)["steps"][2]["state"] == "done"
    route = json.loads(gavamoe("route", old / "run", *asked).out)
    assert route["cluster"] == expected["cluster"]


def test_it_is_evaluated_alike_and_reported_before_and_after(gavamoe: Runner, old: Path) -> None:
    run = old / "run"
    before = read_json(run / "evaluation" / "metrics.json")
    texts = pq.read_table(run / "evaluation" / "generations.parquet")["generated"].to_pylist()
    assert gavamoe("report", run, "--out", old / "before.html").code == 0
    assert (old / "before.html").stat().st_size > 10_000
    assert gavamoe("evaluate", run).code == 0
    after = read_json(run / "evaluation" / "metrics.json")
    for name, value in before["metrics"].items():
        assert after["metrics"][name] == (None if value is None else pytest.approx(value, rel=1e-5)), name
    assert pq.read_table(run / "evaluation" / "generations.parquet")["generated"].to_pylist() == texts
    assert len(set(texts)) > 1


def test_a_finished_training_is_continued_as_finished(gavamoe: Runner, old: Path) -> None:
    command = ("train", old / "tiny.yaml", "--dataset", old / "dataset", "--run-dir", old / "run")
    resumed = gavamoe(*command, "--resume", "--json")
    assert resumed.code == 0, resumed.err
    assert json.loads(resumed.out)["stage2"] == read_json(old / "run" / "stage2" / "metrics.json")
    other = gavamoe(*command, "--resume", "--set", "stage1.beta=0.7")
    assert "was started with stage1.beta=0.1, now 0.7" in other.err


def test_the_search_is_continued_as_finished(gavamoe: Runner, old: Path) -> None:
    command = ("tune", old / "space.yaml", old / "tiny.yaml", "--dataset", old / "dataset", "--run-dir", old / "search")
    again = gavamoe(*command)
    assert again.code == 2
    assert "already holds a search" in again.err
    resumed = gavamoe(*command, "--resume", "--json")
    assert resumed.code == 0, resumed.err
    assert [trial["state"] for trial in json.loads(resumed.out)["trials"]] == ["complete", "complete"]


def test_the_artifact_is_served(old: Path) -> None:
    expected = json.loads((old / "explained.json").read_text())
    backend = LocalBackend.load(ServeArgs(run=str(old / "run")))
    try:
        with client(backend) as http:
            answer = http.post("/v1/explain", json={"user": expected["user"], "item": expected["item"]}).json()
    finally:
        backend.writer.engine.close()
    assert (answer["text"], answer["cluster"]) == (expected["text"], expected["cluster"])


def test_what_its_model_card_says_still_works(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (old / "run" / "stage2" / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n", 1)[1].split("```", 1)[0]
    assert "from gavamoe.generate import Explainer" in code
    monkeypatch.chdir(old / "run")
    done = subprocess.run([sys.executable, "-c", code + "print(explanation.text)"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_former_home_of_the_model_classes_still_imports(old: Path) -> None:
    import gavamoe.explainer

    model = AutoModelForCausalLM.from_pretrained(old / "run" / "stage2")
    assert isinstance(model, gavamoe.explainer.GavamoeForCausalLM)
    assert gavamoe.explainer.load_explainer(old / "run" / "stage2")[0].config.n_gates == 3
