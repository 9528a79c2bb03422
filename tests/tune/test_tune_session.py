"""Ctrl-C and full disks while Ray Tune runs the trials. Tune's loop is played, its signal handlers are its own."""

import json
import logging
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.cli import Runner
from helpers.tiny import tiny
from ray.tune.tune import _setup_signal_catching

from gavamoe.errors import RunError
from gavamoe.tune import ray_tune
from gavamoe.tune.space import parse_space
from gavamoe.tune.study import Study
from gavamoe.tune.trial import Job, Outcome

Loop = Callable[[Any, Any], None]
"""Tune's loop: is given the searcher and the listener."""


class Onlooker:
    def update(self, state: object) -> None: ...


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Loop], tuple[bool, Study]]:
    """`run_trials` with one trial, whose loop is the given one."""
    k = {"stage1.clusters": {"type": "int", "low": 3, "high": 3}}
    space = parse_space({"stages": 1, "metric": "rmse", "budget": {"trials": 1}, "parameters": k}, "s.yaml")
    job = Job(space, tiny(), tmp_path, "", tmp_path, 1)
    study = Study(tmp_path, space, {}, seed=0, name="s")

    def run(loop: Loop) -> tuple[bool, Study]:
        class Tuner:
            def __init__(self, trainable: object, tune_config: Any, run_config: Any) -> None:
                self.searcher, self.listener = tune_config.search_alg, run_config.callbacks[0]

            def fit(self) -> None:
                loop(self.searcher, self.listener)

        monkeypatch.setattr(ray_tune, "_ray", lambda job, placement: nullcontext())
        monkeypatch.setattr(ray_tune, "_slots", lambda placement, concurrent: 1)
        monkeypatch.setattr(ray_tune, "Tuner", Tuner)
        return ray_tune.run_trials(job, study, Onlooker(), concurrent=1), study

    return run


def finish(searcher: Any) -> None:
    """One trial to its end; and there is no other."""
    number = searcher.suggest("a")["number"]
    outcome = Outcome({"stage1.rmse": [0.5]}, 1.0)
    searcher.on_trial_complete("a", {"number": number, "finished": json.dumps(asdict(outcome))})
    searcher.suggest("b")


@pytest.mark.parametrize("pressed", [False, True])
def test_ctrl_c_at_the_end_of_the_last_trial_is_heeded(pressed: bool, search: Any) -> None:
    """Once met: Tune's own handler took it, the search was complete, and the command went on."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGUSR1)

    def loop(searcher: Any, listener: object) -> None:
        interrupted = _setup_signal_catching()
        finish(searcher)
        if pressed:
            signal.raise_signal(signal.SIGINT)
        assert interrupted.is_set() is pressed  # Tune ends in order

    went_to_its_end, study = search(loop)
    assert went_to_its_end is not pressed
    assert [record.state for record in study.records] == ["complete"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGUSR1)) == handlers


@pytest.mark.parametrize("prepare", [lambda: None, lambda: press(_setup_signal_catching())], ids=["early", "again"])
def test_ctrl_c_before_tune_can_heed_it_and_a_second_one_end_at_once(
    prepare: Callable[[], object], search: Any
) -> None:
    def loop(searcher: object, listener: object) -> None:
        prepare()
        press()
        pytest.fail("goes on")

    with pytest.raises(KeyboardInterrupt):
        search(loop)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def press(*ignored: object) -> None:
    signal.raise_signal(signal.SIGINT)


def test_a_result_that_cannot_be_written_ends_the_search_with_its_own_error(
    search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune logged a traceback, and had the trial, which was complete, told as failed."""

    def full(*of: object) -> None:
        raise OSError("database or disk is full")

    def loop(searcher: Any, listener: Any) -> None:
        with monkeypatch.context() as changes:
            changes.setattr(Study, "complete", full)
            try:
                finish(searcher)
            except OSError:
                pytest.fail("Tune sees it")
        listener.on_trial_error(1, [], None)  # it says no more, though there is room again
        listener.on_step_end(1, [])
        pytest.fail("goes on")

    with pytest.raises(OSError, match="disk is full"):
        search(loop)


@pytest.mark.parametrize("reason", ["RunError: x: cannot be written: no space is left", "RuntimeError: nan"])
@pytest.mark.parametrize("free", [2**30, 2**20])
@pytest.mark.parametrize("died", [False, True])
def test_a_full_disk_is_no_fault_of_the_configuration(
    reason: str, free: int, died: bool, search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once met: the best configuration was recorded as failed, for good, and another one was chosen."""
    monkeypatch.setattr(ray_tune.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    def loop(searcher: Any, listener: Any) -> None:
        number = searcher.suggest("a")["number"]
        if died:
            trial = SimpleNamespace(trial_id="a", get_error=lambda: RuntimeError(reason))
            listener.on_trial_error(1, [], trial)
        else:
            searcher.on_trial_complete("a", {"number": number, "failed": reason})
        states.extend(record.state for record in searcher._session.study.records)
        listener.on_step_end(1, [])
        searcher.suggest("b")

    states: list[str] = []
    if free == 2**30 and "space" not in reason:
        search(loop)
        assert states == ["failed"]
        return
    with pytest.raises(RunError, match=r"its disk is full .*; make room, then continue with --resume"):
        search(loop)
    assert states == ["running"]  # so it is continued


def test_tracebacks_of_tune_are_shown_with_debug_alone(gavamoe: Runner) -> None:
    logger = logging.getLogger("ray.tune")
    logger.setLevel(logging.NOTSET)
    gavamoe("--version", "--debug")
    assert logger.isEnabledFor(logging.ERROR)
    gavamoe("--version")
    assert not logging.getLogger("ray.tune.execution.tune_controller").isEnabledFor(logging.ERROR)
