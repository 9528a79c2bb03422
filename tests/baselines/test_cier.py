"""The baseline CIER: ratings as tokens, the prompt with its three vectors, the curriculum, adapters, writing."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import tiny
from safetensors.torch import load_file
from torch import Tensor

from gavamoe.baselines.cier import Cier
from gavamoe.baselines.frame import Columns, Limits, Reader
from gavamoe.baselines.parts.rating_tokens import RatingLevels, rating_levels, rating_tokens
from gavamoe.baselines.training import train_baseline
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.data.ratings import RatingScale
from gavamoe.errors import InputError
from gavamoe.model.base_model import load_base
from gavamoe.runtime.context import LocalContext
from gavamoe.stage2.tokenized_rows import prompt_builder, rating_scale

END = 1
FEATURE, OTHER = [20, 21], [22, 23]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pretrained model of each family."""
    folder = tmp_path_factory.mktemp("base") / "model"
    scratch = tiny(f"stage2.scratch.family={request.param}").stage2.scratch
    model, tokenizer = load_base("scratch", scratch, ["What a fine book about ghosts and clues!"] * 20, seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config_of(*overrides: str, base: Path | None = None) -> RunConfig:
    own = () if base is None else (f"stage2.base_model={base}",)
    return tiny("system=cier", "baselines.cier.embedding_size=16", *own, *overrides)


def reader_of(config: RunConfig, data: Dataset) -> Reader:
    return Reader(prompt_builder(config, data).tokenizer, config.stage2.prompt, rating_scale(data))


def cier(data: Dataset, *overrides: str, base: Path | None = None, features: bool = False) -> Cier:
    config = config_of(*overrides, base=base)
    torch.manual_seed(0)
    return Cier.create(config, data, reader_of(config, data), features=features).eval()


def prompt(model: Cier) -> list[int]:
    """The prompt as `prefixes` writes it, without features."""
    words, start = model.spec.wording, model.spec.start
    return [start, *words.user, start, *words.item, start, *words.rating, start, *words.explanation]


def a_batch(
    model: Cier,
    answers: tuple[list[int], ...] = ([8, 9, END], [8, END]),
    features: tuple[list[int], ...] = (FEATURE, []),
    done: float = 1.0,
) -> dict[str, Tensor]:
    """Two rows: one with a feature and a rating, one with neither."""
    prefixes = [feature + prompt(model) for feature in features]
    longest = max(len(prefix) + len(answer) for prefix, answer in zip(prefixes, answers, strict=True))
    tokens, labels = torch.full((2, longest), END), torch.full((2, longest), -100)
    for row, (prefix, answer) in enumerate(zip(prefixes, answers, strict=True)):
        tokens[row, : len(prefix) + len(answer)] = torch.tensor(prefix + answer)
        labels[row, len(prefix) : len(prefix) + len(answer)] = torch.tensor(answer)
    return {
        "users": torch.tensor([0, 3]),
        "items": torch.tensor([3, 1]),
        "ratings": torch.tensor([2.0, math.nan]),
        "tokens": tokens,
        "labels": labels,
        "prefix": torch.tensor([len(prefix) for prefix in prefixes]),
        "done": torch.tensor(done),
    }


def heads_of(
    model: Cier, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tensor], list[float]]:
    """The vectors behind which `write` lets the model write, and the predicted ratings."""
    seen: list[Tensor] = []

    def greedy(vectors: list[Tensor], limits: Limits) -> list[list[int]]:
        seen.extend(vectors)
        return [[limits.end]] * len(vectors)

    monkeypatch.setattr(model, "greedy", greedy)
    written = model.write(batch, [prompt(model)] * len(batch["users"]), Limits(6, END, [0]))
    assert written.ratings is not None
    return seen, written.ratings


def test_ratings_and_their_distributions_by_hand() -> None:
    levels = RatingLevels([1, 2, 5], [7, 8, 9])
    found = levels.weights(torch.tensor([1.0, 2.0, 5.0, 3.5, 0.0, 9.0]))
    by_hand = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0.5, 0.5], [1, 0, 0], [0, 0, 1]]
    torch.testing.assert_close(found, torch.tensor(by_hand, dtype=torch.float32))
    torch.testing.assert_close(levels.mean(found), torch.tensor([1.0, 2.0, 5.0, 3.5, 1.0, 5.0]))
    assert levels.weights(torch.tensor([math.nan])).isnan().any()


