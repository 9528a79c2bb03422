"""The model that stage 2 trains (section 3.4.2): explainer and VAE-GMM around the same two embedding tables.

Inputs: a batch of prompts with answers, a batch of stage-1 pairs. Outputs: the joint loss of Eq. 13 and its parts.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gavamoe.config.schema import Stage2Config
from gavamoe.model.explainer import GavamoeForCausalLM
from gavamoe.model.slots import SLOT_MODULES
from gavamoe.stage1.vae_gmm import VaeGmm

Losses = dict[str, Tensor]

EXPLAINER, VAE_GMM = "explainer.", "vae_gmm."
"""Prefixes of both parts' names in the joint state."""
_TABLES = ("user_embedding.", "item_embedding.")
_FLOAT32 = (".router.", *(f".{name}." for name in SLOT_MODULES), ".lora_")
"""Marks of the explainer's parameters that stay float32 where the others are stored as bfloat16."""


class JointModel(nn.Module):
    """Explainer and VAE-GMM with the joint loss L = alpha * L_ELBO + (1 - alpha) * L_explanation (Eq. 13).

    alpha 0 leaves stage 1's own parameters out of training, alpha 1 the explainer's own: they carry no gradient
    and get into no optimizer (AdamW would decay even parameters without gradients). Parameters that come frozen, as
    LoRA leaves the base model's, stay frozen. The embedding tables, which both parts hold with stage 1's values, are
    trained by whichever loss has a weight.
    """

    def __init__(self, explainer: GavamoeForCausalLM, vae_gmm: VaeGmm, alpha: float, *, bf16: bool = False) -> None:
        super().__init__()
        explainer.user_embedding, explainer.item_embedding = vae_gmm.user_embedding, vae_gmm.item_embedding
        self.explainer, self.vae_gmm = explainer, vae_gmm
        self.alpha, self.beta, self.bf16 = alpha, vae_gmm.config.beta, bf16
        # Its gradient as the few rows that were read: added to that of the output head, which is the same table, and so
        # never a dense one of its own, as large as the vocabulary. Untied, an optimizer would meet it as it is.
        explainer.get_input_embeddings().sparse = explainer.config.tie_word_embeddings
        for name, parameter in self.named_parameters():
            is_table = name.removeprefix(EXPLAINER).startswith(_TABLES)
            idle = VAE_GMM if alpha == 0 else EXPLAINER if alpha == 1 else None
            if not is_table and idle and name.startswith(idle):
                parameter.requires_grad_(False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cluster_ids: Tensor | None = None,
        label_count: Tensor | None = None,
        users: Tensor | None = None,
        items: Tensor | None = None,
        ratings: Tensor | None = None,
    ) -> Losses:
        """Losses of a batch; a part that gets no input, or has weight 0 in training, is left out.

        Args:
            input_ids, attention_mask, labels: (B, T), padded on the right.
            cluster_ids: (B,), or responsibilities (B, K).
            label_count: what to divide the summed negative log-likelihood by; None: this batch's labels.
            users, items, ratings: (P,).

        Returns:
            "loss" and, where computed, "explanation_loss" (nats per token), "router_loss" (weighted), "elbo_loss" and
            its "reconstruction" and "kl" (nats per pair). Only "loss" has a gradient.
        """
        losses: Losses = {}
        total: Tensor | None = None
        if input_ids is not None and labels is not None and (self.alpha < 1 or not self.training):
            explanation = self._explanation(input_ids, attention_mask, labels, cluster_ids, label_count, losses)
            total = (1 - self.alpha) * explanation
        if users is not None and items is not None and ratings is not None and self.alpha > 0:
            terms = self.vae_gmm.elbo(users, items, ratings, self.beta)
            losses |= {"elbo_loss": terms.loss, "reconstruction": terms.reconstruction, "kl": terms.kl}
            total = self.alpha * terms.loss + (0 if total is None else total)
        if total is None:
            raise ValueError("no input for any loss with a weight")
        return {name: value.detach() for name, value in losses.items()} | {"loss": total}

    def _explanation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor,
        cluster_ids: Tensor | None,
        label_count: Tensor | None,
        losses: Losses,
    ) -> Tensor:
        """Negative log-likelihood of the answers, plus the weighted router losses."""
        # Without the cache autocast keeps no bfloat16 copy of every weight alive, which would undo ZeRO-3's sharding.
        autocast = torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)
        with autocast:
            output = self.explainer(
                input_ids=input_ids,
                attention_mask=attention_mask,
                labels=labels,
                cluster_ids=cluster_ids,
                use_cache=False,
                return_logits=False,
                right_padded=True,
                num_items_in_batch=label_count,
            )
        loss: Tensor = output.loss
        losses["explanation_loss"] = loss
        if output.aux_loss is not None:
            losses["explanation_loss"] = loss - output.aux_loss
            losses["router_loss"] = output.aux_loss
        return loss

    def store_in_bf16(self) -> None:
        """Store the explainer's weights as bfloat16, in place, but for routers, slots and adapters; stage 1 and the
        tables stay float32 as well. So it is trained without autocast, which would cast each weight at each use.

        Gate values decide a discrete choice; tables and slots are read a few rows at a time; adapters are small. An
        optimizer needs float32 copies of what is bfloat16: its steps are smaller than a bfloat16's last digit.
        """
        for name, parameter in self.explainer.named_parameters():
            if stored_in_bf16(name):
                parameter.data = parameter.data.to(torch.bfloat16)

    def read_outside_forward(self) -> Iterator[nn.Parameter]:
        """Parameters read as attributes, not in their own module's forward; ZeRO-3 needs them registered as
        external."""
        yield from self.vae_gmm.prior.parameters()
        yield from self.vae_gmm.parameters(recurse=False)


