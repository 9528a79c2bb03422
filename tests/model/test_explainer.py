"""The explainer as a Hugging Face model: users and items as tokens, losses and gradients."""

from pathlib import Path

import pytest
import torch
from helpers.explainers import (
    FAMILIES,
    GATES,
    ITEMS,
    SLOT,
    USERS,
    VOCABULARY,
    dense_model,
    explainer,
    run_config,
    saved_and_loaded,
    slot_batch,
    text_ids,
)
from torch import Tensor, nn
from torch.nn import functional

from gavamoe.model.build import build_explainer
from gavamoe.model.conversion import ExplainerSizes

# Users and items


def test_slots_are_rows_of_their_tables_through_a_projection() -> None:
    model = explainer()
    ids = torch.tensor([[5, model.user_token(3), model.item_token(6), 9]])
    embeds = model.embed(ids)[0]
    words = model.get_input_embeddings().weight
    torch.testing.assert_close(embeds[0], words[5])
    torch.testing.assert_close(embeds[1], model.user_projection(model.user_embedding.weight[3]))
    torch.testing.assert_close(embeds[2], model.item_projection(model.item_embedding.weight[6]))
    torch.testing.assert_close(embeds[3], words[9])


def test_unknown_users_and_items_share_the_last_row() -> None:
    model = explainer()
    assert model.user_token(USERS) == model.user_token(USERS + 1000) == VOCABULARY + USERS
    assert model.item_token(0) == VOCABULARY + USERS + 1
    assert model.item_token(ITEMS) == model.item_token(10**9) == VOCABULARY + USERS + 1 + ITEMS
    last = torch.tensor([[model.item_token(ITEMS)]])
    model.embed(last)
    with pytest.raises(IndexError, match="index out of range"):
        model.embed(last + 1)


def test_slots_enter_at_the_scale_of_words() -> None:
    torch.manual_seed(1)
    tables = torch.randn(USERS + 1, SLOT) * 7, torch.randn(ITEMS + 1, SLOT) * 0.01
    model = build_explainer(
        run_config(),
        dense_model(),
        ExplainerSizes(USERS, ITEMS, SLOT, GATES),
        user_table=tables[0],
        item_table=tables[1],
    )
    words = model.get_input_embeddings().weight.square().mean().sqrt()
    first, items = VOCABULARY, VOCABULARY + USERS + 1
    for start, rows in ((first, USERS + 1), (items, ITEMS + 1)):
        slots = model.embed(torch.arange(start, start + rows)[None])
        torch.testing.assert_close(slots.square().mean().sqrt(), words, rtol=1e-3, atol=0)


def test_tables_of_stage_one_survive_building_and_saving(tmp_path: Path) -> None:
    torch.manual_seed(1)
    user, item = torch.randn(USERS + 1, SLOT), torch.randn(ITEMS + 1, SLOT)
    model = build_explainer(
        run_config(), dense_model(), ExplainerSizes(USERS, ITEMS, SLOT, GATES), user_table=user, item_table=item
    )
    model.post_init()
    for candidate in (model, saved_and_loaded(model, tmp_path)):
        torch.testing.assert_close(candidate.user_embedding.weight.float(), user)
        torch.testing.assert_close(candidate.item_embedding.weight.float(), item)


def test_tables_shared_with_stage_one_get_the_explainers_gradient(tmp_path: Path) -> None:
    model = explainer()
    stage1 = nn.Module()
    stage1.user_embedding = nn.Embedding(USERS + 1, SLOT)  # float32, whatever the explainer's type
    model.user_embedding = stage1.user_embedding
    model.calibrate_slots()
    ids, mask, clusters = slot_batch(model)
    model(input_ids=ids, attention_mask=mask, cluster_ids=clusters, labels=text_ids()).loss.backward()
    gradient = stage1.user_embedding.weight.grad
    assert gradient[1].abs().max() > 0
    assert gradient[2].abs().max() == 0
    values = stage1.user_embedding.weight.detach().clone()
    torch.testing.assert_close(saved_and_loaded(model, tmp_path).user_embedding.weight.float(), values)


# Losses and gradients


def test_loss_is_the_mean_over_labeled_next_tokens() -> None:
    model = explainer()
    ids, mask, clusters = slot_batch(model)
    labels = torch.full_like(ids, -100)
    labels[0, 4:7], labels[2, 8] = ids[0, 4:7].clamp(max=VOCABULARY - 1), 11
    output = model(input_ids=ids, attention_mask=mask, cluster_ids=clusters, labels=labels)
    scores = [(output.logits[0, i - 1], labels[0, i]) for i in (4, 5, 6)] + [(output.logits[2, 7], labels[2, 8])]
    by_hand = sum(-functional.log_softmax(logit, -1)[label] for logit, label in scores) / 4
    torch.testing.assert_close(output.loss, by_hand)
    assert output.aux_loss is None


