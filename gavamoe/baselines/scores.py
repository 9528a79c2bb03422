"""Writing and evaluation with any run: GaVaMoE's, or a baseline's, by the same rows, metrics and files."""

from pathlib import Path
from typing import Any

from gavamoe.artifacts.run import open_run
from gavamoe.baselines.writing import BaselineWriter
from gavamoe.errors import InputError
from gavamoe.evaluation.evaluate import Scored, evaluate_run, score_run
from gavamoe.generation.generator import ExplanationGenerator
from gavamoe.model.quantized import Quantization
from gavamoe.runtime.progress import OnProgress


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


def evaluate_any(
    run: Path,
    *,
    split: str = "test",
    dataset: Path | None = None,
    device: str | None = None,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a trained run and write its evaluation/ folder; see `evaluation.evaluate.evaluate_run`.

    A baseline has neither gates nor slots, so gates are not probed and row losses are not read.
    """
    from gavamoe.generation.placement import writing_device

    opened = open_run(run)
    if opened.config.system == "gavamoe":
        return evaluate_run(run, split=split, dataset=dataset, device=device, on_progress=on_progress, **options)
    place = writing_device(device, gpu=opened.config.runtime.gpu)
    bits: Quantization = options.get("quantize") or "none"
    return score_run(
        opened,
        lambda: Scored(load_writer(run, bits=bits, device=place)),
        split=split,
        dataset=dataset,
        on_progress=on_progress,
        **options,
    )
