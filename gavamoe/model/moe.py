"""Fine-grained experts behind K gates (sections 3.3.1 and 3.3.2): router, experts, and the block that joins them.

Input: hidden states of a batch whose rows each carry a cluster id; output: hidden states of the same shape.
Cluster ids are an argument of every `forward`, never state of a module, so any mix of clusters in a batch is right.
Expert arithmetic is transformers' own (`use_experts_implementation`): eager, batched_mm, grouped_mm, or `auto` of here.

Shape letters: B rows, T positions, M = B x T tokens, D hidden size, N = rN experts, S = top_k experts of a token,
I width of one expert, K gates (one per cluster).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

FEW_TOKENS = 2
"""As many tokens as the kernel `auto` takes one by one, on a CPU and without gradients."""


@dataclass(frozen=True)
class MoeSpec:
    """Sizes and rules of one MoE block."""

    hidden_size: int
    """D."""
    experts: int
    """N = rN."""
    top_k: int
    """S."""
    expert_size: int
    """I."""
    gates: int
    """K."""
    activation: str
    """Name in transformers' table of activations."""
    gated: bool
    """True: SwiGLU experts without bias (LLaMA). False: plain MLP experts with bias (GPT-2)."""
    renormalise: bool = False
    """Divide the kept gate values by their sum."""
    dropout: float = 0.0
    """On the routed output, as the dense block has it (GPT-2)."""


class MultiGateRouter(nn.Module):
    """K gates of one weight; a row's cluster picks the gate that scores the experts for all of its tokens."""

    def __init__(self, spec: MoeSpec) -> None:
        super().__init__()
        self.top_k = spec.top_k
        self.renormalise = spec.renormalise
        self.weight = nn.Parameter(torch.empty(spec.gates, spec.experts, spec.hidden_size))

    def forward(self, hidden_BTD: Tensor, cluster_ids_B: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Score the experts for each token.

        Returns:
            logits_BTN, float32 or wider; weights_MS, the kept values of Eq. 10, in descending order; experts_MS,
            their indices. With K = 1 the cluster ids are not looked at and may be None.

        Raises:
            ValueError: K > 1 and no cluster ids, or not one per row.
        """
        gate_BND = self._gate_of_rows(hidden_BTD.shape[0], cluster_ids_B)
        # float32: gate values decide a discrete choice and are exponentiated; bfloat16's 8 bits of mantissa flip
        # the choice between near-equal experts. Autocast would bring the product back to bfloat16.
        dtype = torch.promote_types(hidden_BTD.dtype, torch.float32)
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            logits_BTN = torch.matmul(hidden_BTD.to(dtype), gate_BND.to(dtype).transpose(-1, -2))
            gates_MN = logits_BTN.softmax(-1).flatten(0, 1)
        weights_MS, experts_MS = gates_MN.topk(self.top_k, dim=-1)
        if self.renormalise:
            weights_MS = weights_MS / weights_MS.sum(-1, keepdim=True)
        return logits_BTN, weights_MS, experts_MS

    def _gate_of_rows(self, rows: int, cluster_ids_B: Tensor | None) -> Tensor:
        gates = self.weight.shape[0]
        if gates == 1:
            return self.weight
        if cluster_ids_B is None:
            raise ValueError(f"cluster_ids: needed by a router with {gates} gates; pass one cluster per row")
        if cluster_ids_B.shape != (rows,):
            raise ValueError(f"cluster_ids: shape {tuple(cluster_ids_B.shape)}; expected ({rows},), one per row")
        # index_select, unlike indexing, refuses negative ids; on GPUs it does so without waiting for the device.
        return self.weight.index_select(0, cluster_ids_B)


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
        """The same token by token, for a decoding step of one or two rows: nothing to sort, gather or scatter."""
        rows = []
        for token, chosen in enumerate(experts_MS.tolist()):
            hidden_1D = hidden_MD[token : token + 1]
            output_SD = torch.cat([self.apply_expert(hidden_1D, expert) for expert in chosen])
            rows.append((output_SD * weights_MS[token, :, None]).sum(0))
        return torch.stack(rows).to(hidden_MD.dtype)

    def apply_expert(self, hidden_MD: Tensor, expert: int) -> Tensor:
        """E_i(x) of Eq. 11 for all the given tokens."""
        raise NotImplementedError

    def load_slices(self, dense: Any) -> None:
        """Cut a dense feed-forward network of width N x I into the N experts, by position.

        The dense output is the plain sum of its slices, while Eq. 11 weights experts by gate values that sum to 1
        over all N. So each slice is scaled by N: where all gate values are 1/N, all experts active give exactly the
        dense output, and S active ones the plain sum of S slices (with renormalised weights, N / S times that sum,
        an unbiased estimate of the dense output under random choice). An output bias enters once in all, since the
        gate values of all experts sum to 1, and is therefore not scaled.
        """
        raise NotImplementedError


def auto_experts_forward(experts: _Experts, hidden_MD: Tensor, experts_MS: Tensor, weights_MS: Tensor) -> Tensor:
    """The kernel `auto`: grouped_mm, but for few tokens, where sorting and grouping cost more than the experts."""
    few = hidden_MD.shape[0] <= FEW_TOKENS and hidden_MD.device.type == "cpu"  # elsewhere the loop waits for the device
    if few and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return experts.forward_few(hidden_MD, experts_MS, weights_MS)
    grouped: Any = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    output_MD: Tensor = grouped(_AutocastWeights(experts, hidden_MD.device.type), hidden_MD, experts_MS, weights_MS)
    return output_MD


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

    @torch.no_grad()
    def load_slices(self, dense: Any) -> None:
        """Fill the experts with consecutive slices of a LlamaMLP of width N x I; see `_Experts.load_slices`."""
        shape = (self.num_experts, self.intermediate_dim, self.hidden_dim)
        gate, up = dense.gate_proj.weight.reshape(shape), dense.up_proj.weight.reshape(shape)
        self.gate_up_proj.copy_(torch.cat([gate, up], dim=1))
        down = dense.down_proj.weight.reshape(self.hidden_dim, self.num_experts, self.intermediate_dim)
        self.down_proj.copy_(down.transpose(0, 1) * self.num_experts)


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

    @torch.no_grad()
    def load_slices(self, dense: Any) -> None:
        """Fill the experts with consecutive slices of a GPT2MLP of width N x I; see `_Experts.load_slices`."""
        up = dense.c_fc.weight.reshape(self.hidden_dim, self.num_experts, self.intermediate_dim)
        self.up_proj.copy_(up.transpose(0, 1))
        self.up_proj_bias.copy_(dense.c_fc.bias.reshape(self.num_experts, self.intermediate_dim))
        down = dense.c_proj.weight.reshape(self.num_experts, self.intermediate_dim, self.hidden_dim)
        self.down_proj.copy_(down * self.num_experts)
        self.down_proj_bias.copy_(dense.c_proj.bias.expand_as(self.down_proj_bias))


class MultiGateMoe(nn.Module):
    """The GaVaMoE block that stands where a decoder layer has its feed-forward network (Eq. 9-11)."""

    def __init__(self, config: PreTrainedConfig, spec: MoeSpec, shared_expert: nn.Module | None = None) -> None:
        """`shared_expert` sees every token and is added to the routed output with weight 1."""
        super().__init__()
        self.router = MultiGateRouter(spec)
        self.experts = SwiGluExperts(config, spec) if spec.gated else MlpExperts(config, spec)
        self.dropout = nn.Dropout(spec.dropout)
        self.shared_expert = shared_expert

    def forward(self, hidden_BTD: Tensor, cluster_ids_B: Tensor | None) -> Tensor:
        """Map hidden_BTD to hidden_BTD; each row's tokens are routed by the gate of its cluster."""
        _, weights_MS, experts_MS = self.router(hidden_BTD, cluster_ids_B)
        routed_MD = self.experts(hidden_BTD.flatten(0, 1), experts_MS, weights_MS)
        output_BTD = self.dropout(routed_MD.view_as(hidden_BTD))
        if self.shared_expert is not None:
            output_BTD = output_BTD + self.shared_expert(hidden_BTD)
        return output_BTD


def check_cluster_ids(cluster_ids_B: Tensor, gates: int) -> None:
    """Refuse ids outside 0..K-1 with a message. Those on a GPU are left to `index_select`: no waiting.

    Raises:
        ValueError: an id is negative or not below `gates`.
    """
    if cluster_ids_B.device.type != "cpu" or cluster_ids_B.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in cluster_ids_B.aminmax())
    if low < 0 or high >= gates:
        wrong = low if low < 0 else high
        raise ValueError(f"cluster_ids: {wrong} is outside 0..{gates - 1}, the gates of this model")


