"""What is installed: exact versions with known hashes, inside the ranges that the package declares."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent.parent
NO_UPPER_BOUND = {"ninja", "pyarrow", "tokenizers"}
"""pyproject.toml says why."""


def pins(name: str) -> dict[str, tuple[Requirement, str]]:
    """Package -> its requirement, and what follows it, of each entry of a requirements file."""
    found: dict[str, tuple[Requirement, str]] = {}
    for entry in re.split(r"\n(?=\S)", (ROOT / name).read_text(encoding="utf-8")):
        if not entry.startswith("#"):
            requirement, _, rest = entry.replace("\\\n", "\n").partition("\n")
            parsed = Requirement(requirement)
            package = canonicalize_name(parsed.name)
            assert package not in found, f"{name}: {package} twice"
            found[package] = parsed, rest
    return found


def version(requirement: Requirement) -> str:
    [pin] = requirement.specifier
    assert pin.operator == "==", requirement
    return pin.version


def declared() -> dict[str, list[str]]:
    """Requirements of pyproject.toml: of the package, of each extra, of the build."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    return {"": project["project"]["dependencies"], "build": project["build-system"]["requires"], **extras}


def test_the_hashes_are_those_of_the_constraints() -> None:
    constraints, hashed = pins("constraints.txt"), pins("constraints.hashes.txt")
    assert len(constraints) > 200
    for package, (requirement, _) in constraints.items():
        assert package in hashed, f"{package}: no hashes; run make hashes"
        assert version(hashed[package][0]) == version(requirement), f"{package}: run make hashes"
        assert hashed[package][0].marker is None
    for package in hashed.keys() - constraints.keys():
        assert hashed[package][0].marker is not None, f"{package}: would be installed everywhere; pin it"
    for package, (_, hashes) in hashed.items():
        lines = [line.strip() for line in hashes.splitlines()]
        assert lines, package
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", line) for line in lines), package


def test_no_registry_is_named() -> None:
    """Which one is asked is the business of whoever installs."""
    for name in ("constraints.txt", "constraints.hashes.txt"):
        assert not re.search(r"^-|://", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE), name


@pytest.mark.parametrize("part", declared())
def test_the_exact_versions_lie_in_the_declared_ranges(part: str) -> None:
    constraints = pins("constraints.txt")
    for requirement in map(Requirement, declared()[part]):
        if requirement.name == "gavamoe":
            continue
        package = canonicalize_name(requirement.name)
        assert package in constraints, f"{package} has no exact version"
        assert requirement.specifier.contains(version(constraints[package][0])), requirement


def test_dependencies_have_upper_bounds() -> None:
    bounded = [requirement for part, group in declared().items() if part != "dev" for requirement in group]
    without = {
        requirement.name
        for requirement in map(Requirement, bounded)
        if not any(specifier.operator in ("<", "<=", "==", "~=") for specifier in requirement.specifier)
    }
    assert without == NO_UPPER_BOUND
