"""Settings of the baselines: rival systems, each with a section of its own."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from gavamoe.config.section import NonNegative, Positive, Rate, Section, Share

SystemName = Literal["gavamoe", "peter", "peter-plus", "nete", "pepler", "pepler-plus", "pevae", "pevae-plus"]
"""What a run trains: GaVaMoE, or a baseline; a + form reads given features."""


def baseline_section(system: str) -> str:
    """The field of `BaselinesConfig` that has a baseline's settings; its + form shares it."""
    return system.removesuffix("-plus").replace("-", "_")


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
    tied: bool = False
    """Whether both recurrent networks share weights, as the published code seems to have it; the paper has two."""
    learning_rate: Positive = 1e-3
    """Peak learning rate of AdamW in NETE's training; its paper has Adam at 1e-4 for up to 100 epochs."""


class PeplerConfig(Section):
    """The baseline PEPLER (Li, Zhang and Chen, TOIS 2023) around `stage2.base_model`."""

    variant: Literal["sequential", "mf", "mlp"] = "sequential"
    """How PEPLER is trained. sequential: first the vectors of users and items beside the frozen model, then everything;
    mf, mlp: everything at once, with a rating predicted by the vectors' product or by a network. A scratch model has
    nothing to freeze, and is trained as a whole."""
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
    dropout: Rate = 0.2
    """Dropout rate in PEVAE's layers."""
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
    free_nats: NonNegative = 1.0
    """Nats of each level's divergence that cost nothing, so that PEVAE's latent variables go on to carry something of
    the words; it holds for the posterior's divergence, and for that of elbo."""
    rating_weight: NonNegative = 0.1
    """Weight of the rating's squared error in PEVAE's total loss."""
    fusion: bool = True
    """Whether PEVAE fuses prior and posterior (self-adaption fusion); without it training samples the posterior, which
    is then held to the prior."""
    discriminator: bool = True
    """Whether PEVAE has a discriminator, which tells a pair's own latent variables from another pair's."""
    discriminator_weight: NonNegative = 0.1
    """Weight of the discriminator's loss in PEVAE's total loss."""
    learning_rate: Positive = 1e-3
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
    pevae: PevaeConfig = PevaeConfig()
    """The baseline PEVAE."""
