"""The measures that a search can optimize or record: name, direction, source and definition of each.

Names of the registry (`metrics.METRICS`: "rouge_l", "rmse", ...) are measured on the VALIDATION split. Those of the
stages are "stage1.elbo" or "stage2.validation_loss"; those of cost "parameters", "active_parameters" and
"seconds_per_text".
"""

from dataclasses import dataclass
from typing import Any, Literal

from gavamoe.errors import InputError, did_you_mean
from gavamoe.evaluation.metrics.registry import METRICS

Direction = Literal["higher", "lower"]


@dataclass(frozen=True)
class Curve:
    """Where a stage's log has the values of a measure during training, for pruning."""

    phase: str
    """The "phase" of the log lines that have a value."""
    unit: str
    """The field of those lines that counts how far training is: "epoch" or "step"."""


@dataclass(frozen=True)
class Measure:
    """A number measured on each trial of a search."""

    name: str
    """Name in space files, and of the columns of trials.parquet."""
    label: str
    """Name in tables and plots."""
    direction: Direction
    """Which values are better."""
    source: Literal["stage1", "stage2", "texts", "model"]
    """Origin of the number. stage1, stage2: the stage's metrics; texts: explanations written for validation rows;
    model: its weights."""
    curve: Curve | None = None
    """The measure's values during training; None: it is known only at the end, so that trials can't be pruned by it."""
    unfair: tuple[str, ...] = ()
    """Config fields that change what the number means: trials that differ in them can't be compared by it."""
    definition: str = ""
    """The measure's definition, below tables."""

    @property
    def stage(self) -> int:
        """The last stage that a trial must train to have this measure."""
        return 1 if self.source == "stage1" else 2

    @property
    def arrow(self) -> str:
        return "↑" if self.direction == "higher" else "↓"


_STAGE1_CURVE = Curve("stage1-elbo-valid", "epoch")
_STAGE2_CURVE = Curve("valid", "step")
_TOKENS = ("stage2.base_model", "stage2.scratch.vocabulary")

_OWN = (
    Measure(
        "stage1.elbo", "ELBO", "higher", "stage1", _STAGE1_CURVE, ("stage1.likelihood",),
        "evidence lower bound per validation pair in nats: reconstruction - KL, whatever beta training used",
    ),
    Measure("stage1.rmse", "RMSE", "lower", "stage1", _STAGE1_CURVE, (), "of the ratings of the validation pairs"),
    Measure("stage1.mae", "MAE", "lower", "stage1", _STAGE1_CURVE, (), "of the ratings of the validation pairs"),
    Measure("stage1.auc", "AUC", "higher", "stage1", None, (), "implicit data: observed against sampled pairs"),
    Measure(
        "stage1.smallest_cluster_share", "smallest cluster", "higher", "stage1", _STAGE1_CURVE, ("stage1.clusters",),
        "share of the validation pairs that go to the smallest cluster",
    ),
    Measure(
        "stage2.validation_loss", "validation loss", "lower", "stage2", _STAGE2_CURVE, _TOKENS,
        "nats per token of the validation rows' explanations",
    ),
    Measure("stage2.validation_perplexity", "perplexity", "lower", "stage2", None, _TOKENS, "exp(validation loss)"),
    Measure("parameters", "parameters", "lower", "model", None, (), "of explainer and stage 1 together"),
    Measure(
        "active_parameters", "active parameters", "lower", "model", None, (),
        "the same, less the experts that a token does not see",
    ),
    Measure(
        "seconds_per_text", "seconds a text", "lower", "texts", None, ("generation.batch_size",),
        "wall time of writing the validation rows' explanations, by their number; trials at once slow each other",
    ),
)  # fmt: skip

TRUTH = "user_ari"
"""Agreement with the planted groups: recorded for synthetic data, never optimized."""


def _registered() -> tuple[Measure, ...]:
    return tuple(
        Measure(metric.name, metric.label, metric.direction, "texts", None, (), metric.definition)
        for metric in METRICS.values()
    )


MEASURES: dict[str, Measure] = {measure.name: measure for measure in (*_OWN, *_registered())}


def find_measure(name: str, stages: int) -> Measure:
    """The measure of that name for a space whose trials train `stages` stages.

    Raises:
        InputError: the name is unknown (the nearest known one is named), or the measure needs stage 2.
    """
    if stages == 1 and name in ("rmse", "mae"):  # the registry's rating metrics need no texts
        name = f"stage1.{name}"
    if name in (TRUTH, f"stage1.{TRUTH}"):
        raise InputError(f"metric {name}: compares with the planted truth, which a search may not see")
    if name not in MEASURES:
        hint = did_you_mean(name, MEASURES) or f"; known are {', '.join(MEASURES)}"
        raise InputError(f"metric {name}: unknown{hint}")
    measure = MEASURES[name]
    if measure.stage > stages:
        raise InputError(f"metric {name}: needs stage 2, and the space's trials end with stage 1; set stages: 2")
    return measure


def curve_value(name: str, line: dict[str, Any]) -> float | None:
    """The value of a stage measure in one of its stage's validation log lines."""
    if name == "stage1.elbo":
        parts = line.get("valid_reconstruction"), line.get("valid_kl")
        return None if None in parts else parts[0] - parts[1]  # type: ignore[operator]
    stage, _, field = name.partition(".")
    return line.get(f"valid_{field}" if stage == "stage1" else field)


def stage1_values(metrics: dict[str, Any]) -> dict[str, float]:
    """All stage-1 measures of a stage-1 metrics.json: of its validation split, and the planted truth's."""
    valid = metrics["valid"]
    values = {
        "stage1.elbo": valid["reconstruction"] - valid["kl"],
        TRUTH: metrics.get(TRUTH),
        "stage1.seconds": metrics["seconds"],
    }
    for field in ("rmse", "mae", "auc", "smallest_cluster_share"):
        values[f"stage1.{field}"] = valid.get(field)
    return {name: float(value) for name, value in values.items() if value is not None}


def stage2_values(metrics: dict[str, Any]) -> dict[str, float]:
    """All stage-2 measures of a stage-2 metrics.json."""
    names = ("validation_loss", "validation_perplexity", "seconds")
    values = {f"stage2.{name}": metrics[name] for name in names if metrics.get(name) is not None}
    return {name: float(value) for name, value in (values | {"parameters": metrics["parameters"]}).items()}


def text_values(metrics: dict[str, Any]) -> dict[str, float]:
    """All text measures of an evaluation of the validation split."""
    scores = {name: float(value) for name, value in metrics["metrics"].items() if value is not None}
    return scores | {"seconds_per_text": metrics["seconds_writing"] / max(metrics["rows"], 1)}
