"""An explainer and the public model that one of its gates makes of it: the same logits, text by text."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers.explainers import GATES, dense_model, explainer, slot_batch
from torch import Tensor

from gavamoe.errors import InputError
from gavamoe.export.plain_model import check_exportable, plain_model
from gavamoe.export.slot_tokens import slot_rows
from gavamoe.model.explainer import GavamoeForCausalLM

BLOCKS: dict[str, dict[str, Any]] = {
    "shared": {"conversion": "shared"},
    "shared, top 1": {"conversion": "shared", "top_k": 1},
    "upcycle": {"conversion": "upcycle", "intermediate_size": 24},
    "split": {"conversion": "split"},
    "split, renormalized": {"conversion": "split", "renormalise": True},
    "random": {"conversion": "random"},
    "random, renormalized": {"conversion": "random", "renormalise": True, "intermediate_size": 40},
    "dense": {"enabled": False},
}
PUBLIC = {"shared": "granitemoeshared", "upcycle": "granitemoeshared", "split": "qwen2_moe", "random": "qwen2_moe",
          "split, renormalized": "mixtral", "random, renormalized": "mixtral", "dense": "llama"}  # fmt: skip


def telling(model: GavamoeForCausalLM) -> GavamoeForCausalLM:
    """Gates that differ, experts that say something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name or ".router." in name:
                parameter.normal_(std=0.3, generator=generator)
    return model


def logits(model: Any, ids: Tensor, mask: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits
    return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
def test_the_logits_of_each_gate_are_those_of_its_public_model(block: str, tied: bool) -> None:
    model = telling(explainer(dense_model(tied=tied), **BLOCKS[block]))
    ids, mask, _ = slot_batch(model)
    rows = slot_rows(model, [[5, model.user_token(1), 7]], torch.tensor([0]))
    seen = []
    for gate in range(GATES if model.config.experts_enabled else 1):
        plain = plain_model(model, gate, rows)
        plain.set_experts_implementation("eager") if model.config.experts_enabled else None
        assert plain.config.model_type == PUBLIC.get(block, "granitemoeshared")
        found = logits(plain, ids, mask)
        expected = logits(model, ids, mask, cluster_ids=torch.full((len(ids),), gate))
        text, slots = found[mask == 1].split([rows.vocabulary, len(rows.embeddings)], dim=-1)
        torch.testing.assert_close(text, expected[mask == 1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(slots, text[:, rows.quietest, None].expand_as(slots))
        seen.append(text)
    assert all((a - b).abs().max() > 0.01 for a, b in pairwise(seen))


def test_a_dense_gpt2_stays_one() -> None:
    model = explainer(dense_model("gpt2"), enabled=False)
    ids, mask, _ = slot_batch(model)
    rows = slot_rows(model, [[5, 6]], torch.tensor([0]))
    plain = plain_model(model, 0, rows)
    assert plain.config.model_type == "gpt2"
    expected = logits(model, ids[:1], mask[:1])
    torch.testing.assert_close(logits(plain, ids[:1], mask[:1])[..., : rows.vocabulary], expected)


def test_the_slots_take_the_output_row_of_a_token_that_never_leads() -> None:
    model = telling(explainer(conversion="shared"))
    prompts = [[5, model.user_token(user), 7, model.item_token(2)] for user in range(4)]
    rows = slot_rows(model, prompts, torch.tensor([0, 1, 2, 0]))
    ids = torch.tensor(prompts)
    found = logits(model, ids, torch.ones_like(ids), cluster_ids=torch.tensor([0, 1, 2, 0]))
    assert rows.quietest not in found.argmax(-1)
    assert found[..., rows.quietest].max() == found.amax((0, 1)).min()
    expected = model.embed(torch.tensor([[model.user_token(1)]]))[0, 0]
    torch.testing.assert_close(rows.embeddings[1], expected.detach())


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (lambda: explainer(gate_bias=2.0), "gates with biases have no public architecture .*gate_bias=0"),
        (lambda: explainer(conversion="lora"), "low-rank additions have no public architecture"),
        (lambda: explainer(dense_model("gpt2")), "GPT-2 have no public architecture; a LLaMA base has"),
    ],
)
def test_what_no_public_architecture_holds_is_refused(model: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        check_exportable(model().config)


def test_soft_routes_and_biases_of_layers_are_refused() -> None:
    soft = explainer().config
    soft.soft_routes = True
    with pytest.raises(InputError, match="soft routes mix all gates"):
        check_exportable(soft)
    biased = explainer().config
    biased.text_config.mlp_bias = True
    with pytest.raises(InputError, match="biases in attention or feed-forward layers"):
        check_exportable(biased)
