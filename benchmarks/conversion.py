"""What each way from a dense checkpoint to experts costs and gives, on the same rows, steps and seed.

    python benchmarks/conversion.py [DATASET OUT] [--config smollm2] [--steps 400] [--only shared-lora] [--set F=VALUE]

Without arguments: a small synthetic dataset, the quickstart preset and 60 steps, in a folder that is removed.

`NAME-lora` is the same with the pretrained weights frozen and LoRA on attention; it needs a pretrained base model.
`NAME-fast` gives routed experts and gates ten times the learning rate.
Every system is a run folder OUT/NAME, so that `gavamoe evaluate` and `gavamoe report` take it; one that is there is not
trained again. All share one stage 1 (OUT/stage1). Times are CPU seconds of this process, so that other work on the
machine does not count. Prints the validation loss right after conversion, along the steps, and at equal CPU time; then
how far the routed experts' output moved for each step of the dense network's beside them (`movement_ratio`), and what a
wrong gate costs on validation rows, in nats a token (mean over rows, and its standard error).
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch

from gavamoe.artifacts.files import read_json, write_json
from gavamoe.config.files import dump_config, load_config, override_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import open_dataset
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.evaluation.faithfulness.gates import measure_gates
from gavamoe.evaluation.rows import requests_of, select_rows
from gavamoe.generation.generator import ExplanationGenerator
from gavamoe.runtime.context import LocalContext, Metrics
from gavamoe.stage1.train import train_stage1
from gavamoe.stage2.train import train_stage2

PLAIN: dict[str, list[str]] = {
    "dense": ["stage2.experts.enabled=false"],
    "shared": ["stage2.experts.conversion=shared"],
    "upcycle": ["stage2.experts.conversion=upcycle"],
    "split": ["stage2.experts.conversion=split"],
    "random": ["stage2.experts.conversion=random"],
}
LORA = ["stage2.lora.rank=16", "stage2.lora.alpha=32", "stage2.learning_rate=0.0005"]
"""Adapters take a larger step than the weights beneath them would."""
FAST = ["stage2.expert_learning_rate=0.001"]
"""Ten times the smollm2 preset's rate, for what starts beside a trained model."""
OWN = "stage2.experts.gate_bias=3"
"""Gates that start with experts of their own."""
UNSCALED = ["stage2.experts.conversion=shared", "stage2.experts.scale=1"]
"""Copied neurons of zero output, without a scale."""
LOW_RANK = ["stage2.experts.conversion=lora", "stage2.learning_rate=0.001"]
"""Low-rank experts on a frozen base model."""
GATE_ROWS = 48
"""Validation rows that are read through every gate."""
SYSTEMS = (
    PLAIN
    | {f"{name}-lora": [*fields, *LORA] for name, fields in PLAIN.items()}
    | {f"{name}-fast": [*PLAIN[name], *FAST] for name in ("shared", "split", "random")}
    | {f"{name}-own": [*PLAIN[name], OWN] for name in ("shared", "upcycle")}
    | {"unscaled": UNSCALED, "low-rank": LOW_RANK}
)
CURVE = "curve.json"


class TimedContext(LocalContext):
    """Notes the CPU seconds of the process beside every log line."""

    def log(self, metrics: Metrics) -> None:
        super().log({**metrics, "cpu_seconds": time.process_time()})
        if metrics["phase"] == "valid":
            print(f"  step {metrics['step']:5}  validation loss {metrics['validation_loss']:.4f}", flush=True)


def train(name: str, config: RunConfig, dataset: Path, stage1: Path, run: Path) -> None:
    """Train one system into a run folder."""
    print(name, flush=True)
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    shutil.copytree(stage1, run / "stage1")
    (run / "config.yaml").write_text(dump_config(config))
    write_json(run / "dataset.json", {"path": str(dataset), "fingerprint": open_dataset(dataset).fingerprint})
    context = TimedContext()
    train_stage2(config, dataset, run / "stage1", run / "stage2", context)
    (run / "logs").mkdir()
    write_json(run / CURVE, context.lines)


def table(out: Path, names: list[str]) -> None:
    """Losses by step, and at the CPU time that the fastest system took in all."""
    curves = {name: read_json(out / name / CURVE) for name in names}
    points = {
        name: [
            (line["step"], line["cpu_seconds"], line["validation_loss"]) for line in lines if line["phase"] == "valid"
        ]
        for name, lines in curves.items()
    }
    budget = min(lines[-1][1] - lines[0][1] for lines in points.values())
    steps = [step for step, _, _ in points[names[0]]]
    print(f"\n{'system':16} {'parameters':>11} {'CPU s':>7} " + " ".join(f"{step:>7}" for step in steps)
          + f"   at {budget:.0f} CPU s")  # fmt: skip
    for name in names:
        start = points[name][0][1]
        within = [loss for _, at, loss in points[name] if at - start <= budget * 1.001]
        parameters = read_json(out / name / "stage2" / "metrics.json")["parameters"]
        print(f"{name:16} {parameters:11,} {points[name][-1][1] - start:7.0f} "
              + " ".join(f"{loss:7.3f}" for _, _, loss in points[name]) + f"   {within[-1]:.3f}")  # fmt: skip


def gates(dataset: Path, folder: Path) -> str:
    """How far the experts of a trained run moved, and what a wrong gate costs."""
    experts = read_json(folder / "stage2" / "metrics.json")["experts"]
    ratio = experts["movement_ratio"] if experts else None
    explainer = ExplanationGenerator.load(folder / "stage2")
    rows = select_rows(open_dataset(dataset), "valid", GATE_ROWS, 0)
    probe = measure_gates(explainer, requests_of(rows, "given"), rows.references)
    cost = "-"
    if probe is not None and probe.loss_NK.shape[1] > 1:
        gap_N = probe.own_gap_N()
        cost = f"{gap_N.mean():.5f} ({gap_N.std() / len(gap_N) ** 0.5:.5f})"
    return f"{folder.name:16} {'-' if ratio is None else f'{ratio:.3f}':>14} {cost:>20}"


def compare(dataset: Path, out: Path, base: RunConfig, names: list[str]) -> None:
    """Train the systems that are not there yet, and print their table."""
    if not (out / "stage1").exists():
        train_stage1(base, dataset, out / "stage1", LocalContext())
    for name in names:
        if not (out / name / CURVE).exists():
            train(name, override_config(base, SYSTEMS[name]), dataset, out / "stage1", out / name)
    table(out, names)
    print(f"\n{'system':16} {'movement ratio':>14} {'wrong gate, nats':>20}")
    for name in names:
        print(gates(dataset, out / name), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--config")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(SYSTEMS), default=list(PLAIN))
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    small = asked.dataset is None
    base = override_config(
        load_config(asked.config or ("quickstart" if small else "smollm2")),
        [
            f"stage2.max_steps={asked.steps or (60 if small else 400)}",
            "stage2.epochs=1000",
            "stage2.checkpoint_every=0",
            "runtime.engine=torch",
            "runtime.workers=1",
            *(["stage2.evaluate_every=20"] if small else []),
            *asked.set,
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        dataset, out = asked.dataset or Path(folder) / "data", asked.out or Path(folder) / "runs"
        if small:
            synthesize(dataset, users=300, items=150, ratings=6000)
        compare(dataset.absolute(), out, base, asked.only)


if __name__ == "__main__":
    main()
