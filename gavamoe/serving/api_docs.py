"""The page at /docs: the OpenAPI description as one self-contained page (FastAPI's own loads scripts from a CDN)."""

import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment

_ENVIRONMENT = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)

_BOUNDS = {
    "minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below",
    "minLength": "characters from", "maxLength": "characters to", "minItems": "entries from", "maxItems": "entries to",
    "default": "default",
}  # fmt: skip


def render_reference(openapi: dict[str, Any]) -> str:
    """The page's HTML."""
    example = json.dumps({"user": "U1", "item": "I1", "stream": True})
    template = _ENVIRONMENT.from_string(files("gavamoe.serving").joinpath("reference.html").read_text(encoding="utf-8"))
    return template.render(api=openapi, kind=_kind, example=example)


def _kind(schema: dict[str, Any]) -> str:
    """A type in words, with its bounds."""
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[-1]
    if "anyOf" in schema:
        name = " or ".join(_kind(option) for option in schema["anyOf"])
    elif schema.get("type") == "array":
        name = f"list of {_kind(schema.get('items', {}))}"
    else:
        name = str(schema.get("type", "any"))
    bounds = [f"{words} {schema[key]}" for key, words in _BOUNDS.items() if schema.get(key) is not None]
    return f"{name} ({', '.join(bounds)})" if bounds else name
