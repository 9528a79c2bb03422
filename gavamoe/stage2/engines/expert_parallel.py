"""Expert parallelism (`stage2.expert_parallel`): each worker holds a part of every block's experts, and tokens go to
their experts by all-to-all.

`share_out_experts` replaces the experts of all blocks by the worker's own part, before DeepSpeed sees the model;
`expert_groups` gives the optimizer what DeepSpeed needs to know of them; `whole_state` undoes the sharing for export;
`save_experts` and `load_experts` keep each worker's part beside DeepSpeed's checkpoint.

Groups, the averaging of gradients and the joint clipping norm are DeepSpeed's (ZeRO 1 and 2), routing and arithmetic
are `gavamoe.model`'s. docs/stage2.md says why DeepSpeed's own MoE layer is not used.
"""

from pathlib import Path
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import groups
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from gavamoe.model.block import MultiGateMoe


class ParallelExperts(MoE):
    """A block's experts, of which this worker holds L; called like the plain experts, it returns the same output.

    A `MoE` so that DeepSpeed's engine treats the parameters as experts; nothing else of that class is used.
    """

    def __init__(self, experts: Any, workers: int, rank: int) -> None:
        """Take `experts` over, and keep only this worker's part of their parameters.

        Args:
            experts: X experts as stacked weights (X, ...), a module of `gavamoe.model.experts`.
            workers: W, a divisor of X; consecutive ranks share a set of experts.
            rank: this worker's rank in the whole run.
        """
        nn.Module.__init__(self)
        self.num_experts, self.workers = experts.num_experts, workers
        self.expert_group_name = f"ep_size_{workers}"
        self.group: Any = None
        self.local = experts
        experts.num_experts = count = self.num_experts // workers
        first = rank % workers * count
        for name, parameter in list(experts.named_parameters()):
            local = nn.Parameter(parameter.detach()[first : first + count].clone(), parameter.requires_grad)
            vars(local).update(allreduce=False, group_name=self.expert_group_name)  # DeepSpeed's marks of an expert
            setattr(experts, name, local)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by DeepSpeed's engine when process groups can be made."""
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.workers, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )
        self.group = groups._get_expert_parallel_group(self.expert_group_name)

    def forward(self, hidden_MD: Tensor, experts_MS: Tensor, weights_MS: Tensor) -> Tensor:
        """Eq. 11, each assignment computed where its expert is; all workers of the group call it equally often."""
        # 1. Sort the assignments by expert, and so by worker; tell every worker how many rows to expect for each of
        #    its experts, since all-to-all needs the sizes first.
        expert_P = experts_MS.flatten()
        order_P = expert_P.argsort(stable=True)
        #    This is the one place where a layer waits for its device: nothing else here depends on what numbers are.
        sent_X = expert_P.new_zeros(self.num_experts).index_add_(0, expert_P, torch.ones_like(expert_P))
        arriving_X = torch.empty_like(sent_X)
        distributed.all_to_all_single(arriving_X, sent_X, group=self.group)
        sent_W, arriving_W = torch.stack([sent_X, arriving_X]).view(2, self.workers, -1).sum(2).tolist()

        # 2. Send the hidden states, and run the local experts on what arrives: from each worker in turn, by expert.
        token_P = order_P // experts_MS.shape[1]
        arrived_QD = _Exchange.apply(_as_computed(hidden_MD)[token_P], sent_W, arriving_W, self.group)
        local_L = torch.arange(self.local.num_experts, device=expert_P.device)
        local_Q1 = local_L.repeat(self.workers).repeat_interleave(arriving_X, output_size=sum(arriving_W))[:, None]
        # Gate values are applied by the token's own worker: neither they nor their gradients have to be sent.
        done_QD = self.local(arrived_QD, local_Q1, torch.ones_like(local_Q1, dtype=weights_MS.dtype))
        returned_PD = _Exchange.apply(done_QD, arriving_W, sent_W, self.group)

        # 3. Back in the tokens' order, weigh and sum.
        output_MSD = returned_PD[order_P.argsort()].view(*experts_MS.shape, -1)
        return (output_MSD * weights_MS[..., None]).sum(1).to(hidden_MD.dtype)

    def gather(self, local: Tensor) -> Tensor:
        """All X experts' weights from the local ones of the group's workers, who all call it."""
        parts = [torch.empty_like(local) for _ in range(self.workers)]
        distributed.all_gather(parts, local.detach().contiguous(), group=self.group)
        return torch.cat(parts)


def _as_computed(hidden_MD: Tensor) -> Tensor:
    """Hidden states in the data type that experts compute in: under bfloat16 autocast half the bytes travel."""
    kind = hidden_MD.device.type
    return hidden_MD.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden_MD


class _Exchange(torch.autograd.Function):
    """All-to-all of rows: the first ones go to the group's first worker, and so on; gradients go the other way."""

    @staticmethod
    def forward(context: Any, rows: Tensor, sent_W: list[int], arriving_W: list[int], group: Any) -> Tensor:
        context.back = (arriving_W, sent_W, group)
        arrived = rows.new_empty(sum(arriving_W), rows.shape[1])
        distributed.all_to_all_single(arrived, rows.contiguous(), arriving_W, sent_W, group=group)
        return arrived

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _Exchange.apply(gradient, *context.back), None, None, None


def share_out_experts(model: nn.Module, workers: int, rank: int) -> None:
    """Leave each block of `model` only the experts of this worker."""
    for block in model.modules():
        if isinstance(block, MultiGateMoe):
            block.experts = ParallelExperts(block.experts, workers, rank)


def expert_groups(optimizer_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The optimizer's groups with experts in groups of their own, marked as DeepSpeed wants them."""
    groups_apart = []
    for group in optimizer_groups:
        shared = [parameter for parameter in group["params"] if not is_moe_param(parameter)]
        experts = [parameter for parameter in group["params"] if is_moe_param(parameter)]
        if shared:
            groups_apart.append({**group, "params": shared})
        if experts:
            groups_apart.append({**group, "params": experts, "moe": True, "name": experts[0].group_name})
    return groups_apart


def whole_state(model: nn.Module, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """This worker's entries of `state` whose names start with `prefix`, with all experts under their plain names.

    Every worker calls it; one that wants no state passes an empty one and gets it back.
    """
    complete = dict(state)
    for name, experts in _parallel_experts(model):
        for key, local in experts.local.named_parameters():
            if not name.startswith(prefix):
                continue
            gathered = experts.gather(local)  # one at a time
            if complete.pop(f"{name}.local.{key}", None) is not None:
                complete[f"{name}.{key}"] = gathered.cpu()
    return complete


def save_experts(model: nn.Module, folder: Path, rank: int) -> None:
    """Write this worker's experts; of workers with the same ones, the first does."""
    blocks = _parallel_experts(model)
    if rank < blocks[0][1].workers:
        parts = {f"{name}.{key}": part.detach().cpu() for name, e in blocks for key, part in e.local.named_parameters()}
        save_file(parts, _file(folder, rank))


@torch.no_grad()
def load_experts(model: nn.Module, folder: Path, rank: int) -> None:
    """Read what `save_experts` wrote for this worker."""
    blocks = _parallel_experts(model)
    parts = load_file(_file(folder, rank % blocks[0][1].workers))
    for name, experts in blocks:
        for key, local in experts.local.named_parameters():
            local.copy_(parts[f"{name}.{key}"])


def _parallel_experts(model: nn.Module) -> list[tuple[str, ParallelExperts]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ParallelExperts)]


def _file(folder: Path, rank: int) -> Path:
    return folder / f"experts_{rank}.safetensors"
