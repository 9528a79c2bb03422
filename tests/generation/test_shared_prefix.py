"""What all prompts begin with is read once a gate, and changes no text."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.explainers import dense_model, explainer, text_ids

from gavamoe.generation.decoding_engine import Engine, Row
from gavamoe.generation.sampling import Sampling
from gavamoe.model.explainer import GavamoeForCausalLM

PREFIX = [5, 9, 4, 7]
NEW, ROWS = 6, 9


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> GavamoeForCausalLM:
    """In float64, with gates and experts that differ."""
    found = explainer(dense_model(request.param), conversion="shared", intermediate_size=32)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if ".experts." in name or ".router." in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return found.double().eval()


def rows(**changes: Any) -> list[Row]:
    """Prompts of different lengths behind the prefix, three gates."""
    ids = text_ids(ROWS, 3 + ROWS).tolist()
    return [Row([*PREFIX, *ids[n][: 3 + n]], n % 3, Sampling(NEW, min_new_tokens=NEW), **changes) for n in range(ROWS)]


def written(model: GavamoeForCausalLM, asked: list[Row], prefix: list[int]) -> tuple[list[list[int]], int]:
    """The rows' tokens, and how many tokens were read as prompts, padding included."""
    engine = Engine(model, 1, [], slots=4, capacity=40, max_waiting=99, prefill_rows=3, prefix=prefix)
    with counted(model) as read:
        for row in asked:
            engine.submit(row)
        while engine.busy:
            engine.step()
    return [row.tokens for row in asked], sum(size for size in read if size > 1)


@contextmanager
def counted(model: GavamoeForCausalLM) -> Iterator[list[int]]:
    """The width of each forward pass."""
    widths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: widths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        yield widths
    finally:
        hook.remove()


def test_texts_are_the_same_and_fewer_tokens_are_read(model: GavamoeForCausalLM) -> None:
    whole, all_read = written(model, rows(), [])
    known, read = written(model, rows(), PREFIX)
    assert known == whole
    assert len({tuple(tokens) for tokens in whole}) > 1
    passes = 5  # of at most three of nine rows: as slots were free
    assert all_read - read == (passes - 1) * len(PREFIX), "less one pass for all gates"


@pytest.mark.parametrize("last", [{"trace": True}, {"prompt": [8, 3, 8, 8, 2]}, {"prompt": PREFIX}])
def test_rows_that_must_read_all_are_read_whole(model: GavamoeForCausalLM, last: dict[str, Any]) -> None:
    def mixed() -> list[Row]:
        asked = rows()[:2]
        return [*asked, Row(**{"prompt": asked[0].prompt, "route": 1, "sampling": asked[0].sampling} | last)]

    asked = mixed()
    known, _ = written(model, asked, PREFIX)
    assert known == written(model, mixed(), [])[0]
    if "trace" in last:
        used = asked[-1].expert_use
        assert used is not None
        read = len(asked[-1].prompt) + NEW - 1
        assert used.sum(-1).tolist() == [read * model.config.experts_per_token] * len(used)


def test_responsibilities_share_no_prefix() -> None:
    soft = explainer(dense_model("llama"), conversion="shared", intermediate_size=32).double().eval()
    soft.config.soft_routes = True

    def asked() -> list[Row]:
        return [Row([*PREFIX, 3, 6 + n], (0.5, 0.25, 0.25), Sampling(NEW, min_new_tokens=NEW)) for n in range(3)]

    known, read = written(soft, asked(), PREFIX)
    assert known == written(soft, asked(), [])[0]
    assert read == len(PREFIX) + 2