def test_smoothing_moves_at_most_two_thirds_of_middle_ratings() -> None:
    levels = RatingLevels([1, 2, 3, 4, 5], [5, 6, 7, 8, 9])
    torch.manual_seed(0)
    middle, lowest = levels.weights(torch.full((500,), 3.0)), levels.weights(torch.full((500,), 1.0))
    found = levels.smoothed(middle, 1.0)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(500))
    torch.testing.assert_close(found[:, 1], found[:, 3])
    assert 1 / 3 - 1e-6 <= float(found[:, 2].min()) < 0.35
    assert float(found[:, [0, 4]].abs().max()) == 0
    assert torch.equal(levels.smoothed(lowest, 1.0), lowest)
    assert torch.equal(levels.smoothed(middle, 0.0), middle)
    changed = (levels.smoothed(middle, 0.2) != middle).any(dim=1).float().mean()
    assert 0.12 < float(changed) < 0.28


@pytest.mark.parametrize(
    ("values", "names"),
    [((1, 2, 3, 4, 5), "12345"), ((0.5, 1, 1.5, 2), "1234"), (tuple(range(12)), "ABCDEFGHIJKL"), (None, "1234567")],
)
def test_each_level_is_one_token(values: tuple[float, ...] | None, names: str, planted: Dataset) -> None:
    tokenizer = reader_of(config_of(), planted).tokenizer
    scale = RatingScale(low=0, high=12, values=values)
    levels = rating_levels(scale, 7)
    assert levels == list(values or np.linspace(0, 12, 7))
    lead, tokens = rating_tokens(tokenizer, " rating:", levels)
    assert [tokenizer.decode([token]).strip() for token in tokens] == list(names)
    assert tokenizer.decode(lead).strip() == "rating:"


def test_a_tokenizer_without_such_tokens_is_refused(planted: Dataset) -> None:
    tokenizer = reader_of(config_of(), planted).tokenizer
    with pytest.raises(InputError, match="no single tokens for 30 ratings; take another model"):
        rating_tokens(tokenizer, " rating:", [float(level) for level in range(30)])


def test_data_of_one_rating_are_refused() -> None:
    data: Any = SimpleNamespace(rating_range=(3.0, 3.0), path="data")
    with pytest.raises(InputError, match=r"^data: all ratings are 3, so CIER has none to tell apart; take pepler$"):
        Cier.check(config_of(), data)


def test_a_given_rating_is_its_token_and_any_other_distribution_a_mean(planted: Dataset) -> None:
    model = cier(planted)
    batch = a_batch(model)
    layout = model.layout([prompt(model)] * 2, [[], []], torch.ones(2, dtype=torch.bool))
    vectors = model.with_ids(layout, batch["users"], batch["items"])
    half = torch.tensor([[0, 0, 0, 1.0, 0], [0.5, 0, 0, 0, 0.5]])
    found = model.with_rating(vectors, layout, half)
    words = model.words(torch.tensor(model.spec.level_tokens))
    rows, place = torch.arange(2), layout.rating_B
    torch.testing.assert_close(found[0, place[0]], words[3])
    torch.testing.assert_close(found[1, place[1]], (words[0] + words[4]) / 2)
    torch.testing.assert_close(model.ratings.mean(half), torch.tensor([4.0, 3.0]))
    others = torch.ones(found.shape[1], dtype=torch.bool)
    others[place[0]] = False
    assert torch.equal(found[:, others], vectors[:, others])
    assert layout.tokens_BS[rows, place].tolist() == [model.spec.start] * 2


