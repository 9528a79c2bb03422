"""Several sources of one format as if they were one: rows are numbered through, in the order of the sources."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gavamoe.data.readers.batches import RawBatch
from gavamoe.data.readers.sources import SourceOptions

Read = Callable[[Path, SourceOptions], Iterator[RawBatch]]


def read_several(read: Read, sources: Sequence[Path], options: SourceOptions) -> Iterator[RawBatch]:
    """The batches of all sources, one after the other; see `Format.read`."""
    before = 0
    for source in sources:
        last = 0
        for batch in read(source, options):
            last = max([last, *(rejection.row for rejection in batch.broken), *batch.row[-1:].tolist()])
            yield _after(batch, before) if before else batch
        before += last


def _after(batch: RawBatch, rows: int) -> RawBatch:
    """The batch as it stands behind so many rows."""
    broken = [rejection._replace(row=rejection.row + rows) for rejection in batch.broken]
    return batch._replace(row=batch.row + rows, broken=broken)
