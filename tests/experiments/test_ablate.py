"""Systems as configuration, how a comparison is run, and that finished runs are not done again."""

import csv
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from helpers.bare_dataset import bare_dataset
from helpers.tiny import tiny

from gavamoe.artifacts.files import read_json
from gavamoe.artifacts.manifest import read_manifest
from gavamoe.artifacts.run import RunFolder
from gavamoe.baselines import retrieval
from gavamoe.config.files import load_config, override_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError
from gavamoe.evaluation.comparison import (
    read_comparison,
)
from gavamoe.evaluation.comparison_files import (
    FIGURE_FILE,
    FOREST_FILE,
    SCORES_FILE,
    TABLE_FILE,
)
from gavamoe.evaluation.losses.row_losses import LOSSES_FILE, RowLosses
from gavamoe.evaluation.losses.verdict import CONTROLS
from gavamoe.experiments.ablate import run_ablation
from gavamoe.experiments.variants import SYSTEMS, find_systems
from gavamoe.model.base_config import base_shape
from gavamoe.model.build import weightless_explainer
from gavamoe.runtime.context import LocalContext
from gavamoe.runtime.progress import Progress
from gavamoe.stage1.train import train_stage1
from gavamoe.stage2.train import train_stage2

COPIERS = ["constant", "copy-user", "copy-item", "copy-features"]


def changed(name: str, config: RunConfig, dataset: Dataset) -> RunConfig:
    [system] = find_systems([name])
    assert system.changes is not None
    return override_config(config, system.changes(config, dataset))


def test_each_ablation_changes_what_its_name_says(planted: Dataset) -> None:
    config = load_config("quickstart")
    assert changed("full", config, planted) == config
    assert changed("no-multi-gating", config, planted).gates == 1
    assert not changed("base", config, planted).stage2.experts.enabled
    assert changed("alpha-0", config, planted).stage2.alpha == 0
    assert changed("gpt2", config, planted).stage2.scratch.family == "gpt2"
    assert changed("random-routes", config, planted).stage2.routes == "random"
    assert changed("oracle-routes", config, planted).stage2.routes == "oracle"
    assert changed("gates-5", config, planted).gates == 5
    for name in ("no-multi-gating", "base", "gpt2", "random-routes"):
        other = changed(name, config, planted)
        assert (other.stage1, other.seed) == (config.stage1, config.seed)
        assert other.stage2.max_steps == config.stage2.max_steps


def test_coarse_experts_keep_the_parameters(planted: Dataset) -> None:
    coarse = changed("no-fine-grained", load_config("quickstart"), planted).stage2.experts
    assert (coarse.count, coarse.top_k, coarse.intermediate_size) == (2, 1, 0)
    paper = load_config("paper")
    experts = changed("no-fine-grained", paper, planted).stage2.experts
    assert (experts.count, experts.top_k, experts.intermediate_size) == (6, 1, 2560)
    with pytest.raises(InputError, match="5 experts with top_k 2 have no coarser form"):
        changed("no-fine-grained", override_config(paper, ["stage2.experts.count=5"]), planted)


def test_the_wide_base_is_as_large_as_the_full_system(planted: Dataset) -> None:
    config = load_config("quickstart")
    assert changed("base-wide", config, planted).stage2.scratch.intermediate_size == 2 * 192
    random = override_config(config, ["stage2.experts.conversion=random"])
    assert changed("base-wide", random, planted).stage2.scratch.intermediate_size == 192
    with pytest.raises(InputError, match="only experts that add parameters"):
        changed("base-wide", override_config(config, ["stage2.experts.conversion=split"]), planted)


def test_dense_controls_of_a_pretrained_base_have_the_experts_parameters(planted: Dataset) -> None:
    """SmolLM2: 1,536 neurons a layer; 12 experts of 128, two of them active."""
    base = "stage2.base_model=HuggingFaceTB/SmolLM2-135M"

    def extra(name: str, *overrides: str) -> int:
        return changed(name, override_config(load_config("smollm2"), [base, *overrides]), planted).stage2.extra_width

    assert (extra("base-wide"), extra("base-active")) == (12 * 128, 2 * 128)
    upcycle = "stage2.experts.conversion=upcycle"
    assert (extra("base-wide", upcycle), extra("base-active", upcycle)) == (11 * 128, 128)
    token = changed("cluster-token", override_config(load_config("smollm2"), [base]), planted)
    assert (token.stage2.prompt.cluster, token.stage2.extra_width) == (True, 12 * 128)
    with pytest.raises(InputError, match="no more parameters"):
        extra("base-active", "stage2.experts.conversion=random")


