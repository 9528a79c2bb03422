"""Parts of the report about faithfulness (`beyond` in metrics.json) and about the second protocol."""

from collections.abc import Sequence
from typing import Any

from gavamoe.evaluation.evaluated_run import RunData
from gavamoe.evaluation.faithfulness.measure import FAITHFULNESS
from gavamoe.evaluation.metrics.registry import METRICS


def faithfulness_section(runs: Sequence[RunData]) -> dict[str, Any] | None:
    """The faithfulness section: a row for each score, user swaps, gate tables; None where none was measured.

    A run evaluated under both protocols has two columns.
    """
    columns = [column for run in runs for column in _columns(run)]
    sections = [section for _, section in columns]
    if not any(sections):
        return None
    scores = [section["scores"] if section else {} for section in sections]
    rows = []
    for metric in FAITHFULNESS.values():
        cells = [of_run.get(metric.name) for of_run in scores]
        known = [cell for cell in cells if cell and cell["value"] is not None]
        if known:
            beside = {(cell["references"], cell["chance"]) for cell in known}
            # Runs on different rows have humans and chance of their own, which then stand in the cells.
            shared = len(beside) == 1
            references, chance = beside.pop() if shared else (None, None)
            rows.append(
                {"metric": metric, "cells": cells, "references": references, "chance": chance, "shared": shared}
            )
    gates = [(name, one["gates"]) for name, one in columns if one and one["gates"]]
    swaps: tuple[str, list[Any]] = next(
        ((name, one["swaps"]) for name, one in columns if one and one["swaps"]), ("", [])
    )
    return {
        "columns": [name for name, _ in columns],
        "rows": rows,
        "sizes": next(section["rows"] for section in sections if section),
        "swaps_of": swaps[0],
        "swaps": swaps[1],
        "gates": [(name, table) for name, table in gates if table["gates"] > 1],
    }


def _columns(run: RunData) -> list[tuple[str, dict[str, Any] | None]]:
    """The columns of a run: name and faithfulness section of each protocol that it was evaluated under."""
    second = run.metrics["predicted"]
    if not second:
        return [(run.name, run.metrics["faithfulness"])]
    return [(f"{run.name}, given", run.metrics["faithfulness"]), (f"{run.name}, predicted", second["faithfulness"])]


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
