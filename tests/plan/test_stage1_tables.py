"""Stage 1's plan by kind of tables: bytes of what training really holds, and what a cluster needs at 10^8 users."""

import pytest
import torch
from helpers.sharded_runs import of_kind
from helpers.tiny import tiny
from torch import Tensor, nn

from gavamoe.config.schema import Stage1Config
from gavamoe.model.tables.hashed import HashedTable
from gavamoe.plan.estimate import Hardware, Workload, make_plan
from gavamoe.plan.parameters import RATING_SCALE
from gavamoe.plan.stage1_tables import KINDS, TableMemory, table_memory
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.sharding.held_tables import hold, table_maker
from gavamoe.stage1.sharding.row_ranges import RowRanges
from gavamoe.stage1.vae_gmm import VaeGmm

USERS, ITEMS, ROWS, WORKERS = 900, 300, 10_000, 3


def settings(kind: str) -> Stage1Config:
    """A third of the rows, where they are hashed."""
    return of_kind("replicated", user_hash_rows=300, item_hash_rows=100).stage1.model_copy(update={"tables": kind})


def nbytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_states_are_those_that_training_holds(kind: str) -> None:
    """Of rank 0 of three: a model, its row-wise optimizer after a step, its best state."""
    config = settings(kind)
    context = LocalContext(world_size=WORKERS)
    make = table_maker(config, context)
    model = VaeGmm(config, USERS, ITEMS, "categorical", RATING_SCALE, make_table=make)
    held = hold(model, config, "data")
    for rows in held.parameters:
        none = torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, rows.shape[1])
        rows.grad = torch.sparse_coo_tensor(*none, rows.shape, check_invariants=False).coalesce()
    held.optimizer.step()
    planned = table_memory(config, USERS, ITEMS, ROWS, WORKERS)
    # A third of 901 and of 301 rows is no whole number: rank 0 holds the smaller part.
    assert nbytes(list(model.parameters())) == pytest.approx(planned.weights, abs=2 * 4 * config.embedding_size)
    own = {id(rows) for rows in held.parameters}
    dense = [p for p in model.parameters() if id(p) not in own and p.requires_grad]
    moments = nbytes([state for rows in held.parameters for state in held.optimizer.state[rows].values()])
    assert moments + 2 * nbytes(dense) == pytest.approx(planned.optimizer, abs=2 * 4 * (2 * config.embedding_size + 1))
    best = held.keep_best(None)
    assert nbytes(list(best.values())) == planned.best
    numbers = {"replicated": 901 + 301, "sharded": 901 + 301, "hashed": 301 + 101}[kind]
    assert planned.tables == numbers * config.embedding_size
    if kind == "sharded":
        assert RowRanges(USERS + 1, WORKERS, 0, "cpu").own == slice(0, 300)
        assert planned.files == pytest.approx(4 * planned.tables / WORKERS)


def test_hashed_tables_of_the_plan_are_those_of_the_model() -> None:
    model = VaeGmm(settings("hashed"), USERS, ITEMS, "categorical", RATING_SCALE)
    assert isinstance(model.user_embedding, HashedTable)
    assert isinstance(model.user_embedding, nn.Embedding)
    assert model.user_embedding.rows == 300


def at(users: int, devices: int) -> dict[str, TableMemory]:
    config = tiny("stage1.embedding_size=64", "stage1.batch_size=4096").stage1
    return {
        kind: table_memory(config.model_copy(update={"tables": kind}), users, users // 10, users * 50, devices)
        for kind in KINDS
    }


def test_sharded_tables_shrink_with_the_devices_and_their_traffic_too() -> None:
    small, large = at(10**7, 2), at(10**8, 64)
    for kinds, users, devices in ((small, 10**7, 2), (large, 10**8, 64)):
        numbers = 1.1 * users * 64
        assert kinds["replicated"].device == pytest.approx(16 * numbers, rel=0.1)
        assert kinds["sharded"].device == pytest.approx(12 * numbers / devices, rel=0.15)
        assert kinds["sharded"].files == pytest.approx(4 * numbers / devices, rel=0.01)
        assert kinds["hashed"].tables == (10**6 + 10**6 + 2) * 64
    assert large["sharded"].sent < 0.2 * large["replicated"].sent


def test_a_plan_compares_the_three_kinds() -> None:
    load = Workload(users=10**8, items=10**7, rows=10**9, prompt_tokens=40, answer_tokens=20)
    hardware = Hardware(64, 80 * 2**30, 312e12, 0.4, 200e9)
    plans = {
        kind: make_plan(tiny("stage1.embedding_size=768", "stage2.alpha=0", f"stage1.tables={kind}"), load, hardware)
        for kind in KINDS
    }
    assert {kind: plan["stage1"]["fits"] for kind, plan in plans.items()} == {
        "replicated": False, "sharded": True, "hashed": True,
    }  # fmt: skip
    for kind, plan in plans.items():
        assert plan["stage1"]["kinds"] == plans["replicated"]["stage1"]["kinds"]
        assert plan["stage1"]["memory"]["device"] == plan["stage1"]["kinds"][kind]["device"]
    # Stage 2 looks sharded tables up and does not hold them.
    assert "slot tables" not in plans["sharded"]["parameters"]["parts"]
    assert plans["replicated"]["parameters"]["parts"]["slot tables"]["total"] == (11 * 10**7 + 2) * 768
