"""Stage 2 and all that comes after it on tables that are no plain rows: trained, read back, served, exported."""

import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.scratch import scratch_folder
from helpers.serve_run import client
from helpers.stage2_runs import HALF_BATCHES, Trained, in_two_workers
from helpers.tiny import tiny

from gavamoe.artifacts.files import read_json
from gavamoe.artifacts.run import claim_run, open_run
from gavamoe.config.schema import GenerationConfig
from gavamoe.data.dataset import open_dataset
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.errors import InputError
from gavamoe.export.exported_run import export_run
from gavamoe.generation.forget import forget_users
from gavamoe.generation.generator import ExplanationGenerator
from gavamoe.generation.request import ExplanationRequest
from gavamoe.model.build import load_explainer
from gavamoe.model.tables.hashed import HashedTable
from gavamoe.model.tables.mapped import MappedTable
from gavamoe.model.tables.row_files import open_table
from gavamoe.runtime.context import LocalContext
from gavamoe.serving.backend import LocalBackend
from gavamoe.serving.settings import ServeArgs
from gavamoe.stage1.artifact import load_vae_gmm
from gavamoe.stage1.routes import route_pairs
from gavamoe.stage1.strangers.history import Entry
from gavamoe.stage1.train import train_stage1
from gavamoe.stage2.setup import prepare

HASHED = ("stage1.tables=hashed", "stage1.user_hash_rows=30", "stage1.item_hash_rows=25", "seed=4")
SHARDED = ("stage1.tables=sharded", "stage2.alpha=0", "seed=4")
PAIRS = [ExplanationRequest(user, item) for user, item in ((0, 0), (5, 3), (40, 20), (10**6, 2), (3, 10**6))]


@functools.cache
def trained(*overrides: str) -> Path:
    """A run folder with both stages of 12 steps."""
    work = scratch_folder("gavamoe-tables-")
    dataset = synthesize(work / "data", users=60, items=40, ratings=1500, groups=3, seed=0)
    config = tiny("generation.max_new_tokens=8", *overrides)
    run = work / "run"
    claim_run(run, config, dataset, open_dataset(dataset).fingerprint, continuing=False)
    train_stage1(config, dataset, run / "stage1", LocalContext())
    Trained(config, dataset, run / "stage1", run)
    return run


def test_both_parts_share_a_hashed_table_and_read_it_back() -> None:
    folder = trained(*HASHED) / "stage2"
    model, _ = load_explainer(folder)
    vae_gmm = load_vae_gmm(folder)
    for own, other, rows in (
        (model.user_embedding, vae_gmm.user_embedding, 30),
        (model.item_embedding, vae_gmm.item_embedding, 25),
    ):
        assert isinstance(own, HashedTable)
        assert own.weight.shape == (rows + 1, 16)
        assert torch.equal(own.weight, other.weight)
        ids = torch.arange(70)
        assert torch.equal(own.rows_of(ids), other.rows_of(ids))
    before = load_vae_gmm(trained(*HASHED) / "stage1").user_embedding
    assert torch.equal(before.rows_of(torch.arange(70)), vae_gmm.user_embedding.rows_of(torch.arange(70)))
    assert not torch.equal(before.weight, vae_gmm.user_embedding.weight), "stage 2 trains the table too"


def test_slots_enter_at_the_scale_of_words() -> None:
    run = trained(*HASHED)
    config = tiny("generation.max_new_tokens=8", *HASHED)
    explainer = prepare(config, run.parent / "data", run / "stage1").model.explainer
    users = explainer.embed(explainer.slots.vocabulary + torch.arange(59)[None])
    words = explainer.get_input_embeddings().weight
    assert users.square().mean().sqrt().item() == pytest.approx(words.square().mean().sqrt().item(), rel=0.02)


def test_a_hashed_run_explains_and_serves_the_same() -> None:
    run = trained(*HASHED)
    first, second = (ExplanationGenerator.load(run / "stage2") for _ in range(2))
    greedy = GenerationConfig(max_new_tokens=8, temperature=0)
    written = first.explain(PAIRS, greedy)
    assert written == second.explain(PAIRS, greedy)
    assert [each.user_known for each in written] == [True, True, True, False, True]
    users, items = (np.array([getattr(each, name) for each in PAIRS]) for name in ("user", "item"))
    routes = route_pairs(load_vae_gmm(run / "stage2"), users, items)
    assert [each.cluster for each in written] == routes.cluster.tolist()
    told = first.explain([ExplanationRequest(10**6, 2, history=(Entry(0, 5.0, None), Entry(1, 4.0, None)))], greedy)
    assert told[0].predicted_rating != written[3].predicted_rating

    backend = LocalBackend.load(ServeArgs(run=str(run / "stage2")))
    with client(backend) as http:
        catalog = first.catalog
        answer = http.post(
            "/v1/explain", json={"user": catalog.user_id(5), "item": catalog.item_id(3), "temperature": 0}
        )
    backend.writer.engine.close()
    assert answer.status_code == 200, answer.text
    assert answer.json()["predicted_rating"] == pytest.approx(written[1].predicted_rating, abs=1e-4)


@pytest.mark.parametrize("kind", [HASHED, SHARDED], ids=["hashed", "sharded"])
def test_an_export_has_a_users_vector_as_its_token(tmp_path: Path, kind: tuple[str, ...]) -> None:
    run = trained(*kind, "stage2.experts.conversion=shared")
    names = export_run(open_run(run), tmp_path / "out", "hf", gate=0)
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / names[0])
    model, _ = load_explainer(run / "stage2")
    token = model.user_token(7)
    with torch.no_grad():
        expected = model.user_projection(model.user_embedding(torch.tensor(7)))
    torch.testing.assert_close(plain.get_input_embeddings().weight[token], expected)


