"""The experts of a block (section 3.3.1): stacked feed-forward networks, and the kernels that run them.

Input: the tokens of a batch with the experts chosen for each and their weights; output: the weighted sums (Eq. 11).
Expert arithmetic is transformers' own (`use_experts_implementation`): eager, batched_mm, grouped_mm, or this module's
`auto`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear

_BLACKWELL = 10
"""Major compute capability of the first GPUs of that kind."""
FEW_TOKENS = 2
"""The kernel `auto` computes up to this many tokens one by one, on a CPU and without gradients."""


@dataclass(frozen=True)
class MoeSpec:
    """Sizes and rules of one MoE block."""

    hidden_size: int
    """D: width of the hidden states."""
    experts: int
    """N = rN: routed experts."""
    top_k: int
    """S: experts that see a token."""
    expert_size: int
    """I: width of one expert."""
    gates: int
    """K: gates of the router, one per cluster."""
    activation: str
    """Activation function of the experts, by its name in transformers' table."""
    gated: bool
    """Kind of the experts. True: SwiGLU without bias (LLaMA). False: plain MLP with bias (GPT-2)."""
    renormalize: bool = False
    """Whether the gate values of the chosen experts are divided by their sum."""
    scale: float = 1.0
    """Factor on the routed output."""
    gate_bias: float = 0.0
    """Start of each gate's bias for the experts that it owns; 0: gates have no bias."""
    lora_rank: int = 0
    """Rank of experts that are low-rank additions to the dense layer; 0: they are feed-forward networks."""
    dropout: float = 0.0
    """Dropout rate on the routed output, as the dense block has it (GPT-2)."""


class _Experts(nn.Module):
    """N expert networks as stacked weights, with attribute names that transformers' kernels read."""

    def __init__(self, config: PreTrainedConfig, spec: MoeSpec) -> None:
        """`config` carries the choice of kernel (`_experts_implementation`), read at each forward pass."""
        super().__init__()
        self.num_experts = spec.experts
        self.hidden_dim = spec.hidden_size
        self.intermediate_dim = spec.expert_size
        self.act_fn = ACT2FN[spec.activation]

    def forward(self, hidden_MD: Tensor, experts_MS: Tensor, weights_MS: Tensor) -> Tensor:
        """Eq. 11 by a plain loop over the experts, the "eager" kernel; returns (M, D)."""
        output_MD = torch.zeros_like(hidden_MD, dtype=torch.promote_types(hidden_MD.dtype, weights_MS.dtype))
        for expert in range(self.num_experts):
            token, slot = torch.where(experts_MS == expert)
            # In training an expert without tokens runs on none: its gradient is zero, not absent, as DDP and ZeRO need.
            if token.numel() == 0 and not torch.is_grad_enabled():
                continue
            output = self.apply_expert(hidden_MD[token], expert) * weights_MS[token, slot, None]
            output_MD = output_MD.index_add(0, token, output.to(output_MD.dtype))
        return output_MD.to(hidden_MD.dtype)

    def forward_few(self, hidden_MD: Tensor, experts_MS: Tensor, weights_MS: Tensor) -> Tensor:
        """Eq. 11 token by token, for a decoding step of one or two rows: nothing to sort, gather or scatter."""
        rows = []
        for token, chosen in enumerate(experts_MS.tolist()):
            hidden_1D = hidden_MD[token : token + 1]
            output_SD = torch.cat([self.apply_expert(hidden_1D, expert) for expert in chosen])
            rows.append((output_SD * weights_MS[token, :, None]).sum(0))
        return torch.stack(rows).to(hidden_MD.dtype)

    def apply_expert(self, hidden_MD: Tensor, expert: int) -> Tensor:
        """E_i(x) of Eq. 11 for all the given tokens."""
        raise NotImplementedError

    @staticmethod
    def apply_grouped(read: Any, hidden_PD: Tensor, ends_N: Tensor, owner_P: Tensor) -> Tensor:
        """E_i(x) of rows that are in the order of their experts.

        Args:
            read: the experts, or what reads their weights in another data type.
            ends_N: int32, where each expert's rows end.
            owner_P: each row's expert.
        """
        raise NotImplementedError

    def _slices(self) -> Tensor:
        """Numbers of the neurons of consecutive slices: int64 (N, I)."""
        return torch.arange(self.num_experts * self.intermediate_dim).view(self.num_experts, self.intermediate_dim)

    def load_neurons(self, dense: Any, neurons_NI: Tensor) -> None:
        """Give each expert the weights of the dense network's neurons with these numbers, int64 (N, I); no bias of the
        output, which all neurons share."""
        raise NotImplementedError

    def load_slices(self, dense: Any) -> None:
        """Cut a dense feed-forward network of width N x I into the N experts, consecutive slices, by position.

        The dense output is the plain sum of its slices, while Eq. 11 weights experts by gate values that sum to 1
        over all N. So each slice is scaled by N: where all gate values are 1/N, all experts active give exactly the
        dense output, and S active ones the plain sum of S slices (with renormalized weights, N / S times that sum,
        an unbiased estimate of the dense output under random choice). An output bias enters once in all, since the
        gate values of all experts sum to 1, and is therefore not scaled.
        """
        raise NotImplementedError


