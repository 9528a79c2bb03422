"""Two systems' texts for the same rows: is the difference in their scores more than chance?

    python examples/compare_systems.py ours.txt theirs.txt references.txt
    python examples/compare_systems.py runs/a/evaluation/generations.parquet runs/b/evaluation/generations.parquet

Files may be plain text with a line for each row, JSON lines, CSV or Parquet; tables bring their references along.
Prints each metric of both systems, the difference with its 95 % interval from a paired bootstrap, and the p-value of
approximate randomization. The command `gavamoe score A REFERENCES --against B` does the same.
"""

import argparse
from pathlib import Path

from gavamoe.evaluation.score_files import score_files


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ours", type=Path)
    parser.add_argument("theirs", type=Path)
    parser.add_argument("references", type=Path, nargs="?")
    parser.add_argument("--resamples", type=int, default=1000)
    options = parser.parse_args(arguments)

    scores = score_files(options.ours, options.references, against=options.theirs, resamples=options.resamples)
    rival = scores["against"]
    print(f"{scores['counts']['rows']} rows")
    print(f"{'metric':<20} {'ours':>8} {'theirs':>8} {'difference and interval':>28} {'p':>7}")
    for name, difference in rival["differences"].items():
        low, high = difference["interval"]
        print(
            f"{name:<20} {scores['metrics'][name]:8.2f} {rival['metrics'][name]:8.2f} "
            f"{difference['difference']:+8.2f} [{low:+8.2f},{high:+8.2f}] {difference['p']:7.3f}"
        )


if __name__ == "__main__":
    main()
