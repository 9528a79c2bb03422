"""Every script of examples/, run as a newcomer would run it, on tiny data."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.example_run import EXAMPLES, example, example_run
from helpers.ray_head import free_port
from helpers.serve_run import Site

from gavamoe import evaluate_run
from gavamoe.data.readers import formats
from gavamoe.serving.settings import hash_key

SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
NOTEBOOK = EXAMPLES / "whole_story.ipynb"


@pytest.fixture(scope="module")
def run(ray_two_workers: None) -> Path:
    """The run folder that own_reviews.py leaves."""
    del ray_two_workers
    return example_run()


@pytest.fixture(scope="module")
def site(run: Path) -> Iterator[Site]:
    opened = Site(run / "stage2", api_key_hashes=[hash_key("secret")])
    yield opened
    opened.close()


def printed(capsys: pytest.CaptureFixture[str], name: str, *arguments: object) -> list[str]:
    """The lines that a script prints."""
    example(name)([str(argument) for argument in arguments])
    return capsys.readouterr().out.strip().split("\n")


@pytest.mark.ray
def test_own_reviews(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second call keeps what is trained, and explains another pair, whose user was never seen."""
    before = (run / "stage2" / "artifact.json").read_bytes()
    config = run.parent / "tiny.yaml"
    lines = printed(capsys, "own_reviews", "--config", config, "--run-dir", run, "--user", "nobody")
    assert "is kept as it is" in lines[0]
    assert lines[1] == "800 training rows of 60 users and 40 items"
    assert re.fullmatch(r"rating RMSE \d\.\d\d, text loss \d\.\d\d", lines[2])
    assert re.fullmatch(r"nobody, I000001: rating \d\.\d, cluster [012]", lines[3])
    assert (run / "stage2" / "artifact.json").read_bytes() == before


@pytest.mark.ray
def test_load_in_transformers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "load_in_transformers", run / "stage2", "--user", 3, "--item", 5)
    assert [line.split(":")[0] for line in lines] == ["gate 0", "gate 1", "gate 2"]


def test_own_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "FORMATS", dict(formats.FORMATS))  # the script adds one, which no other test expects
    rows = [f"2026-03-14 | u{n % 9} | i{n % 11} | {1 + n % 5} | Pours well, and the lid stays on." for n in range(99)]
    (tmp_path / "reviews.log").write_text("\n".join([*rows, "no review", "2026-03-14 | ann | tea | nine | Good."]))
    lines = printed(capsys, "own_reader", tmp_path / "reviews.log", tmp_path / "dataset")
    assert lines[0].startswith("99 of 101 rows kept: 9 users, 11 items")
    assert any("1 rejected: not 5 values" in line for line in lines)
    assert any("1 rejected: rating not a number" in line for line in lines)


@pytest.mark.ray
def test_own_metric(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated = Path(shutil.copytree(run, tmp_path / "run"))
    evaluate_run(evaluated, rows=40, probe_rows=0)
    lines = printed(capsys, "own_metric", evaluated)
    assert lines[0].startswith("all rows: ")
    assert lines[0].endswith("40 rows")
    assert sum(int(line.split()[-2]) for line in lines[1:]) == 40


def test_compare_systems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    references = [f"the kettle number {n} pours well" for n in range(30)]
    texts = {"references": references, "ours": references, "theirs": ["something else"] * 30}
    for name, lines in texts.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    files = [tmp_path / f"{name}.txt" for name in ("ours", "theirs", "references")]
    table = [line.split() for line in printed(capsys, "compare_systems", *files, "--resamples", 200)]
    assert table[0] == ["30", "rows"]
    [bleu] = [line for line in table if line[0] == "bleu_1"]
    assert (bleu[1], bleu[2], bleu[3]) == ("100.00", "0.00", "+100.00")
    assert float(bleu[-1]) < 0.05


@pytest.mark.ray
def test_service_client(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    pair = ["--user", "U000001", "--item", "I000001", "--url", site.url]
    lines = printed(capsys, "service_client", *pair, "--key", "secret")
    assert re.fullmatch(r"cluster \d, predicted rating \d\.\d", lines[0])
    assert re.fullmatch(r"\d+ tokens in \d+ ms", lines[-1])
    with pytest.raises(SystemExit, match="401: an API key is needed"):
        printed(capsys, "service_client", *pair, "--key", "wrong")
    with pytest.raises(SystemExit, match="refused"):
        printed(capsys, "service_client", *pair[:-1], f"http://127.0.0.1:{free_port()}")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_short_and_say_how_to_run_them(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 60
    assert f"python examples/{name}.py" in text.split('"""')[1]


def test_the_index_lists_every_example() -> None:
    listed = re.findall(r"^\| \[(\S+)\]", (EXAMPLES / "README.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted([*(f"{name}.py" for name in SCRIPTS), NOTEBOOK.name])


def test_the_notebook_is_kept_without_outputs() -> None:
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert not [cell for cell in code if cell.outputs or cell.execution_count]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=540, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "runs" / "story" / "report.html").is_file()
