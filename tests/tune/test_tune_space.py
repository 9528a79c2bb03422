"""Search spaces: the shipped ones fit, wrong ones are one clear line, draws keep conditions and constraints."""

from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from gavamoe.config.files import parse_config, shipped
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import open_dataset
from gavamoe.errors import InputError
from gavamoe.tune.checks import check_space, config_values, trial_config
from gavamoe.tune.metrics import MEASURES, curve_value, find_measure, stage1_values, stage2_values
from gavamoe.tune.space import Space, load_space, parse_space

K = {"type": "int", "low": 2, "high": 5}
EXPERTS: dict[str, Any] = {
    "stages": 2,
    "metric": "stage2.validation_loss",
    "parameters": {
        "stage2.experts.top_k": {"type": "int", "low": 1, "high": 6, "when": {"stage2.experts.enabled": True}},
        "stage2.experts.count": {"type": "choice", "values": [2, 4], "when": {"stage2.experts.enabled": True}},
        "stage2.experts.enabled": {"type": "choice", "values": [True, False]},
    },
    "constraints": ["stage2.experts.top_k <= stage2.experts.count"],
}


def space(**changes: Any) -> Space:
    return parse_space({"stages": 1, "metric": "rmse", "parameters": {"stage1.clusters": K}} | changes, "s.yaml")


def check(candidate: Space, dataset: Path, config: RunConfig | None = None) -> None:
    check_space(candidate, config or RunConfig(), open_dataset(dataset), "s.yaml")


def test_shipped_spaces_are_those_of_the_documentation() -> None:
    names = {path.stem for path in shipped("tune_spaces").glob("*.yaml")}
    assert names == {"gates", "gates_beta", "stage1", "experts", "joint", "quality_cost"}


