"""The generation engine: every row's text is its own, whatever shares the batch; rows join, leave and are cancelled."""

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers.serve_run import exact_explainer, tiny_artifact

from gavamoe.config.schema import GenerationConfig
from gavamoe.errors import RunError
from gavamoe.generation.decoding_engine import Engine, EngineFull, Row
from gavamoe.generation.detokenize import TextStream, clean_text
from gavamoe.generation.engine_thread import EngineThread
from gavamoe.generation.generator import ExplanationGenerator
from gavamoe.generation.prompts import PromptColumns
from gavamoe.generation.sampling import Choice, Sampling, choose_tokens
from gavamoe.model.base_model import special_ids

NEW = 14


@pytest.fixture(scope="module")
def explainer() -> ExplanationGenerator:
    return exact_explainer(tiny_artifact())


@pytest.fixture(scope="module")
def prompts(explainer: ExplanationGenerator) -> list[list[int]]:
    """Prompts of different lengths, users and items known and unknown."""
    draw = random.Random(0)
    n = 30
    users, items = ([draw.randrange(70) for _ in range(n)], [draw.randrange(45) for _ in range(n)])
    features = [tuple(f"word {draw.randrange(50)}" for _ in range(draw.randrange(5))) for _ in range(n)]
    ratings = [float(draw.randrange(1, 6)) for _ in range(n)]
    titles = [explainer.catalog.item_title(item) for item in items]
    found = explainer.builder.prompts(PromptColumns(users, items, ratings, features, titles))
    assert len({len(prompt) for prompt in found}) > 5
    return found


@pytest.fixture(scope="module")
def clusters(prompts: list[list[int]]) -> list[int]:
    return [row % 3 for row in range(len(prompts))]


@pytest.fixture(scope="module")
def reference(explainer: ExplanationGenerator, prompts: list[list[int]], clusters: list[int]) -> list[str]:
    """The texts that transformers' `generate` writes for these prompts, in batches."""
    texts = generated(explainer, prompts, clusters, GenerationConfig(max_new_tokens=NEW, batch_size=7))
    assert len(set(texts)) > 15
    return texts


def generated(
    explainer: ExplanationGenerator, prompts: list[list[int]], clusters: list[int], settings: GenerationConfig
) -> list[str]:
    """What `generate` writes, which shares nothing with the engine but the model."""
    options = explainer._beam_options(settings)
    texts: list[str] = []
    for start in range(0, len(prompts), settings.batch_size):
        rows = slice(start, start + settings.batch_size)
        tokens = explainer._beam_batch(prompts[rows], torch.tensor(clusters[rows]), options)
        texts += [explainer.text(row) for row in tokens]
    return texts


def make_engine(explainer: ExplanationGenerator, **options: Any) -> Engine:
    forbidden = sorted(special_ids(explainer.tokenizer) - {explainer.builder.end})
    return Engine(explainer.model, explainer.builder.end, forbidden, **({"slots": 6, "max_waiting": 1000} | options))


def run(engine: Engine, rows: list[Row]) -> None:
    for row in rows:
        engine.submit(row)
    while engine.busy:
        engine.step()


def texts_of(explainer: ExplanationGenerator, rows: list[Row]) -> list[str]:
    return [clean_text(explainer.tokenizer, row.tokens) for row in rows]


def test_greedy_equals_generate(
    explainer: ExplanationGenerator, prompts: list[list[int]], clusters: list[int], reference: list[str]
) -> None:
    rows = [Row(prompt, cluster, Sampling(NEW)) for prompt, cluster in zip(prompts, clusters, strict=True)]
    run(make_engine(explainer), rows)
    assert texts_of(explainer, rows) == reference
    assert all(row.done and 1 <= len(row.tokens) <= NEW for row in rows)


def test_the_cluster_of_a_row_matters(
    explainer: ExplanationGenerator, prompts: list[list[int]], reference: list[str]
) -> None:
    rows = [Row(prompt, (n + 1) % 3, Sampling(NEW)) for n, prompt in enumerate(prompts)]
    run(make_engine(explainer), rows)
    assert sum(a != b for a, b in zip(texts_of(explainer, rows), reference, strict=True)) > 5


