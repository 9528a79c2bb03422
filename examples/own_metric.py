"""A metric of your own over the texts that `gavamoe evaluate` wrote, with an interval for its mean.

    gavamoe evaluate runs/own_reviews
    python examples/own_metric.py runs/own_reviews

The metric here asks how long a text is, measured by its reference: 1 means equally many words. Change `measure` to ask
something else; the file has a row for every text, with user, item, title, rating, features, reference and cluster.
Prints the mean and its 95 % bootstrap interval, for all rows and for each cluster.

To have a metric in every table, report and search, declare it in the package: docs/extend.md.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from gavamoe.evaluation.significance import mean_interval


def measure(row: dict) -> float:
    """Words of the generated text over words of the reference; NaN where there is no reference."""
    expected = len(row["reference"].split())
    return len(row["generated"].split()) / expected if expected else float("nan")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="an evaluated run folder")
    options = parser.parse_args(arguments)

    rows = pq.read_table(options.run / "evaluation" / "generations.parquet").to_pylist()
    values = np.array([measure(row) for row in rows])
    clusters = np.array([row["cluster"] for row in rows])
    report("all rows", values)
    for cluster in np.unique(clusters):
        report(f"cluster {cluster}", values[clusters == cluster])


def report(name: str, values: np.ndarray) -> None:
    """Print one line; rows for which the metric is undefined don't count."""
    known = values[~np.isnan(values)]
    interval = mean_interval(known)  # None for fewer than two values
    low, high = interval or (float("nan"), float("nan"))
    print(f"{name}: {known.mean():.3f} [{low:.3f}, {high:.3f}], {len(known)} rows")


if __name__ == "__main__":
    main()
