"""Several sources of one format as if they were one: rows are numbered through, in the order of the sources."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gavamoe.data.readers.batches import AnyBatch
from gavamoe.data.readers.sources import SourceOptions

Read = Callable[[Path, SourceOptions], Iterator[AnyBatch]]


def read_several(read: Read, sources: Sequence[Path], options: SourceOptions) -> Iterator[AnyBatch]:
    """The batches of all sources, one after the other; see `Format.read`."""
    before = 0
    for source in sources:
        last = 0
        for batch in read(source, options):
            last = max(last, batch.last_row)
            yield batch.after(before) if before else batch
        before += last
