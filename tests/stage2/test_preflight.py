"""What stops stage 2 is found before stage 1 starts, and leaves no run behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.bare_dataset import bare_dataset
from helpers.base_models import save_base_model
from helpers.stage2_runs import Trained
from helpers.tiny import tiny

from gavamoe import pipeline
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError
from gavamoe.stage2 import preflight
from gavamoe.stage2.preflight import (
    Sizes,
    check_base_model,
    check_disk,
    checkpoint_bytes,
    kept_checkpoints,
    scratch_warning,
)

GIB = 2**30


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Names of the stages that would have been trained."""
    begun: list[Any] = []
    monkeypatch.setattr(pipeline, "run_training", lambda *_, name, **__: begun.append(name))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return begun


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the room of every disk, in bytes."""

    def set_free(count: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, int(count)))

    return set_free


def broken(folder: Path) -> str:
    path = save_base_model(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2}))
    return f"stage2.base_model={folder}"


@pytest.mark.parametrize("resume", [False, True])
def test_a_bad_base_model_ends_training_before_stage_1(
    tiny_dataset: Path, tmp_path: Path, no_training: list[Any], resume: bool
) -> None:
    config, run = tiny(broken(tmp_path / "base")), tmp_path / "run"
    with pytest.raises(InputError, match=r"9 weights are missing, such as model\.layers\.1\."):
        pipeline.train_run(config, tiny_dataset, run, resume=resume)
    assert no_training == []
    assert not run.exists(), "nothing binds the next attempt to this base model"


def test_stage_1_alone_does_not_ask_for_a_base_model(
    tiny_dataset: Path, tmp_path: Path, no_training: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import nullcontext

    monkeypatch.setattr(pipeline, "ray_session", lambda *_: nullcontext())
    pipeline.train_run(tiny(broken(tmp_path / "base")), tiny_dataset, tmp_path / "run", stage="1")
    assert no_training == ["stage1"]


def test_the_model_is_looked_at_in_a_task_on_a_cluster(
    planted: Dataset, tmp_path: Path, no_training: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import nullcontext

    tasks: list[str] = []

    def run_tasks(loop: Callable[..., Any], jobs: list[dict[str, Any]], *_: Any) -> list[Any]:
        tasks.append(loop.__name__)
        return [loop(context=None, **job) for job in jobs]

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(pipeline, "ray_session", lambda *_: nullcontext())
    monkeypatch.setattr(pipeline, "run_tasks", run_tasks)
    with pytest.raises(InputError, match="9 weights are missing"):
        pipeline.train_run(tiny(broken(tmp_path / "base")), planted.path, tmp_path / "run")
    assert tasks == ["check_base_model_task"]


def test_a_folder_that_can_t_be_made_ends_it_too(tiny_dataset: Path, tmp_path: Path, no_training: list[Any]) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(InputError, match="file: is a file, and a run needs a folder"):
        pipeline.train_run(tiny(), tiny_dataset, path)
    assert no_training == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage2.scratch.family=gpt2", "stage2.prompt.max_tokens=500"], r"500 \+ 64 tokens .* 512 positions"),
        (["stage2.experts.conversion=split", "stage2.experts.intermediate_size=24"], r"split cuts the dense width 64"),
        (["stage2.experts.intermediate_size=17"], r"grouped_mm needs multiples of 8, not experts of 17"),
    ],
)
def test_settings_that_do_not_fit_the_base_model_are_found_too(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_base_model(tiny(*overrides), users=5, items=4)


def test_sizes_are_those_of_the_explainer_that_is_trained(torch_run: Trained, planted: Dataset) -> None:
    catalog = planted.catalog
    sizes = check_base_model(tiny(), catalog.known_users, catalog.known_items)
    weights = {name: each for name, each in torch_run.weights().items() if not name.startswith("vae.")}
    stored = {each.data_ptr(): each.numel() for each in weights.values()}
    assert sizes.total == pytest.approx(sum(stored.values()), rel=0.05)  # of scratch, the largest vocabulary counts
    assert sizes.trained == sizes.total


def test_adapters_train_few(tmp_path: Path) -> None:
    save_base_model(tmp_path)
    whole = check_base_model(tiny(f"stage2.base_model={tmp_path}"), 5, 4)
    lora = check_base_model(tiny(f"stage2.base_model={tmp_path}", "stage2.lora.rank=2"), 5, 4)
    assert lora.total > whole.total
    assert lora.trained < whole.trained


def test_a_checkpoint_is_as_large_as_estimated(torch_run: Trained, planted: Dataset, tmp_path: Path) -> None:
    """Without stage 1's own states, which weigh nothing beside a language model but something beside a tiny one."""
    storage = torch_run.context.storage
    assert storage is not None
    newest = max(storage.iterdir(), key=lambda path: path.stat().st_mtime)
    found = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    sizes = check_base_model(tiny(), planted.catalog.known_users, planted.catalog.known_items)
    assert 0.6 < checkpoint_bytes(tiny(), sizes) / found < 1.1


