"""Texts that one other user wrote are not sent, whole or in pieces, however they are asked for."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.serve_run import PAIR, client, events_of, tiny_artifact
from starlette.testclient import TestClient

from gavamoe.artifacts.checksums import list_files
from gavamoe.artifacts.files import read_json, write_json
from gavamoe.artifacts.manifest import MANIFEST
from gavamoe.errors import InputError
from gavamoe.generation.authorship import AUTHORS_FILE, SingleAuthors, words_of
from gavamoe.serving.backend import LocalBackend
from gavamoe.serving.launch import check_args
from gavamoe.serving.settings import ServeArgs


def guarded_args(folder: Path) -> ServeArgs:
    return ServeArgs.model_validate({"run": str(folder), "withhold": {"single_author": True, "least_words": 1}})


def list_again(folder: Path) -> None:
    """Let an artifact's list of files agree with what lies there."""
    manifest = read_json(folder / MANIFEST)
    (folder / MANIFEST).unlink()
    manifest["files"] = {name: entry.model_dump() for name, entry in list_files(folder).items()}
    write_json(folder / MANIFEST, manifest)


@pytest.fixture(scope="module")
def free() -> Iterator[TestClient]:
    """The service without the switch."""
    backend = LocalBackend.load(ServeArgs(run=str(tiny_artifact())))
    yield client(backend)
    backend.writer.engine.close()


@pytest.fixture(scope="module")
def text(free: TestClient) -> str:
    """What the model writes for a pair."""
    written = free.post("/v1/explain", json=PAIR).json()
    assert written["finish_reason"] == "end"
    return str(written["text"])


@pytest.fixture(scope="module")
def guarded(text: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The service with the switch, as if another user alone had written that text."""
    folder = shutil.copytree(tiny_artifact(), tmp_path_factory.mktemp("guarded") / "stage2")
    SingleAuthors.of_texts([text], [2]).save(folder)
    list_again(folder)
    backend = LocalBackend.load(guarded_args(folder))
    yield client(backend)
    backend.writer.engine.close()


def test_a_text_of_another_user_is_withheld(guarded: TestClient, text: str) -> None:
    answer = guarded.post("/v1/explain", json=PAIR).json()
    assert (answer["text"], answer["finish_reason"]) == ("", "withheld")
    assert answer["predicted_rating"] > 0, "the rest of the answer is there"


def test_it_is_not_sent_but_for_its_last_word_either(guarded: TestClient, free: TestClient) -> None:
    whole = free.post("/v1/explain", json=PAIR).json()
    for tokens in (1, whole["new_tokens"] // 2, whole["new_tokens"] - 1):
        short = guarded.post("/v1/explain", json=PAIR | {"max_new_tokens": tokens}).json()
        assert (short["text"], short["finish_reason"]) == ("", "withheld")


def test_a_stream_sends_no_piece_of_it(guarded: TestClient, text: str) -> None:
    events = events_of(guarded.post("/v1/explain", json=PAIR | {"stream": True}).text)
    assert [name for name, _ in events] == ["route", "done"]
    assert text not in str(events)
    assert events[-1][1]["finish_reason"] == "withheld"


def test_batches_and_recommendations_go_the_same_way(guarded: TestClient) -> None:
    batch = guarded.post("/v1/explain/batch", json={"requests": [PAIR, PAIR]}).json()
    assert [answer["finish_reason"] for answer in batch["results"]] == ["withheld"] * 2
    body = {"user": PAIR["user"], "candidates": [PAIR["item"]], "k": 1}
    [item] = guarded.post("/v1/recommend", json=body).json()["items"]
    assert item["explanation"]["finish_reason"] == "withheld"


def test_other_texts_are_what_they_are_without_the_switch(guarded: TestClient, free: TestClient, text: str) -> None:
    bodies = [
        PAIR | {"item": item, "rating": rating} for item in ("I000002", "I000005", "I000011") for rating in (1, 5)
    ]
    others = [body for body in bodies if words_of(free.post("/v1/explain", json=body).json()["text"]) != words_of(text)]
    assert len(others) > 2
    for body in others:
        for tokens in (None, 3):
            asked = body | {"max_new_tokens": tokens}
            wanted, found = (each.post("/v1/explain", json=asked).json() for each in (free, guarded))
            for name in ("text", "finish_reason", "new_tokens"):
                assert found[name] == wanted[name], name
    events = events_of(guarded.post("/v1/explain", json=others[0] | {"stream": True}).text)
    assert [name for name, _ in events] == ["route", "token", "done"]
    assert events[1][1]["text"] == events[-1][1]["text"]


def test_a_run_that_knows_no_authors_is_refused_before_the_service_starts(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_artifact(), tmp_path / "stage2")
    (folder / AUTHORS_FILE).unlink()
    list_again(folder)
    with pytest.raises(InputError, match="train it again, or serve it with"):
        check_args(guarded_args(folder))
    check_args(ServeArgs(run=str(folder)))  # off by default: older runs are served as ever
