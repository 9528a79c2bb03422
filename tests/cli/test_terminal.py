"""What texts from files may do to a terminal: nothing."""

import logging
from collections.abc import Callable

import pytest
from helpers.cli import Runner

from gavamoe.cli import terminal
from gavamoe.cli.output.cluster import print_status
from gavamoe.cli.status import RunStatus, StepStatus
from gavamoe.errors import printable

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x1b[8mhidden\x9b31m\r\u202egnp.exe\u2066"
"""Sets the window's title, clears the screen, hides text, overwrites the line, turns letters around."""
ESCAPES = ("\x1b", "\x07", "\x9b", "\r", "\u202e", "\u2066")


def test_printable_text_keeps_what_can_be_seen() -> None:
    assert printable("naïve 日本語 🍺 a\tb") == "naïve 日本語 🍺 a b"
    assert printable("one\ntwo") == "one two"
    assert printable("one\ntwo", lines=True) == "one\ntwo"
    assert not set(printable(HOSTILE)) & set(ESCAPES)


def status() -> None:
    steps = [StepStatus("stage1", "damaged", problem=HOSTILE), StepStatus("stage2", "running", warnings=[HOSTILE])]
    print_status(
        RunStatus(
            path=HOSTILE, dataset=HOSTILE, dataset_problem=HOSTILE, steps=steps, logs={HOSTILE: HOSTILE}, next=HOSTILE
        )
    )


def progress() -> None:
    with terminal.TerminalProgress() as bars:
        bars.step(HOSTILE)
        bars.line({"warning": HOSTILE, "phase": HOSTILE, "step": 1, "steps": 2})


def log() -> None:
    logger = logging.Logger("gavamoe.test")
    logger.addHandler(terminal.LogLines())
    logger.warning("waiting for %s", HOSTILE)


@pytest.mark.parametrize(
    "show",
    [
        status,
        progress,
        log,
        lambda: terminal.print_table(HOSTILE, ["", "x"], [(HOSTILE, HOSTILE)]),
        lambda: terminal.console.print(HOSTILE, markup=False),
    ],
    ids=["status", "progress", "log", "table", "line"],
)
def test_nothing_that_is_shown_sends_escape_sequences(
    show: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    show()
    shown = capsys.readouterr().err
    assert "hidden" in shown
    assert not set(shown) & set(ESCAPES)


def test_errors_send_none_either(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = Runner(monkeypatch, capsys)("plan", HOSTILE)
    assert result.code == 2
    assert "hidden" in result.err
    assert not set(result.err) & set(ESCAPES)
