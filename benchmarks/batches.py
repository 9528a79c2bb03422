"""Stage 2's data path: set-up with and without the token cache, batches with and without length buckets.

    python benchmarks/batches.py [--dataset FOLDER] [--rows 150000] [--steps 60] [--json]

Set-up: training rows per second until they are token ids in memory, tokenized in this process, by two Ray tasks into
the cache (with their start), and read from the cache. Buckets: share of padding in an epoch's batches of 32 rows,
and rows per second of the quickstart model's forward and backward passes over the same steps of both orders,
taking turns. One thread.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from gavamoe.config.files import load_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import open_dataset
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.generation.prompts import PromptBuilder
from gavamoe.model.base_model import scratch_config
from gavamoe.model.build import build_explainer
from gavamoe.model.conversion import ExplainerSizes
from gavamoe.runtime.ray_train import ray_session, run_tasks
from gavamoe.stage2.batches import WINDOW_STEPS, BatchPlan, TextRows
from gavamoe.stage2.token_cache import FOLDER, fill_cache, read_cache
from gavamoe.stage2.tokenized_rows import encode_rows, prompt_builder, rows_with_text

BATCH = 32
T = TypeVar("T")


def timed(make: Callable[[], T]) -> tuple[float, T]:
    """Seconds that a call takes, and what it returns."""
    started = time.perf_counter()
    result = make()
    return time.perf_counter() - started, result


def setup(config: RunConfig, dataset: Path) -> tuple[dict[str, float], PromptBuilder, TextRows]:
    """Rows per second of each way, what made the rows, and the rows."""
    data = open_dataset(dataset)
    rows = rows_with_text(data, "train")
    tokenizer_seconds, builder = timed(lambda: prompt_builder(config, data))
    plain, encoded = timed(lambda: encode_rows(builder, data, "train", rows))
    placement = config.runtime.model_copy(update={"workers": 2, "threads_per_worker": 1})
    with ray_session(placement):
        filling, _ = timed(lambda: fill_cache(config, dataset, lambda loop, jobs: run_tasks(loop, jobs, placement)))
    reading, cached = timed(lambda: read_cache(data, builder, rows))
    if cached is None or not np.array_equal(cached.prompts.values, encoded.prompts.values):
        raise RuntimeError("the cache has other rows than tokenizing gives, or the dataset is too small for one")
    size = sum(file.stat().st_size for file in (dataset / FOLDER).rglob("*") if file.is_file())
    seconds = {"in this process": plain, "into the cache, two Ray tasks": filling, "from the cache": reading}
    found = {name: len(rows) / value for name, value in seconds.items()}
    return found | {"tokenizer seconds": tokenizer_seconds, "cache bytes per row": size / len(rows)}, builder, encoded


def padding(rows: TextRows, window: int) -> float:
    """Share of padding among the positions of an epoch's batches."""
    plan = BatchPlan(rows.lengths, BATCH, 1, 1, seed=0, window_steps=window)
    lengths = np.stack([rows.lengths[plan.rows(step).ravel()] for step in range(plan.steps_per_epoch)])
    return float(1 - lengths.sum() / (lengths.max(axis=1) * BATCH).sum())


def rows_per_second(config: RunConfig, builder: PromptBuilder, rows: TextRows, steps: int) -> dict[str, float]:
    """Of training passes, by order; both take turns, step by step."""
    vocabulary, beyond = builder.user_token(0), 2**40
    users, items = builder.user_token(beyond) - vocabulary, builder.item_token(beyond) - builder.item_token(0)
    base = AutoModelForCausalLM.from_config(scratch_config(config.stage2.scratch, vocabulary))
    size = config.stage1.embedding_size
    model = build_explainer(config, base, ExplainerSizes(users, items, size, config.gates)).train()
    clusters = np.zeros(len(rows), dtype=np.int64)
    orders = {"buckets": WINDOW_STEPS, "none": 1}
    plans = {name: BatchPlan(rows.lengths, BATCH, 1, 1, seed=0, window_steps=window) for name, window in orders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for step in range(steps):
        for name, plan in plans.items():
            batch = rows.collate(plan.rows(step).ravel(), clusters, 0)

            def train(batch: dict[str, torch.Tensor] = batch) -> None:
                model.zero_grad(set_to_none=True)
                model(**batch, use_cache=False).loss.backward()

            seconds[name].append(timed(train)[0])
    # Buckets make short and long batches, so all of them count; the first pass warms up.
    return {name: BATCH * (steps - 1) / sum(values[1:]) for name, values in seconds.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path, help="a prepared dataset; its tokens/ is removed first")
    parser.add_argument("--rows", type=int, default=150_000, help="reviews to synthesize without --dataset")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config("quickstart")
    with tempfile.TemporaryDirectory() as folder:
        dataset = arguments.dataset or Path(folder) / "data"
        if arguments.dataset is None:
            synthesize(dataset, users=4000, items=2000, ratings=arguments.rows)
        shutil.rmtree(dataset / FOLDER, ignore_errors=True)
        found, builder, rows = setup(config, dataset)
    shares = {"buckets": padding(rows, WINDOW_STEPS), "none": padding(rows, 1)}
    speeds = rows_per_second(config, builder, rows, arguments.steps)
    results: dict[str, Any] = {"setup": found, "padding": shares, "rows per second": speeds}
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    for name, values in results.items():
        print(name)
        for key, value in values.items():
            print(f"  {key:32} {value:12,.3f}")
    print(f"from the cache: {found['from the cache'] / found['in this process']:.1f} x the rows per second")
    print(f"buckets: {speeds['buckets'] / speeds['none']:.2f} x the rows per second")


if __name__ == "__main__":
    main()