def test_rows_that_join_and_leave_at_any_time_change_no_text(
    explainer: ExplanationGenerator, prompts: list[list[int]], clusters: list[int], reference: list[str]
) -> None:
    """Arrivals at random steps, other lengths and cancelled neighbors."""
    draw = random.Random(1)
    engine = make_engine(explainer, slots=5, prefill_rows=2)
    rows = [Row(prompt, cluster, Sampling(NEW)) for prompt, cluster in zip(prompts, clusters, strict=True)]
    arrivals = list(rows)
    disturbers: list[Row] = []
    most = 0
    while arrivals or engine.busy:
        for _ in range(draw.randrange(3)):
            if arrivals:
                engine.submit(arrivals.pop(0))
        if draw.random() < 0.3:
            disturber = Row(draw.choice(prompts), draw.randrange(3), Sampling(NEW, temperature=2.0, seed=5))
            engine.submit(disturber)
            disturbers.append(disturber)
        if disturbers and draw.random() < 0.5:
            engine.cancel(disturbers.pop(draw.randrange(len(disturbers))))
        engine.step()
        most = max(most, len(engine.active))
    assert most == 5
    assert texts_of(explainer, rows) == reference


def test_a_sampled_row_depends_on_its_seed_alone(explainer: ExplanationGenerator, prompts: list[list[int]]) -> None:
    def sampled(seed: int, beside: int) -> list[int]:
        engine = make_engine(explainer)
        for n in range(beside):
            engine.submit(Row(prompts[n], n % 3, Sampling(NEW, temperature=1.0, seed=99)))
        row = Row(prompts[20], 1, Sampling(NEW, temperature=1.5, top_p=0.95, seed=seed))
        run(engine, [row])
        return row.tokens

    alone = sampled(3, 0)
    assert sampled(3, 4) == alone
    assert sampled(3, 9) == alone
    assert len({tuple(sampled(seed, 0)) for seed in range(6)}) > 3


def test_sampling_follows_the_distribution_and_top_p() -> None:
    probability = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probability.log()[None]
    none = torch.tensor([], dtype=torch.long)

    def shares(**options: float) -> np.ndarray:
        choice = Choice(Sampling(1, **options), [])  # type: ignore[arg-type]
        drawn = [choose_tokens(logits, [choice], none)[0] for _ in range(4000)]
        return np.bincount(drawn, minlength=4) / 4000

    assert np.abs(shares(temperature=1.0, seed=1) - probability.numpy()).max() < 0.025
    cut = shares(temperature=1.0, top_p=0.8, seed=2)
    assert cut[2:].sum() == 0
    assert cut[0] == pytest.approx(0.625, abs=0.025)
    assert shares(temperature=0.01, seed=3)[0] == 1
    assert shares(temperature=0.0)[0] == 1


def test_forbidden_tokens_and_repeated_ngrams_are_not_written() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]])
    assert choose_tokens(logits, [Choice(Sampling(1), [])], torch.tensor([1])) == [2]
    choice, none = Choice(Sampling(9, no_repeat_ngram=2), [7, 1, 7]), torch.tensor([], dtype=torch.long)
    written = [choose_tokens(torch.tensor([[0.0, 3.0, 2.0, 1.0]]), [choice], none)[0] for _ in range(5)]
    assert written == [1, 1, 2, 1, 3], "1 1, 1 2 and 2 1 are there; what the prompt has may be written"
    assert logits[0, 1] == 3.0, "the model's logits are not written to"


