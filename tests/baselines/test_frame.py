"""What all trained baselines share: training, checkpoints, folder, answers, their part in a comparison."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import tiny

from gavamoe.artifacts.manifest import MANIFEST
from gavamoe.baselines.registry import BASELINES
from gavamoe.baselines.scores import evaluate_any
from gavamoe.baselines.training import train_baseline
from gavamoe.baselines.writing import BaselineWriter
from gavamoe.config.schema import GenerationConfig, RunConfig
from gavamoe.data.dataset import Dataset, open_dataset
from gavamoe.errors import InputError
from gavamoe.evaluation.reference_scores import BIAS_FILE, BiasModel
from gavamoe.generation.evidence.pair_features import FEATURES_FILE, PairFeatures
from gavamoe.generation.request import ExplanationRequest
from gavamoe.pipeline import train_run
from gavamoe.runtime.context import LocalContext
from gavamoe.stage2.tokenized_rows import rating_scale

SMALL = (
    "baselines.peter.embedding_size=16", "baselines.peter.feed_forward=32",
    "baselines.nete.embedding_size=12", "baselines.nete.hidden_size=16", "baselines.nete.learning_rate=1e-2",
    "baselines.pepler.learning_rate=1e-2", "baselines.cier.embedding_size=16", "baselines.cier.learning_rate=1e-2",
    "baselines.g_refer.scratch_learning_rate=1e-2", "baselines.g_refer.quoted_tokens=8",
    "baselines.xrec.learning_rate=1e-2", "baselines.xrec.graph.epochs=4",
    "baselines.pevae.width=16", "baselines.pevae.learning_rate=1e-2",
    "generation.max_new_tokens=8",
    "evaluation.rows=12",
)  # fmt: skip
ALL = sorted(BASELINES)
NEEDS_RATINGS = ("cier", "cier-plus")


def small(system: str, *overrides: str) -> RunConfig:
    return tiny(f"system={system}", *SMALL, *overrides)


def reads_rating(system: str) -> bool:
    """Whether the system's prompts say the sentiment of the rating."""
    return BASELINES[system].features and BASELINES[system].load().asks_rating


