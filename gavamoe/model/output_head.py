"""The output head, with a training loss that never holds the logits of a large vocabulary whole.

Plain cross-entropy of L tokens over V words holds L x V floats three times at its peak. Where they would be many, the
loss is taken in chunks of tokens: a chunk's logits give its part of the loss and, while they stand, of both gradients;
then the next chunk's take their place. These are the plain way's three products, in another order (so does Liger
Kernel). Input: hidden states of labeled tokens. Output: logits, or the sum of the tokens' losses.

Shape letters: L labeled tokens, C tokens of a chunk, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

CPU_LOGITS = 2**24
"""Logits that stand at once on a CPU, at most: 64 MB in float32."""
GPU_LOGITS = 2**26
"""The same on other devices. Each chunk reads the whole weight and adds to the whole gradient of it: with fewer tokens
than some 500 of a vocabulary of 128,000, a device of fast arithmetic would wait for its memory."""


def chunk_tokens(vocabulary: int, device: str) -> int:
    """C: tokens whose logits stand at once, at most."""
    return max(1, (CPU_LOGITS if device == "cpu" else GPU_LOGITS) // vocabulary)


class OutputHead(nn.Linear):
    """Hidden states to logits over the vocabulary, or to the loss of labeled tokens.

    Both are the module's forward pass, since ZeRO-3 has its weight whole in there alone.
    """

    def __init__(self, hidden_size: int, vocabulary: int) -> None:
        super().__init__(hidden_size, vocabulary, bias=False)

    def forward(self, hidden: Tensor, targets_L: Tensor | None = None) -> Tensor:
        """Logits (..., V) of `hidden` (..., D); or, with targets, the summed negative log-likelihood, a scalar.

        Args:
            hidden: (..., D); with targets (L, D).
            targets_L: a word for each hidden state; L may be 0.
        """
        if targets_L is None:
            return super().forward(hidden)
        most = chunk_tokens(self.out_features, hidden.device.type)
        if len(targets_L) > most:
            loss: Tensor = _ChunkedLoss.apply(hidden, self.weight, targets_L, most, torch.is_grad_enabled())
            return loss
        return functional.cross_entropy(_wide(super().forward(hidden)), targets_L, reduction="sum")


def _wide(values: Tensor) -> Tensor:
    """In float32 or wider: a bfloat16 has 3 digits, too few to sum probabilities of a vocabulary."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


class _ChunkedLoss(torch.autograd.Function):
    """Summed negative log-likelihood; both gradients are made in the forward pass, and scaled in the backward one."""

    @staticmethod
    def forward(
        context: Any, hidden_LD: Tensor, weight_VD: Tensor, targets_L: Tensor, most: int, learning: bool
    ) -> Tensor:
        kind = hidden_LD.device.type
        product_type = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_VD.dtype
        with torch.autocast(kind, enabled=False):  # which would cast the weight anew for each product
            found = _chunk_by_chunk(
                hidden_LD.to(product_type),
                weight_VD.to(product_type),
                targets_L,
                -(-len(targets_L) // -(-len(targets_L) // most)),  # chunks of equal size
                [learning and wanted for wanted in context.needs_input_grad[:2]],
            )
        loss, *context.gradients = found
        context.types = hidden_LD.dtype, weight_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(context: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if context.gradients is None:
            raise RuntimeError("the loss of a large vocabulary allows one backward pass; call forward again")
        # Scaled in place, and not kept: the weight's gradient is as large as the weight.
        gradients, context.gradients = context.gradients, None
        scaled = [
            None if gradient is None else gradient.mul_(scale).to(dtype)
            for gradient, dtype in zip(gradients, context.types, strict=True)
        ]
        return *scaled, None, None, None


def _chunk_by_chunk(
    hidden_LD: Tensor, weight_VD: Tensor, targets_L: Tensor, size: int, wanted: list[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The summed loss, and its gradients (L, D) and (V, D) where wanted; all of them in float32 or wider."""
    wide = torch.promote_types(hidden_LD.dtype, torch.float32)
    loss = hidden_LD.new_zeros((), dtype=wide)
    of_hidden_LD = torch.empty_like(hidden_LD, dtype=wide) if wanted[0] else None
    of_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if wanted[1] else None
    for start in range(0, len(targets_L), size):
        part = slice(start, start + size)
        of_hidden_CD = None if of_hidden_LD is None else of_hidden_LD[part]
        loss += _chunk(hidden_LD[part], weight_VD, targets_L[part, None], of_hidden_CD, of_weight_VD)
    return loss, of_hidden_LD, of_weight_VD


def _chunk(
    hidden_CD: Tensor, weight_VD: Tensor, target_C1: Tensor, of_hidden_CD: Tensor | None, of_weight_VD: Tensor | None
) -> Tensor:
    """A chunk's loss; writes its hidden states' gradient, adds to the weight's. What it makes ends with the call."""
    log_CV = functional.log_softmax(_wide(hidden_CD @ weight_VD.T), dim=-1)
    loss = -log_CV.gather(1, target_C1).sum()
    if of_hidden_CD is None and of_weight_VD is None:
        return loss
    # The gradient of the logits: each word's probability, less 1 at the word that comes.
    log_CV.exp_().scatter_add_(1, target_C1, log_CV.new_full((len(target_C1), 1), -1.0))
    slope_CV = log_CV.to(hidden_CD.dtype)
    if of_hidden_CD is not None:
        of_hidden_CD.copy_(slope_CV @ weight_VD)
    if of_weight_VD is not None:
        if of_weight_VD.dtype == slope_CV.dtype:
            of_weight_VD.addmm_(slope_CV.T, hidden_CD)
        else:
            of_weight_VD += slope_CV.T @ hidden_CD
    return loss
