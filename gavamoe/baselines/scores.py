"""Evaluation of any run: GaVaMoE's, or a baseline's, by the same rows, metrics and files."""

from pathlib import Path
from typing import Any

from gavamoe.artifacts.run import open_run
from gavamoe.baselines.writing import BaselineWriter
from gavamoe.evaluation.evaluate import Scored, evaluate_run, score_run
from gavamoe.runtime.progress import OnProgress


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
    return score_run(
        opened,
        lambda: Scored(BaselineWriter.load(opened.baseline, place)),
        split=split,
        dataset=dataset,
        on_progress=on_progress,
        **options,
    )
