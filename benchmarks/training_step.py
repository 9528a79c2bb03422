"""What a training step of stage 2 need not do: padding, logits without a label, logits of a large vocabulary at once.

    python benchmarks/training_step.py [--datasets FOLDER...] [--words 128256] [--rounds 5] [--bf16] [--json]

Padding: its share of the positions in three epochs' batches of 8, 16 and 32 rows, tokenized as the quickstart does;
sorted by length within one step (as if not at all), within 32 steps' rows (as until 2026-11-26) and as training does.

Loss: one forward and backward pass of a LLaMA with experts (hidden 256, 2 layers, tied embeddings) over 16 rows of
prompts of 24 to 54 tokens with answers of 32, 512 labeled tokens in all. "positions" scores, as until 2026-11-26, each
position where any row has a label, for all rows, and returns the logits; "plain" scores labeled tokens, all at once;
"chunked" does as training does. Variants take turns and the fastest rounds count; memory is the peak of what torch
allocated during a pass, beyond what was there before. bfloat16 says something only where the CPU multiplies in it.
"""

import argparse
import contextlib
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gavamoe.config.files import load_config, parse_config
from gavamoe.data.dataset import open_dataset
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.model import output_head
from gavamoe.model.build import build_explainer
from gavamoe.model.conversion import ExplainerSizes
from gavamoe.model.explainer import IGNORED, GavamoeForCausalLM
from gavamoe.stage2.batches import WINDOW_STEPS, BatchPlan
from gavamoe.stage2.tokenized_rows import encode_rows, prompt_builder, rows_with_text

BATCHES, EPOCHS = (8, 16, 32), 3
ROWS, ANSWER, PROMPTS = 16, 32, range(24, 56, 2)
USERS, ITEMS, SLOT, GATES = 100, 100, 64, 3
Figures = dict[str, dict[str, float]]


def padding(length_N: np.ndarray, batch: int, window_steps: int) -> float:
    """Share of padding among the positions of the batches of three epochs."""
    plan = BatchPlan(length_N, batch, 1, 1, seed=0, window_steps=window_steps)
    length_SB = np.stack([length_N[plan.rows(step).ravel()] for step in range(EPOCHS * plan.steps_per_epoch)])
    return float(1 - length_SB.sum() / (length_SB.max(axis=1) * batch).sum())


def paddings(datasets: list[Path]) -> Figures:
    """By dataset and batch size, for each window."""
    config, found = load_config("quickstart"), {}
    for folder in datasets:
        data = open_dataset(folder)
        rows = encode_rows(prompt_builder(config, data), data, "train", rows_with_text(data, "train"))
        for batch in BATCHES:
            windows = {"1 step": 1, "32 steps": 32, "as trained": WINDOW_STEPS}
            shares = {name: padding(rows.lengths, batch, steps) for name, steps in windows.items()}
            found[f"{folder.name}, {len(rows):,} rows, batches of {batch}"] = shares
    return found


def model_of(words: int) -> GavamoeForCausalLM:
    """The explainer whose steps are measured."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=words, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    config = parse_config({"stage2": {"experts": {"intermediate_size": 128}}}, "benchmark")
    sizes = ExplainerSizes(USERS, ITEMS, SLOT, GATES)
    model = build_explainer(config, LlamaForCausalLM(shape), sizes).train()
    model.set_attn_implementation("eager")  # as stage 2 does for short rows on a CPU
    return model


def batch_of(words: int) -> dict[str, Tensor]:
    """Rows whose answers begin at different places, padded on the right."""
    ids_BT = torch.randint(1, words, (ROWS, max(PROMPTS) + ANSWER), generator=torch.Generator().manual_seed(0))
    start_B1 = torch.tensor(list(PROMPTS))[:, None]
    place_T = torch.arange(ids_BT.shape[1])
    answer_BT = (place_T >= start_B1) & (place_T < start_B1 + ANSWER)
    return {
        "input_ids": ids_BT,
        "attention_mask": (place_T < start_B1 + ANSWER).long(),
        "labels": ids_BT.masked_fill(~answer_BT, IGNORED),
        "cluster_ids": torch.arange(ROWS) % GATES,
    }


@contextlib.contextmanager
def logits_at_once(count: int) -> Iterator[None]:
    """Let so many logits stand at once on a CPU."""
    usual, output_head.CPU_LOGITS = output_head.CPU_LOGITS, count
    try:
        yield
    finally:
        output_head.CPU_LOGITS = usual


def passes(model: GavamoeForCausalLM, words: int, *, bf16: bool) -> dict[str, Callable[[], None]]:
    """A forward and backward pass, by variant; the gradients stay until the next."""
    batch = batch_of(words)
    positions_P = (batch["labels"] != IGNORED).any(dim=0)[1:].nonzero().flatten()
    variants = {
        "positions": (2**62, {"logits_to_keep": positions_P}),
        "plain": (2**62, {"return_logits": False}),
        "chunked": (output_head.CPU_LOGITS, {"return_logits": False}),
    }

    def take(count: int, options: dict[str, object]) -> None:
        model.zero_grad(set_to_none=True)
        with logits_at_once(count), torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            output = model(**batch, use_cache=False, **options)
        output.loss.backward()

    return {name: lambda chosen=chosen: take(*chosen) for name, chosen in variants.items()}


def allocated_peak(work: Callable[[], object]) -> int:
    """Bytes on the CPU that torch allocated during a call, at their peak, less what it freed of earlier ones."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def losses(words: int, rounds: int, precisions: list[str]) -> Figures:
    """By precision and variant: seconds, MB, and the distance of the gradients from the plain ones."""
    model, found = model_of(words), {}
    for precision in precisions:
        variants = passes(model, words, bf16=precision == "bf16")
        figures = {name: {"seconds": float("inf")} for name in variants}
        variants["plain"]()
        plain = model.lm_head.weight.grad
        assert plain is not None
        for name, take in variants.items():  # warms up, too
            take()
            gradient = model.lm_head.weight.grad
            assert gradient is not None
            figures[name]["error of the head's gradient"] = float((gradient - plain).norm() / plain.norm())
            del gradient
            model.zero_grad(set_to_none=True)
            figures[name]["MB"] = allocated_peak(take) / 1e6
        del plain
        for _ in range(rounds):
            for name, take in variants.items():
                started = time.perf_counter()
                take()
                figures[name]["seconds"] = min(figures[name]["seconds"], time.perf_counter() - started)
        for name, values in figures.items():
            values |= {f"{key} of plain": values[key] / figures["plain"][key] for key in ("seconds", "MB")}
            found[f"{precision}, {name}"] = values
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", type=Path, nargs="*", help="prepared datasets; without, one is synthesized")
    parser.add_argument("--words", type=int, default=128_256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast, too")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        synthetic = Path(folder) / "synthetic"
        if not arguments.datasets:
            synthesize(synthetic, users=1000, items=500, ratings=20_000)
        shares = paddings(arguments.datasets or [synthetic])
    precisions = ["fp32", "bf16"] if arguments.bf16 else ["fp32"]
    found = {"share of padding": shares, "loss": losses(arguments.words, arguments.rounds, precisions)}
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    for title, rows in found.items():
        print(f"{title}, {arguments.words:,} words" if title == "loss" else title)
        for name, values in rows.items():
            print(f"  {name:50}", "  ".join(f"{key} {value:.4g}" for key, value in values.items()))


if __name__ == "__main__":
    main()
