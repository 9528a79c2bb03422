"""A hundred faults in the daily work of a user: none changes a number, loses a request or leaves anything behind."""

import json
import signal
from pathlib import Path

import pytest
from helpers import chaos_serve
from helpers.chaos import SERVE, WANTED, Chaos, Report, wrong_with
from helpers.chaos_faults import DISK, INT, TERM, Attempt
from helpers.chaos_work import WORKS

MINUTES = 120
"""Limit of a busy machine; two quiet cores need half an hour to an hour."""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3 * 3600)
def test_a_hundred_faults_change_nothing(tmp_path: Path) -> None:
    report = Chaos(tmp_path / "chaos", seed=0, minutes=MINUTES).run()
    print(json.dumps(report.as_json(), indent=2))
    assert report.problems == []
    assert report.total() >= 100
    for work, wanted in WANTED.items():
        assert report.total(work) >= wanted, f"too few faults of {work} within {MINUTES} minutes"
    assert kinds_that_are_missing(report) == []
    assert report.answers["200"] > 1000
    assert report.slowest < chaos_serve.AWAY


@pytest.mark.parametrize(
    ("fault", "code", "shown", "right"),
    [
        (INT, 130, ["interrupted; --resume continues"], True),
        (INT, -signal.SIGINT, ["dataset: made"], True),  # after the command's end
        (INT, -signal.SIGINT, ["Traceback (most recent call last):", "KeyboardInterrupt"], False),
        (INT, 130, ["dataset: made"], False),
        (INT, 0, ["dataset: made"], False),
        (TERM, 143, ["terminated; --resume continues"], True),
        (TERM, -signal.SIGTERM, ["dataset: made"], True),
        (TERM, -signal.SIGINT, ["dataset: made"], False),
        (TERM, 130, ["interrupted"], False),
    ],
)
def test_a_signal_is_told_in_one_line_or_comes_after_the_end(
    fault: str, code: int, shown: list[str], right: bool
) -> None:
    assert (wrong_with(Attempt(code, shown, 1.0, struck=True), fault) == []) is right


def kinds_that_are_missing(report: Report) -> list[tuple[str, str]]:
    """Pairs of work and fault that were to be met, and were not."""
    expected = [(name, fault) for name, kind in WORKS.items() for fault in kind.faults]
    expected += [(SERVE, fault) for fault in (*chaos_serve.OF_SERVICE, *chaos_serve.OF_COMMAND)]
    skipped = {DISK} if report.skipped else set[str]()
    return [pair for pair in expected if not report.faults[pair] and pair[1] not in skipped]
