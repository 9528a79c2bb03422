"""The texts of an evaluation, written block by block, here or by Ray workers, and kept until the evaluation is whole.

Each block that is done lies in a file of its own, below a name that stands for everything that decides its texts. An
evaluation that was cut off (a lost machine, a full disk) reads what is there and writes the rest.
"""

import hashlib
import json
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
_BLOCKS_PER_WORKER = 4
"""At least so many, where there are rows enough: workers then end at nearly the same time."""


class KeptTexts:
    """A writer that keeps what it has written; the interface of `ExplanationGenerator.explain`."""

    def __init__(self, writer: Writer | BlockPool, folder: Path, model: str) -> None:
        """`folder`: where texts are kept; `model`: fingerprint of the artifact that writes."""
        self._writer, self._folder, self._model = writer, folder, model

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
        size = self._block_rows(len(requests))
        folder = self._folder / self._key(requests, generation, seed, size)
        starts = range(0, len(requests), size)
        found = {start: texts for start in starts if (texts := _kept(_part(folder, start), requests, start, size))}
        done = sum(map(len, found.values()))

        def tell(more: int) -> None:
            if on_progress is not None:
                on_progress(done + more, len(requests))

        def jobs() -> Blocks:
            for start in starts:
                if start not in found:
                    yield start, list(requests[start : start + size]), seed + start

        pooled = isinstance(self._writer, BlockPool)
        write = written_by(self._writer) if isinstance(self._writer, BlockPool) else written_here(self._writer, tell)
        given_up: dict[int, str] = {}
        for start, written in write(jobs(), generation):
            if isinstance(written, str):
                given_up[start] = written
                continue
            found[start] = written
            done += len(written)
            if pooled or len(starts) > 1:
                _keep(_part(folder, start), written)
            if pooled:
                tell(0)
        if given_up:
            rows = listed([f"{start + 1} to {min(start + size, len(requests))}" for start in sorted(given_up)], most=5)
            raise RunError(
                f"rows {rows} failed each time they were tried ({given_up[min(given_up)]}); all others are kept:"
                " the same command tries these again"
            )
        return [text for start in starts for text in found[start]]

    def _block_rows(self, rows: int) -> int:
        if not isinstance(self._writer, BlockPool):
            return BLOCK_ROWS
        return max(1, min(BLOCK_ROWS, -(-rows // (_BLOCKS_PER_WORKER * self._writer.workers))))

    def _key(self, requests: Sequence[ExplanationRequest], generation: GenerationConfig, seed: int, size: int) -> str:
        settings = generation.model_dump(mode="json", exclude={"choose", "batch_size"})
        decides = [self._model, settings, seed, size, [repr(request) for request in requests]]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]


def _part(folder: Path, start: int) -> Path:
    return folder / f"{start:09d}.parquet"


def _keep(path: Path, texts: list[Explanation]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_file(path) as aside:
        pq.write_table(pa.Table.from_pylist(to_rows(texts), SCHEMA), aside)


def _kept(path: Path, requests: Sequence[ExplanationRequest], start: int, size: int) -> list[Explanation] | None:
    """The texts of a block that is there and whole."""
    try:
        table = pq.read_table(path, schema=SCHEMA)
    except (OSError, pa.ArrowException):
        return None
    return from_table(table) if table.num_rows == len(requests[start : start + size]) else None
