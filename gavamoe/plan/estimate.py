"""`gavamoe plan`: the cost of a config, estimated before anything runs. No weight is loaded or made.

Input: a config, the workload (a dataset or its sizes), the hardware. Output: a plain dict of numbers, for
`gavamoe.cli.output.plan` and `--json`. The formulas are in `memory` and `work`, the counts in `parameters`.
"""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import open_dataset
from gavamoe.errors import InputError
from gavamoe.model.base_config import base_shape
from gavamoe.plan.memory import USABLE, Head, Memory, Scheme, Shape, activations, run_shape, schemes, states
from gavamoe.plan.parameters import Blueprint, draw
from gavamoe.plan.stage1_tables import Hardware, Workload, plan_stage1
from gavamoe.plan.work import (
    FLOAT32_SHARE,
    Traffic,
    head_trained,
    memory_traffic,
    pair_cost,
    row_flops,
    step_traffic,
)
from gavamoe.stage2.clear_texts import training_rows
from gavamoe.stage2.preflight import Sizes, checkpoint_bytes
from gavamoe.stage2.tokenized_rows import encode_rows, prompt_builder

SAMPLE = 2000
"""Rows that are tokenized to measure the mean lengths of prompts and answers."""
_LIMITS = {"users": 1e12, "items": 1e12, "rows": 1e12, "utilization": 1.0}


def make_plan(
    config: RunConfig, workload: Workload, hardware: Hardware, base_config: Path | None = None
) -> dict[str, Any]:
    """Everything that `gavamoe plan` prints, in bytes, seconds, FLOPs and counts.

    Raises:
        InputError: impossible sizes, or a base model whose config can't be found.
    """
    _check(config, workload, hardware)
    base = base_shape(config.stage2, base_config)
    blueprint = draw(config, base, workload.users, workload.items)
    return {
        "base_model": config.stage2.base_model if base_config is None else str(base_config),
        "workload": asdict(workload),
        "hardware": asdict(hardware),
        "parameters": _parameters(blueprint),
        "memory": _memory(config, blueprint, hardware),
        "training": _training(config, blueprint, workload, hardware),
        "traffic": _traffic(config, blueprint, hardware),
        "stage1": plan_stage1(config, workload, hardware),
    }


def measure_dataset(
    config: RunConfig, dataset: Path, lengths: tuple[float, float]
) -> tuple[int, int, int, tuple[float, float]]:
    """Known users and items, training rows with a text, and mean tokens of prompt and answer.

    Args:
        lengths: mean tokens of prompt and answer to return where the base model's tokenizer can't be loaded.
    """
    data = open_dataset(dataset)
    rows = training_rows(config, data)
    chosen = np.sort(np.random.default_rng(config.seed).permutation(rows)[:SAMPLE])
    try:
        builder = prompt_builder(config, data)
    except InputError:
        pass
    else:
        sample = encode_rows(builder, data, "train", chosen)
        lengths = (float(sample.prompts.lengths.mean()), float(sample.answers.lengths.mean()))
    catalog = data.catalog
    return catalog.known_users, catalog.known_items, len(rows), lengths


def _check(config: RunConfig, workload: Workload, hardware: Hardware) -> None:
    for name, value in asdict(workload).items() | asdict(hardware).items():
        limit = _LIMITS.get(name, math.inf)
        if not 0 < value <= limit:
            raise InputError(f"{name.replace('_', '-')}: {value} is not between 0 and {limit:g}")
    shared = config.stage2.expert_parallel
    if hardware.devices % shared:
        raise InputError(f"--devices {hardware.devices}: not a multiple of stage2.expert_parallel {shared}")


def _parameters(blueprint: Blueprint) -> dict[str, Any]:
    parts = {name: asdict(part) for name, part in blueprint.parts.items()}
    return {"parts": parts, "explainer": asdict(blueprint.explainer), "all": asdict(blueprint.whole)}


def own_scheme(config: RunConfig, devices: int) -> Scheme:
    """The scheme that the config itself asks for, on this many devices."""
    stage2 = config.stage2
    return Scheme(
        stage2.zero_stage,
        stage2.offload_optimizer,
        stage2.offload_parameters,
        devices,
        stage2.expert_parallel,
        stage2.precision,
        overlap=config.runtime.gpu,
    )


def scheme_memory(config: RunConfig, blueprint: Blueprint, scheme: Scheme, *, checkpointing: bool) -> Memory:
    """Peak memory of stage 2 on one device, at the longest batch that is possible."""
    sharded = states(blueprint, scheme)
    alone = scheme.zero_stage < 2 and config.stage2.gradient_accumulation == 1
    head = Head(head_trained(blueprint), apart=not alone)
    kept = activations(
        blueprint.config, run_shape(config), config.stage2.precision, checkpointing=checkpointing, head=head
    )
    if config.stage2.alpha:
        kept += pair_cost(config.stage1).activations * _elbo_pairs(config)
    return Memory(**{**asdict(sharded), "activations": kept})


