"""Explanations: order, batching, seeds, what is given and what is predicted, unknown ids, implicit data."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import tiny

from gavamoe.config.schema import GenerationConfig
from gavamoe.data.dataset import open_dataset
from gavamoe.data.prepare import prepare
from gavamoe.errors import InputError
from gavamoe.generation.decoding_engine import Engine, Row
from gavamoe.generation.evidence.pair_features import PairFeatures
from gavamoe.generation.generator import Explanation, ExplanationGenerator, sampling_of
from gavamoe.generation.request import ExplanationRequest
from gavamoe.model.base_model import special_ids
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.routes import route_pairs
from gavamoe.stage1.train import train_stage1
from gavamoe.stage2.train import train_stage2

GREEDY = GenerationConfig(max_new_tokens=12, batch_size=4)


@pytest.fixture(scope="module")
def stage2(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("generate")
    config = tiny("stage2.max_steps=150", "stage2.evaluate_every=0", "stage2.checkpoint_every=0")
    train_stage1(config, tiny_dataset, work / "stage1", LocalContext())
    train_stage2(config, tiny_dataset, work / "stage1", work / "stage2", LocalContext())
    return work / "stage2"


@pytest.fixture
def explainer(stage2: Path) -> ExplanationGenerator:
    loaded = ExplanationGenerator.load(stage2)
    with torch.no_grad():  # routed experts that say something, so that clusters matter
        for layer in loaded.model.model.layers:
            torch.nn.init.normal_(layer.mlp.experts.down_proj, std=0.05, generator=torch.Generator().manual_seed(0))
    return loaded


@pytest.fixture(scope="module")
def requests(tiny_dataset: Path) -> list[ExplanationRequest]:
    rows = open_dataset(tiny_dataset).table("test").slice(0, 20).to_pylist()
    return [ExplanationRequest(r["user"], r["item"], r["rating"], tuple(r["features"])) for r in rows]


def test_batched_equals_one_by_one_in_order(
    explainer: ExplanationGenerator, requests: list[ExplanationRequest]
) -> None:
    # Exact: in float32 near-ties between tokens may fall either way. Only the eager kernel takes float64.
    explainer.model.double().set_experts_implementation("eager")
    together = explainer.explain(requests, GREEDY)
    alone = [explainer.explain([request], GREEDY)[0] for request in requests]
    assert [e.text for e in together] == [e.text for e in alone]
    assert [e.cluster for e in together] == [e.cluster for e in alone]
    assert len({e.text for e in together}) > 3
    swapped = explainer.explain(requests[::-1], GREEDY.model_copy(update={"batch_size": 7}))
    assert [e.text for e in swapped[::-1]] == [e.text for e in together]


def test_rows_of_similar_length_are_read_together_whatever_their_order(
    explainer: ExplanationGenerator, requests: list[ExplanationRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding and passes are counted, against rows taken as they come; texts are the same, sampled ones too."""
    explainer.model.double().set_experts_implementation("eager")
    words = ("acting", "battery", "breakfast", "cinematography", "soundtrack")
    mixed = [
        ExplanationRequest(each.user, each.item, each.rating, words[: number * 3 % 6])
        for number, each in enumerate(requests)
    ]
    generation = GREEDY.model_copy(update={"temperature": 1.0, "max_new_tokens": 5, "min_new_tokens": 5})
    counted = {"padding": 0, "passes": 0}
    prefill, decode = Engine._prefill, Engine._decode

    def counting(engine: Engine, rows: list[Row]) -> None:
        counted["padding"] += sum(max(len(row.prompt) for row in rows) - len(row.prompt) for row in rows)
        counted["passes"] += 1
        prefill(engine, rows)

    def counting_too(engine: Engine, rows: list[Row]) -> None:
        counted["passes"] += 1
        decode(engine, rows)

    monkeypatch.setattr(Engine, "_prefill", counting)
    monkeypatch.setattr(Engine, "_decode", counting_too)
    texts = [each.text for each in explainer.explain(mixed, generation, seed=3)]
    by_length = dict(counted)
    counted.update(padding=0, passes=0)
    prepared = explainer.prepare(mixed)
    rows = [
        Row(prompt, explainer.route(filled), sampling_of(generation, 3 + place))
        for place, (prompt, filled) in enumerate(zip(prepared.prompts, prepared.requests, strict=True))
    ]
    engine = explainer.engine(slots=4, capacity=200, max_waiting=len(rows), prefill_rows=4)
    for row in rows:
        engine.submit(row)
    while engine.busy:
        engine.step()
    assert [explainer.text(row.tokens) for row in rows] == texts
    assert 0 < 5 * by_length["padding"] < counted["padding"]
    assert by_length["passes"] == counted["passes"]


