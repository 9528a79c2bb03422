"""What `gavamoe export` leaves on disk, used as its readers use it: in a process that has no gavamoe."""

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from helpers.exported_runs import exported, run

from gavamoe.config.schema import PromptConfig
from gavamoe.data.dataset import SPLITS, open_dataset
from gavamoe.errors import InputError, RunError
from gavamoe.export import exported_run as module
from gavamoe.export.exported_run import export_run
from gavamoe.generation.generator import ExplanationGenerator
from gavamoe.generation.prompts import PromptBuilder, PromptColumns
from gavamoe.generation.request import ExplanationRequest
from gavamoe.model.base_model import special_ids
from gavamoe.model.slots import RATING_PLACES

WITHOUT_GAVAMOE = """
import importlib.util, json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "gavamoe":
            raise ImportError("gavamoe is not here")
sys.meta_path.insert(0, Blocked())
spec = importlib.util.spec_from_file_location("client", sys.argv[1] + "/client.py")
client = importlib.util.module_from_spec(spec)
spec.loader.exec_module(client)
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
names = sorted(set(client.PROMPT["models"]))
tokenizer = AutoTokenizer.from_pretrained(client.HERE / names[0])
models = [AutoModelForCausalLM.from_pretrained(client.HERE / name, experts_implementation="eager") for name in names]
for asked in json.load(sys.stdin):
    ids = client.prompt(tokenizer, **asked)
    gate = client.route(asked["user"], asked["item"])["gate"]
    written = models[gate].generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24)[0, len(ids):]
    text = " ".join(tokenizer.decode(written, skip_special_tokens=True).split())
    print(json.dumps({"ids": ids, "gate": gate, "text": text}))
"""


def asked(count: int) -> list[dict[str, Any]]:
    """Requests by raw ids: pairs of the dataset with and without rating and features, and ids never seen."""
    table = pq.read_table(exported("hf", "float32") / "routes.parquet").to_pylist()
    rows: list[dict[str, Any]] = [{"user": row["user"], "item": row["item"]} for row in table[: count - 4]]
    for number, row in enumerate(rows):
        if number % 3 == 1:
            row["rating"] = 1 + number % 5
        if number % 3 == 2:
            row["features"] = ["acting", "<user:U000003>", "<|endoftext|> plot"][: 1 + number % 4]
    known = rows[0]
    return [
        *rows,
        {"user": "nobody", "item": known["item"]},
        {"user": known["user"], "item": "nothing", "features": ["story"]},
        {"user": "nobody", "item": "nothing", "rating": 2.0},
        {"user": "<user>", "item": "<item>", "features": []},
    ]


def ours(requests: list[dict[str, Any]]) -> list[tuple[list[int], int, str]]:
    """Prompts, gates and texts by gavamoe itself, where it is told what the export assumes of what is not given."""
    generator = ExplanationGenerator.load(run().stage2)
    generator.model.set_experts_implementation("eager")
    catalog, end = generator.catalog, generator.builder.end
    out = exported("hf", "float32")
    routes = {(row["user"], row["item"]): row for row in pq.read_table(out / "routes.parquet").to_pylist()}
    users = {row["user"]: row for row in pq.read_table(out / "users.parquet").to_pylist()}
    prompt = json.loads((out / "prompt.json").read_text())
    found = []
    for asked_for in requests:
        pair = (asked_for["user"], asked_for["item"])
        way = routes.get(pair) or users.get(pair[0]) or prompt
        user, item = catalog.user_or_unknown(pair[0]), catalog.item_or_unknown(pair[1])
        known = item < generator.model.config.n_items
        usual = catalog.usual_features(catalog.n_users, item, generator.spec.usual_features) if known else ()
        words = tuple(asked_for.get("features", usual))
        request = ExplanationRequest(user, item, asked_for.get("rating", way["rating"]), words)
        [ids] = generator.prepare([request]).prompts
        written = generator.model.generate(
            torch.tensor([ids]),
            cluster_ids=torch.tensor([way["gate"]]),
            max_new_tokens=24,
            do_sample=False,
            suppress_tokens=sorted(special_ids(generator.tokenizer) - {end}),
            eos_token_id=end,
            pad_token_id=end,
        )
        found.append((ids, way["gate"], generator.text(written[0, len(ids) :].tolist())))
    return found


