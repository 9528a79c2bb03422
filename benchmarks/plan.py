"""What `gavamoe plan` says against what runs here: memory of a training step, and bytes sent, by ZeRO stage.

    python benchmarks/plan.py [--workers 1 2] [--json]

A LLaMA of 47 million parameters with experts (float32, 8 x 96 tokens, joint loss) takes three optimizer steps of two
accumulated batches in processes of its own. Memory is the peak of the process above what it had before the model was
built. Bytes are counted at torch.distributed's functions: each call counts its largest tensor, times the share
that a ring algorithm sends. Everything runs on the CPU with gloo; a GPU adds NCCL's and the allocator's own.
"""

import argparse
import functools
import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing
from transformers import AutoModelForCausalLM, LlamaConfig

from gavamoe.config.files import parse_config
from gavamoe.config.schema import RunConfig
from gavamoe.model.build import build_explainer
from gavamoe.model.conversion import ExplainerSizes
from gavamoe.plan.estimate import own_scheme, scheme_memory
from gavamoe.plan.memory import run_shape
from gavamoe.plan.parameters import RATING_SCALE, draw
from gavamoe.plan.work import step_traffic
from gavamoe.stage1.vae_gmm import VaeGmm
from gavamoe.stage2.engines import settings
from gavamoe.stage2.joint_model import JointModel
from gavamoe.stage2.schedule import PEAK
from gavamoe.stage2.training_engines import make_engine

USERS, ITEMS, STEPS = 3000, 2000, 3
BASE: dict[str, Any] = {
    "vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "stage1": {"embedding_size": 128, "latent_size": 32, "encoder_heads": 4, "encoder_feedforward": 256},
    "stage2": {
        "experts": {"count": 8, "top_k": 2, "intermediate_size": 256},
        "prompt": {"max_tokens": 64, "max_explanation_tokens": 32},
        "batch_size": 8, "gradient_accumulation": 2,
    },
}  # fmt: skip
RING = {"all_reduce": 2.0, "all_gather": 1.0, "all_gather_into_tensor": 1.0, "reduce_scatter_tensor": 1.0}
"""What a collective sends: this x (N - 1) / N x its largest tensor."""
OTHER = ("broadcast", "reduce", "reduce_scatter", "all_to_all", "all_to_all_single", "gather", "scatter", "send")
"""Collectives that no ZeRO stage is expected to use in a step."""


def run_config(**stage2: Any) -> RunConfig:
    """The benchmark's config with fields of stage 2 changed."""
    return parse_config({**CONFIG, "stage2": CONFIG["stage2"] | stage2}, "benchmark")


def planned(config: RunConfig, workers: int, base: dict[str, Any] | None = None) -> dict[str, float]:
    """Bytes by the plan: memory of one device, and sent by it in one step."""
    blueprint = draw(config, LlamaConfig(**(base or BASE)), USERS, ITEMS)
    stage2, scheme = config.stage2, own_scheme(config, workers)
    memory = scheme_memory(config, blueprint, scheme, checkpointing=stage2.gradient_checkpointing)
    sent = step_traffic(
        blueprint, scheme, stage2.gradient_accumulation, run_shape(config), stage2.gradient_checkpointing
    )
    return {"memory": memory.device, "sent": sent.total}


