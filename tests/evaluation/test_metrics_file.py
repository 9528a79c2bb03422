"""metrics.json of schema version 2, as the release before wrote it, under today's names."""

import json
from pathlib import Path
from typing import Any

import pytest

from gavamoe.errors import InputError
from gavamoe.evaluation.comparison import COMPARISON_FILE, Comparison, Outcome, read_comparison
from gavamoe.evaluation.metrics_file import SCHEMA_VERSION, read_metrics, renamed

SECTION: dict[str, Any] = {"rows": {"texts": 2, "probes": 1}, "scores": {"copied": {"value": 5.0}, "route_gap": None}}


def written(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({"schema_version": 2, "beyond": SECTION, "predicted": None, "rows": 2} | changes))
    return path


def test_version_2_is_read_as_version_3(tmp_path: Path) -> None:
    metrics = read_metrics(written(tmp_path / "m.json"))
    assert metrics["schema_version"] == SCHEMA_VERSION == 3
    assert "beyond" not in metrics
    assert metrics["losses"] is None
    assert metrics["faithfulness"]["scores"] == {"memorized": {"value": 5.0}, "wrong_gate_gap": None}
    assert metrics["faithfulness"]["rows"] == {"texts": 2, "probes": 1}
    (tmp_path / "again.json").write_text(json.dumps(metrics))
    assert read_metrics(tmp_path / "again.json") == metrics


def test_both_protocols_and_no_probes(tmp_path: Path) -> None:
    predicted = {"beyond": SECTION, "counts": {"rows": 2}}
    metrics = read_metrics(written(tmp_path / "m.json", beyond=None, predicted=predicted))
    assert metrics["faithfulness"] is None
    assert set(metrics["predicted"]) == {"faithfulness", "counts"}
    assert "memorized" in metrics["predicted"]["faithfulness"]["scores"]


@pytest.mark.parametrize("version", [1, 4, None, "3"])
def test_other_versions_are_refused(version: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"m\.json: has schema version {version}, this gavamoe reads 2 to 3"):
        read_metrics(written(tmp_path / "m.json", schema_version=version))


def test_stored_comparisons_get_todays_names() -> None:
    assert renamed({"item_mix_ups": 1, "bleu_4": 2, "towards_user": 3, "nearly_copied": 4}) == {
        "item_hallucination": 1, "bleu_4": 2, "user_alignment": 3, "near_memorized": 4,
    }  # fmt: skip


def test_a_stored_comparison_is_read_by_todays_names(tmp_path: Path) -> None:
    outcome = Outcome(
        system="full", label="full", what="all of it", seed=0, trained=True, folder="full/seed-0", rows=2,
        scores={"copied": 5.0, "bleu_4": 1.0}, intervals={"copied": [4.0, 6.0]},
    )  # fmt: skip
    stored = Comparison(dataset="d", fingerprint="f", config={}, outcomes=[outcome], skipped={}, left=[])
    (tmp_path / COMPARISON_FILE).write_text(stored.model_dump_json())
    (read,) = read_comparison(tmp_path).outcomes
    assert read.scores == {"memorized": 5.0, "bleu_4": 1.0}
    assert read.intervals == {"memorized": [4.0, 6.0]}