def test_logits_to_keep_gives_the_same_loss_for_less_work() -> None:
    model = explainer()
    ids, mask, clusters = slot_batch(model)
    inputs = {"input_ids": ids, "attention_mask": mask, "cluster_ids": clusters}
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = 7
    full = model(**inputs, labels=labels)
    kept = model(**inputs, labels=labels, logits_to_keep=3)
    assert kept.logits.shape[1] == 3
    torch.testing.assert_close(kept.loss, full.loss)
    torch.testing.assert_close(kept.logits, full.logits[:, -3:])
    some = model(**inputs, labels=labels, logits_to_keep=torch.tensor([6, 7]))
    torch.testing.assert_close(some.logits, full.logits[:, 6:8])
    torch.testing.assert_close(some.loss, full.loss)


def test_a_batch_without_labels_has_loss_zero_not_nan() -> None:
    model = explainer()
    ids, mask, clusters = slot_batch(model)
    output = model(input_ids=ids, attention_mask=mask, cluster_ids=clusters, labels=torch.full_like(ids, -100))
    assert output.loss.item() == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_auxiliary_losses_join_the_loss_by_their_weights(family: str) -> None:
    def losses(**weights: float) -> tuple[Tensor, Tensor | None]:
        model = explainer(dense_model(family), **weights)
        ids, mask, clusters = slot_batch(model)
        output = model(input_ids=ids, attention_mask=mask, cluster_ids=clusters, labels=text_ids())
        return output.loss, output.aux_loss

    plain, none = losses()
    balanced, balance = losses(load_balance_weight=0.5)
    doubled, twice = losses(load_balance_weight=1.0, router_z_weight=0.0)
    _, z = losses(router_z_weight=0.5)
    _, both = losses(load_balance_weight=0.5, router_z_weight=0.5)
    assert none is None
    torch.testing.assert_close(balanced, plain + balance)
    torch.testing.assert_close(doubled, plain + 2 * balance)
    torch.testing.assert_close(twice, 2 * balance)
    torch.testing.assert_close(both, balance + z)
    assert balance >= 0.5


def test_router_logits_on_request() -> None:
    model = explainer()
    ids, mask, clusters = slot_batch(model)
    inputs = {"input_ids": ids, "attention_mask": mask, "cluster_ids": clusters}
    assert model(**inputs).router_logits is None
    logits = model(**inputs, output_router_logits=True).router_logits
    assert [tuple(layer.shape) for layer in logits] == [(3, 9, 4)] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_keeps_every_gradient(family: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = explainer(dense_model(family), load_balance_weight=1.0, router_z_weight=0.1).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        ids, mask, clusters = slot_batch(model)
        output = model(input_ids=ids, attention_mask=mask, cluster_ids=clusters, labels=text_ids(), use_cache=False)
        output.loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_auxiliary_loss_alone_reaches_the_router_under_checkpointing() -> None:
    model = explainer(load_balance_weight=1.0).train()
    model.activation_checkpointing_enable()
    ids, mask, clusters = slot_batch(model)
    output = model(input_ids=ids, attention_mask=mask, cluster_ids=clusters, labels=text_ids(), use_cache=False)
    output.aux_loss.backward()
    assert model.model.layers[1].mlp.router.weight.grad.abs().max() > 0


def test_reentrant_checkpointing_is_refused() -> None:
    with pytest.raises(ValueError, match="use_reentrant=True drops the gradient"):
        explainer().activation_checkpointing_enable({"use_reentrant": True})


def test_only_gates_of_the_batch_get_a_gradient() -> None:
    model = explainer()
    ids, mask, _ = slot_batch(model)
    output = model(input_ids=ids, attention_mask=mask, cluster_ids=torch.tensor([0, 2, 2]), labels=text_ids())
    output.loss.backward()
    per_gate = model.model.layers[0].mlp.router.weight.grad.abs().flatten(1).max(-1).values
    assert (per_gate > 0).tolist() == [True, False, True]


def test_bfloat16_model_trains_and_generates() -> None:
    model = explainer(dense_model().to(torch.bfloat16), implementation="grouped_mm")
    assert model.dtype == torch.bfloat16
    ids, mask, clusters = slot_batch(model)
    output = model(input_ids=ids, attention_mask=mask, cluster_ids=clusters, labels=text_ids())
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    assert model.model.layers[0].mlp.experts.gate_up_proj.grad.isfinite().all()
    assert model.generate(ids, attention_mask=mask, cluster_ids=clusters, max_new_tokens=3).shape == (3, 12)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_on_the_right_needs_no_mask(family: str) -> None:
    """The same logits at every token and the same loss and gradients, whatever stands in the padding."""
    model = explainer(dense_model(family)).double().eval()
    ids, clusters = text_ids(3, 9), torch.tensor([0, 1, 2])
    mask = (torch.arange(9) < torch.tensor([[9], [6], [4]])).long()
    labels = torch.where((mask == 1) & (torch.arange(9) > 2), ids, -100)
    found = []
    for padding, right_padded in ((0, False), (0, True), (5, True)):
        padded = torch.where(mask == 1, ids, padding)
        model.zero_grad()
        output = model(
            input_ids=padded, attention_mask=mask, labels=labels, cluster_ids=clusters, right_padded=right_padded
        )
        output.loss.backward()
        gradients = [p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and "embed" not in n]
        found.append([output.loss, output.logits[mask == 1], *gradients])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(two, one)
