"""Checkpoints that were damaged, disks that are full."""

import errno
from pathlib import Path

from gavamoe.artifacts.checksums import list_files
from gavamoe.runtime.checkpoints import checkpoint_problem, storage_problem, write_checksums


def test_damage_of_any_ranks_file_is_found(tmp_path: Path) -> None:
    parts = [tmp_path / "0", tmp_path / "1"]
    for rank, part in enumerate(parts):
        (part / "engine").mkdir(parents=True)
        (part / "engine" / f"rank{rank}").write_bytes(b"x" * 100)
        write_checksums(part, rank, 2, list_files(part))
    whole = tmp_path / "whole"
    (whole / "engine").mkdir(parents=True)
    for part in parts:
        for path in part.rglob("*"):
            if path.is_file():
                (whole / path.relative_to(part)).write_bytes(path.read_bytes())
    assert checkpoint_problem(whole) is None
    (whole / "engine" / "rank1").write_bytes(b"x" * 99 + b"y")
    assert checkpoint_problem(whole) == "the content of engine/rank1 has changed"
    (whole / "engine" / "rank1").write_bytes(b"x" * 99)
    assert checkpoint_problem(whole) == "engine/rank1 has 99 of 100 bytes"
    (whole / "checksums-1.json").unlink()
    assert "its checksums can't be read" in str(checkpoint_problem(whole))


def test_full_disks_are_told_from_other_errors() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/data/x")
    outer = RuntimeError("upload")
    outer.__cause__ = full
    assert storage_problem(outer) == "/data/x: can't be written: no space is left"
    assert storage_problem(RuntimeError("[enforce fail] file write failed")) is not None
    assert storage_problem(OSError(errno.ECONNRESET, "reset")) is None
    assert storage_problem(ValueError("x")) is None
