"""An explainer's large matrices in 8 or 4 bits, for writing on a CPU.

Writing reads every weight for each token, so fewer bytes are less time. Quantized are the
decoder's linear layers, its routed experts and the output head; routers, norms and tables stay float32.

    int8    torch's dynamic kernel (FBGEMM, oneDNN): one scale an output; what a layer reads is rounded to 8 bits as
            well, by a scale a row, after its loud numbers have shared their range with the weights that meet them.
            Routed experts, small and with few rows each: torch's packed kernel, arithmetic in bfloat16
    int4    torch's packed kernel: a scale and a zero point for each 32 weights of an output; arithmetic in bfloat16. An
            eighth of the bytes, but for the head's 8 bits, for machines short of memory

Shape letters: M tokens, S experts of a token, N experts, D hidden size, I width, O outputs of a layer.
"""

import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from gavamoe.errors import InputError
from gavamoe.model.experts import MlpExperts, SwiGluExperts
from gavamoe.model.explainer import GavamoeForCausalLM

Quantization = Literal["none", "int8", "int4"]
GROUP = 32
"""Weights of an output that share a scale, for int4."""
_HEARD_WORDS = (8, 32)
"""Random texts, and words of each, from which is heard how loud the inputs of layers are."""
_FEW_ROWS = 24
"""Rows up to which an expert's packed kernel is faster than its weights in float32, made anew."""
_SILENT = 1e-6
"""What is quieter is taken for as loud as this."""
_TINY = torch.finfo(torch.float32).tiny
_OUTPUTS_OF_INT4 = 16
"""What the outputs of an int4 layer must be a multiple of."""


def quantize(model: GavamoeForCausalLM, kind: Quantization) -> GavamoeForCausalLM:
    """Replace an explainer's large matrices, in place; it can then write and score, but not be trained or saved.

    Raises:
        InputError: the model is not in float32 on a CPU, or this processor's torch has no such kernels.
    """
    if kind == "none":
        return model
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise InputError(
            f"generation.quantize {kind}: is for writing on a CPU, from float32 weights; leave it out on"
            f" {model.device.type}, and generation.dtype {str(model.dtype).removeprefix('torch.')}"
        )
    if torch.backends.quantized.engine == "none":
        raise InputError(f"generation.quantize {kind}: this build of torch has no quantized kernels; leave it out")
    loudness = _loudness(model)
    for parent, name, layer in list(_layers(model.model)):
        setattr(parent, name, _linear(_weight(layer), layer.bias, kind, loudness.get(layer)))
    for block in model.model.modules():
        experts = getattr(block, "experts", None)
        if isinstance(experts, SwiGluExperts | MlpExperts):
            block.experts = QuantizedExperts(experts, kind)
    head = QuantizedHead(model.lm_head.weight, loudness[model.lm_head])
    model.lm_head = head  # type: ignore[assignment]  # the same calls, other weights
    return model