@pytest.mark.parametrize("control", [{"no_repeat_ngram": 2}, {"repetition_penalty": 8.0}, {"min_new_tokens": NEW}])
def test_length_and_repetition_controls_equal_generate(
    control: dict[str, Any],
    explainer: ExplanationGenerator,
    prompts: list[list[int]],
    clusters: list[int],
    reference: list[str],
) -> None:
    options = GenerationConfig(max_new_tokens=NEW, batch_size=5, **control)
    wanted = generated(explainer, prompts, clusters, options)
    rows = [Row(prompts[n], clusters[n], Sampling(NEW, **control)) for n in range(len(prompts))]
    run(make_engine(explainer), rows)
    assert texts_of(explainer, rows) == wanted
    assert wanted != reference


def test_a_text_may_not_end_before_its_least_tokens() -> None:
    choice, none = Choice(Sampling(9, min_new_tokens=2), [3, 3], end=1), torch.tensor([], dtype=torch.long)
    written = [choose_tokens(torch.tensor([[0.0, 3.0, 2.0, 1.0]]), [choice], none)[0] for _ in range(3)]
    assert written == [2, 2, 1]


def test_the_penalty_divides_positive_and_multiplies_negative_scores_of_written_tokens_alone() -> None:
    choice, none = Choice(Sampling(9, repetition_penalty=2.0), [1]), torch.tensor([], dtype=torch.long)
    scores = torch.tensor([[-1.0, 3.0, 2.0]])
    assert choose_tokens(scores, [choice], none) == [1]  # in the prompt, but not written
    assert choose_tokens(scores, [choice], none) == [2]  # 3 / 2 is below 2
    assert choose_tokens(torch.tensor([[-9.0, -1.0, -1.5]]), [choice], none) == [1]  # -1 x 2 against -1.5 x 2


def test_trace_counts_every_token_once_per_expert_choice(
    explainer: ExplanationGenerator, prompts: list[list[int]], clusters: list[int]
) -> None:
    rows = [Row(prompts[n], clusters[n], Sampling(NEW), trace=n % 2 == 0) for n in range(8)]
    run(make_engine(explainer), rows)
    config = explainer.model.config
    for row in rows[::2]:
        assert row.expert_use is not None
        assert row.expert_use.shape == (config.text_config.num_hidden_layers, config.n_experts)
        read = len(row.prompt) + len(row.tokens) - 1  # the last token is written, but never read
        assert row.expert_use.sum(-1).tolist() == [read * config.experts_per_token] * row.expert_use.shape[0]
    assert all(row.expert_use is None for row in rows[1::2])


def test_the_queue_is_bounded_and_impossible_rows_are_refused(
    explainer: ExplanationGenerator, prompts: list[list[int]]
) -> None:
    engine = make_engine(explainer, max_waiting=2)
    for _ in range(2):
        engine.submit(Row(prompts[0], 0, Sampling(NEW)))
    with pytest.raises(EngineFull, match="2 texts are waiting"):
        engine.submit(Row(prompts[0], 0, Sampling(NEW)))
    with pytest.raises(ValueError, match="at most 50 together fit"):
        make_engine(explainer, capacity=50).submit(Row([5] * 45, 0, Sampling(6)))


def test_timings_add_up(explainer: ExplanationGenerator, prompts: list[list[int]]) -> None:
    row = Row(prompts[0], 0, Sampling(NEW))
    started = time.monotonic()
    run(make_engine(explainer), [row])
    spent = time.monotonic() - started
    assert min(row.timings) >= 0
    assert sum(row.timings) == pytest.approx(spent, abs=0.05)


