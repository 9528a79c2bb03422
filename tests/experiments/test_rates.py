"""The choice of learning rates in a comparison: equally many values a system, by validation loss."""

from contextlib import nullcontext
from pathlib import Path

import pytest
from helpers.tiny import tiny

from gavamoe.artifacts.files import read_json
from gavamoe.artifacts.run import claim_run
from gavamoe.baselines.training import train_baseline
from gavamoe.config.files import load_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset, open_dataset
from gavamoe.errors import InputError
from gavamoe.evaluation.comparison_files import markdown
from gavamoe.experiments.ablate import run_ablation
from gavamoe.experiments.rates import choose_rate, chosen_rate, parse_factors, scaled_rates
from gavamoe.experiments.variants import System, find_systems
from gavamoe.runtime.context import LocalContext


def test_every_rate_of_a_system_is_scaled() -> None:
    config = load_config("quickstart", ["stage2.learning_rate=0.004"])
    assert scaled_rates(config, 0.5) == ["stage2.learning_rate=0.002"]
    both = load_config("quickstart", ["stage2.learning_rate=0.004", "stage2.expert_learning_rate=0.008"])
    assert scaled_rates(both, 2) == ["stage2.learning_rate=0.008", "stage2.expert_learning_rate=0.016"]
    pepler = load_config("quickstart", ["system=pepler-plus", "baselines.pepler.prompt_learning_rate=0.25"])
    assert scaled_rates(pepler, 2) == [
        "baselines.pepler.prompt_learning_rate=0.5",
        "baselines.pepler.learning_rate=0.002",
    ]


@pytest.mark.parametrize("text", ["1", "1,1", "0,1", "1,x", "1,inf", "1,nan", "1,-2", ""])
def test_what_are_no_factors_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"two or more different factors above 0, such as 0\.3,1,3"):
        parse_factors(text)


def test_factors_are_sorted() -> None:
    assert parse_factors("3, 1,0.3") == [0.3, 1, 3]


