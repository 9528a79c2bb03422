"""DeepSpeed at every ZeRO stage and several workers: equal to plain torch in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.stage2_runs import (
    HALF_BATCHES,
    Trained,
    check_equal_runs,
    close,
    in_two_workers,
    joint_batch,
    numbers,
    save_base,
    tiny,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from gavamoe.data.dataset import open_dataset
from gavamoe.errors import InputError
from gavamoe.generation.prompts import left_padded
from gavamoe.model import output_head
from gavamoe.model.build import load_explainer
from gavamoe.model.explainer import IGNORED
from gavamoe.stage1.artifact import load_vae_gmm
from gavamoe.stage1.routes import read_routes, route_pairs
from gavamoe.stage2.model_card import write_artifact
from gavamoe.stage2.schedule import PEAK
from gavamoe.stage2.setup import Setup, prepare
from gavamoe.stage2.training_engines import make_engine

pytestmark = pytest.mark.usefixtures("extensions_dir")


@pytest.fixture
def setup(tiny_dataset: Path, stage1: Path) -> Setup:
    return prepare(tiny(), tiny_dataset, stage1)


def test_deepspeed_equals_torch(
    torch_run: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path, extensions_dir: Path
) -> None:
    run = Trained(tiny("runtime.engine=deepspeed", "stage2.zero_stage=1"), tiny_dataset, stage1, tmp_path)
    check_equal_runs(run, torch_run)
    assert not torch.distributed.is_initialized()
    assert not list(extensions_dir.rglob("*.so")), "DeepSpeed compiled an operation"


@pytest.mark.parametrize(
    "overrides",
    [("0",), ("2",), ("3",), ("2", "stage2.offload_optimizer=true"), ("3", "stage2.offload_parameters=true")],
)
def test_every_zero_stage_equals_torch(
    overrides: tuple[str, ...],
    torch_run: Trained,
    tiny_dataset: Path,
    stage1: Path,
    tmp_path: Path,
    extensions_dir: Path,
) -> None:
    stage, *others = overrides
    config = tiny("runtime.engine=deepspeed", f"stage2.zero_stage={stage}", *others)
    check_equal_runs(Trained(config, tiny_dataset, stage1, tmp_path), torch_run)


@pytest.mark.parametrize(
    ("stage", "tied", "lora"),
    [
        *((stage, True, ()) for stage in ("torch", "0", "1", "2", "3")),
        *((stage, False, ()) for stage in ("1", "3")),
        *((stage, True, ("stage2.lora.rank=2",)) for stage in ("0", "3")),
    ],
)
def test_a_loss_in_chunks_equals_the_whole_at_every_zero_stage(
    stage: str,
    tied: bool,
    lora: tuple[str, ...],
    tiny_dataset: Path,
    stage1: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three steps of two accumulated batches, of which one has no label, and an evaluation."""
    base = f"stage2.base_model={save_base(tmp_path / 'base', tied=tied)}"
    engine = ("runtime.engine=deepspeed", f"stage2.zero_stage={stage}") if stage != "torch" else ()
    found = []
    for logits, overrides in ((10**9, ()), (7 * 400, engine)):
        monkeypatch.setattr(output_head, "CPU_LOGITS", logits)
        config = tiny("stage2.gradient_accumulation=2", base, *lora, *overrides)
        setup = prepare(config, tiny_dataset, stage1)
        assert setup.model.explainer.config.tie_word_embeddings == tied
        batch = joint_batch(setup)
        assert (batch["labels"] != IGNORED).sum() > 20 * 7
        empty = batch | {"labels": torch.full_like(batch["labels"], IGNORED)}
        running = make_engine(config.runtime.engine, setup.model, config.stage2, world_size=1, device="cpu")
        try:
            torch.manual_seed(0)
            losses = [running.train_step([batch, empty], PEAK)["loss"] for _ in range(3)]
            losses.append(running.evaluate(batch)["explanation_loss"])
            found.append((torch.stack(losses), running.state_dict()))
        finally:
            running.close()
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=0)
    close(found[1][1], found[0][1], 1e-3, but=3e-3)


