"""What stands between the network and the interface: API keys, size of requests, headers of answers.

Plain ASGI, for a wrapper that buffers would break streams and hide disconnected clients.
"""

import base64
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gavamoe.errors import InputError
from gavamoe.serving.settings import ServeArgs, hash_key

KEYS_VARIABLE = "GAVAMOE_API_KEYS"
"""Environment variable with accepted keys, separated by commas."""

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


class ApiKeys:
    """The accepted keys, as hashes only."""

    def __init__(self, hashes: Iterable[str]) -> None:
        self._hashes = sorted(set(hashes))

    @classmethod
    def read(cls, args: ServeArgs) -> "ApiKeys":
        """From the arguments, their file and the environment.

        Raises:
            InputError: the file is missing or has a line that is not a hash; a file without any key would lock
                everyone out or, worse, let everyone in.
        """
        hashes = list(args.api_key_hashes)
        if args.api_keys_file is not None:
            hashes += _read_hashes(Path(args.api_keys_file))
        hashes += [hash_key(key.strip()) for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
        return cls(hashes)

    @property
    def required(self) -> bool:
        """Whether a key must be shown."""
        return bool(self._hashes)

    def accept(self, key: str | None) -> bool:
        """Whether this key may pass; takes the same time for every wrong key."""
        if not self.required:
            return True
        shown = hash_key(key or "")
        matches = [hmac.compare_digest(shown, known) for known in self._hashes]
        return key is not None and any(matches)


def _read_hashes(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: API keys can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: API keys can't be read (not UTF-8 text)") from error
    hashes = []
    for number, line in enumerate(lines, 1):
        value = line.split("#")[0].strip().removeprefix("sha256:")
        if value and not re.fullmatch("[0-9a-f]{64}", value):
            raise InputError(f"{path}, line {number}: expected sha256: and 64 hex digits, never the key itself")
        hashes += [value] if value else []
    if not hashes:
        raise InputError(f"{path}: holds no key; without any, leave the option out")
    return hashes


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


class BodyTooLarge(HTTPException):
    """A request's body is larger than allowed; an HTTPException, as others are taken for a broken body by FastAPI."""

    def __init__(self) -> None:
        super().__init__(413, "the body is larger than this server accepts", {"Connection": "close"})


class Guard:
    """ASGI wrapper: a request id, security headers on every answer, and a bound on bodies whatever their framing."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app, self._max_body_bytes = app, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b"")) if message["type"] == "http.request" else 0
            if received > self._max_body_bytes:
                raise BodyTooLarge
            return message

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers["X-Request-Id"] = request_id
            await send(message)

        await self._app(scope, bounded, with_headers)
