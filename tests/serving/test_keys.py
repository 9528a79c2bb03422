"""API keys: the file's lines, names in logs, limits, expiry, and a file that changes while the service runs."""

import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from helpers.serve_run import PAIR, client

from gavamoe.errors import InputError
from gavamoe.serving import keys as keys_module
from gavamoe.serving.backend import LocalBackend
from gavamoe.serving.keys import ApiKeys, environment_keys, read_keys, warnings_about
from gavamoe.serving.settings import EMPTY_KEY_HASH, LOG_NAME, ServeArgs, hash_key

SHOP, OTHER = "secret-of-the-shop", "secret-of-another"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the service logs."""
    found: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    log, handler = logging.getLogger(LOG_NAME), Kept()
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield found
    log.removeHandler(handler)
    log.setLevel(before)


def test_lines_of_the_file(file: Path) -> None:
    file.write_text(
        f"# keys\nsha256:{hash_key('a')}\n{hash_key('b')}  # bare\n"
        f"shop sha256:{hash_key(SHOP)} in_flight=8 per_minute=600 expires=2030-12-31  # the shop\n"
    )
    first, second, shop = read_keys(file)
    assert (first.name, first.digest) == (f"key-{hash_key('a')[:8]}", hash_key("a"))
    assert second.digest == hash_key("b")
    assert (shop.name, shop.in_flight, shop.per_minute, str(shop.expires)) == ("shop", 8, 600, "2030-12-31")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"sha256:{EMPTY_KEY_HASH}", "line 1: that is the hash of an empty key"),
        (f"shop {EMPTY_KEY_HASH}", "line 1: that is the hash of an empty key"),
        ("shop my-plain-secret", "line 1: expected sha256: and 64 hex digits, never the key itself"),
        (f"shop {hash_key('a')} per_minute=0", "per_minute='0': expected a whole number from 1"),
        (f"shop {hash_key('a')} in_flight=two", "in_flight='two': expected a whole number"),
        (f"shop {hash_key('a')} expires=soon", "expires='soon': expected a day such as"),
        (f"shop {hash_key('a')} rate=3", "at most once"),
        (f"shop {hash_key('a')} in_flight=3 in_flight=4", "at most once"),
        (f"shop {hash_key('a')}\nshop {hash_key('b')}", "shop is given twice"),
        (f"shop {hash_key('a')}\nother {hash_key('a')}", "sha256:ca978112… is given twice"),
    ],
)
def test_wrong_lines_are_refused_and_not_repeated(text: str, message: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        read_keys(file)
    assert message in str(caught.value)
    assert "my-plain-secret" not in str(caught.value)


def test_empty_keys_let_nobody_in(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", " ", "a,", "a,,b"):
        monkeypatch.setenv("GAVAMOE_API_KEYS", value)
        with pytest.raises(InputError, match="holds an empty key"):
            environment_keys()
    with pytest.raises(ValueError, match="hash of an empty key"):
        ServeArgs(run="x", api_key_hashes=(EMPTY_KEY_HASH,))
    monkeypatch.delenv("GAVAMOE_API_KEYS")
    keys = ApiKeys.read(ServeArgs(run="x", api_key_hashes=(hash_key(SHOP),)))
    assert keys.find(SHOP)
    assert keys.find("") is keys.find(None) is None


def test_short_and_expired_keys_are_warned_about(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(f"old {hash_key('a')} expires=2020-01-01\nnew {hash_key('b')}\n")
    monkeypatch.setenv("GAVAMOE_API_KEYS", f"short,{SHOP}")
    args = ServeArgs(run="x", api_keys_file=str(file))
    assert warnings_about(args) == [
        "GAVAMOE_API_KEYS: 1 of its keys are shorter than 16 characters",
        f"{file}: the key old expired on 2020-01-01",
    ]
    assert warnings_about(ServeArgs(run="x", no_api_keys=True)) == []


def test_no_api_keys_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAVAMOE_API_KEYS", SHOP)
    assert ApiKeys.read(ServeArgs(run="x")).required
    assert not ApiKeys.read(ServeArgs(run="x", no_api_keys=True)).required
    with pytest.raises(ValueError, match="can't be true beside"):
        ServeArgs(run="x", no_api_keys=True, api_keys_file="keys")


def test_a_key_is_accepted_through_its_last_day(file: Path) -> None:
    today = datetime.now(UTC).date()
    file.write_text(
        f"now {hash_key(SHOP)} expires={today}\nover {hash_key(OTHER)} expires={today - timedelta(days=1)}\n"
    )
    keys = ApiKeys.read(ServeArgs(run="x", api_keys_file=str(file)))
    assert keys.find(SHOP)
    assert keys.find(OTHER) is None


def test_a_changed_file_is_read_again(
    backend: LocalBackend, file: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    """A leaked key is out at once; a file that is wrong, or gone, changes nothing."""
    monkeypatch.setattr(keys_module, "POLL_S", 0.0)
    file.write_text(f"shop {hash_key(SHOP)}\n")
    with client(backend, api_keys_file=str(file)) as http:

        def status(key: str) -> int:
            return int(http.post("/v1/route", json=PAIR, headers={"X-API-Key": key}).status_code)

        assert (status(SHOP), status(OTHER)) == (200, 401)
        file.write_text(f"other {hash_key(OTHER)} in_flight=5\n")
        assert (status(SHOP), status(OTHER)) == (401, 200)
        file.write_text("oops\n")
        assert (status(SHOP), status(OTHER)) == (401, 200)
        file.unlink()
        assert (status(SHOP), status(OTHER)) == (401, 200)
    assert any("API keys were read again: other" in line for line in lines)
    assert any("those read before stay" in line and "line 1" in line for line in lines)


def test_limits_of_a_key(backend: LocalBackend, file: Path, lines: list[str]) -> None:
    file.write_text(f"shop {hash_key(SHOP)} per_minute=2\nother {hash_key(OTHER)}\n")
    with client(backend, api_keys_file=str(file)) as http:

        def ask(key: str) -> Any:
            return http.post("/v1/route", json=PAIR, headers={"X-API-Key": key})

        assert [ask(SHOP).status_code for _ in range(3)] == [200, 200, 429]
        refused = ask(SHOP)
        assert refused.json()["error"]["code"] == "overloaded"
        assert "2 times a minute" in refused.json()["error"]["message"]
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert ask(OTHER).status_code == 200, "the others have theirs"
    assert any("key shop was turned away" in line for line in lines)
    assert any("key other, POST 200" in line for line in lines)
    assert not any(secret in line for line in lines for secret in (SHOP, OTHER, hash_key(SHOP)))


def test_requests_in_progress_of_a_key(file: Path) -> None:
    file.write_text(f"shop {hash_key(SHOP)} in_flight=1\nother {hash_key(OTHER)}\n")
    args = ServeArgs.model_validate({"run": "x", "api_keys_file": str(file), "limits": {"key_in_flight": 2}})
    keys = ApiKeys.read(args)
    shop, other = keys.find(SHOP), keys.find(OTHER)
    assert shop
    assert other
    for key, most in ((shop, 1), (other, 2)):
        for _ in range(most):
            keys.enter(key)
        with pytest.raises(keys_module.LimitReached, match=f"may have {most} requests in progress"):
            keys.enter(key)
        keys.leave(key)
        keys.enter(key)


def test_a_minute_refills_steadily(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(f"shop {hash_key(SHOP)} per_minute=60\n")
    keys = ApiKeys.read(ServeArgs(run="x", api_keys_file=str(file)))
    now = time.monotonic()
    monkeypatch.setattr(keys_module.time, "monotonic", lambda: now)
    key = keys.find(SHOP)
    assert key
    for _ in range(60):
        keys.enter(key)
        keys.leave(key)
    with pytest.raises(keys_module.LimitReached) as reached:
        keys.enter(key)
    assert reached.value.retry_after_s == 1
    now += 1.0
    keys.enter(key)
