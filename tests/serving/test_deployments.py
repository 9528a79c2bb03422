"""The service on Ray Serve, as `gavamoe serve` starts it: load, killed and frozen replicas, updates, limits.

Slow: starts a Ray of its own. Replicas are found among the descendants of the service's process, and nothing else is
touched.
"""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx2
import psutil
import pytest
from helpers.cli import command
from helpers.hostile_requests import send_bodies, send_bytes, send_queries
from helpers.ports import free_port
from helpers.serve_run import tiny_artifact

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LONG = {"temperature": 5.0, "max_new_tokens": 128}
"""Texts that hardly ever end early."""
ENDLESS = LONG | {"max_new_tokens": 512}


@dataclass
class Service:
    """A running `gavamoe serve`."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """Processes of a deployment's replicas, oldest first."""
        name, found = f"ServeReplica:gavamoe:{deployment}", []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it, or a zombie: gone in the meantime
                found += [process] if name in " ".join(process.cmdline()) else []
        return sorted(found, key=lambda replica: replica.create_time())

    def wait_for_replicas(self, deployment: str, without: int, count: int = 2, seconds: float = 120) -> None:
        """Wait until a deployment has `count` replicas again, none of them the process `without`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pids = [replica.pid for replica in self.replicas(deployment)]
            if len(pids) == count and without not in pids:
                return
            time.sleep(0.5)
        raise AssertionError(f"{deployment}: replicas {pids}, without {without}")

    @property
    def address(self) -> str:
        """The address of the Ray that it runs on."""
        found = re.search(r"RAY_ADDRESS=(\S+)", self.log.read_text())
        assert found
        return found[1]


@contextlib.contextmanager
def running(work: Path, *options: str) -> Iterator[Service]:
    """A `gavamoe serve` of the tiny run, with settings.yaml of `work`, until the block ends."""
    port, metrics_port, log = free_port(), free_port(), work / "log"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "OMP_NUM_THREADS": "1"
    }
    settings = work / "settings.yaml"
    arguments = (tiny_artifact(), "--port", port, "--metrics-port", metrics_port, "--settings", settings, *options)
    with log.open("wb") as out:
        process = subprocess.Popen(command("serve", *arguments), stdout=out, stderr=out, env=environment)
    try:
        end = time.monotonic() + 180
        while "serving " not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.5)
        yield Service(f"http://127.0.0.1:{port}", process, log)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=90)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    work = tmp_path_factory.mktemp("serve")
    (work / "settings.yaml").write_text(
        "generator: {slots: 16, max_waiting: 40, stuck_after_s: 5}\n"
        "generator_scaling: {min_replicas: 2, max_replicas: 2, num_cpus: 0.5}\n"
        "ingress_scaling: {min_replicas: 2, max_replicas: 2, num_cpus: 0.25}\n"
        "limits: {request_timeout_s: 60, max_in_flight: 60, max_new_tokens: 512}\n"
    )
    with running(work) as found:
        yield found


def pair(number: int) -> dict[str, Any]:
    return {"user": f"U{number % 60:06}", "item": f"I{number % 40:06}"}


async def load(
    service: Service,
    requests: int,
    clients: int,
    path: str = "/v1/explain",
    during: Callable[[Callable[[], int]], Awaitable[Any]] | None = None,
) -> Counter[int | str]:
    """Statuses of `requests` requests by `clients` clients; `during` runs beside them and is told how many are done."""
    statuses: Counter[int | str] = Counter()
    left = iter(range(requests))

    async def client(session: aiohttp.ClientSession) -> None:
        for number in left:
            try:
                async with session.post(service.url + path, json=pair(number)) as response:
                    await response.read()
                    statuses[response.status] += 1
            except aiohttp.ClientError as error:
                statuses[repr(error)] += 1

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        work: list[Awaitable[Any]] = [client(session) for _ in range(clients)]
        if during is not None:
            work.append(during(statuses.total))
        await asyncio.gather(*work)
    return statuses


async def stream(service: Service, number: int, names: list[str]) -> None:
    """Put the names of the events of one long stream in `names`."""
    body = pair(number) | LONG | {"stream": True, "seed": number}
    async with aiohttp.ClientSession() as session, session.post(service.url + "/v1/explain", json=body) as response:
        assert response.status == 200
        async for line in response.content:
            names += [line[7:].decode().strip()] if line.startswith(b"event: ") else []


def test_no_request_fails_when_a_generator_is_killed(service: Service) -> None:
    victim = service.replicas("Generator")[0]

    async def kill(done: Callable[[], int]) -> None:
        while done() < 200:
            await asyncio.sleep(0.05)
        victim.kill()

    statuses = asyncio.run(load(service, 1000, 32, during=kill))
    assert statuses == {200: 1000}
    service.wait_for_replicas("Generator", without=victim.pid)


def test_no_request_fails_when_an_ingress_is_killed(service: Service) -> None:
    """The proxy asks the other replica for what this one has not begun to answer."""
    victim = service.replicas("Ingress")[0]

    async def kill(done: Callable[[], int]) -> None:
        while done() < 200:
            await asyncio.sleep(0.05)
        victim.kill()

    statuses = asyncio.run(load(service, 1000, 32, during=kill))
    assert statuses == {200: 1000}
    service.wait_for_replicas("Ingress", without=victim.pid)


def test_a_killed_router_is_waited_for_or_said_to_be_away(service: Service) -> None:
    victim = service.replicas("ClusterRouter")[0]

    async def kill(done: Callable[[], int]) -> None:
        while done() < 20:
            await asyncio.sleep(0.02)
        victim.kill()

    statuses = asyncio.run(load(service, 100, 4, "/v1/route", during=kill))
    assert statuses[200] + statuses[503] == 100, statuses
    service.wait_for_replicas("ClusterRouter", without=victim.pid, count=1)


def test_streams_of_a_killed_generator_end_with_an_error_event(service: Service) -> None:
    async def everything() -> list[list[str]]:
        seen: list[list[str]] = [[] for _ in range(12)]
        tasks = [asyncio.create_task(stream(service, number, names)) for number, names in enumerate(seen)]
        # not all: where the first streams are told late, they have ended by the time that the last ones begin
        while sum("token" in names for names in seen) < 4:
            await asyncio.sleep(0.005)
        assert not any("done" in names for names in seen), "too quick for this test"
        victim = service.replicas("Generator")[0]
        victim.kill()
        await asyncio.gather(*tasks)
        await asyncio.to_thread(service.wait_for_replicas, "Generator", victim.pid)
        return seen

    ends = Counter(names[-1] for names in asyncio.run(everything()))
    assert set(ends) == {"done", "error"}, "some streams were on the other replica, and none ended silently"


def test_a_frozen_generator_is_replaced(service: Service) -> None:
    victim = service.replicas("Generator")[0]
    victim.send_signal(signal.SIGSTOP)
    try:
        service.wait_for_replicas("Generator", without=victim.pid)
    finally:
        if victim.is_running():
            victim.send_signal(signal.SIGCONT)
    assert asyncio.run(load(service, 40, 4)) == {200: 40}


def test_what_is_too_much_is_turned_away_at_once(service: Service) -> None:
    async def flood() -> tuple[Counter[int], set[str | None]]:
        statuses: Counter[int] = Counter()
        hints: set[str | None] = set()

        async def ask(session: aiohttp.ClientSession, number: int) -> None:
            async with session.post(service.url + "/v1/explain", json=pair(number) | LONG) as response:
                await response.read()
                statuses[response.status] += 1
                if response.status == 429:
                    hints.add(response.headers.get("Retry-After"))

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*[ask(session, number) for number in range(300)])
        return statuses, hints

    statuses, hints = asyncio.run(flood())
    assert set(statuses) == {200, 429}
    assert statuses[200] >= 60
    assert hints == {"1"}
    assert asyncio.run(load(service, 10, 2)) == {200: 10}, "and then it answers again"


def test_clients_that_go_away_free_their_rows(service: Service) -> None:
    """The generators have room for 2 x 56 texts: 80 more are admitted only once the first 80 are gone."""

    async def fill(then: Callable[[], Awaitable[None]] | None = None) -> Counter[int]:
        """Statuses of 80 endless streams, whose clients go away when all have begun and `then` is done."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            bodies = [pair(number) | ENDLESS | {"stream": True, "seed": number} for number in range(80)]
            answers = await asyncio.gather(*[session.post(service.url + "/v1/explain", json=body) for body in bodies])
            if then is not None:
                await then()
            for answer in answers:
                answer.close()
        return Counter(answer.status for answer in answers)

    async def too_many() -> None:
        assert (await fill())[429] > 20, "the first 80 fill most of the room"

    assert asyncio.run(fill(too_many)) == {200: 80}
    for _ in range(5):  # written to their end, the texts would take longer than that
        time.sleep(1)
        again = asyncio.run(fill())
        if again == {200: 80}:
            break
    assert again == {200: 80}


