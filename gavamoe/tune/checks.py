"""Whether a search space fits a config and a dataset: every wrong or useless setting is one clear error up front.

Inputs: a `Space`, the `RunConfig` that it starts from, the dataset. Output: nothing, or `InputError`.
"""

from collections.abc import Iterable
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from gavamoe.config.files import field_paths, override_config
from gavamoe.config.schema import RunConfig
from gavamoe.config.section import refuse_truth
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError, did_you_mean, first_problem
from gavamoe.tune.space import MAX_POINTS, Choice, Constraint, FloatRange, IntRange, Scalar, Space, Values

_NOT_SEARCHED = {
    "seed": "--seeds N repeats every trial with N seeds",
    "runtime.": "it decides where training runs, not what comes out",
    "evaluation.": "it decides how trials are measured, so their values would not compare",
    "stage1.min_cluster_share": "it decides what counts as collapsed, not what is learned",
    "stage1.on_collapse": "it decides what counts as collapsed, not what is learned",
    "stage2.validation_rows": "it decides how trials are measured, so their values would not compare",
    "stage2.evaluate_every": "it decides how often trials are measured, not what is learned",
    "stage2.checkpoint_every": "it decides how often trials are saved, not what is learned",
    "stage2.checkpoint_minutes": "it decides how often trials are saved, not what is learned",
    "stage2.prompt.max_explanation_tokens": "it decides which tokens count, so values would not compare",
}


def check_space(space: Space, config: RunConfig, dataset: Dataset, source: str) -> None:
    """Check a space against the config it starts from; `source` is named in errors.

    Raises:
        InputError: an unknown field or metric, a field that the trials ignore, a value that the config refuses,
            a constraint that leaves nothing, a budget or pruning that makes no sense.
    """
    try:
        _check_metrics(space, config, dataset)
        cheap = trial_config(config, space, {})
        for name in [*space.parameters, *space.budget.set, *_referenced(space)]:
            _check_known(name)
        for name, spec in space.parameters.items():
            _check_searchable(name, space, cheap, dataset)
            _check_values(name, spec)
        _check_constraints(space, cheap)
        space.order()
        if space.sampler == "grid":
            _check_grid(space, cheap)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def trial_config(config: RunConfig, space: Space, values: Values, *, cheap: bool = True) -> RunConfig:
    """The config of a trial: the base, the space's cheaper settings (unless `cheap` is False), the drawn values."""
    settings: dict[str, Any] = (space.budget.set if cheap else {}) | values
    return override_config(config, [f"{name}={_yaml(value)}" for name, value in settings.items()])


def refusal(config: RunConfig, space: Space, values: Values) -> str | None:
    """Why the config can't take a trial's values; None if it can."""
    try:
        trial_config(config, space, values)
    except InputError as error:
        return str(error)
    return None


def config_values(config: RunConfig) -> Values:
    """Every leaf field's value by dotted path."""
    flat: Values = {}
    for path in field_paths(RunConfig):
        node: Any = config
        for name in path.split("."):
            node = getattr(node, name)
        flat[path] = node
    return flat


def _check_metrics(space: Space, config: RunConfig, dataset: Dataset) -> None:
    wanted = [*space.objectives, *space.recorded]
    names = [measure.name for measure in space.objectives]
    if not names or len(set(names)) < len(names):
        raise InputError(f"metric: expected one or several different names, found {space.metrics}")
    if space.pruning and len(names) > 1:
        raise InputError("pruning: works with one metric, not with several")
    style = trial_config(config, space, {}).evaluation.style
    for measure in wanted:
        family = "peter" if measure.name.startswith("peter_") else "sacrebleu"
        if measure.name.startswith(("peter_", "bleu_", "rouge_")) and style not in (family, "both"):
            raise InputError(f"metric {measure.name}: needs evaluation.style {family} or both (--set or the config)")
        if measure.name.startswith("bertscore") and not trial_config(config, space, {}).evaluation.bertscore_model:
            raise InputError(f"metric {measure.name}: needs evaluation.bertscore_model (--set or the config)")
        if (measure.name == "stage1.auc") and not dataset.implicit:
            raise InputError(f"metric {measure.name}: is for implicit data, and {dataset.path} has ratings")
    for measure in space.objectives:
        for field in measure.unfair:
            if field in space.parameters:
                raise InputError(
                    f"metric {measure.name}: means something else at each value of {field}, which the space searches"
                )
        if space.pruning and (measure.curve is None or measure.stage != space.stages):
            raise InputError(f"pruning: {measure.name} is not measured while stage {space.stages} trains; leave it out")


def _check_known(name: str) -> None:
    known = field_paths(RunConfig)
    if name in known:
        return
    hint = did_you_mean(name, known, cutoff=0.4) or "; fields are named by their path, such as stage1.clusters"
    raise InputError(f"{name}: unknown config field{hint}")


