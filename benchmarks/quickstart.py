"""Wall time and memory of the two things a newcomer runs first: `gavamoe --help` and `gavamoe quickstart`.

Memory is the proportional set size (shared pages divided among their users), summed over the process and all its
descendants, sampled twice a second: Ray's daemons and workers included.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

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


def main() -> None:
    helps = sorted(_seconds([GAVAMOE, "--help"]) for _ in range(5))
    print(f"gavamoe --help: {helps[2]:.2f} s (median of 5)")
    folder = Path(tempfile.mkdtemp())
    try:
        seconds, peak = measure([GAVAMOE, "quickstart", "--run-dir", str(folder / "quickstart")])
    finally:
        shutil.rmtree(folder)
    print(f"gavamoe quickstart: {seconds / 60:.1f} min, peak {peak:.1f} GiB over all processes")


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
