"""The baseline PEPLER: prompts of vectors, its two phases, its ratings, writing."""

import math
from pathlib import Path

import pytest
import torch
from helpers.stage2_runs import save_base
from helpers.tiny import tiny
from torch import Tensor

from gavamoe.baselines.frame import Columns, Limits, Reader
from gavamoe.baselines.parts.profiles import FeatureCounts, Profiles
from gavamoe.baselines.pepler import Pepler
from gavamoe.baselines.training import train_baseline
from gavamoe.baselines.writing import BaselineWriter
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError
from gavamoe.generation.request import ExplanationRequest
from gavamoe.runtime.context import LocalContext
from gavamoe.stage2.tokenized_rows import prompt_builder, rating_scale

END = 1


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model")


def config_of(*overrides: str, base: Path | None = None) -> RunConfig:
    own = () if base is None else (f"stage2.base_model={base}",)
    return tiny("system=pepler", "generation.max_new_tokens=6", *own, *overrides)


def pepler(data: Dataset, *overrides: str, base: Path | None = None, features: bool = False) -> Pepler:
    config = config_of(*overrides, base=base)
    torch.manual_seed(0)
    reader = Reader(prompt_builder(config, data).tokenizer, config.stage2.prompt, rating_scale(data))
    return Pepler.create(config, data, reader, features=features).eval()


def a_batch() -> dict[str, Tensor]:
    """Two rows: explanations of three and two tokens, the end token last."""
    return {
        "users": torch.tensor([0, 3]),
        "items": torch.tensor([3, 1]),
        "ratings": torch.tensor([2.0, math.nan]),
        "tokens": torch.tensor([[2, 8, 9, END], [2, 8, END, END]]),
        "labels": torch.tensor([[-100, 8, 9, END], [-100, 8, END, -100]]),
        "prefix": torch.tensor([1, 1]),
    }


def test_vectors_of_words_in_place_of_ids_are_the_plain_model(planted: Dataset, base: Path) -> None:
    model, batch = pepler(planted, base=base), a_batch()
    words = model.lm.get_input_embeddings().weight
    with torch.no_grad():
        model.users.weight[batch["users"]] = words[[11, 12]]
        model.items.weight[batch["items"]] = words[[13, 14]]
        plain = torch.cat([torch.tensor([[11, 13], [12, 14]]), batch["tokens"]], dim=1)
        mask = torch.tensor([[1] * 6, [1] * 5 + [0]])
        scores = torch.log_softmax(model.lm(input_ids=plain, attention_mask=mask).logits, dim=-1)
        places = [(0, 2, 8), (0, 3, 9), (0, 4, END), (1, 2, 8), (1, 3, END)]
        by_hand = -torch.stack([scores[row, place, word] for row, place, word in places]).mean()
        torch.testing.assert_close(model.losses(batch)["explanation"], by_hand)


def test_the_first_phase_moves_vectors_of_its_ids_and_nothing_of_the_model(planted: Dataset, base: Path) -> None:
    config = config_of(base=base)
    model = pepler(planted, base=base).train()
    [prompts, everything] = model.phases(config)
    assert prompts.share + everything.share == 1
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(prompts.trained(name))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    model.losses(a_batch())["loss"].backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"users.weight", "items.weight"}
    moved = (model.users.weight != before["users.weight"]).any(dim=1).nonzero().flatten().tolist()
    assert moved == [0, 3]
    assert all(everything.trained(name) for name, _ in model.named_parameters())
    assert len(model.phases(config_of())) == 1  # a scratch model has nothing to freeze


def test_the_second_phase_begins_with_the_best_state_of_the_first(
    planted: Dataset, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([2.0, 3.0, 1.5, 1.0])
    monkeypatch.setattr("gavamoe.baselines.training.validation_loss", lambda *rest: next(losses))
    context = LocalContext(storage=tmp_path / "checkpoints")
    config = config_of("stage2.max_steps=8", "stage2.evaluate_every=2", "stage2.checkpoint_every=2", base=base)
    metrics = train_baseline(config, planted.path, tmp_path / "baseline", context)
    kept = [torch.load(folder / "training.pt", weights_only=True) for folder in context.checkpoints]
    assert [point["step"] for point in metrics["validation_losses"]] == [2, 4, 6, 8]
    assert metrics["kept_step"] == 8
    tables = [state["model"]["users.weight"] for state in kept]
    assert torch.equal(kept[1]["best"]["users.weight"], tables[0])
    resumed = LocalContext(resume_from=context.checkpoints[1])  # between the two phases
    losses = iter([1.5, 1.0])
    train_baseline(config, planted.path, tmp_path / "again", resumed)
    first, second = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("baseline", "again"))
    assert first == second


