"""Users and items, which the explainer reads as soft tokens, as ordinary tokens of a larger vocabulary.

A slot's embedding is the row of its table through its projection: a vector of the text tokens' own kind. So an exported
model has one more token for each known user and item, one for all other users and one for all other items, in the
explainer's own order of ids, and for each soft rating and each cluster where prompts have such. None is ever written:
each has the output row of the text token that the model finds least likely, which it ties with and never beats the
others.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gavamoe.data.catalog import Catalog
from gavamoe.errors import InputError
from gavamoe.model.decoders import GavamoeConfig
from gavamoe.model.explainer import GavamoeForCausalLM

_CHUNK = 4096
"""Slots that are embedded at once."""


@dataclass(frozen=True)
class SlotRows:
    """What the slots add to a model's two tables."""

    embeddings: Tensor
    """(S, D): users, the unknown user, items, the unknown item, ratings, clusters."""
    quietest: int
    """The text token of the lowest logits, whose output row all slots take."""
    vocabulary: int
    """V: text tokens."""

    @property
    def size(self) -> int:
        """Tokens of text and slots together."""
        return self.vocabulary + len(self.embeddings)

    def extended_table(self, table_VD: Tensor) -> Tensor:
        """The embeddings of all tokens."""
        return torch.cat([table_VD.detach(), self.embeddings.to(table_VD.dtype)])

    def extended_head(self, head_VD: Tensor) -> Tensor:
        """The output rows of all tokens."""
        return torch.cat([head_VD, head_VD[self.quietest].expand(len(self.embeddings), -1)])


@torch.no_grad()
def slot_rows(model: GavamoeForCausalLM, prompts: list[list[int]], clusters: Tensor) -> SlotRows:
    """The slots of an explainer.

    Args:
        prompts: some prompts of pairs, whose next words tell which text token is the quietest one.
        clusters: int64 (N,), their clusters.
    """
    config, slots = model.config, model.slots
    count = slots.cluster - slots.vocabulary
    ids = torch.arange(slots.vocabulary, slots.vocabulary + count)
    any_cluster = torch.zeros(1, dtype=torch.long)
    parts = [model.embed(part[None], any_cluster)[0] for part in ids.split(_CHUNK)]
    if config.n_cluster_slots:
        parts.append(model.cluster_embedding.weight.detach())
    loudest = torch.full((slots.vocabulary,), -torch.inf, dtype=model.lm_head.weight.dtype)
    for prompt, cluster in zip(prompts, clusters, strict=True):
        logits_BTV = model(input_ids=torch.tensor([prompt]), cluster_ids=cluster[None], use_cache=False).logits
        loudest = torch.maximum(loudest, logits_BTV[0].amax(0))
    return SlotRows(torch.cat(parts), int(loudest.argmin()), slots.vocabulary)


def slot_names(catalog: Catalog, config: GavamoeConfig) -> Iterator[str]:
    """The tokens' names, in the order of their ids. Raw ids are percent-encoded, so that a name has no blank and
    never ends early; the unknown ones have no colon, and so no raw id's name. Known users and items are the catalog's
    first."""
    yield from (f"<user:{quote(catalog.user_id(index), safe='')}>" for index in range(config.n_users))
    yield "<user>"
    yield from (f"<item:{quote(catalog.item_id(index), safe='')}>" for index in range(config.n_items))
    yield "<item>"
    yield from (f"<{kind}:{place}>" for kind in ("rating", "expected") for place in range(config.rating_places))
    yield from (f"<cluster:{index}>" for index in range(config.n_cluster_slots))


def add_names(tokenizer: PreTrainedTokenizerBase, vocabulary: int, names: list[str]) -> None:
    """Give a tokenizer the slots' names, with ids from `vocabulary` on. They are special tokens, which a text read
    with `split_special_tokens` never becomes.

    Raises:
        InputError: the tokenizer has more tokens than the model, or one of these names already.
    """
    missing = vocabulary - len(tokenizer)
    if missing < 0:
        raise InputError(f"export: the tokenizer has {len(tokenizer)} tokens, the model {vocabulary}")
    fillers = [f"<no token {index}>" for index in range(missing)]
    added = [AddedToken(name, special=True, normalized=False) for name in (*fillers, *names)]
    if tokenizer.add_tokens(added, special_tokens=True) != len(added):
        raise InputError("export: the tokenizer has a token with the name of a user or an item already")
