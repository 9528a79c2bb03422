"""`gavamoe human-eval import`: raters' sheets and the key -> scores by system, Human-Score (Eq. 14), agreement.

A sheet is a CSV file with the columns id, personalization, quality, satisfaction; others are not read. A text without
any score was not rated; one with some of them missing is an error, like everything else that is not 1 to 5 in halves.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from gavamoe.artifacts.files import read_json, save_png, write_json
from gavamoe.errors import InputError, validated
from gavamoe.evaluation.human.study import CRITERIA, SCALE, WEIGHTS, Key, read_key
from gavamoe.evaluation.text_tables import read_columns

MAX_SHEET_BYTES = 32 * 2**20
RESAMPLES = 2000
HUMAN_SCORE = "human_score"
NAMES = (*(criterion.name for criterion in CRITERIA), HUMAN_SCORE)


class Estimate(BaseModel):
    """A number with its 95 % bootstrap interval over rows."""

    model_config = ConfigDict(frozen=True)
    value: float
    low: float
    high: float


class SystemScores(BaseModel):
    """One system: Table 4's line."""

    model_config = ConfigDict(frozen=True)
    system: str
    rows: int
    """Rated by at least one rater."""
    ratings: int
    scores: dict[str, Estimate]


class Gap(BaseModel):
    """Human-Score of one system less that of another, on the rows rated for both."""

    model_config = ConfigDict(frozen=True)
    system: str
    other: str
    rows: int
    gap: Estimate


class HumanResult(BaseModel):
    """What the raters found."""

    model_config = ConfigDict(frozen=True)
    raters: list[str]
    texts: int
    rated_by_two: int
    """Texts that agreement rests on."""
    weights: tuple[float, float, float]
    systems: list[SystemScores]
    gaps: list[Gap]
    agreement: dict[str, float | None]
    """Krippendorff's alpha for interval data, by score; None without two ratings of a text, or without any spread."""


def import_study(
    key: Path, sheets: Sequence[Path], *, weights: tuple[float, float, float] = WEIGHTS, seed: int = 0
) -> tuple[HumanResult, Path]:
    """Read, check and sum up; writes KEY.result.json and .png beside the key and returns the first one's path.

    Raises:
        InputError: a sheet is not what it must be, named by file, row and field; two sheets of one name; no sheet.
    """
    if not sheets:
        raise InputError("human-eval import: name the raters' CSV files after the key")
    if abs(sum(weights) - 1) > 1e-6 or min(weights) < 0:
        raise InputError(f"weights {':'.join(f'{w:g}' for w in weights)}: must not be negative and sum to 1 (Eq. 14)")
    names = [Path(sheet).stem for sheet in sheets]
    if len(set(names)) < len(names):
        raise InputError(f"two sheets are named {max(names, key=names.count)}; a file's name is its rater's")
    known = read_key(key)
    scores_VTC = np.stack([_with_human_score(read_sheet(Path(sheet), known), weights) for sheet in sheets])
    result = summarize(known, names, scores_VTC, weights, seed)
    base = Path(key).name.removesuffix(".json").removesuffix(".key")
    out = Path(key).with_name(f"{base}.result.json")
    write_json(out, result.model_dump(mode="json"))
    plot(result, out.with_suffix(".png"))
    return result, out


def read_result(path: Path) -> HumanResult:
    """What `import_study` wrote.

    Raises:
        InputError: the file is missing or not such a result.
    """
    return validated(HumanResult, read_json(path), path, "the result of a human evaluation")


def read_sheet(path: Path, key: Key) -> np.ndarray:
    """Scores (T, 3) in the key's order, NaN where not rated."""
    if path.is_file() and path.stat().st_size > MAX_SHEET_BYTES:
        raise InputError(f"{path}: larger than the {MAX_SHEET_BYTES} bytes a sheet may have")
    if path.suffix.lower() != ".csv":
        raise InputError(f"{path}: expected a CSV file; save the sheet as comma-separated values")
    columns = read_columns(path)
    for name in ("id", *NAMES[:-1]):
        if name not in columns:
            raise InputError(f"{path}: no column {name}; the sheet must keep its first line")
    position = {text.id: index for index, text in enumerate(key.texts)}
    scores_TC = np.full((len(key.texts), len(CRITERIA)), np.nan)
    seen: set[str] = set()
    for number, name in enumerate(columns["id"], start=1):
        if not any(column[number - 1].strip() for column in columns.values()):
            continue  # spreadsheets write rows of commas for what was deleted
        if name not in position:
            raise InputError(f"{path}, row {number}, id: {name[:40]!r} is not in the key; is it another study's sheet?")
        if name in seen:
            raise InputError(f"{path}, row {number}, id: {name} occurs twice")
        seen.add(name)
        given = {criterion: str(columns[criterion][number - 1]).strip() for criterion in NAMES[:-1]}
        if any(given.values()):
            scores_TC[position[name]] = [_score(text, path, number, field) for field, text in given.items()]
    if np.isnan(scores_TC).all():
        raise InputError(f"{path}: holds no rating")
    return scores_TC


