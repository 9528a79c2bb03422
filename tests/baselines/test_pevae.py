"""The baseline PEVAE: its Gaussians, negatives and divergences by hand, what reads the words, writing."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from helpers.tiny import tiny
from pydantic import ValidationError
from torch import Tensor, nn

from gavamoe.baselines.frame import Columns, Limits, Reader
from gavamoe.baselines.parts.hierarchy import Discriminator, Gaussian, Narrowing, hard_negatives
from gavamoe.baselines.pevae import Pevae, PevaeSpec
from gavamoe.config.schema import PevaeConfig
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError
from gavamoe.stage2.tokenized_rows import prompt_builder, rating_scale

SIZE = PevaeConfig(width=16, levels=3, heads=2, layers=1, dropout=0.0)
END, START = 1, 2
PRIOR = ("users.", "items.", "pair_encoder.", "pair_levels.", "priors.")
POSTERIOR = ("read_words.", "word_encoder.", "word_levels.", "posteriors.")


def pevae(features: bool = False, users: int = 5, items: int = 4, **changes: object) -> Pevae:
    torch.manual_seed(0)
    size = PevaeConfig.model_validate(SIZE.model_dump() | changes)
    sizes = {"vocabulary": 20, "end": END, "n_users": users, "n_items": items, "longest": 6}
    sizes["asked"] = 4 if features else 0
    return Pevae(PevaeSpec(size=size, features=features, mean_rating=3.5, rated=True, **sizes)).eval()


def a_batch() -> dict[str, Tensor]:
    """Two rows: two tokens asked for and none, explanations of three and two tokens, the end token last."""
    return {
        "users": torch.tensor([0, 5]),
        "items": torch.tensor([3, 1]),
        "ratings": torch.tensor([2.0, math.nan]),
        "tokens": torch.tensor([[7, 6, START, 8, 9, END], [START, 8, END, END, END, END]]),
        "labels": torch.tensor([[-100, -100, -100, 8, 9, END], [-100, 8, END, -100, -100, -100]]),
        "prefix": torch.tensor([3, 1]),
        "done": torch.tensor(0.5),
    }


def normal(mean: float, spread: float) -> Gaussian:
    return Gaussian(torch.tensor([[mean]]), torch.tensor([[spread]]))


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module returns as long as this is open."""
    kept: list[Tensor] = []
    hook = module.register_forward_hook(lambda module, inputs, output: kept.append(output))
    yield kept
    hook.remove()


def moved_by(model: Pevae, loss: Tensor) -> set[str]:
    """Names of the parameters that a loss has a gradient for."""
    model.zero_grad()
    loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}


@pytest.mark.parametrize(
    ("one", "other", "nats"),
    [((0, 1), (1, 1), 0.5), ((0, 1), (0, 2), math.log(2) - 0.5 + 0.125), ((3, 0.7), (3, 0.7), 0.0)],
)
def test_divergences_by_hand(one: tuple[float, float], other: tuple[float, float], nats: float) -> None:
    assert float(normal(*one).divergence(normal(*other))) == pytest.approx(nats, abs=1e-6)
    doubled = Gaussian(*(torch.full((3, 2), value) for value in one))
    against = Gaussian(*(torch.full((3, 2), value) for value in other))
    torch.testing.assert_close(doubled.divergence(against), torch.full((3,), 2 * nats))  # dimensions add up, rows don't


def test_fusion_by_hand() -> None:
    sure, unsure = normal(0, 1), normal(4, 3)
    for fused in (sure.fused(unsure), unsure.fused(sure)):
        assert (float(fused.mean), float(fused.spread)) == pytest.approx((1.0, 1.5))
    equal = normal(0, 2).fused(normal(4, 2))
    assert (float(equal.mean), float(equal.spread)) == pytest.approx((2.0, 2.0))
    assert float(normal(0, 1e-6).fused(normal(4, 3)).mean) == pytest.approx(0.0, abs=1e-5)


def test_samples_have_mean_and_spread() -> None:
    torch.manual_seed(0)
    drawn = Gaussian(torch.full((100_000, 2), 3.0), torch.tensor([[0.5, 2.0]]).expand(100_000, 2)).sample()
    torch.testing.assert_close(drawn.mean(dim=0), torch.tensor([3.0, 3.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.std(dim=0), torch.tensor([0.5, 2.0]), atol=0.02, rtol=0)
    centered = (drawn - drawn.mean(dim=0)) / drawn.std(dim=0)
    torch.testing.assert_close(centered.pow(3).mean(dim=0), torch.zeros(2), atol=0.05, rtol=0)  # to both sides alike


def test_a_hard_negative_is_another_row_and_rather_one_that_is_alike() -> None:
    torch.manual_seed(0)
    three = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]])  # cosines of the first: 1 and -1
    assert all(int(hard_negatives(three)[0]) == 1 for _ in range(200))
    many = torch.randn(7, 3)
    counts = torch.zeros(7, 7)
    for _ in range(3000):
        counts[torch.arange(7), hard_negatives(many)] += 1
    assert counts.diagonal().sum() == 0
    unit = many / many.norm(dim=1, keepdim=True)
    weights = (1 + unit @ unit.T).fill_diagonal_(0)
    torch.testing.assert_close(counts / 3000, weights / weights.sum(dim=1, keepdim=True), atol=0.04, rtol=0)
    assert hard_negatives(torch.tensor([[1.0], [-1.0]])).tolist() == [1, 0]  # no other is alike


