"""What `gavamoe score` and `gavamoe evaluate` print: for people, for machines, and for wrong input."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.cli import Runner
from helpers.losses import row_losses
from helpers.runs import make_run
from helpers.texts import CANDIDATES, REFERENCES
from helpers.writers import FakeExplainer, parrot

from gavamoe.cli import terminal
from gavamoe.data.dataset import open_dataset
from gavamoe.generation.generator import ExplanationGenerator


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are not folded to the width of a test's terminal."""
    monkeypatch.setattr(terminal.console, "_width", 200)


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    for path, said in ((one, REFERENCES), (other, CANDIDATES)):
        rows = [{"generated": text, "reference": meant} for text, meant in zip(said * 5, REFERENCES * 5, strict=True)]
        path.write_text("\n".join(map(json.dumps, rows)))
    return one, other


def test_score_names_the_family_and_compares(gavamoe: Runner, texts: tuple[Path, Path]) -> None:
    one, other = texts
    shown = gavamoe("score", one, "--style", "peter", "--against", other)
    assert shown.code == 0
    assert shown.out == ""
    lines = [line for line in shown.err.splitlines() if "PETER BLEU-4, smoothed" in line]
    assert len(lines) == 2  # alone with its interval, then against the other
    assert "100.00" in lines[1]
    assert "0.001" in lines[1]  # p of 1,000 swaps, none of them as large
    assert " BLEU-1 " not in shown.err.replace("PETER BLEU-1", "")
    assert "approximate randomization" in shown.err


def test_score_for_machines(gavamoe: Runner, texts: tuple[Path, Path]) -> None:
    found = json.loads(gavamoe("score", texts[1], "--style", "both", "--json").out)
    assert found["style"] == "both"
    assert found["against"] is None
    assert found["metrics"]["bleu_4"] == pytest.approx(37.5412, abs=1e-4)
    assert found["metrics"]["peter_bleu_1"] == pytest.approx(56.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--style", "meteor"], "style meteor: unknown; known are sacrebleu, peter, both"),
        (["--against", "nowhere.txt"], "nowhere.txt: no such file"),
    ],
)
def test_wrong_options_of_score(gavamoe: Runner, texts: tuple[Path, Path], arguments: list[str], message: str) -> None:
    found = gavamoe("score", texts[0], *arguments)
    assert found.code == 2
    assert message in found.err
    assert "Traceback" not in found.err


def test_evaluate_prints_both_protocols_and_what_lies_beyond(
    gavamoe: Runner, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = open_dataset(tiny_dataset)
    monkeypatch.setattr(ExplanationGenerator, "load", lambda *_: FakeExplainer(planted, parrot(planted)))
    monkeypatch.setattr("gavamoe.evaluation.faithfulness.gates.measure_gates", lambda *_: None)
    monkeypatch.setattr("gavamoe.report.page.write_report", lambda runs, out: out)
    losses = row_losses(["a", "b"], [0, 30], [4, 6], [2.0, 9.0], stranger=[np.nan, 6.0])
    monkeypatch.setattr("gavamoe.evaluation.losses.measure.measure_row_losses", lambda *_: losses)
    run = make_run(tmp_path / "run", planted)
    plain = gavamoe("evaluate", run, "--rows", 20, "--probe-rows", 5, "--no-row-losses", "--json")
    assert json.loads(plain.out)["losses"] is None
    assert "nats a token" not in plain.err
    shown = gavamoe("evaluate", run, "--rows", 20, "--probe-rows", 5, "--protocol", "both", "--row-losses", "--json")
    assert shown.code == 0
    assert "rating and features given and predicted" in shown.err
    assert "Faithfulness (intervals" in shown.err
    assert "Item hallucination ↓" in shown.err
    assert "Gate overlap" not in shown.err
    assert json.loads(shown.out)["losses"]["shown"]["all"]["loss"] == 1.1
    [line] = [line for line in shown.err.splitlines() if "20+ rows" in line]
    assert line.replace("│", "").split() == ["20+", "rows", "1", "1.5", "1"]
    assert json.loads(shown.out)["predicted"]["faithfulness"]["rows"] == {"texts": 20, "probes": 5}
    wrong = gavamoe("evaluate", run, "--style", "meteor")
    assert wrong.code == 2
    assert "evaluation.style: 'meteor'" in wrong.err
