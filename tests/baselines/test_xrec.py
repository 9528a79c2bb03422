"""The baseline XRec: its adapters, what they add to the language model, its training, writing."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.stage2_runs import save_base
from helpers.tiny import tiny
from helpers.xrec_models import config_of, xrec
from torch import Tensor
from transformers import LlamaConfig

from gavamoe.baselines.frame import Limits
from gavamoe.baselines.parts.injection import check_width, folded, injected
from gavamoe.baselines.training import train_baseline
from gavamoe.baselines.writing import BaselineWriter
from gavamoe.baselines.xrec import Adapter, Xrec
from gavamoe.data.dataset import Dataset, PairArrays, open_dataset
from gavamoe.errors import InputError
from gavamoe.runtime.context import LocalContext

END = 1
LIMITS = Limits(6, END, [0])
FAMILIES = ("llama", "gpt2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model")


def a_batch(model: Xrec) -> dict[str, Tensor]:
    """Two rows: slots at 1 and 3, and at 0 and 1; explanations of three and two tokens, the end token last."""
    user, item = model.prompts.slots
    return {
        "users": torch.tensor([0, 3]),
        "items": torch.tensor([3, 1]),
        "ratings": torch.tensor([2.0, math.nan]),
        "tokens": torch.tensor([[2, user, 5, item, 8, 9, END], [user, item, 8, END, END, END, END]]),
        "labels": torch.tensor([[-100] * 4 + [8, 9, END], [-100, -100, 8, END, -100, -100, -100]]),
        "prefix": torch.tensor([4, 2]),
    }


# The adapters.


def test_gates_start_equal_and_all_experts_are_added_up() -> None:
    torch.manual_seed(0)
    adapter = Adapter(4, 6, experts=3, dropout=0.5).eval()
    torch.nn.init.normal_(adapter.offset)
    x = torch.randn(5, 4)
    each = [(x - adapter.offset[n]) @ adapter.weight[n] for n in range(3)]
    torch.testing.assert_close(adapter(x), torch.stack(each).mean(dim=0))
    with torch.no_grad():
        adapter.gate[0, 1] = 1.0
    shares = torch.softmax(torch.stack([x[:, 0] * (n == 1) for n in range(3)], dim=1), dim=1)
    torch.testing.assert_close(adapter(x), (shares[..., None] * torch.stack(each, dim=1)).sum(dim=1))


def test_gates_are_noisy_in_training_alone() -> None:
    adapter, x = Adapter(4, 6, experts=3, dropout=0.0), torch.randn(5, 4)
    assert not torch.equal(adapter(x), adapter(x))
    adapter.eval()
    assert torch.equal(adapter(x), adapter(x))


def test_one_expert_is_a_linear_map_whatever_its_gate() -> None:
    adapter = Adapter(4, 6, experts=1, dropout=0.0)
    torch.nn.init.normal_(adapter.gate)
    x = torch.randn(5, 4)
    torch.testing.assert_close(adapter(x), x @ adapter.weight[0])


def test_a_vector_of_zeros_becomes_a_learned_constant(planted: Dataset) -> None:
    model = xrec(planted)
    users, items = model.spec.n_users, model.spec.n_items
    pair = model.pair({"users": torch.tensor([users]), "items": torch.tensor([items])})[0]
    for adapter, adapted in zip((model.users, model.items), pair, strict=True):
        constant = -torch.einsum("nc,ncd->d", adapter.offset, adapter.weight) / 8
        torch.testing.assert_close(adapted, constant)
        assert constant.abs().max() > 0.1


# What is added in the model.


def test_folding_takes_the_mean_of_heads_that_share() -> None:
    vectors = torch.randn(2, 2, 12)
    assert torch.equal(folded(vectors, 3, 3), vectors)
    head = torch.randn(2, 4)
    torch.testing.assert_close(folded(head.repeat(1, 3), 3, 1), head)
    by_hand = folded(torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]), heads=4, shared_heads=2)
    assert by_hand.tolist() == [2, 3, 6, 7]


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_that_say_nothing_leave_the_bare_model_with_zeros_in_the_slots(family: str, planted: Dataset) -> None:
    model = xrec(planted, f"stage2.scratch.family={family}")
    for adapter in (model.users, model.items):
        torch.nn.init.zeros_(adapter.weight)
        torch.nn.init.zeros_(adapter.offset)
    batch = a_batch(model)
    with torch.no_grad():
        slots = batch["tokens"] >= model.prompts.slots[0]
        vectors = model.words(batch["tokens"].masked_fill(slots, 0)).masked_fill(slots[..., None], 0)
        mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
        scores = torch.log_softmax(model.lm(inputs_embeds=vectors, attention_mask=mask).logits, dim=-1)
        targets = [(0, 3, 8), (0, 4, 9), (0, 5, END), (1, 1, 8), (1, 2, END)]
        by_hand = -torch.stack([scores[row, place, word] for row, place, word in targets]).mean()
        torch.testing.assert_close(model.losses(batch)["explanation"], by_hand)


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_keys_and_values_of_the_places_get_the_vector(family: str, planted: Dataset) -> None:
    model = xrec(planted, f"stage2.scratch.family={family}")
    [layer, *_] = [part for part in model.lm.modules() if hasattr(part, "q_proj") or hasattr(part, "c_attn")]
    projections = [layer.c_attn] if family == "gpt2" else [layer.q_proj, layer.k_proj, layer.v_proj]
    inputs, vectors = torch.randn(2, 5, 32), torch.randn(2, 1, 32)
    plain = [projection(inputs) for projection in projections]
    with injected(model.lm, vectors, torch.tensor([[2], [0]]), 5):
        added = [projection(inputs) - before for projection, before in zip(projections, plain, strict=True)]
        torch.testing.assert_close(projections[0](inputs[:, :1]), plain[0][:, :1])  # a step after the prompt
    for difference in torch.cat(added, dim=-1).chunk(3, dim=-1):
        wanted = torch.zeros(2, 5, 32)
        wanted[0, 2], wanted[1, 0] = vectors[0, 0], vectors[1, 0]
        torch.testing.assert_close(difference, wanted)
    assert torch.equal(projections[0](inputs), plain[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_before_a_place_moves_and_all_behind_it_does(family: str, planted: Dataset) -> None:
    model = xrec(planted, f"stage2.scratch.family={family}")
    inputs = torch.randn(1, 6, 32)
    with torch.inference_mode():
        before = model.lm(inputs_embeds=inputs).logits
        with injected(model.lm, 3 * torch.randn(1, 1, 32), torch.tensor([[2]]), 6):
            after = model.lm(inputs_embeds=inputs).logits
    moved = ((before - after).abs().amax(dim=-1) > 1e-4)[0].tolist()
    assert moved == [False, False, True, True, True, True]


def test_keys_and_values_that_heads_share(planted: Dataset, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_base(tmp_path / "model")
    config = LlamaConfig.from_pretrained(tmp_path / "model", num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    type(xrec(planted).lm)(config).save_pretrained(tmp_path / "model")
    model = xrec(planted, base=tmp_path / "model")
    assert model.lm.model.layers[0].self_attn.k_proj.out_features == 16
    batch = a_batch(model)
    loss = model.losses(batch)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert bool((model.users.weight.grad != 0).any())
    with pytest.raises(InputError, match="its queries are 64 wide and its states 32"):
        check_width(LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=16))


# Losses and writing.


def test_padding_changes_no_loss(planted: Dataset) -> None:
    model = xrec(planted)
    alone = {name: values[1:] for name, values in a_batch(model).items()}
    cut = alone | {name: alone[name][:, :4] for name in ("tokens", "labels")}
    with torch.inference_mode():
        torch.testing.assert_close(model.losses(alone)["loss"], model.losses(cut)["loss"])


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_left_moves_the_slots_along(family: str, planted: Dataset) -> None:
    model = xrec(planted, f"stage2.scratch.family={family}")
    batch, (user, item) = a_batch(model), model.prompts.slots
    prefixes = [[2, 7, 7, 7, user, 5, item, 6], [user, item, 6]]
    together = model.write(batch, prefixes, LIMITS).tokens
    for row in range(2):
        one = {name: values[row : row + 1] for name, values in batch.items()}
        assert model.write(one, prefixes[row : row + 1], LIMITS).tokens[0] == together[row]
    other = {**batch, "users": torch.tensor([0, 7])}
    assert model.write(other, prefixes, LIMITS).tokens[0] == together[0]
    assert model.write(other, prefixes, LIMITS).tokens[1] != together[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_with_a_cache_is_reading_everything_again(family: str, planted: Dataset) -> None:
    model = xrec(planted, f"stage2.scratch.family={family}")
    batch, (user, item) = a_batch(model), model.prompts.slots
    prefix = [2, user, 5, item, 6]
    for row, text in enumerate(model.write(batch, [prefix, prefix], LIMITS).tokens):
        pair = model.pair(batch)[row : row + 1]
        tokens = list(prefix)
        for word in text:
            read = torch.tensor([tokens])
            with torch.inference_mode(), injected(model.lm, pair, torch.tensor([[1, 3]]), len(tokens)):
                scores = model.lm(inputs_embeds=model.read(read, pair)).logits[0, -1].clone()
                scores[0] = -torch.inf
            assert int(scores.argmax()) == word
            tokens.append(word)
        assert len(text) == 6 or text[-1] == END


def test_who_has_which_index_changes_no_text(planted: Dataset) -> None:
    model = xrec(planted)
    batch, prefixes = a_batch(model), [[2, *model.prompts.slots, 6]] * 2
    before = model.write(batch, prefixes, LIMITS).tokens
    assert before[0] != before[1]
    order = torch.randperm(model.spec.n_users, generator=torch.Generator().manual_seed(1))
    model.user_vectors[:-1] = model.user_vectors[:-1][order].clone()
    moved = batch | {"users": torch.tensor([int((order == user).nonzero()) for user in batch["users"]])}
    assert model.write(moved, prefixes, LIMITS).tokens == before
    assert model.write(batch, prefixes, LIMITS).tokens != before


# Training.


def test_a_pretrained_model_stays_as_it_is(planted: Dataset, base: Path, tmp_path: Path) -> None:
    config = config_of("stage2.max_steps=3", base=base)
    before = xrec(planted, base=base).lm.state_dict()
    train_baseline(config, planted.path, tmp_path / "baseline", LocalContext())
    model = BaselineWriter.load(tmp_path / "baseline").model
    assert isinstance(model, Xrec)
    after = model.lm.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    for adapter in (model.users, model.items):
        assert all(bool((value != 0).any()) for value in (adapter.gate, adapter.offset))
    [phase] = model.phases(config)
    assert not phase.trained("lm.model.embed_tokens.weight")
    [everything] = model.phases(config_of())
    assert everything.trained("lm.model.embed_tokens.weight")  # a scratch model has learned nothing to keep


@pytest.mark.parametrize("family", FAMILIES)
def test_low_rank_adapters_are_trained_on_request(family: str, planted: Dataset, tmp_path: Path) -> None:
    from gavamoe.model.base_model import load_base

    scratch = tiny(f"stage2.scratch.family={family}").stage2.scratch
    lm, tokenizer = load_base("scratch", scratch, ["What a fine book about ghosts and clues!"] * 20, seed=0)
    for part in (lm, tokenizer):
        part.save_pretrained(tmp_path / "model")
    config = config_of("baselines.xrec.tune=lora", "stage2.max_steps=3", base=tmp_path / "model")
    metrics = train_baseline(config, planted.path, tmp_path / "baseline", LocalContext())
    model = BaselineWriter.load(tmp_path / "baseline").model
    state = model.lm.state_dict()
    own = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    assert own.keys() == lm.state_dict().keys()
    assert all(torch.equal(value, own[name]) for name, value in lm.state_dict().items())
    learned = [value for name, value in state.items() if ".lora_B." in name]
    assert learned
    assert all(bool((value != 0).any()) for value in learned)
    low_rank = sum(value.numel() for name, value in state.items() if ".lora_" in name)
    adapters = sum(value.numel() for part in (model.users, model.items) for value in part.parameters())
    assert metrics["trained_parameters"] == low_rank + adapters


def test_data_without_a_rating_above_the_middle_are_refused(planted: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = planted.arrays("train")
    low = PairArrays(arrays.user, arrays.item, np.minimum(arrays.rating, 3))
    monkeypatch.setattr(Dataset, "arrays", lambda self, split: low)
    with pytest.raises(InputError, match="no training rating is above the middle of the scale, so XRec's graph has no"):
        Xrec.check(config_of(), open_dataset(planted.path))