def test_hostile_requests_through_the_proxy(service: Service) -> None:
    """A thousand of them, and no replica dies of them."""
    before = [replica.pid for part in ("Ingress", "ClusterRouter", "Generator") for replica in service.replicas(part)]
    with httpx2.Client(base_url=service.url, timeout=30) as http:
        send_bodies(http=http)
        send_bytes(http=http)
        send_queries(http=http)
    after = [replica.pid for part in ("Ingress", "ClusterRouter", "Generator") for replica in service.replicas(part)]
    assert after == before


def test_rolling_update_without_a_failed_request(service: Service, tmp_path: Path) -> None:
    other = tmp_path / "run"
    shutil.copytree(tiny_artifact(), other)
    before = asyncio.run(version(service))

    async def update(done: Callable[[], int]) -> str:
        while done() < 20:
            await asyncio.sleep(0.05)
        process = await asyncio.create_subprocess_exec(
            *command("serve", other, "--replicas", 2, "--update"), env=os.environ | {"RAY_ADDRESS": service.address}
        )
        assert await process.wait() == 0
        return ""

    old = [replica.pid for replica in service.replicas("Generator")]
    assert asyncio.run(load(service, 2500, 8, during=update)) == {200: 2500}
    for pid in old:
        service.wait_for_replicas("Generator", without=pid)
    assert asyncio.run(version(service)) == before, "the same weights have the same version, wherever they lie"


