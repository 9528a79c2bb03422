"""How what goes wrong is told to clients: always `ErrorResponse`, never a trace, never the input itself."""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from gavamoe.errors import InputError
from gavamoe.serving.backend import Overloaded, Unavailable
from gavamoe.serving.proxy import code_of, detail
from gavamoe.serving.schema import ErrorResponse
from gavamoe.serving.settings import LOG_NAME

_log = logging.getLogger(LOG_NAME)
DOCUMENTED = {
    code: {"model": ErrorResponse, "description": text}
    for code, text in {
        400: "The body is not JSON",
        401: "No API key, or a wrong one",
        403: "This server does not tell that",
        408: "The body took too long",
        413: "The body is too large",
        422: "A field has a wrong value",
        429: "Too busy: try again after Retry-After seconds",
        500: "An error of the server",
        503: "Not available now: try again",
        504: "Took too long",
    }.items()
}


def describe(error: BaseException, limit_s: float, request_id: str | None) -> tuple[int, ErrorResponse]:
    """Status and body for an error of routing or writing."""
    if isinstance(error, InputError):
        return 422, detail("invalid_request", str(error), request_id)
    if isinstance(error, Overloaded):
        return 429, detail("overloaded", "too many requests are in progress; try again soon", request_id)
    if isinstance(error, TimeoutError):
        return 504, detail("timeout", f"took longer than {limit_s:g} s", request_id)
    if isinstance(error, Unavailable):
        return 503, detail("unavailable", "no replica can answer now; try again soon", request_id)
    _log.error("request %s failed", request_id, exc_info=error)
    return 500, detail("internal", "an error of the server; its log has the request id", request_id)


def install(app: FastAPI, limit_s: float, retry_after_s: int) -> None:
    """Have `app` answer every error as `ErrorResponse`."""

    async def failed(request: Request, error: Exception) -> JSONResponse:
        status, body = describe(error, limit_s, _request_id(request))
        headers = {"Retry-After": str(retry_after_s)} if status in (429, 503) else None
        return JSONResponse(body.model_dump(), status, headers)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        problems = error.errors()
        first = problems[0]
        field = ".".join(str(part) for part in first["loc"][1:]) or None
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        status, code = (400, "invalid_json") if first["type"] == "json_invalid" else (422, "invalid_request")
        body = detail(code, f"{first['msg']}{more}"[:300], _request_id(request), _plain(field))
        return JSONResponse(body.model_dump(), status)

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        body = detail(code_of(error.status_code), str(error.detail)[:300], _request_id(request))
        return JSONResponse(body.model_dump(), error.status_code, error.headers)

    for kind in (InputError, Overloaded, Unavailable, TimeoutError, Exception):
        app.add_exception_handler(kind, failed)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, refused)


def _request_id(request: Request) -> str | None:
    return getattr(request.state, "request_id", None)


def _plain(field: str | None) -> str | None:
    """A field's name without what UTF-8 can't say: an unknown field is named by the client."""
    return None if field is None else field.encode("utf-8", "replace").decode()[:100]
