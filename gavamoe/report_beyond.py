"""Parts of the report about what n-gram scores hide (`beyond`) and about the second protocol."""

from collections.abc import Sequence
from typing import Any

from gavamoe.beyond import BEYOND
from gavamoe.metrics import METRICS
from gavamoe.run_data import RunData


def beyond_section(runs: Sequence[RunData]) -> dict[str, Any] | None:
    """Rows by score, each with a cell a run; swaps and gate tables of the runs that have them. None without any."""
    found = [run.metrics["beyond"] for run in runs]
    if not any(found):
        return None
    scores = [one["scores"] if one else {} for one in found]
    rows = []
    for metric in BEYOND.values():
        cells = [of_run.get(metric.name) for of_run in scores]
        known = [cell for cell in cells if cell and cell["value"] is not None]
        if known:
            rows.append(
                {
                    "metric": metric,
                    "cells": cells,
                    "references": known[0]["references"],
                    "chance": known[0]["chance"],
                }
            )
    gates = [(run.name, one["gates"]) for run, one in zip(runs, found, strict=True) if one and one["gates"]]
    return {
        "rows": rows,
        "sizes": next(one["rows"] for one in found if one),
        "swaps": next((one["swaps"] for one in found if one and one["swaps"]), []),
        "swaps_of": next((run.name for run, one in zip(runs, found, strict=True) if one and one["swaps"]), ""),
        "gates": [(name, table) for name, table in gates if table["gates"] > 1],
    }


def protocol_section(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """For each run that was evaluated under both protocols: its scores with rating and features given and predicted."""
    return [
        {
            "name": run.name,
            "rows": [
                {"metric": metric, "given": run.score(metric.name), "predicted": second["metrics"].get(metric.name)}
                for metric in METRICS.values()
                if run.score(metric.name) is not None and metric.name not in ("rmse", "mae")
            ],
        }
        for run in runs
        for second in [run.metrics["predicted"]]
        if second
    ]
