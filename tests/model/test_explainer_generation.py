"""Generation with a Hugging Face explainer: batches of clusters, caches, what is refused."""

from typing import Any

import pytest
import torch
from helpers.explainers import FAMILIES, VOCABULARY, dense_model, explainer, slot_batch, text_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_of_clusters_equals_its_rows_alone(family: str) -> None:
    model = explainer(dense_model(family))
    ids, mask, clusters = slot_batch(model)
    logits = model(input_ids=ids, attention_mask=mask, cluster_ids=clusters).logits
    for row in range(3):
        real = mask[row].bool()
        alone = model(input_ids=ids[row : row + 1, real], cluster_ids=clusters[row : row + 1]).logits
        torch.testing.assert_close(logits[row, real], alone[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"no_repeat_ngram_size": 2}], ids=["greedy", "beams", "ngram"]
)
def test_generation_of_a_batch_equals_one_by_one(family: str, options: dict[str, Any]) -> None:
    model = explainer(dense_model(family))
    ids, mask, clusters = slot_batch(model)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None} | options
    texts = model.generate(ids, attention_mask=mask, cluster_ids=clusters, **settings)[:, ids.shape[1] :]
    assert len({tuple(text.tolist()) for text in texts}) == 3
    for row in range(3):
        prompt = ids[row : row + 1, mask[row].bool()]
        alone = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), cluster_ids=clusters[row : row + 1], **settings
        )
        assert alone[0, prompt.shape[1] :].tolist() == texts[row].tolist()


def test_permuting_a_batch_permutes_its_texts() -> None:
    model = explainer()
    ids, mask, clusters = slot_batch(model)
    order = torch.tensor([2, 0, 1])
    settings = {"max_new_tokens": 8, "do_sample": False}
    texts = model.generate(ids, attention_mask=mask, cluster_ids=clusters, **settings)
    moved = model.generate(ids[order], attention_mask=mask[order], cluster_ids=clusters[order], **settings)
    assert torch.equal(moved, texts[order])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cluster_changes_the_text(family: str) -> None:
    model = explainer(dense_model(family))
    ids = text_ids(rows=1).expand(3, -1)
    texts = model.generate(
        ids, attention_mask=torch.ones_like(ids), cluster_ids=torch.arange(3), max_new_tokens=8, do_sample=False
    )
    assert len({tuple(text.tolist()) for text in texts}) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_do_not_change_the_text(family: str) -> None:
    model = explainer(dense_model(family))
    ids, mask, clusters = slot_batch(model)
    settings = {"attention_mask": mask, "cluster_ids": clusters, "max_new_tokens": 8, "do_sample": False}
    cached = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, use_cache=False, **settings), cached)
    assert torch.equal(model.generate(ids, cache_implementation="static", **settings), cached)


def test_sampling_is_seeded_and_never_writes_a_slot() -> None:
    model = explainer()
    ids, mask, clusters = slot_batch(model)
    texts = []
    for _ in range(2):
        torch.manual_seed(5)
        texts.append(
            model.generate(
                ids, attention_mask=mask, cluster_ids=clusters, do_sample=True, temperature=5.0, max_new_tokens=40
            )
        )
    assert torch.equal(texts[0], texts[1])
    assert texts[0][:, ids.shape[1] :].max() < VOCABULARY
    assert model(input_ids=ids, attention_mask=mask, cluster_ids=clusters).logits.shape[-1] == VOCABULARY


@pytest.mark.parametrize("beams", [1, 2])
def test_repetition_penalty_counts_the_text_and_not_the_prompt(beams: int) -> None:
    model = explainer()
    ids, mask, clusters = slot_batch(model)
    options = {"attention_mask": mask, "cluster_ids": clusters, "do_sample": False, "eos_token_id": None}
    options |= {"max_new_tokens": 12, "num_beams": beams}
    plain = model.generate(ids, **options)[:, ids.shape[1] :]
    assert min(len(set(row.tolist())) for row in plain) < 12
    never = model.generate(ids, repetition_penalty=1e9, **options)[:, ids.shape[1] :]
    assert [len(set(row.tolist())) for row in never] == [12] * 3
    # What the prompt holds may be written: a token that the plain text repeats, with all before it as the prompt.
    row = plain[0].tolist()
    repeat = next(place for place, token in enumerate(row) if token in row[:place])
    prompt = torch.cat([ids[:1], plain[:1, :repeat]], dim=1)
    options |= {"attention_mask": torch.ones_like(prompt), "cluster_ids": clusters[:1], "max_new_tokens": 1}
    again = model.generate(prompt, repetition_penalty=1e9, **options)
    assert again[0, -1] == model.generate(prompt, **options)[0, -1]
    assert beams > 1 or again[0, -1] == row[repeat]


def test_generation_refuses_what_it_cannot_do() -> None:
    model = explainer()
    ids, mask, clusters = slot_batch(model)
    with pytest.raises(ValueError, match="cluster_ids: needed by a router with 3 gates"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"cluster_ids: 3 is outside 0\.\.2"):
        model.generate(ids, attention_mask=mask, cluster_ids=clusters + 1, max_new_tokens=2)
    with pytest.raises(ValueError, match="cluster_idz"):
        model.generate(ids, attention_mask=mask, cluster_idz=clusters, max_new_tokens=2)


@pytest.mark.parametrize("kernel", ["auto", "grouped_mm"])
def test_forward_compiles_without_a_graph_break(kernel: str) -> None:
    model = explainer(dense_model().float(), implementation=kernel)
    ids, mask, clusters = slot_batch(model)
    inputs = {"input_ids": ids, "attention_mask": mask, "cluster_ids": clusters, "use_cache": False}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


def test_one_gate_serves_every_cluster() -> None:
    model = explainer(gates=1)
    ids, mask, clusters = slot_batch(model)
    without = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(model(input_ids=ids, attention_mask=mask, cluster_ids=clusters).logits, without)
