"""The pages say what is true: code blocks run or at least resolve, links and paths lead somewhere."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.example_run import example_run, write_config

import gavamoe
from gavamoe.tune.space import parse_space

ROOT = Path(__file__).parent.parent.parent
FOUND = {*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")}
PAGES = sorted(path for path in FOUND if path.name not in ("log.md", "CHANGELOG.md"))
"""All but those that tell of what was there at their time."""
FOLDERS = "benchmarks|cluster|configs|docs|examples|gavamoe|jobs|serve|tests|tune_spaces"
NAMED_FILE = re.compile(rf"(?<![\w./-])((?:{FOLDERS})/[\w/.-]*\w\.(?:py|md|yaml|json|ipynb|csv))")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


WITH_CODE = [page for page in PAGES if blocks(page, "python")]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the files that the pages take for granted."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "examples" / "reviews.csv", tmp_path)
    write_config(tmp_path / "mine.yaml")
    return tmp_path


@pytest.mark.ray
def test_the_python_page_and_the_readme_run(
    ray_two_workers: None, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del ray_two_workers
    shutil.copytree(example_run(), workplace / "runs" / "mine")  # of the same reviews and config: trained once for both
    names: dict[str, object] = {}
    for number, block in enumerate(blocks(ROOT / "docs" / "python.md", "python")):
        exec(compile(block, f"python.md, block {number}", "exec"), names)
    assert (workplace / "runs" / "mine" / "report.html").is_file()
    [block] = blocks(ROOT / "README.md", "python")
    spelled = {'"quickstart"': '"mine.yaml", ["stage1.clusters=3", "stage2.max_steps=20"]', '"U"': '"U000001"'}
    for shown, here in (spelled | {'"I"': '"I000001"'}).items():
        assert shown in block
        block = block.replace(shown, here)
    exec(compile(block, "README.md", "exec"), {})
    assert "did you mean clusters?" in capsys.readouterr().out


def test_the_python_page_has_all_public_names() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert [name for name in gavamoe.__all__ if f"gavamoe.{name}" not in page] == ["__version__"]


def test_the_model_page_runs(workplace: Path) -> None:
    [block] = blocks(ROOT / "docs" / "model.md", "python")
    exec(compile(block, "model.md", "exec"), {})
    assert (workplace / "explainer" / "model.safetensors").is_file()


def test_the_baseline_of_the_extension_page_is_scored(
    workplace: Path, tiny_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_dataset, workplace / "datasets" / "mine")
    page = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    section = page.split("## A baseline")[1].split("\n## ")[0]
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL):
        exec(compile(block, "extend.md", "exec"), names)
    assert float(capsys.readouterr().out.split()[0]) > 50, "it names the features that it is given"


def test_the_search_space_of_the_extension_page_is_one() -> None:
    [block] = blocks(ROOT / "docs" / "extend.md", "yaml")
    assert len(parse_space(yaml.safe_load(block), "extend.md").parameters) == 2


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_has_no_undefined_names(page: Path) -> None:
    code = "\n".join(blocks(page, "python"))
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,E9", "--quiet", "-"]
    checked = subprocess.run(command, input=code, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_imports_in_code_resolve(page: Path) -> None:
    for node in ast.walk(ast.parse("\n".join(blocks(page, "python")))):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {missing}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    linked = [page.parent / link for link in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text)]
    named = [ROOT / path for path in NAMED_FILE.findall(text) if not re.search(r"[A-Z]{4}\.", path)]  # not jobs/STEP.py
    placed = [ROOT / path for path in re.findall(r"`(gavamoe/[\w/]*/?)`", text)]
    assert [path for path in (*linked, *named, *placed) if not path.exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_a_heading_find_it(page: Path) -> None:
    for target, heading in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        text = (page.parent / target if target else page).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}
        assert heading in anchors, f"{target or page.name} has no heading #{heading}"


def test_the_index_lists_every_page() -> None:
    listed = re.findall(r"^\| \[(\S+)\]", (ROOT / "docs" / "README.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md")


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == gavamoe.__version__
    assert len(citation["preferred-citation"]["authors"]) == 9


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 160
    assert max(map(len, lines)) <= 120
