"""What the sections of the config have in common: strict, unchangeable models, and the bounds of numbers."""

from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Rate = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class StrictNumbers(BaseModel):
    """A model that takes neither true nor false for a number: pydantic alone reads `clusters: yes` as 1."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name
        if name is not None and name in cls.model_fields:
            refuse_truth(value, cls.model_fields[name].annotation)
        return value


class Section(StrictNumbers):
    """A group of settings. The docstrings below the fields are their descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


def refuse_truth(value: Any, annotation: Any) -> None:
    """Refuse true and false for a field of that annotation, if it takes numbers and no truth values.

    Raises:
        PydanticCustomError: one that pydantic reports with the field's name.
    """
    kinds = _kinds(annotation)
    if isinstance(value, bool) and bool not in kinds and not kinds.isdisjoint((int, float)):
        raise PydanticCustomError("number_type", "Input should be a number, not true or false (yes, no, on, off)")


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation names, without bounds and alternatives."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return set().union(*(_kinds(each) for each in get_args(annotation)))
    return {annotation} if isinstance(annotation, type) else set()
