"""Texts by Ray workers: tokens a second of two beside one, by the pool that `evaluate --workers` uses.

    python -m benchmarks.writers [--block dense] [--rounds 3] [--blocks 8] [--rows 16]

Each worker holds an explainer of SmolLM2-135M's shape with random weights, on one thread, and writes blocks of rows as
`benchmarks.writing` does. Pools of one and of two take turns; start-up is not counted. In the last round a worker is
killed as well: another one writes its blocks.
"""

import argparse
import os
import signal
import statistics
import time
from functools import partial

from benchmarks.writing import NEW, explainer, ours
from gavamoe.config.schema import RuntimeConfig
from gavamoe.runtime.ray_pool import Block, BlockPool
from gavamoe.runtime.ray_train import ray_session

PLACEMENT = RuntimeConfig(workers=2, threads_per_worker=1)


class Held:
    """What a worker holds."""

    def __init__(self, block: str, device: str) -> None:
        model, _ = explainer(None, block)
        self._write = ours(model.to(device).eval())

    def write(self, rows: int) -> int:
        """Write a block; returns the worker's process id."""
        self._write(rows)
        return os.getpid()


def rate(pool: BlockPool, blocks: int, rows: int, *, killing: bool = False) -> float:
    """Tokens a second of a pool; with `killing`, one of its workers goes after its first block."""
    started = time.perf_counter()
    for number, done in enumerate(pool.map("write", (Block(n, (rows,)) for n in range(blocks)))):
        if done.problem:
            raise SystemExit(done.problem)
        if killing and number == 0:
            os.kill(done.result, signal.SIGKILL)
    return blocks * rows * NEW / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block", default="dense")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16)
    asked = parser.parse_args()
    with ray_session(PLACEMENT):
        rates: dict[int, list[float]] = {1: [], 2: []}
        for round_number in range(asked.rounds):
            for workers, found in rates.items():
                with BlockPool(Held, {"block": asked.block}, workers=workers, placement=PLACEMENT) as pool:
                    measure = partial(rate, pool, rows=asked.rows)
                    measure(2 * workers)  # warms up
                    found.append(measure(asked.blocks))
                    if round_number + 1 == asked.rounds and workers > 1:
                        killed = measure(asked.blocks, killing=True)
    one, two = (statistics.median(found) for found in rates.values())
    print(
        f"{asked.block}, {asked.rows} rows a block, {asked.rounds} rounds: one worker {one:.1f} tokens/s, two {two:.1f}"
    )
    print(f"{two / one:.2f} times as many; with one of the two killed meanwhile {killed:.1f} tokens/s")


if __name__ == "__main__":
    main()