def test_plain_transformers_write_the_same_texts_in_a_process_without_gavamoe() -> None:
    requests = asked(100)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_GAVAMOE, str(exported("hf", "float32"))],
        input=json.dumps(requests), capture_output=True, text=True, check=False, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = [json.loads(line) for line in done.stdout.splitlines()]
    expected = ours(requests)
    assert [answer["ids"] for answer in theirs] == [ids for ids, _, _ in expected]
    assert [answer["gate"] for answer in theirs] == [gate for _, gate, _ in expected]
    assert [answer["text"] for answer in theirs] == [text for _, _, text in expected]
    assert len({answer["gate"] for answer in theirs}) > 1
    assert len({answer["text"] for answer in theirs}) > 5


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("settings", [{"instruction": False}, {"soft_rating": True}, {"title_last": False}])
def test_the_client_builds_all_kinds_of_prompts(settings: dict[str, bool], given: bool, tmp_path: Path) -> None:
    out = shutil.copytree(exported("hf", "float32"), tmp_path / "out")
    generator, asked_for = ExplanationGenerator.load(run().stage2), asked(10)[2]
    slots = replace(generator.model.slots, rating_places=RATING_PLACES)
    builder = PromptBuilder(generator.tokenizer, slots, PromptConfig(**settings), generator.spec.scale)
    written = json.loads((out / "prompt.json").read_text())
    (out / "prompt.json").write_text(json.dumps(written | builder.pieces()))
    loaded = importlib.util.spec_from_file_location("client", out / "client.py")
    assert loaded is not None
    client = importlib.util.module_from_spec(loaded)
    assert loaded.loader is not None
    loaded.loader.exec_module(client)
    catalog = generator.catalog
    item = catalog.item_or_unknown(asked_for["item"])
    rating = 4.0 if given else client.route(asked_for["user"], asked_for["item"])["rating"]
    [expected] = builder.prompts(
        PromptColumns(
            [catalog.user_or_unknown(asked_for["user"])],
            [item],
            [rating],
            [("acting", "plot")],
            [catalog.item_title(item)],
            expected=[None if given else rating],
        )
    )
    words, asked_rating = ["acting", "plot"], rating if given else None
    found = client.prompt(generator.tokenizer, asked_for["user"], asked_for["item"], asked_rating, words)
    assert found == expected


def test_the_client_writes_a_text_by_itself() -> None:
    pair = asked(10)[0]
    command = [sys.executable, "client.py", pair["user"], pair["item"], "4", "acting,plot"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=exported("hf", "float32"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.split()) > 2
    assert done.stdout.count("\n") == 1


def test_the_folder_is_complete_and_says_what_made_it() -> None:
    out = exported("hf", "float32")
    names = sorted(path.name for path in out.iterdir())
    assert names == [
        "README.md", "client.py", "gate-0", "gate-1", "gate-2", "items.parquet", "prompt.json", "routes.parquet",
        "users.parquet",
    ]  # fmt: skip
    described = json.loads((out / "prompt.json").read_text())
    assert described["models"] == ["gate-0", "gate-1", "gate-2"]
    assert len(described["made_from"]) == 64
    assert described["versions"]["gavamoe"]
    routes = pq.read_table(out / "routes.parquet")
    data = open_dataset(run().dataset)
    assert routes.num_rows == sum(data.size(split) for split in SPLITS)
    assert set(routes["gate"].to_pylist()) <= {0, 1, 2}
    assert set(routes["rating"].to_pylist()) <= {1.0, 2.0, 3.0, 4.0, 5.0}
    users = pq.read_table(out / "users.parquet")
    assert users["token"].to_pylist() == list(range(400, 400 + users.num_rows))


def test_one_gate_serves_every_pair_where_it_is_asked_for(tmp_path: Path) -> None:
    assert export_run(run(), tmp_path / "one", gate=1, dtype="bfloat16") == ["gate-1"]
    described = json.loads((tmp_path / "one" / "prompt.json").read_text())
    assert described["models"] == ["gate-1"] * 3
    assert json.loads((tmp_path / "one" / "gate-1" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"gate": 3}, "gate 3: this run has gates 0 to 2"),
        ({"dtype": "q4_0"}, "--dtype q4_0 is none of --format hf's: float32, float16, bfloat16"),
        ({"form": "gguf", "dtype": "float16"}, "none of --format gguf's: f32, f16, q8_0, q4_0"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=problem):
        export_run(run(), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_prompts_that_quote_reviews_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"quote training texts .*stage2\.prompt\.quotes=0"):
        export_run(run("stage2.prompt.quotes=1", "stage2.max_steps=2"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="already exists"):
        export_run(run(), tmp_path / "out")


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device", "routes.parquet")

    monkeypatch.setattr(module.pq, "write_table", full)
    with pytest.raises(RunError, match=r"No space left|full"):
        export_run(run(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
