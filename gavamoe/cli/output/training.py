"""The table of `gavamoe train`: the final metrics of both stages."""

from pathlib import Path
from typing import Any

from gavamoe.cli.terminal import console, print_json, print_table


def print_training(metrics: dict[str, Any], run_dir: Path, *, as_json: bool) -> None:
    """The stages' final metrics."""
    if as_json:
        print_json(metrics)
    for stage, values in metrics.items():
        print_table(f"{run_dir / stage}", ["", ""], _flat(values))
        if values.get("stopped_early"):
            console.print(f"{stage} stopped early: validation no longer improved ({stage}.patience)", markup=False)
    console.print(f"run: {run_dir}   next: gavamoe evaluate {run_dir}", markup=False, soft_wrap=True)


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    """The numbers in nested metrics, as ("test rmse", .75) rows; series and lists are left to the files."""
    rows: list[tuple[str, object]] = []
    for name, value in values.items():
        label = prefix + name.replace("_", " ")
        if isinstance(value, dict):
            rows += _flat(value, f"{label} ")
        elif _is_number(value):
            rows.append((label, value))
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