def _referenced(space: Space) -> Iterable[str]:
    """Fields that the space's conditions and constraints refer to."""
    for spec in space.parameters.values():
        yield from spec.when
    for rule in space.rules:
        yield from (rule.left, rule.right)


def _check_searchable(name: str, space: Space, config: RunConfig, dataset: Dataset) -> None:
    for prefix, reason in _NOT_SEARCHED.items():
        if name == prefix or (prefix.endswith(".") and name.startswith(prefix)):
            raise InputError(f"parameters.{name}: not searched: {reason}")
    if space.stages == 1 and not name.startswith("stage1."):
        raise InputError(f"parameters.{name}: ignored by trials that end with stage 1 (stages: 1)")
    texts = any(measure.source == "texts" for measure in space.objectives)
    if name.startswith("generation.") and not texts:
        raise InputError(f"parameters.{name}: ignored: no metric of the space is measured on written texts")
    for prefix, needed, wanted in _REQUIREMENTS:
        if name.startswith(prefix) and name != needed and not _possible(needed, wanted, space, config):
            raise InputError(f"parameters.{name}: ignored while {needed} is {_value(config, needed)}")
    if name == "stage2.elbo_batch_size" and "stage2.alpha" not in space.parameters and config.stage2.alpha == 0:
        raise InputError(f"parameters.{name}: ignored while stage2.alpha is 0")
    if name == "stage1.negatives" and not dataset.implicit:
        raise InputError(f"parameters.{name}: ignored: {dataset.path} has ratings")


_REQUIREMENTS: tuple[tuple[str, str, Any], ...] = (
    ("stage2.experts.", "stage2.experts.enabled", True),
    ("stage2.scratch.", "stage2.base_model", "scratch"),
    ("stage2.prompt.max_features", "stage2.prompt.features", True),
    ("stage2.prompt.title_last", "stage2.prompt.title", True),
    ("stage1.mixture_restarts", "stage1.mixture_init", "gmm"),
    ("stage1.user_agreement", "stage1.mixture_init", "gmm"),
)
"""(prefix of fields, another field, a value): such fields are ignored unless the other field has that value."""


def _possible(field: str, wanted: Scalar, space: Space, config: RunConfig) -> bool:
    spec = space.parameters.get(field)
    if isinstance(spec, Choice):
        return wanted in spec.values
    return bool(_value(config, field) == wanted)


def _value(config: RunConfig, path: str) -> Any:
    return config_values(config)[path]


def _check_values(name: str, spec: IntRange | FloatRange | Choice) -> None:
    """The ends of a range, or each choice, must be values that the field takes."""
    model: type[BaseModel] = RunConfig
    *sections, leaf = name.split(".")
    for section in sections:
        annotation = model.model_fields[section].annotation
        assert isinstance(annotation, type)
        model = annotation
    field = model.model_fields[leaf]
    annotated: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    adapter: TypeAdapter[Any] = TypeAdapter(annotated)
    for value in spec.values if isinstance(spec, Choice) else (spec.low, spec.high):
        try:
            refuse_truth(value, field.annotation)
            adapter.validate_python(value)
        except PydanticCustomError as error:
            raise InputError(f"parameters.{name}: {value!r}: {error.message()}") from error
        except ValidationError as error:
            raise InputError(f"parameters.{name}{first_problem(error)}") from error
    if isinstance(spec, FloatRange) and field.annotation is int:
        raise InputError(f"parameters.{name}: takes whole numbers; use type: int")


def _check_constraints(space: Space, config: RunConfig) -> None:
    for rule in space.rules:
        spec = space.parameters.get(rule.left)
        if not isinstance(spec, IntRange | FloatRange):
            raise InputError(f"constraints: {rule.left}: the left side must be a searched int or float range")
        others = _numbers(space, config, rule)
        if not rule.always_fits(spec, others):
            raise InputError(
                f"constraints: {rule.left} {rule.operator} {rule.right}: no value of {spec.low}..{spec.high} satisfies"
                f" it when {rule.right} is {min(others) if rule.operator.startswith('<') else max(others)}"
            )


def _check_grid(space: Space, config: RunConfig) -> None:
    for name, spec in space.parameters.items():
        if isinstance(spec, FloatRange) and spec.step is None:
            raise InputError(f"parameters.{name}: a grid needs a step, or a choice of values")
    if space.points(config_values(config)) is None:
        raise InputError(f"sampler: a grid of more than {MAX_POINTS} points; take the sampler tpe or random")


def _numbers(space: Space, config: RunConfig, rule: Constraint) -> list[float]:
    """The extreme values that the right side of a constraint can take."""
    spec = space.parameters.get(rule.right)
    values = (
        [_value(config, rule.right)]
        if spec is None
        else spec.values
        if isinstance(spec, Choice)
        else [spec.low, spec.high]
    )
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise InputError(f"constraints: {rule.right}: not a number")
    return [float(value) for value in values]


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...").strip()
