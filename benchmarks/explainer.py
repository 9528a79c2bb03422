"""The whole explainer against its dense base model: training and generation speed, as ratios of one run.

    python benchmarks/explainer.py [--threads 2] [--rounds 3] [--new-tokens 24] [--only write] [--cpu] [--profile]

Shape of SmolLM2-135M with random weights (speed does not depend on their values): 30 layers, hidden 576, dense width
1536, vocabulary 49,152; 12 experts of 128, top 2, 3 gates. Training is one forward and backward pass of rows of 96
tokens, all of them scored, in float32 and under bfloat16 autocast (`stage2.precision`). Generation is greedy with a
key-value cache, after prompts of 48 tokens; new tokens of all rows per second are counted, prefill included. Variants
take turns within each round, and the fastest rounds are compared, so that other work disturbs the ratios least.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from gavamoe.config.files import parse_config
from gavamoe.model.build import build_explainer
from gavamoe.model.conversion import ExplainerSizes
from gavamoe.model.explainer import GavamoeForCausalLM

os.environ["DNNL_PRIMITIVE_CACHE_CAPACITY"] = "8192"  # as `runtime.ray_train` sets it for workers; read at first use
USERS, ITEMS, SLOT, GATES, TOKENS, PROMPT = 100, 100, 64, 3, 96, 48
TRAIN_ROWS, WRITE_ROWS = (1, 8), (1, 16)
Step = Callable[[GavamoeForCausalLM, int], None]


def smollm2_shape() -> LlamaConfig:
    """SmolLM2-135M's sizes."""
    return LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def variants(kernel: str) -> dict[str, GavamoeForCausalLM]:
    """The same class without experts, and with both ways to keep the pretrained feed-forward network."""
    conversions = {
        "dense": ["stage2.experts.enabled=false"],
        "split": ["stage2.experts.conversion=split"],
        "shared": ["stage2.experts.conversion=shared"],
    }
    models = {}
    for name, values in conversions.items():
        values.append(f"stage2.experts.implementation={kernel}")
        torch.manual_seed(0)
        base = LlamaForCausalLM(smollm2_shape())
        model = build_explainer(parse_config({}, "benchmark", values), base, ExplainerSizes(USERS, ITEMS, SLOT, GATES))
        for parameter in model.parameters():  # experts that start at zero would not be slower, but say so
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        models[name] = model
    return models


def rows_of(count: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids (B, T) and cluster ids (B,)."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(1, 49152, (count, tokens), generator=generator), torch.arange(count) % GATES


def trainer(*, bf16: bool) -> Step:
    """One forward and backward pass, as stage 2 takes it."""

    def train(model: GavamoeForCausalLM, rows: int) -> None:
        ids_BT, cluster_B = rows_of(rows, TOKENS)
        model.train()
        model.set_attn_implementation("eager")  # as stage 2 does for short rows on a CPU
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
            loss = model(input_ids=ids_BT, labels=ids_BT, cluster_ids=cluster_B, use_cache=False).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    return train


def writer(new_tokens: int) -> Step:
    """Greedy generation of exactly `new_tokens` per row."""
    options = GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, eos_token_id=0, pad_token_id=0
    )

    def write(model: GavamoeForCausalLM, rows: int) -> None:
        ids_BT, cluster_B = rows_of(rows, PROMPT)
        model.set_attn_implementation("sdpa")
        model.eval().generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), cluster_ids=cluster_B, generation_config=options
        )

    return write


def measure(
    models: dict[str, GavamoeForCausalLM], only: str, rounds: int, new_tokens: int, clock: Callable[[], float]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Each workload's name, with samples or tokens per second of the fastest round by variant."""
    workloads: dict[str, tuple[Step, int, int]] = {
        **{f"train {rows}x{TOKENS} fp32": (trainer(bf16=False), rows, rows) for rows in TRAIN_ROWS},
        **{f"train {rows}x{TOKENS} bf16": (trainer(bf16=True), rows, rows) for rows in TRAIN_ROWS},
        **{f"write {rows}x{new_tokens}": (writer(new_tokens), rows, rows * new_tokens) for rows in WRITE_ROWS},
    }
    for workload, (step, rows, amount) in workloads.items():
        if only not in workload:
            continue
        fastest = dict.fromkeys(models, float("inf"))
        for turn in range(rounds + 1):  # the first round warms up
            for name, model in models.items():
                started = clock()
                step(model, rows)
                if turn:
                    fastest[name] = min(fastest[name], clock() - started)
        yield workload, {name: amount / seconds for name, seconds in fastest.items()}


def profile(models: dict[str, GavamoeForCausalLM], new_tokens: int) -> None:
    """Where each variant's time goes, by operator."""
    for workload, step, rows in (("train", trainer(bf16=False), 8), ("write", writer(new_tokens), 16)):
        for name, model in models.items():
            step(model, rows)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                step(model, rows)
            table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40)
            print(f"\n== {workload} {rows} rows, {name}\n{table}")


def main() -> None:
    """Measure and print rates, relative to the dense model's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--only", default="", help="workloads whose name contains this, such as write or fp32")
    parser.add_argument("--kernel", default="auto", help="expert kernel (stage2.experts.implementation)")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds: for a busy machine, with --threads 1")
    parser.add_argument("--profile", action="store_true", help="operators by time instead of rates")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = variants(arguments.kernel)
    if arguments.profile:
        profile(models, arguments.new_tokens)
        return
    clock = time.process_time if arguments.cpu else time.perf_counter
    found = measure(models, arguments.only, arguments.rounds, arguments.new_tokens, clock)
    if arguments.json:
        print(json.dumps(dict(found), indent=2))
        return
    print(f"kernel {arguments.kernel}, {arguments.threads} threads")
    for workload, rates in found:
        print_rates(workload, rates)


def print_rates(workload: str, rates: dict[str, float]) -> None:
    """One workload's table."""
    kind = workload.split()[0]
    unit = "samples/s" if kind == "train" else "tokens/s"
    print(f"\n{workload}")
    for name, rate in rates.items():
        print(f"  {name:8} {rate:8.2f} {unit:9}  {rate / rates['dense']:5.2f} x dense", flush=True)


if __name__ == "__main__":
    main()