def test_accumulated_batches_equal_one_larger_batch(tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    # alpha 0 and no hidden ids: what is drawn at random would be drawn in another order
    same = ("stage2.alpha=0", "stage1.unknown_id_rate=0", "stage2.evaluate_every=0")
    large = Trained(tiny(*same), tiny_dataset, stage1, tmp_path / "large")
    small = ("stage2.batch_size=4", "stage2.gradient_accumulation=4")
    split = Trained(tiny(*same, *small), tiny_dataset, stage1, tmp_path / "split")
    for line, wanted in zip(split.lines("train"), large.lines("train"), strict=True):
        assert line == pytest.approx(wanted, rel=1e-3)


EVERY_STEP = (
    "stage2.max_steps=20", "stage2.evaluate_every=1", "stage2.checkpoint_every=10", "stage2.keep=last",
    "stage2.alpha=0", "stage1.unknown_id_rate=0",  # what is drawn at random differs by worker
)  # fmt: skip


@pytest.fixture(scope="module")
def alone(tiny_dataset: Path, stage1: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """20 steps in one process, float32, a log line for each."""
    return Trained(tiny(*EVERY_STEP), tiny_dataset, stage1, tmp_path_factory.mktemp("alone"))


def slow(*overrides: str) -> Any:
    return pytest.param(overrides, marks=pytest.mark.slow, id="-".join(text.split(".")[-1] for text in overrides))


FULL = [
    ("stage2.zero_stage=1",),
    slow("stage2.zero_stage=0"),
    slow("stage2.zero_stage=2"),
    slow("stage2.zero_stage=3"),
    slow("stage2.zero_stage=2", "stage2.offload_optimizer=true"),
    slow("stage2.zero_stage=3", "stage2.offload_optimizer=true", "stage2.offload_parameters=true"),
]


@pytest.mark.parametrize("overrides", FULL)
def test_two_workers_equal_one(
    overrides: tuple[str, ...], alone: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    """float32: losses of 20 steps and weights to 1e-3; sums over workers are taken in another order."""
    ranks = in_two_workers(tiny(*EVERY_STEP, *HALF_BATCHES, *overrides), tiny_dataset, stage1, tmp_path / "two")
    for phase, count in (("train", 20), ("valid", 21)):
        lines = numbers(ranks[0]["lines"], phase)
        assert len(lines) == count
        for line, wanted in zip(lines, alone.lines(phase), strict=True):
            assert line == pytest.approx(wanted, rel=1e-3)
    two = load_explainer(tmp_path / "two/stage2")[0].state_dict()
    close(two, load_explainer(alone.out)[0].state_dict(), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_workers_whose_losses_come_in_chunks_equal_one(
    stage: int, alone: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    """Their numbers of labels, and so of chunks, differ."""
    config = tiny(*EVERY_STEP, *HALF_BATCHES, f"stage2.zero_stage={stage}")
    ranks = in_two_workers(config, tiny_dataset, stage1, tmp_path / "two", logits_at_once=7 * 400)
    for phase in ("train", "valid"):
        for line, wanted in zip(numbers(ranks[0]["lines"], phase), alone.lines(phase), strict=True):
            assert line == pytest.approx(wanted, rel=1e-3)
    close(load_explainer(tmp_path / "two/stage2")[0].state_dict(), load_explainer(alone.out)[0].state_dict(), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("conversion", "stage"), [("shared", 3), ("split", 3), ("shared", 2)])
def test_two_workers_of_which_one_reads_the_base_model_equal_one(
    conversion: str, stage: int, tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base")
    same = (*EVERY_STEP, f"stage2.base_model={base}", f"stage2.experts.conversion={conversion}")
    single = Trained(tiny(*same), tiny_dataset, stage1, tmp_path / "single")
    in_two_workers(tiny(*same, *HALF_BATCHES, f"stage2.zero_stage={stage}"), tiny_dataset, stage1, tmp_path / "two")
    two, one = (load_explainer(folder)[0].state_dict() for folder in (tmp_path / "two/stage2", single.out))
    # Where the routed experts start at zero, a start moved by 1e-7 of itself moves tokens near the border of two.
    tolerance, but = (1e-2, 1e-2) if conversion == "shared" else (1e-3, 0.0)
    close(two, one, tolerance, but=but)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_two_workers_in_bf16_stay_close(
    stage: int, alone: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    """bfloat16 arithmetic over float32 weights: losses of 20 steps to 2 % of the single process in float32."""
    config = tiny(*EVERY_STEP, *HALF_BATCHES, f"stage2.zero_stage={stage}", "stage2.precision=bf16")
    ranks = in_two_workers(config, tiny_dataset, stage1, tmp_path / "two")
    for line, wanted in zip(numbers(ranks[0]["lines"], "valid"), alone.lines("valid"), strict=True):
        assert line["validation_loss"] == pytest.approx(wanted["validation_loss"], rel=0.02)
        assert line["validation_loss"] != wanted["validation_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_workers_take_the_same_next_10_steps(stage: int, tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    config = tiny(*EVERY_STEP, *HALF_BATCHES, "stage2.alpha=0.2", f"stage2.zero_stage={stage}")
    whole = in_two_workers(config, tiny_dataset, stage1, tmp_path / "whole")
    checkpoint = tmp_path / "whole/checkpoints/10"
    resumed = in_two_workers(config, tiny_dataset, stage1, tmp_path / "resumed", checkpoint)
    lines = numbers(resumed[0]["lines"], "train")
    assert [line["step"] for line in lines] == list(range(11, 21))
    assert lines == numbers(whole[0]["lines"], "train")[10:]


@pytest.mark.parametrize(
    "overrides",
    [
        ("stage2.zero_stage=0",),
        ("stage2.zero_stage=1",),
        ("stage2.zero_stage=2", "stage2.offload_optimizer=true"),
        ("stage2.zero_stage=3",),
        ("stage2.zero_stage=3", "stage2.offload_parameters=true"),
    ],
)
def test_the_exported_folder_writes_in_plain_transformers_what_the_engine_holds(
    overrides: tuple[str, ...], tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    config = tiny("runtime.engine=deepspeed", *overrides)
    setup = prepare(config, tiny_dataset, stage1)
    running = make_engine("deepspeed", setup.model, config.stage2, world_size=1, device="cpu")
    ids, mask = left_padded([setup.valid.prompts[row].tolist() for row in range(6)], setup.pad)
    prompts = {"attention_mask": torch.from_numpy(mask), "cluster_ids": torch.from_numpy(setup.clusters["valid"][:6])}
    options = {"max_new_tokens": 12, "do_sample": False}
    try:
        for _ in range(5):
            running.train_step([joint_batch(setup)], PEAK)
        running.evaluate(joint_batch(setup))  # evaluation mode
        live = setup.model.explainer.generate(torch.from_numpy(ids), **prompts, **options)
        state = running.state_dict()
    finally:
        running.close()
    write_artifact(tmp_path / "stage2", config, setup, state, METRICS)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "stage2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "stage2")
    texts = [
        tokenizer.batch_decode(tokens[:, ids.shape[1] :])
        for tokens in (live, plain.generate(torch.from_numpy(ids), **prompts, **options))
    ]
    assert texts[1] == texts[0]
    assert any(text.strip() for text in texts[0])


METRICS = {
    "steps": 5, "planned_steps": 5, "kept_step": 5, "workers": 1, "validation_loss": None,
    "validation_loss_at_start": None, "validation_perplexity": None,
}  # fmt: skip
"""What the model card reads of a run's metrics."""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_two_workers_train_stage_1_along(
    stage: int, torch_run: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    """With random latents and hidden ids losses agree roughly; the refreshed routes are those of the weights."""
    config = tiny(*HALF_BATCHES, "stage2.elbo_batch_size=32", f"stage2.zero_stage={stage}")
    ranks = in_two_workers(config, tiny_dataset, stage1, tmp_path / "two")
    for line, wanted in zip(numbers(ranks[0]["lines"], "train"), torch_run.lines("train"), strict=True):
        assert line["explanation_loss"] == pytest.approx(wanted["explanation_loss"], rel=0.02)
        assert line["elbo_loss"] == pytest.approx(wanted["elbo_loss"], rel=0.05)
    out = tmp_path / "two/stage2"
    pairs = open_dataset(tiny_dataset).arrays("train")
    assert (
        read_routes(out / "routes.parquet", "train").cluster
        == route_pairs(load_vae_gmm(out), pairs.user, pairs.item).cluster
    ).all()


def test_torch_engine_refuses_several_workers(setup: Setup) -> None:
    with pytest.raises(InputError, match="torch runs one worker, not 2"):
        make_engine("torch", setup.model, tiny().stage2, world_size=2, device="cpu")


def test_a_worker_that_gets_its_weights_from_another_reads_none(
    tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base")
    config = tiny(f"stage2.base_model={base}", "stage2.zero_stage=3", "stage2.lora.rank=2")
    whole = prepare(config, tiny_dataset, stage1)
    (base / "model.safetensors").unlink()
    hollow = prepare(config, tiny_dataset, stage1, empty_weights=True)
    shapes = [
        {name: (tensor.shape, tensor.dtype) for name, tensor in setup.model.state_dict().items()}
        for setup in (whole, hollow)
    ]
    assert shapes[0] == shapes[1]
    for name, buffer in whole.model.named_buffers():
        assert torch.equal(hollow.model.get_buffer(name), buffer), name
    trained = [[name for name, p in setup.model.named_parameters() if p.requires_grad] for setup in (whole, hollow)]
    assert trained[0] == trained[1]


@pytest.mark.parametrize("stage", [1, 2])
def test_an_odd_number_of_parameters(stage: int, setup: Setup) -> None:
    """DeepSpeed refuses odd bucket sizes; a bucket is no larger than the model, and K and the rating scale decide."""
    odd = [p for p in setup.model.vae_gmm.prior.parameters() if p.numel() % 2]
    trained = sum(parameter.numel() for parameter in setup.model.parameters() if parameter.requires_grad)
    if trained % 2 == 0:
        trained -= odd[0].requires_grad_(False).numel()
    assert trained % 2 == 1
    config = tiny("runtime.engine=deepspeed", f"stage2.zero_stage={stage}").stage2
    engine = make_engine("deepspeed", setup.model, config, world_size=1, device="cpu")
    try:
        assert engine.train_step([joint_batch(setup)], PEAK)["loss"] > 0
    finally:
        engine.close()
