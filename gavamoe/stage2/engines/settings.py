"""DeepSpeed's configuration for ours: what is sharded, in buffers of which size, sent as what, beside what.

Inputs: `Stage2Config`, the joint model before it is sharded. Output: the dict that DeepSpeed takes.
"""

import sys
from typing import Any

import torch

from gavamoe.config.schema import Stage2Config
from gavamoe.stage2.joint_model import JointModel, largest_layer

MAX_BUCKET = 2 * 10**8
"""Numbers that ZeRO reduces or gathers at once; also the size of a buffer, so no larger than the model."""
LIVE_LAYERS = 2
"""Decoder layers that ZeRO-3 may hold whole at least: one that computes, and the next one on its way."""


def deepspeed_config(
    config: Stage2Config, module: JointModel, *, device: str = "cpu", world_size: int = 1
) -> dict[str, Any]:
    """DeepSpeed's configuration for ours.

    DeepSpeed's own bfloat16 mode is never on, since it casts every parameter: bf16 is autocast inside the model, over
    float32 weights, and bf16_weights comes with the model's parameters, of which some are bfloat16 (`JointModel`).
    ZeRO 1 and 2 keep float32 master weights of each group of parameters, whatever their own type is.
    """
    sizes = [parameter.numel() for parameter in module.parameters() if parameter.requires_grad]
    bucket = min(sum(sizes), max(MAX_BUCKET, max(sizes)))
    bucket += bucket % 2  # DeepSpeed refuses odd sizes of a bucket, not of a model
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": bucket,
        # Collectives beside the arithmetic, on a stream of their own, which a CPU has not.
        "overlap_comm": torch.device(device).type == "cuda" and config.zero_stage >= 1,
    }
    if config.zero_stage in (1, 2):
        zero["allgather_bucket_size"] = bucket
    if config.zero_stage == 3:
        layer = largest_layer(module.explainer)
        zero |= {
            "stage3_prefetch_bucket_size": max(bucket, layer),
            # Bounds what is fetched ahead: less than two layers, and nothing ever is.
            "stage3_max_live_parameters": live_parameters(layer),
            "stage3_max_reuse_distance": MAX_BUCKET,  # bounds what is kept: by default 10^9 numbers, 4 GB
        }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    settings = {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW: its fused kernel exists on CPU, DeepSpeed's does not
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
    }
    if sends_bf16(config.precision, world_size):
        settings["communication_data_type"] = "bf16"
    return settings


def live_parameters(layer: int) -> int:
    """Numbers that ZeRO-3 may hold whole at a time, for a model whose largest decoder layer has `layer` of them."""
    return max(MAX_BUCKET, LIVE_LAYERS * layer)


def sends_bf16(precision: str, world_size: int) -> bool:
    """Whether gradients travel as bfloat16, half the bytes: where they come of arithmetic that is no finer."""
    return precision != "fp32" and world_size > 1
