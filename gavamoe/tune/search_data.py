"""The dataset as a search may see it: train and validation; the test split is there, and empty.

Trials get this folder and no other, so that no trial can be chosen by test rows, whatever its code does. The files
are links to the dataset's own; the fingerprint differs, for the test split does.
"""

from pathlib import Path

import pyarrow.parquet as pq

from gavamoe.artifacts.files import read_json, sha256, write_folder, write_json
from gavamoe.data.dataset import DATA_FILES, ROWS_SCHEMA, Dataset, fingerprint, open_dataset
from gavamoe.errors import InputError

_TRUTH_FILES = ("truth.json", "truth_users.parquet")


def withhold_test(dataset: Dataset, out: Path) -> Dataset:
    """Make (or reopen) the view `out` of a dataset without its test rows.

    Raises:
        InputError: `out` is the view of another dataset.
    """
    wanted = _meta_without_test(dataset)
    if out.exists():
        view = open_dataset(out)
        if {name: view.meta.files.get(name) for name in wanted} != wanted:
            raise InputError(f"{out}: was made from another dataset than {dataset.path}; use another --run-dir")
        return view
    with write_folder(out) as folder:
        for name in (*DATA_FILES, *_TRUTH_FILES):
            source = dataset.path.resolve() / name
            if name != "test.parquet" and source.exists():
                (folder / name).symlink_to(source)
        pq.write_table(ROWS_SCHEMA.empty_table(), folder / "test.parquet")
        files = wanted | {"test.parquet": sha256(folder / "test.parquet")}
        meta = read_json(dataset.path / "meta.json")
        meta |= {"rows": meta["rows"] | {"test": 0}, "files": files, "fingerprint": fingerprint(files)}
        write_json(folder / "meta.json", meta)
    return open_dataset(out)


def _meta_without_test(dataset: Dataset) -> dict[str, str]:
    """Hashes of the files that the view shares with the dataset."""
    return {name: digest for name, digest in dataset.meta.files.items() if name != "test.parquet"}
