"""For the chaos run: `gavamoe serve` under load, whose processes are killed, and what its clients see."""

import json
import os
import random
import re
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from .chaos_faults import heed_ctrl_c
from .chaos_work import Base, first_difference
from .cli import command
from .ports import free_port

DEADLINE = 60.0
"""Seconds after which a request, retries included, counts as lost while the service stays up."""
AWAY = 240.0
"""The same while the service itself is started again."""
CLIENTS = 3
PARTS = {"Generator": 2, "Ingress": 2, "ClusterRouter": 1}
"""Replicas of each deployment."""
PROXY = "proxy"
OF_SERVICE = ("SIGKILL to Generator", "SIGKILL to Ingress", "SIGKILL to ClusterRouter", f"SIGKILL to {PROXY}")
OF_COMMAND = ("SIGTERM", "SIGINT", "SIGKILL")
"""The service itself is ended, and started again."""
SETTINGS = """\
generator: {slots: 8, max_waiting: 40}
generator_scaling: {min_replicas: 2, max_replicas: 2, num_cpus: 0.5}
ingress_scaling: {min_replicas: 2, max_replicas: 2, num_cpus: 0.25}
limits: {request_timeout_s: 30, max_in_flight: 60}
"""
RETRIED = (429, 502, 503, 504)
ENDS_WITH = {signal.SIGTERM: 143, signal.SIGINT: 130}
"""Exit codes of the command by the signal that ended it."""
_OF_A_REQUEST = ("request_id", "timings_ms")
_ROUNDING = 1e-5
"""By which numbers may differ: those who are routed together share one product, and float32 sums depend on its size."""


def requests() -> list[tuple[str, dict[str, Any]]]:
    """What clients ask, over and over: paths and bodies."""
    pairs = [{"user": f"U{n:06}", "item": f"I{(7 * n) % 40:06}"} for n in range(8)]
    asked: list[tuple[str, dict[str, Any]]] = [("/v1/explain", pair | {"temperature": 0.0}) for pair in pairs]
    asked += [("/v1/route", pair) for pair in pairs]
    return asked + [("/v1/recommend", {"user": pair["user"], "k": 3}) for pair in pairs[:4]]


def comparable(answer: Any) -> Any:
    """An answer without what belongs to the one request."""
    if isinstance(answer, dict):
        return {name: comparable(value) for name, value in answer.items() if name not in _OF_A_REQUEST}
    if isinstance(answer, list):
        return [comparable(value) for value in answer]
    return answer


class Clients:
    """Threads that ask without a pause, and keep what came of each request."""

    def __init__(self, url: str) -> None:
        self.url, self.expected = url, dict[int, Any]()
        self.counts: Counter[str] = Counter()
        """Answers by status; `broken`: connections that broke, which were tried again."""
        self.problems: list[str] = []
        self.slowest = 0.0
        self.patience = DEADLINE
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(n,), daemon=True) for n in range(CLIENTS)]

    def learn(self) -> None:
        """Ask everything once: the answers that must always come. Then begin with the load."""
        for number, (path, body) in enumerate(requests()):
            self.expected[number] = self._ask(path, body, time.monotonic() + 120)
        for thread in self._threads:
            thread.start()

    def told(self) -> list[str]:
        """What was wrong since the last call."""
        told, self.problems = self.problems, []
        return told

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(AWAY + 60)
            if thread.is_alive():
                self.problems.append("a client still waits for an answer: the service hangs")

    def _work(self, client: int) -> None:
        draw, asked = random.Random(client), requests()
        while not self._stop.is_set():
            number = draw.randrange(len(asked))
            began = time.monotonic()
            answer = self._ask(*asked[number], None)
            if answer is None:
                continue
            self.slowest = max(self.slowest, time.monotonic() - began)
            if difference := first_difference(self.expected[number], answer, rounding=_ROUNDING):
                self.problems.append(f"{asked[number]}: {difference}")

    def _ask(self, path: str, body: dict[str, Any], end: float | None) -> Any:
        """The answer without what belongs to the one request; None where the load ended first, or it was lost."""
        began = time.monotonic()
        while time.monotonic() < (end or began + self.patience):
            status, answer = self._once(path, body)
            self.counts[str(status)] += 1
            if status == 200:
                return comparable(answer)
            if status not in (*RETRIED, "broken"):
                self.problems.append(f"{path} {body}: {status} {answer}")
                return None
            if self._stop.is_set():
                return None
            time.sleep(0.2)
        self.problems.append(f"{path} {body}: no answer within {time.monotonic() - began:.0f} s")
        return None

    def _once(self, path: str, body: dict[str, Any]) -> tuple[int | str, Any]:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            with suppress(OSError, ValueError):
                return error.code, json.loads(error.read())["error"]
            return f"{error.code} that is no JSON error", None
        except TimeoutError:
            return f"hangs for {DEADLINE:.0f} s", None
        except (OSError, ValueError) as error:
            if isinstance(error, json.JSONDecodeError):
                return "200 with a body that is no JSON", None
            return "broken", str(error)


