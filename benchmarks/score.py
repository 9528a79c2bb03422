"""Rows per second of scoring, and of each of its parts: `python benchmarks/score.py [--rows N] [PREDICTIONS]`.

Without a file the texts are made up: words drawn with a long tail, references of 20 to 60 words, candidates that
share half of them. With a file (see `gavamoe score`) its texts are scored, repeated up to --rows.
Prints one JSON document. The time of loading the libraries is part of "seconds in all".
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

START = time.perf_counter()


def made_up(rows: int) -> tuple[list[str], list[str]]:
    """Candidates and references of `rows` pairs, the same on every call."""
    import numpy as np

    random = np.random.default_rng(0)
    vocabulary = np.array([f"word{n}" for n in range(5000)])
    candidates, references = [], []
    for _ in range(rows):
        words = vocabulary[np.minimum(random.zipf(1.3, random.integers(20, 60)), 5000) - 1]
        said = np.where(random.random(len(words)) < 0.5, words, random.permutation(words))
        references.append(" ".join(words) + ".")
        candidates.append(" ".join(said) + ".")
    return candidates, references


def from_file(path: Path, rows: int) -> tuple[list[str], list[str]]:
    """The texts of a table with the columns prediction and reference, repeated up to `rows`."""
    from gavamoe.evaluation.text_tables import read_columns

    columns = read_columns(path)
    predictions, references = columns["prediction"], columns["reference"]
    times = -(-rows // len(predictions)) if rows else 1
    return (predictions * times)[: rows or None], (references * times)[: rows or None]


def timed(times: dict[str, tuple[float, float]], name: str, step: Callable[[], Any]) -> Any:
    """Run `step` and note its seconds, by the clock and of the CPU."""
    before = time.perf_counter(), time.process_time()
    result = step()
    times[name] = (time.perf_counter() - before[0], time.process_time() - before[1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictions", nargs="?", type=Path)
    parser.add_argument("--rows", type=int, default=0, help="default: 3000, or the file's")
    parser.add_argument("--style", default="both", help="sacrebleu, peter or both")
    options = parser.parse_args()
    if options.predictions:
        candidates, references = from_file(options.predictions, options.rows)
    else:
        candidates, references = made_up(options.rows or 3000)

    from gavamoe.evaluation.metrics.text_scores import aggregate, measure
    from gavamoe.evaluation.significance import intervals

    times = {"load and read": (time.perf_counter() - START, time.process_time())}
    rows = timed(times, "measure rows", lambda: measure(candidates, references, style=options.style))
    scores = timed(times, "aggregate", lambda: aggregate(rows))
    timed(times, "intervals, 1000 resamples", lambda: intervals(rows))
    total = time.perf_counter() - START
    report = {
        "rows": len(candidates),
        "seconds": {name: round(clock, 2) for name, (clock, _) in times.items()},
        "CPU seconds": {name: round(cpu, 2) for name, (_, cpu) in times.items()},
        "seconds in all": round(total, 2),
        "CPU seconds in all": round(time.process_time(), 2),
        "rows per second": round(len(candidates) / total),
        "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "scores": {name: round(value, 4) for name, value in scores.items() if value is not None},
    }
    json.dump(report, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
