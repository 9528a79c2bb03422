"""Decoding with inputs at fixed places and of few sizes writes the same texts. Recording itself needs a GPU
(`make gpu-check`); here the same inputs go through the pass directly."""

import logging
import random

import pytest
import torch
from helpers.explainers import dense_model, explainer, text_ids

from gavamoe.generation.decoding_engine import Engine, Row
from gavamoe.generation.graphed_step import GraphedStep, decoding_pass
from gavamoe.generation.kv_cache import SlotCache
from gavamoe.generation.llama_step import LlamaStep
from gavamoe.generation.sampling import Sampling
from gavamoe.model.explainer import GavamoeForCausalLM

SLOTS, CAPACITY, ROWS = 6, 150, 20


@pytest.fixture(scope="module")
def model() -> GavamoeForCausalLM:
    """In float64, with gates and experts that differ."""
    found = explainer(dense_model(), conversion="shared", intermediate_size=32)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if ".experts." in name or ".router." in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return found.double().eval()


def fixed(model: GavamoeForCausalLM, cache: SlotCache) -> GraphedStep:
    step = LlamaStep.of(model, CAPACITY, static=True)
    assert step is not None
    return GraphedStep(step, cache)


def texts(model: GavamoeForCausalLM, *, graphed: bool) -> list[list[int]]:
    """Rows of random lengths that join and leave at any time."""
    engine = Engine(model, 1, [], slots=SLOTS, capacity=CAPACITY, max_waiting=ROWS, prefill_rows=2)
    if graphed:
        engine.step_pass = fixed(model, engine.cache)
    draw, ids = random.Random(0), text_ids(ROWS, 12).tolist()
    rows = [
        Row(ids[n][: 3 + n % 9], n % 3, Sampling(new, min_new_tokens=new))
        for n in range(ROWS)
        for new in [draw.randrange(2, 90)]
    ]
    waiting = list(rows)
    while waiting or engine.busy:
        if waiting and draw.random() < 0.3:
            engine.submit(waiting.pop(0))
        engine.step()
    if graphed:
        assert isinstance(engine.step_pass, GraphedStep)
        assert {rows for rows, _ in engine.step_pass._replays} <= {1, 2, 4, SLOTS}
        assert {length for _, length in engine.step_pass._replays} == {64, 128}
    return [row.tokens for row in rows]


def test_texts_are_the_same(model: GavamoeForCausalLM) -> None:
    written = texts(model, graphed=True)
    assert written == texts(model, graphed=False)
    assert len({tuple(tokens[:2]) for tokens in written}) > 3


def test_sizes_are_few_and_fit(model: GavamoeForCausalLM) -> None:
    step = fixed(model, SlotCache(model.config.text_config, SLOTS, CAPACITY, model.dtype, "cpu"))
    assert [step.size(rows, 1)[0] for rows in range(1, SLOTS + 1)] == [1, 2, 4, 4, 6, 6]
    assert [step.size(1, longest)[1] for longest in (1, 64, 65, 128, 129, 150)] == [64, 64, 128, 128, 150, 150]


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_recorded_is_passed(model: GavamoeForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    caches = [SlotCache(model.config.text_config, SLOTS, CAPACITY, model.dtype, "cpu") for _ in range(2)]
    plain, recorded = (fixed(model, cache) for cache in caches)
    recorded._records = True  # without a GPU, recording fails
    read = torch.tensor([5, 7, 9]), torch.tensor([0, 0, 0]), torch.tensor([2, 0, 1])
    with caplog.at_level(logging.WARNING), torch.no_grad():
        found = recorded(*read, caches[1], 1)
        torch.testing.assert_close(found, plain(*read, caches[0], 1))
    assert "can't be recorded" in caplog.text
    assert not recorded._records


def test_a_cpu_needs_no_graphs(model: GavamoeForCausalLM) -> None:
    cache = SlotCache(model.config.text_config, SLOTS, CAPACITY, model.dtype, "cpu")
    assert type(decoding_pass(model, cache)) is LlamaStep
