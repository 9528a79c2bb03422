"""The network of the baseline NETE: its cells and gate by hand, what its parts learn from, writing."""

import math

import pytest
import torch
from torch import Tensor

from gavamoe.baselines.frame import Limits
from gavamoe.baselines.nete import GruCell, Nete, NeteSpec
from gavamoe.baselines.training import clip_gradients
from gavamoe.config.schema import NeteConfig

SIZE = NeteConfig(embedding_size=6, hidden_size=8, dropout=0.0, rating_layers=2)
END, START = 1, 2


def nete(size: NeteConfig = SIZE, **changes: object) -> Nete:
    torch.manual_seed(0)
    sizes = {"vocabulary": 20, "end": END, "n_users": 5, "n_items": 4}
    values = {**sizes, "mean_rating": 3.5, "middle": 3.0, "features": True}
    return Nete(NeteSpec(size=size, **values | changes)).eval()  # type: ignore[arg-type]


def a_batch() -> dict[str, Tensor]:
    """Two rows: a feature of two tokens and one of none, explanations of three and two tokens, the end token last."""
    return {
        "users": torch.tensor([0, 5]),
        "items": torch.tensor([3, 1]),
        "ratings": torch.tensor([2.0, math.nan]),
        "tokens": torch.tensor([[7, 6, START, 8, 9, END], [START, 8, END, END, END, END]]),
        "labels": torch.tensor([[-100, -100, -100, 8, 9, END], [-100, 8, END, -100, -100, -100]]),
        "prefix": torch.tensor([3, 1]),
    }


def test_a_cell_without_weights_halves_its_state() -> None:
    cell = GruCell(1, 1)
    for parameter in cell.parameters():
        torch.nn.init.zeros_(parameter)
    state = torch.ones(1, 1)
    for step in range(1, 4):
        state = cell(torch.ones(1, 1), state)
        assert float(state.detach()) == pytest.approx(0.5**step)


def test_a_cell_by_hand() -> None:
    cell = GruCell(1, 1)
    with torch.no_grad():
        cell.gates.weight.copy_(torch.tensor([[0.5, -1.0], [0.25, 2.0]]))
        cell.gates.bias.copy_(torch.tensor([1.0, 1.0]))
        cell.candidate.weight.copy_(torch.tensor([[1.5, -0.5]]))
    x, h = 0.8, 0.4
    reset, keep = 1 / (1 + math.exp(-(0.5 * x - h + 1))), 1 / (1 + math.exp(-(0.25 * x + 2 * h + 1)))
    expected = keep * h + (1 - keep) * math.tanh(1.5 * x - 0.5 * reset * h)
    assert float(cell(torch.tensor([[x]]), torch.tensor([[h]])).detach()) == pytest.approx(expected, rel=1e-6)


def test_an_undecided_gate_takes_the_mean_of_both_states() -> None:
    model = nete()
    torch.nn.init.zeros_(model.fusion.weight)
    state, word, feature = torch.randn(3, 8), torch.randn(3, 6), torch.randn(3, 6)
    mean = (model.of_words(word, state) + model.of_feature(feature, state)) / 2
    torch.testing.assert_close(model.step(state, word, feature), mean)


def test_with_one_network_and_the_feature_as_the_last_word_the_gate_has_no_effect() -> None:
    model = nete(SIZE.model_copy(update={"tied": True}))
    state, word = torch.randn(3, 8), torch.randn(3, 6)
    before = model.step(state, word, word)
    torch.nn.init.normal_(model.fusion.weight, std=3)
    torch.testing.assert_close(model.step(state, word, word), before)