@pytest.mark.parametrize("variant", ["mf", "mlp"])
def test_ratings_are_a_loss_of_their_own(variant: str, planted: Dataset) -> None:
    weighted = pepler(planted, f"baselines.pepler.variant={variant}", "baselines.pepler.rating_weight=2")
    batch = a_batch()
    found = weighted.losses(batch)
    users, items = weighted.users(batch["users"]), weighted.items(batch["items"])
    predicted = weighted.predict_rating(users, items)
    assert predicted is not None
    torch.testing.assert_close(found["rating"], (predicted[0] - 2.0) ** 2)
    torch.testing.assert_close(found["loss"], found["explanation"] + 2 * found["rating"])
    assert pepler(planted).predict_rating(users, items) is None
    if variant == "mf":
        torch.testing.assert_close(predicted, weighted.mean + (users * items).sum(dim=1))


def test_padding_and_batches_change_nothing(planted: Dataset, base: Path) -> None:
    model, batch = pepler(planted, base=base), a_batch()
    alone = {name: values[1:] for name, values in batch.items()}
    cut = alone | {name: alone[name][:, :-1] for name in ("tokens", "labels")}
    with torch.inference_mode():
        torch.testing.assert_close(model.losses(alone)["loss"], model.losses(cut)["loss"])
    prefixes = [[5, 6, 7, 2], [2]]  # of different length
    together = model.write(batch, prefixes, Limits(6, END, [0])).tokens
    for row in range(2):
        one = {name: values[row : row + 1] for name, values in batch.items()}
        assert model.write(one, prefixes[row : row + 1], Limits(6, END, [0])).tokens[0] == together[row]


def test_the_penalty_counts_the_text_and_neither_prompt_nor_padding(planted: Dataset, base: Path) -> None:
    model = pepler(planted, base=base)
    limits = Limits(12, END, [0], repetition_penalty=1e9, shortest=12)
    for text in model.write(a_batch(), [[5, 6, 7, 8, 9, 2], [2]], limits).tokens:
        assert len(set(text)) == len(text) == 12


def test_writing_with_a_cache_is_reading_everything_again(planted: Dataset) -> None:
    model, batch = pepler(planted), a_batch()
    for row, text in enumerate(model.write(batch, [[2], [2]], Limits(6, END, [0])).tokens):
        head = torch.stack([model.users(batch["users"][row]), model.items(batch["items"][row])])
        tokens = [2]
        for word in text:
            with torch.inference_mode():
                vectors = torch.cat([head, model.words(torch.tensor(tokens))])[None]
                scores = model.lm(inputs_embeds=vectors).logits[0, -1].clone()
                scores[0] = -torch.inf
            assert int(scores.argmax()) == word
            tokens.append(word)
        assert len(text) == 6 or text[-1] == END


def test_the_form_with_features_reads_sentiment_and_features(planted: Dataset, tmp_path: Path) -> None:
    config = tiny("system=pepler-plus", "stage2.max_steps=2")
    train_baseline(config, planted.path, tmp_path / "baseline", LocalContext())
    writer = BaselineWriter.load(tmp_path / "baseline")
    columns = Columns(
        users=torch.zeros(3, dtype=torch.long).numpy(),
        items=torch.zeros(3, dtype=torch.long).numpy(),
        ratings=torch.tensor([5.0, 1.0, math.nan]).numpy(),
        features=[("battles",), ("battles",), ("battles", "story")],
        titles=[None] * 3,
    )
    good, bad, unrated = (writer.reader.tokenizer.decode(ids) for ids in writer.model.prefixes(columns, writer.reader))
    assert good.startswith("positive, battles")
    assert bad.startswith("negative, battles")
    assert unrated.startswith("battles, story")


