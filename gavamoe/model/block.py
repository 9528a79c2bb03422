"""The GaVaMoE block: router and experts in the place of a decoder layer's feed-forward network (Eq. 9-11)."""

from torch import Tensor, nn
from transformers import PreTrainedConfig

from gavamoe.model.experts import LoraExperts, MlpExperts, MoeSpec, SwiGluExperts
from gavamoe.model.router import MultiGateRouter


class MultiGateMoe(nn.Module):
    """The GaVaMoE block that stands where a decoder layer has its feed-forward network (Eq. 9-11)."""

    def __init__(self, config: PreTrainedConfig, spec: MoeSpec, shared_expert: nn.Module | None = None) -> None:
        """`shared_expert` sees every token and is added to the routed output with weight 1."""
        super().__init__()
        self.router = MultiGateRouter(spec)
        self.experts: nn.Module
        if spec.lora_rank:
            self.experts = LoraExperts(spec)
        else:
            self.experts = SwiGluExperts(config, spec) if spec.gated else MlpExperts(config, spec)
        self.scale = spec.scale
        self.dropout = nn.Dropout(spec.dropout)
        self.shared_expert = shared_expert

    def forward(self, hidden_BTD: Tensor, clusters: Tensor | None) -> Tensor:
        """Map hidden_BTD to hidden_BTD; each row's tokens are routed by the gate of its cluster, or by the mixture of
        all gates by its responsibilities (see `MultiGateRouter`)."""
        # 1. The gate of the row's cluster scores all experts for each token and keeps the best S (Eq. 9, 10).
        _, weights_MS, experts_MS = self.router(hidden_BTD, clusters)
        # 2. From here on rows don't matter: the tokens of all rows and clusters go to the same N experts together,
        #    so one grouped product serves any mix of clusters.
        hidden_MD = hidden_BTD.flatten(0, 1)
        # 3. Each token's S experts run on it, and their outputs are summed with the gate values (Eq. 11).
        routed_MD = self.experts(hidden_MD, experts_MS, weights_MS if self.scale == 1 else weights_MS * self.scale)
        # 4. Dropout where the dense network of GPT-2 has its own; LLaMA has none.
        output_BTD = self.dropout(routed_MD.view_as(hidden_BTD))
        # 5. What is kept of the dense network is added with weight 1: with routed experts that start at zero output
        #    (`shared`, `lora`), or that together are what it lacks (`upcycle`), the block starts as the dense layer.
        if self.shared_expert is not None:
            output_BTD = output_BTD + self.shared_expert(hidden_BTD)
        return output_BTD
