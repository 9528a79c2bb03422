"""From a dense model to an explainer: the three conversions, sizes, what is refused."""

from typing import Any

import pytest
import torch
from helpers.explainers import FAMILIES, dense_model, explainer, text_ids
from torch import nn
from transformers import (
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from gavamoe.errors import InputError


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "experts",
    [{"conversion": "shared"}, {"enabled": False}, {"enabled": False, "implementation": "grouped_mm"}],
    ids=["shared", "dense", "dense-grouped"],
)
def test_shared_conversion_and_disabled_experts_start_as_the_dense_model(family: str, experts: dict[str, Any]) -> None:
    dense = dense_model(family)
    model = explainer(dense, **experts)
    clusters = torch.tensor([0, 1, 2])
    expected = dense(input_ids=text_ids()).logits
    torch.testing.assert_close(model(input_ids=text_ids(), cluster_ids=clusters).logits, expected, atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_conversion_learns_through_its_experts(family: str) -> None:
    model = explainer(dense_model(family), conversion="shared").train()
    clusters = torch.tensor([0, 1, 2])
    before = model(input_ids=text_ids(), cluster_ids=clusters, labels=text_ids()).loss
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=text_ids(), cluster_ids=clusters, labels=text_ids()).loss
        loss.backward()
        optimizer.step()
    assert loss < before
    block = (model.model.layers if family == "llama" else model.model.h)[0].mlp
    assert block.experts.down_proj.abs().max() > 0
    assert block.router.weight.grad.abs().max() > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("by", ["position", "importance"])
def test_all_experts_of_a_split_model_equal_the_dense_model(family: str, by: str) -> None:
    expected = dense_model(family)(input_ids=text_ids()).logits
    model = explainer(dense_model(family), conversion="split", split_by=by, top_k=4)
    clusters = torch.tensor([0, 1, 2])
    as_built = model(input_ids=text_ids(), cluster_ids=clusters).logits
    assert (as_built - expected).abs().max() < 0.01 * expected.abs().max()
    for module in model.modules():
        if type(module).__name__ == "MultiGateRouter":
            nn.init.zeros_(module.weight)
    torch.testing.assert_close(model(input_ids=text_ids(), cluster_ids=clusters).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_by_importance_fall_in_strength(family: str) -> None:
    dense = dense_model(family)
    if family == "llama":
        layer = dense.model.layers[0].mlp
        norms = (
            layer.gate_proj.weight.norm(dim=1) * layer.up_proj.weight.norm(dim=1) * layer.down_proj.weight.norm(dim=0)
        )
    else:
        layer = dense.transformer.h[0].mlp
        norms = layer.c_fc.weight.norm(dim=0) * layer.c_proj.weight.norm(dim=1)
    expected = norms.detach().sort(descending=True).values * 4  # slices are scaled by their count
    model = explainer(dense, conversion="split", split_by="importance")
    if family == "llama":
        experts = model.model.layers[0].mlp.experts
        gate, up = experts.gate_up_proj.norm(dim=2).chunk(2, dim=1)
        found = gate * up * experts.down_proj.norm(dim=1)
    else:
        experts = model.model.h[0].mlp.experts
        found = experts.up_proj.norm(dim=1) * experts.down_proj.norm(dim=2)
    torch.testing.assert_close(found.flatten(), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_conversion_keeps_all_but_the_feed_forward_layers(family: str) -> None:
    dense = dense_model(family)
    before = {name: tensor.clone() for name, tensor in dense.base_model.state_dict().items()}
    model = explainer(dense)
    after = model.model.state_dict()
    kept = [name for name in before if ".mlp." not in name]
    assert len(kept) > 10
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
    clusters = torch.tensor([0, 1, 2])
    assert not torch.allclose(model(input_ids=text_ids(), cluster_ids=clusters).logits, dense(text_ids()).logits)


def test_new_weights_follow_the_seed_and_not_the_global_generator() -> None:
    first = explainer()
    torch.rand(7)
    second = explainer()
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_default_expert_width_is_the_share_of_the_dense_width() -> None:
    assert explainer(count=4).config.expert_size == 16
    assert explainer(count=12).config.expert_size == 8  # 64 / 12 = 5.3, to the nearest multiple of 8, at least 8
    assert explainer(count=3, intermediate_size=24).config.expert_size == 24


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"conversion": "split", "count": 5, "top_k": 2}, r"split cuts the dense width 64 .* 5 x 16 = 80"),
        ({"conversion": "split", "intermediate_size": 8}, r"4 x 8 = 32"),
        (
            {"implementation": "grouped_mm", "intermediate_size": 12},
            "grouped_mm needs multiples of 8, not experts of 12",
        ),
    ],
)
def test_experts_that_do_not_fit_are_refused(experts: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        explainer(**experts)


def test_feed_forward_biases_stay_in_the_shared_expert_and_cannot_be_split() -> None:
    torch.manual_seed(0)
    config = dense_model().config
    config.mlp_bias = True
    dense = LlamaForCausalLM(config).double().eval()
    for layer in dense.model.layers:
        nn.init.normal_(layer.mlp.up_proj.bias)
    model = explainer(dense, conversion="shared")
    clusters = torch.tensor([0, 1, 2])
    assert torch.equal(model(input_ids=text_ids(), cluster_ids=clusters).logits, dense(text_ids()).logits)
    with pytest.raises(InputError, match="split can't keep the feed-forward biases"):
        explainer(dense, conversion="split")


def test_other_architectures_are_refused() -> None:
    mistral = MistralForCausalLM(
        MistralConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                      num_key_value_heads=1)
    )  # fmt: skip
    with pytest.raises(InputError, match="'mistral' is not supported; supported: llama, gpt2"):
        explainer(mistral)
