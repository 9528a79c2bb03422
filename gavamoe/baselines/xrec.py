"""XRec, a baseline: Ma, Ren and Huang, "XRec: Large Language Models for Explainable Recommendation", Findings of EMNLP
2024.

A frozen language model reads a prompt with a slot for the user and one for the item. LightGCN, trained on the pairs
alone, gives each a vector; two adapters, mixtures of linear experts, bring these to the model's width. The adapted
vector is the slot's input, and is added to queries, keys and values of its position in every layer.

Ours, not the paper's: any LLaMA or GPT-2 in place of LLaMA-2-7B-chat, grouped keys and values included
(`parts.injection`); profiles by a template around the features of training rows, without the row's own
(`profiles`), in place of GPT-3.5's text; one marker before answers (`prompt`); labels begin at the first word, and
texts end with the tokenizer's end token; greedy writing; a vector of zeros for ids without an edge (`lightgcn`) and for
those never seen, as which training hides some ids (their profiles stay): the adapter makes a learned constant of it.
Controls of ours: the "+" form (rating and features in the prompt), low-rank adapters on the model's attention, one
linear map in the experts' place. Prompts without profiles are a control of the paper's own.

Shapes: B rows, T tokens, S positions, N experts, C vector size, D the model's width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gavamoe.baselines.frame import Batch, Columns, Limits, Losses, Phase, Reader, Written
from gavamoe.baselines.language_model import LanguageBaseline, LanguageSpec, language_model, real_tokens
from gavamoe.baselines.parts.injection import check_width, injected
from gavamoe.baselines.parts.lightgcn import Graph, learn_vectors
from gavamoe.baselines.parts.profiles import Profiles
from gavamoe.baselines.parts.xrec_prompt import XrecPrompts
from gavamoe.config.schema import LoraConfig, RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError
from gavamoe.model.lora import adapt_attention

_EXPERT_STD = 0.02
_LEAST_NOISE = 0.01
"""Standard deviation of the gates' noise in training, beside the learned one."""


class XrecSpec(LanguageSpec):
    """Everything from which XRec is built, apart from its weights and profiles."""

    vector_size: int
    """C."""
    experts: int
    dropout: float
    profile_features: int
    """Features of a profile at most; 0: prompts have none."""
    lora: LoraConfig | None
    """Adapters on the model's attention."""