def test_low_rank_experts_are_compared_with_one_of_their_size(planted: Dataset) -> None:
    lora = ["stage2.base_model=HuggingFaceTB/SmolLM2-135M", "stage2.experts.conversion=lora"]
    config = override_config(load_config("smollm2"), lora)
    one = changed("base-wide", config, planted)
    assert (one.stage2.experts.count, one.stage2.experts.lora_rank, one.gates) == (1, 52, 1)
    sizes = [weightless_explainer(each, base_shape(each.stage2), 10, 10) for each in (config, one)]
    experts = [sum(p.numel() for n, p in size.named_parameters() if ".experts." in n) for size in sizes]
    assert experts[0] == experts[1]
    with pytest.raises(InputError, match="freezes the base model"):
        changed("base", config, planted)


def test_systems_without_several_gates_drop_what_needs_them(planted: Dataset) -> None:
    gates = ["stage2.soft_routes=true", "stage2.gate_dropout=0.1", "stage2.experts.gate_bias=2"]
    gates.append("stage2.shared_first=0.5")
    config = override_config(load_config("quickstart"), gates)
    for name in ("no-multi-gating", "base", "base-active", "base-wide", "cluster-token"):
        other = changed(name, config, planted).stage2
        assert (other.soft_routes, other.gate_dropout, other.experts.gate_bias) == (False, 0, 0)
        assert other.shared_first == (0.5 if other.experts.enabled else 0)


def test_what_makes_no_sense_says_why(planted: Dataset, tmp_path: Path) -> None:
    dense = override_config(load_config("quickstart"), ["stage2.experts.enabled=false"])
    with pytest.raises(InputError, match=r"the config itself has stage2\.experts\.enabled=false"):
        changed("base", dense, planted)
    with pytest.raises(InputError, match="only synthetic data"):
        changed("oracle-routes", dense, bare_dataset(tmp_path / "bare", ["a text"] * 10))
    with pytest.raises(InputError, match=r"system fulll: unknown; known are full, .*gates-K"):
        find_systems(["fulll"])
    with pytest.raises(InputError, match="named twice"):
        find_systems(["full", "full"])
    with pytest.raises(InputError, match="system base: the config itself"):
        run_ablation(dense, planted.path, tmp_path / "out", only=["base"])


def test_controls_of_the_verdict_are_systems() -> None:
    assert set(CONTROLS) <= set(SYSTEMS)


