"""Figure 4: systems that were told different things stand apart, and seeds are averaged."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.writers import FakeExplainer, parrot
from matplotlib.image import imread

from gavamoe.artifacts.files import write_json
from gavamoe.config.files import dump_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.evaluation.comparison import GIVEN, PAIR
from gavamoe.evaluation.evaluate import evaluate, write_evaluation
from gavamoe.evaluation.evaluated_run import RunData, read_run
from gavamoe.report.sparsity import SPARSITY, plot_sparsity, sparsity_blocks, sparsity_charts, sparsity_rows


def evaluated(folder: Path, dataset: Dataset, **settings: Any) -> RunData:
    config = RunConfig.model_validate(settings)
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    writer = FakeExplainer(dataset, parrot(dataset))
    write_evaluation(folder / "evaluation", evaluate(writer, dataset, config), config, {})
    write_json(folder / "dataset.json", {"path": str(dataset.path), "fingerprint": dataset.fingerprint})
    return read_run(folder)


def with_scores(run: RunData, name: str, bleu: float, predicted: float | None = None) -> RunData:
    def scored(value: float) -> dict[str, Any]:
        groups = {group: {"counts": {"rows": 4}, "metrics": {"bleu_4": value, "rmse": None}} for group in SPARSITY}
        return run.metrics | {"sparsity": groups, "predicted": None}

    metrics = scored(bleu)
    if predicted is not None:
        metrics["predicted"] = scored(predicted)
    return replace(run, name=name, metrics=metrics)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, planted: Dataset) -> RunData:
    return evaluated(tmp_path_factory.mktemp("sparsity") / "run", planted)


def values(runs: list[RunData]) -> dict[str, dict[str, float | None]]:
    blocks = sparsity_blocks(runs)
    return {block.title: {line.label: line.groups["ds1"]["bleu_4"] for line in block.lines} for block in blocks}


def test_what_reads_features_and_what_does_not_stand_apart(run: RunData) -> None:
    told, pair = with_scores(run, "told", 2.0), replace(with_scores(run, "pair", 1.0), told=False)
    assert values([told]) == {GIVEN: {"told": 2.0}}
    assert values([pair]) == {PAIR: {"pair": 1.0}}
    assert values([pair, told]) == {GIVEN: {"told": 2.0}, PAIR: {"pair": 1.0}}


def test_under_both_protocols_all_stand_in_the_second_block(run: RunData) -> None:
    told, pair = with_scores(run, "told", 2.0, 0.5), replace(with_scores(run, "pair", 1.0, 1.0), told=False)
    assert values([told, pair]) == {GIVEN: {"told": 2.0}, PAIR: {"told": 0.5, "pair": 1.0}}


def test_charts_of_the_page_show_those_that_guess_no_features_first_and_name_the_rest(run: RunData) -> None:
    told = [with_scores(run, f"told-{number}", 2.0, 0.5) for number in range(6)]
    pair = [replace(with_scores(run, f"pair-{number}", 1.0, 1.0), told=False) for number in range(3)]
    (_, given, left_of_given), (_, alone, left_of_alone) = sparsity_charts(sparsity_blocks([*told, *pair]))
    assert left_of_given == []
    assert left_of_alone == ["told-3", "told-4", "told-5"]
    assert "told-5" in given
    assert "told-5" not in alone
    assert all(each.name in alone for each in [*told[:3], *pair])


def test_runs_of_other_datasets_stand_apart(run: RunData) -> None:
    here, there = with_scores(run, "here", 2.0), with_scores(run, "there", 1.0)
    there.metrics["dataset"] = run.metrics["dataset"] | {"name": "films", "fingerprint": "f"}
    name = run.metrics["dataset"]["name"]
    assert values([here, there]) == {f"{name}: {GIVEN}": {"here": 2.0}, f"films: {GIVEN}": {"there": 1.0}}


def test_seeds_are_averaged_where_they_have_a_score(run: RunData) -> None:
    first, second, third = (with_scores(run, "told", value) for value in (1.0, 2.0, 6.0))
    third.metrics["sparsity"]["ds1"]["metrics"]["bleu_4"] = None
    averaged = replace(first, other_seeds=(second.metrics, third.metrics))
    rows = {row[2]: row for row in sparsity_rows(sparsity_blocks([averaged]))}
    assert rows["ds1 (most frequent)"] == (GIVEN, "told", "ds1 (most frequent)", 4, "bleu_4", 1.5)
    assert rows["ds2"] == (GIVEN, "told", "ds2", 4, "bleu_4", 3.0)


def test_a_system_that_reads_no_features_is_known_by_its_config(tmp_path: Path, planted: Dataset) -> None:
    assert evaluated(tmp_path / "own", planted).told
    assert not evaluated(tmp_path / "peter", planted, system="peter").told
    assert evaluated(tmp_path / "peter-plus", planted, system="peter-plus").told


def test_the_picture_has_a_row_of_panels_for_each_block(tmp_path: Path, run: RunData) -> None:
    told, pair = with_scores(run, "told", 2.0), replace(with_scores(run, "pair", 1.0), told=False)
    plot_sparsity(sparsity_blocks([told]), tmp_path / "one.png")
    plot_sparsity(sparsity_blocks([told, pair]), tmp_path / "two.png")
    one, two = imread(tmp_path / "one.png"), imread(tmp_path / "two.png")
    assert two.shape[0] > 1.8 * one.shape[0]
    assert np.ptp(two[: two.shape[0] // 2]) > 0
    assert np.ptp(two[two.shape[0] // 2 :]) > 0
