"""Parts of the baseline PEVAE (`pevae`): Transformers, narrowing blocks, Gaussians and their fusion, discriminator.

The fusion's formula and the drawing of hard negatives are those of the published code; sizes, pre-normalized layers and
shorter residual blocks without spectral norm are ours.

Shapes: B rows, S positions, D width of a Transformer, W width of a latent level.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_INITIAL = 0.1
"""Standard deviation of embeddings at the start."""
_LOG_SPREAD = (-4.0, 2.0)
"""Bounds of the logarithm of a Gaussian's standard deviation: none vanishes, and no divergence is infinite."""
_FEED_FORWARD = 4
"""Width of a layer's feed-forward part, in widths of the layer."""

Past = tuple[Tensor, Tensor]
"""Keys and values of one layer so far: (B, heads, S, D / heads) each."""


def table(rows: int, width: int) -> nn.Embedding:
    """An embedding table (rows, width) with small normal weights."""
    made = nn.Embedding(rows, width)
    nn.init.normal_(made.weight, std=_INITIAL)
    return made


class Layer(nn.Module):
    """Self-attention and feed-forward of a Transformer, each on normalized input (GPT-2's order), with GELU."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.projected = nn.Linear(width, 3 * width)
        self.joined = nn.Linear(width, width)
        wide = _FEED_FORWARD * width
        self.feed_forward = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BSD: Tensor, mask: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """States (B, S, D), and the keys and values of all positions so far.

        Args:
            mask: bool, spread over (B, heads, S, all positions): which positions each one sees.
            past: of the positions before `x_BSD`.
        """
        rows, places, width = x_BSD.shape
        split = self.projected(self.attention_norm(x_BSD)).view(rows, places, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        drop = self.dropout.p if self.training else 0.0
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=drop)
        x_BSD = x_BSD + self.dropout(self.joined(seen.transpose(1, 2).reshape(rows, places, width)))
        return x_BSD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BSD))), (key, value)


class Transformer(nn.Module):
    """Layers with learned positions: an encoder with a summary vector, or a decoder."""

    def __init__(self, places: int, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.places = table(places, width)
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def run(
        self, x_BSD: Tensor, mask: Tensor, past: list[Past] | None = None, first: int = 0
    ) -> tuple[Tensor, list[Past]]:
        """States (B, S, D), and keys and values by layer, from which a next call continues.

        Args:
            first: the place of the first vector of all.
        """
        start = first if past is None else first + past[0][0].shape[2]
        x_BSD = self.dropout(x_BSD + self.places.weight[start : start + x_BSD.shape[1]])
        kept = []
        for number, layer in enumerate(self.layers):
            x_BSD, state = layer(x_BSD, mask, None if past is None else past[number])
            kept.append(state)
        return self.norm(x_BSD), kept


class Encoder(Transformer):
    """A bidirectional Transformer whose first position, [CLS], sums up the others."""

    def __init__(self, places: int, width: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__(places + 1, width, layers, heads, dropout)
        self.summary = table(1, width)

    def forward(self, x_BSD: Tensor, real_BS: Tensor) -> Tensor:
        """The summary (B, D) of the vectors where `real_BS`, bool, is true; others are not read."""
        first_B1D = self.summary.weight.expand(len(x_BSD), 1, -1)
        seen_BS = F.pad(real_BS, (1, 0), value=True)
        states_BSD, _ = self.run(torch.cat([first_B1D, x_BSD], dim=1), seen_BS[:, None, None])
        return states_BSD[:, 0]


class Decoder(Transformer):
    """A causal Transformer."""

    def forward(
        self, x_BSD: Tensor, past: list[Past] | None = None, *, padding_B: Tensor, first: int = 0
    ) -> tuple[Tensor, list[Past]]:
        """States (B, S, D) of the next positions, and the keys and values from which another call continues.

        Args:
            padding_B: how many positions at each row's start nothing is read from; these read themselves.
            first: the place of the first vector of all.
        """
        start = 0 if past is None else past[0][0].shape[2]
        places_E = torch.arange(start + x_BSD.shape[1], device=x_BSD.device)
        before_SE = places_E <= places_E[start:, None]
        itself_SE = places_E == places_E[start:, None]
        seen_BSE = before_SE & (places_E >= padding_B[:, None, None]) | itself_SE
        return self.run(x_BSD, seen_BSE[:, None], past, first)


class Block(nn.Sequential):
    """A residual network of two layers with GELU, layer norm, and a linear map to another width."""

    def __init__(self, width: int, outer: int) -> None:
        super().__init__(_Residual(width), nn.LayerNorm(width), nn.Linear(width, outer))


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = x + self.inner(x)
        return changed


class Narrowing(nn.Module):
    """A summary at every level: the first as it is, each of the others half as wide as the one before."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(wide, narrow) for wide, narrow in pairwise(widths))

    def forward(self, summary_BD: Tensor) -> list[Tensor]:
        """(B, W) for each level, the widest first."""
        levels = [summary_BD]
        for block in self.blocks:
            levels.append(block(levels[-1]))
        return levels


