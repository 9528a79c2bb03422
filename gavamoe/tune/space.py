"""Search spaces: data in YAML (`tune_spaces/`), typed and validated, naming config fields by their dotted paths.

A space says which fields are searched, over what, under which conditions and constraints; what is optimized; which
stages a trial trains; and the budget. docs/tune.md has the format. Nothing here knows Ray or Optuna: `draw` takes any
object that has Optuna's `suggest_*` methods.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from gavamoe.config.files import find_file
from gavamoe.config.section import Section, refuse_truth
from gavamoe.config.yaml_reader import read_yaml
from gavamoe.errors import InputError, first_problem
from gavamoe.tune.metrics import Measure, find_measure

MAX_POINTS = 10_000

Scalar = bool | int | float | str
Values = dict[str, Scalar]
"""Drawn values by field path; a parameter whose condition does not hold is absent."""


class _Parameter(BaseModel):
    # Not a `Section`: a validator of every field is not allowed beside a discriminator (`type`).
    model_config = Section.model_config
    when: dict[str, Scalar | list[Scalar]] = {}
    """Condition of the parameter: other fields, each with the value or values at which this one is searched."""


class _Range(_Parameter):
    log: bool = False
    """Whether the logarithm is drawn evenly, instead of the value."""

    @field_validator("low", "high", "step", mode="before", check_fields=False)
    @classmethod
    def _no_truth_for_numbers(cls, value: Any) -> Any:
        refuse_truth(value, float)
        return value

    def check(self, low: float, high: float, step: float | None) -> None:
        if low > high:
            raise ValueError(f"low {low} is above high {high}")
        if self.log and low <= 0:
            raise ValueError(f"log needs a low above 0, not {low}")
        if self.log and step is not None:
            raise ValueError("log and step exclude each other")


class IntRange(_Range):
    """Whole numbers from low to high, both included."""

    type: Literal["int"]
    low: int
    high: int
    step: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _in_order(self) -> "IntRange":
        self.check(self.low, self.high, self.step)
        return self


class FloatRange(_Range):
    """Real numbers from low to high."""

    type: Literal["float"]
    low: float
    high: float
    step: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _in_order(self) -> "FloatRange":
        self.check(self.low, self.high, self.step)
        return self


class Choice(_Parameter):
    """One of a list of values."""

    type: Literal["choice"]
    values: Annotated[list[Scalar], Field(min_length=1)]

    @field_validator("values")
    @classmethod
    def _different(cls, values: list[Scalar]) -> list[Scalar]:
        if len({(type(value), value) for value in values}) < len(values):
            raise ValueError("a value occurs twice")
        return values


Parameter = Annotated[IntRange | FloatRange | Choice, Field(discriminator="type")]


class Budget(Section):
    """Limits of a search's cost."""

    trials: int = 12
    """Number of different configurations that are trained."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes of a session after which no trial starts; those that run are finished. None: no limit."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Config fields and values that make trials cheaper than the final training; best.yaml does not have them."""

    @field_validator("trials")
    @classmethod
    def _some(cls, trials: int) -> int:
        if trials < 1:
            raise ValueError(f"a search needs at least 1 trial, not {trials}")
        return trials


class Pruning(Section):
    """Pruning by ASHA: trials that do worse than others after the same share of their training are stopped."""

    grace: Annotated[int, Field(ge=1, le=99)] = 30
    """Percent of its training that every trial completes before it may be stopped."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """Reduction factor: at each rung one in this many trials continues."""


class Space(Section):
    """A search space: the content of a space file."""

    description: str = ""
    """Purpose of the space, in a sentence."""
    stages: Annotated[int, Field(ge=1, le=2)]
    """Stages that a trial trains. 1: stage 1 alone; 2: both."""
    metric: str | list[str]
    """Objective, measured on the validation split: a name, or several for a Pareto front."""
    measure: list[str] = Field(default_factory=list)
    """Measures that are recorded beside the objectives."""
    sampler: Literal["tpe", "random", "nsga2", "grid"] = "tpe"
    """Optuna's sampler, which draws the configurations; grid: all points of the space."""
    pruning: Pruning | None = None
    """Early stopping of poor trials; None: every trial is trained to its end."""
    budget: Budget = Budget()
    """Limits of the search's cost."""
    parameters: Annotated[dict[str, Parameter], Field(min_length=1)]
    """Searched config fields by their dotted paths."""
    constraints: list[str] = Field(default_factory=list)
    """Constraints "FIELD <= FIELD" (or <, >=, >): the left field, a searched range, is kept within that bound."""

    @property
    def metrics(self) -> list[str]:
        return [self.metric] if isinstance(self.metric, str) else list(self.metric)

    @property
    def objectives(self) -> list[Measure]:
        """The measures that are optimized, in the file's order."""
        return [find_measure(name, self.stages) for name in self.metrics]

    @property
    def recorded(self) -> list[Measure]:
        """The measures that are recorded beside the objectives."""
        return [find_measure(name, self.stages) for name in self.measure]

    @property
    def rules(self) -> "list[Constraint]":
        return [Constraint.parse(text) for text in self.constraints]

    def order(self) -> list[str]:
        """The parameters' names, each after those that its conditions and constraints refer to.

        Raises:
            InputError: they refer to each other in a circle.
        """
        needs = {name: [key for key in spec.when if key in self.parameters] for name, spec in self.parameters.items()}
        for rule in self.rules:
            if rule.left in needs and rule.right in needs:
                needs[rule.left].append(rule.right)
        ordered: list[str] = []
        while len(ordered) < len(needs):
            ready = [n for n in needs if n not in ordered and all(need in ordered for need in needs[n])]
            if not ready:
                circle = ", ".join(sorted(set(needs) - set(ordered)))
                raise InputError(f"parameters {circle}: their conditions or constraints form a circle")
            ordered += ready
        return ordered

    def draw(self, source: "Suggester", fixed: Values) -> Values:
        """One point of the space. `fixed`: the config's values of fields that are not searched, by path."""
        drawn: Values = {}
        for name in self.order():
            spec = self.parameters[name]
            if self._active(spec, drawn, fixed):
                drawn[name] = _suggest(source, name, self._narrowed(name, spec, drawn, fixed))
        return drawn

    def points(self, fixed: Values) -> list[Values] | None:
        """Every point of the space, in order; None where there are infinitely many, or more than MAX_POINTS."""
        if any(isinstance(spec, FloatRange) and spec.step is None for spec in self.parameters.values()):
            return None
        points: list[Values] = [{}]
        for name in self.order():
            points = [p for point in points for p in self._extended(name, point, fixed)]
            if len(points) > MAX_POINTS:
                return None
        return points

    def _extended(self, name: str, point: Values, fixed: Values) -> Iterator[Values]:
        spec = self.parameters[name]
        if not self._active(spec, point, fixed):
            yield point
            return
        for value in _values(self._narrowed(name, spec, point, fixed)):
            yield point | {name: value}

    def _active(self, spec: "IntRange | FloatRange | Choice", drawn: Values, fixed: Values) -> bool:
        for field, wanted in spec.when.items():
            current = drawn.get(field) if field in self.parameters else fixed.get(field)
            if not any(_same(current, value) for value in (wanted if isinstance(wanted, list) else [wanted])):
                return False
        return True

    def _narrowed(
        self, name: str, spec: "IntRange | FloatRange | Choice", drawn: Values, fixed: Values
    ) -> "IntRange | FloatRange | Choice":
        """The parameter's range as far as the constraints allow it beside the values drawn so far."""
        for rule in self.rules:
            other = drawn.get(rule.right, fixed.get(rule.right))
            if rule.left == name and isinstance(spec, IntRange | FloatRange) and isinstance(other, int | float):
                spec = rule.narrow(spec, other)
        return spec


