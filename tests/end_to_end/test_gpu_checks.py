"""The checks of a GPU run on the CPU at tiny sizes, so that they still work where a GPU is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import Check, equality, speed, whole
from benchmarks.gpu.__main__ import CHECKS
from gavamoe.stage2.joint_model import JointModel

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("check", [whole.versions, speed.ceilings, equality.model, equality.experts])
def test_a_check_that_can_fail_passes_here(check: Check) -> None:
    result, figures = check("cpu", True)
    assert result == "PASS", figures


@pytest.mark.parametrize(
    "check", [speed.training, speed.writing, speed.waits, speed.tables, speed.layer, speed.largest]
)
def test_a_measurement_has_figures(check: Check) -> None:
    result, figures = check("cpu", True)
    assert (result, bool(figures)) == ("PASS", True)


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = JointModel.forward

    def wrong(self: JointModel, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        losses = forward(self, **batch)
        is_double = losses["loss"].dtype == torch.float64
        return losses if is_double else losses | {"loss": losses["loss"] * 1.2}

    monkeypatch.setattr(JointModel, "forward", wrong)
    assert equality.model("cpu", True)[0] == "FAIL"


@pytest.mark.slow
def test_all_run_apart_and_write_their_results(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(tmp_path), "--seconds", "1200"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=1300)
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {line["check"]: line["result"] for line in lines} == dict.fromkeys(CHECKS, "PASS"), done.stdout
    assert done.returncode == 0


def test_without_a_gpu_the_way_out_is_named(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no GPU" in done.stderr
    assert "--tiny" in done.stderr
    assert not (tmp_path / "out").exists()