async def version(service: Service) -> str:
    async with aiohttp.ClientSession() as session, session.get(service.url + "/readyz") as response:
        found: dict[str, str] = await response.json()
        assert found["status"] == "ready"
        return found["detail"]


def test_wrong_arguments_are_refused_before_anything_starts(service: Service, tmp_path: Path) -> None:
    def refused(*arguments: Any) -> str:
        done = subprocess.run(command("serve", *arguments), capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    port = service.url.rsplit(":", 1)[1]
    assert "can't listen there" in refused(tiny_artifact(), "--port", port)
    assert "artifact.json is missing" in refused(tmp_path)
    settings = tmp_path / "serve.yaml"
    settings.write_text("generator: {slot: 3}")
    assert "generator.slot: unknown field" in refused(tiny_artifact(), "--settings", settings)


def test_all_in_one_replica_answers_the_same_and_is_replaced(service: Service, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("generator_scaling: {min_replicas: 2, max_replicas: 2, num_cpus: 0.25}\n")

    async def texts(of: Service) -> list[str]:
        async with aiohttp.ClientSession() as session:
            found = []
            for number in range(20):
                async with session.post(of.url + "/v1/explain", json=pair(number)) as response:
                    found.append((await response.json())["text"])
            return found

    with running(tmp_path, "--single") as single:
        assert not single.replicas("Generator")
        assert asyncio.run(texts(single)) == asyncio.run(texts(service))
        assert asyncio.run(load(single, 100, 8)) == {200: 100}
        victim = single.replicas("Ingress")[0]

        async def kill(done: Callable[[], int]) -> None:
            while done() < 20:
                await asyncio.sleep(0.02)
            victim.kill()

        assert asyncio.run(load(single, 300, 8, during=kill)) == {200: 300}
        single.wait_for_replicas("Ingress", without=victim.pid)
