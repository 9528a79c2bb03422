"""Parts of the report about faithfulness (`faithfulness` in metrics.json) and about the second protocol."""

from collections.abc import Sequence
from typing import Any

from gavamoe.evaluation.evaluated_run import RunData
from gavamoe.evaluation.faithfulness.measure import FAITHFULNESS
from gavamoe.evaluation.metrics.registry import METRICS, Metric


def faithfulness_section(runs: Sequence[RunData]) -> dict[str, Any] | None:
    """The faithfulness section: a row for each score, user swaps, gate tables; None where none was measured.

    A run evaluated under both protocols has two columns.
    """
    columns = [column for run in runs for column in _columns(run)]
    measured = [(name, section) for name, section in columns if section]
    if not measured:
        return None
    scores = [section["scores"] if section else {} for _, section in columns]
    rows = [_score_row(metric, scores) for metric in FAITHFULNESS.values()]
    swaps_of, swaps = _first_swaps(measured)
    return {
        "columns": [name for name, _ in columns],
        "rows": [row for row in rows if row],
        "sizes": measured[0][1]["rows"],
        "swaps_of": swaps_of,
        "swaps": swaps,
        "gates": [(name, table) for name, section in measured if (table := section["gates"]) and table["gates"] > 1],
    }


def _first_swaps(measured: Sequence[tuple[str, dict[str, Any]]]) -> tuple[str, list[Any]]:
    """The first column that has examples of user swaps, and those; "" and none where no column has any."""
    return next(((name, section["swaps"]) for name, section in measured if section["swaps"]), ("", []))


def _score_row(metric: Metric, scores: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """A score in each column, and what is common to them; None where no column has it."""
    cells = [of_column.get(metric.name) for of_column in scores]
    known = [cell for cell in cells if cell and cell["value"] is not None]
    if not known:
        return None
    # Runs on different rows have references and chance of their own, which then stand in the cells.
    beside = {(cell["references"], cell["chance"]) for cell in known}
    shared = len(beside) == 1
    references, chance = beside.pop() if shared else (None, None)
    return {"metric": metric, "cells": cells, "references": references, "chance": chance, "shared": shared}


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
