"""One trial without Ray: what it measures, what it shares, what it goes on from, and that it never sees a test row."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny import DEFAULT_RATES, tiny

from gavamoe.artifacts.files import sha256, write_json
from gavamoe.config.files import parse_config
from gavamoe.config.schema import RuntimeConfig
from gavamoe.data.dataset import Dataset, fingerprint, open_dataset
from gavamoe.errors import InputError, RunError
from gavamoe.tune import trial
from gavamoe.tune.folder import withhold_test
from gavamoe.tune.space import parse_space
from gavamoe.tune.trial import RESULT_FILE, Job, discard_work, run_trial

TRIED = (
    *DEFAULT_RATES, "runtime.engine=deepspeed", "stage1.epochs=4", "stage2.experts.top_k=1",
    "stage2.experts.implementation=eager", "stage2.max_steps=8", "stage2.evaluate_every=2", "stage2.checkpoint_every=4",
    "stage2.validation_rows=32", "generation.max_new_tokens=8", "evaluation.rows=20",
)  # fmt: skip
"""Overrides of the tiny config."""
SPACE: dict[str, Any] = {
    "stages": 1, "metric": "rmse", "parameters": {"stage1.clusters": {"type": "int", "low": 2, "high": 3}},
}  # fmt: skip


def nothing(percent: int, value: float) -> None:
    del percent, value


def make_job(dataset: Path, folder: Path, seeds: int = 1, **changes: Any) -> Job:
    view = withhold_test(open_dataset(dataset), folder / "search_data")
    config = tiny(*TRIED)
    return Job(parse_space(SPACE | changes, "s.yaml"), config, view.path, view.fingerprint, folder, seeds)


def with_other_test_rows(dataset: Dataset, out: Path) -> Path:
    """A copy of a dataset whose test rows have other ratings and texts."""
    out.mkdir()
    for path in dataset.path.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    table = dataset.table("test")
    ratings = pa.array(6 - table["rating"].to_numpy(), pa.float32())
    texts = pa.array(["nonsense"] * len(table), pa.string())
    changed = table.set_column(2, table.schema.field("rating"), ratings).set_column(
        3, table.schema.field("text"), texts
    )
    pq.write_table(changed, out / "test.parquet")
    meta = json.loads((out / "meta.json").read_text())
    meta["files"]["test.parquet"] = sha256(out / "test.parquet")
    meta["fingerprint"] = fingerprint(meta["files"])
    write_json(out / "meta.json", meta)
    return out


def test_trials_are_the_same_whatever_the_test_rows_are(tiny_dataset: Path, tmp_path: Path) -> None:
    other = with_other_test_rows(open_dataset(tiny_dataset), tmp_path / "other")
    assert open_dataset(other).fingerprint != open_dataset(tiny_dataset).fingerprint
    found = []
    for number, dataset in enumerate((tiny_dataset, other)):
        folder = tmp_path / str(number)
        measured = run_trial(make_job(dataset, folder), 0, {"stage1.clusters": 2}, nothing).measured
        found.append({name: value for name, value in measured.items() if not name.endswith("seconds")})
        [stage1] = [path for path in (folder / "stage1_cache").iterdir() if path.is_dir()]
        assert "test" not in json.loads((stage1 / "metrics.json").read_text())
        assert "test" not in pq.read_table(stage1 / "routes.parquet", columns=["split"])["split"].to_pylist()
    assert found[0] == found[1]


def test_the_view_has_everything_but_the_test_rows(tiny_dataset: Path, tmp_path: Path) -> None:
    whole, view = open_dataset(tiny_dataset), withhold_test(open_dataset(tiny_dataset), tmp_path / "view")
    assert view.size("test") == 0
    assert view.size("train") == whole.size("train")
    assert np.array_equal(view.arrays("valid").user, whole.arrays("valid").user)
    assert view.fingerprint != whole.fingerprint
    assert view.truth() is not None
    assert withhold_test(whole, tmp_path / "view").fingerprint == view.fingerprint


def test_the_view_of_another_dataset_is_refused(tiny_dataset: Path, tmp_path: Path) -> None:
    from gavamoe.data.synthetic.generator import synthesize

    withhold_test(open_dataset(tiny_dataset), tmp_path / "view")
    synthesize(tmp_path / "second", users=30, items=20, ratings=200, groups=2, seed=3)
    with pytest.raises(InputError, match="was made from a dataset other than"):
        withhold_test(open_dataset(tmp_path / "second"), tmp_path / "view")


def test_stage1_trial_reports_its_way_and_measures_every_seed(tiny_dataset: Path, tmp_path: Path) -> None:
    job = make_job(tiny_dataset, tmp_path, seeds=2)
    way: list[tuple[int, float]] = []
    outcome = run_trial(job, 7, {"stage1.clusters": 3}, lambda percent, value: way.append((percent, value)))
    assert [percent for percent, _ in way] == [25, 50, 75]
    assert len(outcome.measured["stage1.rmse"]) == 2
    assert outcome.measured["stage1.rmse"][0] != outcome.measured["stage1.rmse"][1]
    assert set(outcome.measured) >= {"stage1.elbo", "stage1.mae", "user_ari", "stage1.shared"}
    again = run_trial(job, 7, {"stage1.clusters": 3}, nothing)
    assert again.measured == outcome.measured  # read, not trained again


def test_two_stage_trial_measures_texts_and_parameters_and_leaves_no_weights(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    changes = {
        "stages": 2,
        "metric": "stage2.validation_loss",
        "measure": ["rouge_l", "active_parameters", "parameters", "seconds_per_text"],
    }
    job = make_job(tiny_dataset, tmp_path, **changes)
    way: list[int] = []
    outcome = run_trial(job, 0, {"stage1.clusters": 2}, lambda percent, value: way.append(percent))
    assert way == [25, 50, 75]
    measured = outcome.measured
    assert measured["rouge_l"][0] >= 0
    # per block 4 SwiGLU experts of 3 x 32 x 16 weights, of which a token meets one
    assert measured["parameters"][0] - measured["active_parameters"][0] == 2 * 3 * (3 * 32 * 16)
    seed_folder = tmp_path / "trials" / "0000" / "seed_0"
    assert {path.name for path in seed_folder.iterdir()} == {"logs", RESULT_FILE}
    second = run_trial(job, 1, {"stage1.clusters": 2}, nothing)
    assert second.measured["stage1.shared"] == [1.0]
    assert second.measured["stage2.validation_loss"] == measured["stage2.validation_loss"]


class _KilledError(BaseException):
    pass


def test_a_killed_trial_goes_on_from_its_last_checkpoint(tiny_dataset: Path, tmp_path: Path) -> None:
    whole = run_trial(make_job(tiny_dataset, tmp_path / "whole"), 0, {"stage1.clusters": 2}, nothing)
    job = make_job(tiny_dataset, tmp_path / "killed")

    def kill(percent: int, value: float) -> None:
        if percent == 75:
            raise _KilledError

    with pytest.raises(_KilledError):
        run_trial(job, 0, {"stage1.clusters": 2}, kill)
    assert (job.trial_folder(0) / "seed_0" / "checkpoints" / "stage1").is_dir()
    way: list[int] = []
    resumed = run_trial(job, 0, {"stage1.clusters": 2}, lambda percent, value: way.append(percent))
    assert way == [75]  # 25 and 50 were not trained again
    assert resumed.measured["stage1.rmse"] == whole.measured["stage1.rmse"]
    discard_work(job, 0)
    assert not (job.trial_folder(0) / "seed_0" / "checkpoints").exists()


def test_an_undefined_metric_is_an_error(tiny_dataset: Path, tmp_path: Path) -> None:
    job = make_job(tiny_dataset, tmp_path, stages=1, metric="stage1.auc")
    with pytest.raises(RunError, match=r"stage1\.auc is None"):
        run_trial(job, 0, {"stage1.clusters": 2}, nothing)


def test_several_workers_or_offloading_need_ray_train(tiny_dataset: Path, tmp_path: Path) -> None:
    job = make_job(tiny_dataset, tmp_path)
    assert job.in_process
    for settings in ({"runtime": {"workers": 2}}, {"stage2": {"offload_optimizer": True}}):
        config = parse_config(settings, "")
        stages = 2 if "stage2" in settings else 1
        metric = "stage2.validation_loss" if stages == 2 else "rmse"
        space = parse_space(SPACE | {"stages": stages, "metric": metric}, "s.yaml")
        assert not Job(space, config, job.dataset, job.fingerprint, tmp_path, 1).in_process


@pytest.mark.parametrize("gpu", [False, True])
def test_texts_of_trials_with_workers_are_written_where_there_is_a_device_for_them(
    gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a trial's own process has reserved no GPU: a task of the workers' placement writes, not the process."""
    config = parse_config({"runtime": {"workers": 2, "gpu": gpu}}, "")
    space = parse_space(SPACE | {"stages": 2, "metric": "stage2.validation_loss"}, "s.yaml")
    job = Job(space, config, tmp_path / "data", "", tmp_path, 1)
    assert not job.in_process
    asked: list[tuple[Any, dict[str, Any], RuntimeConfig]] = []

    def tasks(loop: Any, jobs: list[dict[str, Any]], placement: RuntimeConfig) -> list[dict[str, float]]:
        asked.extend((loop, each, placement) for each in jobs)
        return [{"bleu_4": 1.0}]

    monkeypatch.setattr(trial, "run_tasks", tasks)
    monkeypatch.setattr(trial, "write_and_score", lambda **_: pytest.fail("it is written in the trial's own process"))
    writing = trial.write_and_score
    assert trial._Seed(job, config, tmp_path, None, None)._texts(tmp_path / "stage2") == {"bleu_4": 1.0}
    [(loop, arguments, placement)] = asked
    assert loop is writing
    assert arguments["stage2"] == tmp_path / "stage2"
    assert placement.gpu is gpu
