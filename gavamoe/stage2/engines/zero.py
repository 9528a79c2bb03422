"""The engine of DeepSpeed: any number of workers, any ZeRO stage.

Checkpoints are files of torch, which hold pickles: they are loaded as tensors and plain values only (`weights_only`),
so that a checkpoint of somebody else's can't run code.
"""

import contextlib
import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from gavamoe.artifacts.tensor_files import not_only_tensors
from gavamoe.config.schema import Stage2Config
from gavamoe.stage2.batches import Batch
from gavamoe.stage2.engines.interface import moved, set_rates, state_on_cpu
from gavamoe.stage2.engines.settings import deepspeed_config
from gavamoe.stage2.joint_model import JointModel, Losses, mean_losses, parameter_groups
from gavamoe.stage2.schedule import Rates

_TAG = "engine"


class DeepSpeedEngine:
    """DeepSpeed at any ZeRO stage. With one worker and no process group it makes one for itself."""

    def __init__(self, module: JointModel, config: Stage2Config, *, world_size: int, device: str = "cpu") -> None:
        self.module = module
        self._device, self._stage = device, config.zero_stage
        self._sharing: Any = None
        self._owns_group = _join_group(world_size, device)
        self.rank: int = distributed.get_rank()
        self._linear = torch.nn.functional.linear  # ZeRO-3 replaces it for good
        with _output_to_stderr():
            import deepspeed

            deepspeed.logger.setLevel("WARNING")
            # An operation for inference only, which every first start would else compile: minutes, and a compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            self._deepspeed = deepspeed
            if config.expert_parallel > 1:
                from gavamoe.stage2.engines import expert_parallel

                self._sharing = expert_parallel
                expert_parallel.share_out_experts(module, config.expert_parallel, self.rank)
            # Both read the parameters' shapes, which sharding hides.
            settings = deepspeed_config(config, module, device=device, world_size=world_size)
            optimizer = self._make_optimizer(module, config)
            if config.zero_stage == 3:
                self._shard(module, settings)
            self._engine = deepspeed.initialize(
                model=module, optimizer=optimizer, config=settings, dist_init_required=False
            )[0]

    def _shard(self, module: JointModel, settings: dict[str, Any]) -> None:
        """Send rank 0's parameters to the devices one by one, and leave each worker its share of each. Left to itself,
        DeepSpeed would move the whole float32 model to every device first."""
        for parameter in module.read_outside_forward():
            self._deepspeed.zero.register_external_parameter(module, parameter)
        self._deepspeed.zero.Init(module=module, config_dict_or_path=settings)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(self._device)

    def _make_optimizer(self, module: JointModel, config: Stage2Config) -> torch.optim.Optimizer:
        groups = parameter_groups(module, config)
        if self._sharing:
            groups = self._sharing.expert_groups(groups)
        if config.offload_optimizer and self._device != "cpu":
            # Compiled at first use; the only Adam that is fast on states kept in host memory.
            cpu_adam: torch.optim.Optimizer = self._deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True)
            return cpu_adam
        return torch.optim.AdamW(groups, fused=True)

    def train_step(self, batches: Sequence[Batch], rates: Rates) -> Losses:
        self._set_mode(training=True)
        set_rates(self._engine.optimizer, rates)
        accumulated = []
        for batch in batches:
            losses = self._engine(**moved(batch, self._device))
            self._engine.backward(losses["loss"])
            self._engine.step()  # acts at the last of the accumulated batches
            accumulated.append(losses)
        return mean_losses(accumulated)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Losses:
        self._set_mode(training=False)
        losses: Losses = self._engine(**moved(batch, self._device))
        return losses

    def _set_mode(self, *, training: bool) -> None:
        """Switch between training and evaluation mode; at ZeRO-3 have the order of modules recorded again."""
        changes = self.module.training != training  # the engine's own flag never changes
        self._engine.train(training)
        if changes and self._stage == 3:
            # ZeRO-3 shards the weights and fetches them ahead of use, in the order of modules that it recorded in an
            # earlier pass (the trace). A validation runs another order: no ELBO, no backward pass. Where it begins
            # like the recorded one, DeepSpeed 0.19 doesn't notice the difference and fails in the next backward pass.
            # Invalidating the trace makes it record the new order; a trace that is invalid already must be left so.
            coordinator = self._engine.optimizer.parameter_offload.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()

    def save(self, folder: Path) -> None:
        (folder / _TAG).mkdir(parents=True, exist_ok=True)  # DeepSpeed makes it on rank 0 alone
        with self._plain_checkpoint():
            self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
        if self._sharing:
            self._sharing.save_experts(self.module, folder, self.rank)

    def load(self, folder: Path) -> None:
        with self._plain_checkpoint(), _tensors_only(folder):
            self._engine.load_checkpoint(str(folder), tag=_TAG)
        if self._sharing:
            self._sharing.load_experts(self.module, folder, self.rank)

    @contextlib.contextmanager
    def _plain_checkpoint(self) -> Iterator[None]:
        """Have DeepSpeed checkpoint the model like one without experts: its checkpoints of experts know the names of
        its own MoE layer only. They still hold each worker's optimizer states, but of the experts' weights rank 0's
        alone."""
        shared, self._engine.has_moe_layers = self._engine.has_moe_layers, False
        try:
            yield
        finally:
            self._engine.has_moe_layers = shared

    def state_dict(self, prefix: str = "", *, everywhere: bool = False) -> dict[str, Tensor]:
        wanted = everywhere or self.rank == 0
        if self._sharing:
            local = state_on_cpu(self.module, prefix) if wanted else {}
            state: dict[str, Tensor] = self._sharing.whole_state(self.module, local, prefix)
            return state
        if self._stage < 3:
            return state_on_cpu(self.module, prefix) if wanted else {}
        # Parameters that were fetched ahead for a step that has not come may still be on their way.
        self._engine.empty_partition_cache()
        # One parameter at a time: the whole model need not fit on a device.
        whole = self._deepspeed.zero.GatheredParameters
        return state_on_cpu(self.module, prefix, lambda tensor: whole([tensor]), wanted)

    def close(self) -> None:
        self._engine.destroy()
        torch.nn.functional.linear = self._linear
        if self._owns_group:
            self._deepspeed.comm.destroy_process_group()


def _join_group(world_size: int, device: str) -> bool:
    """Make sure that a process group exists; True if it was made here, which is for one worker only."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    if distributed.is_initialized():
        if distributed.get_world_size() != world_size:
            raise RuntimeError(f"a process group of {distributed.get_world_size()} exists, {world_size} wanted")
        return False
    if world_size > 1:
        raise RuntimeError(f"{world_size} workers need a process group before the engine is built")
    backend = "gloo" if device == "cpu" else "nccl"
    # A store in memory needs no port.
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    return True


@contextlib.contextmanager
def _tensors_only(folder: Path) -> Iterator[None]:
    """Have DeepSpeed, which would let `torch.load` run what a file says, load tensors, plain values and the few classes
    of its own that its states hold.

    Raises:
        InputError: a file holds anything else.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    load = torch.load

    def load_only(*arguments: Any, **options: Any) -> Any:
        return load(*arguments, **options | {"weights_only": True})

    torch.load = load_only
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    except pickle.UnpicklingError as error:
        raise not_only_tensors(folder, error) from error
    finally:
        torch.load = load


@contextlib.contextmanager
def _output_to_stderr() -> Iterator[None]:
    """DeepSpeed prints while it starts; standard output belongs to the commands' results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