def test_the_choice_is_kept_and_the_others_are_removed(tmp_path: Path) -> None:
    [system] = find_systems(["peter"])
    config, trained = tiny("system=peter"), []

    def train(system: System, config: RunConfig, run: Path) -> None:
        rate = config.baselines.peter.learning_rate
        trained.append(rate)
        (run / "baseline").mkdir(parents=True)
        (run / "baseline" / "metrics.json").write_text(f'{{"validation_loss": {abs(rate - 0.001)}}}')

    found = choose_rate(system, config, tmp_path, [0.5, 1, 2], train)
    assert (found.factor, trained, found.at_the_edge) == (1, [0.0005, 0.001, 0.002], False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rates.json", "seed-0"]
    assert choose_rate(system, config, tmp_path, [2, 1, 0.5], train) == found
    assert len(trained) == 3
    with pytest.raises(InputError, match=r"chosen among 0\.5, 1, 2, not 1, 4"):
        choose_rate(system, config, tmp_path, [1, 4], train)
    assert len(trained) == 3


@pytest.mark.parametrize(("best", "factor", "left"), [(0.001, 1, ["seed-0", "seed-1"]), (0.004, 4, ["seed-0"])])
def test_a_run_from_before_rates_were_compared_is_that_of_factor_1(
    tmp_path: Path, best: float, factor: float, left: list[str]
) -> None:
    [system] = find_systems(["peter"])
    config, runs = tiny("system=peter"), []

    def train(system: System, config: RunConfig, run: Path) -> None:
        runs.append(run.name)
        (run / "baseline").mkdir(parents=True, exist_ok=True)
        loss = abs(config.baselines.peter.learning_rate - best)
        (run / "baseline" / "metrics.json").write_text(f'{{"validation_loss": {loss}}}')

    for seed in ("seed-0", "seed-1"):
        (tmp_path / seed).mkdir()
    with pytest.raises(InputError, match="seed-0: was trained at the config's own rate; name the factor 1 too"):
        choose_rate(system, config, tmp_path, [0.25, 4], train)
    assert choose_rate(system, config, tmp_path, [0.25, 1, 4], train).factor == factor
    assert runs == ["rate-0.25", "seed-0", "rate-4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rates.json", *left]


def test_more_factors_are_tried_where_the_best_was_the_last(tmp_path: Path) -> None:
    [system] = find_systems(["peter"])
    config, trained, best = tiny("system=peter"), [], 0.004

    def train(system: System, config: RunConfig, run: Path) -> None:
        trained.append(config.baselines.peter.learning_rate)
        (run / "baseline").mkdir(parents=True)
        (run / "baseline" / "metrics.json").write_text(f'{{"validation_loss": {abs(trained[-1] - best)}}}')

    assert choose_rate(system, config, tmp_path, [1, 2], train).factor == 2
    (tmp_path / "seed-1").mkdir()
    assert chosen_rate(tmp_path, [1, 2, 4]) is None
    found = choose_rate(system, config, tmp_path, [1, 2, 4], train)
    assert (found.factor, sorted(found.losses), trained) == (4, [1, 2, 4], [0.001, 0.002, 0.004])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rates.json", "seed-0"]  # seed 1 was of factor 2
    (tmp_path / "seed-1").mkdir()
    assert choose_rate(system, config, tmp_path, [1, 2, 4, 8], train).factor == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rates.json", "seed-0", "seed-1"]
    assert read_json(tmp_path / "seed-0" / "baseline" / "metrics.json")["validation_loss"] == 0


def in_this_process(config: RunConfig, dataset: Path, folder: Path, **rest: object) -> None:
    """A run of a baseline without Ray, which takes half a minute for each."""
    claim_run(folder, config, dataset, open_dataset(dataset).fingerprint, continuing=True)
    if not (folder / "baseline").exists():
        train_baseline(config, dataset, folder / "baseline", LocalContext())


def test_a_comparison_trains_all_seeds_at_the_chosen_rate(
    planted: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gavamoe.experiments.ablate.train_run", in_this_process)
    monkeypatch.setattr("gavamoe.experiments.ablate.ray_session", lambda _: nullcontext())
    config = tiny("evaluation.rows=12", "evaluation.probe_rows=0", "stage2.max_steps=6", "generation.max_new_tokens=4")
    config = config.model_copy(update={"runtime": config.runtime.model_copy(update={"workers": 1})})
    asked = {"only": ["peter"], "seeds": 2, "rates": [0.01, 1]}
    run_ablation(config, planted.path, tmp_path, only=["peter"], seeds=1)  # at the config's own rate, which is kept
    before = (tmp_path / "peter" / "seed-0" / "baseline" / "artifact.json").read_text()
    found = run_ablation(config, planted.path, tmp_path, **asked)
    assert found.rates["peter"].factor == 1  # a hundredth learns next to nothing
    assert found.rates["peter"].at_the_edge
    assert [outcome.seed for outcome in found.outcomes] == [0, 1]
    assert all(outcome.scores["validation_loss"] and outcome.scores["rmse"] for outcome in found.outcomes)
    assert "learning rate, peter: times 1 (validation loss 0.01: " in markdown(found)
    kept = read_json(tmp_path / "peter" / "seed-0" / "baseline" / "metrics.json")
    assert kept["validation_loss"] == found.rates["peter"].losses[1]
    artifact = tmp_path / "peter" / "seed-0" / "baseline" / "artifact.json"
    made = artifact.read_text()
    assert made == before
    assert run_ablation(config, planted.path, tmp_path, **asked) == found
    assert artifact.read_text() == made
    wider = run_ablation(config, planted.path, tmp_path, **(asked | {"rates": [0.001, 0.01, 1]}))
    assert artifact.read_text() == made
    assert wider.outcomes == found.outcomes
    assert sorted(wider.rates["peter"].losses) == [0.001, 0.01, 1]
