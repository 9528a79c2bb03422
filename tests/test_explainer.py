"""The explainer as a Hugging Face model: conversion, slots, batches, generation, saving, losses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from gavamoe.base_model import train_tokenizer
from gavamoe.config import RunConfig, parse_config
from gavamoe.decoders import GavamoeConfig
from gavamoe.errors import InputError
from gavamoe.explainer import GavamoeForCausalLM, build_explainer, load_explainer

VOCABULARY, USERS, ITEMS, SLOT, GATES = 300, 5, 7, 12, 3
FAMILIES = ("llama", "gpt2")


def dense_model(family: str = "llama", tied: bool = True) -> PreTrainedModel:
    """A tiny dense model in float64 whose weights are large enough for every part to matter."""
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(0)
    if family == "llama":
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=tied, **ids,
        )  # fmt: skip
        return LlamaForCausalLM(config).double().eval()
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_inner=64, initializer_range=0.2,
        tie_word_embeddings=tied, **ids,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model


def run_config(**experts: Any) -> RunConfig:
    values = {"count": 4, "top_k": 2, "conversion": "random", "implementation": "eager"} | experts
    return parse_config({"stage2": {"experts": values}}, "test")


def explainer(base: PreTrainedModel | None = None, gates: int = GATES, **experts: Any) -> GavamoeForCausalLM:
    base = dense_model() if base is None else base
    return build_explainer(run_config(**experts), base, USERS, ITEMS, SLOT, gates).eval()


def text_ids(rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(4))


def slot_batch(model: GavamoeForCausalLM) -> tuple[Tensor, Tensor, Tensor]:
    """Three prompts of 9, 6 and 3 tokens, left-padded, with a user and an item each, of three clusters."""
    ids = text_ids()
    ids[:, -2], ids[:, -3] = model.user_token(1), model.item_token(2)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 6)):
        ids[row, :padding], mask[row, :padding] = 2, 0
    return ids, mask, torch.tensor([2, 0, 1])


# Conversion of a dense model


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
def test_all_experts_of_a_split_model_equal_the_dense_model(family: str) -> None:
    dense = dense_model(family)
    model = explainer(dense, conversion="split", top_k=4)
    expected = dense(input_ids=text_ids()).logits
    clusters = torch.tensor([0, 1, 2])
    as_built = model(input_ids=text_ids(), cluster_ids=clusters).logits
    assert (as_built - expected).abs().max() < 0.01 * expected.abs().max()
    for module in model.modules():
        if type(module).__name__ == "MultiGateRouter":
            nn.init.zeros_(module.weight)
    torch.testing.assert_close(model(input_ids=text_ids(), cluster_ids=clusters).logits, expected)


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
        run_config(), dense_model(), USERS, ITEMS, SLOT, GATES, user_table=tables[0], item_table=tables[1]
    )
    words = model.get_input_embeddings().weight.square().mean().sqrt()
    first, items = VOCABULARY, VOCABULARY + USERS + 1
    for start, rows in ((first, USERS + 1), (items, ITEMS + 1)):
        slots = model.embed(torch.arange(start, start + rows)[None])
        torch.testing.assert_close(slots.square().mean().sqrt(), words, rtol=1e-3, atol=0)


def test_tables_of_stage_one_survive_building_and_saving(tmp_path: Path) -> None:
    torch.manual_seed(1)
    user, item = torch.randn(USERS + 1, SLOT), torch.randn(ITEMS + 1, SLOT)
    model = build_explainer(run_config(), dense_model(), USERS, ITEMS, SLOT, GATES, user_table=user, item_table=item)
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


# Batches and generation


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


def test_generation_refuses_what_it_cannot_do() -> None:
    model = explainer()
    ids, mask, clusters = slot_batch(model)
    with pytest.raises(ValueError, match="cluster_ids: needed by a router with 3 gates"):
        model.generate(ids, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"cluster_ids: 3 is outside 0\.\.2"):
        model.generate(ids, attention_mask=mask, cluster_ids=clusters + 1, max_new_tokens=2)
    with pytest.raises(ValueError, match="cluster_idz"):
        model.generate(ids, attention_mask=mask, cluster_idz=clusters, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"repetition_penalty 1\.5: not possible with user and item ids"):
        model.generate(ids, attention_mask=mask, cluster_ids=clusters, repetition_penalty=1.5)


def test_forward_compiles_without_a_graph_break() -> None:
    model = explainer(dense_model().float(), implementation="grouped_mm")
    ids, mask, clusters = slot_batch(model)
    inputs = {"input_ids": ids, "attention_mask": mask, "cluster_ids": clusters, "use_cache": False}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


def test_one_gate_serves_every_cluster() -> None:
    model = explainer(gates=1)
    ids, mask, clusters = slot_batch(model)
    without = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(model(input_ids=ids, attention_mask=mask, cluster_ids=clusters).logits, without)


# Saving and loading


def saved_and_loaded(model: GavamoeForCausalLM, folder: Path) -> GavamoeForCausalLM:
    model.save_pretrained(folder)
    train_tokenizer(["a text"], VOCABULARY).save_pretrained(folder)
    return load_explainer(folder)[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "experts", [{}, {"conversion": "shared"}, {"enabled": False}], ids=["random", "shared", "dense"]
)
def test_saved_folder_is_complete_and_loads_equal(
    family: str, tied: bool, experts: dict[str, Any], tmp_path: Path
) -> None:
    model = explainer(dense_model(family, tied=tied), **experts)
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    loaded = saved_and_loaded(model, tmp_path).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    word_table = loaded.get_input_embeddings().weight
    assert (loaded.lm_head.weight.data_ptr() == word_table.data_ptr()) == tied
    ids, mask, clusters = slot_batch(model)
    settings = {"attention_mask": mask, "cluster_ids": clusters, "max_new_tokens": 6}
    assert torch.equal(loaded.generate(ids, **settings), model.generate(ids, **settings))
    assert loaded.generation_config.pad_token_id == 2
    assert loaded.generation_config.eos_token_id == 1


def test_auto_classes_know_the_model(tmp_path: Path) -> None:
    explainer().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), GavamoeConfig)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), GavamoeForCausalLM)


def test_kernel_choice_survives_saving_and_can_be_changed(tmp_path: Path) -> None:
    dense = dense_model()  # a dense LLaMA made first makes transformers cache that LLaMA has no experts
    assert dense._can_set_experts_implementation() is False
    model = explainer(dense.float(), implementation="batched_mm")
    assert model.config._experts_implementation == "batched_mm"
    loaded = saved_and_loaded(model, tmp_path)
    assert loaded.model.layers[0].mlp.experts.config._experts_implementation == "batched_mm"
    loaded.set_experts_implementation("grouped_mm")
    assert loaded.model.layers[0].mlp.experts.config._experts_implementation == "grouped_mm"


def test_grouped_kernel_is_the_default() -> None:
    config = parse_config({}, "test")
    model = build_explainer(config, dense_model().float(), USERS, ITEMS, SLOT, GATES)
    assert model.model.layers[0].mlp.experts.config._experts_implementation == "grouped_mm"


def test_loading_is_strict(tmp_path: Path) -> None:
    saved_and_loaded(explainer(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "user_embedding.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"missing keys in the weights, such as user_embedding\.weight"):
        load_explainer(tmp_path)
    save_file(weights | {"stray": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="unexpected keys in the weights, such as stray"):
        load_explainer(tmp_path)
    save_file(weights | {"user_embedding.weight": torch.zeros(2, SLOT)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"mismatched keys in the weights, such as .*user_embedding"):
        load_explainer(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="no explainer can be loaded"):
        load_explainer(tmp_path)


def test_folders_that_hold_no_explainer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no explainer can be loaded"):
        load_explainer(tmp_path / "nowhere")
    dense_model().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds a llama model, not gavamoe"):
        load_explainer(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        load_explainer(tmp_path)


def test_config_file_names_every_size(tmp_path: Path) -> None:
    explainer().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "model_type": "gavamoe", "n_users": USERS, "n_items": ITEMS, "slot_size": SLOT, "n_gates": GATES,
        "n_experts": 4, "experts_per_token": 2, "expert_size": 16, "conversion": "random", "expert_kernel": "eager",
        "renormalise": False, "tie_word_embeddings": True,
    }  # fmt: skip
    assert {name: saved[name] for name in expected} == expected
    assert saved["text_config"]["model_type"] == "llama"


# Losses and gradients


def test_loss_is_the_mean_over_labelled_next_tokens() -> None:
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
