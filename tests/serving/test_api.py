"""The HTTP interface in one process: answers, streams, errors, limits."""

import asyncio
import dataclasses
import math
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.serve_run import PAIR, client, events_of, tiny_artifact
from starlette.testclient import TestClient

from gavamoe.config.schema import GenerationConfig
from gavamoe.errors import InputError
from gavamoe.generation.generator import ExplanationGenerator
from gavamoe.generation.request import ExplanationRequest
from gavamoe.serving.api import Service
from gavamoe.serving.backend import Interrupted, LocalBackend, Overloaded, RouteBatcher, Unavailable
from gavamoe.serving.routing import Pair, RoutedPair
from gavamoe.serving.settings import Limits, ServeArgs
from gavamoe.serving.writing import Piece, TextRequest, Written


@pytest.fixture(scope="module")
def artifact() -> Path:
    return tiny_artifact()


def test_explain_says_what_explain_says(http: TestClient, artifact: Path) -> None:
    explainer = ExplanationGenerator.load(artifact)
    catalog = explainer.catalog
    for user, item, rating, features in (
        ("U000001", "I000001", None, None),
        ("U000002", "I000007", 1.0, ["ghosts", "plot"]),
        ("nobody", "I000003", None, []),
        ("U000005", "nothing", 5.0, None),
    ):  # fmt: skip
        request = ExplanationRequest(
            catalog.n_users if catalog.user_index(user) is None else catalog.user_index(user),  # type: ignore[arg-type]
            catalog.n_items if catalog.item_index(item) is None else catalog.item_index(item),  # type: ignore[arg-type]
            rating,
            None if features is None else tuple(features),
        )
        [wanted] = explainer.explain([request], GenerationConfig(max_new_tokens=20))
        body = {"user": user, "item": item, "rating": rating, "features": features, "max_new_tokens": 20}
        found = http.post("/v1/explain", json=body).json()
        for name in ("text", "cluster", "rating", "rating_given", "features_given", "user_known", "item_known"):
            assert found[name] == getattr(wanted, name), name
        assert found["features"] == list(wanted.features)
        assert found["new_tokens"] == wanted.new_tokens
        assert found["predicted_rating"] == pytest.approx(wanted.predicted_rating, abs=1e-5)
        assert found["responsibilities"] == pytest.approx(wanted.responsibilities, abs=1e-5)
        assert found["finish_reason"] in ("end", "length")
        timings = found["timings_ms"]
        parts = sum(timings[part] for part in ("route", "queue", "prefill", "decode"))
        assert 0 < parts <= timings["total"]


