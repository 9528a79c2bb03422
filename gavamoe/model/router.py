"""The multi-gate router (section 3.3.2): K gates that score the experts, and the losses that keep their use in bounds.

Input: hidden states of a batch whose rows each carry a cluster id; output: the experts of every token, and their
weights. Cluster ids are an argument of every `forward`, never state of a module, so any mix of clusters in a batch is
right.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from gavamoe.model.experts import MoeSpec


class MultiGateRouter(nn.Module):
    """K gates of one weight; a row's cluster picks the gate that scores the experts for all of its tokens."""

    def __init__(self, spec: MoeSpec) -> None:
        super().__init__()
        self.top_k = spec.top_k
        self.renormalize = spec.renormalize
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
        if self.renormalize:
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


def check_cluster_ids(cluster_ids_B: Tensor, gates: int) -> None:
    """Refuse cluster ids outside 0..K-1. Ids on a GPU are left to `index_select`, so as not to wait for the device.

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
    """Load-balancing loss: 1 where each gate uses the experts evenly, up to N / top_k; padding is not counted.

    For gate k: N x sum over experts of (share of its choices) x (mean probability), as in the Switch Transformer;
    then the mean over gates, weighted by their tokens, so that no cluster is pushed toward another's experts.
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
    """Mean squared log-sum-exp of the router's logits over all tokens but padding; keeps logits small."""
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
