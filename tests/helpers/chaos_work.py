"""For the chaos run: the kinds of work, as commands, and the numbers that each of them ends with."""

import csv
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq

from gavamoe.artifacts.checksums import list_files
from gavamoe.artifacts.files import sha256

from .chaos_faults import OF_COMMANDS, OF_TRAININGS
from .cli import command
from .tiny import tiny_yaml

ROOT = Path(__file__).parent.parent.parent
SMALL = (
    "stage1.epochs=2", "stage2.max_steps=120", "stage2.checkpoint_every=20", "stage2.evaluate_every=60",
    "runtime.max_failures=3", "generation.max_new_tokens=12",
)  # fmt: skip
ENGINES = {
    "torch": ("runtime.engine=torch", "runtime.workers=1"),
    "deepspeed": ("runtime.engine=deepspeed", "runtime.workers=2", "stage2.batch_size=8", "stage2.elbo_batch_size=32"),
}
SPACE = """\
description: Three numbers of clusters, each once.
stages: 1
metric: stage1.rmse
sampler: grid
budget: {trials: 3}
parameters:
  stage1.clusters: {type: int, low: 2, high: 4}
"""


class Base:
    """What all work shares: a folder, the inputs in it, and the environment of commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = Path(tempfile.mkdtemp(prefix="gch-", dir="/tmp"))  # Ray's sockets need short names
        (folder / "cache").mkdir(parents=True)
        for engine, overrides in ENGINES.items():
            (folder / f"{engine}.yaml").write_text(tiny_yaml(*SMALL, *overrides))
        (folder / "space.yaml").write_text(SPACE)
        self.do("data", "synthesize", self.dataset, "--users", 60, "--items", 40, "--ratings", 1500, "--seed", 0)
        self.do("data", "synthesize", folder / "larger", "--users", 500, "--items", 300, "--ratings", 20000)
        self._write_reviews()

    @property
    def dataset(self) -> Path:
        return self.folder / "dataset"

    @property
    def reviews(self) -> Path:
        return self.folder / "reviews.csv"

    @property
    def environment(self) -> dict[str, str]:
        named = {
            "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "200",
            "RAY_TMPDIR": str(self.temporary),
            "GAVAMOE_CACHE": str(self.folder / "cache"),
            "TORCH_EXTENSIONS_DIR": str(self.folder / "torch_extensions"),
        }
        return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | named

    def do(self, *arguments: object) -> None:
        """Run a command without a fault."""
        done = subprocess.run(
            command(*arguments), env=self.environment, capture_output=True, text=True, check=False, timeout=900
        )
        if done.returncode:
            raise RuntimeError(f"{arguments}: exit code {done.returncode}\n{done.stderr[-3000:]}")

    def close(self) -> None:
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _write_reviews(self) -> None:
        with self.reviews.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["user", "item", "rating", "text"])
            for n in range(20_000):
                text = f"The room number {n % 977} was {'clean' if n % 3 else 'dirty'} and the pool was warm."
                writer.writerow([f"u{n % 397}", f"i{n // 397}", 1 + n % 5, text])


class Work:
    """One kind of work in a fresh folder."""

    name: ClassVar[str]
    faults: ClassVar[Sequence[str]] = OF_COMMANDS
    longest: ClassVar[int] = 1
    """Faults, at most, that befall the same work before it is left to end; half as many at least."""

    def __init__(self, base: Base, place: Path, variant: str = "") -> None:
        self.base, self.place, self.variant = base, place, variant

    def begin(self) -> None:
        """Make what the command needs in the folder."""
        self.place.mkdir(parents=True, exist_ok=True)

    def arguments(self) -> list[object]:
        raise NotImplementedError

    def outcome(self) -> Any:
        """What must be as without a fault, free of times; None as long as the work is not there."""
        raise NotImplementedError


class Prepare(Work):
    name = "prepare"

    def arguments(self) -> list[object]:
        columns = [part for name in ("user", "item", "rating", "text") for part in ("--column", f"{name}={name}")]
        return ["data", "prepare", self.base.reviews, self.place / "made", "--format", "table", *columns]

    def outcome(self) -> Any:
        made = self.place / "made"
        return {name: entry.sha256 for name, entry in list_files(made).items()} if made.exists() else None


class Copy(Work):
    """A dataset or a run to a folder or to a URI."""

    name = "copy"

    @property
    def source(self) -> Path:
        return self.base.folder / ("larger" if self.variant.startswith("dataset") else "reference/train torch/run")

    @property
    def target(self) -> str:
        place = str(self.place / "copied")
        return f"file://{place}" if self.variant.endswith("URI") else place

    def arguments(self) -> list[object]:
        return ["copy", self.source, self.target]

    def outcome(self) -> Any:
        copied = self.place / "copied"
        if self.variant.endswith("URI"):
            copied = self.base.folder / "back"
            shutil.rmtree(copied, ignore_errors=True)
            back = command("copy", self.target, copied)
            if subprocess.run(back, env=self.base.environment, capture_output=True, check=False).returncode:
                return None
        if not copied.exists():
            return None
        return {name: entry.sha256 for name, entry in list_files(copied).items()}


class Evaluate(Work):
    name = "evaluate"
    longest = 2

    def begin(self) -> None:
        super().begin()
        source = self.base.folder / "reference/train torch/run"
        shutil.copytree(source, self.place / "run", ignore=shutil.ignore_patterns("evaluation", "report.html"))

    def arguments(self) -> list[object]:
        return ["evaluate", self.place / "run", "--rows", 40, "--probe-rows", 8]

    def outcome(self) -> Any:
        run = self.place / "run"
        if not (run / "evaluation").is_dir() or not (run / "report.html").is_file():
            return None
        texts = pq.read_table(run / "evaluation" / "generations.parquet").to_pylist()
        return {"metrics": numbers(run / "evaluation" / "metrics.json"), "texts": texts}


class Train(Work):
    """Both stages; the variant is the engine."""

    name = "train"
    faults = OF_TRAININGS
    longest = 5

    def arguments(self) -> list[object]:
        config, dataset = self.base.folder / f"{self.variant}.yaml", self.base.dataset
        return ["train", config, "--dataset", dataset, "--run-dir", self.place / "run", "--resume"]

    def outcome(self) -> Any:
        run, found = self.place / "run", dict[str, Any]()
        for stage in ("stage1", "stage2"):
            folder = run / stage
            if not folder.is_dir():
                return None
            lines = [json.loads(line) for line in (run / "logs" / f"{stage}.jsonl").read_text().splitlines()]
            found[stage] = {
                "metrics": numbers(folder / "metrics.json"),
                "log": [timeless(line) for line in lines if "warning" not in line],
                "weights": {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))},
                "routes": pq.read_table(folder / "routes.parquet").to_pylist(),
            }
        return found


class Tune(Work):
    name = "tune"
    faults = OF_TRAININGS
    longest = 5

    def arguments(self) -> list[object]:
        space, config = self.base.folder / "space.yaml", self.base.folder / "torch.yaml"
        search = ["--run-dir", self.place / "search", "--no-final", "--concurrent", 1, "--resume"]
        return ["tune", space, config, "--dataset", self.base.dataset, *search]

    def outcome(self) -> Any:
        search = self.place / "search"
        if not (search / "trials.parquet").is_file() or not (search / "best.yaml").is_file():
            return None
        trials = pq.read_table(search / "trials.parquet").to_pylist()
        return {"trials": [timeless(trial) for trial in trials], "best": (search / "best.yaml").read_text()}


WORKS: dict[str, type[Work]] = {kind.name: kind for kind in (Train, Prepare, Copy, Evaluate, Tune)}
VARIANTS: dict[str, Sequence[str]] = {
    "copy": ("dataset to a folder", "dataset to a URI", "run to a folder", "run to a URI"),
    "train": ("torch", "torch", "deepspeed"),
}
"""Variants of the works that have some, each as often as it is to be drawn."""


def numbers(path: Path) -> Any:
    """The content of a metrics file without what time decides."""
    return timeless(json.loads(path.read_text(encoding="utf-8")))


def timeless(value: Any) -> Any:
    """A nested value without seconds, rates and dates."""
    if isinstance(value, dict):
        kept = {name: each for name, each in value.items() if not ("second" in name or name == "started")}
        return {name: timeless(each) for name, each in kept.items()}
    return [timeless(each) for each in value] if isinstance(value, list) else value


def first_difference(before: Any, after: Any, path: str = "", rounding: float = 0.0) -> str | None:
    """Where two outcomes differ, with both values; None where they don't. Numbers may differ by `rounding`."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted({*before, *after}):
            if found := first_difference(before.get(name), after.get(name), f"{path}/{name}", rounding):
                return found
        return None
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return next((f for n, (a, b) in pairs if (f := first_difference(a, b, f"{path}[{n}]", rounding))), None)
    if isinstance(before, float) and isinstance(after, float) and abs(before - after) <= rounding:
        return None
    return None if before == after else f"{path}: {str(before)[:200]} is now {str(after)[:200]}"
