"""The token cache: the same rows as without it, made once, mended when damaged, bounded, safe for two runs at once."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gavamoe.config.files import parse_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import open_dataset
from gavamoe.model.decoders import GavamoeConfig
from gavamoe.model.explainer import GavamoeForCausalLM
from gavamoe.model.slots import SlotIds
from gavamoe.runtime.context import LocalContext
from gavamoe.stage2 import token_cache
from gavamoe.stage2.batches import TextRows
from gavamoe.stage2.token_cache import cache_folder, fill_cache, read_cache
from gavamoe.stage2.tokenized_rows import encode_rows, prompt_builder, rows_with_text


def config(*overrides: str) -> RunConfig:
    return parse_config({"stage2": {"scratch": {"vocabulary": 400}}}, "test", overrides)


def in_order(loop: Callable[..., Any], jobs: list[dict[str, Any]]) -> list[Any]:
    return [loop(context=LocalContext(), **job) for job in jobs]


@pytest.fixture
def dataset(tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny dataset, with parts so small that its 1,200 rows make several."""
    monkeypatch.setattr(token_cache, "WORTHWHILE", 1000)
    monkeypatch.setattr(token_cache, "PART_ROWS", 500)
    return Path(shutil.copytree(tiny_dataset, tmp_path / "data"))


def read(dataset: Path, *overrides: str) -> TextRows | None:
    data = open_dataset(dataset)
    return read_cache(data, prompt_builder(config(*overrides), data), rows_with_text(data, "train"))


def fresh(dataset: Path, *overrides: str) -> TextRows:
    data = open_dataset(dataset)
    return encode_rows(prompt_builder(config(*overrides), data), data, "train", rows_with_text(data, "train"))


def same(a: TextRows | None, b: TextRows) -> bool:
    assert a is not None
    pairs = [(a.prompts, b.prompts), (a.answers, b.answers)]
    return all(np.array_equal(x.values, y.values) and np.array_equal(x.offsets, y.offsets) for x, y in pairs)


def test_the_cache_has_the_rows_that_would_be_made(dataset: Path) -> None:
    assert read(dataset) is None
    folder = fill_cache(config(), dataset, in_order)
    assert folder is not None
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet", "tokens.json"]
    assert same(read(dataset), fresh(dataset))
    assert [path.name for path in (dataset / "tokens").iterdir()] == [folder.name]


def test_some_of_the_cached_rows_can_be_read(dataset: Path) -> None:
    fill_cache(config(), dataset, in_order)
    data = open_dataset(dataset)
    builder, rows = prompt_builder(config(), data), rows_with_text(data, "train")[5::7]
    assert same(read_cache(data, builder, rows), encode_rows(builder, data, "train", rows))
    assert read_cache(data, builder, np.array([data.size("train")])) is None


def test_a_second_run_makes_nothing(dataset: Path) -> None:
    fill_cache(config(), dataset, in_order)

    def never(loop: Callable[..., Any], jobs: list[dict[str, Any]]) -> list[Any]:
        raise AssertionError("tokenized twice")

    assert fill_cache(config(), dataset, never) is not None


@pytest.mark.parametrize(
    "override", ["stage2.prompt.max_tokens=40", "stage2.prompt.features=false", "stage2.scratch.vocabulary=500"]
)
def test_other_settings_have_their_own_rows(dataset: Path, override: str) -> None:
    fill_cache(config(), dataset, in_order)
    assert read(dataset, override) is None
    fill_cache(config(override), dataset, in_order)
    assert same(read(dataset, override), fresh(dataset, override))
    assert same(read(dataset), fresh(dataset))


def damage_part(folder: Path) -> None:
    path = folder / "part-00001.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def truncate_part(folder: Path) -> None:
    path = folder / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:100])


def remove_part(folder: Path) -> None:
    (folder / "part-00002.parquet").unlink()


def break_manifest(folder: Path) -> None:
    (folder / "tokens.json").write_text("{")


def point_outside(folder: Path) -> None:
    path = folder / "tokens.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {"../../train.parquet": "0" * 64}
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("harm", [damage_part, truncate_part, remove_part, break_manifest, point_outside])
def test_what_is_damaged_is_not_read_and_made_again(dataset: Path, harm: Callable[[Path], None]) -> None:
    folder = fill_cache(config(), dataset, in_order)
    assert folder is not None
    harm(folder)
    assert read(dataset) is None
    fill_cache(config(), dataset, in_order)
    assert same(read(dataset), fresh(dataset))
    assert [path.name for path in (dataset / "tokens").iterdir()] == [folder.name]


def test_a_task_that_fails_leaves_nothing(dataset: Path) -> None:
    def fails(loop: Callable[..., Any], jobs: list[dict[str, Any]]) -> list[Any]:
        in_order(loop, jobs[:1])
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fill_cache(config(), dataset, fails)
    assert list((dataset / "tokens").iterdir()) == []


def test_two_runs_at_once_end_with_one_whole_cache(dataset: Path) -> None:
    """Both are held until both have written all their parts, so that both try to give the folder its name."""
    barrier = threading.Barrier(2, timeout=60)

    def together(loop: Callable[..., Any], jobs: list[dict[str, Any]]) -> list[Any]:
        in_order(loop, jobs)
        barrier.wait()
        return []

    found: list[Path | None] = []
    runs = [threading.Thread(target=lambda: found.append(fill_cache(config(), dataset, together))) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(found) == 2
    assert found[0] == found[1]
    assert same(read(dataset), fresh(dataset))
    assert len(list((dataset / "tokens").iterdir())) == 1


def test_the_oldest_are_forgotten(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "KEPT", 2)
    limits = [f"stage2.prompt.max_tokens={limit}" for limit in (40, 41, 42)]
    for age, override in enumerate(limits[:2]):
        folder = fill_cache(config(override), dataset, in_order)
        assert folder is not None
        os.utime(folder, (1000 + age, 1000 + age))
    abandoned = dataset / "tokens" / ".x.partial-1"
    abandoned.mkdir()
    os.utime(abandoned, (1, 1))
    assert read(dataset, limits[0]) is not None  # which makes it the one used last
    fill_cache(config(limits[2]), dataset, in_order)
    assert [read(dataset, override) is not None for override in limits] == [True, False, True]
    assert not abandoned.exists()


def test_few_rows_and_read_only_datasets_go_without(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (dataset / "tokens").write_text("a file where the folder would be")
    assert fill_cache(config(), dataset, in_order) is None
    assert read(dataset) is None
    monkeypatch.setattr(token_cache, "WORTHWHILE", 1201)
    assert fill_cache(config(), dataset, in_order) is None


def test_the_builder_without_a_model_has_the_models_slots(tiny_dataset: Path) -> None:
    from transformers import LlamaConfig

    text = LlamaConfig(vocab_size=400, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    model = GavamoeForCausalLM(GavamoeConfig(text_config=text, n_users=60, n_items=40, experts_enabled=False))
    slots = SlotIds(vocabulary=400, n_users=60, n_items=40)
    for index in (0, 39, 40, 59, 60, 10**6):
        assert (slots.user_token(index), slots.item_token(index)) == (model.user_token(index), model.item_token(index))
    data = open_dataset(tiny_dataset)
    assert cache_folder(data, prompt_builder(config(), data)).parent == tiny_dataset / "tokens"
