"""The report's sections on both protocols and on faithfulness."""

from pathlib import Path

import numpy as np
from helpers.gates import gates_by_hand
from helpers.pages import HOSTILE, Page
from helpers.runs import evaluation_config, make_run
from helpers.writers import FakeExplainer, planted_writer

from gavamoe.data.dataset import Dataset
from gavamoe.evaluation.evaluate import evaluate, write_evaluation
from gavamoe.evaluation.faithfulness.gates import GateProbe
from gavamoe.generation.request import ExplanationRequest
from gavamoe.report.page import write_report


def page_of(folder: Path, dataset: Dataset, say, gates: GateProbe | None, **options: object) -> tuple[Page, str]:  # type: ignore[no-untyped-def]
    """The report of a run whose writer is `say`."""
    settings = evaluation_config(**{"rows": 40} | options)
    result = evaluate(FakeExplainer(dataset, say), dataset, settings, gates=lambda *_: gates)
    write_evaluation(make_run(folder, dataset, settings) / "evaluation", result, settings, {})
    html = write_report([folder], folder / "report.html").read_text()
    return Page(html), html


def test_both_protocols_gates_and_swaps_are_shown(planted: Dataset, tmp_path: Path) -> None:
    truth = planted.truth()
    assert truth is not None
    page, _ = page_of(tmp_path / "run", planted, planted_writer(truth), gates_by_hand(), protocol="both", probe_rows=5)
    text = page.text
    for expected in (
        "Given and predicted",
        "Faithfulness",
        "run, given",
        "run, predicted",
        "Item hallucination ↓",
        "40 texts, 5 rows that the model read again",
        "Nats per token",
        "The same request for another user",
        "Texts of run, given",
    ):
        assert expected in text
    assert ("href", "#faithfulness") in page.attributes
    assert text.count("gate 2") == 2  # a table of losses for each protocol


def test_runs_on_other_rows_keep_their_own_humans_and_chance(planted: Dataset, tmp_path: Path) -> None:
    truth = planted.truth()
    assert truth is not None
    for name, rows in (("one", 40), ("two", 11)):
        page_of(tmp_path / name, planted, planted_writer(truth), None, probe_rows=5, rows=rows)
    page = Page(write_report([tmp_path / "one", tmp_path / "two"], tmp_path / "both.html").read_text())
    assert page.text.count("humans 100.00, chance") == 2  # the most frequent sentiment's share differs
    alone = Page((tmp_path / "one" / "report.html").read_text())
    assert "humans 100.00, chance" not in alone.text


def test_hostile_texts_stay_text(planted: Dataset, tmp_path: Path) -> None:
    def say(request: ExplanationRequest) -> str:
        return f"{HOSTILE} {request.user}"

    page, html = page_of(tmp_path / "run", planted, say, None, probe_rows=5)
    assert "script" not in page.tags
    assert HOSTILE not in html
    assert "alert" in page.text


def test_runs_without_the_section(planted: Dataset, tmp_path: Path) -> None:
    page, _ = page_of(tmp_path / "run", planted, lambda _: "x", None)
    assert "Faithfulness" not in page.text
    assert "Given and predicted" not in page.text
    assert ("href", "#faithfulness") not in page.attributes


def test_one_gate_has_no_tables_of_gates(planted: Dataset, tmp_path: Path) -> None:
    one = GateProbe(np.ones((2, 1)), np.zeros(2, np.int64), np.ones((2, 1, 4)), np.ones((1, 1)), 2)
    page, _ = page_of(tmp_path / "run", planted, lambda _: "x", one, probe_rows=5)
    assert "Entropy of expert use" in page.text
    assert "Nats per token" not in page.text