def test_copying_systems_run_once_and_are_kept(planted: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = tiny("evaluation.rows=20")
    found = run_ablation(config, planted.path, out, only=COPIERS, seeds=3)
    assert [o.system for o in found.outcomes] == COPIERS
    assert {o.rows for o in found.outcomes} == {20}
    assert read_comparison(out) == found
    with (out / SCORES_FILE).open() as file:
        lines = list(csv.DictReader(file))
    value = next(line["value"] for line in lines if line["system"] == "copy-item" and line["score"] == "rouge_l")
    assert float(value) == found.outcomes[2].scores["rouge_l"]
    assert (out / FIGURE_FILE).read_bytes().startswith(b"\x89PNG")
    assert "nearest of the item" in (out / TABLE_FILE).read_text()
    made = [(out / name / "seed-0" / "evaluation" / "metrics.json").stat().st_mtime_ns for name in COPIERS]
    run_ablation(config, planted.path, out, only=COPIERS)
    assert made == [(out / name / "seed-0" / "evaluation" / "metrics.json").stat().st_mtime_ns for name in COPIERS]
    again = run_ablation(tiny("evaluation.rows=30"), planted.path, out, only=COPIERS[:1])
    assert again.outcomes[0].rows == 30
    with pytest.raises(InputError, match=r"was started with stage2\.alpha"):
        run_ablation(tiny("stage2.alpha=0.5"), planted.path, out, only=COPIERS)


def test_the_time_limit_leaves_runs_for_later(planted: Dataset, tmp_path: Path) -> None:
    config = tiny("evaluation.rows=20")
    found = run_ablation(config, planted.path, tmp_path / "out", only=COPIERS, minutes=0)
    assert found.outcomes == []
    assert found.left[0] == "constant, seed 0"
    assert not (tmp_path / "out").exists()


def test_an_interrupted_comparison_shows_what_it_has(
    planted: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copier(dataset: Dataset, source: retrieval.Source) -> retrieval.Copier:
        if source == "item":
            raise KeyboardInterrupt
        return retrieval.Copier(dataset, source)

    monkeypatch.setattr("gavamoe.experiments.ablate.Copier", copier)
    with pytest.raises(KeyboardInterrupt):
        run_ablation(tiny("evaluation.rows=20"), planted.path, tmp_path, only=COPIERS)
    found = read_comparison(tmp_path)
    assert [o.system for o in found.outcomes] == COPIERS[:2]
    assert found.left == ["copy-item, seed 0", "copy-features, seed 0"]


def train_here(
    step: str, config: RunConfig, dataset: Dataset, run: RunFolder, resume: bool, progress: Progress
) -> None:
    """A step trained in this process, without Ray."""
    del resume, progress
    run.logs.mkdir(exist_ok=True)
    run.log(step).touch()
    if step == "stage1":
        train_stage1(config, dataset.path, run.stage1, LocalContext())
    else:
        train_stage2(config, dataset.path, run.stage1, run.stage2, LocalContext())


def test_trained_systems_are_compared_by_the_losses_of_the_same_rows(
    planted: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pipeline", "experiments.ablate"):
        monkeypatch.setattr(f"gavamoe.{name}.ray_session", lambda _: nullcontext())
    monkeypatch.setattr("gavamoe.pipeline._train_step", train_here)
    config = tiny("evaluation.rows=30", "evaluation.probe_rows=0", "generation.max_new_tokens=2", "stage2.max_steps=6")
    names = ["full", "no-multi-gating", "random-routes"]
    found = run_ablation(config, planted.path, tmp_path, only=names, seeds=1)
    for run in (tmp_path / o.folder / "evaluation" for o in found.outcomes):
        assert LOSSES_FILE in read_manifest(run, "evaluation").files
        assert set(read_json(run / "metrics.json")["losses"]) == {"shown", "hidden", "stranger"}
    losses = found.losses
    assert losses is not None
    assert losses == read_comparison(tmp_path).losses
    assert {(d.system, d.condition) for d in losses.differences if d.group == "all"} == {
        (name, condition) for name in names[1:] for condition in ("shown", "hidden", "stranger")
    }
    own, other = (RowLosses.read(tmp_path / name / "seed-0" / "evaluation") for name in names[:2])
    assert own is not None
    assert other is not None
    [shown] = [d for d in losses.differences if (d.system, d.condition, d.group) == (names[1], "shown", "all")]
    gap = (other.loss_N["shown"] - own.loss_N["shown"]).sum() / own.tokens_N.sum()
    assert shown.value == pytest.approx(gap)
    told = ~np.isnan(other.loss_N["stranger"])
    assert told.any()
    same = pytest.approx(other.loss_N["hidden"][told], rel=1e-5)
    assert other.loss_N["stranger"][told] == same, "one gate: nothing is known of either"
    assert (tmp_path / TABLE_FILE).read_text().startswith(losses.verdict[0])
    assert "Not compared with a dense model of equal active width" in losses.verdict[-1]
    assert (tmp_path / FOREST_FILE).is_file()
    made = (tmp_path / "full" / "seed-0" / "evaluation" / "artifact.json").read_text()
    run_ablation(config, planted.path, tmp_path, only=names[:1], seeds=1)
    assert (tmp_path / "full" / "seed-0" / "evaluation" / "artifact.json").read_text() == made


@pytest.mark.slow
@pytest.mark.usefixtures("ray_two_workers")
def test_trained_systems_share_stage_1_and_go_on_where_they_ended(planted: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = tiny("evaluation.rows=10", "generation.max_new_tokens=4", "runtime.workers=1")
    names = ["full", "base", "random-routes", "gpt2", "gates-2"]
    first = run_ablation(config, planted.path, out, only=names[:1], seeds=2)
    assert [o.seed for o in first.outcomes] == [0, 1]
    found = run_ablation(config, planted.path, out, only=names, seeds=2)
    assert len(found.outcomes) == 10
    prints = {
        (o.system, o.seed): read_manifest(out / o.folder / "stage1", "stage1").fingerprint for o in found.outcomes
    }
    assert len({prints[name, 0] for name in names[:4]}) == 1
    assert prints["full", 0] not in {prints["full", 1], prints["gates-2", 0]}
    assert found.losses is not None
    assert {each.system for each in found.losses.differences} == {"base", "random-routes", "gpt2", "gates-2"}
    assert {each.seeds for each in found.losses.differences if each.group == "all"} == {2}
    assert all(o.scores["validation_loss"] for o in found.outcomes)
    assert set(SYSTEMS) >= {o.system for o in found.outcomes if o.system != "gates-2"}