class Constraint(Section):
    """A constraint between two config fields: left OPERATOR right."""

    left: str
    operator: Literal["<=", "<", ">=", ">"]
    right: str

    @classmethod
    def parse(cls, text: str) -> "Constraint":
        words = text.split()
        if len(words) != 3 or words[1] not in ("<=", "<", ">=", ">"):
            raise InputError(f"constraints: {text!r}: expected FIELD <= FIELD (or <, >=, >)")
        return cls(left=words[0], operator=words[1], right=words[2])  # type: ignore[arg-type]

    def narrow(self, spec: IntRange | FloatRange, other: float) -> IntRange | FloatRange:
        """`spec` within the bound; the space's check has made sure that the range does not get empty.

        A strict bound on real numbers is kept as a closed one: a draw hits it with probability 0.
        """
        strict = int(self.operator in ("<", ">")) if isinstance(spec, IntRange) else 0
        if self.operator in ("<=", "<"):
            return spec.model_copy(update={"high": min(spec.high, _number(spec, other) - strict)})
        return spec.model_copy(update={"low": max(spec.low, _number(spec, other) + strict)})

    def always_fits(self, spec: IntRange | FloatRange, others: list[float]) -> bool:
        """Whether a value is left beside each of the other field's `others`."""
        kept = [self.narrow(spec, other) for other in others]
        return all(range_.low <= range_.high for range_ in kept)


class Suggester(Protocol):
    """Source of drawn values, such as an Optuna trial."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


def find_space(source: str | Path) -> Path:
    """Path of a space file, or of a space shipped with the package ("gates", "joint", ...)."""
    return find_file(source, "tune_spaces", "space file, nor one of the shipped spaces")


def load_space(source: str | Path) -> Space:
    """Read a space file or a shipped space by name; `checks` then compares it with a config and a dataset.

    Raises:
        InputError: one line naming file, field, value and what is allowed.
    """
    path = find_space(source)
    return parse_space(read_yaml(path), str(path))


def parse_space(values: Any, source: str) -> Space:
    """Build a space from parsed YAML; `source` is named in errors."""
    if not isinstance(values, dict) or not values:
        raise InputError(f"{source}: expected a search space with stages, metric and parameters")
    if not values.get("parameters"):
        raise InputError(f"{source}: parameters: the space is empty; name at least one config field to search")
    try:
        return Space.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{source}: {first_problem(error, left_out=('int', 'float', 'choice'))}") from error


def _suggest(source: Suggester, name: str, spec: IntRange | FloatRange | Choice) -> Scalar:
    if isinstance(spec, Choice):
        value: Scalar = source.suggest_categorical(name, spec.values)
        return value
    if isinstance(spec, IntRange):
        return source.suggest_int(name, spec.low, spec.high, step=spec.step or 1, log=spec.log)
    return source.suggest_float(name, spec.low, spec.high, step=spec.step, log=spec.log)


def _values(spec: IntRange | FloatRange | Choice) -> list[Scalar]:
    """All values of a parameter, for a grid."""
    if isinstance(spec, Choice):
        return list(spec.values)
    if isinstance(spec, IntRange):
        return list(range(spec.low, spec.high + 1, spec.step or 1))
    step = spec.step or 1.0
    count = int((spec.high - spec.low) / step + 1e-9) + 1
    return [spec.low + index * step for index in range(count)]


def _same(value: Scalar | None, wanted: Scalar) -> bool:
    """Equality by which True and 1 differ."""
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _number(spec: IntRange | FloatRange, value: float) -> Any:
    return int(value) if isinstance(spec, IntRange) else float(value)