def test_a_stream_adds_up_to_the_answer(http: TestClient) -> None:
    whole = http.post("/v1/explain", json=PAIR).json()
    streamed = http.post("/v1/explain", json=PAIR | {"stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = events_of(streamed.text)
    assert [name for name, _ in events][:1] == ["route"]
    assert [name for name, _ in events][-1:] == ["done"]
    assert all(name == "token" for name, _ in events[1:-1])
    assert "".join(data["text"] for name, data in events if name == "token") == whole["text"]
    assert events[0][1]["cluster"] == whole["cluster"]
    assert {**events[-1][1], "timings_ms": 0} == {**whole, "timings_ms": 0}


def test_sampling_by_seed_and_trace(http: TestClient, artifact: Path) -> None:
    def ask(seed: int) -> dict[str, Any]:
        body = PAIR | {"temperature": 3.0, "seed": seed, "max_new_tokens": 16, "trace": True}
        return http.post("/v1/explain", json=body).json()

    assert ask(1)["text"] == ask(1)["text"]
    assert len({ask(seed)["text"] for seed in range(5)}) > 2
    info = http.get("/v1/info").json()
    experts = ask(1)["experts"]
    assert (len(experts), len(experts[0])) == (info["layers"], info["experts"])
    assert len({sum(layer) for layer in experts}) == 1


def test_batch_keeps_order_and_equals_single_answers(http: TestClient) -> None:
    pairs = [{"user": f"U{n:06}", "item": f"I{2 * n:06}"} for n in range(1, 9)]
    results = http.post("/v1/explain/batch", json={"requests": pairs}).json()["results"]
    assert [(r["user"], r["item"]) for r in results] == [(p["user"], p["item"]) for p in pairs]
    assert [r["text"] for r in results] == [http.post("/v1/explain", json=p).json()["text"] for p in pairs]


def test_recommend_ranks_by_predicted_rating(http: TestClient, backend: LocalBackend) -> None:
    answer = http.post("/v1/recommend", json={"user": "U000003", "k": 4}).json()
    ratings = [item["predicted_rating"] for item in answer["items"]]
    assert ratings == sorted(ratings, reverse=True)
    assert [item["rank"] for item in answer["items"]] == [1, 2, 3, 4]
    assert all(item["explanation"]["item"] == item["item"] for item in answer["items"])
    router = backend._router
    index = router.catalog.user_index("U000003")
    seen = {router.catalog.item_id(int(i)) for i in router.training.items_of_user(index)}  # type: ignore[arg-type]
    assert seen
    assert not seen & {item["item"] for item in answer["items"]}
    everything = http.post(
        "/v1/recommend", json={"user": "U000003", "k": 50, "exclude_seen": False, "explain": False}
    ).json()
    assert everything["ranked"] == router.catalog.known_items == answer["ranked"], "how many were left out is not told"
    assert everything["items"][0]["explanation"] is None
    some = http.post(
        "/v1/recommend", json={"user": "U000003", "candidates": ["I000001", "I000002", "never"], "exclude_seen": False}
    )
    assert some.json()["unknown_candidates"] == ["never"]
    assert {item["item"] for item in some.json()["items"]} == {"I000001", "I000002"}
    many = http.post("/v1/recommend", json={"user": "U000003", "k": 33})
    assert (many.status_code, "at once" in many.text) == (422, True)
    stranger = http.post("/v1/recommend", json={"user": "nobody", "k": 2}).json()
    assert stranger["user_known"] is False
    assert len(stranger["items"]) == 2


def test_route_items_users_info_and_health(http: TestClient) -> None:
    routed = http.post("/v1/route", json=PAIR).json()
    assert math.isclose(sum(routed["responsibilities"]), 1, abs_tol=1e-5)
    found = http.get("/v1/items", params={"query": "i00001", "limit": 3}).json()
    assert len(found["results"]) == 3
    assert found["total"] > 3
    title = next(r["title"] for r in http.get("/v1/items").json()["results"] if r["title"])
    by_title = http.get("/v1/items", params={"query": title.upper()}).json()
    assert title in [r["title"] for r in by_title["results"]]
    assert http.get("/v1/users", params={"query": "U000001"}).json()["results"][0]["known"] is True
    assert http.get("/v1/items", params={"query": "no such thing"}).json() == {"results": [], "total": 0}
    info = http.get("/v1/info").json()
    assert math.isclose(sum(cluster["share"] for cluster in info["clusters"]), 1, abs_tol=1e-9)
    assert info["rating_scale"] == [1, 5]
    assert http.get("/healthz").json()["status"] == "ok"
    assert http.get("/readyz").json() == {"status": "ready", "detail": info["model_version"]}


WRONG = [
    ({"user": "U000001"}, 422, "item"),
    (PAIR | {"rating": 9}, 422, None),
    (PAIR | {"rating": "five"}, 422, "rating"),
    (PAIR | {"rating": True}, 422, "rating"),
    (PAIR | {"top_p": True}, 422, "top_p"),
    (PAIR | {"features": ["x"] * 17}, 422, "features"),
    (PAIR | {"features": ["x" * 65]}, 422, "features.0"),
    (PAIR | {"user": ""}, 422, "user"),
    (PAIR | {"user": "x" * 257}, 422, "user"),
    (PAIR | {"max_new_tokens": 0}, 422, "max_new_tokens"),
    (PAIR | {"max_new_tokens": 129}, 422, None),
    (PAIR | {"seed": -1}, 422, "seed"),
    (PAIR | {"surprise": 1}, 422, "surprise"),
    ([], 422, None),
]


@pytest.mark.parametrize(("body", "status", "field"), WRONG)
def test_wrong_requests_are_explained(http: TestClient, body: Any, status: int, field: str | None) -> None:
    answer = http.post("/v1/explain", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == "invalid_request"
    assert error["field"] == field
    assert error["request_id"] == answer.headers["x-request-id"]
    assert len(error["message"]) > 10


def test_other_errors_have_the_same_form(http: TestClient) -> None:
    for method, path, body, status, code in (
        ("POST", "/v1/explain", b"{", 400, "invalid_json"),
        ("POST", "/v1/explain", b'{"user": "\\ud800", "item": "I000001"}', 422, "invalid_request"),
        ("POST", "/v1/explain", b"[" * 60_000, 400, "invalid_request"),
        ("POST", "/v1/explain", b" " * 70_000, 413, "too_large"),
        ("GET", "/v1/explain", None, 405, "method_not_allowed"),
        ("GET", "/nothing", None, 404, "not_found"),
    ):
        answer = http.request(method, path, content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), path
        assert "Traceback" not in answer.text


class Scripted:
    """A backend that fails as told."""

    def __init__(self, backend: LocalBackend, error: BaseException | None = None, after: int = 0) -> None:
        self._backend, self.error, self.after = backend, error, after
        self.closed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    async def write(self, *_: Any) -> Written:
        if self.error is None:
            await asyncio.sleep(60)
        assert self.error is not None
        raise self.error

    async def stream(self, *arguments: Any) -> AsyncIterator[RoutedPair | Piece | Written]:
        try:
            count = 0
            async for event in self._backend.stream(*arguments):
                if count == self.after:
                    await self.write()
                count += 1
                yield event
        finally:
            self.closed += 1


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Overloaded("full"), 429, "overloaded"),
        (Unavailable("gone"), 503, "unavailable"),
        (InputError("no"), 422, "invalid_request"),
        (None, 504, "timeout"),
        (ZeroDivisionError("secret /etc/path"), 500, "internal"),
    ],
)
def test_failures_while_writing(backend: LocalBackend, error: BaseException | None, status: int, code: str) -> None:
    scripted = Scripted(backend, error)
    with client(scripted, limits={} if error else {"request_timeout_s": 0.3}) as http:
        for body in (PAIR, PAIR | {"stream": True}):  # before anything was sent a stream is an ordinary answer
            answer = http.post("/v1/explain", json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            assert "secret" not in answer.text
            assert ("retry-after" in answer.headers) == (status in (429, 503))
        batch = http.post("/v1/explain/batch", json={"requests": [PAIR, PAIR]})
        assert batch.status_code == status


@pytest.mark.parametrize(
    ("error", "code"),
    [(Interrupted(), "interrupted"), (None, "timeout"), (ZeroDivisionError("secret"), "internal")],
)
def test_a_stream_that_breaks_off_ends_with_an_error_event(
    backend: LocalBackend, error: BaseException | None, code: str
) -> None:
    scripted = Scripted(backend, error, after=2)
    with client(scripted, limits={"request_timeout_s": 1.0}) as http:
        answer = http.post("/v1/explain", json=PAIR | {"stream": True})
        events = events_of(answer.text)
        assert [name for name, _ in events] == ["route", "token", "error"]
        assert events[-1][1]["error"]["code"] == code
        assert "secret" not in answer.text
        assert scripted.closed == 1


def test_requests_in_flight_are_bounded_and_counted_out(backend: LocalBackend) -> None:
    with client(Scripted(backend, Overloaded("full")), limits={"max_in_flight": 2}) as http:
        codes = [http.post("/v1/explain", json=PAIR | {"stream": stream}).status_code for stream in (True, False) * 3]
        assert codes == [429] * 6
        assert http.post("/v1/route", json=PAIR).status_code == 200, "what failed no longer counts"
    service = Service(backend, Limits(max_in_flight=1))
    service.enter()
    with pytest.raises(Overloaded, match="too many requests"):
        service.enter()
    service.leave()
    service.enter()


def test_a_pair_of_another_version_is_routed_anew(backend: LocalBackend) -> None:
    async def ask() -> tuple[Written, Written]:
        [routed] = await backend.route([Pair("U000001", "I000001")])
        wrong = dataclasses.replace(routed.filled, cluster=(routed.filled.cluster + 1) % 3)
        stale = dataclasses.replace(routed, model_version="old", filled=wrong)
        return await backend.write(routed, TextRequest()), await backend.write(stale, TextRequest())

    fresh, rerouted = asyncio.run(ask())
    assert rerouted.text == fresh.text
    assert rerouted.routed.filled == fresh.routed.filled


def test_the_reference_names_every_path_and_field(http: TestClient) -> None:
    page, api = http.get("/docs").text, http.get("/openapi.json").json()
    assert set(api["paths"]) >= {
        "/v1/explain", "/v1/explain/batch", "/v1/recommend", "/v1/route", "/v1/items", "/healthz", "/readyz",
    }  # fmt: skip
    for path in api["paths"]:
        assert f"<code>{path}</code>" in page
    for model in api["components"]["schemas"].values():
        for field in model.get("properties", {}):
            assert f"<code>{field}</code>" in page


def test_only_the_engines_thread_computes_with_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of OpenMP beyond the machine's cores would make all of them sleep between two products."""
    loaded = LocalBackend.load(ServeArgs.model_validate({"run": str(tiny_artifact()), "generator": {"threads": 2}}))
    seen: dict[str, set[int]] = {}

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def made(*arguments: Any) -> Any:
            seen.setdefault(name, set()).add(torch.get_num_threads())
            return call(*arguments)

        return made

    try:
        engine = loaded.writer.engine._engine
        monkeypatch.setattr(engine, "step", watched("write", engine.step))
        loaded._batcher = RouteBatcher(partial(loaded._beside, watched("route", loaded._router.route)))
        assert client(loaded).post("/v1/explain", json=PAIR).status_code == 200
        assert seen == {"write": {2}, "route": {1}}
        assert torch.get_num_threads() == 1, "of the thread that loaded it"
    finally:
        loaded.writer.engine.close()
        torch.set_num_threads(1)
