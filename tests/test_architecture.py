"""The layout: imports point one way, few files know Ray, packages list their files, tests follow the packages."""

import ast
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gavamoe"
TESTS = ROOT / "tests"

GROUND = {"errors", "config", "artifacts"}
UP_TO_STAGE2 = GROUND | {"data", "model", "runtime", "stage1", "generation", "stage2"}
UP_TO_PIPELINE = UP_TO_STAGE2 | {"evaluation", "baselines", "report", "pipeline"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "artifacts": {"errors", "config"},
    "data": GROUND,
    "model": GROUND,
    "runtime": GROUND,
    "stage1": GROUND | {"data", "model", "runtime"},
    "generation": GROUND | {"data", "model", "runtime", "stage1"},
    "stage2": UP_TO_STAGE2 - {"stage2"},
    "evaluation": UP_TO_STAGE2,
    "baselines": UP_TO_STAGE2 | {"evaluation"},
    "report": UP_TO_STAGE2 | {"evaluation"},
    "pipeline": UP_TO_STAGE2 | {"evaluation", "baselines", "report"},
    "experiments": UP_TO_PIPELINE,
    "plan": UP_TO_STAGE2,
    "tune": UP_TO_PIPELINE,
    "export": UP_TO_STAGE2 - {"stage2"},
    "serving": GROUND | {"data", "model", "runtime", "stage1", "generation"},
    "cli": UP_TO_PIPELINE | {"experiments", "plan", "tune", "serving", "export"},
}

"""Room (a package or a module at the top) -> the rooms it may import from, beside itself."""

FORMER = {"explainer", "generate", "prompts"}
"""Aliases of former homes, kept for one release; nothing here imports them."""

KNOW_RAY = {"runtime", "tune.ray_tune", "serving.deployments", "serving.launch"}
MOST_FILES = 15


def modules() -> list[str]:
    """Dotted names below the package, without the `__init__` files."""
    files = [path for path in PACKAGE.rglob("*.py") if path.stem != "__init__"]
    return sorted({".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in files} - FORMER)


def folders() -> list[Path]:
    return sorted(path.parent for path in PACKAGE.rglob("__init__.py"))


def room(module: str) -> str:
    return module.split(".")[0]


def imports(path: Path) -> set[str]:
    """Everything that a file imports, anywhere in its body, with names imported from a package as modules of it."""
    imported: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return imported


def file_of(module: str) -> Path:
    return PACKAGE / f"{module.replace('.', '/')}.py"


def test_every_room_has_its_rule() -> None:
    assert {room(module) for module in modules()} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module: str) -> None:
    own = {name.removeprefix("gavamoe.") for name in imports(file_of(module)) if name.startswith("gavamoe.")}
    rooms = {room(name) for name in own} & set(MAY_IMPORT) - {room(module)}
    assert rooms <= MAY_IMPORT[room(module)], f"{module} imports from {sorted(rooms - MAY_IMPORT[room(module)])}"


def test_the_rule_is_an_order() -> None:
    """No two rooms may import from each other, however many others lie between."""
    left, placed = dict(MAY_IMPORT), set[str]()
    while left:
        free = {name for name, below in left.items() if below <= placed}
        assert free, f"a circle among {sorted(left)}"
        placed |= free
        left = {name: below for name, below in left.items() if name not in free}


@pytest.mark.parametrize("module", modules())
def test_few_files_know_ray(module: str) -> None:
    if module not in KNOW_RAY and room(module) not in KNOW_RAY:
        assert "ray" not in {name.split(".")[0] for name in imports(file_of(module))}


@pytest.mark.parametrize("module", modules())
def test_private_modules_stay_in_their_room(module: str) -> None:
    for name in imports(file_of(module)):
        *parents, last = name.split(".")
        if parents[:1] == ["gavamoe"] and last.startswith("_") and not last.startswith("__"):
            assert file_of(".".join([*parents[1:], last])).is_file() is False or parents[1] == room(module), name


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.relative_to(PACKAGE).as_posix())
def test_folders_are_small_and_list_their_files(folder: Path) -> None:
    """A package's docstring names each of its files with half a line; the package at the top leaves that to README."""
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert len(files) < MOST_FILES
    assert folder.name not in files, "a module named after its folder"
    assert not files & {"utils", "core", "helpers", "common", "misc"}
    if folder != PACKAGE:
        described = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        assert set(re.findall(r"^ *([a-z_0-9]+)  ", described, flags=re.MULTILINE)) == files


def test_packages_import_nothing_when_imported() -> None:
    """`gavamoe --help` answers at once."""
    for folder in folders():
        body = ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body
        eager = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in eager}
        assert {str(name).split(".")[0] for name in names} <= sys.stdlib_module_names, folder


def test_readme_map_names_the_real_rooms() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("## What is where", 1)[1].split("```")[1]
    named = set(re.findall(r"^  ([a-z_0-9]+)(?:/|\.py) ", block, flags=re.MULTILINE))
    assert named == set(MAY_IMPORT) - {"errors"}
    assert block.strip().count("\n") < 20


def test_tests_share_through_helpers_alone() -> None:
    for path in TESTS.rglob("*.py"):
        of_tests = {name for name in imports(path) if any(part.startswith("test_") for part in name.split("."))}
        assert not of_tests, f"{path.relative_to(ROOT)} imports {sorted(of_tests)}; what tests share goes to helpers/"


def test_names_of_test_files_are_unique() -> None:
    """Ray's workers import the modules of tests by name."""
    names = Counter(path.name for path in TESTS.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_tests_lie_in_the_folder_of_their_room() -> None:
    found = {path.parent.name for path in TESTS.rglob("test_*.py")} - {"tests"}
    assert found <= set(MAY_IMPORT) | {"end_to_end", "examples"}
