"""evaluation/metrics.json: its schema version, and the reading of files that an earlier version wrote."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from gavamoe.artifacts.files import read_json
from gavamoe.errors import InputError

SCHEMA_VERSION = 3
OLDEST_READ = 2
_RENAMED = {
    "item_mix_ups": "item_hallucination",
    "copied": "memorized",
    "nearly_copied": "near_memorized",
    "towards_user": "user_alignment",
    "route_gap": "wrong_gate_gap",
}
"""Faithfulness scores of schema version 2 -> their names in version 3."""

Value = TypeVar("Value")


def read_metrics(path: Path) -> dict[str, Any]:
    """The content of a metrics.json of any version that is still read, as version 3 has it.

    Raises:
        InputError: it is missing, damaged, or of another version.
    """
    metrics = read_json(path)
    version = metrics.get("schema_version") if isinstance(metrics, dict) else None
    if not isinstance(version, int) or not OLDEST_READ <= version <= SCHEMA_VERSION:
        raise InputError(
            f"{path}: has schema version {version}, this gavamoe reads {OLDEST_READ} to {SCHEMA_VERSION};"
            " evaluate the run again"
        )
    metrics.setdefault("losses", None)  # version 3 began without
    return metrics if version == SCHEMA_VERSION else _as_version_3(metrics)


def renamed(scores: Mapping[str, Value]) -> dict[str, Value]:
    """Scores by today's names."""
    return {_RENAMED.get(name, name): value for name, value in scores.items()}


def _as_version_3(metrics: dict[str, Any]) -> dict[str, Any]:
    """Version 2 calls the section on faithfulness `beyond` and has former names of scores in it."""
    section = metrics.pop("beyond")
    metrics["faithfulness"] = section and section | {"scores": renamed(section["scores"])}
    if metrics["predicted"]:
        metrics["predicted"] = _as_version_3(metrics["predicted"] | {"predicted": None})
        del metrics["predicted"]["predicted"]
    return metrics | {"schema_version": SCHEMA_VERSION} if "schema_version" in metrics else metrics
