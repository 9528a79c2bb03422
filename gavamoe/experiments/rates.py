"""Learning rates of a comparison: for every system the best of equally many, on validation, under the first seed.

A system's rates are those of its own config, all times one factor. Each is a whole training; the best one becomes the
system's run of the first seed, the others are removed, and `rates.json` keeps what was found. More factors may be named
later, where the best was the first or the last: only these are trained then. A run that was trained before rates were
compared is the one of factor 1.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from gavamoe.artifacts.files import read_json, write_json
from gavamoe.artifacts.run import METRICS_FILE
from gavamoe.baselines.registry import find_baseline
from gavamoe.config.files import override_config
from gavamoe.config.schema import RunConfig
from gavamoe.errors import InputError, validated
from gavamoe.evaluation.comparison import ChosenRate
from gavamoe.experiments.variants import System

RATES_FILE = "rates.json"
Train = Callable[[System, RunConfig, Path], None]
"""Trains a system by its config into a run folder, or goes on with what is there."""


def scaled_rates(config: RunConfig, factor: float) -> list[str]:
    """Overrides by which all learning rates of the config's system are times `factor`; stage 1's stay."""
    if config.system == "gavamoe":
        place, section = "stage2", config.stage2
        names = ["learning_rate", *(["expert_learning_rate"] if section.expert_learning_rate else [])]
    else:
        entry = find_baseline(config.system)
        place, section = f"baselines.{entry.module}", entry.settings(config)
        names = [name for name in type(section).model_fields if name.endswith("learning_rate")]
    return [f"{place}.{name}={getattr(section, name) * factor!r}" for name in names]


def chosen_rate(folder: Path, factors: Sequence[float]) -> ChosenRate | None:
    """What was chosen for a system among these factors; None where some were not tried yet.

    Raises:
        InputError: others were tried as well.
    """
    found = _found(folder)
    if found is None:
        return None
    if not set(found.losses) <= set(factors):
        known, file = _listed(found.losses), folder / RATES_FILE
        raise InputError(f"{file}: chosen among {known}, not {_listed(factors)}; name those too, or use another folder")
    return found if len(found.losses) == len(set(factors)) else None


def choose_rate(system: System, config: RunConfig, folder: Path, factors: Sequence[float], train: Train) -> ChosenRate:
    """Train a system with each factor that was not tried yet, and choose the one of the lowest validation loss.

    Where that is another one than before, the system's runs at the former rate are removed. Without an earlier choice a
    run of the first seed, finished or not, is taken for the training of factor 1.

    Args:
        config: the system's own, under the first seed.
        folder: the system's, with a run folder a seed; the best training is moved to that of `config.seed`.

    Raises:
        InputError: the data have no validation rows, `folder` has a choice among other factors, or a run of factor 1,
            which is not among these.
    """
    found = chosen_rate(folder, factors)
    kept = folder / f"seed-{config.seed}"
    if found is None:
        earlier = _found(folder)
        losses = {} if earlier is None else dict(earlier.losses)
        unscaled = earlier is None and kept.exists()
        if unscaled and 1 not in factors:
            raise InputError(
                f"{kept}: was trained at the config's own rate; name the factor 1 too, or use another folder"
            )
        for factor in sorted(set(factors) - set(losses)):
            run = kept if unscaled and factor == 1 else folder / f"rate-{factor:g}"
            train(system, override_config(config, scaled_rates(config, factor)), run)
            loss = read_json(run / str(system.model) / METRICS_FILE)["validation_loss"]
            if loss is None:
                raise InputError("learning rates are chosen by validation loss, and the data have no validation rows")
            losses[factor] = float(loss)
        found = ChosenRate(factor=min(losses, key=lambda factor: losses[factor]), losses=losses)
        write_json(folder / RATES_FILE, found.model_dump(mode="json"))
    best = folder / f"rate-{found.factor:g}"
    if best.exists():  # it was not moved yet, so what is there was trained at another rate
        for run in folder.glob("seed-*"):
            shutil.rmtree(run)
        best.rename(kept)
    for factor in factors:
        shutil.rmtree(folder / f"rate-{factor:g}", ignore_errors=True)
    return found


def _found(folder: Path) -> ChosenRate | None:
    file = folder / RATES_FILE
    return validated(ChosenRate, read_json(file), file, "a choice of learning rates") if file.is_file() else None


def parse_factors(text: str) -> list[float]:
    """Factors from "0.3,1,3".

    Raises:
        InputError: fewer than two, one given twice, or one that is no positive number.
    """
    try:
        factors = [float(part) for part in text.split(",")]
    except ValueError:
        factors = []
    if len(set(factors)) < max(2, len(factors)) or not all(0 < factor < math.inf for factor in factors):
        raise InputError(f"rates {text}: two or more different factors above 0, such as 0.3,1,3")
    return sorted(factors)


def _listed(factors: Sequence[float] | dict[float, float]) -> str:
    return ", ".join(f"{factor:g}" for factor in sorted(factors))
