"""Run folders that can't be made are wrong input, named in one line."""

from pathlib import Path

import pytest

from gavamoe.artifacts.run import claim_run
from gavamoe.config.schema import RunConfig
from gavamoe.errors import InputError


def claim(path: Path) -> None:
    claim_run(path, RunConfig(), Path("ds"), "f" * 64, continuing=False)


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt: is a file, and a run needs a folder; name another .* --run-dir"):
        claim(path)
    with pytest.raises(InputError, match=r"below: no run can be kept there \(Not a directory\)"):
        claim(path / "below")
    assert path.read_text() == "mine"


def test_a_place_where_no_folder_can_be_made_is_named() -> None:
    with pytest.raises(InputError, match=r"^/proc/x: no run can be kept there \(No such file or directory\)"):
        claim(Path("/proc/x"))


def test_a_folder_that_takes_no_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^/proc: no run can be kept there"):
        claim(Path("/proc"))