def auto_experts_forward(experts: _Experts, hidden_MD: Tensor, experts_MS: Tensor, weights_MS: Tensor) -> Tensor:
    """The kernel `auto`: grouped_mm, but for few tokens, where sorting and grouping cost more than the experts."""
    few = hidden_MD.shape[0] <= FEW_TOKENS and hidden_MD.device.type == "cpu"  # elsewhere the loop waits for the device
    if few and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return experts.forward_few(hidden_MD, experts_MS, weights_MS)
    if torch.is_grad_enabled() and has_wrong_gradients(hidden_MD.device):
        return _Experts.forward(experts, hidden_MD, experts_MS, weights_MS)
    read = _AutocastWeights(experts, hidden_MD.device.type)
    if hidden_MD.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _grouped_for_training(read, hidden_MD, experts_MS, weights_MS)
    grouped: Any = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    output_MD: Tensor = grouped(read, hidden_MD, experts_MS, weights_MS)
    return output_MD


def has_wrong_gradients(device: torch.device) -> bool:
    """Whether grouped products give experts without tokens a gradient that is not zero, or NaN: on Blackwell GPUs, up
    to torch 2.13 at least (pytorch issues 172439, 193633)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= _BLACKWELL


def _grouped_for_training(experts: Any, hidden_MD: Tensor, experts_MS: Tensor, weights_MS: Tensor) -> Tensor:
    """transformers' grouped_mm but for how rows are gathered: by `index_select`, whose backward pass adds them in
    place. That of indexing puts them in order first: 87 of the 2,380 ms of a profiled step of SmolLM2 on a CPU."""
    owner_P, order_P = experts_MS.flatten().sort(stable=True)
    token_P = order_P.div(experts_MS.shape[1], rounding_mode="floor")
    ends_N = torch.bincount(owner_P, minlength=experts.num_experts).cumsum(0).to(torch.int32)
    output_PD = experts.apply_grouped(experts, hidden_MD.index_select(0, token_P), ends_N, owner_P)
    output_PD = output_PD * weights_MS.flatten().index_select(0, order_P)[:, None]
    # Back in the tokens' order, where a token's experts are summed whichever they are.
    place_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P), device=order_P.device))
    summed_MD: Tensor = output_PD.index_select(0, place_P).view(*experts_MS.shape, -1).sum(1)
    return summed_MD.to(hidden_MD.dtype)


class _AutocastWeights:
    """Experts whose weights are read in autocast's data type: grouped_mm, unlike other products, does not cast."""

    def __init__(self, experts: _Experts, device: str) -> None:
        self._experts = experts
        self._dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experts, name)
        return value.to(self._dtype) if isinstance(value, nn.Parameter) else value


ALL_EXPERTS_FUNCTIONS.register("auto", auto_experts_forward)


