"""The multi-gate router (section 3.3.2): K gates that score the experts, and the losses that keep their use in bounds.

Input: hidden states of a batch whose rows each carry a cluster id or responsibilities; output: the experts of every
token, and their weights. Clusters are an argument of every `forward`, never state of a module, so any mix in a batch is
right.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from gavamoe.model.experts import MoeSpec

OWNED_WEIGHTS = 1e-2
"""Factor on the weights of gates that start with experts of their own: biases decide at first, not random weights."""
SHARE_TOLERANCE = 1e-3
"""How far a row's responsibilities may be from adding up to 1: bfloat16 keeps three digits."""


class MultiGateRouter(nn.Module):
    """K gates of one weight; a row's cluster picks the gate that scores the experts for all of its tokens, or its
    responsibilities mix the values of all gates."""

    def __init__(self, spec: MoeSpec) -> None:
        super().__init__()
        self.top_k = spec.top_k
        self.renormalize = spec.renormalize
        self.start_bias = spec.gate_bias
        self.weight = nn.Parameter(torch.empty(spec.gates, spec.experts, spec.hidden_size))
        self.bias = nn.Parameter(torch.empty(spec.gates, spec.experts)) if spec.gate_bias else None

    def owned_KN(self) -> Tensor:
        """Where the biases start: gate k owns experts k, k + K, k + 2K, ..."""
        gates, experts = self.weight.shape[:2]
        expert_N = torch.arange(experts)
        return torch.zeros(gates, experts).index_put((expert_N % gates, expert_N), torch.tensor(self.start_bias))

    def forward(self, hidden_BTD: Tensor, clusters: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Score the experts for each token.

        Args:
            clusters: int64 (B,), the cluster of each row (Eq. 9); or float (B, K), its responsibilities (Eq. 8): the
                probability of an expert is then the mean of all gates' by them. With K = 1 it is not looked at and
                may be None.

        Returns:
            logits_BTN, float32 or wider; weights_MS, the kept values of Eq. 10, in descending order; experts_MS,
            their indices.

        Raises:
            ValueError: K > 1 and no clusters, or not one per row.
        """
        gates, soft = self.weight.shape[0], clusters is not None and clusters.is_floating_point()
        # float32: gate values decide a discrete choice and are exponentiated; bfloat16's 8 bits of mantissa flip
        # the choice between near-equal experts. Autocast would bring the product back to bfloat16.
        dtype = torch.promote_types(hidden_BTD.dtype, torch.float32)
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            hidden_BTD = hidden_BTD.to(dtype)
            if soft and gates > 1:
                assert clusters is not None
                logits_BTN = self._mixed_logits(hidden_BTD, clusters.to(dtype))
            else:
                gate_of_row = self._gate_of_rows(hidden_BTD.shape[0], clusters)
                logits_BTN = torch.matmul(hidden_BTD, gate_of_row(self.weight).to(dtype).transpose(-1, -2))
                if self.bias is not None:
                    logits_BTN = logits_BTN + gate_of_row(self.bias).to(dtype)[:, None]
            gates_MN = logits_BTN.softmax(-1).flatten(0, 1)
        weights_MS, experts_MS = gates_MN.topk(self.top_k, dim=-1)
        if self.renormalize:
            total_M1 = weights_MS.sum(-1, keepdim=True)
            # Of a single expert the quotient is 1 whatever its logit is, and the gate would learn nothing: the value
            # is 1 all the same, but the gradient that of the logarithm.
            weights_MS = weights_MS / (total_M1.detach() if self.top_k == 1 else total_M1)
        return logits_BTN, weights_MS, experts_MS

    def _mixed_logits(self, hidden_BTD: Tensor, share_BK: Tensor) -> Tensor:
        """Logits whose softmax is the mixture of all gates' softmax, and whose log-sum-exp the mean of theirs."""
        if share_BK.shape != (hidden_BTD.shape[0], self.weight.shape[0]):
            expected = (hidden_BTD.shape[0], self.weight.shape[0])
            raise ValueError(f"cluster_ids: shape {tuple(share_BK.shape)}; expected {expected}, a share of each gate")
        logits_BTKN = torch.einsum("btd,knd->btkn", hidden_BTD, self.weight.to(hidden_BTD.dtype))
        if self.bias is not None:
            logits_BTKN = logits_BTKN + self.bias.to(hidden_BTD.dtype)
        total_BTK1 = logits_BTKN.logsumexp(-1, keepdim=True)
        share_B1K1 = share_BK[:, None, :, None]
        mixed_BTN = (logits_BTKN - total_BTK1 + share_B1K1.log()).logsumexp(2)
        return mixed_BTN + (total_BTK1 * share_B1K1).sum(2)

    def _gate_of_rows(self, rows: int, clusters_B: Tensor | None) -> Callable[[Tensor], Tensor]:
        """What picks the rows' entries of a parameter (K, ...): (B, ...), or (1, ...) with one gate."""
        gates = self.weight.shape[0]
        if gates == 1:
            return lambda parameter: parameter
        if clusters_B is None:
            raise ValueError(f"cluster_ids: needed by a router with {gates} gates; pass one per row")
        if clusters_B.shape != (rows,):
            raise ValueError(f"cluster_ids: shape {tuple(clusters_B.shape)}; expected ({rows},), one per row")
        # index_select, unlike indexing, refuses negative ids; on GPUs it does so without waiting for the device.
        return lambda parameter: parameter.index_select(0, clusters_B)


def check_cluster_ids(clusters: Tensor, gates: int) -> None:
    """Refuse cluster ids (B,) outside 0..K-1, and responsibilities (B, K) that are no shares of a whole. What lies on
    a GPU is left to `index_select`, so as not to wait for the device.

    Raises:
        ValueError: an id is negative or not below `gates`; shares of a row are negative or don't add up to 1.
    """
    if clusters.device.type != "cpu" or clusters.numel() == 0 or torch.compiler.is_compiling():
        return
    if clusters.is_floating_point():
        if bool((clusters < 0).any()) or not bool((clusters.sum(-1) - 1).abs().max() < SHARE_TOLERANCE):
            raise ValueError("cluster_ids: responsibilities must be at least 0 and add up to 1 in each row")
        return
    low, high = (int(bound) for bound in clusters.aminmax())
    if low < 0 or high >= gates:
        wrong = low if low < 0 else high
        raise ValueError(f"cluster_ids: {wrong} is outside 0..{gates - 1}, the gates of this model")


def load_balance_loss(
    logits_BTN: Tensor, top_k: int, clusters: Tensor | None, gates: int, mask_BT: Tensor | None
) -> Tensor:
    """Load-balancing loss: 1 where each gate uses the experts evenly, up to N / top_k; padding is not counted.

    For gate k: N x sum over experts of (share of its choices) x (mean probability), as in the Switch Transformer;
    then the mean over gates, weighted by their tokens, so that no cluster is pushed toward another's experts.
    """
    experts = logits_BTN.shape[-1]
    probability_BTN = logits_BTN.softmax(-1)
    chosen_BTN = torch.zeros_like(probability_BTN).scatter(-1, logits_BTN.topk(top_k, dim=-1).indices, 1.0 / top_k)
    token_BT = _token_weights(logits_BTN, mask_BT)
    row_BK = _gate_of_row(clusters, gates, logits_BTN)
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


def _gate_of_row(clusters: Tensor | None, gates: int, like_BTN: Tensor) -> Tensor:
    """Shares of the gates in each row: (B, K)."""
    if clusters is None or gates == 1:
        return like_BTN.new_ones(like_BTN.shape[0], 1)
    if clusters.is_floating_point():
        return clusters.to(like_BTN.dtype)
    return functional.one_hot(clusters.long(), gates).to(like_BTN.dtype)
