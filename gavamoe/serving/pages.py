"""The pages for people: the one at /, and /docs, the OpenAPI description on one self-contained page.

FastAPI's own page of the latter loads scripts from a CDN.
"""

import json
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse
from jinja2 import Environment

from gavamoe.data import bounds
from gavamoe.serving.security import page_policy

_ENVIRONMENT = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)

_BOUNDS = {
    "minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below",
    "minLength": "characters from", "maxLength": "characters to", "minItems": "entries from", "maxItems": "entries to",
    "default": "default",
}  # fmt: skip


def page_router(app: FastAPI) -> APIRouter:
    """The routes of both pages; `app` is the one that /docs describes."""
    router = APIRouter(include_in_schema=False)
    page = files("gavamoe.serving").joinpath("page.html").read_text(encoding="utf-8")
    page = page.replace("MAX-ID-CHARS", str(bounds.MAX_ID_CHARS))  # the inputs take what a request may have
    reference: list[str] = []

    @router.get("/")
    async def index() -> HTMLResponse:
        return _page(page)

    @router.get("/docs")
    async def docs() -> HTMLResponse:
        if not reference:
            reference.append(_render_reference(app.openapi()))
        return _page(reference[0])

    return router


def _page(html: str) -> HTMLResponse:
    return HTMLResponse(html, headers={"Content-Security-Policy": page_policy(html)})


def _render_reference(openapi: dict[str, Any]) -> str:
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