def test_an_undecided_discriminator_loses_two_bits() -> None:
    found = Discriminator(4, 3).requires_grad_(False)
    last = found.blocks[1][2]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    assert float(found.loss(torch.randn(5, 4), torch.randn(5, 3))) == pytest.approx(2 * math.log(2))
    nn.init.constant_(last.bias, 3.0)  # all is called its own
    expected = math.log(1 + math.exp(-3)) + math.log(1 + math.exp(3))
    assert float(found.loss(torch.randn(5, 4), torch.randn(5, 3))) == pytest.approx(expected, rel=1e-6)
    assert float(found.loss(torch.randn(1, 4), torch.randn(1, 3))) == 0  # no other row


def test_levels_are_each_half_as_wide_as_the_one_before() -> None:
    assert [tuple(level.shape) for level in Narrowing([16, 8, 4])(torch.randn(2, 16))] == [(2, 16), (2, 8), (2, 4)]
    model = pevae()
    levels = model.levels(torch.randn(2, 16), torch.randn(2, 16))
    assert [level.value.shape[1] for level in levels] == [4, 8, 16]
    assert model.summary(torch.zeros(2, 16), levels).shape == (2, 16)


def test_each_divergence_moves_its_own_network_only() -> None:
    for weights, own in (((0.5, 0.0), PRIOR), ((0.0, 0.1), POSTERIOR)):
        model = pevae(features=True, prior_weight=weights[0], posterior_weight=weights[1], free_nats=0).train()
        pair = model.pair(a_batch()["users"], a_batch()["items"])
        words = model.word_encoder(model.read_words(torch.tensor([[8, 9], [8, END]])), torch.ones(2, 2).bool())
        moved = moved_by(model, model.divergence(model.levels(pair, words))[0])
        assert all(name.startswith(own) for name in moved)
        assert {name.split(".")[0] for name in moved} == {name.rstrip(".") for name in own}


def test_the_bound_moves_both_networks() -> None:
    model = pevae(kl="elbo", free_nats=0).train()
    levels = model.levels(torch.randn(2, 16), torch.randn(2, 16))
    total, parts = model.divergence(levels)
    by_hand = sum(level.sampled.divergence(level.prior).mean() for level in levels)
    torch.testing.assert_close(total, by_hand)
    torch.testing.assert_close(parts["read_kl"], by_hand)
    assert {"priors", "posteriors"} <= {name.split(".")[0] for name in moved_by(model, total)}


def test_free_nats_cost_nothing() -> None:
    model = pevae(kl="elbo", free_nats=1e4).train()
    total, _ = model.divergence(model.levels(torch.randn(2, 16), torch.randn(2, 16)))
    assert float(total.detach()) == 3e4
    assert not moved_by(model, total)


def test_without_fusion_the_posterior_alone_is_sampled_and_held_to_the_prior() -> None:
    model = pevae(fusion=False, prior_weight=0, posterior_weight=1, free_nats=0).train()
    levels = model.levels(torch.randn(2, 16), torch.randn(2, 16))
    assert all(level.sampled is level.posterior for level in levels)
    by_hand = torch.stack([level.prior.divergence(level.sampled).mean() for level in levels]).sum()
    torch.testing.assert_close(model.divergence(levels)[0], by_hand)
    with_fusion = pevae().levels(torch.randn(2, 16), torch.randn(2, 16))
    for level in with_fusion:
        assert level.posterior is not None
        torch.testing.assert_close(level.sampled.mean, level.prior.fused(level.posterior).mean)


def test_the_total_is_the_weighted_sum_and_grows_with_beta() -> None:
    batch = a_batch()
    totals = []
    for done in (0.0, 0.1, 0.9):
        torch.manual_seed(1)
        model = pevae(free_nats=0).train()
        torch.manual_seed(2)
        found = model.losses(batch | {"done": torch.tensor(done)})
        divergence = 0.5 * found["prior_kl"] + 0.1 * found["posterior_kl"]
        beta = min(1.0, done / 0.2)
        rest = found["explanation"] + 0.1 * found["rating"] + 0.1 * found["discriminator"]
        torch.testing.assert_close(found["loss"], rest + beta * divergence * 2 / 5)  # two rows of five tokens
        totals.append(float(found["loss"].detach()))
    assert totals == sorted(totals)
    assert float(pevae(beta_warmup=0).beta(torch.tensor(0.0))) == 1
    assert "discriminator" not in pevae(discriminator=False).train().losses(batch)


