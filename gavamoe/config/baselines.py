"""Settings of the baselines: rival systems, each with a section of its own."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from gavamoe.config.section import Count, NonNegative, Positive, Rate, Section, Share

SystemName = Literal[
    "gavamoe", "peter", "peter-plus", "nete", "pepler", "pepler-plus", "pevae", "pevae-plus", "xrec", "xrec-plus",
    "cier", "cier-plus", "g-refer", "g-refer-plus",
]  # fmt: skip
"""What a run trains: GaVaMoE, or a baseline; a + form reads given features."""


def baseline_section(system: str) -> str:
    """The field of `BaselinesConfig` that has a baseline's settings; its + form shares it."""
    return system.removesuffix("-plus").replace("-", "_")


def reads_features(system: str) -> bool:
    """Whether a system reads the features a text is to speak of: GaVaMoE, a + form, and NETE, which has no other."""
    return system.endswith("-plus") or system in ("gavamoe", "nete")


class PeterConfig(Section):
    """The baseline PETER (Li, Zhang and Chen, ACL 2021), with its own paper's values but for the optimizer. Steps,
    batch size, schedule and clipping are stage 2's."""

    embedding_size: Annotated[int, Field(ge=2, multiple_of=2)] = 512
    """Width of PETER's embeddings and hidden states; a multiple of `heads`."""
    layers: PositiveInt = 2
    """Number of PETER's transformer layers."""
    heads: PositiveInt = 2
    """Number of attention heads of each of PETER's layers."""
    feed_forward: PositiveInt = 2048
    """Width of PETER's feed-forward layers."""
    dropout: Rate = 0.2
    """Dropout rate in PETER's layers."""
    explanation_weight: NonNegative = 1.0
    """Weight of the explanation's loss in PETER's total loss."""
    context_weight: NonNegative = 1.0
    """Weight of the loss of context prediction (the explanation's words without their order) in PETER's total loss."""
    rating_weight: NonNegative = 0.1
    """Weight of the rating's squared error in PETER's total loss."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of AdamW in PETER's training."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "PeterConfig":
        if self.embedding_size % self.heads:
            raise ValueError(f"heads: embedding_size {self.embedding_size} is not a multiple of heads {self.heads}")
        return self


class NeteConfig(Section):
    """The baseline NETE (Li, Zhang and Chen, CIKM 2020), with its own paper's sizes."""

    embedding_size: PositiveInt = 200
    """Width of NETE's embeddings of users, items, sentiments and words."""
    hidden_size: PositiveInt = 256
    """Width of the states of NETE's two recurrent networks."""
    rating_layers: PositiveInt = 4
    """Hidden layers of NETE's rating predictor, each as wide as a user's and an item's embedding together."""
    rating_decay: NonNegative = 1e-4
    """Weight of half the squared norm of the rating predictor's parameters in its loss."""
    dropout: Rate = 0.2
    """Dropout rate on what NETE's recurrent networks read."""
    word_spread: Positive = 1.0
    """Standard deviation of NETE's vectors of words before training. The published code's, uniform between -.1 and .1,
    have .058; with those, texts learn nothing but how frequent words are for the first hundreds of steps."""
    tied: bool = False
    """Whether both recurrent networks share weights, as the published code seems to have it; the paper has two."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of AdamW in NETE's training; its paper has Adam at 1e-4 for up to 100 epochs."""


class PeplerConfig(Section):
    """The baseline PEPLER (Li, Zhang and Chen, TOIS 2023) around `stage2.base_model`."""

    variant: Literal["sequential", "mf", "mlp", "discrete"] = "sequential"
    """How PEPLER is trained. sequential: first the vectors of users and items beside the frozen model, then everything;
    mf, mlp: everything at once, with a rating predicted by the vectors' product or by a network; discrete (PEPLER-D):
    everything at once, with features of user and item as words in the vectors' place. A scratch model has nothing to
    freeze, and is trained as a whole."""
    prompt_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the steps in which the vectors of users and items alone are trained."""
    prompt_learning_rate: Positive = 1e-3
    """Peak learning rate of AdamW in PEPLER's first phase."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of AdamW where everything is trained; a pretrained model wants a lower one."""
    rating_weight: NonNegative = 0.0
    """Weight of the rating's squared error; 0: the paper's, .01 with mf, 1 with mlp."""
    id_scale: NonNegative = 0.0
    """Vectors of users and items start uniform between minus this and this, .1 in the paper; 0: as widely spread as
    those of the model's words."""
    discrete_tokens: PositiveInt = 20
    """Tokens of the features that PEPLER-D reads at most."""
    aspects: Count = 0
    """Aspects between which MAPLE (ACL 2025) chooses one for a third vector: the most frequent training features, and
    one for all others; 0: PEPLER without it."""
    top_aspects: PositiveInt = 3
    """Likeliest aspects whose vectors MAPLE averages where a text is written."""
    aspect_weight: Positive = 0.01
    """Weight of the cross-entropy of MAPLE's choice of an aspect."""

    @model_validator(mode="after")
    def _aspects_need_vectors(self) -> "PeplerConfig":
        if self.aspects and self.variant == "discrete":
            raise ValueError("aspects: chosen by the vectors of user and item, which variant discrete has not")
        return self


