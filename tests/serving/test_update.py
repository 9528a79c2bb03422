"""`gavamoe serve --update` changes the run and nothing else; a service that others reach is not open by accident."""

from pathlib import Path
from typing import Any

import pytest
from helpers.cli import Runner
from helpers.ports import free_port

from gavamoe.errors import InputError
from gavamoe.serving import launch
from gavamoe.serving.launch import check_openness, updated_args
from gavamoe.serving.settings import ServeArgs, hash_key


@pytest.fixture(autouse=True)
def any_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are not read here."""
    monkeypatch.setattr(launch, "check_args", lambda args: None)
    monkeypatch.delenv("GAVAMOE_API_KEYS", raising=False)


def running(environment_keys: bool = False, **values: Any) -> dict[str, Any]:
    """What a running service says of itself, as `Ingress.settings` does."""
    args = ServeArgs.model_validate({"run": "/before"} | values)
    return {"args": args.model_dump(mode="json"), "environment_keys": environment_keys}


PROTECTED: dict[str, Any] = {
    "api_keys_file": "/keys.txt",
    "api_key_hashes": (hash_key("secret"),),
    "limits": {"max_in_flight": 7},
    "generator_scaling": {"min_replicas": 3, "max_replicas": 3, "num_cpus": 2},
    "allowed_origins": ("https://shop.example",),
    "page": False,
    "browse": {"users": True},
}


def test_an_update_changes_the_run_alone() -> None:
    args = updated_args(running(**PROTECTED), Path("/after"), None, {})
    assert args == ServeArgs.model_validate({"run": "/after"} | PROTECTED)


def test_what_is_named_changes_and_no_more(tmp_path: Path) -> None:
    settings = tmp_path / "s.yaml"
    settings.write_text("limits: {max_batch: 2}\npage: true\n")
    replicas = {"generator_scaling": {"min_replicas": 1, "max_replicas": 1}, "api_keys_file": "/other.txt"}
    args = updated_args(running(**PROTECTED), Path("/after"), settings, replicas)
    assert (args.limits.max_in_flight, args.limits.max_batch, args.page) == (7, 2, True)
    assert (args.generator_scaling.max_replicas, args.generator_scaling.num_cpus) == (1, 2)
    assert (args.api_keys_file, args.api_key_hashes) == ("/other.txt", PROTECTED["api_key_hashes"])
    assert args.allowed_origins == ("https://shop.example",)


def test_only_saying_so_takes_keys_off(tmp_path: Path) -> None:
    settings = tmp_path / "s.yaml"
    settings.write_text("api_keys_file: null\napi_key_hashes: []\n")
    with pytest.raises(InputError, match="only --no-api-keys does"):
        updated_args(running(**PROTECTED), Path("/after"), settings, {})
    settings.write_text("no_api_keys: true\n")
    with pytest.raises(InputError, match="only --no-api-keys does"):
        updated_args(running(environment_keys=True), Path("/after"), settings, {})
    opened = updated_args(running(**PROTECTED), Path("/after"), None, {"no_api_keys": True})
    assert (opened.no_api_keys, opened.api_keys_file, opened.api_key_hashes) == (True, None, ())
    closed = updated_args(running(no_api_keys=True), Path("/after"), None, {"api_keys_file": "/keys.txt"})
    assert (closed.no_api_keys, closed.api_keys_file) == (False, "/keys.txt")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org"])
def test_nobody_opens_a_service_by_accident(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"--api-keys FILE or GAVAMOE_API_KEYS, or say --no-api-keys"):
        check_openness(ServeArgs(run="x"), host)
    check_openness(ServeArgs(run="x", no_api_keys=True), host)
    check_openness(ServeArgs(run="x", api_key_hashes=(hash_key("a"),)), host)
    monkeypatch.setenv("GAVAMOE_API_KEYS", "a-long-random-key")
    check_openness(ServeArgs(run="x"), host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_this_machine_alone_needs_no_key(host: str) -> None:
    check_openness(ServeArgs(run="x"), host)


def test_the_command_refuses(gavamoe: Runner, tmp_path: Path) -> None:
    refused = gavamoe("serve", tmp_path, "--host", "0.0.0.0", "--port", free_port())
    assert refused.code == 2
    assert "no API key is set" in refused.err


def test_the_command_hands_on_what_was_said(gavamoe: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[Any] = []
    monkeypatch.setattr(launch, "update_service", lambda *arguments, say: told.extend(arguments))
    assert gavamoe("serve", tmp_path, "--update", "--no-api-keys", "--replicas", 2).code == 0
    scaling = {"min_replicas": 2, "max_replicas": 2}
    assert told == [tmp_path, None, {"generator_scaling": scaling, "no_api_keys": True}]


def test_a_running_service_gives_requests_no_more_time(tmp_path: Path) -> None:
    """Ray's own limit is set when the service starts, and would cut them off before the service does."""
    settings = tmp_path / "serve.yaml"
    settings.write_text("limits: {request_timeout_s: 45}")
    with pytest.raises(InputError, match=r"request_timeout_s 45: a running service can't be given more than its 30 s"):
        updated_args(running(), Path("/after"), settings, {})
    settings.write_text("limits: {request_timeout_s: 5}")
    assert updated_args(running(), Path("/after"), settings, {}).limits.request_timeout_s == 5
