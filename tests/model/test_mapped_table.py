"""Tables in files: written in blocks, read by mapping, whatever the files' sizes; what doesn't belong is refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from gavamoe.errors import InputError
from gavamoe.model.tables.mapped import MappedTable
from gavamoe.model.tables.row_files import FOLDER, Rows, open_rows, table_files, write_rows, write_table

IDS, SIZE = 50, 3
ROWS = np.random.default_rng(0).normal(size=(IDS + 1, SIZE)).astype(np.float32)


def blocks(sizes: list[int]) -> Iterator[np.ndarray]:
    yield from np.split(ROWS, np.cumsum(sizes))


def written(folder: Path, rows_per_file: int = 20, name: str = "user_embedding", dataset: str = "d") -> Path:
    folder.mkdir(exist_ok=True)
    write_table(folder, name, ROWS.shape, blocks([7, 20, 1]), dataset, rows_per_file * SIZE * 4)
    return folder


def mapped(folder: Path) -> MappedTable:
    table = MappedTable("user_embedding", IDS, SIZE)
    table.attach(folder)
    return table


@pytest.mark.parametrize("rows_per_file", [1, 20, 51, 1000])
def test_any_ids_are_found_in_files_of_any_size(tmp_path: Path, rows_per_file: int) -> None:
    table = mapped(written(tmp_path, rows_per_file))
    assert len(table_files(tmp_path, "user_embedding")) == -(-51 // rows_per_file)
    ids = torch.tensor([[3, 50, 19], [20, 3, 999]])
    found = table(ids)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), ROWS[ids.clamp(max=IDS).numpy()])
    np.testing.assert_array_equal(torch.cat(list(table.blocks())).numpy(), ROWS[:IDS])
    assert table(torch.zeros(0, dtype=torch.long)).shape == (0, SIZE)
    assert not list(table.parameters())
    assert not table.state_dict()


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    write_rows(tmp_path / "x", {"a": Rows((51, 3), blocks([9])), "b": Rows((0, 4), [])}, {"made": "here"})
    tensors = load_file(tmp_path / "x")
    np.testing.assert_array_equal(tensors["a"], ROWS)
    assert tensors["b"].shape == (0, 4)
    assert open_rows(tmp_path / "x").metadata == {"made": "here"}
    with pytest.raises(ValueError, match="9 of the 51 rows of a"):
        write_rows(tmp_path / "y", {"a": Rows((51, 3), [ROWS[:9]])}, {})
    assert not (tmp_path / "y").exists()


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tables: has no files of user_embedding; the artifact is not whole"):
        mapped(tmp_path)
    folder = written(tmp_path / "whole")
    other = written(tmp_path / "other", dataset="e")
    second = table_files(folder, "user_embedding")[1]

    def with_second(make: Path | None) -> Path:
        changed = shutil.copytree(folder, tmp_path / "changed", dirs_exist_ok=True)
        place = changed / FOLDER / second.name
        place.unlink()
        if make is not None:
            shutil.copyfile(make, place)
        return changed

    with pytest.raises(InputError, match=r"00001-of-00003\.safetensors: holds rows of another dataset than"):
        mapped(with_second(table_files(other, "user_embedding")[1]))
    with pytest.raises(InputError, match=r"00002-of-00003\.safetensors: begins at row 40 of 51, not at row 20 of 51"):
        mapped(with_second(None))
    items = written(tmp_path / "items", name="item_embedding")
    with pytest.raises(InputError, match="does not hold rows of user_embedding with 3 numbers"):
        mapped(with_second(table_files(items, "item_embedding")[1]))
    (tmp_path / "junk").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match=r"00001-of-00003\.safetensors: can't be read"):
        mapped(with_second(tmp_path / "junk"))
    save_file({"weight": ROWS[20:40].astype(np.float64)}, tmp_path / "double")
    with pytest.raises(InputError, match="weight is of type F64, not F32"):
        mapped(with_second(tmp_path / "double"))
    table = MappedTable("user_embedding", IDS + 7, SIZE)
    with pytest.raises(InputError, match="begins at row 0 of 51, not at row 0 of 58"):
        table.attach(folder)


def test_a_header_that_points_beyond_the_file_is_refused(tmp_path: Path) -> None:
    """Before anything is mapped: a stranger's file must not be read at offsets of its choosing."""
    header = {"weight": {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}}
    text = json.dumps(header).encode()
    (tmp_path / "short").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 40)
    with pytest.raises(InputError, match="can't be read"):
        open_rows(tmp_path / "short")


def test_files_are_copied_to_another_artifact_once(tmp_path: Path) -> None:
    table = mapped(written(tmp_path / "one"))
    (tmp_path / "two").mkdir()
    table.copy_files(tmp_path / "two")
    table.copy_files(tmp_path / "one")
    np.testing.assert_array_equal(mapped(tmp_path / "two")(torch.arange(51)).numpy(), ROWS)
