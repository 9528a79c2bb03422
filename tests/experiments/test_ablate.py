"""Systems as configuration, what a comparison computes and writes, and that finished runs are not done again."""

import csv
import json
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from helpers.bare_dataset import bare_dataset
from helpers.losses import difference, loss_comparison, row_losses
from helpers.tiny import tiny

from gavamoe.artifacts.files import read_json
from gavamoe.artifacts.manifest import read_manifest
from gavamoe.artifacts.run import RunFolder
from gavamoe.baselines import retrieval
from gavamoe.cli.output.systems import print_comparison
from gavamoe.config.files import load_config, override_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError
from gavamoe.evaluation.comparison import (
    GIVEN,
    PAIR,
    Comparison,
    Outcome,
    at_equal_time,
    blocks,
    compare_losses,
    difference_table,
    mean_of,
    means,
    read_comparison,
    table,
)
from gavamoe.evaluation.comparison import difference as seed_difference
from gavamoe.evaluation.comparison_files import (
    DIFFERENCES_FILE,
    FIGURE_FILE,
    FOREST_FILE,
    SCORES_FILE,
    TABLE_FILE,
    markdown,
    plot,
    write_comparison,
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


def outcome(system: str, seed: int, value: float | None, *, trained: bool = True) -> Outcome:
    return Outcome(
        system=system, label=system, what="", seed=seed, trained=trained, folder="", rows=10,
        scores={"bleu_4": value, "parameters": 250_000 if trained else None}, intervals={},
    )  # fmt: skip


def test_means_and_intervals_by_hand() -> None:
    one = mean_of([1.0, 2.0, 3.0])
    assert one.mean == 2.0
    assert one.half == pytest.approx(4.302653 * 1.0 / math.sqrt(3))
    assert mean_of([4.0]).half is None
    assert mean_of([1.0, 3.0]).half == pytest.approx(12.7062, rel=1e-4)
    assert means([outcome("a", 0, 1.0), outcome("a", 1, None)], "bleu_4") is None
    assert one.text() == "2.000 ± 2.484"


def test_differences_are_paired_by_seed() -> None:
    full = [outcome("full", seed, value) for seed, value in enumerate([10.0, 20.0, 30.0])]
    other = [outcome("base", seed, value) for seed, value in enumerate([11.0, 21.0])]
    gap = seed_difference(other, full, "bleu_4")
    assert gap is not None
    assert (gap.mean, gap.half, gap.seeds) == (1.0, 0.0, 2)
    copied = seed_difference([outcome("constant", 0, 0.0, trained=False)], full, "bleu_4")
    assert copied is not None
    assert (copied.mean, copied.seeds) == (-20.0, 3)
    assert seed_difference([outcome("base", 7, 1.0)], full, "bleu_4") is None


def test_tables_name_systems_and_mark_differences() -> None:
    outcomes = [outcome("full", s, 10.0 + s) for s in range(3)] + [outcome("base", s, 8.0 + s) for s in range(3)]
    comparison = Comparison(dataset="d", fingerprint="f", config={}, outcomes=outcomes, skipped={}, left=[])
    heads, rows = table(comparison)
    assert heads == ["system", "seeds", "BLEU-4 ↑", "parameters"]
    assert rows[0] == ["full", "3", "11.00 ± 2.48", "250,000"]
    assert difference_table(comparison)[1] == [["base", "-2.000 ± 0.000 *"]]


def compared(protocol: str, *outcomes: Outcome) -> Comparison:
    config = {"evaluation": {"protocol": protocol}}
    return Comparison(dataset="d", fingerprint="f", config=config, outcomes=list(outcomes), skipped={}, left=[])


def test_what_is_told_features_is_never_ranked_with_what_is_not(tmp_path: Path) -> None:
    full, peter = outcome("full", 0, 10.0), outcome("peter", 0, 3.0).model_copy(update={"told": False})
    [(first, given), (second, pair)] = blocks(compared("given", full, peter))
    assert (first, second) == (GIVEN, PAIR)
    assert [[o.system for o in each.outcomes] for each in (given, pair)] == [["full"], ["peter"]]
    assert [title for title, _ in blocks(compared("given", full))] == [GIVEN]
    assert [title for title, _ in blocks(compared("predicted", full, peter))] == [PAIR]

    both = [one.model_copy(update={"predicted": {"bleu_4": 2.0 + place}}) for place, one in enumerate((full, peter))]
    comparison = compared("both", *both)
    [(_, given), (_, pair)] = blocks(comparison)
    assert [o.scores["bleu_4"] for o in given.outcomes] == [10.0]
    assert [(o.system, o.scores["bleu_4"]) for o in pair.outcomes] == [("full", 2.0), ("peter", 3.0)]
    text = markdown(comparison)
    assert (
        text.index(GIVEN) < text.index("| full | 1 | 10.00 |") < text.index(PAIR) < text.index("| full | 1 | 2.000 |")
    )
    plot(comparison, tmp_path / "both.png")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_losses_at_equal_time_are_those_before_the_fastest_system_ended() -> None:
    curves = {"full": [(0.0, 9.0), (10.0, 5.0), (20.0, 4.0)], "peter": [(0.0, 9.0), (4.0, 6.0), (12.0, 5.5)]}
    outcomes = [outcome(name, 0, 1.0).model_copy(update={"curve": curve}) for name, curve in curves.items()]
    found = at_equal_time([*outcomes, outcome("constant", 0, 1.0, trained=False)])
    assert [each.scores.get("loss_at_equal_time") for each in found] == [5.0, 5.5, None]


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


def with_losses(found: Comparison, out: Path, leads: dict[str, float]) -> None:
    """Losses of four users' rows in the folders of outcomes: the system's is higher by its lead, in nats a token."""
    user, tokens = ["a", "a", "b", "c", "d"], [10, 20, 5, 8, 7]
    for each in found.outcomes:
        if each.system in leads:
            higher = [count * (4.0 + leads[each.system]) for count in tokens]
            losses = row_losses(user, [2, 2, 3, 4, 0], tokens, higher, hidden=higher)
            (out / each.folder / "evaluation").mkdir(parents=True)
            losses.write(out / each.folder / "evaluation")


def test_losses_of_the_same_rows_decide_whether_gates_pay(tmp_path: Path) -> None:
    names = ["full", "base-wide", "random-routes", "constant"]
    outcomes = [
        outcome(name, seed, 10.0).model_copy(update={"folder": f"{name}/seed-{seed}", "label": name})
        for name in names
        for seed in range(2)
    ]
    comparison = Comparison(dataset="d", fingerprint="f", config={}, outcomes=outcomes, skipped={}, left=[])
    with_losses(comparison, tmp_path, {"full": 0.0, "base-wide": 0.02, "random-routes": 0.05})
    losses = compare_losses(outcomes, tmp_path, 0)
    assert losses is not None
    assert {each.system for each in losses.differences} == {"base-wide", "random-routes"}
    assert losses.losses["hidden"]["1-4"] == pytest.approx(4.0)
    assert losses.verdict[0] == (
        "Gates pay on this data set: full beats all 2 controls that were run over all users, though not in every group."
    )
    assert "users with 1 to 4 rows 0.020 (0.020 to 0.020; base-wide)" in losses.verdict[1]
    write_comparison(tmp_path, comparison.model_copy(update={"losses": losses}))
    assert read_comparison(tmp_path).losses == losses
    table_file = (tmp_path / TABLE_FILE).read_text()
    assert table_file.startswith("Gates pay on this data set")
    assert (
        "| base-wide | +0.020 | +0.020 (+0.020 to +0.020) * | +0.020 (+0.020 to +0.020) * | 2 | 0.000 |" in table_file
    )
    with (tmp_path / DIFFERENCES_FILE).open() as file:
        lines = list(csv.DictReader(file))
    assert {(line["system"], line["condition"], line["group"]) for line in lines} == {
        (name, condition, group)
        for name in ("base-wide", "random-routes")
        for condition in ("shown", "hidden")
        for group in ("0", "1-4", "all")
    }
    assert (tmp_path / FOREST_FILE).read_bytes().startswith(b"\x89PNG")
    assert compare_losses(outcomes[-2:], tmp_path, 0) is None, "systems that copy have none"
    assert compare_losses(outcomes[:2], tmp_path, 0) is None, "nothing to compare with"
    without_full = compare_losses(outcomes[2:], tmp_path, 0)
    assert without_full is not None
    assert (without_full.reference, without_full.verdict) == ("base-wide", [])


def test_a_comparison_of_an_earlier_version_has_no_losses(tmp_path: Path) -> None:
    stored = Comparison(
        dataset="d", fingerprint="f", config={}, outcomes=[outcome("full", 0, 1.0)], skipped={}, left=[]
    )
    values = json.loads(stored.model_dump_json())
    del values["losses"]
    (tmp_path / "comparison.json").write_text(json.dumps(values))
    assert read_comparison(tmp_path) == stored


def test_the_terminal_says_first_whether_gates_pay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = loss_comparison([difference("base-wide", 0.021), difference("gpt2", -0.2)])
    comparison = Comparison(
        dataset="d", fingerprint="f", config={}, outcomes=[outcome("full", 0, 1.0)], skipped={}, left=[], losses=losses
    )
    print_comparison(comparison, tmp_path, as_json=False)
    shown = capsys.readouterr().err
    assert shown.startswith("Gates pay on this data set: GaVaMoE beats the one control that was run")
    assert "Loss over GaVaMoE's, shown: user's slot, item's slot, rating and features given" in shown
    assert "+0.021 *" in shown
    assert "GPT-2" not in shown, "in a terminal the controls alone"
    assert str(tmp_path / FOREST_FILE) in shown


def test_a_damaged_comparison_is_named(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps({"dataset": 1}))
    with pytest.raises(InputError, match=r"comparison\.json: not a comparison"):
        read_comparison(tmp_path)


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
