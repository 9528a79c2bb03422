"""The GaVaMoE block: router and experts in the place of a decoder layer's feed-forward network (Eq. 9-11)."""

from torch import Tensor, nn
from transformers import PreTrainedConfig

from gavamoe.model.experts import MlpExperts, MoeSpec, SwiGluExperts
from gavamoe.model.router import MultiGateRouter


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