@dataclass(frozen=True)
class Gaussian:
    """B normal distributions of W independent dimensions."""

    mean: Tensor
    """(B, W)."""
    spread: Tensor
    """Standard deviations, (B, W)."""

    def sample(self) -> Tensor:
        """A draw of each, (B, W), through which gradients flow."""
        return self.mean + self.spread * torch.randn_like(self.spread)

    def detach(self) -> Self:
        """The same, through which no gradient flows."""
        return type(self)(self.mean.detach(), self.spread.detach())

    def divergence(self, other: "Gaussian") -> Tensor:
        """Kullback-Leibler divergence KL(self || other) of each row, (B,), in nats."""
        ratio = self.spread / other.spread
        shift = (self.mean - other.mean) / other.spread
        return ((ratio.square() + shift.square() - 1) / 2 - ratio.log()).sum(dim=-1)

    def fused(self, other: "Gaussian") -> Self:
        """Self-adaption fusion: each mean weighted by the OTHER's spread, so that the surer one prevails; the spread is
        the harmonic mean of both."""
        total = self.spread + other.spread
        mean = (self.spread * other.mean + other.spread * self.mean) / total
        return type(self)(mean, 2 * self.spread * other.spread / total)


class GaussianHead(nn.Module):
    """A Gaussian of W dimensions from a vector."""

    def __init__(self, width: int, outer: int) -> None:
        super().__init__()
        self.block = Block(width, 2 * outer)

    def forward(self, x: Tensor) -> Gaussian:
        # Divergences are sums over many dimensions: float32 also under autocast.
        mean, log_spread = self.block(x).float().chunk(2, dim=-1)
        return Gaussian(mean, log_spread.clamp(*_LOG_SPREAD).exp())


class Discriminator(nn.Module):
    """Tells a pair's own latent from another pair's; minimizing its loss, with the encoders, raises a lower bound of
    the mutual information of both."""

    def __init__(self, width: int, latent: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(width + latent, width), Block(width, 1))

    def forward(self, pair_BD: Tensor, latent_BW: Tensor) -> Tensor:
        """Logits (B,) of "this latent is this pair's"."""
        logits_B: Tensor = self.blocks(torch.cat([pair_BD, latent_BW], dim=-1)).squeeze(-1)
        return logits_B.float()

    def loss(self, pair_BD: Tensor, latent_BW: Tensor) -> Tensor:
        """-mean[log D(own) + log(1 - D(another's))], with one hard negative a row; 0 for a single row."""
        if len(pair_BD) < 2:
            return pair_BD.new_zeros((), dtype=torch.float32)
        others_B = hard_negatives(latent_BW.detach())
        own_B, foreign_B = self(pair_BD, latent_BW), self(pair_BD, latent_BW[others_B])
        return (F.softplus(-own_B) + F.softplus(foreign_B)).mean()


def hard_negatives(latent_BW: Tensor) -> Tensor:
    """For each of B >= 2 rows another one (B,), drawn with a probability proportional to 1 + cosine of both."""
    unit_BW = F.normalize(latent_BW.float(), dim=-1)
    # All others may point the opposite way: none is impossible, so that there is always one to draw.
    weights_BB = (1 + unit_BW @ unit_BW.T).clamp(min=1e-9).fill_diagonal_(0.0)
    return torch.multinomial(weights_BB, 1).squeeze(-1)
