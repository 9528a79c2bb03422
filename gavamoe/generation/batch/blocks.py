"""Texts for blocks of requests, in this process or on Ray workers, and explanations as rows of Parquet."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import pyarrow as pa

from gavamoe.config.schema import GenerationConfig
from gavamoe.generation.generator import Explanation
from gavamoe.generation.request import ExplanationRequest
from gavamoe.runtime.ray_pool import Block, BlockPool

SCHEMA = pa.schema(
    [
        ("text", pa.string()), ("cluster", pa.int16()), ("responsibilities", pa.list_(pa.float64())),
        ("rating", pa.float64()), ("rating_given", pa.bool_()), ("predicted_rating", pa.float64()),
        ("features", pa.list_(pa.string())), ("features_given", pa.bool_()), ("user_known", pa.bool_()),
        ("item_known", pa.bool_()), ("new_tokens", pa.int32()),
    ]
)  # fmt: skip
"""The fields of an `Explanation`."""


class Writer(Protocol):
    """What writes texts: an `ExplanationGenerator`, or a baseline's writer."""

    def explain(
        self,
        requests: Sequence[ExplanationRequest],
        generation: GenerationConfig,
        seed: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Explanation]:
        """One explanation per request, in their order."""


Blocks = Iterator[tuple[int, list[ExplanationRequest], int]]
"""A block's number, its requests, and the seed of its first one."""
WrittenBlocks = Iterator[tuple[int, list[Explanation] | str]]
"""In whatever order: each block's number with its texts, or with the reason why it was given up."""
WriteBlocks = Callable[[Blocks, GenerationConfig], WrittenBlocks]


def written_here(writer: Writer, on_text: Callable[[int], None] | None = None) -> WriteBlocks:
    """Blocks one after the other, in this process.

    Args:
        on_text: called with the texts of the present block that are there.
    """

    def write(blocks: Blocks, generation: GenerationConfig) -> WrittenBlocks:
        for number, requests, seed in blocks:
            tell = None if on_text is None else lambda done, _: on_text(done)
            yield number, writer.explain(requests, generation, seed, tell)

    return write


def written_by(pool: BlockPool) -> WriteBlocks:
    """Blocks side by side, on Ray workers that each hold a writer."""

    def write(blocks: Blocks, generation: GenerationConfig) -> WrittenBlocks:
        jobs = (Block(number, (requests, generation, seed)) for number, requests, seed in blocks)
        for done in pool.map("explain", jobs):
            yield done.number, done.problem or done.result

    return write


def to_rows(explanations: Sequence[Explanation]) -> list[dict[str, Any]]:
    """Rows of SCHEMA."""
    return [asdict(explanation) for explanation in explanations]


def from_table(table: pa.Table) -> list[Explanation]:
    """The explanations of a table of SCHEMA."""
    rows: list[dict[str, Any]] = table.to_pylist()
    return [Explanation(**row | {name: tuple(row[name]) for name in ("responsibilities", "features")}) for row in rows]
