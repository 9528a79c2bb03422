"""The network of the baseline PETER: its masking, its losses by hand, writing with a cache."""

import math

import torch
from torch import Tensor

from gavamoe.baselines.frame import Limits
from gavamoe.baselines.peter import Peter, PeterSpec
from gavamoe.config.schema import PeterConfig

SIZE = PeterConfig(embedding_size=16, feed_forward=32, dropout=0.0)
END = 1


def peter(**changes: object) -> Peter:
    torch.manual_seed(0)
    values = {
        "vocabulary": 20,
        "end": END,
        "n_users": 5,
        "n_items": 4,
        "places": 16,
        "mean_rating": 3.5,
        "features": True,
    }
    return Peter(PeterSpec(size=SIZE, **values | changes)).eval()  # type: ignore[arg-type]


def a_batch() -> dict[str, Tensor]:
    """Two rows: prefix of two tokens, explanations of three and two tokens, the end token last."""
    return {
        "users": torch.tensor([0, 5]),
        "items": torch.tensor([3, 1]),
        "ratings": torch.tensor([2.0, math.nan]),
        "tokens": torch.tensor([[7, 2, 8, 9, END], [6, 2, 8, END, END]]),
        "labels": torch.tensor([[-100, -100, 8, 9, END], [-100, -100, 8, END, -100]]),
    }


def test_user_and_item_see_each_other_and_nobody_sees_ahead() -> None:
    model, batch = peter(), a_batch()

    def states(item: int, last: int) -> Tensor:
        tokens = batch["tokens"][:1].clone()
        tokens[0, -1] = last
        found: Tensor = model(batch["users"][:1], torch.tensor([item]), tokens)[0][0]
        return found

    with torch.inference_mode():
        one, other_item, other_word = states(3, END), states(2, END), states(3, 9)
    assert not torch.allclose(one[0], other_item[0])  # the user's place sees the item, which comes after it
    assert torch.allclose(one[:-1], other_word[:-1])
    assert not torch.allclose(one[-1], other_word[-1])


def test_losses_by_hand() -> None:
    model, batch = peter(), a_batch()
    with torch.inference_mode():
        found = model.losses(batch)
        states, _ = model(batch["users"], batch["items"], batch["tokens"])
        words = torch.log_softmax(model.output(states), dim=-1)
        # Places: 0 user, 1 item, 2 feature, 3 <s>, 4 on the explanation.
        answers = [(0, 3, 8), (0, 4, 9), (0, 5, END), (1, 3, 8), (1, 4, END)]
        explanation = -torch.stack([words[row, place, word] for row, place, word in answers]).mean()
        context = -torch.stack([words[0, 1, 8], words[0, 1, 9], words[1, 1, 8]]).mean()
        rating = (model.predict_rating(states)[0] - 2.0) ** 2
    assert torch.allclose(found["explanation"], explanation)
    assert torch.allclose(found["context"], context)
    assert torch.allclose(found["rating"], rating)
    assert torch.allclose(found["loss"], explanation + context + 0.1 * rating)


def test_padding_changes_no_loss() -> None:
    model, batch = peter(), a_batch()
    alone = {name: values[1:] for name, values in batch.items()}
    cut = alone | {name: alone[name][:, :-1] for name in ("tokens", "labels")}
    with torch.inference_mode():
        assert torch.allclose(model.losses(alone)["loss"], model.losses(cut)["loss"], atol=1e-6)


def test_cached_writing_equals_reading_all_again() -> None:
    model = peter()
    users, items, prefix = torch.tensor([0, 4, 2]), torch.tensor([1, 0, 3]), torch.tensor([[7, 2], [6, 2], [5, 2]])
    banned = [0, 2]
    written = model.write({"users": users, "items": items}, prefix.tolist(), Limits(6, END, banned))
    texts, ratings = written.tokens, written.ratings or []
    with torch.inference_mode():
        for row, text in enumerate(texts):
            tokens = prefix[row : row + 1]
            for word in text:
                states, _ = model(users[row : row + 1], items[row : row + 1], tokens)
                scores = model.output(states[0, -1])
                scores[banned] = -torch.inf
                assert int(scores.argmax()) == word
                tokens = torch.cat([tokens, torch.tensor([[word]])], dim=1)
            assert len(text) == 6 or text[-1] == END
            assert math.isclose(float(model.predict_rating(states)[0]), ratings[row], rel_tol=1e-5)


def test_writing_ends_where_the_places_end() -> None:
    model = peter(places=6)
    batch = {"users": torch.tensor([0]), "items": torch.tensor([0])}
    written = model.write(batch, [[7, 2]], Limits(50, END, [END]))
    assert len(written.tokens[0]) == 3  # two places after the prefix, and the word after the last of them
