"""Training engines, which take optimizer steps: DeepSpeed on any number of workers, or plain torch on one, with one
interface.

Inputs: a `JointModel`, `Stage2Config`, batches as dicts of tensors. Outputs: losses, checkpoints, the consolidated
state. `make_engine` picks one. Losses, clipping, accumulation and rates mean the same in both: gradients are means over
the accumulated batches and the workers, clipped by their joint norm, then AdamW.

Checkpoints are files of torch, which hold pickles: they are loaded as tensors and plain values only (`weights_only`),
so that a checkpoint of somebody else's can't run code.
"""

import contextlib
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

from gavamoe.artifacts.tensor_files import load_tensors, not_only_tensors
from gavamoe.config.schema import Stage2Config
from gavamoe.errors import InputError
from gavamoe.stage2.batches import Batch
from gavamoe.stage2.joint_model import JointModel, Losses, mean_losses, parameter_groups
from gavamoe.stage2.schedule import Rates

_TAG = "engine"
_TORCH_FILE = "engine.pt"
_MAX_BUCKET = 2 * 10**8
"""Elements that ZeRO reduces or gathers at once; also the size of a buffer, so no larger than the model."""


class Engine(Protocol):
    """The interface of a training engine, as the loop sees it."""

    module: JointModel

    def train_step(self, batches: Sequence[Batch], rates: Rates) -> Losses:
        """One optimizer step over accumulated batches, at these shares of each group's peak learning rate."""

    def evaluate(self, batch: Batch) -> Losses:
        """Losses without gradients, in evaluation mode."""

    def save(self, folder: Path) -> None:
        """Write everything that resuming needs; every rank calls it, each may give a folder of its own."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, from one folder with all ranks' files."""

    def state_dict(self, prefix: str = "", *, everywhere: bool = False) -> dict[str, Tensor]:
        """The module's whole state on the CPU, names that start with `prefix`; empty on ranks above 0
        unless `everywhere`. Every rank calls it."""

    def close(self) -> None:
        """Release what the engine set up for itself."""


def make_engine(kind: str, module: JointModel, config: Stage2Config, *, world_size: int, device: str) -> Engine:
    """Build the engine `kind` ("deepspeed" or "torch") around `module`, which moves to `device`."""
    if kind == "deepspeed":
        return DeepSpeedEngine(module, config, world_size=world_size, device=device)
    if world_size > 1:
        raise InputError(f"runtime.engine: torch runs one worker, not {world_size}; use deepspeed")
    return TorchEngine(module, config, device=device)


class TorchEngine:
    """One process, no ZeRO: for tests, and machines without a compiler."""

    def __init__(self, module: JointModel, config: Stage2Config, *, device: str = "cpu") -> None:
        self.module = module.to(device)
        self._device, self._clip = device, config.clip_norm
        self._optimizer = torch.optim.AdamW(parameter_groups(module, config), fused=True)
        self._trainable = [p for p in module.parameters() if p.requires_grad]

    def train_step(self, batches: Sequence[Batch], rates: Rates) -> Losses:
        self.module.train()
        _set_rates(self._optimizer, rates)
        accumulated = []
        for batch in batches:
            losses = self.module(**_moved(batch, self._device))
            (losses["loss"] / len(batches)).backward()
            accumulated.append(losses)
        torch.nn.utils.clip_grad_norm_(self._trainable, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return mean_losses(accumulated)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Losses:
        self.module.eval()
        losses: Losses = self.module(**_moved(batch, self._device))
        return losses

    def save(self, folder: Path) -> None:
        state = {"module": self.module.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save(state, folder / _TORCH_FILE)

    def load(self, folder: Path) -> None:
        state = load_tensors(folder / _TORCH_FILE, self._device)
        self.module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])

    def state_dict(self, prefix: str = "", *, everywhere: bool = False) -> dict[str, Tensor]:
        del everywhere  # there is one rank
        return _on_cpu(self.module, prefix)

    def close(self) -> None:
        pass


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
                from gavamoe.stage2 import expert_parallel

                self._sharing = expert_parallel
                expert_parallel.share_out_experts(module, config.expert_parallel, self.rank)
            if config.zero_stage == 3:
                for parameter in module.read_outside_forward():
                    deepspeed.zero.register_external_parameter(module, parameter)
            self._engine = deepspeed.initialize(
                model=module,
                optimizer=self._make_optimizer(module, config),
                config=deepspeed_config(config, module),
                dist_init_required=False,
            )[0]

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
        _set_rates(self._engine.optimizer, rates)
        accumulated = []
        for batch in batches:
            losses = self._engine(**_moved(batch, self._device))
            self._engine.backward(losses["loss"])
            self._engine.step()  # acts at the last of the accumulated batches
            accumulated.append(losses)
        return mean_losses(accumulated)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Losses:
        self._set_mode(training=False)
        losses: Losses = self._engine(**_moved(batch, self._device))
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
            local = _on_cpu(self.module, prefix) if wanted else {}
            state: dict[str, Tensor] = self._sharing.whole_state(self.module, local, prefix)
            return state
        if self._stage < 3:
            return _on_cpu(self.module, prefix) if wanted else {}
        # Parameters that were fetched ahead for a step that has not come may still be on their way.
        self._engine.empty_partition_cache()
        # One parameter at a time: the whole model need not fit on a device.
        return _on_cpu(self.module, prefix, lambda tensor: self._deepspeed.zero.GatheredParameters([tensor]), wanted)

    def close(self) -> None:
        self._engine.destroy()
        torch.nn.functional.linear = self._linear
        if self._owns_group:
            self._deepspeed.comm.destroy_process_group()


def deepspeed_config(config: Stage2Config, module: JointModel) -> dict[str, Any]:
    """DeepSpeed's configuration for ours. bf16 is autocast inside the model, over float32 weights, in both engines."""
    sizes = [parameter.numel() for parameter in module.parameters() if parameter.requires_grad]
    bucket = min(sum(sizes), max(_MAX_BUCKET, max(sizes)))
    bucket += bucket % 2  # DeepSpeed refuses odd sizes of a bucket, not of a model
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": bucket, "overlap_comm": False}
    if config.zero_stage in (1, 2):
        zero["allgather_bucket_size"] = bucket
    if config.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_live_parameters": _MAX_BUCKET,  # bounds what is fetched ahead,
            "stage3_max_reuse_distance": _MAX_BUCKET,  # and this what is kept: by default 10^9 numbers, 4 GB
        }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW: its fused kernel exists on CPU, DeepSpeed's does not
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
    }


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


def _set_rates(optimizer: Any, rates: Rates) -> None:
    for group in optimizer.param_groups:
        group["lr"] = (rates.routed if group["routed"] else rates.shared) * group["peak_lr"]


def _moved(batch: Batch, device: str) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _on_cpu(
    module: torch.nn.Module,
    prefix: str,
    gathered: Callable[[Tensor], contextlib.AbstractContextManager[Any]] | None = None,
    wanted: bool = True,
) -> dict[str, Tensor]:
    """Copies of a module's state; one tensor under two names stays one tensor.

    `gathered` makes a sharded parameter whole while its context lasts; all ranks must enter it, `wanted` or not.
    """
    copies: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not name.startswith(prefix):
            continue
        if id(tensor) not in copies:
            sharded = gathered is not None and hasattr(tensor, "ds_id")
            with gathered(tensor) if gathered is not None and sharded else contextlib.nullcontext():
                copies[id(tensor)] = tensor.detach().to("cpu", copy=True) if wanted else tensor
        if wanted:
            state[name] = copies[id(tensor)]
    return state
