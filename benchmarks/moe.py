"""The MoE block against transformers' Mixtral block and a dense feed-forward network of the same total width.

    python benchmarks/moe.py [--threads 2] [--rounds 20] [--precision fp32] [--cpu] [--json]

Shape of SmolLM2-135M: hidden 576, 12 experts of 128, top 2, 3 gates; dense width 1536. Training is one forward and
backward pass of 8 x 96 tokens; decode is one forward pass of 1 or 16 rows of one token. Variants take turns within
each round, and the fastest rounds are compared, so that other work on the machine disturbs the ratios least.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from gavamoe.model.block import MultiGateMoe
from gavamoe.model.experts import MoeSpec

HIDDEN, EXPERTS, WIDTH, TOP_K, GATES = 576, 12, 128, 2, 3
TRAIN_ROWS, TRAIN_TOKENS = 8, 96
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
Forward = Callable[[Tensor], Tensor]


def dense_block() -> nn.Module:
    """A feed-forward network as wide as all experts together."""
    return LlamaMLP(LlamaConfig(hidden_size=HIDDEN, num_attention_heads=9, intermediate_size=EXPERTS * WIDTH))


def mixtral_block(kernel: str) -> nn.Module:
    """transformers' own block of the same size, with one gate."""
    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K,
        num_attention_heads=9, num_key_value_heads=3, hidden_act="silu", experts_implementation=kernel,
    )  # fmt: skip
    return MixtralSparseMoeBlock(config)


def gavamoe_block(kernel: str, shared: nn.Module | None = None) -> nn.Module:
    """Our block, with 3 gates."""
    spec = MoeSpec(
        hidden_size=HIDDEN, experts=EXPERTS, top_k=TOP_K, expert_size=WIDTH, gates=GATES, activation="silu", gated=True
    )
    return MultiGateMoe(PreTrainedConfig(experts_implementation=kernel), spec, shared)


def variants(dtype: torch.dtype) -> dict[str, tuple[nn.Module, Forward]]:
    """Name to module and to a function of hidden states alone."""
    modules: dict[str, nn.Module] = {"dense": dense_block()}
    for kernel in ("auto", "grouped_mm", "eager", "batched_mm"):
        modules[f"gavamoe {kernel}"] = gavamoe_block(kernel)
    modules["gavamoe auto + shared"] = gavamoe_block("auto", dense_block())
    for kernel in ("grouped_mm", "eager"):
        modules[f"mixtral {kernel}"] = mixtral_block(kernel)
    for module in modules.values():
        module.to(dtype)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.04)
    return {name: (module, _forward(module)) for name, module in modules.items()}


def _forward(module: nn.Module) -> Forward:
    if not isinstance(module, MultiGateMoe):
        return module
    return lambda hidden_BTD: module(hidden_BTD, torch.arange(hidden_BTD.shape[0]) % GATES)


def train_once(module: nn.Module, forward: Forward, hidden_BTD: Tensor) -> None:
    """One forward and backward pass, gradients of weights and input included."""
    module.zero_grad(set_to_none=True)
    forward(hidden_BTD.detach().requires_grad_()).float().pow(2).mean().backward()


@torch.no_grad()
def decode_once(_: nn.Module, forward: Forward, hidden_BTD: Tensor) -> None:
    """One forward pass."""
    forward(hidden_BTD)


def measure(rounds: int, dtype: torch.dtype, clock: Callable[[], float]) -> dict[str, dict[str, float]]:
    """Milliseconds of the fastest round by workload and variant."""
    torch.manual_seed(0)
    candidates = variants(dtype)
    workloads = {
        f"train {TRAIN_ROWS}x{TRAIN_TOKENS}": (train_once, (TRAIN_ROWS, TRAIN_TOKENS), 1),
        "decode 1": (decode_once, (1, 1), 20),
        "decode 16": (decode_once, (16, 1), 10),
    }
    results: dict[str, dict[str, float]] = {}
    for workload, (step, shape, repeats) in workloads.items():
        hidden_BTD = torch.randn(*shape, HIDDEN, dtype=dtype)
        times: dict[str, list[float]] = {name: [] for name in candidates}
        for turn in range(rounds + 1):  # the first round warms up
            for name, (module, forward) in candidates.items():
                if "batched" in name and step is train_once and turn > 1:
                    continue  # one round shows it: some 70 times slower than the others
                started = clock()
                for _ in range(repeats):
                    step(module, forward, hidden_BTD)
                if turn:
                    times[name].append((clock() - started) / repeats * 1000)
        results[workload] = {name: min(values) for name, values in times.items()}
    return results


def main() -> None:
    """Measure and print milliseconds, and the time of each variant relative to the dense one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--cpu", action="store_true", help="CPU seconds: for a busy machine, with --threads 1")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu else time.perf_counter
    results = measure(arguments.rounds, PRECISIONS[arguments.precision], clock)
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    for workload, times in results.items():
        print(f"\n{workload} ({arguments.precision}, {arguments.threads} threads)")
        for name, milliseconds in sorted(times.items(), key=lambda pair: pair[1]):
            to_dense, to_mixtral = times["dense"] / milliseconds, times["mixtral grouped_mm"] / milliseconds
            print(f"  {name:28} {milliseconds:9.3f} ms   speed: {to_dense:5.2f} x dense  {to_mixtral:5.2f} x mixtral")


if __name__ == "__main__":
    main()