@pytest.fixture(scope="module")
def trained(planted: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each baseline after a short training, its checkpoints beside it."""
    folders = {}
    for system in ALL:
        folders[system] = tmp_path_factory.mktemp(system) / "baseline"
        context = LocalContext(storage=folders[system].parent / "checkpoints")
        train_baseline(small(system), planted.path, folders[system], context)
    return folders


@pytest.mark.parametrize("system", ALL)
def test_training_lowers_the_loss(system: str, trained: dict[str, Path]) -> None:
    metrics = json.loads((trained[system] / "metrics.json").read_text())
    losses = [point["loss"] for point in metrics["validation_losses"]]
    assert losses[-1] < losses[0] < math.log(400)
    assert metrics["kept_step"] == metrics["steps"] == 12
    assert 0 < metrics["trained_parameters"] <= metrics["parameters"]


@pytest.mark.parametrize("system", ALL)
def test_a_resumed_training_is_the_same(
    system: str, trained: dict[str, Path], planted: Dataset, tmp_path: Path
) -> None:
    checkpoint = trained[system].parent / "checkpoints" / "checkpoint_000000"
    resumed = LocalContext(resume_from=checkpoint)
    train_baseline(small(system), planted.path, tmp_path / "resumed", resumed)
    for name in ("weights.safetensors", "spec.json"):
        assert (tmp_path / "resumed" / name).read_bytes() == (trained[system] / name).read_bytes()
    assert min(line["step"] for line in resumed.lines) > 6
    with pytest.raises(InputError, match="the checkpoint has seed 0, this run has 1"):
        train_baseline(small(system, "seed=1"), planted.path, tmp_path / "other", resumed)


@pytest.mark.parametrize("system", ALL)
def test_it_answers_as_an_explainer(system: str, planted: Dataset, trained: dict[str, Path]) -> None:
    generation = small(system).generation
    writer = BaselineWriter.load(trained[system])
    requests = [
        ExplanationRequest(user=0, item=1, rating=4.0, features=("battles",)),
        ExplanationRequest(user=2, item=3),
        ExplanationRequest(user=10_000, item=10_000, features=()),
    ]
    together = writer.explain(requests, generation)
    alone = [writer.explain([request], generation)[0] for request in requests]
    assert [said.text for said in together] == [said.text for said in alone]
    given, predicted, unknown = together
    assert (given.rating, given.rating_given) == (4.0, True)
    assert given.features == (("battles",) if BASELINES[system].features else ())
    if BASELINES[system].features:
        assert predicted.features == PairFeatures.read(planted).rank(2, 3, [1.0], len(predicted.features)) != ()
    assert not unknown.user_known
    if unknown.predicted_rating is not None:  # else the system predicts none
        assert np.isfinite(unknown.predicted_rating)
    if unknown.predicted_rating is None and not reads_rating(system):
        assert predicted.rating is None
    else:
        assert predicted.rating in (planted.rating_values or ())
    assert (trained[system] / FEATURES_FILE).is_file() == BASELINES[system].features
    with pytest.raises(InputError, match="rating 77"):
        writer.explain([ExplanationRequest(user=0, item=0, rating=77.0)], generation)


@pytest.mark.parametrize("system", sorted(system for system in BASELINES if BASELINES[system].features))
def test_a_prompt_that_says_the_rating_says_one_where_none_is_given(
    system: str, planted: Dataset, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, asked = BaselineWriter.load(trained[system]), []
    prefixes = writer.model.prefixes
    monkeypatch.setattr(writer.model, "prefixes", lambda c, reader: asked.append(c.ratings) or prefixes(c, reader))
    requests = [ExplanationRequest(2, 3), ExplanationRequest(10_000, 10_000), ExplanationRequest(2, 3, rating=1.0)]
    known, stranger, told = writer.explain(requests, small(system).generation)
    (ratings,) = asked
    assert ratings[2] == told.rating == 1.0
    assert (trained[system] / BIAS_FILE).is_file() == reads_rating(system)
    if not reads_rating(system):
        assert np.isnan(ratings[:2]).all()
        return
    bias = BiasModel.fit(planted.arrays("train"), planted.catalog.known_users, planted.catalog.known_items)
    assert ratings[:2] == pytest.approx([bias.mean + bias.user_U[2] + bias.item_I[3], bias.mean])
    assert [known.rating, stranger.rating] == [rating_scale(planted).nearest(float(r)) for r in ratings[:2]]


def test_biases_of_other_users_are_refused(trained: dict[str, Path], planted: Dataset, tmp_path: Path) -> None:
    few = planted.arrays("train")
    BiasModel.fit(few, planted.catalog.known_users + 1, planted.catalog.known_items).save(tmp_path)
    with pytest.raises(InputError, match="holds no biases of this artifact's users and items"):
        BiasModel.load(tmp_path, planted.catalog)
    (tmp_path / BIAS_FILE).write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"rating_bias.safetensors: not readable"):
        BiasModel.load(tmp_path, planted.catalog)


def test_an_artifact_of_before_names_the_items_usual_features(
    planted: Dataset, trained: dict[str, Path], tmp_path: Path
) -> None:
    old = shutil.copytree(trained["peter-plus"], tmp_path / "old")
    (old / FEATURES_FILE).unlink()
    listed = json.loads((old / MANIFEST).read_text())
    del listed["files"][FEATURES_FILE]
    (old / MANIFEST).write_text(json.dumps(listed))
    [said] = BaselineWriter.load(old).explain([ExplanationRequest(user=2, item=3)], small("peter-plus").generation)
    assert said.features == planted.catalog.usual_features(2, 3, len(said.features)) != ()


@pytest.mark.parametrize("system", ALL)
def test_decoding_is_the_explainers(system: str, planted: Dataset, trained: dict[str, Path]) -> None:
    """A prompt's words may be said all the same, a text's own not again."""
    plain = small(system, "generation.max_new_tokens=12").generation
    once = plain.model_copy(update={"no_repeat_ngram": 1})
    never = plain.model_copy(update={"repetition_penalty": 100.0})
    long = plain.model_copy(update={"min_new_tokens": 12})
    writer = BaselineWriter.load(trained[system])
    requests = [ExplanationRequest(user=0, item=1, rating=4.0, features=("battles",)), ExplanationRequest(1, 2)]

    def pieces(generation: GenerationConfig) -> list[list[int]]:
        return [writer.reader.tokenizer(said.text)["input_ids"] for said in writer.explain(requests, generation)]

    assert any(len(set(each)) < len(each) for each in pieces(long))
    assert all(len(set(each)) == len(each) for each in [*pieces(once), *pieces(never)])
    assert [said.new_tokens for said in writer.explain(requests, long)] == [12, 12]


def test_another_folder_or_system_is_refused_in_one_line(trained: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no baseline artifact here"):
        BaselineWriter.load(tmp_path)
    manifest = json.loads((trained["peter"] / "artifact.json").read_text())
    manifest["details"]["system"] = "nobody"
    folder = tmp_path / "baseline"
    folder.mkdir()
    for file in trained["peter"].rglob("*"):
        if file.is_file() and file.name != "artifact.json":
            target = folder / file.relative_to(trained["peter"])
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
    (folder / "artifact.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="system nobody: no baseline; known are peter"):
        BaselineWriter.load(folder)


@pytest.mark.parametrize("system", [system for system in ALL if system not in NEEDS_RATINGS])
def test_implicit_data_have_no_rating_to_learn(system: str, implicit_dataset: Path, tmp_path: Path) -> None:
    data = open_dataset(implicit_dataset)
    metrics = train_baseline(small(system), data.path, tmp_path / "baseline", LocalContext())
    assert math.isfinite(metrics["validation_loss"])
    writer = BaselineWriter.load(tmp_path / "baseline")
    assert writer.explain([ExplanationRequest(user=0, item=0)], small(system).generation)[0].rating is None


@pytest.mark.parametrize("system", NEEDS_RATINGS)
def test_implicit_data_are_refused_in_one_line(system: str, implicit_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^[^\n]*: the data have no ratings, which [^\n]*; take pepler$"):
        train_baseline(small(system), implicit_dataset, tmp_path / "baseline", LocalContext())
    assert not (tmp_path / "baseline").exists()


def test_a_run_of_a_baseline_is_a_run_like_any_other(planted: Dataset, tmp_path: Path) -> None:
    run, config = tmp_path / "run", small("peter-plus")
    metrics = train_run(config, planted.path, run)
    assert metrics["baseline"]["steps"] == 12
    scores = evaluate_any(run, dataset=planted.path)
    assert scores["rows"] == 12
    assert json.loads((run / "evaluation" / "metrics.json").read_text())["metrics"] == scores["metrics"]
    with pytest.raises(InputError, match="--stage 2: peter-plus has no stages"):
        train_run(config, planted.path, tmp_path / "other", stage="2")
    with pytest.raises(InputError, match=r"was started with system=peter-plus, now peter;"):
        train_run(small("peter"), planted.path, run, resume=True)
    with pytest.raises(InputError, match=r"was started with baselines\.peter\.layers=2, now 1;"):
        train_run(small("peter-plus", "baselines.peter.layers=1"), planted.path, run, resume=True)
