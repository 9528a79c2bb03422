"""What stands between the network and the interface, from the outside in: `Guard`, `Gate`. (Further out: `proxy`.)

Plain ASGI, for a wrapper that buffers answers would break streams and hide disconnected clients.
"""

import asyncio
import base64
import hashlib
import logging
import re
import secrets
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gavamoe.serving.keys import ApiKeys, Key, LimitReached
from gavamoe.serving.proxy import code_of, detail, json_errors, tame_id
from gavamoe.serving.settings import LOG_NAME, Limits

OPEN_PATHS = frozenset({"/", "/docs", "/openapi.json", "/healthz", "/readyz"})
"""What needs no API key; everything else does, whether it exists or not."""

_log = logging.getLogger(LOG_NAME)
_WITHOUT_BODY = ("GET", "HEAD", "OPTIONS")

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


def page_policy(html: str) -> str:
    """A content security policy for a page: exactly its own inline scripts and styles, and calls to its server."""
    sources = {
        tag: " ".join(f"'{_digest(body)}'" for body in re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL))
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {sources['script'] or chr(39) + 'none' + chr(39)}; style-src"
        f" {sources['style']}; img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


class Guard:
    """A request id and security headers on every answer; errors in the interface's form, whoever wrote them."""

    def __init__(self, app: ASGIApp, *, answers_with_id: bool = True) -> None:
        """`answers_with_id` is false where Ray Serve, further out, sends the request id itself."""
        self._app, self._answers_with_id = app, answers_with_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = tame_id(Headers(scope=scope)) or secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if self._answers_with_id:
                    headers["X-Request-Id"] = request_id
            await send(message)

        await self._app(scope, receive, json_errors(with_headers, request_id))


class Gate:
    """Who may ask, and bodies that come in time: nothing of a request is parsed before it has passed.

    In this order: the API key, its limits, the size of the body where the request names it, then the body itself, which
    has a deadline. So a client without a key can't hold anything by sending slowly.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, limits: Limits) -> None:
        self._app, self._keys, self._limits = app, keys, limits
        self._unfinished: dict[asyncio.Future[None], None] = {}
        """One future per body that is not whole, oldest first; done: given up."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _path(scope) in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        key = self._keys.find(_shown(headers))
        if key is None:
            if not self._keys.required:
                await self._with_body(scope, receive, send, headers)
            else:
                await self._refuse(scope, receive, send, 401, "an API key is needed", {"WWW-Authenticate": "Bearer"})
            return
        scope["state"]["key"] = key.name
        try:
            self._keys.enter(key)
        except LimitReached as reached:
            _log.warning("request %s: key %s was turned away: %s", _id(scope), key.name, reached)
            await self._refuse(scope, receive, send, 429, str(reached), {"Retry-After": str(reached.retry_after_s)})
            return
        try:
            await self._with_body(scope, receive, self._logged(scope, send, key), headers)
        finally:
            self._keys.leave(key)

    async def _with_body(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        """Pass the request on once its body is whole."""
        if scope["method"] in _WITHOUT_BODY:
            await self._app(scope, receive, send)
            return
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:12]) > self._limits.max_body_bytes:
            await self._too_large(scope, receive, send)
            return
        given_up = asyncio.get_running_loop().create_future()
        self._make_room()
        self._unfinished[given_up] = None
        reading = asyncio.ensure_future(_read(receive, self._limits.max_body_bytes))
        try:
            await asyncio.wait({reading, given_up}, timeout=self._limits.body_timeout_s, return_when="FIRST_COMPLETED")
            late = not reading.done()
        finally:
            del self._unfinished[given_up]
            given_up.cancel()
            reading.cancel()  # of no effect on a finished one
        if late:
            message = f"the body was not there after {self._limits.body_timeout_s:g} s, or others needed its place"
            await self._refuse(scope, receive, send, 408, message, {})
            return
        body = reading.result()
        if body is None:
            await self._too_large(scope, receive, send)
        elif body is not _GONE:
            await self._app(scope, _again(body, receive), send)

    def _make_room(self) -> None:
        """Give up the oldest unfinished body where there are as many as may be: a body that comes at once is whole
        before its turn comes, however many others trickle in."""
        waiting = [future for future in self._unfinished if not future.done()]
        if len(waiting) >= self._limits.max_unfinished_bodies:
            waiting[0].set_result(None)

    async def _too_large(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._refuse(scope, receive, send, 413, "the body is larger than this server accepts", {})

    async def _refuse(
        self, scope: Scope, receive: Receive, send: Send, status: int, message: str, headers: Mapping[str, str]
    ) -> None:
        """Answer with an error; the connection ends with it, as a body that nobody reads may still be on its way."""
        body = detail(code_of(status), message, _id(scope))
        response = JSONResponse(body.model_dump(), status, dict(headers) | {"Connection": "close"})
        await response(scope, receive, send)

    @staticmethod
    def _logged(scope: Scope, send: Send, key: Key) -> Send:
        async def logged(message: Message) -> None:
            if message["type"] == "http.response.start":
                _log.info("request %s: key %s, %s %s", _id(scope), key.name, scope["method"], message["status"])
            await send(message)

        return logged


_GONE = b"gone"
"""In place of a body: the client has gone."""


async def _read(receive: Receive, most: int) -> bytes | None:
    """A request's whole body; None: larger than `most`; `_GONE`: the client went away."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return _GONE
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            return None
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read already, then whatever follows."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return waiting.pop() if waiting else await receive()

    return receive_again


def _path(scope: Scope) -> str:
    """The path within this application, as its router sees it."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if path.startswith(f"{root}/") else path


def _shown(headers: Headers) -> str | None:
    """The API key of a request, in either form."""
    bearer = headers.get("authorization", "")
    return bearer[7:] if bearer[:7].lower() == "bearer " else headers.get("x-api-key")


def _id(scope: Scope) -> str | None:
    found: str | None = scope.get("state", {}).get("request_id")
    return found
