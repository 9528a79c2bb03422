"""Wall time and memory of the two things a newcomer runs first: `gavamoe --help` and `gavamoe quickstart`.

Memory is the proportional set size (shared pages divided among their users), summed over the process and all its
descendants, sampled twice a second: Ray's daemons and workers included. Then the run's test rows are written greedily
by the decoding engine and by transformers' `generate`, in turn: the seconds of both, and their ratio.

    python -m benchmarks.quickstart [RUN]      RUN: a finished quickstart; only its test rows are written, then
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from gavamoe.artifacts.run import open_run
from gavamoe.data.dataset import open_dataset
from gavamoe.evaluation.rows import requests_of, select_rows
from gavamoe.generation.generator import ExplanationGenerator

ROUNDS = 3
GAVAMOE = str(Path(sys.executable).parent / "gavamoe")


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds and peak GiB of `command` with its whole process tree."""
    start = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _tree_bytes(process))
        time.sleep(0.5)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with exit code {process.returncode}")
    return time.perf_counter() - start, peak / 2**30


def _tree_bytes(process: psutil.Process) -> int:
    total = 0
    try:
        members = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for member in members:
        try:
            total += member.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def write_test_rows(run: Path) -> None:
    """Print the seconds that the engine and `generate` take for the test rows: medians of ROUNDS, and their ratio."""
    torch.set_num_threads(2)
    opened = open_run(run)
    generator = ExplanationGenerator.load(opened.stage2)
    prepared = generator.prepare(requests_of(select_rows(open_dataset(opened.dataset), "test", 0, 0), "given"))
    generation = opened.config.generation
    ways = {"engine": generator._decode, "generate": generator._beam_search}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    texts: dict[str, dict[int, list[int]]] = {}
    for _ in range(ROUNDS):
        for name, write in ways.items():
            started = time.perf_counter()
            texts[name] = dict(pair for finished in write(prepared, generation, 0) for pair in finished.items())
            seconds[name].append(time.perf_counter() - started)
    engine, generate = (statistics.median(seconds[name]) for name in ways)
    equal = sum(tokens == texts["generate"][row] for row, tokens in texts["engine"].items())
    print(
        f"writing {len(prepared.prompts):,} test rows: engine {engine:.1f} s, generate {generate:.1f} s, ratio"
        f" {engine / generate:.2f} (medians of {ROUNDS}); {equal:,} texts equal"
    )


def main() -> None:
    if len(sys.argv) > 1:
        write_test_rows(Path(sys.argv[1]))
        return
    helps = sorted(_seconds([GAVAMOE, "--help"]) for _ in range(5))
    print(f"gavamoe --help: {helps[2]:.2f} s (median of 5)")
    folder = Path(tempfile.mkdtemp())
    try:
        seconds, peak = measure([GAVAMOE, "quickstart", "--run-dir", str(folder / "quickstart")])
        print(f"gavamoe quickstart: {seconds / 60:.1f} min, peak {peak:.1f} GiB over all processes")
        write_test_rows(folder / "quickstart")
    finally:
        shutil.rmtree(folder)


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