def test_nobody_can_be_taken_out_of_a_hashed_run() -> None:
    run = trained(*HASHED)
    user = open_dataset(run.parent / "data").catalog.user_id(3)
    before = (run / "stage2" / "artifact.json").read_bytes()
    with pytest.raises(InputError, match=r"stage1\.tables is hashed: users share the rows .*--drop-users"):
        forget_users(open_run(run), [user])
    assert (run / "stage2" / "artifact.json").read_bytes() == before


def test_stage_2_looks_sharded_tables_up_and_leaves_them_alone() -> None:
    run = trained(*SHARDED)
    folder = run / "stage2"
    model, _ = load_explainer(folder)
    vae_gmm, before = load_vae_gmm(folder), load_vae_gmm(run / "stage1")
    for name in ("user_embedding", "item_embedding"):
        tables = [getattr(each, name) for each in (model, vae_gmm, before)]
        assert all(isinstance(table, MappedTable) for table in tables)
        assert [table.folder for table in tables] == [folder, folder, run / "stage1"]
        rows = [table(torch.arange(table.ids + 1)) for table in tables]
        assert torch.equal(rows[0], rows[1])
        assert torch.equal(rows[1], rows[2])
    names = [name for module in (model, vae_gmm) for name in (*dict(module.named_parameters()), *module.state_dict())]
    assert "user_projection.weight" in names
    assert not any("user_embedding" in name or "item_embedding" in name for name in names)
    users = model.embed(model.slots.vocabulary + torch.arange(59)[None])
    assert users.square().mean() > 0


def test_a_sharded_run_explains_and_serves_the_same() -> None:
    run = trained(*SHARDED)
    generator = ExplanationGenerator.load(run / "stage2")
    greedy = GenerationConfig(max_new_tokens=8, temperature=0)
    written = generator.explain(PAIRS, greedy)
    users, items = (np.array([getattr(each, name) for each in PAIRS]) for name in ("user", "item"))
    routes = route_pairs(load_vae_gmm(run / "stage1"), users, items)
    assert [each.cluster for each in written] == routes.cluster.tolist()
    assert [each.predicted_rating for each in written] == pytest.approx(routes.rating.tolist(), abs=1e-3)
    told = generator.explain([ExplanationRequest(10**6, 2, history=(Entry(0, 5.0, None),))], greedy)
    assert told[0].predicted_rating != written[3].predicted_rating

    backend = LocalBackend.load(ServeArgs(run=str(run / "stage2")))
    catalog = generator.catalog
    with client(backend) as http:
        asked = {"user": catalog.user_id(5), "item": catalog.item_id(3), "temperature": 0}
        answer = http.post("/v1/explain", json=asked)
    backend.writer.engine.close()
    assert answer.json()["predicted_rating"] == pytest.approx(written[1].predicted_rating, abs=1e-4)


def test_a_user_is_taken_out_of_mapped_files(tmp_path: Path) -> None:
    run = shutil.copytree(trained(*SHARDED), tmp_path / "run")
    user = open_dataset(trained(*SHARDED).parent / "data").catalog.user_id(3)
    before = [np.array(part) for part in open_table(run / "stage2", "user_embedding", 60, 16)]
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    assert forget_users(open_run(run), [user]).tables == 4
    for stage in ("stage1", "stage2"):
        [after] = open_table(run / stage, "user_embedding", 60, 16)
        assert np.array_equal(after[3], before[0][-1])
        assert not np.array_equal(before[0][3], before[0][-1])
        assert np.array_equal(np.delete(after, 3, axis=0), np.delete(before[0], 3, axis=0))
    assert len(ExplanationGenerator.load(run / "stage2").explain(PAIRS, GenerationConfig(max_new_tokens=4))) == 5


def test_a_model_opened_without_its_files_says_so() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(trained(*SHARDED) / "stage2")
    with pytest.raises(InputError, match="user_embedding: its rows are in files, which were not opened"):
        model.embed(torch.tensor([[model.slots.vocabulary]]))


def test_sharded_tables_are_not_trained_in_stage_2() -> None:
    with pytest.raises(InputError, match=r"stage1\.tables: stage 2 looks sharded tables up .* set stage2\.alpha to 0"):
        tiny("stage1.tables=sharded")
    run = trained(*SHARDED)
    with pytest.raises(InputError, match=r"has sharded tables, the config has stage1\.tables replicated; set it"):
        prepare(tiny(), run.parent / "data", run / "stage1")
    run = trained(*HASHED)
    with pytest.raises(InputError, match=r"has hashed tables, the config has stage1\.tables sharded"):
        prepare(tiny(*SHARDED), run.parent / "data", run / "stage1")


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_two_deepspeed_workers_look_tables_up(tmp_path: Path, zero_stage: int) -> None:
    """ZeRO shards all parameters, and tables are none."""
    run = trained(*SHARDED)
    config = tiny(*SHARDED, *HALF_BATCHES, f"stage2.zero_stage={zero_stage}")
    ranks = in_two_workers(config, run.parent / "data", run / "stage1", tmp_path / "work")
    alone = read_json(run / "stage2" / "metrics.json")
    losses = [each["validation_losses"][-1]["loss"] for each in (ranks[0]["metrics"], alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    models = [load_explainer(folder / "stage2")[0] for folder in (tmp_path / "work", run)]
    rows = [model.user_embedding(torch.arange(60)) for model in models]
    assert torch.equal(rows[0], rows[1])
