"""Users that training never saw, over HTTP and on the command line: served by what they tell, which nobody keeps."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from helpers.cli import Runner
from helpers.serve_run import PAIR, events_of, tiny_artifact
from helpers.tiny import tiny
from starlette.testclient import TestClient

from gavamoe.artifacts.run import claim_run
from gavamoe.data.dataset import open_dataset

HISTORY = [
    {"item": "I000003", "rating": 5, "text": "Wow, really awesome dragons, no kidding!"},
    {"item": "nowhere", "text": "What awesome jokes, no kidding!"},
    {"rating": 4},
]
ASKED = {"item": "I000001", "history": HISTORY}


def test_a_stranger_is_routed_rated_and_written_for(http: TestClient) -> None:
    route = http.post("/v1/route", json=ASKED).json()
    assert (route["user"], route["user_known"], route["history_entries"]) == (None, False, 3)
    assert 1 <= route["predicted_rating"] <= 5
    assert route["cluster"] == max(range(3), key=route["responsibilities"].__getitem__)
    nobody = http.post("/v1/route", json={"user": "nobody", "item": "I000001"}).json()
    assert nobody["history_entries"] == 0
    assert nobody["predicted_rating"] != route["predicted_rating"]
    answer = http.post("/v1/explain", json=ASKED | {"user": "somebody new"}).json()
    assert (answer["user"], answer["cluster"]) == ("somebody new", route["cluster"])
    assert answer["predicted_rating"] == pytest.approx(route["predicted_rating"])
    assert answer["text"]
    events = events_of(http.post("/v1/explain", json=ASKED | {"stream": True}).text)
    assert events[-1][1]["text"] == answer["text"]
    [first, second] = http.post("/v1/explain/batch", json={"requests": [ASKED, PAIR]}).json()["results"]
    assert (first["text"], first["history_entries"], second["history_entries"]) == (answer["text"], 3, 0)


def test_items_are_ranked_for_a_stranger_without_those_of_the_history(http: TestClient) -> None:
    ranked = http.post("/v1/recommend", json={"history": HISTORY, "k": 50, "explain": False}).json()
    assert (ranked["user"], ranked["user_known"]) == (None, False)
    items = [item["item"] for item in ranked["items"]]
    assert "I000003" not in items
    assert len(items) == ranked["ranked"] - 1
    again = http.post("/v1/route", json={"item": items[0], "history": HISTORY}).json()
    assert again["predicted_rating"] == pytest.approx(ranked["items"][0]["predicted_rating"], abs=1e-5)
    low = [{"item": item, "rating": 1} for item in items[:5]]
    other = http.post("/v1/recommend", json={"history": low, "k": 3, "explain": True}).json()
    assert all(item["explanation"]["history_entries"] == 5 for item in other["items"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"item": "I000001"}, "needs a user, or a history"),
        ({"item": "I000001", "history": []}, "needs a user, or a history"),
        ({"item": "I000001", "history": [{"rating": 3}] * 21}, "at most 20 items"),
        ({"item": "I000001", "history": [{}]}, "needs an item, a rating or a text"),
        ({"item": "I000001", "history": [{"rating": 9}]}, "history: entry 1: rating 9"),
        ({"item": "I000001", "history": [{"text": "x" * 2001}]}, "at most 2000 characters"),
        ({"item": "I000001", "history": [{"text": "\ud800"}]}, ""),
        ({"item": "I000001", "history": [{"secret": 1}]}, "Extra inputs"),
        ({"user": "U000001", "item": "I000001", "history": HISTORY}, "the user is known by its training rows"),
    ],
)
def test_wrong_histories_are_refused(http: TestClient, body: dict[str, object], message: str) -> None:
    for path in ("/v1/route", "/v1/explain"):
        answer = http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422), answer.text
        assert message in answer.json()["error"]["message"]


def test_special_tokens_in_a_history_are_words_like_others(http: TestClient) -> None:
    body = {"item": "I000001", "history": [{"text": "<|endoftext|> </s> <user> [PAD]"}]}
    assert http.post("/v1/explain", json=body).status_code == 200


def test_a_history_is_not_logged(http: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        http.post("/v1/explain", json={"item": "I000001", "history": [{"text": "zanzibar", "rating": 4}]})
        http.post("/v1/explain", json={"item": "I000001", "history": [{"text": "zanzibar", "rating": 99}]})
    assert "zanzibar" not in caplog.text


def test_explain_takes_a_file(gavamoe: Runner, tmp_path: Path) -> None:
    run, path = shutil.copytree(tiny_artifact().parent, tmp_path / "run"), tmp_path / "mine.jsonl"
    claim_run(run, tiny(), run / "data", open_dataset(run / "data").fingerprint, continuing=False)
    path.write_text("\n".join(map(json.dumps, HISTORY)))
    command = ("explain", run, "--item", "I000001", "--history", path)
    value = json.loads(gavamoe(*command, "--json").out)
    assert (value["user"], value["history_entries"], value["user_known"]) == (None, 3, False)
    assert "user routed by 3 entries of history" in gavamoe(*command).err
    assert "the user is known" in gavamoe(*command, "--user", "U000001").err
    path.write_text('{"rating": 7}')
    wrong = gavamoe(*command)
    assert (wrong.code, wrong.out) == (2, "")
    assert "history: entry 1: rating 7" in wrong.err


def test_explain_names_what_is_missing(gavamoe: Runner, tmp_path: Path) -> None:
    found = gavamoe("explain", tmp_path, "--item", "I000001")
    assert (found.code, found.out) == (2, "")
    assert "needs --user, or --history" in found.err
