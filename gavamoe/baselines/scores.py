"""Writing and evaluation with any run: GaVaMoE's, or a baseline's, by the same rows, metrics and files."""

from pathlib import Path
from typing import Any

from gavamoe.artifacts.run import open_run
from gavamoe.baselines.writing import BaselineWriter
from gavamoe.errors import InputError
from gavamoe.evaluation import writers
from gavamoe.evaluation.evaluate import evaluate_run
from gavamoe.evaluation.writers import Scored
from gavamoe.generation.generator import ExplanationGenerator
from gavamoe.model.quantized import Quantization


def load_writer(
    run: Path, dtype: str = "auto", bits: Quantization = "none", device: str = "cpu"
) -> ExplanationGenerator | BaselineWriter:
    """What writes a run's texts, on a torch device, as `ExplanationGenerator.load` and `BaselineWriter.load` do.

    Raises:
        InputError: not a trained run, a damaged one, or fewer bits for a baseline, which has no such form.
    """
    opened = open_run(run)
    if opened.config.system == "gavamoe":
        return ExplanationGenerator.load(opened.stage2, device, dtype, bits)
    if bits != "none":
        raise InputError(f"{run}: {opened.config.system} is not written in fewer bits; leave out --quantize")
    return BaselineWriter.load(opened.baseline, device)


def load_scored(run: Path, dtype: str, bits: Quantization, device: str) -> Scored:
    """What is evaluated of a run; a baseline has neither gates nor slots, so none are probed and no losses are read."""
    if open_run(run).config.system == "gavamoe":
        return writers.load_scored(run, dtype, bits, device)
    return Scored(load_writer(run, dtype, bits, device))


def evaluate_any(run: Path, **options: Any) -> dict[str, Any]:
    """Evaluate a trained run and write its evaluation/ folder; see `evaluation.evaluate.evaluate_run`."""
    return evaluate_run(run, load=load_scored, **options)