def test_the_parts_of_a_checkpoint_by_hand() -> None:
    sizes = Sizes(total=1000, trained=100)
    assert checkpoint_bytes(tiny("stage2.keep=last"), sizes) == 4 * (1000 + 2 * 100)
    assert checkpoint_bytes(tiny(), sizes) == 4 * (2 * 1000 + 2 * 100)
    assert checkpoint_bytes(tiny("runtime.engine=deepspeed"), sizes) == 4 * (2 * 1000 + 3 * 100)
    assert checkpoint_bytes(tiny("runtime.engine=deepspeed", "stage2.zero_stage=0"), sizes) == 4 * (2000 + 200)


@pytest.mark.parametrize(("every", "kept"), [(0, 1), (6, 2), (4, 2), (12, 1), (100, 1)])
def test_two_checkpoints_are_kept_where_there_are_two(planted: Dataset, every: int, kept: int) -> None:
    assert kept_checkpoints(tiny(f"stage2.checkpoint_every={every}"), planted) == kept


def test_a_disk_without_room_is_refused_with_both_numbers(
    planted: Dataset, tmp_path: Path, free: Callable[[float], None]
) -> None:
    sizes = Sizes(total=GIB, trained=GIB)  # 4 GiB of weights, 16 a checkpoint
    config: RunConfig = tiny()
    expected = "the checkpoints and the model of stage 2 need about 52.0; make room, or name a --run-dir elsewhere"
    free(51.9 * GIB)
    with pytest.raises(InputError, match=f"^{tmp_path}: 51.9 GiB are free, {expected}$"):
        check_disk(config, planted, tmp_path, sizes)
    free(52 * GIB)
    check_disk(config, planted, tmp_path, sizes)
    kept = tmp_path / "checkpoints" / "stage2" / "checkpoint_0"
    kept.mkdir(parents=True)
    (kept / "engine.pt").write_bytes(bytes(2**20))
    free(52 * GIB - 2**20)  # what an attempt before this one left is replaced
    check_disk(config, planted, tmp_path, sizes)


def test_training_looks_at_the_disk_first(
    tiny_dataset: Path, tmp_path: Path, no_training: list[Any], free: Callable[[float], None]
) -> None:
    free(1000)
    with pytest.raises(InputError, match=r"0\.0 GiB are free, the checkpoints and the model of stage 2 need about"):
        pipeline.train_run(tiny(), tiny_dataset, tmp_path / "run")
    assert no_training == []
    assert not (tmp_path / "run").exists()


def test_a_comparison_looks_at_every_base_model_once_before_its_first_run(
    tiny_dataset: Path, tmp_path: Path, no_training: list[Any]
) -> None:
    from gavamoe.experiments.ablate import run_ablation

    with pytest.raises(InputError, match="9 weights are missing"):
        run_ablation(tiny(broken(tmp_path / "base")), tiny_dataset, tmp_path / "out", seeds=1, only=["full"])
    assert no_training == []
    assert not (tmp_path / "out").exists()


def test_a_search_looks_at_each_base_model_of_its_space_before_its_first_trial(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gavamoe.tune import search

    good, bad = save_base_model(tmp_path / "good"), broken(tmp_path / "bad").partition("=")[2]
    space = tmp_path / "space.yaml"
    parameters = {"stage2.base_model": {"type": "choice", "values": [str(good), bad]}}
    values = {"stages": 2, "metric": "bleu_4", "budget": {"trials": 2}, "parameters": parameters}
    space.write_text(json.dumps(values))
    begun: list[Any] = []
    monkeypatch.setattr(search, "run_trials", lambda *_, **__: begun.append(1))
    # Experts that fit no model here: whether a trial's do is for the trial to see.
    config = tiny("stage2.experts.intermediate_size=17")
    with pytest.raises(InputError, match=f"^base_model {bad}: 9 weights are missing"):
        search.run_search(space, config, tiny_dataset, tmp_path / "search", progress=None)  # type: ignore[arg-type]
    assert begun == []
    assert not (tmp_path / "search").exists()


@pytest.mark.parametrize(
    ("capability", "overrides", "warns"),
    [
        ("AVX2", ["stage2.precision=bf16"], True),
        ("AVX2", ["stage2.precision=fp32"], False),
        ("AVX512", ["stage2.precision=bf16"], False),
        ("AVX2", ["stage2.precision=bf16", "runtime.gpu=true"], False),
    ],
)
def test_bfloat16_on_a_cpu_that_emulates_it_is_warned_of(
    capability: str, overrides: list[str], warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smollm2 preset took a minute a step on such a machine, without a word."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    warning = preflight.precision_warning(tiny(*overrides))
    assert (warning is not None) == warns
    assert warning is None or "--set stage2.precision=fp32" in warning


def test_people_s_own_texts_and_a_model_that_knows_no_language(planted: Dataset, tmp_path: Path) -> None:
    own = bare_dataset(tmp_path / "own", ["a text of one's own"] * 10)
    warning = scratch_warning(tiny(), own)
    assert warning is not None
    assert "the preset reviews starts from a pretrained language model" in warning
    assert scratch_warning(tiny(), planted) is None
    assert scratch_warning(tiny("stage2.base_model=some/model"), own) is None
    assert scratch_warning(tiny("stage2.alpha=1"), own) is None