@pytest.mark.parametrize("name", ["gates", "gates_beta", "stage1", "experts", "joint", "quality_cost"])
def test_shipped_spaces_fit_the_default_config(name: str, tiny_dataset: Path) -> None:
    loaded = load_space(name)
    check(loaded, tiny_dataset)
    study = optuna.create_study(directions=["minimize"] * len(loaded.objectives))
    fixed = config_values(RunConfig())
    for _ in range(30):
        trial_config(RunConfig(), loaded, loaded.draw(study.ask(), fixed))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": {}}, "s.yaml: parameters: the space is empty"),
        ({"parameters": {"stage1.clusters": {"type": "int", "low": 5, "high": 2}}}, "low 5 is above high 2"),
        ({"parameters": {"stage1.beta": {"type": "float", "low": 0, "high": 1, "log": True}}}, "log needs a low above"),
        (
            {"parameters": {"stage1.beta": {"type": "float", "low": 0.1, "high": 1, "log": True, "step": 0.1}}},
            "exclude",
        ),
        ({"parameters": {"stage1.clusters": {"type": "choice", "values": []}}}, "at least 1 item"),
        ({"parameters": {"stage1.clusters": {"type": "choice", "values": [2, 2]}}}, "a value occurs twice"),
        ({"parameters": {"stage1.clusters": {"type": "integer", "low": 1, "high": 2}}}, "'int', 'float', 'choice'"),
        ({"parameters": {"stage1.clusters": {"type": "int", "low": True, "high": 3}}}, "not true or false"),
        ({"budget": {"trials": True}}, "budget.trials: True: input should be a number, not true or false"),
        ({"budget": {"trials": 0}}, "budget.trials: a search needs at least 1 trial, not 0"),
        ({"sampler": "annealing"}, "sampler: 'annealing'"),
        ({"budgets": {}}, "budgets: unknown field"),
        ({"stages": 3}, "stages: 3"),
    ],
)
def test_malformed_spaces_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=r"^s\.yaml: ") as caught:
        space(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "rmsee"}, "metric rmsee: unknown; did you mean rmse?"),
        ({"metric": "rouge_l"}, "metric rouge_l: needs stage 2"),
        ({"metric": "user_ari"}, "planted truth"),
        ({"metric": ["rmse", "stage1.rmse"]}, "one or several different"),
        ({"metric": "stage1.auc"}, "is for implicit data"),
        ({"parameters": {"stage1.cluster": K}}, "stage1.cluster: unknown config field; did you mean stage1.clusters?"),
        ({"parameters": {"stage2.alpha": {"type": "float", "low": 0, "high": 1}}}, "ignored by trials that end with"),
        ({"parameters": {"runtime.workers": K}}, "not searched: it decides where"),
        ({"parameters": {"seed": K}}, "not searched: --seeds"),
        ({"parameters": {"stage1.negatives": K}}, "has ratings"),
        ({"parameters": {"stage1.clusters": {"type": "int", "low": 0, "high": 3}}}, "0: input should be greater"),
        ({"parameters": {"stage1.clusters": {"type": "choice", "values": [True, 2]}}}, "not true or false"),
        ({"budget": {"set": {"stage1.epochs": True}}}, "stage1.epochs: True: input should be a number, not true"),
        ({"parameters": {"stage1.clusters": {"type": "float", "low": 2, "high": 3}}}, "use type: int"),
        ({"parameters": {"stage1.dropout": {"type": "choice", "values": ["some"]}}}, "'some': input should be a valid"),
        (
            {"metric": "stage1.elbo", "parameters": {"stage1.likelihood": {"type": "choice", "values": ["gaussian"]}}},
            "means something else at each value of stage1.likelihood",
        ),
        ({"budget": {"set": {"stage1.epoch": 3}}}, "stage1.epoch: unknown"),
        ({"constraints": ["stage1.clusters is 3"]}, "expected FIELD <= FIELD"),
        ({"constraints": ["stage1.clusters <= stage1.beta"]}, "no value of 2..5 satisfies it when stage1.beta is 0.1"),
        ({"constraints": ["stage1.latent_size <= stage1.clusters"]}, "the left side must be a searched"),
        ({"sampler": "grid", "parameters": {"stage1.beta": {"type": "float", "low": 0, "high": 1}}}, "needs a step"),
        (
            {"sampler": "grid", "parameters": {"stage1.latent_size": {"type": "int", "low": 1, "high": 20_000}}},
            "sampler: a grid of more than 10000 points; take the sampler tpe or random",
        ),
        (
            {"parameters": {"stage1.mixture_restarts": K}, "budget": {"set": {"stage1.mixture_init": "random"}}},
            "ignored while stage1.mixture_init is random",
        ),
    ],
)
def test_spaces_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, tiny_dataset: Path) -> None:
    with pytest.raises(InputError, match=r"^s\.yaml: ") as caught:
        check(space(**changes), tiny_dataset)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "bertscore_f"}, "needs evaluation.bertscore_model"),
        ({"metric": "peter_bleu_4"}, "needs evaluation.style peter or both"),
        ({"metric": "rouge_l", "pruning": {}}, "not measured while stage 2 trains"),
        ({"metric": "stage1.rmse", "pruning": {}}, "not measured while stage 2 trains"),
        ({"metric": ["stage2.validation_loss", "parameters"], "pruning": {}}, "works with one metric"),
        ({"parameters": {"generation.beams": K}, "constraints": []}, "no metric of the space is measured on written"),
        ({"parameters": {"stage2.scratch.vocabulary": {"type": "int", "low": 300, "high": 900}}},
         "means something else at each value of stage2.scratch.vocabulary"),
        ({"parameters": EXPERTS["parameters"] | {"stage2.scratch.layers": K}, "budget": {"set": {
            "stage2.base_model": "somewhere"}}}, "ignored while stage2.base_model is somewhere"),
        ({"budget": {"set": {"stage2.experts.enabled": False}}, "parameters": {
            "stage2.experts.top_k": K}}, "ignored while stage2.experts.enabled is False"),
        ({"constraints": ["stage2.experts.top_k <= stage2.experts.count", "stage2.experts.top_k > stage2.batch_size"]},
         "no value of 1..6 satisfies it"),
    ],
)  # fmt: skip
def test_two_stage_spaces_that_do_not_fit_are_refused(
    changes: dict[str, Any], message: str, tiny_dataset: Path
) -> None:
    with pytest.raises(InputError) as caught:
        check(parse_space(EXPERTS | changes, "s.yaml"), tiny_dataset)
    assert message in str(caught.value)


