"""What a search costs beside its trainings, and what the shared stage 1 saves.

    python benchmarks/tune.py [--trials 6] [--users 600]

Overhead: one stage-1 space, one trial at a time; the same configurations trained one after the other in one warm
process, without any search; the difference a trial. On a machine with other work the two parts compare no better than
its load allows, so the search's own seconds are given too: from one trial's end to the next one's, less what the trial
says that its training took. Cache: a two-stage space over alpha, whose trials all read the same stage 1. Every number
is one run.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from gavamoe.config.files import parse_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.train import train_stage1
from gavamoe.tune.checks import trial_config
from gavamoe.tune.ray_tune import SearchState
from gavamoe.tune.search import SearchResult, run_search

STAGE1: dict[str, Any] = {
    "embedding_size": 64,
    "latent_size": 32,
    "encoder_heads": 4,
    "encoder_feedforward": 128,
    "decoder_hidden": 64,
    "batch_size": 512,
}
STAGE2: dict[str, Any] = {
    "scratch": {"hidden_size": 64, "layers": 2, "heads": 4, "intermediate_size": 128, "vocabulary": 600},
    "experts": {"count": 4},
    "max_steps": 30,
    "validation_rows": 64,
}


class Clock:
    """Notes when trials begin and end, so that starting Ray and drawing plots is not counted."""

    def __init__(self) -> None:
        self.last: SearchState | None = None
        self.first_end = 0.0
        """Seconds until the first trial had ended: imports in the worker are in it."""

    def update(self, state: SearchState) -> None:
        self.last = state
        ended = sum(record.state != "running" for record in state.records)
        if ended == 1 and not self.first_end:
            self.first_end = state.seconds

    def step(self, title: str) -> None: ...

    def line(self, line: dict[str, Any]) -> None: ...

    def count(self, done: int, total: int) -> None: ...


def search(folder: Path, dataset: Path, config: RunConfig, space: dict[str, Any]) -> tuple[SearchResult, Clock, float]:
    """A search, one trial at a time; also the wall time of the whole call, Ray's start and end included."""
    folder.mkdir()
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(space))
    clock, started = Clock(), time.perf_counter()
    found = run_search(path, config, dataset, folder / "search", progress=clock, concurrent=1, final=False)
    return found, clock, time.perf_counter() - started


def overhead(folder: Path, dataset: Path, trials: int) -> None:
    """Seconds a trial beyond its training."""
    config = parse_config({"stage1": STAGE1}, "")
    space = {
        "stages": 1,
        "metric": "rmse",
        "budget": {"trials": trials},
        "parameters": {"stage1.beta": {"type": "float", "low": 0.05, "high": 0.2}},
    }
    found, clock, whole = search(folder, dataset, config, space)
    assert clock.last is not None
    searched = clock.last.seconds - clock.first_end
    torch.set_num_threads(1)
    alone = []
    for record in found.records:
        started = time.perf_counter()
        out = folder / f"alone_{record.number}"
        train_stage1(trial_config(config, found.space, record.values), dataset, out, LocalContext())
        alone.append(time.perf_counter() - started)
    later = sum(alone[1:])
    extra = (searched - later) / (trials - 1)
    own = (searched - sum(record.measured["stage1.seconds"][0] for record in found.records[1:])) / (trials - 1)
    print(f"{trials} stage-1 trials, one at a time: {whole:.1f} s in all; first trial {clock.first_end:.1f} s"
          f" (alone {alone[0]:.1f} s), then {searched / (trials - 1):.2f} s each, alone {later / (trials - 1):.2f} s:"
          f" overhead {extra:.2f} s or {100 * extra * (trials - 1) / later:.0f} %; beside the training that the trials"
          f" report {own:.2f} s each")  # fmt: skip


def cache(folder: Path, dataset: Path, trials: int) -> None:
    """Seconds that shared stage-1 results saved."""
    config = parse_config({"stage1": STAGE1, "stage2": STAGE2, "runtime": {"engine": "torch"}}, "")
    space = {
        "stages": 2,
        "metric": "stage2.validation_loss",
        "budget": {"trials": trials},
        "parameters": {"stage2.alpha": {"type": "float", "low": 0.0, "high": 0.3}},
    }
    found, _, whole = search(folder, dataset, config, space)
    measured = [record.measured for record in found.records]
    saved = sum(values["stage1.seconds"][0] for values in measured if values["stage1.shared"][0])
    shared = sum(bool(values["stage1.shared"][0]) for values in measured)
    print(f"{trials} two-stage trials: {whole:.1f} s; stage 1 trained {trials - shared} x, shared {shared} x:"
          f" {saved:.1f} s saved of {whole + saved:.1f} s, {100 * saved / (whole + saved):.0f} %")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--users", type=int, default=600, help="with 30 ratings each")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        synthesize(folder / "data", users=options.users, items=300, ratings=30 * options.users, groups=3, seed=0)
        overhead(folder / "overhead", folder / "data", options.trials)
        cache(folder / "cache", folder / "data", options.trials)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