def test_uniform_scores_are_the_middle_of_the_scale(planted: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cier(planted)
    with torch.no_grad():
        model.lm.get_output_embeddings().weight[model.spec.level_tokens] = 0.3
    _, predicted = heads_of(model, a_batch(model), monkeypatch)
    assert predicted == pytest.approx([3.0, 3.0], rel=1e-5)


def test_a_request_without_a_rating_gets_the_one_that_is_read_off(
    planted: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cier(planted)
    batch = a_batch(model)
    heads, predicted = heads_of(model, batch, monkeypatch)
    place = len(prompt(model)) - len(model.spec.wording.explanation) - 1
    words = model.words(torch.tensor(model.spec.level_tokens))
    torch.testing.assert_close(heads[0][place], words[1])  # a rating of 2
    with torch.inference_mode():
        scores = model.lm(inputs_embeds=heads[1][None, :place]).logits[0, -1, model.spec.level_tokens]
        read = scores.softmax(dim=-1)
        torch.testing.assert_close(heads[1][place], read @ words)
    assert predicted[1] == pytest.approx(float(read @ torch.arange(1.0, 6.0)), rel=1e-5)
    other = batch | {"ratings": torch.tensor([5.0, math.nan])}
    assert heads_of(model, other, monkeypatch)[1] == pytest.approx(predicted)  # the given rating is not read before it


def test_losses_by_hand(planted: Dataset, base: Path) -> None:
    model = cier(planted, base=base)
    batch, words, spec = a_batch(model), model.spec.wording, model.spec
    table = model.lm.get_input_embeddings().weight
    texts, ratings = [], []
    with torch.inference_mode():
        found = model.losses(batch)
        for row, answer in enumerate(([8, 9, END], [8, END])):
            user = model.user_projection(model.users.weight[batch["users"][row]])[None]
            item = model.item_projection(model.items.weight[batch["items"][row]])[None]
            head = torch.cat([table[[spec.start, *words.user]], user, table[words.item], item, table[words.rating]])
            scores = model.lm(inputs_embeds=head[None]).logits[0, -1, spec.level_tokens]
            soft = table[spec.level_tokens[1]] if row == 0 else scores.softmax(dim=0) @ table[spec.level_tokens]
            ratings.append(-scores.log_softmax(dim=0)[1])
            tail = table[[*words.explanation, *answer]]
            logits = model.lm(inputs_embeds=torch.cat([head, soft[None], tail])[None]).logits[0]
            spoken = logits[-len(answer) - 1 : -1].log_softmax(dim=-1)
            texts += [-spoken[place, word] for place, word in enumerate(answer)]
        torch.testing.assert_close(found["explanation"], torch.stack(texts).mean())
        torch.testing.assert_close(found["rating"], ratings[0])
        torch.testing.assert_close(found["loss"], found["explanation"] + 0.1 * found["rating"])


def test_the_curriculum_begins_with_features_and_ends_with_texts(planted: Dataset) -> None:
    model = cier(planted, "baselines.cier.smoothing=0")
    first, text = ([8, 9, END], [8, END]), ([6, 9, END], [8, END])

    def loss(answers: tuple[list[int], ...], feature: list[int], done: float) -> float:
        with torch.inference_mode():
            return float(model.losses(a_batch(model, answers, (feature, feature), done))["explanation"])

    for training, done, writes_text in ((True, 0.0, False), (True, 1.0, True), (False, 0.0, True)):
        model.train(training)
        plain = loss(first, FEATURE, done)
        assert (loss(text, FEATURE, done) != plain) == writes_text
        assert (loss(first, OTHER, done) != plain) == (not writes_text)
    model.train()
    assert loss(first, [], 0.0) != loss(text, [], 0.0)  # rows without a feature always write their text
    torch.manual_seed(0)
    layouts = [model.layout(*both_rows(model), torch.rand(2) < 0.25) for _ in range(200)]
    share = np.mean([(layout.labels_BS == 9).any(dim=1).float().mean() for layout in layouts])
    assert 0.18 < share < 0.32


def both_rows(model: Cier) -> tuple[list[list[int]], list[list[int]]]:
    return [FEATURE + prompt(model)] * 2, [[8, 9, END]] * 2


def test_what_a_row_of_the_curriculum_reads_and_writes(planted: Dataset) -> None:
    model = cier(planted)
    layout = model.layout(*both_rows(model), torch.tensor([False, True]))
    words = model.spec.wording
    head = prompt(model)[: -len(words.explanation)]
    asked, text = (layout.tokens_BS[row][layout.mask_BS[row] == 1].tolist() for row in range(2))
    assert asked == [*head, *words.feature, *FEATURE, END]
    assert text == [*prompt(model), 8, 9, END]
    said = [layout.labels_BS[row][layout.labels_BS[row] != -100].tolist() for row in range(2)]
    assert said == [[*FEATURE, END], [8, 9, END]]


def test_the_rating_s_loss_reaches_the_vectors_of_ids(planted: Dataset, base: Path) -> None:
    model = cier(planted, base=base)
    model.losses(a_batch(model))["rating"].backward()
    moved = model.users.weight.grad
    assert moved is not None
    assert moved.abs().sum(dim=1).nonzero().flatten().tolist() == [0]  # the other row has no rating
    adapters = {name for name, p in model.lm.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert adapters
    assert all(".lora_B." in name for name in adapters)  # the other half starts with a gradient of 0


def test_only_adapters_and_vectors_are_trained_each_at_its_rate(planted: Dataset, base: Path, tmp_path: Path) -> None:
    rates = ("baselines.cier.learning_rate=1e-2", "baselines.cier.model_learning_rate=1e-5", "stage2.max_steps=1")
    metrics = train_baseline(config_of(*rates, base=base), planted.path, tmp_path / "baseline", LocalContext())
    after, before = load_file(tmp_path / "baseline" / "weights.safetensors"), load_file(base / "model.safetensors")
    frozen = {name: tensor for name, tensor in after.items() if name.startswith("lm.") and ".lora_" not in name}
    adapters = {name: tensor for name, tensor in after.items() if ".lora_B." in name}
    for name, tensor in before.items():
        plain = name if name.startswith(("model.", "transformer.")) else f"transformer.{name}"
        [there] = [key for key in frozen if key.replace(".base_layer.", ".") in (f"lm.{name}", f"lm.{plain}")]
        assert torch.equal(frozen[there], tensor), name
    adapted = {name.rsplit(".lora_B.", 1)[0].rsplit(".", 1)[1] for name in adapters}
    assert adapted in ({"q_proj", "k_proj"}, {"c_attn"})
    step = (
        max(float(tensor.abs().max()) for tensor in adapters.values()),
        float(after["user_projection.bias"].abs().max()),
    )
    assert step[0] / step[1] == pytest.approx(1e-3, rel=0.01)
    adapter_sizes = sum(tensor.numel() for name, tensor in after.items() if ".lora_" in name)
    tables = sum(tensor.numel() for name, tensor in after.items() if not name.startswith("lm."))
    assert metrics["trained_parameters"] == adapter_sizes + tables


def test_without_adapters_the_pretrained_model_is_trained_as_a_whole(planted: Dataset, base: Path) -> None:
    config = config_of("baselines.cier.lora_rank=0", base=base)
    model = cier(planted, "baselines.cier.lora_rank=0", base=base)
    [phase] = model.phases(config)
    assert all(phase.trained(name) for name, _ in model.named_parameters())
    assert phase.factor("lm.lm_head.weight") == pytest.approx(0.1)
    assert phase.factor("users.weight") == 1


def test_padding_and_batches_change_nothing(planted: Dataset, base: Path) -> None:
    model = cier(planted, base=base, features=True)
    batch = a_batch(model)
    alone = {name: values[1:] if values.ndim else values for name, values in batch.items()}
    longest = int(batch["prefix"][1]) + 2
    cut = alone | {name: alone[name][:, :longest] for name in ("tokens", "labels")}
    with torch.inference_mode():
        torch.testing.assert_close(model.losses(alone)["loss"], model.losses(cut)["loss"])
    start = model.spec.start
    prefixes = [[20, start, 30, 31, 32, *prompt(model)[1:]], prompt(model)]  # of different length
    limits = Limits(6, END, [0])
    together = model.write(batch, prefixes, limits)
    for row in range(2):
        one = {name: values[row : row + 1] for name, values in batch.items() if values.ndim}
        written = model.write(one, prefixes[row : row + 1], limits)
        assert written.tokens[0] == together.tokens[row]
        assert (written.ratings or [])[0] == pytest.approx((together.ratings or [])[row], rel=1e-5)


def test_writing_with_a_cache_is_reading_everything_again(planted: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cier(planted)
    batch = a_batch(model)
    texts = model.write(batch, [prompt(model)] * 2, Limits(6, END, [0])).tokens
    heads, _ = heads_of(model, batch, monkeypatch)
    for head, text in zip(heads, texts, strict=True):
        for number, word in enumerate(text):
            with torch.inference_mode():
                read = torch.cat([head, model.words(torch.tensor(text[:number], dtype=torch.long))])[None]
                scores = model.lm(inputs_embeds=read).logits[0, -1].clone()
                scores[0] = -torch.inf
            assert int(scores.argmax()) == word
        assert len(text) == 6 or text[-1] == END


@pytest.mark.parametrize("features", [False, True])
def test_only_the_form_with_features_reads_them(features: bool, planted: Dataset) -> None:
    model, reader = cier(planted, features=features), reader_of(config_of(), planted)
    columns = Columns(
        users=np.zeros(2, np.int64),
        items=np.zeros(2, np.int64),
        ratings=np.array([5, np.nan], np.float32),
        features=[("battles", "story"), ()],
        titles=[None] * 2,
    )
    some, none = model.prefixes(columns, reader)
    assert none == prompt(model)
    written, read = some[: some.index(reader.start)], some[some.index(reader.start) :]
    assert reader.tokenizer.decode(written) == "battles"
    assert ("battles, story" in reader.tokenizer.decode(read)) == features
    if not features:
        assert read == prompt(model)