def streamed(explainer: ExplanationGenerator, requests: list[ExplanationRequest], **settings: Any) -> list[Explanation]:
    """What a stream says at each row's end, after a check that the pieces before add up to it."""
    generation = GREEDY.model_copy(update=settings)
    texts, found = [""] * len(requests), {}
    for piece in explainer.stream(requests, generation, seed=3):
        assert piece.row not in found, "nothing comes after a row's last piece"
        texts[piece.row] += piece.text
        if piece.explanation is not None:
            found[piece.row] = piece.explanation
    assert texts == [found[row].text for row in range(len(requests))]
    return [found[row] for row in range(len(requests))]


def test_streamed_pieces_add_up_to_the_same_explanations(
    explainer: ExplanationGenerator, requests: list[ExplanationRequest]
) -> None:
    explainer.model.double().set_experts_implementation("eager")
    assert streamed(explainer, requests) == explainer.explain(requests, GREEDY)
    settings = {"no_repeat_ngram": 2, "max_new_tokens": 30}
    expected = explainer.explain(requests, GREEDY.model_copy(update=settings))
    assert streamed(explainer, requests, **settings) == expected
    assert list(explainer.stream([], GREEDY)) == []


def test_a_stream_gives_the_first_piece_before_the_text_is_whole(explainer: ExplanationGenerator) -> None:
    passes: list[int] = []
    explainer.model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    stream = explainer.stream([ExplanationRequest(1, 2, 5.0)], GREEDY)
    assert passes == [], "nothing is written before it is asked for"
    first = next(stream)
    assert first.explanation is None
    read = len(passes)
    assert sum(1 for _ in stream) > 2
    assert len(passes) > read + 2


def test_sampled_texts_are_the_same_whichever_way_they_are_asked_for(
    explainer: ExplanationGenerator, requests: list[ExplanationRequest]
) -> None:
    settings = GREEDY.model_copy(update={"temperature": 1.0, "top_p": 0.9})
    whole = explainer.explain(requests, settings, seed=5)
    pieces = explainer.stream(requests, settings.model_copy(update={"batch_size": 3}), seed=5)
    assert {piece.row: piece.explanation for piece in pieces if piece.explanation} == dict(enumerate(whole))
    alone = [explainer.explain([request], settings, seed=5 + row)[0].text for row, request in enumerate(requests[:6])]
    assert alone == [explanation.text for explanation in whole[:6]]