def _elbo_pairs(config: RunConfig) -> int:
    """Stage-1 pairs of one forward pass."""
    return -(-config.stage2.elbo_batch_size // config.stage2.gradient_accumulation)


def _memory(config: RunConfig, blueprint: Blueprint, hardware: Hardware) -> list[dict[str, Any]]:
    configured = own_scheme(config, hardware.devices)
    rows = []
    choices = schemes(configured)
    for scheme in choices if configured in choices else [*choices, configured]:
        row: dict[str, Any] = {"scheme": scheme.title, "own": scheme == configured}
        for name, checkpointing in (("plain", False), ("checkpointed", True)):
            memory = scheme_memory(config, blueprint, scheme, checkpointing=checkpointing)
            row[name] = asdict(memory) | {
                "device": memory.device,
                "fits": memory.device <= USABLE * hardware.memory,
                "own": scheme == configured and checkpointing == config.stage2.gradient_checkpointing,
            }
        rows.append(row)
    return rows


def _training(config: RunConfig, blueprint: Blueprint, workload: Workload, hardware: Hardware) -> dict[str, Any]:
    stage2 = config.stage2
    shape = Shape(1, round(workload.prompt_tokens + workload.answer_tokens), round(workload.answer_tokens))
    flops = row_flops(blueprint, shape, checkpointing=stage2.gradient_checkpointing)
    rows = stage2.batch_size * stage2.gradient_accumulation * hardware.devices
    steps = -(-workload.rows // rows)
    pairs = _elbo_pairs(config) * stage2.gradient_accumulation * hardware.devices if stage2.alpha else 0
    step_flops = rows * flops.total
    elbo_flops = pairs * pair_cost(config.stage1).flops
    rate = hardware.devices * hardware.flops * hardware.utilization
    seconds = step_flops / (rate * FLOAT32_SHARE if stage2.precision == "fp32" else rate) + elbo_flops / (
        rate * FLOAT32_SHARE
    )
    scheme = own_scheme(config, hardware.devices)
    sending = _step_traffic(config, blueprint, scheme).total / hardware.bandwidth
    moved = memory_traffic(blueprint, scheme, stage2.gradient_accumulation, stage2.gradient_checkpointing)
    step = {"compute": seconds, "memory": moved / hardware.memory_bandwidth, "communication": sending}
    planned = stage2.epochs * steps
    total = min(planned, stage2.max_steps or planned)
    whole = {name: total * each for name, each in step.items()}
    sizes = Sizes(blueprint.whole.total, blueprint.whole.trained, blueprint.halved.total)
    return {
        "rows_per_step": rows,
        "steps_per_epoch": steps,
        "steps": total,
        "tokens_per_epoch": workload.rows * (workload.prompt_tokens + workload.answer_tokens),
        "flops_per_row": asdict(flops),
        "flops_per_step": step_flops + elbo_flops,
        "flops_per_epoch": steps * (step_flops + elbo_flops),
        "step_seconds": step,
        "epoch_seconds": {name: steps * each for name, each in step.items()},
        "seconds": whole,
        "checkpoints": _checkpoints(config, total, sum(whole.values())),
        "checkpoint_bytes": checkpoint_bytes(config, sizes),
    }


def _checkpoints(config: RunConfig, steps: int, seconds: float) -> int:
    """Checkpoints of a run of so many steps and seconds."""
    stage2 = config.stage2
    by_the_clock = int(seconds / (60 * stage2.checkpoint_minutes)) if stage2.checkpoint_minutes else 0
    return math.ceil(steps / (stage2.checkpoint_every or steps)) + by_the_clock


def _traffic(config: RunConfig, blueprint: Blueprint, hardware: Hardware) -> list[dict[str, Any]]:
    by_scheme = []
    for scheme in schemes(own_scheme(config, hardware.devices)):
        if scheme.offload_optimizer:
            continue  # what is on the host does not travel between devices
        traffic = _step_traffic(config, blueprint, scheme)
        by_scheme.append({"scheme": scheme.title, **asdict(traffic), "total": traffic.total})
    return by_scheme


def _step_traffic(config: RunConfig, blueprint: Blueprint, scheme: Scheme) -> Traffic:
    stage2 = config.stage2
    return step_traffic(
        blueprint, scheme, stage2.gradient_accumulation, run_shape(config), stage2.gradient_checkpointing
    )
