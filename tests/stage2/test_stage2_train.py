"""Stage 2's loop and its artifact: what a run logs and learns, what it leaves, what it refuses."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.stage2_runs import FILES, Trained
from helpers.tiny import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from gavamoe.artifacts.manifest import read_manifest
from gavamoe.data.dataset import open_dataset
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.errors import InputError, RunError
from gavamoe.generation.authorship import SingleAuthors
from gavamoe.generation.detokenize import clean_text
from gavamoe.model.build import load_explainer
from gavamoe.model.explainer import GavamoeForCausalLM
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.artifact import load_vae_gmm
from gavamoe.stage1.routes import read_routes, route_pairs
from gavamoe.stage2.model_card import single_authors
from gavamoe.stage2.schedule import Rates, rate_at, rates_at
from gavamoe.stage2.setup import Setup, prepare
from gavamoe.stage2.train import train_stage2

pytestmark = pytest.mark.usefixtures("extensions_dir")


@pytest.fixture
def setup(tiny_dataset: Path, stage1: Path) -> Setup:
    return prepare(tiny(), tiny_dataset, stage1)


def test_a_run_learns_and_logs(torch_run: Trained) -> None:
    steps = [(line["phase"], line["step"]) for line in torch_run.context.lines]
    assert steps == [("valid", 0), ("train", 6), ("valid", 6), ("train", 10), ("train", 12), ("valid", 12)]
    first, middle, last = (line["validation_loss"] for line in torch_run.lines("valid"))
    assert first == pytest.approx(math.log(400), rel=0.1)
    assert first > middle > last
    train = torch_run.lines("train")[0]
    assert train["loss"] == pytest.approx(0.1 * train["elbo_loss"] + 0.9 * train["explanation_loss"], rel=1e-5)
    assert train["elbo_loss"] == pytest.approx(0.1 * train["kl"] - train["reconstruction"], rel=1e-4)
    assert torch_run.metrics["validation_loss"] == last
    assert torch_run.metrics["validation_loss_at_start"] == first
    assert torch_run.metrics["validation_perplexity"] == pytest.approx(math.exp(last))


def test_the_artifact_is_complete_and_plain_transformers_reads_it(
    torch_run: Trained, tiny_dataset: Path, stage1: Path
) -> None:
    out = torch_run.out
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == FILES
    manifest = read_manifest(out, "stage2")
    assert manifest.inputs == {
        "dataset": open_dataset(tiny_dataset).fingerprint,
        "stage1": read_manifest(stage1, "stage1").fingerprint,
    }
    assert json.loads((out / "metrics.json").read_text()) == torch_run.metrics
    model = AutoModelForCausalLM.from_pretrained(out)
    assert isinstance(model, GavamoeForCausalLM)
    assert len(AutoTokenizer.from_pretrained(out)) == model.config.vocab_size
    assert torch.equal(model.user_embedding.weight, load_vae_gmm(out).user_embedding.weight)
    card = (out / "README.md").read_text()
    assert f"| validation loss (nats per token) | {torch_run.metrics['validation_loss']:.3f} |" in card
    assert "4 experts per block (shared), top 2, 3 gates" in card


def test_the_artifact_knows_the_texts_of_one_author(torch_run: Trained, tiny_dataset: Path) -> None:
    users: dict[str, set[int]] = {}
    for row in open_dataset(tiny_dataset).table("train", ["user", "text"]).to_pylist():
        users.setdefault(row["text"], set()).add(row["user"])
    authors = SingleAuthors.load(torch_run.out)
    assert {len(of_text) for of_text in users.values()} > {1, 2}
    for text, of_text in users.items():
        assert authors.another_wrote(text, user=-2) == (len(of_text) == 1)
        assert not any(authors.another_wrote(text, user) for user in of_text)


def test_texts_longer_than_the_model_learns_are_known_as_it_learns_them(tiny_dataset: Path, stage1: Path) -> None:
    setup = prepare(tiny("stage2.prompt.max_explanation_tokens=7"), tiny_dataset, stage1)
    authors = single_authors(setup)
    written = setup.data.table("train", ["user", "text"]).to_pylist()
    learned = [clean_text(setup.tokenizer, setup.train.answers[row].tolist()) for row in range(len(written))]
    users: dict[str, set[int]] = {}
    for text, row in zip(learned, written, strict=True):
        users.setdefault(text, set()).add(row["user"])
    alone = {text for text, of_text in users.items() if len(of_text) == 1}
    assert any(text != row["text"] for text, row in zip(learned, written, strict=True) if text in alone)
    assert all(authors.another_wrote(text, user=-2) for text in alone)


def test_routes_in_the_artifact_are_those_of_its_own_parameters(torch_run: Trained, tiny_dataset: Path) -> None:
    pairs = open_dataset(tiny_dataset).arrays("test")
    saved = read_routes(torch_run.out / "routes.parquet", "test")
    again = route_pairs(load_vae_gmm(torch_run.out), pairs.user, pairs.item)
    assert (saved.cluster == again.cluster).all()
    np.testing.assert_array_equal(saved.responsibilities, again.responsibilities)


def test_clusters_decide_what_is_written(torch_run: Trained, setup: Setup) -> None:
    """A row's loss depends on its own cluster, and on no other row's."""
    model, _ = load_explainer(torch_run.out)
    with torch.no_grad():  # experts of the shared conversion start at zero output
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.normal_(std=0.5)
    batch = setup.train.collate(np.arange(4), setup.clusters["train"], setup.pad)
    shape = {name: batch[name] for name in ("input_ids", "attention_mask")}
    one = model(**shape, cluster_ids=torch.tensor([0, 1, 2, 0])).logits
    other = model(**shape, cluster_ids=torch.tensor([0, 1, 0, 0])).logits
    torch.testing.assert_close(one[[0, 1, 3]], other[[0, 1, 3]], rtol=1e-4, atol=1e-4)
    assert (one[2] - other[2]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("cosine", [1 / 3, 2 / 3, *(0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6))]),
    ],
)
def test_learning_rate_warms_up_then_follows_the_schedule(schedule: str, expected: list[float]) -> None:
    config = tiny(f"stage2.schedule={schedule}", "stage2.warmup_share=0.25").stage2
    assert [rate_at(step, 8, config) for step in range(8)] == pytest.approx(expected)


def test_the_shared_model_first_then_the_routed_experts_each_on_a_schedule_of_its_own() -> None:
    config = tiny("stage2.schedule=linear", "stage2.warmup_share=0", "stage2.shared_first=0.6").stage2
    first, then = [(1 - step / 6, 0.0) for step in range(6)], [(0.0, 1 - step / 4) for step in range(4)]
    assert [vars(rates_at(step, 10, config)) for step in range(10)] == [
        {"shared": pytest.approx(shared), "routed": pytest.approx(routed)} for shared, routed in first + then
    ]
    assert rates_at(3, 10, tiny().stage2) == Rates(*[rate_at(3, 10, tiny().stage2)] * 2)


def test_bf16_and_gradient_checkpointing_stay_close(
    torch_run: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    checkpointed = Trained(tiny("stage2.gradient_checkpointing=true"), tiny_dataset, stage1, tmp_path / "a")
    assert checkpointed.metrics["validation_loss"] == pytest.approx(torch_run.metrics["validation_loss"], rel=1e-5)
    narrow = Trained(tiny("stage2.precision=bf16"), tiny_dataset, stage1, tmp_path / "b")
    assert narrow.metrics["validation_loss"] == pytest.approx(torch_run.metrics["validation_loss"], rel=0.02)
    assert narrow.metrics["validation_loss"] != torch_run.metrics["validation_loss"]
    assert {tensor.dtype for tensor in narrow.weights().values()} == {torch.float32}


def test_router_losses_are_logged_and_weigh_in(tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    run = Trained(tiny("stage2.experts.load_balance_weight=0.5"), tiny_dataset, stage1, tmp_path)
    for line in run.lines("train"):
        assert 0.5 <= line["router_loss"] < 1.0  # 0.5 when every gate uses its experts evenly
        text = line["explanation_loss"] + line["router_loss"]
        assert line["loss"] == pytest.approx(0.1 * line["elbo_loss"] + 0.9 * text, rel=1e-4)


def test_stage_1_of_another_dataset_is_refused(stage1: Path, tmp_path: Path) -> None:
    other = synthesize(tmp_path / "other", users=60, items=40, ratings=1500, groups=3, seed=1)
    with pytest.raises(InputError, match=r"stage1: was trained on a dataset other than .*other"):
        train_stage2(tiny(), other, stage1, tmp_path / "stage2", LocalContext())
    assert not (tmp_path / "stage2").exists()


def test_other_clusters_than_stage_1_are_refused(tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has 3 clusters, the config has stage1\.clusters 4"):
        train_stage2(tiny("stage1.clusters=4"), tiny_dataset, stage1, tmp_path / "stage2", LocalContext())


def test_an_existing_folder_is_refused_before_training(torch_run: Trained, tiny_dataset: Path, stage1: Path) -> None:
    context = LocalContext()
    with pytest.raises(InputError, match="stage2: already exists"):
        train_stage2(tiny(), tiny_dataset, stage1, torch_run.out, context)
    assert context.lines == []


def test_a_loss_that_is_not_finite_stops_the_run(tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    wild = tiny("stage2.learning_rate=1e38", "stage2.clip_norm=1e30", "stage2.warmup_share=0")
    with pytest.raises(RunError, match="lower the learning rates"):
        train_stage2(wild, tiny_dataset, stage1, tmp_path / "stage2", LocalContext())
    assert list(tmp_path.iterdir()) == []
