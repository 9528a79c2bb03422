"""The texts of an evaluation, written block by block, here or by Ray workers, and kept until the evaluation is whole.

Each block that is done lies in a file of its own, below a name that stands for everything that decides its texts. An
evaluation that was cut off (a lost machine, a full disk) reads what is there and writes the rest.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gavamoe.artifacts.files import write_file
from gavamoe.config.schema import GenerationConfig
from gavamoe.errors import RunError, listed
from gavamoe.generation.batch.blocks import SCHEMA, Blocks, Writer, from_table, to_rows, written_by, written_here
from gavamoe.generation.generator import Explanation
from gavamoe.generation.request import ExplanationRequest
from gavamoe.runtime.progress import OnProgress
from gavamoe.runtime.ray_pool import BlockPool

BLOCK_ROWS = 512
LEAST_ROWS = 16
"""Workers' blocks get smaller towards the end, down to this."""
_SECONDS = b"seconds"
"""Key of a block's file metadata: seconds from the end of the block before it to its own."""


class KeptTexts:
    """A writer that keeps what it has written; the interface of `ExplanationGenerator.explain`."""

    def __init__(self, writer: Writer | BlockPool, folder: Path, model: str) -> None:
        """`folder`: where texts are kept; `model`: fingerprint of the artifact that writes."""
        self._writer, self._folder, self._model = writer, folder, model
        self.seconds = 0.0
        """How long the texts of the last call took to write: those that were read, when they were written."""

    def explain(
        self,
        requests: Sequence[ExplanationRequest],
        generation: GenerationConfig,
        seed: int = 0,
        on_progress: OnProgress | None = None,
    ) -> list[Explanation]:
        """One text per request, in their order: those that are kept already, and new ones.

        Raises:
            RunError: blocks failed each time that they were tried; the others are kept.
        """
        workers = self._writer.workers if isinstance(self._writer, BlockPool) else 0
        end_of = block_ends(len(requests), workers)
        folder = self._folder / self._key(requests, generation, seed, list(end_of))
        kept = {start: part for start, end in end_of.items() if (part := _kept(_part(folder, start), end - start))}
        found = {start: texts for start, (texts, _) in kept.items()}
        done = sum(map(len, found.values()))
        self.seconds = sum(seconds for _, seconds in kept.values())

        def tell(more: int) -> None:
            if on_progress is not None:
                on_progress(done + more, len(requests))

        def jobs() -> Blocks:
            for start, end in end_of.items():
                if start not in found:
                    yield start, list(requests[start:end]), seed + start

        write = written_by(self._writer) if isinstance(self._writer, BlockPool) else written_here(self._writer, tell)
        given_up: dict[int, str] = {}
        began = time.perf_counter()
        for start, written in write(jobs(), generation):
            if isinstance(written, str):
                given_up[start] = written
                continue
            found[start] = written
            done += len(written)
            ended = time.perf_counter()
            self.seconds += ended - began
            if workers or len(end_of) > 1:
                _keep(_part(folder, start), written, ended - began)
            began = ended
            if workers:
                tell(0)
        if given_up:
            rows = listed([f"{start + 1} to {end_of[start]}" for start in sorted(given_up)], most=5)
            raise RunError(
                f"rows {rows} failed each time they were tried ({given_up[min(given_up)]}); all others are kept:"
                " the same command tries these again"
            )
        return [text for start in end_of for text in found[start]]

    def _key(
        self, requests: Sequence[ExplanationRequest], generation: GenerationConfig, seed: int, starts: list[int]
    ) -> str:
        settings = generation.model_dump(mode="json", exclude={"choose", "batch_size"})
        decides = [self._model, settings, seed, starts, [repr(request) for request in requests]]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]


def block_ends(rows: int, workers: int) -> dict[int, int]:
    """Start of each block -> its end, for rows 0..rows-1 that so many workers (0: this process) write.

    Half of what is left is shared out evenly each time: large blocks keep a batch full, of which the last texts grow
    alone, and the small ones at the end let the workers finish at nearly the same time.
    """
    ends, start = dict[int, int](), 0
    while start < rows:
        shared = max(LEAST_ROWS, -(-(rows - start) // (2 * workers))) if workers else BLOCK_ROWS
        end = min(start + shared, start + BLOCK_ROWS, rows)
        ends[start] = end
        start = end
    return ends


def _part(folder: Path, start: int) -> Path:
    return folder / f"{start:09d}.parquet"


def _keep(path: Path, texts: list[Explanation], seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_file(path) as aside:
        schema = SCHEMA.with_metadata({_SECONDS: str(seconds).encode()})
        pq.write_table(pa.Table.from_pylist(to_rows(texts), schema), aside)


def _kept(path: Path, rows: int) -> tuple[list[Explanation], float] | None:
    """The texts of a block of so many rows that is there and whole, and how long they took."""
    try:
        table = pq.read_table(path)
        seconds = float((table.schema.metadata or {})[_SECONDS])
        texts = from_table(table.cast(SCHEMA))
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None
    return (texts, seconds) if table.num_rows == rows else None