class CierConfig(Section):
    """The baseline CIER (Liu et al., AAAI 2025) around `stage2.base_model`, with its own paper's values but for
    steps, batch size and schedule."""

    embedding_size: PositiveInt = 1024
    """Width of CIER's tables of users and items, before their projection to the language model's width."""
    levels: Annotated[int, Field(ge=2, le=26)] = 5
    """Evenly spaced levels by which CIER reads a continuous scale of ratings, each with a token of its own; a finite
    scale has as many as it has ratings."""
    smoothing: Share = 0.2
    """Probability that CIER is shown, in training, a middle rating with part of its mass on both neighbors."""
    rating_weight: NonNegative = 0.1
    """Weight of the rating's cross-entropy in CIER's total loss."""
    lora_rank: Count = 4
    """Rank of the low-rank adapters that CIER trains on a pretrained model; 0: the model is trained as a whole. A
    scratch model always is."""
    lora_alpha: Positive = 32.0
    """Scale of CIER's adapters: their output is multiplied by alpha / rank."""
    lora_on: Literal["query_key", "attention"] = "query_key"
    """Matrices that have CIER's adapters. query_key: queries and keys of the attention, in GPT-2 values too; attention:
    all four of its projections."""
    model_learning_rate: Positive = 1e-4
    """Peak learning rate of AdamW for CIER's adapters, or for the pretrained model where it has none."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of AdamW for all else that CIER trains: tables and projections, and a scratch model."""


class GReferConfig(Section):
    """The baseline G-Refer (Li et al., WWW 2025), its node retriever alone, around `stage2.base_model`."""

    neighbors: PositiveInt = 2
    """Training explanations that G-Refer's prompt quotes at most, of the item by other users and of other items by the
    user: so many of each."""
    least_likeness: Share = 0.0
    """Smallest cosine between two users, or two items, at which G-Refer quotes one for the other; 0: the likest ones,
    however unlike they are."""
    quoted_tokens: PositiveInt = 32
    """Tokens of each quoted explanation in G-Refer's prompt at most; longer ones are cut."""
    lora_rank: Count = 8
    """Rank of the low-rank adapters that G-Refer trains on a pretrained model; 0: the model is trained as a whole. A
    scratch model always is."""
    lora_alpha: Positive = 16.0
    """Scale of G-Refer's adapters: their output is multiplied by alpha / rank."""
    lora_on: Literal["query_key", "attention"] = "attention"
    """Matrices that have G-Refer's adapters. query_key: queries and keys of the attention, in GPT-2 values too;
    attention: all four of its projections."""
    learning_rate: Positive = 2e-5
    """Peak learning rate of AdamW in G-Refer's training around a pretrained model, its paper's value."""
    scratch_learning_rate: Positive = 1e-3
    """Peak learning rate of AdamW in G-Refer's training of a scratch model."""


class LightGcnConfig(Section):
    """LightGCN (He et al., SIGIR 2020), whose vectors of users and items the baseline XRec reads. Sizes are XRec's."""

    vector_size: PositiveInt = 64
    """Length of a user's or an item's vector in LightGCN."""
    layers: PositiveInt = 4
    """How often LightGCN passes vectors along the graph's edges."""
    pooling: Literal["sum", "mean"] = "sum"
    """How LightGCN joins its layers: sum, as XRec's code has it, or mean, as LightGCN's own paper."""
    epochs: PositiveInt = 300
    """Passes over LightGCN's edges at most."""
    patience: PositiveInt = 10
    """Epochs without a lower loss on the edges held out after which LightGCN stops."""
    held_out: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Share of the edges by which LightGCN's training is stopped and its best state chosen; 0: it takes all epochs."""
    batch_size: PositiveInt = 1024
    """Edges of a step of LightGCN; each step passes vectors along the whole graph, so a large graph wants more."""
    learning_rate: Positive = 1e-3
    """Learning rate of Adam in LightGCN's training."""
    norm_weight: NonNegative = 1e-6
    """Weight of the squared norms of a batch's vectors, added up, in LightGCN's loss."""