def test_streamed_sampling_is_seeded_row_by_row(
    explainer: ExplanationGenerator, requests: list[ExplanationRequest]
) -> None:
    state = torch.get_rng_state()
    first = streamed(explainer, requests, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert streamed(explainer, requests, temperature=1.0, batch_size=3) == first
    assert [e.text for e in first] != [e.text for e in explainer.explain(requests, GREEDY)]


def test_what_cannot_be_streamed_is_refused_at_once(explainer: ExplanationGenerator) -> None:
    with pytest.raises(InputError, match=r"generation\.beams 2: beam search can't be streamed"):
        explainer.stream([ExplanationRequest(1, 2)], GREEDY.model_copy(update={"beams": 2}))
    with pytest.raises(InputError, match="outside this dataset's scale"):
        explainer.stream([ExplanationRequest(1, 2, 9.0)], GREEDY)


def test_more_tokens_than_the_model_has_positions_are_refused(explainer: ExplanationGenerator) -> None:
    long = GREEDY.model_copy(update={"max_new_tokens": 10**6})
    for write in (explainer.explain, explainer.stream):
        with pytest.raises(InputError, match=r"max_new_tokens 1000000: after a prompt of \d+ tokens that is more than"):
            write([ExplanationRequest(1, 2)], long)


def test_given_values_are_used_as_they_are(explainer: ExplanationGenerator) -> None:
    [given] = explainer.explain([ExplanationRequest(1, 2, 4.5, ("ghosts", "clues"))], GREEDY)
    assert (given.rating, given.rating_given) == (4.5, True)
    assert (given.features, given.features_given) == (("ghosts", "clues"), True)
    [bare] = explainer.explain([ExplanationRequest(1, 2, 4.5, ())], GREEDY)
    assert (bare.features, bare.features_given) == ((), True)


def test_missing_values_are_predicted(explainer: ExplanationGenerator, stage2: Path) -> None:
    [found] = explainer.explain([ExplanationRequest(1, 2)], GREEDY)
    routes = route_pairs(explainer.filler.vae_gmm, np.array([1]), np.array([2]))
    assert found.predicted_rating == routes.rating[0]
    assert (found.rating, found.rating_given) == (round(found.predicted_rating), False)
    ranked = PairFeatures.load(stage2, explainer.catalog, 3)
    assert ranked is not None
    assert found.features == ranked.rank(1, 2, found.responsibilities, 2)  # as many as training rows have
    assert found.features_given is False
    assert found.cluster == routes.cluster[0]
    assert found.responsibilities == tuple(routes.responsibilities[0])
    assert (found.user_known, found.item_known) == (True, True)


def submitted_rows(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """The rows that engines are given from now on."""
    rows: list[Row] = []
    submit = Engine.submit

    def spy(engine: Engine, row: Row) -> None:
        rows.append(row)
        submit(engine, row)

    monkeypatch.setattr(Engine, "submit", spy)
    return rows


def test_what_is_given_reaches_the_model(explainer: ExplanationGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = submitted_rows(monkeypatch)
    pairs = [ExplanationRequest(3, 5, 1.0, ("ghosts",)), ExplanationRequest(7, 9, 5.0, ("clues", "alibi"))]
    found = explainer.explain(pairs, GREEDY)
    model = explainer.model
    by_slots = {tuple(token for token in row.prompt if token >= model.config.vocab_size): row for row in seen}
    for request, explanation, word in zip(pairs, found, ("negative", "positive"), strict=True):
        row = by_slots[model.user_token(request.user), model.item_token(request.item)]
        assert row.route == explanation.cluster
        prompt = [token for token in row.prompt if token < model.config.vocab_size]
        text = explainer.tokenizer.decode(prompt, skip_special_tokens=True)
        assert f"Rating: {word}\nFeatures: {', '.join(request.features or ())}\n" in text


def test_unknown_users_and_items_are_served_and_flagged(explainer: ExplanationGenerator) -> None:
    unknown = explainer.catalog.known_users
    first, second = explainer.explain(
        [ExplanationRequest(unknown, 10**6, 5.0), ExplanationRequest(unknown + 9, 10**6 + 1, 5.0)], GREEDY
    )
    assert (first.user_known, first.item_known) == (False, False)
    assert first.features == ()
    assert first.text == second.text
    assert first.responsibilities == second.responsibilities


def test_sampling_is_seeded(explainer: ExplanationGenerator, requests: list[ExplanationRequest]) -> None:
    sampling = GREEDY.model_copy(update={"temperature": 1.0, "top_p": 0.95})
    torch.manual_seed(1)
    first = [e.text for e in explainer.explain(requests, sampling, seed=3)]
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert [e.text for e in explainer.explain(requests, sampling, seed=3)] == first
    assert [e.text for e in explainer.explain(requests, sampling, seed=4)] != first
    assert [e.text for e in explainer.explain(requests, GREEDY)] != first
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are left alone


def test_special_tokens_are_never_written(
    explainer: ExplanationGenerator, requests: list[ExplanationRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = submitted_rows(monkeypatch)
    wild = GREEDY.model_copy(update={"temperature": 100.0, "max_new_tokens": 100})  # nearly uniform over the tokens
    explanations = explainer.explain(requests, wild, seed=0)
    end = explainer.tokenizer.eos_token_id
    forbidden = special_ids(explainer.tokenizer) - {end}
    written = [row.tokens for row in rows]
    assert len(written) == len(requests)
    for tokens in written:
        assert not forbidden & set(tokens)
    assert any(end in tokens for tokens in written)
    names = [name for name in explainer.tokenizer.all_special_tokens if len(name) > 2]
    assert names
    assert not any(name in explanation.text for explanation in explanations for name in names)
    assert max(max(tokens) for tokens in written) < explainer.model.config.vocab_size


def test_beams_and_repetition_controls(explainer: ExplanationGenerator, requests: list[ExplanationRequest]) -> None:
    beams = explainer.explain(requests[:6], GREEDY.model_copy(update={"beams": 3}))
    assert [e.text for e in beams] == [
        explainer.explain([request], GREEDY.model_copy(update={"beams": 3}))[0].text for request in requests[:6]
    ]
    long = GREEDY.model_copy(update={"max_new_tokens": 40, "no_repeat_ngram": 2})
    for explanation in explainer.explain(requests, long):
        tokens = explainer.tokenizer(explanation.text, add_special_tokens=False)["input_ids"]
        pairs = list(itertools.pairwise(tokens))
        assert len(pairs) - len(set(pairs)) <= 1  # decoded text need not be cut into the same tokens again


def test_empty_texts_are_kept(
    explainer: ExplanationGenerator, requests: list[ExplanationRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    end = explainer.tokenizer.eos_token_id
    monkeypatch.setattr(
        "gavamoe.generation.decoding_engine.choose_tokens", lambda _logits, choices, _forbidden: [end] * len(choices)
    )
    explanations = explainer.explain(requests, GREEDY)
    assert [(e.text, e.new_tokens) for e in explanations] == [("", 1)] * len(requests)


def test_progress_is_told_and_nothing_is_nothing(
    explainer: ExplanationGenerator, requests: list[ExplanationRequest]
) -> None:
    seen: list[tuple[int, int]] = []
    explanations = explainer.explain(requests[:10], GREEDY, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(4, 10), (8, 10), (10, 10)]
    assert max(e.new_tokens for e in explanations) <= 12
    assert explainer.explain([], GREEDY) == []


@pytest.mark.parametrize("rating", [0.0, 6.0, float("nan")])
def test_ratings_off_the_scale_are_refused(explainer: ExplanationGenerator, rating: float) -> None:
    with pytest.raises(InputError, match="outside this dataset's scale, 1 to 5"):
        explainer.explain([ExplanationRequest(1, 1, rating)], GREEDY)


@pytest.mark.parametrize("name", ["model.safetensors", "vae_gmm.safetensors", "catalog/users.parquet", "prompt.json"])
def test_an_incomplete_folder_is_refused(stage2: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "stage2"
    shutil.copytree(stage2, copy)
    (copy / name).write_bytes((copy / name).read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=f"{name}: content differs"):
        ExplanationGenerator.load(copy)
    (copy / name).unlink()
    with pytest.raises(InputError, match=f"missing file {name}"):
        ExplanationGenerator.load(copy)
    with pytest.raises(InputError, match="no stage2 artifact here"):
        ExplanationGenerator.load(tmp_path)


@pytest.fixture(scope="module")
def implicit_stage2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of data without ratings."""
    work = tmp_path_factory.mktemp("implicit")
    foods = ("soup", "bread", "tea")
    pairs = [(user, item) for user in range(20) for item in range(15) if (user + 2 * item) % 3]
    lines = [
        {"user": f"u{user}", "item": f"i{item}", "text": f"They like the {foods[item % 3]} here."}
        for user, item in pairs
    ]
    (work / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(work / "rows.jsonl", work / "data", "table")
    config = tiny("stage2.max_steps=5", "stage2.evaluate_every=0", "stage1.negatives=2")
    train_stage1(config, work / "data", work / "stage1", LocalContext())
    train_stage2(config, work / "data", work / "stage1", work / "stage2", LocalContext())
    return work / "stage2"


def test_implicit_data_need_no_rating(implicit_stage2: Path) -> None:
    explainer = ExplanationGenerator.load(implicit_stage2)
    [explanation] = explainer.explain([ExplanationRequest(1, 2)], GREEDY)
    assert explanation.rating is None
    assert explanation.rating_given is False
    assert 0 < explanation.predicted_rating < 1
    assert json.loads((implicit_stage2 / "prompt.json").read_text())["scale"] is None
    with pytest.raises(InputError, match="rating 3: this model's dataset has no ratings"):
        explainer.explain([ExplanationRequest(1, 2, 3.0)], GREEDY)
