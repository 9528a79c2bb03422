"""Who may pass before anything of a request is parsed: keys before bodies, bodies in time, errors as JSON."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from helpers.serve_run import PAIR, client
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from gavamoe.serving import api
from gavamoe.serving.api import create_api
from gavamoe.serving.backend import LocalBackend
from gavamoe.serving.proxy import ServeErrors
from gavamoe.serving.security import Guard
from gavamoe.serving.settings import ServeArgs, hash_key

KEY = "secret-of-the-shop"
KEYED: dict[str, Any] = {"api_key_hashes": (hash_key(KEY),)}
JSON = {"content-type": "application/json"}


class Sender:
    """A client whose body comes as slowly as told: one part after another, then nothing more."""

    def __init__(self, app: ASGIApp, parts: list[bytes], whole: bool = False, **headers: str) -> None:
        self._app, self._parts, self._whole = app, parts, whole
        pairs = {"content-type": "application/json"} | headers
        self._headers = [(name.replace("_", "-").encode(), value.encode()) for name, value in pairs.items()]
        self.read = 0
        self.messages: list[Any] = []

    async def _receive(self) -> dict[str, Any]:
        self.read += 1
        if not self._parts:
            await asyncio.sleep(60)
        part = self._parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(self._parts) or not self._whole}

    async def _send(self, message: Any) -> None:
        self.messages.append(message)

    async def ask(self, path: str = "/v1/route") -> "Sender":
        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode(),
            "query_string": b"", "root_path": "", "scheme": "http", "server": ("127.0.0.1", 80), "client": None,
            "headers": self._headers,
        }  # fmt: skip
        await self._app(scope, self._receive, self._send)
        return self

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode().lower(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def error(self) -> Any:
        return json.loads(b"".join(message.get("body", b"") for message in self.messages[1:]))["error"]


def app(backend: Any, **values: Any) -> ASGIApp:
    return create_api(backend, ServeArgs.model_validate({"run": "unused"} | values))


def test_the_key_comes_before_the_body(backend: LocalBackend) -> None:
    """Neither a body that never ends, nor one that is no JSON or too large, is looked at without a key."""
    guarded = app(backend, **KEYED)
    slow = asyncio.run(asyncio.wait_for(Sender(guarded, [b"{"]).ask(), 5))
    assert (slow.status, slow.error["code"], slow.read) == (401, "unauthorized", 0)
    assert slow.headers["connection"] == "close"
    large = asyncio.run(Sender(guarded, [], content_length="9999999").ask())
    assert large.status == 401
    with TestClient(guarded) as http:
        for body in (b"{", b" " * 70_000):
            assert http.post("/v1/explain", content=body, headers=JSON).status_code == 401
            passed = http.post("/v1/explain", content=body, headers=JSON | {"X-API-Key": KEY})
            assert passed.status_code in (400, 413)
        assert http.post("/v1/unknown").status_code == http.get("/anything").status_code == 401
        assert http.get("/healthz").status_code == http.get("/docs").status_code == 200


def test_a_slow_body_is_given_up(backend: LocalBackend) -> None:
    slow = asyncio.run(Sender(app(backend, limits={"body_timeout_s": 0.2}), [b"{"]).ask())
    assert (slow.status, slow.error["code"]) == (408, "timeout")
    assert slow.headers["connection"] == "close"


def test_a_named_length_is_refused_before_the_body(backend: LocalBackend) -> None:
    large = asyncio.run(Sender(app(backend), [], content_length="70000").ask())
    assert (large.status, large.error["code"], large.read) == (413, "too_large", 0)


def test_many_slow_bodies_leave_room_for_those_that_come_at_once(backend: LocalBackend) -> None:
    """2,000 of them: those that may wait are few, the oldest goes first, and no whole request is turned away."""

    async def ask() -> tuple[list[Sender], list[Sender], float]:
        guarded = app(backend, limits={"max_unfinished_bodies": 8, "body_timeout_s": 30})
        slow = [Sender(guarded, [b"{"]) for _ in range(2000)]
        tasks = [asyncio.create_task(sender.ask()) for sender in slow]
        await asyncio.sleep(0)
        started = time.monotonic()
        quick = [await Sender(guarded, [json.dumps(PAIR).encode()], whole=True).ask() for _ in range(5)]
        seconds = time.monotonic() - started
        while sum(bool(sender.messages) for sender in slow) < 1990:
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return slow, quick, seconds

    slow, quick, seconds = asyncio.run(asyncio.wait_for(ask(), 60))
    assert [sender.status for sender in quick] == [200] * 5
    assert seconds < 20
    given_up = [sender for sender in slow if sender.messages]
    assert {sender.status for sender in given_up} == {408}
    assert len(slow) - len(given_up) <= 8


def test_a_client_that_goes_away_ends_its_body(backend: LocalBackend) -> None:
    class Gone(Sender):
        async def _receive(self) -> dict[str, Any]:
            return {"type": "http.disconnect"}

    assert asyncio.run(Gone(app(backend), []).ask()).messages == []


def test_no_redirect_names_the_host_that_a_client_sent(backend: LocalBackend) -> None:
    with client(backend) as http:
        answer = http.get("/v1/users/", headers={"Host": "evil.example"}, follow_redirects=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert "location" not in answer.headers


def test_errors_that_others_write_are_json(backend: LocalBackend) -> None:
    """Ray Serve's 429, 404 and 500, and the refusal of a foreign page's question, which Starlette writes as text."""

    async def ray(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"retry-after", b"2"), (b"x-request-id", b"abc")]
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        await send({"type": "http.response.body", "body": b"Request dropped ", "more_body": True})
        await send({"type": "http.response.body", "body": b"due to backpressure"})

    answer = TestClient(ServeErrors(ray)).get("/v1/route")
    assert answer.json()["error"] == {
        "code": "overloaded", "message": "too many requests", "field": None, "request_id": "abc",
    }  # fmt: skip
    assert answer.headers["retry-after"] == "2"
    late = ServeErrors(PlainTextResponse("Request timed out after 35 s", status_code=408))
    answer = TestClient(late).get("/v1/route")
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout"), (
        "the server was late, not the client"
    )
    with client(backend, allowed_origins=["https://shop.example"]) as http:
        asked = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
        refused = http.options("/v1/explain", headers=asked)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_request")


def test_a_page_of_an_allowed_site_can_read_that_a_key_is_missing(backend: LocalBackend) -> None:
    with client(backend, allowed_origins=["https://shop.example"], **KEYED) as http:
        origin = {"Origin": "https://shop.example"}
        asked = http.options("/v1/route", headers=origin | {"Access-Control-Request-Method": "POST"})
        assert asked.status_code == 200
        refused = http.post("/v1/route", json=PAIR, headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://shop.example"


def test_one_request_id(backend: LocalBackend) -> None:
    """The one that Ray Serve made, or a client sent, if it can stand in a log."""
    with client(backend) as http:
        for sent, kept in (("4f1c-A.b_9", True), ("a" * 65, False), ("two words", False), ('"\\x1b[2J', False)):
            answer = http.post("/v1/explain", json={}, headers={"X-Request-Id": sent})
            found = answer.json()["error"]["request_id"]
            assert (found == sent) is kept
            assert answer.headers.get_list("x-request-id") == [found]

    async def answered(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["state"]["request_id"].encode()})

    def serve(inner: ASGIApp) -> ASGIApp:
        """As Ray Serve: makes an id where none came, and sends it."""

        async def outer(scope: Any, receive: Any, send: Any) -> None:
            ids = [value for name, value in scope["headers"] if name == b"x-request-id"]
            if not ids:
                ids = [b"made-by-ray"]
                scope["headers"] = [*scope["headers"], (b"x-request-id", ids[0])]

            async def with_id(message: Any) -> None:
                if message["type"] == "http.response.start":
                    message["headers"].append((b"X-Request-ID", ids[0]))
                await send(message)

            await inner(scope, receive, with_id)

        return outer

    http = TestClient(ServeErrors(serve(Guard(answered, answers_with_id=False))))
    for sent, wanted in ((None, "made-by-ray"), ("mine", "mine"), ("a b", "made-by-ray")):
        answer = http.get("/", headers={} if sent is None else {"X-Request-Id": sent})
        assert answer.text == wanted
        assert answer.headers.get_list("x-request-id") == [wanted]


class Counting:
    """A backend that counts what it is asked and takes its time."""

    def __init__(self, backend: LocalBackend) -> None:
        self._backend = backend
        self.calls: list[str] = []
        self.failing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    async def _count(self, name: str, answer: Callable[[], Awaitable[Any]]) -> Any:
        self.calls.append(name)
        await asyncio.sleep(0.05)
        if self.failing:
            raise RuntimeError("no")
        return await answer()

    async def ready(self) -> Any:
        return await self._count("ready", self._backend.ready)

    async def info(self) -> Any:
        return await self._count("info", self._backend.info)

    async def search(self, *arguments: Any) -> Any:
        return await self._count("search", lambda: self._backend.search(*arguments))


@contextlib.asynccontextmanager
async def visitors(counted: Counting, **values: Any) -> AsyncIterator[Any]:
    import httpx2

    transport = httpx2.ASGITransport(app=app(counted, **values))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http


def test_health_and_info_ask_once_however_many_want_them(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counting(backend)

    async def ask() -> None:
        async with visitors(counted) as http:
            answers = await asyncio.gather(*[http.get(path) for path in ("/readyz", "/v1/info") for _ in range(50)])
            assert {answer.status_code for answer in answers} == {200}
            assert sorted(counted.calls) == ["info", "ready"]
            monkeypatch.setattr(api, "REMEMBERED_S", 0.0)
            counted.failing = True
            assert (await http.get("/readyz")).status_code == 503
            counted.failing = False
            assert (await http.get("/readyz")).status_code == 200

    asyncio.run(ask())


def test_searches_are_admitted(backend: LocalBackend) -> None:
    counted = Counting(backend)

    async def ask() -> list[int]:
        async with visitors(counted, limits={"max_in_flight": 2}) as http:
            answers = await asyncio.gather(*[http.get(f"/v1/{kind}") for kind in ("items", "users") * 10])
            return sorted(answer.status_code for answer in answers)

    assert asyncio.run(ask()) == [200] * 2 + [429] * 18


def test_no_history_can_be_asked_for(backend: LocalBackend) -> None:
    """The attack: ask for every item with and without those that the user has reviewed, and compare."""
    router = backend._router
    items = [router.catalog.item_id(at) for at in range(router.catalog.known_items)]
    user = router.catalog.user_index("U000003")
    assert user is not None
    seen = {router.catalog.item_id(int(at)) for at in router.training.items_of_user(user)}
    body: dict[str, Any] = {"user": "U000003", "k": 50, "explain": False}
    with client(backend) as http:
        found = []
        for item in items:  # one by one, so that no order tells anything either
            answer = http.post("/v1/recommend", json=body | {"candidates": [item]}).json()
            found += [entry["item"] for entry in answer["items"]]
            assert answer["ranked"] == 1
        assert found == items
        asked = http.post("/v1/recommend", json=body | {"candidates": items, "exclude_seen": True})
        assert asked.status_code == 422
        assert "it would tell what the user has reviewed" in asked.json()["error"]["message"]
        together = http.post("/v1/recommend", json=body | {"candidates": items}).json()
        ratings = [entry["predicted_rating"] for entry in together["items"]]
        assert ratings == sorted(ratings, reverse=True), "nor are the seen ones put last"
        default = http.post("/v1/recommend", json=body).json()
        assert not seen & {entry["item"] for entry in default["items"]}, "and a recommendation is still one"
    with client(backend, browse={"exclude_seen": False}) as http:
        assert http.post("/v1/recommend", json=body | {"exclude_seen": True}).status_code == 403
        plain = http.post("/v1/recommend", json=body)
        assert {entry["item"] for entry in plain.json()["items"]} == set(items)


def test_users_are_listed_only_while_no_key_is_needed(backend: LocalBackend) -> None:
    headers = {"X-API-Key": KEY}
    with client(backend, **KEYED) as http:
        refused = http.get("/v1/users", headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
        assert http.get("/v1/items", headers=headers).status_code == 200
    with client(backend, browse={"users": False}) as http:
        assert http.get("/v1/users").status_code == 403
    with client(backend, browse={"users": True}, **KEYED) as http:
        entries = http.get("/v1/users", headers=headers).json()["results"]
        assert entries
        assert all(entry["features"] == [] for entry in entries), "words of their own reviews"
        assert any(entry["features"] for entry in http.get("/v1/items", headers=headers).json()["results"])
