"""Versions, whole trainings on the GPU, and Ray where it is installed."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from benchmarks.gpu import Figures
from gavamoe.artifacts.run import RunFolder
from gavamoe.config.files import load_config
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.evaluation.evaluate import evaluate
from gavamoe.generation.generator import ExplanationGenerator
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.train import train_stage1
from gavamoe.stage2.train import train_stage2

PACKAGES = ("torch", "transformers", "deepspeed", "ray", "peft", "optuna", "triton", "pydantic")
OLDEST_DRIVER = 580
"""What torch's builds for CUDA 13 need."""


def versions(device: str, tiny: bool) -> tuple[str, Figures]:
    """What is installed, and what the machine has; what is missing is named."""
    del tiny
    found: Figures = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    found["tools"] = ", ".join(tool for tool in ("nvcc", "g++", "ninja") if shutil.which(tool))
    found["free GB in the temporary folder"] = round(shutil.disk_usage(tempfile.gettempdir()).free / 1e9)
    shared = Path("/dev/shm")
    if shared.exists():
        found["free GB in /dev/shm"] = round(shutil.disk_usage(shared).free / 1e9)
    found["host GiB"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    found["CPU cores"] = os.cpu_count()
    ok = True
    if device != "cpu":
        card = torch.cuda.get_device_properties(0)
        found |= {
            "GPU": card.name,
            "GPU GiB": round(card.total_memory / 2**30, 1),
            "capability": f"{card.major}.{card.minor}",
            "CUDA of torch": torch.version.cuda,
            "driver": _driver(),
        }
        ok = found["driver"] == "?" or int(found["driver"].split(".")[0]) >= OLDEST_DRIVER
    return ("PASS" if ok else "FAIL"), found


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "?"
    return answer.stdout.split("\n")[0].strip() or "?"


def pipeline(device: str, tiny: bool) -> tuple[str, Figures]:
    """Both stages and an evaluation on the GPU; the artifact on the CPU then writes the same texts."""
    steps = 6 if tiny else 400
    config = load_config(
        "quickstart",
        [f"stage2.max_steps={steps}", "stage2.evaluate_every=200", "runtime.engine=torch", "runtime.workers=1"],
    )
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder) / "run")
        started = time.perf_counter()
        sizes = {"users": 200, "items": 100, "ratings": 3000} if tiny else {}
        data = synthesize(Path(folder) / "data", seed=0, **sizes)
        for name, train in (("stage 1", train_stage1), ("stage 2", train_stage2)):
            figures[f"seconds before {name}"] = round(time.perf_counter() - started, 1)
            extra = {"stage1": run.stage1} if train is train_stage2 else {}
            out = run.stage2 if train is train_stage2 else run.stage1
            metrics = train(config, data, out=out, context=LocalContext(device=device), **extra)
            kept = ("test", "valid", "user_ari", "validation_loss", "tokens_per_second", "seconds")
            figures[name] = {key: metrics[key] for key in kept if key in metrics and key != "valid"}
        texts = []
        from gavamoe.data.dataset import open_dataset

        small = load_config("quickstart", ["evaluation.rows=300", "evaluation.probe_rows=0"])
        for place, dtype in ((device, "float32"), ("cpu", "float32"), (device, "bfloat16")):
            writer = ExplanationGenerator.load(run.stage2, place, dtype)
            began = time.perf_counter()
            result = evaluate(writer, open_dataset(data), small, routes=run.stage1 / "routes.parquet")
            figures[f"evaluation, {place} {dtype}"] = {
                "seconds": round(time.perf_counter() - began, 2),
                **{key: value for key, value in result.metrics["metrics"].items() if key in ("bleu_4", "rmse")},
            }
            texts.append(_texts(result.generations))
    for name, other in (("cpu", texts[1]), ("bfloat16", texts[2])):
        same = sum(one == two for one, two in zip(texts[0], other, strict=True))
        figures[f"texts equal to the GPU's in float32: {name}"] = f"{same} of {len(texts[0])}"
    same = sum(one == two for one, two in zip(texts[0], texts[1], strict=True))
    return ("PASS" if same >= 0.99 * len(texts[0]) else "FAIL"), figures


def _texts(table: Any) -> list[str]:
    column = "generated" if "generated" in table.column_names else "prediction"
    texts: list[str] = table.column(column).to_pylist()
    return texts


def ray(device: str, tiny: bool) -> tuple[str, Figures]:
    """`gavamoe train` on a Ray worker with the GPU and DeepSpeed, killed once, resumed; then `evaluate`."""
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("deepspeed") is None:
        return "SKIP", {"reason": "Ray or DeepSpeed is not installed: placement and workers are unchecked"}
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        data = synthesize(Path(folder) / "data", users=300, items=150, ratings=6000, seed=0)
        run = Path(folder) / "run"
        values = [
            f"runtime.gpu={str(device != 'cpu').lower()}", "runtime.workers=1", "stage2.max_steps=60",
            "stage2.checkpoint_every=20", "stage2.evaluate_every=20", "stage1.epochs=2", "stage2.precision=bf16",
        ]  # fmt: skip
        train = ["train", "quickstart", "--dataset", str(data), "--run-dir", str(run)]
        train += [part for value in values for part in ("--set", value)]
        for name, command in (
            ("train", train),
            ("evaluate", ["evaluate", str(run), "--rows", "200", "--probe-rows", "20", "--json"]),
            ("explain", ["explain", str(run), "--user", "u1", "--item", "i1", "--json"]),
        ):
            started = time.perf_counter()
            done = _gavamoe(command)
            figures[f"{name}, seconds"] = round(time.perf_counter() - started, 1)
            if done.returncode:
                return "FAIL", figures | {f"{name} said": (done.stdout + done.stderr)[-1500:]}
        log = run / "logs" / "stage2.jsonl"
        figures["logged lines"] = len(log.read_text().splitlines()) if log.is_file() else 0
        rows = pq.read_table(run / "evaluation" / "generations.parquet")
        figures["texts"] = rows.num_rows
    return "PASS", figures


def _gavamoe(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    code = "from gavamoe.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=240)