def measure(
    config: RunConfig, workers: int, base: dict[str, Any] | None = None, bucket: int | None = None
) -> dict[str, float]:
    """The same of rank 0 as it runs; and "unexpected", bytes of collectives that the plan does not know.

    `bucket`: numbers that ZeRO handles at once and keeps live; a small value makes a small model behave as a large one.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (workers, config, base or BASE, folder, bucket)
        # Freed tensors go back to the system at once: what is resident is what is in use.
        os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        # oneDNN's compiled products are a CPU's own, a quarter of a megabyte each, and not the model's.
        os.environ["DNNL_PRIMITIVE_CACHE_CAPACITY"] = "0"
        multiprocessing.spawn(_worker, arguments, nprocs=workers)
        found: dict[str, float] = json.loads((Path(folder) / "found.json").read_text())
        return found


def _worker(rank: int, workers: int, config: RunConfig, base: dict[str, Any], folder: str, bucket: int | None) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    settings.MAX_BUCKET = bucket or settings.MAX_BUCKET
    counts: Counter[str] = Counter()
    _count_bytes(counts)
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(f"{folder}/store", workers), rank=rank, world_size=workers
    )
    import deepspeed  # its import is not the model's memory

    del deepspeed
    batch = _batch(config, base)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    engine = make_engine("deepspeed", _model(config, base), config.stage2, world_size=workers, device="cpu")
    for _ in range(STEPS):
        counts.clear()
        engine.train_step([batch] * config.stage2.gradient_accumulation, PEAK)
    if rank == 0:
        ring = (workers - 1) / workers
        found = {
            "memory": _resident("VmHWM") - before,
            "sent": sum(RING.get(name, 0) * ring * size for name, size in counts.items()),
            "unexpected": sum(size for name, size in counts.items() if name not in RING),
        }
        (Path(folder) / "found.json").write_text(json.dumps(found))
    distributed.barrier()
    engine.close()


def _model(config: RunConfig, base: dict[str, Any]) -> JointModel:
    torch.manual_seed(config.seed)
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**base))
    vae_gmm = VaeGmm(config.stage1, USERS, ITEMS, "categorical", RATING_SCALE)
    explainer = build_explainer(config, dense, ExplainerSizes(USERS, ITEMS, config.stage1.embedding_size, config.gates))
    if config.stage2.gradient_checkpointing:
        explainer.activation_checkpointing_enable()
    model = JointModel(explainer, vae_gmm, config.stage2.alpha, bf16=config.stage2.precision == "bf16")
    if config.stage2.precision == "bf16_weights":
        model.store_in_bf16()
    return model


def _batch(config: RunConfig, base: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The longest batch that the config allows, every position scored."""
    shape = run_shape(config)
    ids = torch.randint(0, base["vocab_size"], (shape.rows, shape.tokens))
    pairs = -(-config.stage2.elbo_batch_size // config.stage2.gradient_accumulation)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.clone(),
        "cluster_ids": torch.arange(shape.rows) % config.gates,
        "label_count": torch.tensor(float(ids.numel())),
        "users": torch.arange(pairs) % USERS,
        "items": torch.arange(pairs) % ITEMS,
        "ratings": torch.ones(pairs),
    }


def _count_bytes(counts: Counter[str]) -> None:
    """Make torch's collectives add their largest argument's bytes to `counts`."""
    for name in (*RING, *OTHER):
        original = getattr(distributed, name)

        @functools.wraps(original)
        def counted(*args: Any, _original: Any = original, _name: str = name, **kwargs: Any) -> Any:
            counts[_name] += max([_bytes(value) for value in (*args, *kwargs.values())], default=0)
            return _original(*args, **kwargs)

        setattr(distributed, name, counted)


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def _resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{field}: not in /proc/self/status; this benchmark needs Linux")


def main() -> None:
    """Measure and print megabytes, and the plan's as a ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = []
    for workers in arguments.workers:
        for stage, again, precision in (
            (0, False, "fp32"), (1, False, "fp32"), (2, False, "fp32"), (3, False, "fp32"), (1, True, "fp32"),
            (1, False, "bf16"), (1, True, "bf16"),
        ):  # fmt: skip
            config = run_config(zero_stage=stage, gradient_checkpointing=again, precision=precision)
            row = {"workers": workers, "zero": stage, "checkpointing": again, "precision": precision}
            results.append(row | {"planned": planned(config, workers), "measured": measure(config, workers)})
            if not arguments.json:
                _print(results[-1])
    if arguments.json:
        print(json.dumps(results, indent=2))


def _print(row: dict[str, Any]) -> None:
    ours, real = row["planned"], row["measured"]
    sent = f"sent {real['sent'] / 1e6:7.1f} MB, plan {ours['sent'] / real['sent']:.3f} x" if real["sent"] else ""
    print(
        f"{row['workers']} workers, ZeRO-{row['zero']}, {row['precision']}{', checkpointing' * row['checkpointing']:15}"
        f" memory {real['memory'] / 1e6:7.0f} MB, plan {ours['memory'] / real['memory']:.3f} x   {sent}",
        flush=True,
    )


if __name__ == "__main__":
    main()
