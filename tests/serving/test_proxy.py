"""HAProxy as Ray Serve would start it, by our launcher: its deadline, its errors, its log. Needs no Ray."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from helpers.ports import free_port

from gavamoe.errors import InputError
from gavamoe.serving import proxy

HAPROXY = proxy.binary()
needs_haproxy = pytest.mark.skipif(HAPROXY is None, reason="needs HAProxy, which ray[serve] brings")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short name, as the sockets in it must have."""
    path = Path(f"/tmp/gavamoe-test-{os.getpid()}")
    path.mkdir()
    yield path
    shutil.rmtree(path)


def rendered(folder: Path, port: int, replica: int, prefix: str | None = "/") -> Path:
    """The file that Ray Serve writes, with one application of one replica at `prefix`; None: without any."""
    from ray.serve._private import haproxy
    from ray.serve.config import HTTPOptions

    server = haproxy.ServerConfig(name="replica", host="127.0.0.1", port=replica)
    config = haproxy.HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        metrics_port=free_port(),
        stats_port=free_port(),
        timeout_client_s=60,
        log_target=proxy.LOG_TARGET,
        metrics_enabled=False,
    )
    path = folder / "haproxy.cfg"
    backends = {}
    if prefix is not None:
        backends["app"] = haproxy.BackendConfig(name="app", path_prefix=prefix, app_name="gavamoe", servers=[server])
    haproxy.HAProxyApi(config, backends, str(path))._generate_config_file_internal()
    return path


@pytest.fixture
def running(folder: Path) -> Iterator[tuple[int, Path]]:
    """Its port, with no replica behind it; and its output."""
    port = free_port()
    with started(folder, port, rendered(folder, port, free_port())) as output:
        yield port, output


@contextmanager
def started(folder: Path, port: int, config: Path) -> Iterator[Path]:
    """HAProxy with this configuration, listening at the port; gives the file of its output."""
    assert HAPROXY is not None
    output = folder / "output"
    with output.open("wb") as out:
        process = subprocess.Popen([proxy.write_launcher(folder, HAPROXY), "-db", "-f", config], stdout=out, stderr=out)
    try:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            assert process.poll() is None, output.read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield output
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)


def ask(port: int, sent: bytes, seconds: float = 20) -> tuple[str, dict[str, str]]:
    """Status and error of raw bytes."""
    with socket.create_connection(("127.0.0.1", port), seconds) as connection:
        connection.sendall(sent)
        received = b""
        while part := connection.recv(65536):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"application/json" in head, received
    return head.split()[1].decode(), json.loads(body)["error"]


@needs_haproxy
def test_its_errors_are_the_interfaces(running: tuple[int, Path]) -> None:
    port, _ = running
    status, error = ask(port, b"GET /v1/info HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (status, error["code"]) == ("503", "unavailable")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20)
    assert refused.value.headers["retry-after"] == "1"


@needs_haproxy
@pytest.mark.parametrize(
    ("prefix", "expected"), [(None, ("503", "unavailable")), ("/other", ("404", "not_found"))], ids=["none", "other"]
)
def test_without_an_application_clients_are_told_to_ask_again(
    prefix: str | None, expected: tuple[str, str], folder: Path
) -> None:
    """While the service starts and stops, Ray's HAProxy says of every path that it was not found."""
    port = free_port()
    with started(folder, port, rendered(folder, port, free_port(), prefix)):
        status, error = ask(port, b"GET /v1/info HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (status, error["code"]) == expected


@needs_haproxy
def test_a_proxy_that_is_drained_finishes_what_it_has(folder: Path) -> None:
    """Ray's shutdown kills HAProxy at once: the answers to requests in progress were once lost."""
    port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as replica:
        config = rendered(folder, port, replica.getsockname()[1])
        with started(folder, port, config), _connected(port) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            asked, _ = replica.accept()
            while not asked.recv(65_536).startswith(b"GET / "):  # but a health check
                asked, _ = replica.accept()
            draining = threading.Thread(target=proxy.drain, args=(folder / "admin.sock", 30))
            draining.start()
            draining.join(1)
            assert draining.is_alive(), "it waits for the answer"
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), 5)
            asked.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
            draining.join(10)
            assert not draining.is_alive()
            assert client.recv(65_536).endswith(b"ok")
    proxy.drain(folder / "nowhere.sock", 30)


