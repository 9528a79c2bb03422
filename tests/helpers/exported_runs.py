"""For the tests of exports: a tiny run of three gates, trained once a session, and what it exports."""

import functools
from pathlib import Path

import torch

from gavamoe.artifacts.run import Run, claim_run, open_run
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import open_dataset
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.export.exported_run import Format, export_run
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.train import train_stage1
from gavamoe.stage2.train import train_stage2
from helpers.scratch import scratch_folder
from helpers.tiny import tiny

CONFIG = (
    "stage2.max_steps=150", "stage2.evaluate_every=0", "stage2.checkpoint_every=0", "stage2.alpha=0",
    "stage2.experts.conversion=shared", "stage2.scratch.hidden_size=64", "stage2.experts.intermediate_size=32",
)  # fmt: skip


@functools.cache
def trained(*overrides: str) -> Path:
    """A run folder with both stages, of 60 users and 40 items."""
    work = scratch_folder("gavamoe-export-")
    dataset = synthesize(work / "data", users=60, items=40, ratings=1500, groups=3, seed=0)
    config: RunConfig = tiny(*CONFIG, *overrides)
    folder = work / "run"
    claim_run(folder, config, dataset, open_dataset(dataset).fingerprint, continuing=False)
    torch.manual_seed(0)
    train_stage1(config, dataset, folder / "stage1", LocalContext())
    train_stage2(config, dataset, folder / "stage1", folder / "stage2", LocalContext())
    return folder


def run(*overrides: str) -> Run:
    return open_run(trained(*overrides))


@functools.cache
def exported(form: Format, dtype: str) -> Path:
    """The run's export, all gates."""
    out = scratch_folder("gavamoe-export-") / "out"
    export_run(run(), out, form, dtype=dtype)
    return out
