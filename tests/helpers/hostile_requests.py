"""A thousand hostile requests to the service: none may end in an internal error."""

import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from helpers.serve_run import events_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)

FIELD = st.sampled_from(
    ["user", "item", "rating", "features", "max_new_tokens", "temperature", "top_p", "seed", "stream", "trace",
     "requests", "k", "candidates", "exclude_seen", "explain", "query", "__class__"]
)  # fmt: skip

NASTY = st.sampled_from(
    ["U000001", "I000001", "", "\x00", "\ud800", "<|endoftext|>", "../../etc/passwd", "' OR 1=1 --", "{{7*7}}", "%s%n",
     "🎬" * 80, "\u202e", "A" * 300,
     0, -1, 2**70, 1e308, float("nan"), float("inf"), True, None, [], {}, ["a"] * 20, ["\udfff"]]
)  # fmt: skip

VALID = st.fixed_dictionaries(
    {"user": st.text(min_size=1, max_size=200), "item": st.text(min_size=1, max_size=200)},
    optional={
        "rating": st.floats(1, 5),
        "features": st.lists(st.text(min_size=1, max_size=60), max_size=16),
        "max_new_tokens": st.integers(1, 4),
        "temperature": st.floats(0, 5),
        "top_p": st.floats(0, 1, exclude_min=True),
        "seed": st.integers(0, 2**63 - 1),
        "stream": st.booleans(),
        "trace": st.booleans(),
    },
)

BODY = VALID | st.dictionaries(FIELD, NASTY | JSON, max_size=6) | JSON

PATHS = st.sampled_from(["/v1/explain", "/v1/explain/batch", "/v1/recommend", "/v1/route"])

ALLOWED = {200, 400, 401, 404, 405, 413, 422}


@settings(max_examples=700, deadline=5000, suppress_health_check=list(HealthCheck))
@given(path=PATHS, body=BODY, batch=st.booleans())
def send_bodies(http: TestClient, path: str, body: Any, batch: bool) -> None:
    """JSON of every shape, from valid requests to nonsense, to every path that takes a body."""
    if batch and path.endswith("batch"):
        body = {"requests": [body]}
    if isinstance(body, dict) and path != "/v1/route":
        body = {"max_new_tokens": 3} | body
    answer = http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code in ALLOWED, answer.text
    if answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream"):
        assert events_of(answer.text)[-1][0] == "done"
    elif answer.status_code != 200:
        assert answer.json()["error"]["code"] != "internal"


@settings(max_examples=150, deadline=5000, suppress_health_check=list(HealthCheck))
@given(path=PATHS, body=st.binary(max_size=300))
def send_bytes(http: TestClient, path: str, body: bytes) -> None:
    """Bodies that are no JSON."""
    answer = http.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in ALLOWED, answer.text
    assert answer.json()["error"]["message"]


@settings(max_examples=150, deadline=5000, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(["/v1/items", "/v1/users"]), query=st.text(max_size=250), limit=st.integers() | st.text())
def send_queries(http: TestClient, path: str, query: str, limit: Any) -> None:
    """Queries and limits of every kind to the catalog's paths."""
    answer = http.get(path, params={"query": query.encode("utf-8", "replace").decode(), "limit": limit})
    assert answer.status_code in ALLOWED, answer.text
