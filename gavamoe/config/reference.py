"""The reference of all settings, docs/config.md, written from the fields and docstrings of the sections.

python -m gavamoe.config.reference > docs/config.md      or `make docs`
"""

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gavamoe.config.schema import RunConfig

_HEAD = """\
# Configuration

Every setting of a run: type and bounds, default, meaning. This page is generated from the docstrings in
`gavamoe/config/`: change them there and run `make docs`.

A config is a YAML file with the fields below, all of them optional; a preset's name stands for a file of `configs/`:

```yaml
seed: 1
stage1:
  clusters: 4
stage2:
  base_model: scratch
  experts:
    count: 8
```

`--set stage2.experts.count=8` changes one field on the command line, and
`gavamoe.load_config("quickstart", ["stage2.experts.count=8"])` in Python. A value out of bounds or an unknown name is
refused in one line that says what is allowed or which name is nearest. A run folder keeps its complete config in
`config.yaml`.
"""
_TYPES = {bool: "true or false", int: "whole number", float: "number", str: "text"}
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "multiple_of": "multiple of"}
"""Constraint of pydantic -> how it is shown."""


def reference() -> str:
    """The whole page, in Markdown."""
    return "\n".join([_HEAD, *_section(RunConfig, "")])


def _section(model: type[BaseModel], path: str) -> Iterator[str]:
    """Heading, meaning and fields of a section, then the sections inside it."""
    sections = {name: kind for name, field in model.model_fields.items() if (kind := _model_of(field)) is not None}
    fields = {name: field for name, field in model.model_fields.items() if name not in sections}
    yield f"## `{path}`\n" if path else "## Top level\n"
    yield f"{_one_line(model.__doc__ or '')}\n"
    if fields:
        yield "| field | type and bounds | default | meaning |\n|---|---|---|---|"
        yield from (_row(name, field) for name, field in fields.items())
        yield ""
    for name, kind in sections.items():
        yield from _section(kind, f"{path}.{name}" if path else name)


def _model_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds; None for a single value."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _row(name: str, field: FieldInfo) -> str:
    cells = (f"`{name}`", _type(field), _value(field.default), _one_line(field.description or ""))
    shown = " | ".join(cell.replace("|", r"\|") for cell in cells)
    return f"| {shown} |"


def _type(field: FieldInfo) -> str:
    kind: Any = field.annotation
    if get_origin(kind) is Literal:
        return ", ".join(_value(choice) for choice in get_args(kind))
    bounds = [
        f"{sign} {getattr(constraint, name):g}"
        for constraint in field.metadata
        for name, sign in _SIGNS.items()
        if getattr(constraint, name, None) is not None
    ]
    return ", ".join([_TYPES.get(kind, str(kind)), *bounds])


def _value(value: Any) -> str:
    """A value as YAML spells it."""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value != "" else "empty"


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    print(reference(), end="")
