"""Ray workers that write an evaluation's texts: two beside one, and beside this process, as ratios of one run.

    python -m benchmarks.writers [--rows 256] [--new-tokens 24] [--rounds 3] [--set KEY=VALUE ...] [--keep DIR]

The model has SmolLM2-135M's shape and random weights, converted as a run's (`stage2.experts.enabled=false`: dense),
and is stored as a run that took one training step on planted data. It hardly ever ends a text, so all have as many
tokens. Writers take turns within a round: this process with as many threads as there are cores, one worker and two
workers, each on one thread. Reported are medians of the seconds for all rows, from the moment that every writer has its
model, and of those that starting took (Ray, processes, reading the model); ratios of medians, without the start and
with it; and whether all wrote the same texts. CPU seconds of all processes are told as well: "at best" is what the
busiest worker's allow on idle cores.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from transformers import LlamaForCausalLM

from benchmarks.explainer import smollm2_shape
from gavamoe.artifacts.run import claim_run, open_run
from gavamoe.config.files import parse_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import open_dataset
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.evaluation.kept_texts import KeptTexts
from gavamoe.evaluation.rows import requests_of, select_rows
from gavamoe.evaluation.writers import open_writer
from gavamoe.model.base_model import train_tokenizer
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.train import train_stage1
from gavamoe.stage2.train import train_stage2

WRITERS = {"this process": 0, "one worker": 1, "two workers": 2}
SETTINGS = (
    "stage1.epochs=1", "stage1.pretrain_epochs=1", "stage1.mixture_restarts=1", "stage2.max_steps=1",
    "stage2.batch_size=1", "stage2.validation_rows=2", "stage2.alpha=0", "runtime.engine=torch",
    "runtime.threads_per_worker=1", "generation.batch_size=16",
)  # fmt: skip


def make_run(folder: Path, settings: list[str]) -> Path:
    """A run folder with both stages."""
    dataset = synthesize(folder / "data", users=400, items=200, ratings=8000, groups=3, seed=0)
    data = open_dataset(dataset)
    torch.manual_seed(0)
    LlamaForCausalLM(smollm2_shape()).save_pretrained(folder / "base")
    train_tokenizer(data.table("train")["text"].to_pylist(), 2000).save_pretrained(folder / "base")
    config = parse_config({}, "benchmark", [*SETTINGS, f"stage2.base_model={folder / 'base'}", *settings])
    run = folder / "run"
    claim_run(run, config, dataset, data.fingerprint, continuing=False)
    train_stage1(config, dataset, run / "stage1", LocalContext())
    train_stage2(config, dataset, run / "stage1", run / "stage2", LocalContext())
    return run


class Found(NamedTuple):
    starting: float
    """Seconds until all writers have their model."""
    writing: float
    """Seconds of all texts."""
    busiest: float
    """CPU seconds of the busiest process meanwhile."""
    texts: list[str]


def cpu_seconds() -> dict[int, float]:
    """Of this process and of all that it started, by id."""
    here = psutil.Process()
    return {each.pid: sum(each.cpu_times()[:2]) for each in [here, *here.children(recursive=True)]}


def write(run: Path, config: RunConfig, workers: int, rows: int, folder: Path) -> Found:
    opened = open_run(run)
    asked = requests_of(select_rows(open_dataset(opened.dataset), "test", rows, 0), "given")
    started = time.perf_counter()
    with open_writer(run, config, workers=workers) as (writer, _, _):
        warm = config.generation.model_copy(update={"max_new_tokens": 1})
        KeptTexts(writer, folder / "warm", "").explain(asked[: 64 * max(workers, 1)], warm)  # several blocks each
        ready, before = time.perf_counter(), cpu_seconds()
        texts = KeptTexts(writer, folder / "texts", "").explain(asked, config.generation)
        ended, after = time.perf_counter(), cpu_seconds()
    busiest = max(seconds - before.get(process, 0.0) for process, seconds in after.items())
    return Found(ready - started, ended - ready, busiest, [each.text for each in texts])


def compare(run: Path, rows: int, new_tokens: int, rounds: int) -> None:
    opened = open_run(run)
    generation = opened.config.generation.model_copy(update={"max_new_tokens": new_tokens})
    config = opened.config.model_copy(update={"generation": generation})
    found: dict[str, list[Found]] = {name: [] for name in WRITERS}
    for number in range(rounds):
        for name, workers in WRITERS.items():
            torch.set_num_threads(os.cpu_count() or 1)
            with tempfile.TemporaryDirectory() as folder:
                one = write(run, config, workers, rows, Path(folder))
            found[name].append(one)
            print(
                f"round {number + 1}, {name}: started in {one.starting:.1f} s, wrote {rows} rows in"
                f" {one.writing:.1f} s, CPU of the busiest process {one.busiest:.1f} s",
                flush=True,
            )
    starting = {name: statistics.median(each.starting for each in results) for name, results in found.items()}
    writing = {name: statistics.median(each.writing for each in results) for name, results in found.items()}
    whole = {
        name: statistics.median(each.starting + each.writing for each in results) for name, results in found.items()
    }
    busiest = {name: statistics.median(each.busiest for each in results) for name, results in found.items()}
    print(f"medians of {rounds}: {rows} rows of {new_tokens} tokens")
    for name, results in found.items():
        pairs = zip(results[-1].texts, found["one worker"][-1].texts, strict=True)
        print(
            f"  {name:12} start {starting[name]:6.1f} s, writing {writing[name]:6.1f} s"
            f" ({rows * new_tokens / writing[name]:.0f} tokens/s), CPU {busiest[name]:.1f} s;"
            f" {sum(one == other for one, other in pairs)} of {rows} texts as one worker's"
        )
    for base in ("one worker", "this process"):
        print(
            f"  two workers are {writing[base] / writing['two workers']:.2f} times as fast as {base},"
            f" {whole[base] / whole['two workers']:.2f} with the start"
        )
    print(f"  at best {busiest['one worker'] / busiest['two workers']:.2f} times as fast as one worker")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the run's config")
    parser.add_argument("--keep", type=Path, help="make the run here and leave it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        run = folder / "run"
        if not (run / "stage2").is_dir():
            run = make_run(folder, options.set)
        compare(run, options.rows, options.new_tokens, options.rounds)


if __name__ == "__main__":
    main()
