"""Evaluations that are cut off go on where they ended; Ray workers write what one process writes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.cli import Runner
from helpers.exported_runs import run, trained

from gavamoe.config.files import override_config
from gavamoe.config.schema import GenerationConfig
from gavamoe.errors import InputError, RunError
from gavamoe.evaluation import kept_texts
from gavamoe.evaluation.evaluate import evaluate_run
from gavamoe.evaluation.kept_texts import BLOCK_ROWS, LEAST_ROWS, KeptTexts, block_ends
from gavamoe.evaluation.writers import Scored
from gavamoe.generation.generator import Explanation, ExplanationGenerator
from gavamoe.generation.placement import writing_workers
from gavamoe.generation.request import ExplanationRequest

REQUESTS = [ExplanationRequest(user=number % 50, item=number % 37) for number in range(23)]
GENERATION = override_config(run().config, ["generation.max_new_tokens=6", "generation.temperature=1"]).generation


class Cut(Exception):
    pass


class Counting:
    """A generator that counts its requests and can be cut off, or be broken for some blocks."""

    def __init__(self) -> None:
        self.generator, self.asked, self.cut_after = ExplanationGenerator.load(run().stage2), 0, 99

    def explain(
        self, requests: Any, generation: GenerationConfig, seed: int = 0, on_progress: Any = None
    ) -> list[Explanation]:
        if self.asked + len(requests) > self.cut_after:
            raise Cut
        self.asked += len(requests)
        return self.generator.explain(requests, generation, seed, on_progress)


def same(texts: list[Explanation], others: list[Explanation]) -> bool:
    """Equal but for the rounding of what is computed for a block's rows together."""
    return [(each.text, each.cluster, each.features) for each in texts] == [
        (each.text, each.cluster, each.features) for each in others
    ] and np.allclose([each.responsibilities for each in texts], [each.responsibilities for each in others])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_texts, "BLOCK_ROWS", 5)


@pytest.mark.usefixtures("small_blocks")
def test_what_was_written_is_not_written_again(tmp_path: Path) -> None:
    writer = Counting()
    whole = writer.generator.explain(REQUESTS, GENERATION, 7)
    writer.cut_after = 12
    with pytest.raises(Cut):
        KeptTexts(writer, tmp_path, "m").explain(REQUESTS, GENERATION, 7)
    writer.asked, writer.cut_after = 0, 99
    told: list[tuple[int, int]] = []
    texts = KeptTexts(writer, tmp_path, "m").explain(REQUESTS, GENERATION, 7, lambda *counts: told.append(counts))
    assert (writer.asked, told[0][0], told[-1]) == (13, pytest.approx(11, abs=5), (23, 23))
    assert same(texts, whole)
    # A damaged block is written again; all else stays.
    [part] = tmp_path.glob("*/000000010.parquet")
    part.write_bytes(part.read_bytes()[:100])
    writer.asked = 0
    assert same(KeptTexts(writer, tmp_path, "m").explain(REQUESTS, GENERATION, 7), whole)
    assert writer.asked == 5


@pytest.mark.usefixtures("small_blocks")
def test_texts_that_are_read_took_as_long_as_writing_them_did(tmp_path: Path) -> None:
    first, again = (KeptTexts(Counting(), tmp_path, "m") for _ in range(2))
    first.explain(REQUESTS, GENERATION, 7)
    again.explain(REQUESTS, GENERATION, 7)
    assert again.seconds == pytest.approx(first.seconds)
    assert again.seconds > 0


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("other", ["model", "seed", "requests", "settings"])
def test_texts_of_anything_else_are_not_taken(other: str, tmp_path: Path) -> None:
    writer = Counting()
    KeptTexts(writer, tmp_path, "m").explain(REQUESTS, GENERATION, 7)
    writer.asked = 0
    KeptTexts(writer, tmp_path, "other" if other == "model" else "m").explain(
        REQUESTS[1:] if other == "requests" else REQUESTS,
        GENERATION.model_copy(update={"top_p": 0.9}) if other == "settings" else GENERATION,
        8 if other == "seed" else 7,
    )
    assert writer.asked == len(REQUESTS[1:] if other == "requests" else REQUESTS)