class XrecConfig(Section):
    """The baseline XRec (Ma, Ren and Huang, Findings of EMNLP 2024) around `stage2.base_model`."""

    graph: LightGcnConfig = LightGcnConfig()
    """LightGCN, whose vectors XRec's adapters read."""
    experts: PositiveInt = 8
    """Experts in each of XRec's two adapters; 1: one linear map in their place."""
    dropout: Rate = 0.2
    """Dropout rate on the vectors that XRec's adapters read."""
    profile_features: Count = 10
    """Features at most in XRec's profile of a user or an item; 0: prompts have no profiles."""
    tune: Literal["frozen", "lora"] = "frozen"
    """What XRec trains beside its adapters. frozen: nothing, as the paper; lora: low-rank adapters on the language
    model's attention. A scratch model has nothing to freeze, and is trained as a whole."""
    lora_rank: PositiveInt = 8
    """Rank of XRec's low-rank adapters, with `tune: lora`."""
    lora_alpha: Positive = 16.0
    """Scale of XRec's low-rank adapters: their output is multiplied by alpha / rank."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of AdamW in XRec's training; its paper has Adam at 1e-4 for one epoch of single rows."""


class PevaeConfig(Section):
    """The baseline PEVAE (Cai and Cai, SIGIR 2022), our construction after its paper's figure."""

    width: PositiveInt = 128
    """Width of PEVAE's vectors of users, items and words, and of its widest level; a multiple of `heads`, and of 2 for
    each level after the first."""
    levels: PositiveInt = 3
    """Number of PEVAE's levels of latent variables; each is half as wide as the one before."""
    layers: PositiveInt = 2
    """Number of layers of PEVAE's encoder of pairs, of its encoder of words and of its decoder."""
    heads: PositiveInt = 4
    """Number of attention heads of each of PEVAE's layers."""
    dropout: Rate = 0.0
    """Dropout rate in PEVAE's layers; the published code has .2 and .3, with which small models learn a text's words
    long before they learn what two vectors, of user and item, tell."""
    kl: Literal["fused", "elbo"] = "fused"
    """PEVAE's divergences. fused: prior and posterior are each held to the fused distribution, which stands still, as
    in the published code; elbo: the fused distribution is held to the prior with weight 1, and gradients flow
    everywhere, as in a plain variational autoencoder."""
    prior_weight: NonNegative = 0.5
    """Weight of the divergence that holds PEVAE's prior to the fused distribution, where `kl` is fused."""
    posterior_weight: NonNegative = 0.1
    """Weight of the divergence that holds PEVAE's posterior to the fused distribution, where `kl` is fused."""
    beta_warmup: Share = 0.2
    """Share of the steps over which the weight of PEVAE's divergences grows from 0."""
    free_nats: NonNegative = 0.0
    """Nats of each level's divergence that cost nothing, so that PEVAE's latent variables go on to carry something of
    the words; it holds for the posterior's divergence, and for that of elbo. Words so carried are missed in writing."""
    rating_weight: NonNegative = 0.1
    """Weight of the rating's squared error in PEVAE's total loss."""
    fusion: bool = True
    """Whether PEVAE fuses prior and posterior (self-adaption fusion); without it training samples the posterior, which
    is then held to the prior."""
    discriminator: bool = True
    """Whether PEVAE has a discriminator, which tells a pair's own latent variables from another pair's."""
    discriminator_weight: NonNegative = 0.1
    """Weight of the discriminator's loss in PEVAE's total loss."""
    learning_rate: Positive = 4e-3
    """Peak learning rate of AdamW in PEVAE's training; the published code has Adam at 1e-4."""

    @property
    def level_widths(self) -> list[int]:
        """Widths of the levels, the widest first."""
        return [self.width >> level for level in range(self.levels)]

    @model_validator(mode="after")
    def _divides(self) -> "PevaeConfig":
        if self.width % self.heads:
            raise ValueError(f"heads: width {self.width} is not a multiple of heads {self.heads}")
        if self.width % 2 ** (self.levels - 1):
            raise ValueError(
                f"levels: width {self.width} can't be halved for each of {self.levels} levels; it must be a multiple of"
                f" {2 ** (self.levels - 1)}"
            )
        return self


class BaselinesConfig(Section):
    """The baselines, which `gavamoe train --system NAME` and `gavamoe ablate` train."""

    peter: PeterConfig = PeterConfig()
    """The baseline PETER."""
    nete: NeteConfig = NeteConfig()
    """The baseline NETE."""
    pepler: PeplerConfig = PeplerConfig()
    """The baseline PEPLER."""
    cier: CierConfig = CierConfig()
    """The baseline CIER."""
    g_refer: GReferConfig = GReferConfig()
    """The baseline G-Refer."""
    xrec: XrecConfig = XrecConfig()
    """The baseline XRec."""
    pevae: PevaeConfig = PevaeConfig()
    """The baseline PEVAE."""
