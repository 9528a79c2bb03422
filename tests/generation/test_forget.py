"""Users taken out of a run: nothing of theirs is left, the run still explains, and what stays is what it was."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from helpers.cli import Runner
from helpers.stage2_runs import Trained
from helpers.tiny import tiny
from safetensors.torch import load_file

from gavamoe.artifacts.manifest import read_manifest
from gavamoe.artifacts.run import claim_run, open_run
from gavamoe.config.schema import GenerationConfig
from gavamoe.data.catalog import Catalog
from gavamoe.data.dataset import open_dataset
from gavamoe.errors import InputError
from gavamoe.evaluation.evaluate import GENERATIONS_FILE, evaluate_run
from gavamoe.evaluation.losses.row_losses import LOSSES_FILE
from gavamoe.generation.authorship import AUTHORS_FILE, NOBODY, SingleAuthors
from gavamoe.generation.forget import forget_users
from gavamoe.generation.generator import ExplanationGenerator
from gavamoe.generation.request import ExplanationRequest

TABLE = "user_embedding.weight"


@pytest.fixture(scope="module")
def trained(tiny_dataset: Path, stage1: Path, torch_run: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained and evaluated run."""
    run = tmp_path_factory.mktemp("forget") / "run"
    config = tiny("generation.max_new_tokens=8", "evaluation.probe_rows=4")
    claim_run(run, config, tiny_dataset, open_dataset(tiny_dataset).fingerprint, continuing=False)
    shutil.copytree(stage1, run / "stage1")
    shutil.copytree(torch_run.out, run / "stage2")
    evaluate_run(run, rows=40, protocol="both", row_losses=True)
    (run / "report.html").write_text(str(rows(run, f"evaluation/{GENERATIONS_FILE}")))
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return shutil.copytree(trained, tmp_path / "run")


def rows(run: Path, name: str) -> list[dict[str, object]]:
    return pq.read_table(run / name).to_pylist()


def test_nothing_of_a_user_is_left_and_the_rest_is_as_it_was(run: Path, trained: Path) -> None:
    before = Catalog.load(run / "stage2" / "catalog")
    user = str(rows(run, f"evaluation/{GENERATIONS_FILE}")[0]["user"])
    index = before.user_index(user)
    assert index is not None
    assert index < before.known_users
    theirs = [row for row in rows(run, "stage1/routes.parquet") if row["user"] == index]
    written = [row for row in rows(run, f"evaluation/{GENERATIONS_FILE}") if row["user"] == user]

    removed = forget_users(open_run(run), [user])

    assert removed == (1, len(theirs), 2 * len(written), 5)
    assert theirs
    for name in ("stage1/routes.parquet", "stage2/routes.parquet"):
        assert rows(run, name) == [row for row in rows(trained, name) if row["user"] != index]
    for name in (f"evaluation/{GENERATIONS_FILE}", f"evaluation/{LOSSES_FILE}"):
        assert rows(run, name) == [row for row in rows(trained, name) if row["user"] != user]
    for name in ("stage1/vae_gmm", "stage2/vae_gmm", "stage2/model"):
        now, once = (load_file(folder / f"{name}.safetensors") for folder in (run, trained))
        for table in (TABLE, "user_bias") if "vae_gmm" in name else (TABLE,):
            assert torch.equal(now[table][index], once[table][-1])
            assert not torch.equal(now[table][index], once[table][index])
            now[table][index] = once[table][index]
        assert all(torch.equal(now[key], once[key]) for key in once)
    for path in run.rglob("*"):
        if path.is_file() and path.suffix != ".jsonl":
            assert user.encode() not in path.read_bytes(), path
    assert "gavamoe report RUN" in (run / "report.html").read_text()

    for kind in ("stage1", "stage2", "evaluation"):
        manifest = read_manifest(run / kind, kind)
        assert manifest.details["forgotten_users"] == 1
    assert (
        read_manifest(run / "stage2", "stage2").inputs["stage1"] == read_manifest(run / "stage1", "stage1").fingerprint
    )
    catalog = Catalog.load(run / "stage2" / "catalog")
    assert catalog.user_index(user) is None
    assert catalog.usual_features(index, None, 5) == ()
    generator = ExplanationGenerator.load(run / "stage2")
    item = generator.catalog.item_index(str(written[0]["item"]))
    texts = generator.explain(
        [ExplanationRequest(catalog.user_or_unknown(user), item), ExplanationRequest(catalog.n_users, item)],
        GenerationConfig(max_new_tokens=8),
    )
    assert texts[0].text == texts[1].text
    now, once = (SingleAuthors.load(folder / "stage2") for folder in (run, trained))
    assert len(now) == len(once), "hashes of the user's texts stay, as nobody's: the weights may still know the texts"
    authors = [row["user"] for row in rows(trained, f"stage2/{AUTHORS_FILE}")]
    assert index in authors
    assert [row["user"] for row in rows(run, f"stage2/{AUTHORS_FILE}")] == [
        NOBODY if author == index else author for author in authors
    ]
    with pytest.raises(InputError, match=r"has forgotten 1 user\(s\), whose rows its dataset holds; train again"):
        evaluate_run(run)


def test_the_command_says_what_stays(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    users = sorted({str(row["user"]) for row in rows(run, f"evaluation/{GENERATIONS_FILE}")})[:3]
    (tmp_path / "users.txt").write_text("\n".join(users[1:]))
    gavamoe = Runner(monkeypatch, capsys)
    result = gavamoe("forget", run, "--user", users[0], "--users", tmp_path / "users.txt")
    assert result.code == 0
    assert "3 user(s) forgotten" in result.err
    assert "stays: the weights that all users share" in result.err
    assert json.loads((run / "stage2" / "artifact.json").read_text())["details"]["forgotten_users"] == 3
    again = gavamoe("forget", run, "--user", users[0])
    assert again.code == 2
    assert "the run knows no such user" in again.err
    assert gavamoe("forget", run).code == 2


def test_a_run_that_knows_one_of_two_users_stays_as_it_was(run: Path, trained: Path) -> None:
    user = str(rows(run, f"evaluation/{GENERATIONS_FILE}")[0]["user"])
    with pytest.raises(InputError, match="--user nobody: the run knows no such user"):
        forget_users(open_run(run), [user, "nobody"])
    (run / "checkpoints" / "stage1" / "checkpoint_1").mkdir(parents=True)
    with pytest.raises(InputError, match="checkpoints hold users' rows too"):
        forget_users(open_run(run), [user])
    for path in trained.rglob("*"):
        if path.is_file():
            assert (run / path.relative_to(trained)).read_bytes() == path.read_bytes()