def test_words_are_read_for_the_latent_variables_in_training_only() -> None:
    model, batch = pevae(), a_batch()
    others = batch | {"tokens": torch.randint(3, 20, (2, 6)), "labels": batch["labels"].clone()}
    others["labels"][0, 3:5] = torch.tensor([15, 16])
    with outputs_of(model.prompts) as prompts, outputs_of(model.word_encoder) as read:
        first, second = model.losses(batch), model.losses(others)
        torch.testing.assert_close(prompts[0], prompts[1], atol=0, rtol=0)
        torch.testing.assert_close(first["rating"], second["rating"], atol=0, rtol=0)
        assert not read
        model.train()
        for each in (batch, others):
            torch.manual_seed(0)
            model.losses(each)
        assert len(read) == 2
        assert not torch.equal(prompts[2][0], prompts[3][0])


def test_training_draws_and_writing_takes_the_mean_of_the_prior() -> None:
    model, batch = pevae(), a_batch()
    limits, prefixes = Limits(6, END, [0]), [[START], [START]]
    assert model.write(batch, prefixes, limits) == model.write(batch, prefixes, limits)
    pair = torch.randn(2, 16)
    for level in model.levels(pair, None):
        assert level.value is level.prior.mean
    words = torch.randn(2, 16)
    first, second = model.levels(pair, words)[0], model.levels(pair, words)[0]
    assert not torch.equal(first.value, second.value)
    torch.testing.assert_close(first.sampled.mean, second.sampled.mean)


def test_losses_by_hand() -> None:
    model, batch = pevae(features=True), a_batch()
    with torch.inference_mode():
        found = model.losses(batch)
        losses = []
        for row, (named, answer) in enumerate((([7, 6], [8, 9, END]), ([], [8, END]))):
            users, items = batch["users"][row : row + 1], batch["items"][row : row + 1]
            pair = model.pair(users, items)
            summary = model.summary(pair, model.levels(pair, None))
            prompts = model.prompts(summary).view(1, 2, -1)
            for place, word in enumerate(answer):
                asked, before = (model.words(torch.tensor([ids], dtype=torch.long)) for ids in (named, answer[:place]))
                read = torch.cat([asked, prompts, before], dim=1)
                # The prompts' places are the same whatever is asked for: behind the four for that.
                states, _ = model.decoder(read, padding_B=torch.tensor([0]), first=4 - len(named))
                losses.append(-torch.log_softmax(model.output(states[0, -1]), dim=-1)[word])
            if row == 0:
                torch.testing.assert_close(found["rating"], (model.predict_rating(summary)[0] - 2.0) ** 2)
    torch.testing.assert_close(found["explanation"], torch.stack(losses).mean())
    torch.testing.assert_close(found["loss"], found["explanation"] + 0.1 * found["rating"])


@pytest.mark.parametrize("features", [False, True])
def test_padding_and_batches_change_nothing(features: bool) -> None:
    model, batch = pevae(features), a_batch()
    rows = [{name: values[row : row + 1] for name, values in batch.items() if values.ndim} for row in range(2)]
    cut = rows[1] | {name: rows[1][name][:, :3] for name in ("tokens", "labels")}
    with torch.inference_mode():
        torch.testing.assert_close(model.losses(rows[1]), model.losses(cut))
        answers = torch.tensor([[8, 9, END], [8, END, END]])
        real = torch.tensor([[True] * 3, [True, True, False]])
        summaries = model.word_encoder(model.read_words(answers), real)
        alone = model.word_encoder(model.read_words(answers[1:, :2]), real[1:, :2])
        torch.testing.assert_close(summaries[1:], alone)
    prefixes, limits = ([[7, 6, START], [START]] if features else [[START]] * 2), Limits(6, END, [0])
    together = model.write(batch, prefixes, limits)
    for row in range(2):
        one = model.write(rows[row], prefixes[row : row + 1], limits)
        assert one.tokens[0] == together.tokens[row]
        assert one.ratings == pytest.approx(together.ratings[row : row + 1] if together.ratings else None, rel=1e-5)


def test_ratings_that_are_told_are_not_predicted_from_what_is_told() -> None:
    model, batch, limits = pevae(features=True), a_batch(), Limits(3, END, [0])
    told, silent = (model.write(batch, prefixes, limits) for prefixes in ([[7, 6, START]] * 2, [[START]] * 2))
    assert told.ratings == pytest.approx(silent.ratings, rel=1e-6)
    assert len(set(told.ratings or ())) == 2


