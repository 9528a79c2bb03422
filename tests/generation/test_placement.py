"""Where texts are written and in which number format."""

from pathlib import Path

import pytest
import torch
from helpers.tiny import tiny

from gavamoe.artifacts.run import claim_run
from gavamoe.data.dataset import open_dataset
from gavamoe.errors import InputError
from gavamoe.evaluation import evaluate as evaluation
from gavamoe.generation.generator import ExplanationGenerator
from gavamoe.generation.placement import writing_device, writing_dtype
from gavamoe.model.build import load_explainer
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.train import train_stage1
from gavamoe.stage2.train import train_stage2


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_a_run_that_trains_on_a_gpu_is_written_on_one_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpus(monkeypatch, 1)
    assert [writing_device(None, gpu=gpu) for gpu in (False, True)] == ["cpu", "cuda"]
    assert writing_device("cpu", gpu=True) == "cpu"
    gpus(monkeypatch, 0)
    assert writing_device(None, gpu=False) == writing_device("cpu", gpu=True) == "cpu"
    assert not caplog.messages
    assert writing_device(None, gpu=True) == "cpu"
    [message] = caplog.messages
    assert "on the CPU" in message


@pytest.mark.parametrize("asked", ["cuda", "cuda:0", "cuda:7", "gpu", "mps", "cuda:", "", "cuda:-1"])
def test_a_device_that_is_not_here_is_refused(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 0)
    with pytest.raises(InputError, match=f"--device {asked}"):
        writing_device(asked, gpu=False)


def test_auto_is_bfloat16_on_a_gpu_alone() -> None:
    assert writing_dtype("auto", "cpu") is writing_dtype("float32", "cuda") is torch.float32
    assert writing_dtype("auto", "cuda:1") is writing_dtype("bfloat16", "cpu") is torch.bfloat16


@pytest.fixture(scope="module")
def run(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("placement")
    config = tiny("stage2.max_steps=2", "stage2.evaluate_every=0", "stage2.checkpoint_every=0", "runtime.gpu=true")
    fingerprint = open_dataset(tiny_dataset).fingerprint
    claim_run(work, config, tiny_dataset, fingerprint, continuing=False).write_config(config)
    train_stage1(config, tiny_dataset, work / "stage1", LocalContext())
    train_stage2(config, tiny_dataset, work / "stage1", work / "stage2", LocalContext())
    return work


def test_in_bfloat16_gates_and_tables_stay_float32(run: Path) -> None:
    model, _ = load_explainer(run / "stage2", torch.bfloat16)
    wide = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    narrow = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    assert wide == {
        "user_embedding.weight",
        "item_embedding.weight",
        *(f"model.layers.{layer}.mlp.router.weight" for layer in range(len(model.model.layers))),
    }
    assert wide | narrow == dict(model.named_parameters()).keys()
    assert model.dtype == torch.bfloat16


def test_an_evaluation_loads_the_model_where_the_run_says(
    run: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, 1)
    asked: list[tuple[str, str]] = []

    def load(
        folder: Path, device: str = "cpu", dtype: str = "auto", quantize: str | None = None
    ) -> ExplanationGenerator:
        del folder, quantize
        asked.append((device, dtype))
        raise InputError("far enough")

    monkeypatch.setattr(ExplanationGenerator, "load", load)
    for device in (None, "cpu"):
        with pytest.raises(InputError, match="far enough"):
            evaluation.evaluate_run(run, dataset=tiny_dataset, device=device)
    assert asked == [("cuda", "auto"), ("cpu", "auto")]
