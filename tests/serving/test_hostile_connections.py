"""Thousands of clients that send headers and one byte of a body, and hold on: the service stays up for everyone else.

Slow: starts a service on a Ray of its own, as `gavamoe serve` does.
"""

import asyncio
import json
import os
import resource
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import command
from helpers.ports import free_port
from helpers.serve_run import PAIR, tiny_artifact

from gavamoe.serving.settings import hash_key

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KEY, LIMITED = "secret-of-the-shop", "secret-of-the-limited"
CONNECTIONS = min(2000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
"""As many as the limit of open files allows: HAProxy needs two for each."""
HEAD = "POST /v1/explain HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n{key}\r\n"


class Service:
    """A running `gavamoe serve`, with API keys."""

    def __init__(self, work: Path) -> None:
        self.keys = work / "keys"
        self.keys.write_text(f"shop {hash_key(KEY)}\nlimited {hash_key(LIMITED)} per_minute=2\n")
        settings = work / "serve.yaml"
        settings.write_text("limits: {max_in_flight: 64}\n")
        self.port, self.log = free_port(), work / "log"
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        arguments = (tiny_artifact(), "--port", self.port, "--api-keys", self.keys, "--settings", settings)
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                command("serve", *arguments), stdout=out, stderr=out, env=environment | {"OMP_NUM_THREADS": "1"}
            )

    def wait(self) -> None:
        end = time.monotonic() + 240
        while "serving " not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.5)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=90)

    def ask(self, path: str, body: Any = None, key: str | None = None, **headers: str) -> tuple[int, Any, Any]:
        """Status, JSON and headers of an answer."""
        sent = {"content-type": "application/json"} | headers | ({} if key is None else {"X-API-Key": key})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, sent)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer), answer.headers
        except urllib.error.HTTPError as refused:
            return refused.code, json.load(refused), refused.headers


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("hostile"))
    try:
        running.wait()
        yield running
    finally:
        running.stop()


@pytest.mark.parametrize(
    ("length", "key", "sent", "most_s"),
    [
        (20, None, 1, 1),
        (20, KEY, 1, 1),
        # More than HAProxy waits for, 40 MB at once: the replica turns them away, or waits for the rest.
        (60_000, None, 20_000, 5),
        (60_000, KEY, 20_000, 5),
    ],
)
def test_those_who_send_slowly_stop_nobody(
    service: Service, length: int, key: str | None, sent: int, most_s: float
) -> None:
    head = HEAD.format(length=length, key="" if key is None else f"X-API-Key: {key}\r\n").encode()

    async def attack() -> tuple[list[float], list[int]]:
        writers: list[asyncio.StreamWriter] = []
        for _ in range(CONNECTIONS // 50):
            opened = await asyncio.gather(
                *[asyncio.open_connection("127.0.0.1", service.port) for _ in range(50)], return_exceptions=True
            )
            for each in opened:
                if not isinstance(each, BaseException):
                    writers.append(each[1])
                    each[1].write(head + b"{" * sent)
        assert len(writers) >= CONNECTIONS * 0.95
        seconds, statuses = [], []
        for _ in range(10):
            started = time.monotonic()
            health = await asyncio.to_thread(service.ask, "/healthz")
            seconds.append(time.monotonic() - started)
            answer = await asyncio.to_thread(service.ask, "/v1/explain", PAIR, KEY)
            statuses += [health[0], answer[0]]
            await asyncio.sleep(0.5)
        for writer in writers:
            writer.close()
        return seconds, statuses

    seconds, statuses = asyncio.run(attack())
    print(f"{CONNECTIONS} connections; /healthz at most {max(seconds):.2f} s")
    assert set(statuses) == {200}
    assert max(seconds) < most_s
    assert sorted(seconds)[5] < 1


def test_one_request_id_through_serve(service: Service) -> None:
    for sent in (None, "mine-1", "not tame"):
        headers = {} if sent is None else {"X-Request-Id": sent}
        _, answer, found = service.ask("/v1/explain", {}, KEY, **headers)
        [request_id] = found.get_all("x-request-id")
        assert answer["error"]["request_id"] == request_id
        assert (request_id == sent) is (sent == "mine-1")


def test_keys_through_serve(service: Service) -> None:
    assert service.ask("/v1/explain", PAIR)[0] == 401
    assert service.ask("/v1/users", key=KEY)[0] == 403
    assert [service.ask("/v1/route", PAIR, LIMITED)[0] for _ in range(3)] == [200, 200, 429]
    service.keys.write_text(f"shop {hash_key(KEY)}\n")
    time.sleep(1.5)
    assert service.ask("/v1/route", PAIR, LIMITED)[0] == 401, "taken back without a restart"
    assert service.ask("/v1/route", PAIR, KEY)[0] == 200


def test_an_update_keeps_keys_and_limits(service: Service) -> None:
    address = service.log.read_text().split("RAY_ADDRESS=")[1].split()[0]
    done = subprocess.run(
        command("serve", tiny_artifact(), "--update"),
        env=os.environ | {"RAY_ADDRESS": address}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for path in ("/v1/users", "/v1/info"):
        assert service.ask(path)[0] == 401
    assert service.ask("/v1/route", PAIR, KEY)[0] == 200