class Xrec(LanguageBaseline):
    """The language model, vectors of users and items, and their adapters."""

    spec_type = XrecSpec
    asks_rating = True
    spec: XrecSpec

    def __init__(self, spec: XrecSpec) -> None:
        super().__init__(spec)
        self.user_vectors: Tensor
        self.item_vectors: Tensor
        self.register_buffer("user_vectors", torch.zeros(spec.n_users + 1, spec.vector_size))
        self.register_buffer("item_vectors", torch.zeros(spec.n_items + 1, spec.vector_size))
        self.users = Adapter(spec.vector_size, self.width, spec.experts, spec.dropout)
        self.items = Adapter(spec.vector_size, self.width, spec.experts, spec.dropout)
        self.profiles: Profiles | None = None
        words = int(self.lm.config.vocab_size)
        self.prompts = XrecPrompts((words, words + 1), spec.features, spec.profile_features)

    @classmethod
    def check(cls, config: RunConfig, data: Dataset) -> None:
        del config
        if not len(Graph.read(data)):
            raise InputError(
                f"{data.path}: no training rating is above the middle of the scale, so XRec's graph has no pairs;"
                " prepare the data without ratings, and it has all"
            )

    @classmethod
    def create(cls, config: RunConfig, data: Dataset, reader: Reader, *, features: bool) -> Self:
        own, scratch = config.baselines.xrec, config.stage2.base_model == "scratch"
        lm, values = language_model(config, data)
        check_width(lm.config)
        spec = XrecSpec(
            features=features,
            n_users=data.catalog.known_users,
            n_items=data.catalog.known_items,
            language_model=values,
            end=reader.end,
            vector_size=own.graph.vector_size,
            experts=own.experts,
            dropout=own.dropout,
            profile_features=own.profile_features,
            lora=None if scratch or own.tune == "frozen" else LoraConfig(rank=own.lora_rank, alpha=own.lora_alpha),
        )
        model = cls(spec)
        model.lm.load_state_dict(lm.state_dict())
        model._add_lora(config.seed)
        users_UC, items_IC = learn_vectors(Graph.read(data), own.graph, config.seed)
        model.user_vectors[:-1], model.item_vectors[:-1] = users_UC, items_IC
        if spec.profile_features:
            model.profiles = Profiles.read(data)
        return model

    @classmethod
    def build(cls, spec: Any) -> Self:
        model = cls(spec)
        model._add_lora()
        return model

    def _add_lora(self, seed: int = 0) -> None:
        if self.spec.lora is not None:
            adapt_attention(self.lm, self.lm.config.model_type, self.spec.lora, seed)

    def save_more(self, folder: Path) -> None:
        """Write the profiles, if there are any."""
        if self.profiles is not None:
            self.profiles.save(folder)

    def load_more(self, folder: Path) -> None:
        """Read the profiles, if prompts have them."""
        if self.spec.profile_features:
            self.profiles = Profiles.load(folder)

    def prefixes(self, columns: Columns, reader: Reader) -> list[list[int]]:
        """Prompts with two slots, ids above the vocabulary."""
        return self.prompts.prefixes(columns, self.profiles, reader)

    def phases(self, config: RunConfig) -> list[Phase]:
        rate = config.baselines.xrec.learning_rate
        if config.stage2.base_model == "scratch":  # which has learned nothing to freeze
            return [Phase("all", rate=rate)]
        return [Phase("adapters", rate=rate, trained=lambda name: not name.startswith("lm.") or ".lora_" in name)]

    def pair(self, batch: Batch) -> Tensor:
        """The adapted vectors of user and item, float32 (B, 2, D)."""
        users_BC, items_BC = self.user_vectors[batch["users"]], self.item_vectors[batch["items"]]
        with torch.autocast(users_BC.device.type, enabled=False):
            return torch.stack([self.users(users_BC), self.items(items_BC)], dim=1)

    def places(self, tokens_BT: Tensor) -> Tensor:
        """Where the two slots are, (B, 2)."""
        return torch.stack([(tokens_BT == slot).int().argmax(dim=1) for slot in self.prompts.slots], dim=1)

    def read(self, tokens_BT: Tensor, pair_B2D: Tensor) -> Tensor:
        """The model's input (B, T, D): vectors of words, and of the pair in the slots."""
        words_BTD = self.words(tokens_BT.masked_fill(tokens_BT >= self.prompts.slots[0], self.spec.end))
        rows_B1 = torch.arange(len(tokens_BT), device=tokens_BT.device)[:, None]
        return words_BTD.index_put((rows_B1, self.places(tokens_BT)), pair_B2D.to(words_BTD.dtype))

    def losses(self, batch: Batch) -> Losses:
        """The text's loss."""
        tokens_BT, pair_B2D = batch["tokens"], self.pair(batch)
        vectors_BTD, mask_BT = self.read(tokens_BT, pair_B2D), real_tokens(batch).long()
        with injected(self.lm, pair_B2D, self.places(tokens_BT), tokens_BT.shape[1]):
            explanation = self.likelihood(vectors_BTD, mask_BT, batch["labels"])
        return {"loss": explanation, "explanation": explanation}

    @torch.inference_mode()
    def write(self, batch: Batch, prefixes: Sequence[Sequence[int]], limits: Limits) -> Written:
        pair_B2D, longest = self.pair(batch), max(map(len, prefixes))
        rows = [torch.tensor([prefix], device=pair_B2D.device) for prefix in prefixes]
        vectors = [self.read(row, pair_12D)[0] for row, pair_12D in zip(rows, pair_B2D.split(1), strict=True)]
        # `greedy` pads on the left.
        places_B2 = torch.cat([self.places(row) + longest - row.shape[1] for row in rows])
        with injected(self.lm, pair_B2D, places_B2, longest):
            return Written(self.greedy(vectors, limits), None)


class Adapter(nn.Module):
    """From a graph's vector to the model's width: the sum of N linear maps, each weighted by its gate."""

    def __init__(self, size: int, width: int, experts: int, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, size, width))
        self.offset = nn.Parameter(torch.zeros(experts, size))
        self.gate = nn.Parameter(torch.zeros(size, experts))
        self.noise = nn.Parameter(torch.zeros(size, experts))
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.weight, std=_EXPERT_STD)

    def shares(self, x_BC: Tensor) -> Tensor:
        """Each expert's weight, (B, N): all take part. Only in training the gates are noisy."""
        gates_BN = x_BC @ self.gate
        if self.training:
            spread_BN = F.softplus(x_BC @ self.noise) + _LEAST_NOISE
            gates_BN = gates_BN + spread_BN * torch.randn_like(gates_BN)
        return gates_BN.softmax(dim=-1)

    def forward(self, x_BC: Tensor) -> Tensor:
        """Adapted vectors (B, D): the gated sum of W_n (dropout(x) - b_n)."""
        x_BNC = self.dropout(x_BC[:, None].expand(-1, len(self.weight), -1)) - self.offset
        gated_BNC = self.shares(x_BC)[..., None] * x_BNC
        return gated_BNC.flatten(1) @ self.weight.flatten(0, 1)
