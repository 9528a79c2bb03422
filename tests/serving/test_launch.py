"""Starting a service: the ports of a machine that has services already, and what the environment says of Ray."""

import json
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.cli import Runner, command
from helpers.ports import free_port
from helpers.serve_run import PAIR, tiny_artifact

from gavamoe.errors import InputError
from gavamoe.serving import launch
from gavamoe.serving.settings import ServeArgs

ARGS = ServeArgs(run="unused")


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which something listens, at one address only."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ports of the services that would have been started: of the interface, of the metrics."""
    ports: list[tuple[int, int]] = []
    monkeypatch.setattr(launch, "_run_service", lambda args, host, port, metrics, say: ports.append((port, metrics)))
    return ports


def run(port: int, metrics_port: int | None) -> list[str]:
    said: list[str] = []
    launch.run_service(ARGS, host="127.0.0.1", port=port, metrics_port=metrics_port, say=said.append)
    return said


def test_a_port_that_was_asked_for_and_is_taken_is_wrong_input(taken: int, started: list[tuple[int, int]]) -> None:
    with pytest.raises(InputError, match=rf"--port {taken}: can't listen there .*; choose another --port"):
        run(taken, None)
    with pytest.raises(InputError, match=rf"--metrics-port {taken}: can't listen there .*; choose another, or leave"):
        run(free_port(), taken)
    port = free_port()
    with pytest.raises(InputError, match="one port can't be both"):
        run(port, port)
    assert not started


def test_a_second_service_gets_a_metrics_port_of_its_own(
    taken: int, started: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, default = free_port(), free_port()
    monkeypatch.setattr(launch, "METRICS_PORT", default)
    assert run(port, None) == []
    monkeypatch.setattr(launch, "METRICS_PORT", taken)
    [line] = run(port, None)
    monkeypatch.setattr(launch, "METRICS_PORT", port)
    run(port, None)
    (_, first), (_, second), (_, third) = started
    assert first == default
    assert second not in (taken, port)
    assert third != port
    assert line.startswith(f"port {taken} is taken: metrics are at port {second}")


@pytest.mark.parametrize("update", [(), ("--update",)])
def test_an_address_of_no_cluster_is_told_at_once(
    update: tuple[str, ...], gavamoe: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "check_args", lambda args: None)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    if not update:  # starts a Ray of its own, whatever the address
        monkeypatch.setenv("HOME", "/proc")
        monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    refused = gavamoe("serve", "unused", "--port", free_port(), *update)
    assert refused.code == 2
    assert ("nothing answers there" if update else "set HOME to a folder that can be written") in refused.err


@pytest.mark.slow
def test_two_services_on_one_machine(tmp_path: Path) -> None:
    """Both are told nothing of metrics; the first may or may not get the default port."""
    services: list[tuple[int, subprocess.Popen[bytes], Path]] = []
    try:
        for name in "ab":
            port, log = free_port(), tmp_path / name
            with log.open("wb") as out:
                process = subprocess.Popen(command("serve", tiny_artifact(), "--port", port), stdout=out, stderr=out)
            services.append((port, process, log))
            end = time.monotonic() + 180
            while "serving " not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.5)
        for port, _, _ in services:
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/explain", json.dumps(PAIR).encode(), {"content-type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert "text" in json.load(answer)
    finally:
        for _, process, _ in services:
            process.send_signal(signal.SIGINT)
        for _, process, _ in services:
            process.wait(timeout=90)
