"""Jobs: what is uploaded, how a log is cut into lines, and (slow) real jobs on a head of their own."""

import json
import os
import runpy
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.cli import Runner, command
from helpers.ray_head import ROOT, ray_head
from helpers.tiny import WHOLE_JOB, tiny_yaml

from gavamoe.errors import InputError
from gavamoe.runtime.jobs import FORWARDED, STEPS, _Reader, job_environment, staged_code


def test_only_code_and_named_yaml_files_go_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("seed: 3")
    (tmp_path / "keys").write_text("secret")
    with staged_code(["mine.yaml", "--dataset", "data", "--set", "seed=keys"]) as (folder, arguments):
        assert arguments == ["inputs/mine.yaml", "--dataset", "data", "--set", "seed=keys"]
        assert sorted(path.name for path in folder.iterdir()) == ["configs", "gavamoe", "inputs", "jobs", "tune_spaces"]
        assert [path.name for path in (folder / "inputs").iterdir()] == ["mine.yaml"]
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < 5 * 2**20
        assert not [path for path in files if path.suffix == ".pyc"]
        package = {path.relative_to(ROOT / "gavamoe") for path in (ROOT / "gavamoe").rglob("*.py")}
        assert package == {path.relative_to(folder / "gavamoe") for path in (folder / "gavamoe").rglob("*.py")}
        code = "import gavamoe.config.files as c; print(c.load_config('quickstart').seed, c.__file__)"
        found = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True,
                               env=os.environ | {"PYTHONPATH": str(folder)})  # fmt: skip
        assert found.stdout.split() == ["0", str(folder / "gavamoe" / "config" / "files.py")]
    assert not folder.exists()


