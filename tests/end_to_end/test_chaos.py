"""A hundred faults in the daily work of a user: none changes a number, loses a request or leaves anything behind."""

import json
from pathlib import Path

import pytest
from helpers import chaos_serve
from helpers.chaos import SERVE, WANTED, Chaos, Report
from helpers.chaos_faults import DISK
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


def kinds_that_are_missing(report: Report) -> list[tuple[str, str]]:
    """Pairs of work and fault that were to be met, and were not."""
    expected = [(name, fault) for name, kind in WORKS.items() for fault in kind.faults]
    expected += [(SERVE, fault) for fault in (*chaos_serve.OF_SERVICE, *chaos_serve.OF_COMMAND)]
    skipped = {DISK} if report.skipped else set[str]()
    return [pair for pair in expected if not report.faults[pair] and pair[1] not in skipped]