class Service:
    """`gavamoe serve` of one run, started again whenever it was ended."""

    def __init__(self, base: Base, run: Path, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.base, self.run, self.log = base, run, folder / "log"
        self.settings = folder / "serve.yaml"
        self.settings.write_text(SETTINGS)
        self.port, self.metrics_port = free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, and wait until it answers."""
        ports = ("--port", self.port, "--metrics-port", self.metrics_port)
        for _ in range(3):  # a port that the killed one still holds is told by exit code 2
            with self.log.open("wb") as out:
                self.process = subprocess.Popen(
                    command("serve", self.run, *ports, "--settings", self.settings),
                    env=self.base.environment, stdout=out, stderr=out, start_new_session=True,
                    preexec_fn=heed_ctrl_c,
                )  # fmt: skip
            end = time.monotonic() + AWAY
            while time.monotonic() < end and self.process.poll() is None:
                if "serving " in self.log.read_text(errors="replace"):
                    return
                time.sleep(0.2)
            time.sleep(5)
        raise RuntimeError(f"the service does not start: {self.log.read_text(errors='replace')[-2000:]}")

    def processes(self, part: str) -> list[psutil.Process]:
        """Its processes of a deployment, or its proxies."""
        assert self.process is not None
        wanted = "haproxy|ray::.*Proxy" if part == PROXY else f"ServeReplica:gavamoe:{part}"
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if re.search(wanted, " ".join(process.cmdline())) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return sorted(found, key=lambda each: each.pid)

    def recovered(self, part: str, victim: int) -> str | None:
        """Wait until all replicas are there without the victim; what is missing otherwise."""
        end = time.monotonic() + AWAY
        while time.monotonic() < end:
            pids = [process.pid for process in self.processes(part)]
            if victim not in pids and len(pids) >= PARTS.get(part, 1):
                return None
            time.sleep(0.5)
        return f"{part}: processes {pids} after {AWAY:.0f} s"

    def end(self, number: int) -> list[str]:
        """Send a signal to the command and wait for its end; what was wrong with it."""
        assert self.process is not None
        left = psutil.Process(self.process.pid).children(recursive=True)
        os.kill(self.process.pid, number)
        problems = []
        try:
            code = self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
            problems.append(f"serve: does not end by signal {number}")
        shown = self.log.read_text(errors="replace")
        if number != signal.SIGKILL and (code != ENDS_WITH[number] or "Traceback" in shown):
            problems.append(f"serve: signal {number} ends it with {code}: {shown[-300:]}")
        _, alive = psutil.wait_procs(left, 120)  # two of Ray's agents take 62 s to see that theirs is gone
        for process in alive:
            with suppress(psutil.Error):
                problems.append(f"serve: {process.name()} lives on after signal {number}")
                process.kill()
        return problems


def strike(service: Service, clients: Clients, fault: str, draw: random.Random) -> list[str]:
    """Bring a fault on the service after a drawn number of answers; returns what went wrong."""
    wanted = clients.counts["200"] + draw.randrange(5, 100)
    end = time.monotonic() + 120
    while clients.counts["200"] < wanted:
        if time.monotonic() > end:
            return [f"{fault}: the service did not answer {wanted} requests before it"]
        time.sleep(0.01)
    if fault in OF_COMMAND:
        clients.patience = AWAY + DEADLINE
        problems = service.end(getattr(signal, fault))
        service.start()
    else:
        part = fault.removeprefix("SIGKILL to ")
        found = service.processes(part)
        if not found:
            return [f"{fault}: no such process"]
        victim = draw.choice(found)
        victim.kill()
        missing = service.recovered(part, victim.pid)
        problems = [] if missing is None else [f"{fault}: {missing}"]
    after, end = clients.counts["200"] + 10, time.monotonic() + AWAY
    while clients.counts["200"] < after and time.monotonic() < end:
        time.sleep(0.05)
    if clients.counts["200"] < after:
        problems.append(f"{fault}: the service does not answer again")
    clients.patience = DEADLINE
    return problems