@use_experts_implementation
class SwiGluExperts(_Experts):
    """LLaMA's feed-forward: down(act(gate(x)) * up(x)), no bias."""

    def __init__(self, config: PreTrainedConfig, spec: MoeSpec) -> None:
        super().__init__(config, spec)
        self.gate_up_proj = nn.Parameter(torch.empty(spec.experts, 2 * spec.expert_size, spec.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(spec.experts, spec.hidden_size, spec.expert_size))

    def apply_expert(self, hidden_MD: Tensor, expert: int) -> Tensor:
        gate_MI, up_MI = functional.linear(hidden_MD, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return functional.linear(self.act_fn(gate_MI) * up_MI, self.down_proj[expert])

    @staticmethod
    def apply_grouped(read: Any, hidden_PD: Tensor, ends_N: Tensor, owner_P: Tensor) -> Tensor:
        """See `_Experts.apply_grouped`."""
        del owner_P
        gate_PI, up_PI = _grouped_linear(hidden_PD, read.gate_up_proj, ends_N).chunk(2, dim=-1)
        output_PD: Tensor = _grouped_linear(read.act_fn(gate_PI) * up_PI, read.down_proj, ends_N)
        return output_PD

    @torch.no_grad()
    def load_neurons(self, dense: Any, neurons_NI: Tensor) -> None:
        """See `_Experts.load_neurons`; `dense` is a LlamaMLP."""
        self.gate_up_proj.copy_(torch.cat([dense.gate_proj.weight[neurons_NI], dense.up_proj.weight[neurons_NI]], 1))
        self.down_proj.copy_(dense.down_proj.weight[:, neurons_NI].transpose(0, 1))

    @torch.no_grad()
    def load_slices(self, dense: Any) -> None:
        """See `_Experts.load_slices`; `dense` is a LlamaMLP."""
        self.load_neurons(dense, self._slices())
        self.down_proj.mul_(self.num_experts)


@use_experts_implementation(has_gate=False, has_bias=True, is_transposed=True)
class MlpExperts(_Experts):
    """GPT-2's feed-forward: proj(act(fc(x))) with biases, weights stored (in, out) as GPT-2 does."""

    def __init__(self, config: PreTrainedConfig, spec: MoeSpec) -> None:
        super().__init__(config, spec)
        self.up_proj = nn.Parameter(torch.empty(spec.experts, spec.hidden_size, spec.expert_size))
        self.up_proj_bias = nn.Parameter(torch.empty(spec.experts, spec.expert_size))
        self.down_proj = nn.Parameter(torch.empty(spec.experts, spec.expert_size, spec.hidden_size))
        self.down_proj_bias = nn.Parameter(torch.empty(spec.experts, spec.hidden_size))

    def apply_expert(self, hidden_MD: Tensor, expert: int) -> Tensor:
        inner_MI = self.act_fn(hidden_MD @ self.up_proj[expert] + self.up_proj_bias[expert])
        return inner_MI @ self.down_proj[expert] + self.down_proj_bias[expert]

    @staticmethod
    def apply_grouped(read: Any, hidden_PD: Tensor, ends_N: Tensor, owner_P: Tensor) -> Tensor:
        """See `_Experts.apply_grouped`."""
        biases = (bias.index_select(0, owner_P) for bias in (read.up_proj_bias, read.down_proj_bias))
        inner_PI = read.act_fn(_grouped_linear(hidden_PD, read.up_proj, ends_N, next(biases), is_transposed=True))
        output_PD: Tensor = _grouped_linear(inner_PI, read.down_proj, ends_N, next(biases), is_transposed=True)
        return output_PD

    @torch.no_grad()
    def load_neurons(self, dense: Any, neurons_NI: Tensor) -> None:
        """See `_Experts.load_neurons`; `dense` is a GPT2MLP."""
        self.up_proj.copy_(dense.c_fc.weight[:, neurons_NI].transpose(0, 1))
        self.up_proj_bias.copy_(dense.c_fc.bias[neurons_NI])
        self.down_proj.copy_(dense.c_proj.weight[neurons_NI])
        self.down_proj_bias.zero_()

    @torch.no_grad()
    def load_slices(self, dense: Any) -> None:
        """See `_Experts.load_slices`; `dense` is a GPT2MLP."""
        self.load_neurons(dense, self._slices())
        self.down_proj.mul_(self.num_experts)
        self.down_proj_bias.copy_(dense.c_proj.bias.expand_as(self.down_proj_bias))


class LoraExperts(nn.Module):
    """Experts that are low-rank additions to a frozen dense layer: E_i(x) = B_i A x, with one A for all (HydraLoRA).

    So small that no kernel is needed: the experts' products are one, of the tokens' A x times their gate values.
    """

    def __init__(self, spec: MoeSpec) -> None:
        super().__init__()
        self.num_experts = spec.experts
        self.read = nn.Parameter(torch.empty(spec.lora_rank, spec.hidden_size))
        self.write = nn.Parameter(torch.empty(spec.experts, spec.hidden_size, spec.lora_rank))

    def forward(self, hidden_MD: Tensor, experts_MS: Tensor, weights_MS: Tensor) -> Tensor:
        """Eq. 11; returns (M, D)."""
        read_MR = functional.linear(hidden_MD, self.read)
        share_MN = weights_MS.new_zeros(len(hidden_MD), self.num_experts).scatter(1, experts_MS, weights_MS)
        mixed_MZ = (share_MN[:, :, None] * read_MR[:, None]).flatten(1).to(read_MR.dtype)
        return functional.linear(mixed_MZ, self.write.transpose(0, 1).flatten(1))
