"""Blocks of work on Ray actors: results, workers that die, blocks that always fail, work that never ends."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gavamoe.config.schema import RuntimeConfig
from gavamoe.errors import InputError, RunError
from gavamoe.runtime.ray_pool import ATTEMPTS, Block, BlockPool, Done

pytestmark = pytest.mark.usefixtures("ray_two_workers")
PLACEMENT = RuntimeConfig(threads_per_worker=1)


class Doubler:
    def __init__(self, folder: Path, device: str) -> None:
        assert device == "cpu"
        self.folder, self.made_by = folder, os.getpid()

    def double(self, number: int, fault: str = "") -> tuple[int, int]:
        with (self.folder / f"tried-{number}").open("a") as file:
            file.write("x")
        tried = len((self.folder / f"tried-{number}").read_text())
        if fault == "dies once" and tried == 1:
            os._exit(1)
        if fault == "fails":
            raise RuntimeError(f"no memory for {number}")
        if fault == "refuses":
            raise InputError("rating 9: outside this dataset's scale")
        return 2 * number, self.made_by


def run(blocks: Any, folder: Path, workers: int = 2) -> Iterator[Done]:
    with BlockPool(Doubler, {"folder": folder}, workers=workers, placement=PLACEMENT) as pool:
        yield from pool.map("double", blocks)


def test_every_block_is_done_once_by_some_worker(tmp_path: Path) -> None:
    done = list(run((Block(n, (n,)) for n in range(12)), tmp_path))
    assert {each.number: each.result[0] for each in done} == {n: 2 * n for n in range(12)}
    assert len({each.result[1] for each in done}) == 2
    assert all((tmp_path / f"tried-{n}").read_text() == "x" for n in range(12))


def test_few_blocks_are_taken_ahead(tmp_path: Path) -> None:
    taken = []

    def endless() -> Iterator[Block]:
        for number in itertools.count():
            taken.append(number)
            yield Block(number, (number,))

    found = list(itertools.islice(run(endless(), tmp_path), 5))
    assert len(found) == 5
    assert len(taken) <= 5 + 2 * 2


def test_a_worker_that_dies_costs_its_blocks_another_try(tmp_path: Path) -> None:
    blocks = [Block(n, (n, "dies once" if n == 3 else "")) for n in range(8)]
    done = list(run(blocks, tmp_path))
    assert sorted(each.result[0] for each in done) == [2 * n for n in range(8)]
    assert len((tmp_path / "tried-3").read_text()) == 2


def test_a_block_that_always_fails_is_given_up_and_the_rest_goes_on(tmp_path: Path) -> None:
    blocks = [Block(n, (n, "fails" if n == 1 else "")) for n in range(6)]
    done = {each.number: each for each in run(blocks, tmp_path)}
    assert "no memory for 1" in done[1].problem
    assert len((tmp_path / "tried-1").read_text()) == ATTEMPTS
    assert [done[n].result[0] for n in (0, 2, 3, 4, 5)] == [0, 4, 6, 8, 10]


def test_wrong_input_is_raised_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rating 9"):
        list(run([Block(0, (0, "refuses"))], tmp_path))
    assert (tmp_path / "tried-0").read_text() == "x"


def test_more_workers_than_the_cluster_has_room_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--workers 50: the cluster has room for \d+ \("):
        list(run([Block(0, (0,))], tmp_path, workers=50))


def test_more_workers_than_gpus_are_refused(tmp_path: Path) -> None:
    placement = RuntimeConfig(threads_per_worker=1, gpu=True)
    problem = r"--workers 2: the cluster has room for 0 \(a worker needs 1 CPU, 1 GPU, the cluster has .* 0 GPU\).*cpu"
    with (
        pytest.raises(InputError, match=problem),
        BlockPool(Doubler, {"folder": tmp_path}, workers=2, placement=placement),
    ):
        pass


def test_workers_stay_from_one_call_to_the_next(tmp_path: Path) -> None:
    with BlockPool(Doubler, {"folder": tmp_path}, workers=2, placement=PLACEMENT) as pool:
        first = next(pool.map("double", [Block(n, (n,)) for n in range(4)]))  # the rest is left
        again = [pool.call("double", 10 + n) for n in range(4)]
        assert [result for result, _ in again] == [20, 22, 24, 26]
        assert {first.result[1]} | {made_by for _, made_by in again} <= {
            done.result[1] for done in pool.map("double", [Block(n, (20 + n,)) for n in range(8)])
        }
        with pytest.raises(RunError, match=r"double failed 3 times on Ray workers: .*no memory for 9"):
            pool.call("double", 9, "fails")