def test_conditions_in_a_circle_are_refused(tiny_dataset: Path) -> None:
    parameters = {
        "stage1.clusters": K | {"when": {"stage1.encoder_layers": 2}},
        "stage1.encoder_layers": K | {"when": {"stage1.clusters": 2}},
    }
    with pytest.raises(InputError, match="form a circle"):
        check(space(parameters=parameters), tiny_dataset)


def test_draws_keep_conditions_and_constraints() -> None:
    experts = parse_space(EXPERTS, "s.yaml")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))  # unseeded, a rare top_k may stay away
    drawn = [experts.draw(study.ask(), {}) for _ in range(200)]
    on = [values for values in drawn if values["stage2.experts.enabled"]]
    assert on
    assert len(on) < len(drawn)
    assert all(values["stage2.experts.top_k"] <= values["stage2.experts.count"] for values in on)
    assert {values["stage2.experts.top_k"] for values in on} == {1, 2, 3, 4}  # 5 and 6 are beyond any count
    off = [values for values in drawn if not values["stage2.experts.enabled"]]
    assert all(set(values) == {"stage2.experts.enabled"} for values in off)


def test_points_are_all_there_are() -> None:
    points = parse_space(EXPERTS, "s.yaml").points({})
    assert points is not None
    assert len(points) == 1 + 2 + 4  # off; two experts with top 1-2; four with top 1-4
    assert space(parameters={"stage1.beta": {"type": "float", "low": 0, "high": 1}}).points({}) is None
    stepped = space(parameters={"stage1.beta": {"type": "float", "low": 0, "high": 0.3, "step": 0.1}}).points({})
    assert stepped is not None
    assert [point["stage1.beta"] for point in stepped] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_strict_and_lower_bounds() -> None:
    bounded = space(
        parameters={"stage1.clusters": K, "stage1.encoder_layers": {"type": "choice", "values": [2, 4]}},
        constraints=["stage1.clusters > stage1.encoder_layers"],
    )
    points = bounded.points({})
    assert points is not None
    assert {(point["stage1.encoder_layers"], point["stage1.clusters"]) for point in points} == {
        (2, 3), (2, 4), (2, 5), (4, 5),
    }  # fmt: skip


def test_trial_config_lays_values_over_cheaper_settings() -> None:
    cheap = space(budget={"set": {"stage1.epochs": 2, "stage1.beta": 0.5}})
    config = trial_config(RunConfig(), cheap, {"stage1.clusters": 4, "stage1.beta": 0.25})
    assert (config.stage1.clusters, config.stage1.epochs, config.stage1.beta) == (4, 2, 0.25)
    full = trial_config(RunConfig(), cheap, {"stage1.clusters": 4}, cheap=False)
    assert full == parse_config({"stage1": {"clusters": 4}}, "")


def test_unknown_space_names_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such space file, nor one of the shipped spaces experts, gates"):
        load_space("gate")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(InputError, match=r"broken.yaml: not valid YAML"):
        load_space(broken)
    broken.write_text(yaml.safe_dump(["a"]))
    with pytest.raises(InputError, match=r"broken.yaml: expected a search space"):
        load_space(broken)


def test_measures_have_directions_and_sources() -> None:
    assert find_measure("rmse", 1) == MEASURES["stage1.rmse"]
    assert find_measure("rmse", 2).source == "texts"
    assert MEASURES["stage1.elbo"].direction == "higher"
    assert MEASURES["div"].direction == "lower"
    assert curve_value("stage1.elbo", {"valid_reconstruction": -1.0, "valid_kl": 2.5}) == -3.5
    assert curve_value("stage1.rmse", {"valid_rmse": 0.5}) == 0.5
    assert curve_value("stage2.validation_loss", {"validation_loss": 2.0}) == 2.0
    valid = {"reconstruction": -1.0, "kl": 2.5, "rmse": 1, "mae": 0.5, "smallest_cluster_share": 0.1}
    values = stage1_values({"valid": valid, "test": {"rmse": 99.0}, "seconds": 3})
    assert values["stage1.elbo"] == -3.5
    assert 99.0 not in values.values()
    assert stage2_values({"validation_loss": None, "parameters": 7, "seconds": 1}) == {
        "stage2.seconds": 1.0,
        "parameters": 7.0,
    }