def _loudness(model: GavamoeForCausalLM) -> dict[nn.Module, Tensor]:
    """Root mean square (D,) of each number that a layer reads, over texts of random words: which are loud is the
    model's way, whatever the text."""
    found: dict[nn.Module, Tensor] = {}

    def listen(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[layer] = inputs[0].detach().flatten(0, -2).square().mean(0).sqrt()

    # Not of routed experts, which lose little by it and would pay for it in every pass, each for the few rows it has.
    heard = [layer for _, _, layer in _layers(model.model)]
    hooks = [layer.register_forward_pre_hook(listen) for layer in [*heard, model.lm_head]]
    drawn = torch.Generator().manual_seed(0)
    words = torch.randint(0, model.config.vocab_size, _HEARD_WORDS, generator=drawn)
    with torch.no_grad():
        model(words, cluster_ids=torch.zeros(len(words), dtype=torch.long), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def _layers(decoder: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """The decoder's linear layers: what holds them, and under which name."""
    for parent in decoder.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear | Conv1D):
                yield parent, name, child


def _weight(layer: nn.Module) -> Tensor:
    """(O, D); GPT-2's layers store the other way round."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight.T if isinstance(layer, Conv1D) else weight


def _linear(
    weight_OD: Tensor, bias_O: Tensor | None, kind: Quantization, loudness_D: Tensor | None = None
) -> nn.Module:
    return Int4Linear(weight_OD, bias_O) if _fits_int4(weight_OD, kind) else Int8Linear(weight_OD, bias_O, loudness_D)


def _linear_of_expert(weight_OD: Tensor, bias_O: Tensor | None, kind: Quantization) -> nn.Module:
    return Int4Linear(weight_OD, bias_O) if _fits_int4(weight_OD, kind) else Int8ExpertLinear(weight_OD, bias_O)


def _fits_int4(weight_OD: Tensor, kind: Quantization) -> bool:
    outputs, inputs = weight_OD.shape
    return kind == "int4" and inputs % GROUP == 0 and outputs % _OUTPUTS_OF_INT4 == 0


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights, (..., D) to (..., O).

    A few of the numbers that a layer reads may be ten to twenty times as loud as the others and would leave these few
    of their 8 bits. So each is divided by a factor, and the weights that meet it are multiplied by that: the geometric
    mean that shares the range between both (SmoothQuant, Xiao et al., ICML 2023, with root mean squares in place of
    maxima).
    """

    def __init__(self, weight_OD: Tensor, bias_O: Tensor | None = None, loudness_D: Tensor | None = None) -> None:
        """`loudness_D`: root mean square of each number that the layer reads; None: taken for alike."""
        super().__init__()
        self.out_features, self.in_features = weight_OD.shape
        weight_OD = weight_OD.detach().float().contiguous()
        self._quieter_D: Tensor | None = None
        if loudness_D is not None:
            size_D = weight_OD.square().mean(0).sqrt()
            factor_D = (loudness_D.clamp(min=_SILENT) / size_D.clamp(min=_SILENT)).sqrt()
            weight_OD, self._quieter_D = weight_OD * factor_D, 1 / factor_D
        scale_O = (weight_OD.abs().amax(1) / 127).clamp(min=_TINY).double()
        zero_O = torch.zeros(len(scale_O), dtype=torch.long)
        with warnings.catch_warnings():
            # Announced as going, with nothing yet in its place that this kernel would read.
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*deprecated")
            quantized = torch.quantize_per_channel(weight_OD, scale_O, zero_O, 0, torch.qint8)
        self._packed = torch.ops.quantized.linear_prepack(quantized, None)
        self._bias = None if bias_O is None else bias_O.detach().float()
        # Without these instructions a product of two 8-bit numbers may not fit: what is read then gets 7 bits.
        self._reduced = not torch.cpu._is_vnni_supported()

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) float32 to (..., O)."""
        # The kernel has one scale for all rows of a pass, and a language model's first token is a thousand times as
        # loud as the others: each row is brought to the same size before, and its output back behind.
        if self._quieter_D is not None:
            hidden = hidden * self._quieter_D
        size = hidden.abs().amax(-1, keepdim=True).clamp_(min=_TINY)
        output: Tensor = torch.ops.quantized.linear_dynamic(hidden / size, self._packed, self._reduced).mul_(size)
        return output if self._bias is None else output + self._bias


class Int8ExpertLinear(nn.Module):
    """A routed expert's linear layer with 8-bit weights, (M, D) to (M, O).

    What it reads is not rounded to 8 bits: finding each row's scale took six times as long as so small a product.
    """

    def __init__(self, weight_OD: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        weight_OD = weight_OD.detach().float()
        scale_O = (weight_OD.abs().amax(1) / 127).clamp(min=_TINY).to(torch.bfloat16)
        self._codes_OD = (weight_OD / scale_O.float()[:, None]).round().clamp(-127, 127).to(torch.int8).contiguous()
        self._scale_O = scale_O
        self._bias = None if bias_O is None else bias_O.detach().float()

    def forward(self, hidden_MD: Tensor) -> Tensor:
        """(M, D) float32 to (M, O)."""
        if len(hidden_MD) <= _FEW_ROWS:
            rows_MD = hidden_MD.to(torch.bfloat16)
            output_MO = torch.ops.aten._weight_int8pack_mm(rows_MD, self._codes_OD, self._scale_O).float()
        else:
            output_MO = functional.linear(hidden_MD, self._codes_OD.float() * self._scale_O.float()[:, None])
        return output_MO if self._bias is None else output_MO + self._bias


class Int4Linear(nn.Module):
    """A linear layer with 4-bit weights, (..., D) to (..., O); D in whole groups."""

    def __init__(self, weight_OD: Tensor, bias_O: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_OD.shape
        groups_OGW = weight_OD.detach().float().unflatten(1, (-1, GROUP))
        low_OG, high_OG = groups_OGW.aminmax(dim=-1)
        low_OG, high_OG = low_OG.clamp(max=0), high_OG.clamp(min=0)
        scale_OG = ((high_OG - low_OG) / 15).clamp(min=1e-6)
        # One code stands for 0 itself: with the lowest weight exact in its place, real texts lose twice to four times
        # as much.
        zero_OG = (-low_OG / scale_OG).round()
        codes = ((groups_OGW / scale_OG[..., None]).round() + zero_OG[..., None]).clamp(0, 15)
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1).to(torch.int32), 1)
        # The kernel reads code c as (c - 8) x scale + offset.
        scales_GO2 = torch.stack([scale_OG, (8 - zero_OG) * scale_OG], dim=-1).transpose(0, 1)
        self._scales = scales_GO2.to(torch.bfloat16).contiguous()
        self._bias = None if bias_O is None else bias_O.detach().float()

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) float32 to (..., O)."""
        rows_MD = hidden.reshape(-1, self.in_features).to(torch.bfloat16)
        output_MO = torch.ops.aten._weight_int4pack_mm_for_cpu(rows_MD, self._packed, GROUP, self._scales)
        output: Tensor = output_MO.to(hidden.dtype).view(*hidden.shape[:-1], self.out_features)
        return output if self._bias is None else output + self._bias


class QuantizedHead(nn.Module):
    """The output head, in 8 bits under int4 too: fewer cost most where words are told apart. Called as `OutputHead`."""

    def __init__(self, weight_VD: Tensor, loudness_D: Tensor) -> None:
        super().__init__()
        self._linear = Int8Linear(weight_VD, None, loudness_D)

    def forward(self, hidden: Tensor, targets_L: Tensor | None = None) -> Tensor:
        """Logits, or with targets the summed negative log-likelihood."""
        logits: Tensor = self._linear(hidden)
        return logits if targets_L is None else functional.cross_entropy(logits, targets_L, reduction="sum")


class QuantizedExperts(nn.Module):
    """Eq. 11 with quantized experts: the tokens of each expert together."""

    def __init__(self, experts: SwiGluExperts | MlpExperts, kind: Quantization) -> None:
        super().__init__()
        self.num_experts = experts.num_experts
        self.act_fn = experts.act_fn
        self.gated = isinstance(experts, SwiGluExperts)
        reads, writes = [], []
        for expert in range(experts.num_experts):
            if isinstance(experts, SwiGluExperts):
                reads.append(_linear_of_expert(experts.gate_up_proj[expert], None, kind))
                writes.append(_linear_of_expert(experts.down_proj[expert], None, kind))
            else:
                reads.append(_linear_of_expert(experts.up_proj[expert].T, experts.up_proj_bias[expert], kind))
                writes.append(_linear_of_expert(experts.down_proj[expert].T, experts.down_proj_bias[expert], kind))
        self.reads, self.writes = nn.ModuleList(reads), nn.ModuleList(writes)

    def forward(self, hidden_MD: Tensor, experts_MS: Tensor, weights_MS: Tensor) -> Tensor:
        """Returns (M, D)."""
        if len(hidden_MD) == 1:
            chosen = experts_MS[0].tolist()
            output_SD = torch.cat([self._expert(expert, hidden_MD) for expert in chosen])
            return weights_MS.to(hidden_MD.dtype) @ output_SD
        order_P = experts_MS.flatten().argsort()
        token_P = order_P // experts_MS.shape[1]
        counts = torch.bincount(experts_MS.flatten(), minlength=self.num_experts).tolist()
        parts = hidden_MD[token_P].split(counts)
        done = [self._expert(expert, part) for expert, part in enumerate(parts) if len(part)]
        weight_P1 = weights_MS.flatten()[order_P, None].to(hidden_MD.dtype)
        return torch.zeros_like(hidden_MD).index_add_(0, token_P, torch.cat(done) * weight_P1)

    def _expert(self, expert: int, hidden_MD: Tensor) -> Tensor:
        inner = self.reads[expert](hidden_MD)
        if self.gated:
            gate_MI, up_MI = inner.chunk(2, dim=-1)
            inner = self.act_fn(gate_MI) * up_MI
        else:
            inner = self.act_fn(inner)
        output: Tensor = self.writes[expert](inner.contiguous())
        return output