def _score(text: str, path: Path, row: int, field: str) -> float:
    try:
        value = float(text.replace(",", "."))  # decimal commas of European spreadsheets
    except ValueError:
        value = math.nan
    if value not in SCALE:
        found = repr(text[:40]) if text else "nothing, while the row's other scores are there"
        raise InputError(f"{path}, row {row}, {field}: {found}; expected 1 to 5 in half points, such as 3.5")
    return value


def _with_human_score(scores_TC: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Append Eq. 14's weighted sum: (T, 4)."""
    return np.column_stack([scores_TC, scores_TC @ np.array(weights)])


def summarize(
    key: Key, raters: Sequence[str], scores_VTC: np.ndarray, weights: tuple[float, float, float], seed: int
) -> HumanResult:
    """Means over raters, then over rows; intervals by resampling rows, the same ones for every system."""
    rows = sorted({text.row for text in key.texts})
    position = {row: index for index, row in enumerate(rows)}
    rated_VT = ~np.isnan(scores_VTC[:, :, 0])
    means_TC = _mean(scores_VTC)
    by_system = {name: np.full((len(rows), len(NAMES)), np.nan) for name in key.systems}
    ratings = dict.fromkeys(key.systems, 0)
    for index, text in enumerate(key.texts):
        for name in text.systems:
            by_system[name][position[text.row]] = means_TC[index]
            ratings[name] += int(rated_VT[:, index].sum())
    drawn = np.random.default_rng(seed).integers(len(rows), size=(RESAMPLES, len(rows)))
    systems = [
        SystemScores(
            system=name,
            rows=int((~np.isnan(scores_RC[:, 0])).sum()),
            ratings=ratings[name],
            scores={label: _estimate(scores_RC[:, c], drawn) for c, label in enumerate(NAMES)},
        )
        for name, scores_RC in by_system.items()
        if not np.isnan(scores_RC).all()
    ]
    present = [system.system for system in systems]
    gaps = []
    for index, name in enumerate(present):
        for other in present[index + 1 :]:
            gap_R = by_system[name][:, -1] - by_system[other][:, -1]
            both = int((~np.isnan(gap_R)).sum())
            if both:
                gaps.append(Gap(system=name, other=other, rows=both, gap=_estimate(gap_R, drawn)))
    return HumanResult(
        raters=list(raters),
        texts=len(key.texts),
        rated_by_two=int((rated_VT.sum(axis=0) > 1).sum()),
        weights=weights,
        systems=systems,
        gaps=gaps,
        agreement={label: krippendorff_alpha(scores_VTC[:, :, c]) for c, label in enumerate(NAMES)},
    )


def krippendorff_alpha(scores_VT: np.ndarray) -> float | None:
    """Krippendorff's alpha for interval data: 1 less observed over expected disagreement.

    Args:
        scores_VT: NaN where a rater did not rate a text. Texts with one rating say nothing about agreement.
    """
    units = [column[~np.isnan(column)] for column in scores_VT.T]
    units = [unit for unit in units if len(unit) > 1]
    if not units:
        return None
    pooled = np.concatenate(units)
    expected = _squared_gaps(pooled) / (len(pooled) * (len(pooled) - 1))
    if expected == 0:
        return None
    observed = sum(_squared_gaps(unit) / (len(unit) - 1) for unit in units) / len(pooled)
    return float(1 - observed / expected)


def _squared_gaps(values: np.ndarray) -> float:
    """Sum of squared differences over all ordered pairs."""
    return float(2 * len(values) * ((values - values.mean()) ** 2).sum())


def _mean(scores_VTC: np.ndarray) -> np.ndarray:
    """Mean over raters (T, C), NaN where nobody rated; numpy's own warns there."""
    counts = (~np.isnan(scores_VTC)).sum(axis=0)
    return np.where(counts > 0, np.nansum(scores_VTC, axis=0) / np.maximum(counts, 1), np.nan)


def _estimate(values_R: np.ndarray, drawn: np.ndarray) -> Estimate:
    known_R = ~np.isnan(values_R)
    filled_R = np.nan_to_num(values_R)
    counts = known_R[drawn].sum(axis=1)
    resampled = filled_R[drawn].sum(axis=1)[counts > 0] / counts[counts > 0]
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(value=float(filled_R.sum() / known_R.sum()), low=float(low), high=float(high))


def plot(result: HumanResult, out: Path) -> None:
    """Table 4 as PNG: a group a score, a bar a system, with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(result.systems)
    for index, system in enumerate(result.systems):
        estimates = [system.scores[name] for name in NAMES]
        values = [one.value for one in estimates]
        reach = [[one.value - one.low for one in estimates], [one.high - one.value for one in estimates]]
        places = np.arange(len(NAMES)) + (index - (len(result.systems) - 1) / 2) * width
        axes.bar(places, values, width, yerr=reach, capsize=3, label=system.system)
    axes.set(ylim=(1, 5), ylabel="1 to 5", xticks=range(len(NAMES)))
    axes.set_xticklabels([name.replace("_", " ") for name in NAMES])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small")
    save_png(figure, out)
