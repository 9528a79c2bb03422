"""Tiny stage-2 runs, in this process and in two, for the tests of training."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, multiprocessing

from gavamoe.config.schema import RunConfig
from gavamoe.model import output_head
from gavamoe.model.base_model import load_base
from gavamoe.model.build import load_explainer
from gavamoe.runtime.context import LocalContext, Metrics
from gavamoe.stage1.artifact import load_vae_gmm
from gavamoe.stage2.batches import Batch
from gavamoe.stage2.engines.zero import _tensors_only
from gavamoe.stage2.setup import Setup
from gavamoe.stage2.train import train_stage2
from helpers.tiny import TWO_WORKERS, tiny
from helpers.trap import Trap

FILES = [
    "README.md", "artifact.json", "catalog/catalog.json", "catalog/items.parquet", "catalog/users.parquet",
    "cluster_words.parquet", "config.json", "generation_config.json", "metrics.json", "model.safetensors",
    "pair_features.parquet", "prompt.json", "routes.parquet", "single_author_texts.parquet", "strangers.safetensors",
    "tokenizer.json", "tokenizer_config.json",
    "vae_gmm.json", "vae_gmm.safetensors",
]  # fmt: skip


def numbers(lines: list[dict[str, Any]], phase: str) -> list[dict[str, Any]]:
    """The lines of a phase, without its name and without what time decides."""
    left_out = ("phase", "seconds", "tokens_per_second", "layers", "warning")
    return [{n: v for n, v in line.items() if n not in left_out} for line in lines if line["phase"] == phase]


class Trained:
    """A finished run: its context's lines and checkpoints, its folder, its metrics."""

    def __init__(self, config: RunConfig, data: Path, stage1: Path, work: Path, resume: Path | None = None) -> None:
        self.context = LocalContext(storage=work / "checkpoints", resume_from=resume)
        self.out = work / "stage2"
        self.metrics = train_stage2(config, data, stage1, self.out, self.context)

    def lines(self, phase: str, *, after: int = -1) -> list[dict[str, Any]]:
        """Numbers of log lines, without what time decides."""
        return numbers([line for line in self.context.lines if line["step"] > after], phase)

    def weights(self) -> dict[str, Tensor]:
        model, _ = load_explainer(self.out)
        vae_gmm = load_vae_gmm(self.out)
        return model.state_dict() | {f"vae.{name}": tensor for name, tensor in vae_gmm.state_dict().items()}


def put_code_into(file: Path, marker: Path) -> None:
    """Add an object to a checkpoint's file of tensors that makes the folder `marker` where it is unpickled."""
    with _tensors_only(file):
        state = torch.load(file)
    torch.save(state | {"extra": Trap(marker)}, file)


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float, *, but: float = 0) -> None:
    """Whether two states are equal, `but` a share of each tensor's values: where a gradient is as small as Adam's eps,
    its rounding error is a step of its own, which the processor decides."""
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        far = ~torch.isclose(tensor, b[name], rtol=tolerance, atol=tolerance)
        assert far.double().mean() <= but, f"{name}: {int(far.sum())} of {far.numel()} values differ"


def check_equal_runs(run: Trained, expected: Trained, *, unsettled: bool = False) -> None:
    """Losses and weights to 1e-3: float32, whose sums the engines take in different orders.

    `unsettled`: routers that start beside idle experts, so that rounding decides to which of two a token near a
    border goes; routers, experts and what is measured of them are then equal to 1e-2, but for one value in 100."""
    for phase in ("train", "valid"):
        equal_lines(run.lines(phase), expected.lines(phase), 1e-3, unsettled=unsettled)
    equal_weights(run.weights(), expected.weights(), 1e-3, unsettled=unsettled)


def equal_lines(
    lines: list[dict[str, Any]], wanted: list[dict[str, Any]], tolerance: float, *, unsettled: bool = False
) -> None:
    """Log lines to `tolerance`, relative; `unsettled` as in `check_equal_runs`."""
    loose = ("routed_",) if unsettled else ()
    for line, other in zip(lines, wanted, strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            rel = 1e-2 if name.startswith(loose) else tolerance
            assert value == pytest.approx(other[name], rel=rel), f"{name} of step {line['step']}"


def equal_weights(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float, *, unsettled: bool = False) -> None:
    """Two states to `tolerance`; `unsettled` as in `check_equal_runs`."""
    routed = {name for name in a if unsettled and (".mlp.router." in name or ".mlp.experts." in name)}
    close({n: t for n, t in a.items() if n not in routed}, {n: t for n, t in b.items() if n not in routed}, tolerance)
    close({n: a[n] for n in routed}, {n: b[n] for n in routed}, 1e-2, but=1e-2)


def _worker(
    rank: int, config: RunConfig, data: Path, stage1: Path, work: Path, resume: Path | None, logits_at_once: int
) -> None:
    """One of two processes, as Ray Train would start it."""
    output_head.CPU_LOGITS = logits_at_once
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{work}/meeting", rank=rank, world_size=2)
    lines: list[dict[str, Any]] = []

    class Context(LocalContext):
        def log(self, metrics: Metrics) -> None:
            lines.append(dict(metrics))

        def checkpoint(self, folder: Path, metrics: Metrics, unchanged: Sequence[str] = ()) -> None:
            """Both ranks' files in one folder, as Ray Train merges them."""
            kept = work / "checkpoints" / f"{metrics['step']}"
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            for name in unchanged:
                shutil.copy2(self.checkpoints[-1] / name, kept / name)
            self.checkpoints.append(kept)

    context = Context(rank=rank, world_size=2, resume_from=resume)
    metrics = train_stage2(config, data, stage1, work / "stage2", context)
    (work / f"rank{rank}.json").write_text(json.dumps({"lines": lines, "metrics": metrics}))
    torch.distributed.destroy_process_group()


def in_two_workers(
    config: RunConfig,
    data: Path,
    stage1: Path,
    work: Path,
    resume: Path | None = None,
    logits_at_once: int = output_head.CPU_LOGITS,
) -> list[dict[str, Any]]:
    """Both workers' log lines and metrics; `work` gets stage2 and checkpoints/STEP."""
    work.mkdir(parents=True)
    multiprocessing.spawn(_worker, (config, data, stage1, work, resume, logits_at_once), nprocs=2)
    ranks = [json.loads((work / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["metrics"]["validation_losses"] == ranks[1]["metrics"]["validation_losses"]
    return ranks


HALF_BATCHES = (*TWO_WORKERS, "stage2.batch_size=8")
"""Two workers whose batches together are those of one."""


def save_base(folder: Path, *, tied: bool = True) -> Path:
    """A tiny pretrained LLaMA with its tokenizer, as `stage2.base_model` takes it; its head its embeddings, or not."""
    texts = ["What a fine book about ghosts and clues!"] * 20
    model, tokenizer = load_base("scratch", tiny().stage2.scratch, texts, seed=0)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 0.01)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def joint_batch(setup: Setup) -> Batch:
    pairs = setup.pairs.epoch(0).take(slice(0, 64))
    columns = {"users": pairs.user, "items": pairs.item, "ratings": pairs.rating}
    batch = setup.train.collate(np.arange(16), setup.clusters["train"], setup.pad)
    return batch | {name: torch.from_numpy(column) for name, column in columns.items()}