@pytest.mark.usefixtures("small_blocks")
def test_blocks_that_always_fail_are_named_and_the_rest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Counting()

    def broken(*_: Any) -> Any:
        def write(blocks: Any, generation: GenerationConfig) -> Iterator[Any]:
            for start, requests, seed in blocks:
                yield start, "no memory" if start == 10 else writer.explain(requests, generation, seed)

        return write

    with monkeypatch.context() as patch:
        patch.setattr(kept_texts, "written_here", broken)
        with pytest.raises(RunError, match=r"rows 11 to 15 failed each time .*\(no memory\).*tries these again"):
            KeptTexts(writer, tmp_path, "m").explain(REQUESTS, GENERATION)
    writer.asked = 0
    KeptTexts(writer, tmp_path, "m").explain(REQUESTS, GENERATION)
    assert writer.asked == 5


@pytest.mark.parametrize("workers", [0, 1, 2, 7])
@pytest.mark.parametrize("rows", [0, 1, LEAST_ROWS, 23, 300, 5000])
def test_blocks_are_all_rows_and_small_at_the_end(rows: int, workers: int) -> None:
    ends = block_ends(rows, workers)
    sizes = [end - start for start, end in ends.items()]
    assert list(ends) == [0, *ends.values()][: len(ends)]
    assert sum(sizes) == rows
    assert max(sizes, default=0) <= BLOCK_ROWS
    assert sizes == sorted(sizes, reverse=True)
    if workers and rows >= 2 * workers * LEAST_ROWS:
        assert sizes[0] == min(BLOCK_ROWS, -(-rows // (2 * workers)))
        assert sizes[-1] <= LEAST_ROWS


def check_alike(one: Any, other: Any, where: str = "") -> None:
    """The same numbers but for rounding, times left out."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one.keys() - {"seconds_writing"}:
            check_alike(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            check_alike(*pair, f"{where}[{number}]")
    else:
        assert one == (pytest.approx(other, rel=1e-4, abs=1e-6) if isinstance(one, float) else other), where


@pytest.mark.usefixtures("ray_two_workers")
def test_workers_write_and_measure_what_one_process_does(gavamoe: Runner, tmp_path: Path) -> None:
    found, tables = [], []
    for name, workers in (("here", 0), ("pool", 2)):
        folder = Path(shutil.copytree(trained(), tmp_path / name))
        options: dict[str, Any] = {"rows": 40, "probe_rows": 10, "row_losses": True, "workers": workers}
        found.append(evaluate_run(folder, **options))
        tables.append(pq.read_table(folder / "evaluation" / "generations.parquet"))
        assert not (folder / ".evaluation").exists()
    check_alike(found[0], found[1])
    assert found[0]["faithfulness"]["gates"] is not None
    assert found[0]["losses"] is not None
    exact = ["row", "user", "item", "generated", "cluster", "prompt_features"]
    assert tables[0].select(exact).equals(tables[1].select(exact))
    result = gavamoe("evaluate", tmp_path / "here", "--workers", "99")
    assert result.code == 2
    assert "--workers 99: the cluster has room for" in result.err


def test_a_run_trained_on_a_cluster_is_written_there(monkeypatch: pytest.MonkeyPatch) -> None:
    placement = override_config(run().config, ["runtime.engine=deepspeed", "runtime.workers=3"]).runtime
    assert writing_workers(placement, None, None) == 0
    monkeypatch.setattr("gavamoe.generation.placement.cluster_address", lambda: "10.0.0.1:6379")
    assert writing_workers(placement, None, None) == 3
    assert writing_workers(placement, 0, None) == 0
    assert writing_workers(placement, None, "cpu") == 0
    with pytest.raises(InputError, match="--device cuda: with --workers"):
        writing_workers(placement, 2, "cuda")


class Fragile:
    """Writes as a run does, but its process dies once in the middle of a text, or a block always fails."""

    def __init__(self, generator: ExplanationGenerator, folder: Path, fault: str) -> None:
        self.generator, self.folder, self.fault = generator, folder, fault

    def explain(
        self, requests: Any, generation: GenerationConfig, seed: int = 0, on_progress: Any = None
    ) -> list[Explanation]:
        with (self.folder / f"block-{seed}").open("a") as file:
            file.write("x")
        first = (self.folder / f"block-{seed}").read_text() == "x"

        def told(done: int, rows: int) -> None:
            if self.fault == "dies" and first and seed == 20:
                os.kill(os.getpid(), signal.SIGKILL)

        if self.fault == "fails" and seed == 20:
            raise RuntimeError("no memory")
        return self.generator.explain(requests, generation, seed, told)


def fragile(run: Path, fault: str, device: str, **_: Any) -> Scored:
    """Opens `run`, whose parent folder counts the blocks."""
    generator = ExplanationGenerator.load(run / "stage2", device)
    return Scored(Fragile(generator, run.parent, fault))


def dies(run: Path, device: str, **_: Any) -> Scored:
    return fragile(run, "dies", device)


def fails(run: Path, device: str, **_: Any) -> Scored:
    return fragile(run, "fails", device)


def tries(folder: Path) -> dict[int, int]:
    return {int(path.name.removeprefix("block-")): len(path.read_text()) for path in folder.glob("block-*")}


@pytest.mark.usefixtures("ray_two_workers")
def test_a_writer_that_is_killed_costs_its_blocks_another_try(tmp_path: Path) -> None:
    whole = Path(shutil.copytree(trained(), tmp_path / "whole"))
    killed = Path(shutil.copytree(trained(), tmp_path / "killed" / "run"))
    options: dict[str, Any] = {"rows": 80, "probe_rows": 0, "workers": 2}
    evaluate_run(whole, **options)
    evaluate_run(killed, **options, load=dies)
    exact = ["row", "generated", "cluster"]
    tables = [pq.read_table(run / "evaluation" / "generations.parquet").select(exact) for run in (whole, killed)]
    assert tables[0].equals(tables[1])
    found = tries(tmp_path / "killed")
    assert sorted(found) == list(block_ends(80, 2)) == [0, 20, 36, 52, 68]
    assert found[20] == 2
    assert sum(found.values()) <= len(found) + 2, "the block at hand and the one that waited behind it"


@pytest.mark.usefixtures("ray_two_workers")
def test_a_block_that_fails_on_workers_is_named_and_the_same_command_goes_on(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained(), tmp_path / "run"))
    options: dict[str, Any] = {"rows": 80, "probe_rows": 0, "workers": 2}
    with pytest.raises(RunError, match=r"rows 21 to 36 failed each time they were tried \(.*no memory.*tries these"):
        evaluate_run(folder, **options, load=fails)
    assert tries(tmp_path) == {0: 1, 20: 3, 36: 1, 52: 1, 68: 1}
    assert not (folder / "evaluation").exists()
    evaluate_run(folder, **options, load=dies)
    assert tries(tmp_path) == {0: 1, 20: 4, 36: 1, 52: 1, 68: 1}, "only what was not there is written"
    assert pq.read_table(folder / "evaluation" / "generations.parquet").num_rows == 80


SLOW_EVALUATION = """
import sys, time
from pathlib import Path
from gavamoe.evaluation import kept_texts
from gavamoe.evaluation.evaluate import evaluate_run
kept_texts.BLOCK_ROWS = 16
keep = kept_texts._keep
def slow(*arguments):
    keep(*arguments)
    time.sleep(2)
kept_texts._keep = slow
evaluate_run(Path(sys.argv[1]), rows=80, probe_rows=0, workers=0)
"""


def test_an_evaluation_whose_process_is_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(trained(), tmp_path / "run"))
    process = subprocess.Popen([sys.executable, "-c", SLOW_EVALUATION, str(folder)])
    end = time.monotonic() + 120
    while len(list(folder.glob(".evaluation/*/*.parquet"))) < 2 and time.monotonic() < end:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    kept = len(list(folder.glob(".evaluation/*/*.parquet")))
    assert 2 <= kept < 5
    monkeypatch.setattr(kept_texts, "BLOCK_ROWS", 16)
    evaluate_run(folder, rows=80, probe_rows=0, workers=0, load=counted)
    assert len(tries(tmp_path)) == 5 - kept
    assert pq.read_table(folder / "evaluation" / "generations.parquet").num_rows == 80
    assert not (folder / ".evaluation").exists()


def counted(run: Path, device: str, **_: Any) -> Scored:
    return fragile(run, "", device)
