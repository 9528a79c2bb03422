"""`gavamoe doctor`: what is said of a machine as it should be, and of each thing that can be wrong with one."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import Runner

from gavamoe.errors import InputError
from gavamoe.runtime import machine
from gavamoe.runtime.machine import Finding, examine


def of(found: list[Finding], what: str) -> Finding:
    return next(finding for finding in found if finding.what.startswith(what))


def test_this_machine_is_described(tmp_path: Path) -> None:
    found = examine("scratch", tmp_path / "not" / "there" / "yet")
    assert {finding.what.split()[0] for finding in found} >= {
        "Python", "packages", "processor", "memory", "GPU", "compiler", "Ray", "ports", "disk", "shared", "base",
    }  # fmt: skip
    assert f"torch {torch.__version__.partition('+')[0]}" in of(found, "packages").found
    assert of(found, "packages").state == "ok"
    assert of(found, "base model").state == "ok"
    assert all(finding.way_out for finding in found if finding.state != "ok")
    assert not any(finding.way_out for finding in found if finding.state == "ok")


def test_missing_and_wrong_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["torch>=99", "no-such-package-here>=1", "numpy>=1", 'moto>=99; extra == "dev"']
    monkeypatch.setattr(machine.metadata, "requires", lambda name: needs)
    found = of(list(machine._packages()), "packages")
    assert found.state == "wrong"
    assert "no-such-package-here is missing" in found.found
    assert "is not >=99" in found.found
    assert "moto" not in found.found


@pytest.mark.parametrize(
    ("cuda", "says"), [(None, "is built without CUDA"), ("13.0", "torch with CUDA 13.0 sees none")]
)
def test_a_driver_that_torch_can_not_use_is_wrong(cuda: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    [found] = machine._gpus()
    assert found.state == "wrong"
    assert says in found.found
    assert found.way_out


def test_gpus_are_named_and_old_ones_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        def __init__(self, name: str, major: int) -> None:
            self.name, self.major, self.minor, self.total_memory = name, major, 0, 80 * 2**30

    cards = [Card("New", 9), Card("Old", 7)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: cards[number])
    found = list(machine._gpus())
    assert [(each.what, each.state) for each in found] == [("GPU 0", "ok"), ("GPU 1", "warning")]
    assert found[0].found.startswith("New, 80 GiB, capability 9.0")


def test_a_ray_that_does_not_answer_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{probe.getsockname()[1]}")
        assert next(machine._ray()).state == "wrong"
        probe.listen()
        assert next(machine._ray()).state == "ok"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert next(machine._ray()).state == "warning"


def test_a_port_that_is_taken_is_named_with_its_option(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        probe.listen()
        port = probe.getsockname()[1]
        monkeypatch.setattr(machine, "_PORTS", {port: "gavamoe serve --port"})
        [found] = machine._ports()
    assert found.state == "warning"
    assert found.found == f"taken: {port} (gavamoe serve --port)"


def test_small_disks_are_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Usage:
        free, total = 2**30, 2**26

    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: Usage)
    found = list(machine._disks(tmp_path))
    assert {each.state for each in found} == {"warning"}
    assert "--shm-size" in of(found, "shared memory").way_out


def _raise(error: Exception) -> Callable[[str], str]:
    def reach(name: str) -> str:
        raise error

    return reach


@pytest.mark.parametrize("error", [InputError("the Python package llm is not installed"), OSError("no route to host")])
def test_a_base_model_that_can_not_be_reached_is_wrong(error: Exception) -> None:
    found = machine._base_model("some/model", _raise(error))
    assert found.state == "wrong"
    assert str(error) in found.found
    assert found.way_out


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> list[Finding]:
        raise RuntimeError("driver mismatch")

    monkeypatch.setattr(machine, "_gpus", broken)
    found = of(examine("scratch", tmp_path), "broken")
    assert (found.state, found.found) == ("wrong", "driver mismatch")


def test_the_command_ends_with_1_where_something_is_wrong(gavamoe: Runner, tmp_path: Path) -> None:
    result = gavamoe("doctor", "--folder", tmp_path, "--json")
    assert all(finding["state"] != "wrong" for finding in json.loads(result.out)), result.out
    assert result.code == 0
    result = gavamoe("doctor", "--folder", tmp_path, "--base-model", "package:no_such_package_here")
    assert result.code == 1
    assert "the Python package no_such_package_here is not installed" in result.err