def columns_of(data: Dataset, rows: list[int] | None) -> Columns:
    """Two rows of the training split's first pair, whose features are battles."""
    pairs = data.arrays("train")
    return Columns(
        users=pairs.user[[0, 0]].astype("int64"),
        items=pairs.item[[0, 0]].astype("int64"),
        ratings=torch.tensor([5.0, 1.0]).numpy(),
        features=[("battles",), ("battles",)],
        titles=[None, None],
        rows=None if rows is None else torch.tensor(rows).numpy(),
    )


def test_the_discrete_form_reads_features_of_both_and_leaves_out_a_training_rows_own(planted: Dataset) -> None:
    config = config_of("baselines.pepler.variant=discrete", "baselines.pepler.discrete_tokens=30")
    reader = Reader(prompt_builder(config, planted).tokenizer, config.stage2.prompt, rating_scale(planted))
    model = Pepler.create(config, planted, reader, features=False)
    users = FeatureCounts({(int(planted.arrays("train").user[0]), word): 1 for word in ("a", "battles")})
    items = FeatureCounts({(int(planted.arrays("train").item[0]), word): 2 for word in ("b", "battles")})
    model.profiles = Profiles(users, items)
    later, _ = (reader.tokenizer.decode(ids[:-1]) for ids in model.prefixes(columns_of(planted, None), reader))
    assert later == "battles, a, b"  # what both have comes first
    trained, _ = (reader.tokenizer.decode(ids[:-1]) for ids in model.prefixes(columns_of(planted, [0, 0]), reader))
    assert trained == "a, b, battles"  # another row of the item has it, none of the user
    assert not hasattr(model, "users")
    moved = a_batch() | {"users": torch.tensor([1, 2])}
    assert torch.equal(model.losses(a_batch())["loss"], model.losses(moved)["loss"])


def test_an_aspect_is_the_rows_own_in_training_and_chosen_later(planted: Dataset) -> None:
    model = pepler(planted, "baselines.pepler.aspects=2", "baselines.pepler.top_aspects=2")
    assert sum(model.spec.aspect_counts) == len(planted.arrays("train").user)
    words, batch = int(model.lm.config.vocab_size), a_batch()
    with torch.no_grad():
        model.choice[-1].weight.zero_()
        model.choice[-1].bias.copy_(torch.tensor([0.0, 1.0, 2.0]))  # the last two are the likeliest

    def with_aspect(*ids: int) -> dict[str, Tensor]:
        first = torch.tensor(ids)[:, None] + words
        more = {"tokens": torch.cat([first, batch["tokens"]], dim=1), "prefix": batch["prefix"] + 1}
        return batch | more | {"labels": torch.nn.functional.pad(batch["labels"], (1, 0), value=-100)}

    chosen = model.losses(with_aspect(3, 3))
    assert "aspect" not in chosen
    own = model.losses(with_aspect(1, 2))
    weights = model._class_weights()
    log_p = torch.log_softmax(torch.tensor([0.0, 1.0, 2.0]), dim=0)
    by_hand = -(weights[1] * log_p[1] + weights[2] * log_p[2]) / (weights[1] + weights[2])
    torch.testing.assert_close(own["aspect"], by_hand)
    torch.testing.assert_close(own["loss"], own["explanation"] + 0.01 * by_hand)
    with torch.no_grad():
        model.aspects.weight[1:] = model.aspects.weight[1:].mean(dim=0)
    torch.testing.assert_close(
        model.losses(with_aspect(1, 2))["explanation"], model.losses(with_aspect(3, 3))["explanation"]
    )


@pytest.mark.parametrize("form", ["aspects=2", "variant=discrete"])
def test_forms_train_write_and_load(form: str, planted: Dataset, tmp_path: Path) -> None:
    config = config_of(f"baselines.pepler.{form}", "stage2.max_steps=2")
    train_baseline(config, planted.path, tmp_path / "baseline", LocalContext())
    writer = BaselineWriter.load(tmp_path / "baseline")
    [first] = writer.explain([ExplanationRequest(user=0, item=0)], config.generation)
    assert first.new_tokens


def test_aspects_need_vectors_and_features(planted: Dataset) -> None:
    with pytest.raises(InputError, match="variant discrete has not"):
        config_of("baselines.pepler.variant=discrete", "baselines.pepler.aspects=2")
