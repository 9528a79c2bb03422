"""The workers' rows in checkpoints: one file each, which other numbers of workers read again by ranges.

A file holds, for each table, `NAME.weight` (rows, E) and, beside weights in training, RowAdam's states `NAME.first`,
`NAME.second` (rows, E) and `NAME.steps` (rows,); its metadata say the dataset, the worker and the number of workers.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from gavamoe.errors import InputError
from gavamoe.model.tables.embedding import BLOCK
from gavamoe.model.tables.row_files import Rows, open_rows, write_rows
from gavamoe.stage1.sharding.row_ranges import RowRanges

Shards = Mapping[str, Tensor]
"""This worker's rows by name: NAME.weight and so on."""


def save_shards(path: Path, shards: Shards, dataset: str, ranges: RowRanges) -> None:
    """Write this worker's file, one block of rows in memory at a time."""
    rows = {name: Rows(tuple(values.shape), _blocks(values)) for name, values in shards.items()}
    write_rows(path, rows, _metadata(dataset, ranges))


def _metadata(dataset: str, ranges: RowRanges) -> dict[str, str]:
    return {"dataset": dataset, "worker": str(ranges.rank), "workers": str(ranges.workers)}


def _blocks(rows: Tensor) -> Iterator[np.ndarray]:
    return (block.detach().cpu().numpy() for block in rows.split(BLOCK)) if len(rows) else iter(())


class SavedShards:
    """The files of all workers of a checkpoint.

    Args:
        stem: what the files' names begin with.
        rows: number of rows of each table.

    Raises:
        InputError: a file is missing or damaged, or of another dataset.
    """

    def __init__(self, folder: Path, stem: str, dataset: str, rows: Mapping[str, int]) -> None:
        self._rows, self._files = rows, []
        first = open_rows(shard_file(folder, stem, 0))
        workers = int(first.metadata.get("workers", "0"))
        for worker in range(workers):
            path = shard_file(folder, stem, worker)
            file = first if worker == 0 else open_rows(path)
            found = file.metadata.get("dataset")
            if found != dataset:
                raise InputError(f"{path}: holds shards of dataset {found}, not {dataset}; start without --resume")
            if (file.metadata.get("worker"), file.metadata.get("workers")) != (str(worker), str(workers)):
                raise InputError(f"{path}: is not the file of worker {worker} of {workers}; start without --resume")
            for name, tensor in file.tensors.items():
                wanted = self._range(name, worker, workers)
                if len(tensor) != wanted.stop - wanted.start:
                    raise InputError(f"{path}: {name} has {len(tensor)} rows, not {wanted.stop - wanted.start}")
            self._files.append(file)
        if not self._files:
            raise InputError(f"{shard_file(folder, stem, 0)}: does not say of how many workers; start without --resume")

    @property
    def names(self) -> list[str]:
        """What the files hold."""
        return list(self._files[0].tensors)

    def rows(self, name: str, wanted: slice) -> Rows:
        """Some rows of a table by their place in the whole, whoever wrote them, a part at a time."""
        shape = (wanted.stop - wanted.start, *self._files[0].tensors[name].shape[1:])
        return Rows(shape, self._blocks(name, wanted))

    def write(self, path: Path, wanted: Mapping[str, slice], dataset: str, ranges: RowRanges) -> None:
        """Write some rows of each table as the file of one worker of another number."""
        write_rows(path, {name: self.rows(name, rows) for name, rows in wanted.items()}, _metadata(dataset, ranges))

    def _blocks(self, name: str, wanted: slice) -> Iterator[np.ndarray]:
        for worker, file in enumerate(self._files):
            held = self._range(name, worker, len(self._files))
            start, stop = max(held.start, wanted.start), min(held.stop, wanted.stop)
            for first in range(start, stop, BLOCK):
                yield file.tensors[name][first - held.start : min(first + BLOCK, stop) - held.start]

    def _range(self, name: str, worker: int, workers: int) -> slice:
        return RowRanges(self._rows[name.partition(".")[0]], workers, worker, "cpu").own


def shard_file(folder: Path, stem: str, worker: int) -> Path:
    """A worker's file."""
    return folder / f"{stem}-{worker}.safetensors"