def load_balance_loss(
    logits_BTN: Tensor, top_k: int, cluster_ids_B: Tensor | None, gates: int, mask_BT: Tensor | None
) -> Tensor:
    """How unevenly each gate uses the experts: 1 when even, up to N / top_k; padding is not counted.

    For gate k: N x sum over experts of (share of its choices) x (mean probability), as in the Switch Transformer;
    then the mean over gates, weighted by their tokens, so that no cluster is pushed towards another's experts.
    """
    experts = logits_BTN.shape[-1]
    probability_BTN = logits_BTN.softmax(-1)
    chosen_BTN = torch.zeros_like(probability_BTN).scatter(-1, logits_BTN.topk(top_k, dim=-1).indices, 1.0 / top_k)
    token_BT = _token_weights(logits_BTN, mask_BT)
    row_BK = _gate_of_row(cluster_ids_B, gates, logits_BTN)
    tokens_K = torch.einsum("bt,bk->k", token_BT, row_BK)
    chosen_KN = torch.einsum("btn,bt,bk->kn", chosen_BTN, token_BT, row_BK)
    probability_KN = torch.einsum("btn,bt,bk->kn", probability_BTN, token_BT, row_BK)
    balance_K = experts * (chosen_KN * probability_KN).sum(-1) / tokens_K.clamp(min=1) ** 2
    return (balance_K * tokens_K).sum() / tokens_K.sum().clamp(min=1)


def router_z_loss(logits_BTN: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Mean squared log-sum-exp of the router's logits over the tokens that are no padding; keeps logits small."""
    token_BT = _token_weights(logits_BTN, mask_BT)
    return (logits_BTN.logsumexp(-1) ** 2 * token_BT).sum() / token_BT.sum().clamp(min=1)


def _token_weights(logits_BTN: Tensor, mask_BT: Tensor | None) -> Tensor:
    if mask_BT is None:
        return logits_BTN.new_ones(logits_BTN.shape[:2])
    # With a cache the mask covers the past as well; the logits are of the last positions.
    return mask_BT[:, -logits_BTN.shape[1] :].to(logits_BTN.dtype)


def _gate_of_row(cluster_ids_B: Tensor | None, gates: int, like_BTN: Tensor) -> Tensor:
    if cluster_ids_B is None or gates == 1:
        return like_BTN.new_ones(like_BTN.shape[0], 1)
    return functional.one_hot(cluster_ids_B.long(), gates).to(like_BTN.dtype)