def test_pieces_of_a_stream_add_up_to_the_text(explainer: ExplanationGenerator, reference: list[str]) -> None:
    tokenizer = explainer.tokenizer
    for text in [*reference[:5], "naïve – 東京 🎬  two  spaces", " leading", "x"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        stream = TextStream(tokenizer)
        pieces = [stream.piece(ids[: n + 1], last=n + 1 == len(ids)) for n in range(len(ids))]
        assert "".join(pieces) == clean_text(tokenizer, ids)
        if "\ufffd" not in text:  # an untrained model may well write half a character
            assert "\ufffd" not in "".join(pieces)


@pytest.fixture
def thread(explainer: ExplanationGenerator) -> Iterator[EngineThread]:
    running = EngineThread(make_engine(explainer, slots=4, max_waiting=40))
    yield running
    running.close()


async def collect(thread: EngineThread, row: Row, *, each_token: bool = True) -> list[int]:
    ticket = thread.start(row, each_token=each_token)
    try:
        return [count async for count in ticket]
    finally:
        ticket.close()


def test_thread_serves_many_at_once(
    explainer: ExplanationGenerator,
    thread: EngineThread,
    prompts: list[list[int]],
    clusters: list[int],
    reference: list[str],
) -> None:
    async def everything() -> list[Row]:
        rows = [Row(prompt, cluster, Sampling(NEW)) for prompt, cluster in zip(prompts, clusters, strict=True)]
        counts = await asyncio.gather(*[collect(thread, row) for row in rows])
        assert all(
            seen == sorted(set(seen)) and seen[-1] == len(row.tokens) for seen, row in zip(counts, rows, strict=True)
        )
        return rows

    assert texts_of(explainer, asyncio.run(everything())) == reference
    assert thread.load == (0, 0)


def test_a_row_that_is_wanted_whole_is_told_of_at_its_end(thread: EngineThread, prompts: list[list[int]]) -> None:
    async def together() -> tuple[list[int], list[int]]:
        whole, growing = (Row(prompt, 0, Sampling(NEW, min_new_tokens=NEW)) for prompt in prompts[:2])
        return tuple(await asyncio.gather(collect(thread, whole, each_token=False), collect(thread, growing)))

    whole, growing = asyncio.run(together())
    assert whole == [NEW]
    assert len(growing) > 1


def test_a_ticket_closed_early_frees_its_slot(thread: EngineThread, prompts: list[list[int]]) -> None:
    async def leave_early() -> None:
        ticket = thread.start(Row(prompts[0], 0, Sampling(100, temperature=5.0, seed=1)))
        async for _ in ticket:
            break
        ticket.close()
        for _ in range(100):
            if thread.load == (0, 0):
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"still {thread.load}")

    asyncio.run(leave_early())


def test_a_failed_step_fails_its_rows_and_the_engine_goes_on(
    thread: EngineThread, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(thread._engine, "_prefill", broken)
        for _ in range(3):
            with pytest.raises(RunError, match="the generation engine failed"):
                asyncio.run(collect(thread, Row(prompts[0], 0, Sampling(NEW))))
        with pytest.raises(RunError, match="failed 3 times in a row"):
            thread.check(stuck_after_s=60)
    assert asyncio.run(collect(thread, Row(prompts[0], 0, Sampling(NEW))))
    thread.check(stuck_after_s=60)


def test_a_stuck_step_is_noticed(
    thread: EngineThread, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    prefill = thread._engine._prefill

    def stuck(rows: list[Row]) -> None:
        release.wait(10)
        prefill(rows)

    monkeypatch.setattr(thread._engine, "_prefill", stuck)

    async def ask() -> list[int]:
        pending = asyncio.create_task(collect(thread, Row(prompts[0], 0, Sampling(2))))
        await asyncio.sleep(0.3)
        with pytest.raises(RunError, match="the engine's step has taken"):
            thread.check(stuck_after_s=0.1)
        release.set()
        return await pending

    assert asyncio.run(ask())


def test_rows_join_together_where_told_to(
    explainer: ExplanationGenerator, prompts: list[list[int]], clusters: list[int], reference: list[str]
) -> None:
    engine = make_engine(explainer, slots=6, prefill_rows=6, join_rows=4)
    rows = [Row(prompt, cluster, Sampling(NEW)) for prompt, cluster in zip(prompts, clusters, strict=True)]
    for row in rows:
        engine.submit(row)
    joined, waiting = [], len(rows)
    while engine.busy:
        engine.step()
        if len(engine.waiting) < waiting:
            joined.append(waiting - len(engine.waiting))
            waiting = len(engine.waiting)
    assert joined[0] == 6
    assert min(joined[:-1]) >= 4, "only the last rows may be fewer"
    assert texts_of(explainer, rows) == reference
