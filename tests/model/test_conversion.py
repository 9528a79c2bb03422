"""From a dense model to an explainer: the conversions, sizes, what is refused."""

from typing import Any

import pytest
import torch
from helpers.explainers import FAMILIES, GATES, ITEMS, SLOT, USERS, dense_model, explainer, text_ids
from torch import nn
from transformers import (
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from gavamoe.config.files import parse_config
from gavamoe.errors import InputError
from gavamoe.model import conversion
from gavamoe.model.build import build_explainer
from gavamoe.model.conversion import ExplainerSizes
from gavamoe.model.decoders import dense_width
from gavamoe.model.explainer import GavamoeForCausalLM
from gavamoe.stage2.expert_movement import MovementProbe


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "experts",
    [
        {"conversion": "shared"},
        {"conversion": "shared", "gate_bias": 2.0},
        {"conversion": "shared", "top_k": 1},
        {"conversion": "lora"},
        {"enabled": False},
        {"enabled": False, "implementation": "grouped_mm"},
    ],
    ids=["shared", "shared-owned", "shared-single", "lora", "dense", "dense-grouped"],
)
def test_shared_conversion_and_disabled_experts_start_as_the_dense_model(family: str, experts: dict[str, Any]) -> None:
    dense = dense_model(family)
    model = explainer(dense, **experts)
    clusters = torch.tensor([0, 1, 2])
    expected = dense(input_ids=text_ids()).logits
    torch.testing.assert_close(model(input_ids=text_ids(), cluster_ids=clusters).logits, expected, atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_upcycled_model_starts_as_the_dense_one_but_for_noise(
    family: str, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = dense_model(family)(input_ids=text_ids()).logits
    for noise, error in ((conversion.UPCYCLE_NOISE, 0.05), (0.0, 1e-12)):
        monkeypatch.setattr(conversion, "UPCYCLE_NOISE", noise)
        model = explainer(dense_model(family), conversion="upcycle", top_k=top_k)
        for clusters in (torch.tensor([0, 1, 2]), torch.full((3, GATES), 1 / GATES, dtype=torch.float64)):
            logits = model(input_ids=text_ids(), cluster_ids=clusters).logits
            assert (logits - expected).abs().max() < error * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_upcycled_experts_are_unequal_copies_of_the_strongest_neurons(family: str) -> None:
    dense = layers(dense_model(family))[0].mlp
    strongest = conversion.importance(dense).sort(descending=True).values.mean()
    block = layers(explainer(dense_model(family), conversion="upcycle"))[0].mlp
    copies = block.experts.down_proj.detach()
    assert not any(torch.equal(copies[0], copies[other]) for other in (1, 2, 3))
    torch.testing.assert_close(copies[0], copies[1], atol=0.1, rtol=0)
    assert conversion.importance(block.shared_expert).mean() < strongest
    width = {"llama": "gate_proj", "gpt2": "c_fc"}[family]
    assert min(getattr(block.shared_expert, width).weight.shape) == 32
    assert max(getattr(block.shared_expert, width).weight.shape) == 64 - 16


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_conversion_deals_each_neuron_once(family: str) -> None:
    dense = layers(dense_model(family))[0].mlp
    block = layers(explainer(dense_model(family), conversion="shared"))[0].mlp
    if family == "llama":
        ours, theirs = block.experts.gate_up_proj.detach()[:, :16].flatten(0, 1), dense.gate_proj.weight
    else:
        ours, theirs = block.experts.up_proj.detach().transpose(1, 2).flatten(0, 1), dense.c_fc.weight.T
    assert torch.equal(ours.sort(dim=0).values, theirs.detach().sort(dim=0).values)
    importance = conversion.importance(dense)
    found = torch.stack([importance[(theirs == row).all(dim=1)][0] for row in ours]).view(4, 16)
    assert found.sum(dim=1).max() < 1.2 * found.sum(dim=1).min()


def test_scale_makes_up_for_the_experts_width() -> None:
    def scale(**experts: Any) -> float:
        return explainer(**experts).config.expert_scale

    assert scale(conversion="shared") == 4
    assert scale(conversion="shared", intermediate_size=8) == 8
    assert scale(conversion="shared", scale=3) == 3
    assert scale(conversion="random") == scale(conversion="split") == scale(conversion="upcycle") == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["shared", "upcycle"])
def test_routed_experts_move_about_as_fast_as_the_dense_network(family: str, kind: str) -> None:
    """Twenty steps of Adam; experts of new weights, without scale, as they were before, are left behind."""
    assert moved(explainer(dense_model(family), conversion=kind)) > 0.3
    if kind == "shared":
        model = explainer(dense_model(family), conversion=kind, scale=1)
        for layer in layers(model):
            for name, parameter in layer.mlp.experts.named_parameters():
                if name in ("gate_up_proj", "up_proj"):
                    nn.init.normal_(parameter, std=0.02)
        assert moved(model) < (0.05 if family == "llama" else 0.2)


def moved(model: GavamoeForCausalLM) -> float:
    """How far routed outputs move for each step of the shared ones."""
    probe, clusters = MovementProbe(model), torch.tensor([0, 1, 2])
    batch = {"input_ids": text_ids(), "cluster_ids": clusters}
    with torch.no_grad():
        probe.start(lambda: model(**batch))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        model(**batch, labels=text_ids()).loss.backward()
        optimizer.step()
    with torch.no_grad():
        ratio = probe.measure(lambda: model(**batch)).ratio
    assert ratio is not None
    return ratio


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("extra", [16, 100])
def test_a_widened_dense_model_starts_as_it_was(family: str, extra: int) -> None:
    expected = dense_model(family)(input_ids=text_ids()).logits
    config = parse_config(
        {"stage2": {"base_model": "some/model", "extra_width": extra, "experts": {"enabled": False}}}, "test"
    )
    model = build_explainer(config, dense_model(family), ExplainerSizes(USERS, ITEMS, SLOT, GATES)).eval()
    assert dense_width(model.config.text_config) == 64 + extra
    torch.testing.assert_close(model(input_ids=text_ids()).logits, expected)
    model(input_ids=text_ids(), labels=text_ids()).loss.backward()
    added = layers(model)[0].mlp
    weight = added.down_proj.weight.grad[:, 64:] if family == "llama" else added.c_proj.weight.grad[64:]
    assert weight.abs().max() > 0  # the new neurons learn


def layers(model: Any) -> Any:
    decoder = getattr(model, "model", None) or model.transformer
    return decoder.layers if hasattr(decoder, "layers") else decoder.h


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
        ({"conversion": "upcycle", "intermediate_size": 64}, "copies the 64 strongest of the dense layer's 64 neurons"),
        (
            {"conversion": "upcycle", "scale": 2},
            "scale: 2 would keep conversion upcycle from starting as the dense model",
        ),
        ({"gate_bias": 2.0, "count": 2}, "3 gates can't own one of 2 experts each"),
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