@needs_haproxy
def test_a_request_has_a_deadline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers and bodies alike; a byte now and then does not put it off."""
    assert HAPROXY is not None
    monkeypatch.setattr(proxy, "REQUEST_TIMEOUT_S", 1)
    port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as replica:  # takes connections and never answers
        config = rendered(folder, port, replica.getsockname()[1])
        process = subprocess.Popen([proxy.write_launcher(folder, HAPROXY), "-db", "-f", config])
        try:
            head = b"POST / HTTP/1.1\r\nHost: x\r\n"
            # Of what is not yet a request HAProxy's lower half speaks, whose pages can't be changed.
            for sent, error in ((head, b"<html>"), (head + b"Content-Length: 9\r\n\r\n{", b'"code":"timeout"')):
                connection = _connected(port)
                started = time.monotonic()
                connection.sendall(sent)
                connection.settimeout(0.3)
                received = b""
                while b"408" not in received and time.monotonic() - started < 15:
                    try:
                        received += connection.recv(65536)
                    except TimeoutError:
                        connection.sendall(b" ")
                connection.close()
                assert received.startswith(b"HTTP/1.1 408"), received
                assert error in received
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=20)


def _connected(port: int) -> socket.socket:
    end = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 10)
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.1)


@needs_haproxy
def test_its_log_holds_no_ids(running: tuple[int, Path]) -> None:
    """And it has no target but its own output: Ray's default sends each request by UDP."""
    port, output = running
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/users?query=U000123", timeout=20)
    time.sleep(0.3)
    assert "U000123" not in output.read_text()
    lines = [line.split() for line in (output.parent / "haproxy.cfg.completed").read_text().splitlines()]
    assert {words[1] for words in lines if words[:1] == ["log"]} == {"global", "stderr"}


def test_the_launcher_becomes_what_it_starts(folder: Path) -> None:
    """By exec, with Ray's arguments as they are, but for the file, of which it gives a completed copy."""
    config = folder / "haproxy.cfg"
    config.write_text("global\ndefaults\n    mode http\n    errorfile 503 /old\nfrontend f\n")
    seen = folder / "seen"
    stand_in = folder / "stand in"
    stand_in.write_text(
        f"#!{sys.executable}\nimport os, sys\nopen({str(seen)!r}, 'w').write(repr([os.getpid(), sys.argv[1:]]))\n"
    )
    stand_in.chmod(0o755)
    launcher = proxy.write_launcher(folder, str(stand_in))
    process = subprocess.Popen([launcher, "-db", "-f", config, "-dR", "-sf", "12", "-x", "a b"])
    assert process.wait(timeout=20) == 0
    assert seen.read_text() == repr(
        [process.pid, ["-db", "-f", f"{config}.completed", "-dR", "-sf", "12", "-x", "a b"]]
    )
    lines = [line.strip() for line in Path(f"{config}.completed").read_text().splitlines()]
    assert lines[:3] == ["global", "defaults", "timeout http-request 10s"]
    assert f"errorfile 503 {folder}/503.http" in lines
    assert "errorfile 503 /old" not in lines
    assert shlex.quote(str(stand_in)) in launcher.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def watchers(process: psutil.Process) -> list[psutil.Process]:
    """Its children that watch; a child that ends meanwhile is none."""
    found = []
    for child in process.children():
        with suppress(psutil.Error):
            found += [child] if "watch" in child.cmdline() else []
    return found


@pytest.mark.parametrize("heeds", [True, False], ids=["finishes", "hangs"])
def test_what_the_launcher_starts_follows_its_parent(
    heeds: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once met: `gavamoe serve` was killed, and its HAProxy held the port for good."""
    monkeypatch.setattr(proxy, "_FINISH_S", 1)
    (folder / "haproxy.cfg").write_text("global\n")
    told, stand_in = folder / "told", folder / "stand in"
    heed = f"echo told > {told}" + ("; exit" if heeds else "")
    stand_in.write_text(f"#!/bin/sh\ntrap '{heed}' USR1\nwhile :; do sleep 0.1; done\n")
    stand_in.chmod(0o755)
    start = f"{proxy.write_launcher(folder, str(stand_in))} -db -f {folder}/haproxy.cfg & echo $!; wait"
    parent = subprocess.Popen(["sh", "-c", start], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    try:
        watcher = until(lambda: watchers(child))[0]
        time.sleep(2)
        assert child.is_running()
        assert not told.exists()
        parent.kill()
        parent.wait()
        _, alive = psutil.wait_procs([child, watcher], timeout=30)
    finally:
        with suppress(psutil.Error):
            child.kill()
    assert not alive
    assert told.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_watcher_ends_with_what_it_watches(folder: Path) -> None:
    """Ray kills one HAProxy, or has it finish, and starts another."""
    (folder / "haproxy.cfg").write_text("global\n")
    sleep = shutil.which("sleep")
    assert sleep is not None
    process = subprocess.Popen([proxy.write_launcher(folder, sleep), "60"])
    watcher = until(lambda: watchers(psutil.Process(process.pid)))[0]
    process.kill()
    process.wait()
    watcher.wait(30)


def until(find: Callable[[], list[psutil.Process]]) -> list[psutil.Process]:
    """What is found at last."""
    end = time.monotonic() + 30
    while not (found := find()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def test_the_launcher_for_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(proxy, "binary", lambda: "/usr/sbin/haproxy")
    proxy.main(str(tmp_path / "haproxy"))
    written = Path(capsys.readouterr().out.strip())
    assert written == tmp_path / "haproxy" / "haproxy"
    assert os.access(written, os.X_OK)
    with pytest.raises(InputError, match="blank"):
        proxy.main(str(tmp_path / "a b"))
    monkeypatch.setattr(proxy, "binary", lambda: None)
    with pytest.raises(InputError, match="no HAProxy here"):
        proxy.main(str(tmp_path))
