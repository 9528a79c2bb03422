"""What the gates do: is a pair's own gate the best one for its text, do gates differ, do they use their experts?

Inputs: a trained explainer, requests, and the human texts of their rows. Each reference is read once through every
gate; nothing is written.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from gavamoe.evaluation.losses.measure import answer_losses, scored_positions
from gavamoe.model.router import MultiGateRouter
from gavamoe.stage2.batches import Ragged, TextRows

if TYPE_CHECKING:
    from gavamoe.generation.generator import ExplanationGenerator
    from gavamoe.generation.request import ExplanationRequest

BATCH_SIZE = 16


@dataclass(frozen=True)
class GateProbe:
    """Measured on N references; every count is of tokens that are predicted, in all layers."""

    loss_NK: np.ndarray
    """Negative log-likelihood per token of each row through each gate."""
    cluster_N: np.ndarray
    """The gate of each row's route; 0 with one gate."""
    used_LKE: np.ndarray
    """Choices of each expert by each gate, on its own rows."""
    shared_KK: np.ndarray
    """Mean share of two gates' experts that are the same on the same tokens."""
    top_k: int

    def entropy_K(self) -> np.ndarray:
        """Entropy of each gate's expert use over ln E, mean over layers: 1 even, 0 one expert; NaN for an idle gate."""
        total = self.used_LKE.sum(axis=-1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            share = self.used_LKE / total
            terms = np.where(share > 0, -share * np.log(share), 0.0)
        entropy = np.where(total[..., 0] > 0, terms.sum(axis=-1), np.nan) / np.log(max(self.used_LKE.shape[-1], 2))
        return entropy.mean(axis=0)

    def own_gap_N(self) -> np.ndarray:
        """Mean loss through the other gates minus that through the row's own: above 0, the route is right."""
        own_loss_N = np.take_along_axis(self.loss_NK, self.cluster_N[:, None], axis=1)[:, 0]
        return (self.loss_NK.sum(axis=1) - own_loss_N) / (self.loss_NK.shape[1] - 1) - own_loss_N

    def own_best_N(self) -> np.ndarray:
        """Whether no other gate has a lower loss: 1 or 0."""
        own_loss_N = np.take_along_axis(self.loss_NK, self.cluster_N[:, None], axis=1)[:, 0]
        return (own_loss_N <= self.loss_NK.min(axis=1)).astype(float)

    def summary(self) -> dict[str, Any]:
        """JSON-safe tables: rows are clusters (gates that the rows belong to), columns gates they were read through."""
        layers, gates, experts = self.used_LKE.shape
        loss_by_cluster = [self.loss_NK[self.cluster_N == gate] for gate in range(gates)]
        return {
            "gates": gates,
            "layers": layers,
            "experts": experts,
            "top_k": self.top_k,
            "rows": [len(rows) for rows in loss_by_cluster],
            "loss": [rows.mean(axis=0).tolist() if len(rows) else None for rows in loss_by_cluster],
            "expert_use": [(use / use.sum()).tolist() if use.any() else None for use in self.used_LKE.sum(axis=0)],
            "entropy": [None if np.isnan(value) else float(value) for value in self.entropy_K()],
            "overlap": self.shared_KK.tolist(),
            "chance_overlap": self.top_k / experts,
        }


def measure_gates(
    explainer: "ExplanationGenerator", requests: "Sequence[ExplanationRequest]", references: Sequence[str]
) -> GateProbe | None:
    """Read the references through every gate; None for a dense model or without any reference text."""
    rows = [row for row, text in enumerate(references) if text.strip()]
    routers = [module for module in explainer.model.modules() if isinstance(module, MultiGateRouter)]
    if not rows or not routers:
        return None
    prepared = explainer.prepare([requests[row] for row in rows])
    answers = explainer.builder.answers([references[row] for row in rows])
    texts = TextRows(Ragged.pack(prepared.prompts), Ragged.pack(answers))
    gates, experts = routers[0].weight.shape[:2]
    cluster_N = prepared.clusters if gates > 1 else np.zeros(len(rows), np.int64)
    loss_NK = np.zeros((len(rows), gates))
    used_LKE = np.zeros((len(routers), gates, experts))
    shared_KK, tokens = np.zeros((gates, gates)), 0
    order = np.argsort(texts.lengths, kind="stable")
    for start in range(0, len(order), BATCH_SIZE):
        batch_rows = order[start : start + BATCH_SIZE]
        batch = texts.collate(batch_rows, cluster_N, explainer.builder.end)
        for gate in range(gates):
            summed_B = answer_losses(explainer, batch, torch.full((len(batch_rows),), gate))
            loss_NK[batch_rows, gate] = summed_B / texts.answers.lengths[batch_rows]
        scored_BT = scored_positions(batch)
        with _recorded(routers) as hidden_LBTD:
            answer_losses(explainer, batch, batch["cluster_ids"])
        for layer, (router, hidden_BTD) in enumerate(zip(routers, hidden_LBTD, strict=True)):
            chosen_KBTE = _choices(router, hidden_BTD)
            own_BTE = chosen_KBTE[batch["cluster_ids"].to(chosen_KBTE.device), torch.arange(len(batch_rows))]
            for gate in range(gates):
                mine = scored_BT & (batch["cluster_ids"] == gate)[:, None]
                used_LKE[layer, gate] += own_BTE[mine].sum(dim=0).cpu().numpy()
            shared_KK += _shared(chosen_KBTE[:, scored_BT], routers[0].top_k)
            tokens += int(scored_BT.sum())
    return GateProbe(loss_NK, cluster_N, used_LKE, shared_KK / max(tokens, 1), routers[0].top_k)


@contextmanager
def _recorded(routers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The hidden states (B, T, D) that each router sees in the forward pass inside."""
    seen: list[Tensor] = []
    handles = [router.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for router in routers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def _choices(router: MultiGateRouter, hidden_BTD: Tensor) -> Tensor:
    """Which experts every gate would choose for every token: (K, B, T, E) of 1 and 0."""
    logits_KBTE = torch.einsum("btd,ked->kbte", hidden_BTD.float(), router.weight.float())
    if router.bias is not None:
        logits_KBTE = logits_KBTE + router.bias.float()[:, None, None]
    best_KBTS = logits_KBTE.topk(router.top_k, dim=-1).indices
    return torch.zeros_like(logits_KBTE).scatter(-1, best_KBTS, 1.0)


def _shared(chosen_KME: Tensor, top_k: int) -> np.ndarray:
    """Share of each two gates' experts that are the same, summed over the M tokens: (K, K)."""
    shared: np.ndarray = torch.einsum("kme,gme->kg", chosen_KME, chosen_KME).double().cpu().numpy() / top_k
    return shared
