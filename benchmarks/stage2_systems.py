"""Training speed of stage 2: GaVaMoE beside its controls, on real rows, as ratios of one run.

    python benchmarks/stage2_systems.py [DATASET] [--config reviews] [--only full,base] [--rounds 3] [--steps 5]

Without a dataset: a small synthetic one and the quickstart preset. Each system of `gavamoe ablate` takes the same
optimizer steps (the same rows, forward, backward, clipping and AdamW) with the torch engine, by its own config. Systems
take turns: in each round one is built, takes two steps to warm up and then `--steps` timed ones. The median of a
system's rounds counts. Tokens are those of prompts and explanations.
"""

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path

import torch

from gavamoe.config.files import load_config, override_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import open_dataset
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.experiments.variants import find_systems
from gavamoe.runtime.context import LocalContext
from gavamoe.runtime.host_memory import keep_freed_memory
from gavamoe.stage1.train import train_stage1
from gavamoe.stage2.setup import prepare
from gavamoe.stage2.train import SHORT_ROW, Training
from gavamoe.stage2.training_engines import make_engine

SYSTEMS = "base,full,no-multi-gating,base-active,base-wide,cluster-token"
WARM_UP = 2


def seconds_of_steps(config: RunConfig, dataset: Path, stage1: Path, steps: int) -> tuple[float, int, int]:
    """Seconds and tokens of `steps` optimizer steps, after the warm-up, and the model's parameters."""
    torch.manual_seed(config.seed)
    setup = prepare(config, dataset, stage1, empty_weights=False)
    prompt = config.stage2.prompt
    if prompt.max_tokens + prompt.max_explanation_tokens <= SHORT_ROW:
        setup.model.explainer.set_attn_implementation("eager")
    engine = make_engine("torch", setup.model, config.stage2, world_size=1, device="cpu")
    training = Training(config, setup, engine, LocalContext())
    try:
        for _ in range(WARM_UP):
            training._step()
        tokens, started = training._progress.tokens, time.perf_counter()
        for _ in range(steps):
            training._step()
        return time.perf_counter() - started, training._progress.tokens - tokens, setup.parameters
    finally:
        training.close()
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="?")
    parser.add_argument("--config")
    parser.add_argument("--only", default=SYSTEMS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    keep_freed_memory()  # as workers do
    name = asked.config or ("reviews" if asked.dataset else "quickstart")
    base = override_config(load_config(name), ["runtime.engine=torch", "runtime.workers=1", *asked.set])
    systems = find_systems(asked.only.split(","))
    rates: dict[str, list[float]] = {system.name: [] for system in systems}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        dataset = asked.dataset or synthesize(Path(folder) / "dataset", users=200, items=100, ratings=6000)
        data, stage1 = open_dataset(dataset), Path(folder) / "stage1"
        # Speed doesn't depend on what stage 1 has learned.
        brief = override_config(base, ["stage1.pretrain_epochs=1", "stage1.epochs=1"])
        train_stage1(brief, dataset, stage1, LocalContext())
        for number in range(asked.rounds):
            for system in systems:
                config = override_config(base, system.changes(base, data) if system.changes else [])
                seconds, tokens, sizes[system.name] = seconds_of_steps(config, dataset, stage1, asked.steps)
                rates[system.name].append(tokens / seconds)
                gc.collect()
                print(f"round {number + 1}  {system.name:16} {tokens / seconds:8.1f} tokens/s", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    first = medians[systems[0].name]
    print(f"\n{'system':16} {'parameters':>12} {'tokens/s':>9}  time, {systems[0].name} = 1")
    for name, median in medians.items():
        print(f"{name:16} {sizes[name]:12,} {median:9.1f}  {first / median:.2f}")


if __name__ == "__main__":
    main()