def test_two_files_of_one_name_and_huge_ones_are_refused(tmp_path: Path) -> None:
    for name, text in (("a", "seed: 1"), ("b", "seed: 2"), ("c", "#" * 2**21)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.yaml").write_text(text)
    first, second, huge = (str(tmp_path / name / "x.yaml") for name in "abc")
    with pytest.raises(InputError, match="another file of that name"), staged_code([first, second]):
        pass
    with pytest.raises(InputError, match="larger than"), staged_code([huge]):
        pass


def test_secrets_of_this_shell_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    environment = job_environment({"A": "1"})
    assert environment["A"] == "1"
    assert environment["AWS_REGION"] == "eu-west-1"
    assert environment.keys() <= {"PYTHONUNBUFFERED", "A", *FORWARDED}
    assert not [name for name in FORWARDED if "KEY" in name or "TOKEN" in name or "SECRET" in name]


@pytest.mark.parametrize("step", STEPS)
def test_every_step_has_a_script_that_calls_a_command(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, ...]] = []
    monkeypatch.setattr("gavamoe.cli.run_job", lambda *words: called.append(words))
    runpy.run_path(str(ROOT / "jobs" / f"{step}.py"))
    [words] = called
    shown = subprocess.run(command(*words, "--help"), capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.returncode == 0
    assert sorted(path.stem for path in (ROOT / "jobs").glob("*.py")) == sorted(STEPS)


class Shown:
    """A follower that keeps what it is handed."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.bars: list[tuple[str, int, int, str]] = []

    def text(self, line: str) -> None:
        self.lines.append(line)

    def progress(self, title: str, done: int, total: int, note: str) -> None:
        self.bars.append((title, done, total, note))


def test_chunks_become_lines_and_bars_and_a_reconnection_repeats_nothing() -> None:
    log = "Stage 1 ...\n[Stage 1: ratings] 12/40 elbo, loss 0.5\n[not a bar]\n[Stage 1: ratings] 40/40\nlast"
    for cut in range(1, len(log)):
        shown = Shown()
        reader = _Reader(shown)
        reader.rewind()
        reader.feed(log[:cut])
        reader.rewind()  # the connection broke: the log comes again, from its beginning
        for character in log:
            reader.feed(character)
        reader.end()
        assert shown.lines == ["Stage 1 ...", "[not a bar]", "last"]
        assert shown.bars == [("Stage 1: ratings", 12, 40, "elbo, loss 0.5"), ("Stage 1: ratings", 40, 40, "")]


def test_wrong_steps_and_silent_addresses_are_one_line(gavamoe: Runner) -> None:
    wrong = gavamoe("submit", "stage3")
    assert (wrong.code, "stage3: no such step; there are prepare" in wrong.err) == (2, True)
    silent = gavamoe("submit", "stage1", "quickstart", "--address", "http://127.0.0.1:9")
    assert silent.code == 2
    assert "--address http://127.0.0.1:9: no job server answers" in silent.err


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with ray_head(tmp_path_factory.mktemp("head")) as environment:
        yield environment


def run_cli(environment: dict[str, str], folder: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """The command as a user's shell runs it, in a folder of the user's."""
    return subprocess.run(
        command(*arguments), env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
        cwd=folder, capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip


def metrics_of(head: dict[str, str], wanted: str) -> str:
    """What Prometheus would be told; Ray tells it seconds after the fact."""
    end = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{head['TEST_METRICS_PORT']}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
        if wanted in text or time.monotonic() > end:
            return text
        time.sleep(1)


@pytest.mark.slow
def test_the_whole_work_as_a_job(head: dict[str, str], tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_yaml(*WHOLE_JOB))
    run = tmp_path / "run"
    done = run_cli(head, tmp_path, "submit", "pipeline", "tiny.yaml", "--dataset", tiny_dataset, "--run-dir", run)
    assert done.returncode == 0, done.stderr
    assert "Stage 1: ratings and clusters: done" in done.stderr
    assert "Write the report: done" in done.stderr
    assert (run / "report.html").is_file()
    [job] = json.loads(run_cli(head, tmp_path, "jobs", "list", "--json").stdout)
    assert (job["status"], job["exit_code"]) == ("SUCCEEDED", 0)
    assert job["id"].startswith("pipeline-")
    logs = run_cli(head, tmp_path, "jobs", "logs", job["id"])
    assert "Stage 2: explanations: done" in logs.stdout
    again = run_cli(head, tmp_path, "submit", "pipeline", "tiny.yaml", "--dataset", tiny_dataset, "--run-dir", run)
    assert again.returncode == 2, "a job ends with the command's exit code"
    assert "already holds a run; --resume continues it" in again.stderr


@pytest.mark.slow
def test_a_job_is_left_alone_listed_and_stopped(head: dict[str, str], tiny_dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    started = run_cli(
        head, tmp_path, "submit", "stage1", "quickstart", "--no-wait", "--dataset", tiny_dataset, "--run-dir", run,
        "--set", "stage1.epochs=100000",
    )  # fmt: skip
    assert started.returncode == 0, started.stderr
    job = started.stdout.strip()
    log, end = run / "logs" / "stage1.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.read_text()) and time.monotonic() < end:
        time.sleep(1)
    assert "running" in run_cli(head, tmp_path, "jobs", "list").stderr
    for name in ("train_step", "train_loss", "train_pairs_per_second"):
        assert f"ray_gavamoe_{name}{{" in metrics_of(head, f"ray_gavamoe_{name}")
    assert "asked to stop" in run_cli(head, tmp_path, "jobs", "stop", job).stderr
    followed = run_cli(head, tmp_path, "jobs", "logs", job, "--follow")
    assert "Stage 1: ratings and clusters ..." in followed.stderr
    assert json.loads(run_cli(head, tmp_path, "jobs", "list", "--json").stdout)[0]["status"] == "STOPPED"
    assert not (run / "stage1").exists()
    assert "had ended before" in run_cli(head, tmp_path, "jobs", "stop", job).stderr
    missing = run_cli(head, tmp_path, "jobs", "logs", "nosuch")
    assert (missing.returncode, "nosuch: no such job" in missing.stderr) == (2, True)


@pytest.mark.slow
def test_without_the_token_nothing_is_told(head: dict[str, str], tmp_path: Path) -> None:
    stranger = {**head, "RAY_AUTH_TOKEN": "0" * 32}
    refused = run_cli(stranger, tmp_path, "jobs", "list")
    assert refused.returncode == 1
    [line] = refused.stderr.splitlines()
    assert "the cluster refuses this client's token" in line
    assert refused.stdout == ""
