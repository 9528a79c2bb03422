"""Experts shared out over workers (`stage2.expert_parallel`): each holds a part of every block's; tokens travel.

`share_out_experts` replaces the experts of all blocks by the worker's own part, before DeepSpeed sees the model;
`expert_groups` gives the optimizer what DeepSpeed needs to know of them; `whole_state` undoes the sharing for export;
`save_experts` and `load_experts` keep each worker's part beside DeepSpeed's checkpoint.

Groups, the averaging of gradients and the joint clipping norm are DeepSpeed's (ZeRO 1 and 2), routing and arithmetic
are `gavamoe.model`'s. docs/stage2.md says why DeepSpeed's own MoE layer is not used.

Shape letters: M tokens of this worker, D hidden size, S experts of a token, P = M x S pairs of token and expert,
N experts of a block, W workers that share them, L = N / W experts of a worker, Q pairs that arrive at this worker.
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
    """A block's experts, of which this worker holds L; called as they are, gives what they would give.

    A `MoE` so that DeepSpeed's engine treats the parameters as experts; nothing else of that class is used.
    """

    def __init__(self, experts: Any, workers: int, rank: int) -> None:
        """Takes `experts` over: their parameters become the worker's own part.

        Args:
            experts: N experts as stacked weights (N, ...), a module of `gavamoe.model.experts`.
            workers: W, a divisor of N; consecutive ranks share a set of experts.
            rank: this worker's, in the whole run.
        """
        nn.Module.__init__(self)
        self.num_experts, self.workers = experts.num_experts, workers
        self.expert_group_name = f"ep_size_{workers}"
        self.group: Any = None
        self.local = experts
        experts.num_experts = own = self.num_experts // workers
        first = rank % workers * own
        for name, parameter in list(experts.named_parameters()):
            part = nn.Parameter(parameter.detach()[first : first + own].clone(), parameter.requires_grad)
            vars(part).update(allreduce=False, group_name=self.expert_group_name)  # DeepSpeed's marks of an expert
            setattr(experts, name, part)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by DeepSpeed's engine when process groups can be made."""
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.workers, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )
        self.group = groups._get_expert_parallel_group(self.expert_group_name)

    def forward(self, hidden_MD: Tensor, experts_MS: Tensor, weights_MS: Tensor) -> Tensor:
        """Eq. 11, each pair computed where its expert is; all workers of the group call it equally often."""
        expert_P = experts_MS.flatten()
        order_P = expert_P.argsort(stable=True)  # by expert, and so by worker
        sent_N = torch.bincount(expert_P, minlength=self.num_experts)
        arriving_N = torch.empty_like(sent_N)
        distributed.all_to_all_single(arriving_N, sent_N, group=self.group)
        sent_W, arriving_W = (counts.view(self.workers, -1).sum(1).tolist() for counts in (sent_N, arriving_N))

        token_P = order_P // experts_MS.shape[1]
        arrived_QD = _Exchange.apply(hidden_MD[token_P], sent_W, arriving_W, self.group)
        local_L = torch.arange(self.local.num_experts, device=expert_P.device)
        local_Q1 = local_L.repeat(self.workers).repeat_interleave(arriving_N)[:, None]
        # The token's own worker weighs: neither the weights nor their gradients have to travel.
        done_QD = self.local(arrived_QD, local_Q1, torch.ones_like(local_Q1, dtype=weights_MS.dtype))
        returned_PD = _Exchange.apply(done_QD, arriving_W, sent_W, self.group)

        output_MSD = returned_PD[order_P.argsort()].view(*experts_MS.shape, -1)
        return (output_MSD * weights_MS[..., None]).sum(1).to(hidden_MD.dtype)

    def whole(self, part: Tensor) -> Tensor:
        """All N experts' weights from the parts of the group's workers; all of them call it."""
        parts = [torch.empty_like(part) for _ in range(self.workers)]
        distributed.all_gather(parts, part.detach().contiguous(), group=self.group)
        return torch.cat(parts)


class _Exchange(torch.autograd.Function):
    """Sends the first rows to the group's first worker, and so on; backward, gradients go the other way."""

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
    found = []
    for group in optimizer_groups:
        shared = [parameter for parameter in group["params"] if not is_moe_param(parameter)]
        experts = [parameter for parameter in group["params"] if is_moe_param(parameter)]
        if shared:
            found.append({**group, "params": shared})
        if experts:
            found.append({**group, "params": experts, "moe": True, "name": experts[0].group_name})
    return found


def whole_state(model: nn.Module, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """This worker's entries of `state` whose names start with `prefix`, with all experts under their plain names.

    Every worker calls it; one that wants no state passes an empty one and gets it back.
    """
    found = dict(state)
    for name, experts in _parallel_experts(model):
        for key, part in experts.local.named_parameters():
            if not name.startswith(prefix):
                continue
            whole = experts.whole(part)  # one at a time
            if found.pop(f"{name}.local.{key}", None) is not None:
                found[f"{name}.{key}"] = whole.cpu()
    return found


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
        for key, part in experts.local.named_parameters():
            part.copy_(parts[f"{name}.{key}"])


def _parallel_experts(model: nn.Module) -> list[tuple[str, ParallelExperts]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ParallelExperts)]


def _file(folder: Path, part: int) -> Path:
    return folder / f"experts_{part}.safetensors"