def test_text_and_rating_share_no_parameter() -> None:
    model, batch = nete(), a_batch()
    of_rating = {name for name, _ in model.named_parameters() if name.startswith("rating")}
    for loss, learns in (("rating", of_rating), ("explanation", None)):
        model.zero_grad()
        model.losses(batch)[loss].backward()
        moved = {name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
        assert moved
        assert moved <= of_rating if learns else moved.isdisjoint(of_rating)


def test_a_large_error_of_the_rating_takes_nothing_from_the_texts() -> None:
    model, batch = nete(), a_batch()
    norms = []
    for rating in (2.0, 2000.0):
        model.zero_grad()
        model.losses(batch | {"ratings": torch.tensor([rating, math.nan])})["loss"].backward()
        clip_gradients(model, 0.01)
        gradients = {name: each.grad for name, each in model.named_parameters() if not name.startswith("rating")}
        norms.append(float(torch.stack([each.norm() for each in gradients.values() if each is not None]).norm()))
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


def test_losses_by_hand() -> None:
    model, batch = nete(), a_batch()
    with torch.inference_mode():
        found = model.losses(batch)
        losses = []
        for row, (feature, answer) in enumerate((([7, 6], [8, 9, END]), ([], [8, END]))):
            state = model.first_state(*(batch[name][row : row + 1] for name in ("users", "items", "ratings")))
            vector = model.words(torch.tensor(feature)).mean(dim=0) if feature else model.no_feature
            for last, word in zip([START, *answer], answer, strict=False):
                state = model.step(state, model.words(torch.tensor([last])), vector[None])
                losses.append(-torch.log_softmax(model.output(state[0]), dim=-1)[word])
        rating = (model.predict_rating(torch.tensor([0]), torch.tensor([3])) - 2.0) ** 2
        decay = sum(float(p.square().sum()) for n, p in model.named_parameters() if n.startswith("rating")) / 2
    torch.testing.assert_close(found["explanation"], torch.stack(losses).mean())
    torch.testing.assert_close(found["rating"], rating[0])
    assert float(found["loss"]) == pytest.approx(float(found["explanation"] + rating) + 1e-4 * decay, rel=1e-5)


def test_padding_changes_no_loss() -> None:
    model, batch = nete(), a_batch()
    alone = {name: values[1:] for name, values in batch.items()}
    cut = alone | {name: alone[name][:, :3] for name in ("tokens", "labels")}
    with torch.inference_mode():
        torch.testing.assert_close(model.losses(alone)["explanation"], model.losses(cut)["explanation"])


def test_only_the_sign_of_a_rating_is_read_and_a_missing_one_is_predicted() -> None:
    model = nete()
    users, items = torch.tensor([0] * 5), torch.tensor([1] * 5)
    states = model.first_state(users, items, torch.tensor([1.0, 2.9, 3.0, 5.0, math.nan]))
    torch.testing.assert_close(states[0], states[1])
    torch.testing.assert_close(states[2], states[3])
    assert not torch.allclose(states[1], states[2], atol=1e-4)
    positive = float(model.predict_rating(users[:1], items[:1])) >= 3
    torch.testing.assert_close(states[4], states[2] if positive else states[0])


def test_writing_step_by_step_is_what_the_losses_unroll() -> None:
    model, batch = nete(), a_batch()
    prefixes = [[7, 6, START], [START]]
    written = model.write(batch, prefixes, Limits(5, END, [0]))
    for row in range(2):
        alone = model.write({name: batch[name][row : row + 1] for name in batch}, [prefixes[row]], Limits(5, END, [0]))
        assert alone.tokens[0] == written.tokens[row]
    for row, text in enumerate(written.tokens):
        tokens = torch.tensor([[*prefixes[row], *text]])
        labels = tokens.clone()
        labels[:, : len(prefixes[row])] = -100
        states = []
        model.output.register_forward_hook(lambda module, inputs, output, kept=states: kept.append(output))
        with torch.inference_mode():
            model.losses(
                {name: batch[name][row : row + 1] for name in ("users", "items", "ratings")}
                | {"tokens": tokens, "labels": labels, "prefix": torch.tensor([len(prefixes[row])])}
            )
        scores = states[0].clone()
        scores[:, 0] = -torch.inf
        assert scores.argmax(dim=-1).tolist() == text
        model.output._forward_hooks.clear()
