"""`gavamoe export` as it is typed."""

import json
from pathlib import Path

import pytest
from helpers.cli import Runner
from helpers.exported_runs import trained


def test_an_export_is_written_and_named(gavamoe: Runner, tmp_path: Path) -> None:
    result = gavamoe("export", trained(), tmp_path / "out", "--format", "gguf", "--dtype", "q8_0", "--json")
    assert result.code == 0, result.err
    written = json.loads(result.out)
    assert written == {"folder": str(tmp_path / "out"), "models": ["gate-0.gguf", "gate-1.gguf", "gate-2.gguf"]}
    assert all((tmp_path / "out" / name).stat().st_size > 50_000 for name in written["models"])
    again = gavamoe("export", trained(), tmp_path / "out")
    assert again.code == 2
    assert "already exists" in again.err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--format", "onnx"], "--format onnx: known are hf, gguf"),
        (["--gate", "-1"], "--gate -1: give `all` or a gate's number, from 0"),
        (["--gate", "7"], "gate 7: this run has gates 0 to 2"),
        (["--dtype", "int3"], "--dtype int3 is none of --format hf's: float32, float16, bfloat16"),
    ],
)
def test_wrong_options_are_one_line(options: list[str], problem: str, gavamoe: Runner, tmp_path: Path) -> None:
    result = gavamoe("export", trained(), tmp_path / "out", *options)
    assert result.code == 2
    assert problem in result.err
    assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