def stored_in_bf16(name: str) -> bool:
    """Whether `JointModel.store_in_bf16` has a parameter of the explainer, by its name there, in bfloat16."""
    return not any(mark in f".{name}" for mark in _FLOAT32)


def largest_layer(explainer: GavamoeForCausalLM) -> int:
    """Numbers in the decoder layer that has most of them; to be asked before ZeRO-3 shards the parameters."""
    decoder = explainer.model
    layers = decoder.layers if hasattr(decoder, "layers") else decoder.h
    return max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)


_ROUTED = (".experts.", ".router.")
"""Marks of routed experts and gates in parameter names."""
ADAM_EPS, ROUTED_EPS = 1e-8, 1e-9
"""What Adam adds to the root of the second moment. Routed experts whose output starts at zero get gradients, at their
inputs, that clipping by the norm of all leaves near 1e-8 in the first steps (SmolLM2, measured): the usual value would
halve their steps. Much smaller ones make rounding errors into steps."""


def parameter_groups(model: JointModel, config: Stage2Config) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters: each side's rate; no decay of norms, biases, tables and prior; a
    smaller eps of routed experts and gates. What is stored as bfloat16 is in groups of its own, the last ones.

    Each group keeps its peak rate as "peak_lr", which schedules scale, and as "routed" whether it is of those.
    """
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    groups: dict[tuple[bool, float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        of_explainer = name.startswith(EXPLAINER) and not name.removeprefix(EXPLAINER).startswith(_TABLES)
        rate = config.learning_rate if of_explainer else config.stage1_learning_rate
        routed = any(mark in name for mark in _ROUTED)
        if routed:
            rate = config.expert_learning_rate or rate
        plain = parameter.ndim < 2 or name.endswith("bias") or id(parameter) in tables or ".prior." in name
        key = (parameter.dtype != torch.float32, rate, 0.0 if plain else config.weight_decay, routed)
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": rate,
            "peak_lr": rate,
            "weight_decay": decay,
            "eps": ROUTED_EPS if routed else ADAM_EPS,
            "routed": routed,
        }
        # One type of number a group, since ZeRO lays a group end to end; float32 first: the first group's type is that
        # of ZeRO's buffers, in which gradients are summed.
        for (_, rate, decay, routed), parameters in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def part_of_state(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """One part's entries of the joint state, under the part's own names."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def mean_losses(losses: Iterable[Losses]) -> Losses:
    """Means, by name, over the accumulated batches of one step."""
    gathered: dict[str, list[Tensor]] = {}
    for step in losses:
        for name, value in step.items():
            gathered.setdefault(name, []).append(value.detach().float())
    return {name: torch.stack(values).mean() for name, values in gathered.items()}
