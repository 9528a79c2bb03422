"""Soft ratings: what their vectors are made of, where they start, and that the model reads them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.explainers import GATES, ITEMS, SLOT, USERS, dense_model, saved_and_loaded

from gavamoe.config.files import parse_config
from gavamoe.errors import InputError
from gavamoe.export.plain_model import plain_model
from gavamoe.export.slot_tokens import slot_rows
from gavamoe.model.build import build_explainer
from gavamoe.model.conversion import ExplainerSizes
from gavamoe.model.explainer import GavamoeForCausalLM
from gavamoe.model.slots import RATING_PLACES, rating_mix

WORDS = ([3], [4, 5], [6])


def soft(spread: float = 0.2, *, cluster: bool = False) -> GavamoeForCausalLM:
    experts = {"count": 4, "top_k": 2, "conversion": "random", "implementation": "eager"}
    prompt = {"soft_rating": True, "cluster": cluster}
    config = parse_config({"stage1": {"clusters": GATES}, "stage2": {"experts": experts, "prompt": prompt}}, "test")
    sizes = ExplainerSizes(USERS, ITEMS, SLOT, GATES, rating_spread=spread)
    return build_explainer(config, dense_model(), sizes, sentiments=WORDS).eval()


def test_a_known_rating_is_its_two_neighbors() -> None:
    mix = rating_mix(5, 3, 0.2)
    wanted = [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]]
    np.testing.assert_allclose(mix[:5], wanted, atol=1e-6)


def test_an_expected_rating_is_a_mean_over_those_that_may_come() -> None:
    mix = rating_mix(41, 5, 0.2)
    known, expected = mix[:41], mix[41:]
    places = np.linspace(0, 1, 41)
    for place in (0, 13, 20, 40):
        chances = np.array([np.exp(-((at - places[place]) ** 2) / (2 * 0.2**2)) for at in places])
        np.testing.assert_allclose(expected[place], (chances / chances.sum()) @ known, rtol=1e-5)
    np.testing.assert_allclose(expected.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(rating_mix(41, 5, 0.0)[41:], known, atol=1e-6)  # a sure expectation is a known rating


def test_places_by_where_a_rating_lies() -> None:
    slots = soft().slots
    first = slots.unknown_item + 1
    assert [slots.rating_token(share, expected=False) - first for share in (-1, 0, 0.26, 1, 2)] == [0, 0, 10, 40, 40]
    assert slots.rating_token(0.5, expected=True) - first == RATING_PLACES + 20
    assert slots.cluster == first + 2 * RATING_PLACES


def test_ratings_start_as_the_sentiments_words() -> None:
    model = soft()
    words = model.get_input_embeddings().weight
    low, middle, high = words[3], (words[4] + words[5]) / 2, words[6]
    ids = torch.tensor([[model.slots.rating_token(share, expected=False) for share in (0, 0.25, 0.5, 0.625, 1)] + [9]])
    wanted = torch.stack([low, (low + middle) / 2, middle, 0.75 * middle + 0.25 * high, high, words[9]])
    torch.testing.assert_close(model.embed(ids)[0], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cluster", [False, True])
def test_users_items_and_clusters_are_as_without(cluster: bool) -> None:
    model = soft(cluster=cluster)
    ids = torch.tensor([[model.user_token(1), model.item_token(2), model.slots.rating_token(0.7, expected=True), 9]])
    embeds = model.embed(ids, torch.tensor([2]))[0]
    torch.testing.assert_close(embeds[0], model.user_projection(model.user_embedding.weight[1]))
    torch.testing.assert_close(embeds[1], model.item_projection(model.item_embedding.weight[2]))
    if cluster:
        found = model.embed(torch.tensor([[model.slots.cluster]]), torch.tensor([2]))[0, 0]
        torch.testing.assert_close(found, model.cluster_embedding.weight[2])
    with pytest.raises(IndexError):
        model.embed(torch.tensor([[model.slots.cluster + 1]]), torch.tensor([2]))


def test_the_vectors_learn() -> None:
    model = soft()
    model.embed(torch.tensor([[model.slots.rating_token(0.7, expected=True)]])).sum().backward()
    assert (model.rating_embedding.weight.grad.abs().sum(1) > 0).all()  # an expectation reaches all of them


def test_a_saved_model_reads_the_same(tmp_path: Path) -> None:
    model = soft()
    ids = torch.tensor([[5, model.slots.rating_token(0.3, expected=True), 7]])
    again = saved_and_loaded(model, tmp_path)
    assert torch.equal(again.embed(ids), model.embed(ids))


def test_the_public_model_has_a_token_for_each() -> None:
    model = soft()
    prompt = [5, model.user_token(1), model.slots.rating_token(0.9, expected=True), 7]
    rows = slot_rows(model, [prompt], torch.tensor([0]))
    assert len(rows.embeddings) == USERS + ITEMS + 2 + 2 * RATING_PLACES
    plain = plain_model(model, 1, rows)
    plain.set_experts_implementation("eager")
    ids = torch.tensor([prompt])
    with torch.no_grad():
        found, wanted = plain(input_ids=ids).logits, model(input_ids=ids, cluster_ids=torch.tensor([1])).logits
    torch.testing.assert_close(found[..., : rows.vocabulary], wanted, rtol=1e-5, atol=1e-5)


def test_a_soft_rating_needs_the_rating() -> None:
    with pytest.raises(InputError, match="soft_rating: needs rating: true"):
        parse_config({"stage2": {"prompt": {"soft_rating": True, "rating": False}}}, "test")
