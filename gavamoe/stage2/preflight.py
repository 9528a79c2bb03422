"""What can be known to stop stage 2 before any training: a base model that doesn't fit, a disk that is too small.

Stage 1 may take hours, and an error after it that was there all along wastes them.
"""

import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from gavamoe.artifacts import remote
from gavamoe.artifacts.run import RunFolder
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError
from gavamoe.model.base_model import check_base, scratch_config
from gavamoe.model.build import weightless_explainer
from gavamoe.runtime.context import Context
from gavamoe.stage2.joint_model import stored_in_bf16

_FLOAT, _HALF = 4, 2
"""Bytes of a number in float32, as optimizer states and finished models are, and in bfloat16."""
_MOMENTS = 2
"""Numbers that Adam keeps for each trained weight."""
_KEPT = 2
"""Checkpoints that a training keeps; while another is written, it lies among the temporary files."""


@dataclass(frozen=True)
class Sizes:
    """The numbers of parameters of an explainer, adapters and tables of users and items included."""

    total: int
    trained: int
    """Those that get into the optimizer."""
    looked_up: int = 0
    """Numbers of sharded tables, which are no parameters, and lie in the artifact's files."""
    halved: int = 0
    """Those that precision bf16_weights stores as bfloat16."""


def check_base_model(config: RunConfig, users: int, items: int) -> Sizes:
    """Check that stage 2 can start from its base model, without building it.

    Raises:
        InputError: as `check_base`; the positions are too few for the prompts, or the experts don't fit the model.
    """
    stage2 = config.stage2
    if stage2.base_model == "scratch":
        base = scratch_config(stage2.scratch, stage2.scratch.vocabulary)
    else:
        base = check_base(stage2.base_model)
    check_positions(config, base)
    parameters = dict(weightless_explainer(config, base, users, items).named_parameters())
    sharded = config.stage1.tables == "sharded"
    return Sizes(
        looked_up=(users + items + 2) * config.stage1.embedding_size if sharded else 0,
        total=sum(parameter.numel() for parameter in parameters.values()),
        trained=sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad),
        halved=sum(parameter.numel() for name, parameter in parameters.items() if stored_in_bf16(name)),
    )


def check_base_model_task(*, context: Context, config: RunConfig, users: int, items: int) -> Sizes:
    """`check_base_model` as a Ray task: the model may lie on the workers' machines only."""
    del context
    return check_base_model(config, users, items)


def check_positions(config: RunConfig, base: PreTrainedConfig) -> None:
    """GPT-2's positions are a table: beyond its end there is nothing to look up.

    Raises:
        InputError: prompt and explanation may be longer than the base model's positions.
    """
    prompt, positions = config.stage2.prompt, base.max_position_embeddings
    answer = max(prompt.max_explanation_tokens, config.generation.max_new_tokens)
    if prompt.max_tokens + answer > positions:
        raise InputError(
            f"stage2.prompt: {prompt.max_tokens} + {answer} tokens of prompt and explanation are more than the"
            f" {positions} positions of the base model; lower max_tokens or max_explanation_tokens"
        )


def precision_warning(config: RunConfig) -> str | None:
    """What to say where bfloat16 makes training slower: a CPU without instructions for it (AVX-512 or AMX, on x86)
    converts every matrix to float32 and back. None elsewhere."""
    if config.stage2.precision == "fp32" or config.runtime.gpu or os.environ.get("RAY_ADDRESS"):
        return None
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "DEFAULT", "NO AVX"):
        return None
    return (
        "this machine's CPU has no instructions for bfloat16, which makes stage 2 several times slower than float32;"
        " --set stage2.precision=fp32"
    )


def scratch_warning(config: RunConfig, dataset: Dataset) -> str | None:
    """What to say where a model that knows no language is to learn it from people's own texts; None elsewhere.

    Texts that a grammar made, as those of `data synthesize`, are few enough words for it.
    """
    if config.stage2.base_model != "scratch" or dataset.truth() is not None or config.stage2.alpha == 1:
        return None
    return (
        f"base_model scratch learns English from {dataset.size('train'):,} rows alone, and writes poor sentences;"
        " the preset reviews starts from a pretrained language model"
    )


def check_disk(config: RunConfig, dataset: Dataset, folder: Path, sizes: Sizes) -> None:
    """Check that stage 2's checkpoints and the finished model have room on this machine.

    Args:
        folder: the run folder, which exists. What checkpoints of an earlier attempt take there counts as free.

    Raises:
        InputError: the disk of the run folder, or that of temporary files, has less room than they take.
    """
    checkpoint, model = checkpoint_bytes(config, sizes), _FLOAT * (sizes.total + sizes.looked_up)
    temporary = Path(tempfile.gettempdir())
    at_uri = remote.stored_path(folder) is not None  # its checkpoints go to the storage, past the staging folder
    needed = model if at_uri else model + kept_checkpoints(config, dataset) * checkpoint
    if folder.stat().st_dev == temporary.stat().st_dev:
        needed += checkpoint
    else:
        _check_room(temporary, checkpoint, 0, "a checkpoint of stage 2 needs", "set TMPDIR to a folder elsewhere")
    used = _size(RunFolder(folder).checkpoints("stage2"))
    what = "the checkpoints and the model of stage 2 need"
    _check_room(folder, needed, used, what, "or name a --run-dir elsewhere")


def checkpoint_bytes(config: RunConfig, sizes: Sizes) -> int:
    """Bytes of a checkpoint of stage 2: weights, optimizer states, the best state so far. Stage 1's own don't count."""
    stage2 = config.stage2
    weights = _FLOAT * sizes.total
    if stage2.precision == "bf16_weights":
        weights -= (_FLOAT - _HALF) * sizes.halved
    states = 2 if stage2.keep == "best" and stage2.alpha < 1 else 1
    copied = config.runtime.engine == "deepspeed" and stage2.zero_stage in (1, 2)  # ZeRO shards a second copy
    return states * weights + _FLOAT * (_MOMENTS + copied) * sizes.trained


def kept_checkpoints(config: RunConfig, dataset: Dataset) -> int:
    """Checkpoints of stage 2 that lie on the disk at the same time."""
    stage2 = config.stage2
    if stage2.checkpoint_minutes:
        return _KEPT
    rows = stage2.batch_size * stage2.gradient_accumulation * config.runtime.workers
    steps = stage2.epochs * (dataset.size("train") // rows)
    steps = min(steps, stage2.max_steps or steps)
    every = stage2.checkpoint_every or math.inf
    return min(_KEPT, max(1, math.ceil(steps / every)))


def _check_room(folder: Path, needed: int, used: int, what: str, way_out: str) -> None:
    free = shutil.disk_usage(folder).free + used
    if free < needed:
        raise InputError(
            f"{folder}: {free / 2**30:.1f} GiB are free, {what} about {needed / 2**30:.1f}; make room, {way_out}"
        )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