def test_writing_with_a_cache_is_what_the_losses_compute() -> None:
    model, batch = pevae(features=True), a_batch()
    prefixes = [[7, 6, START], [START]]
    written = model.write(batch, prefixes, Limits(99, END, [0]))
    for row, text in enumerate(written.tokens):
        assert text[-1] == END or len(text) == 6  # no more places
        tokens = torch.tensor([[*prefixes[row], *text]])
        labels = tokens.clone()
        labels[:, : len(prefixes[row])] = -100
        ids = {name: batch[name][row : row + 1] for name in ("users", "items", "ratings")}
        with torch.inference_mode(), outputs_of(model.output) as scores:
            model.losses(ids | {"tokens": tokens, "labels": labels, "prefix": torch.tensor([len(prefixes[row])])})
        allowed = scores[0].index_fill(1, torch.tensor([0]), -torch.inf)
        assert allowed.argmax(dim=-1).tolist() == text


def test_after_training_the_latent_variables_carry_the_pair_and_the_words() -> None:
    torch.manual_seed(0)
    batch = texts_of_pairs()
    model = pevae(users=6, items=4, dropout=0.1, free_nats=1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(120):
        optimizer.zero_grad()
        found = model.losses(batch | {"done": torch.tensor(step / 120)})
        found["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert float(found["read_kl"]) > 0.1  # else the posterior would be the prior, and the words unread
    model.eval()
    with torch.inference_mode():
        own = float(model.losses(batch)["explanation"])
        other_pair = batch | {"users": (batch["users"] + 1) % 6, "items": (batch["items"] + 1) % 4}
        assert own < float(model.losses(other_pair)["explanation"]) - 0.3
        levels = model.levels
        model.levels = lambda pair, words: levels(pair.roll(5, dims=0), words)  # type: ignore[method-assign]
        assert own < float(model.losses(batch)["explanation"]) - 0.02


def texts_of_pairs() -> dict[str, Tensor]:
    """Texts of a word for the user, one for the item, and one of two that no pair foretells."""
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(4)).repeat(2, 1)
    users, items = pairs.unbind(dim=1)
    ends = torch.full_like(users, END)
    words = torch.stack([4 + users, 10 + items, 14 + torch.randint(2, users.shape), ends], dim=1)
    tokens = nn.functional.pad(words, (1, 0), value=START)
    labels = nn.functional.pad(words, (1, 0), value=-100)
    ratings, prefix = (users + items).float() / 2, torch.ones_like(users)
    return {"users": users, "items": items, "ratings": ratings, "tokens": tokens, "labels": labels, "prefix": prefix}


def test_the_form_with_features_reads_sentiment_and_features(planted: Dataset) -> None:
    config = tiny("system=pevae-plus")
    reader = Reader(prompt_builder(config, planted).tokenizer, config.stage2.prompt, rating_scale(planted))
    columns = Columns(
        users=torch.zeros(2, dtype=torch.long).numpy(),
        items=torch.zeros(2, dtype=torch.long).numpy(),
        ratings=torch.tensor([5.0, math.nan]).numpy(),
        features=[("battles",), ("battles", "story")],
        titles=[None] * 2,
    )
    plain, plus = (Pevae.create(config, planted, reader, features=features) for features in (False, True))
    assert plain.prefixes(columns, reader) == [[reader.start]] * 2
    good, unrated = (reader.tokenizer.decode(ids) for ids in plus.prefixes(columns, reader))
    assert good.startswith("positive, battles")
    assert unrated.startswith("battles, story")
    batch, others = a_batch(), a_batch()
    others["tokens"][0, 1] = 5
    with torch.inference_mode():
        for model, reads in ((plus.eval(), True), (plain.eval(), False)):
            one, other = (float(model.losses(each)["explanation"]) for each in (batch, others))
            assert (one != pytest.approx(other, abs=1e-6)) == reads


def test_settings_and_data_that_do_not_fit_are_refused(planted: Dataset) -> None:
    with pytest.raises(ValidationError, match="heads: width 16 is not a multiple of heads 3"):
        PevaeConfig(width=16, heads=3)
    with pytest.raises(ValidationError, match="it must be a multiple of 8"):
        PevaeConfig(width=12, levels=4)
    single = "stage2.batch_size=1"
    with pytest.raises(InputError, match=r"stage2\.batch_size 1: .* or set baselines\.pevae\.discriminator=false"):
        Pevae.check(tiny(single), planted)
    Pevae.check(tiny(single, "baselines.pevae.discriminator=false"), planted)
