"""The service: its engine against bare `generate()`, and the whole of it over HTTP.

    python -m benchmarks.serve [--run RUN] [--url http://127.0.0.1:8000] [--pid PID] [--proxy] [--rounds 3] [--json]

Engine, in this process: tokens a second of 16 rows at a time, by `generate()` on batches of 16 and by the engine with
16 slots, on the same prompts, in turns; then requests that arrive at random, in batches that wait for each other
(static) and continuously. Over HTTP (a service that `gavamoe serve RUN` has started, named by --url): closed loop at
1, 8, 16 and 32 clients, open loop at shares of the best rate found there, time to the first token, `/v1/route` alone,
and the overhead: what a client waits beyond the engine's own times; with --pid, the process of `gavamoe serve`, the CPU
time of a request by process, this one's as client included. --proxy: the same proxy before a deployment that
answers requests like those of `/v1/route` at once, which is the limit of whatever stands behind it.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import torch

from gavamoe.config.schema import GenerationConfig
from gavamoe.generation.decoding_engine import Engine, Row
from gavamoe.generation.generator import ExplanationGenerator
from gavamoe.generation.prompts import PromptColumns, left_padded
from gavamoe.generation.sampling import Sampling
from gavamoe.model.base_model import special_ids

SLOTS, NEW_TOKENS = 16, 32
CLIENTS = (1, 8, SLOTS, 32)
OPEN_LOOP_S = 20
Results = dict[str, float]
Ask = Callable[[], Awaitable[Any]]


def prompts_of(explainer: ExplanationGenerator, rows: int) -> tuple[list[list[int]], list[int]]:
    """Prompts and clusters of random pairs."""
    draw, catalog = random.Random(0), explainer.catalog
    users = [draw.randrange(catalog.n_users) for _ in range(rows)]
    items = [draw.randrange(catalog.n_items) for _ in range(rows)]
    features = [catalog.usual_features(user, item, 3) for user, item in zip(users, items, strict=True)]
    titles = [catalog.item_title(item) for item in items]
    scale = explainer.spec.scale
    ratings = [None if scale is None else scale.high for _ in range(rows)]
    columns = PromptColumns(users, items, ratings, features, titles)
    return explainer.builder.prompts(columns), [draw.randrange(explainer.model.config.n_gates) for _ in range(rows)]


def by_generate(explainer: ExplanationGenerator, prompts: list[list[int]], clusters: list[int]) -> int:
    """Bare `generate()` on batches of SLOTS rows; returns the tokens written."""
    options = explainer._beam_options(GenerationConfig(max_new_tokens=NEW_TOKENS))
    written = 0
    for start in range(0, len(prompts), SLOTS):
        ids_BT, mask_BT = left_padded(prompts[start : start + SLOTS], options.pad_token_id)
        with torch.inference_mode():
            output = explainer.model.generate(
                torch.from_numpy(ids_BT),
                attention_mask=torch.from_numpy(mask_BT),
                cluster_ids=torch.tensor(clusters[start : start + SLOTS]),
                generation_config=options,
            )
        for row in output[:, ids_BT.shape[1] :].tolist():
            written += row.index(options.eos_token_id) + 1 if options.eos_token_id in row else len(row)
    return written


def new_engine(explainer: ExplanationGenerator) -> Engine:
    """An engine as the service makes it."""
    forbidden = sorted(special_ids(explainer.tokenizer) - {explainer.builder.end})
    return Engine(explainer.model, explainer.builder.end, forbidden, slots=SLOTS, max_waiting=10**6)


def by_engine(explainer: ExplanationGenerator, prompts: list[list[int]], clusters: list[int]) -> int:
    """The engine with all rows waiting; returns the tokens written."""
    engine = new_engine(explainer)
    rows = [Row(prompt, cluster, Sampling(NEW_TOKENS)) for prompt, cluster in zip(prompts, clusters, strict=True)]
    for row in rows:
        engine.submit(row)
    while engine.busy:
        engine.step()
    return sum(len(row.tokens) for row in rows)


def measure_engine(explainer: ExplanationGenerator, rows: int, rounds: int) -> Results:
    """Best rate of each, in turns."""
    prompts, clusters = prompts_of(explainer, rows)
    rates: dict[str, list[float]] = {"generate": [], "engine": []}
    for turn in range(rounds + 1):  # the first warms up
        for name, write in (("generate", by_generate), ("engine", by_engine)):
            started = time.perf_counter()
            tokens = write(explainer, prompts, clusters)
            if turn:
                rates[name].append(tokens / (time.perf_counter() - started))
    found = {f"{name} tokens/s": max(values) for name, values in rates.items()}
    return found | {"engine / generate": found["engine tokens/s"] / found["generate tokens/s"]}


def arrivals(explainer: ExplanationGenerator, count: int, rate: float, continuous: bool) -> Results:
    """Texts of different lengths arrive `rate` times a second; a static batch is made when the last one is done."""
    prompts, clusters = prompts_of(explainer, count)
    draw = random.Random(1)
    due, at = [], 0.0
    for _ in prompts:
        at += draw.expovariate(rate)
        due.append(at)
    lengths = [draw.choice([4, 8, NEW_TOKENS]) for _ in prompts]
    engine = new_engine(explainer)
    # no row may end by itself: both ways write the same tokens
    engine.end, rows = -1, [Row(p, c, Sampling(n)) for p, c, n in zip(prompts, clusters, lengths, strict=True)]
    pending, waiting, done = list(zip(due, rows, strict=True)), [], 0
    started = time.monotonic()
    while done < len(rows):
        now = time.monotonic() - started
        while pending and pending[0][0] <= now:
            when, row = pending.pop(0)
            row.arrived = started + when
            waiting.append(row)
        if waiting and (continuous or not engine.busy):
            for row in waiting[:SLOTS] if not continuous else waiting:
                engine.submit(row)
            waiting = [] if continuous else waiting[SLOTS:]
        if engine.busy:
            done += sum(row.done for row in engine.step())
        else:
            time.sleep(0.0005)
    spent = time.monotonic() - started
    first = [row.first_token - row.arrived for row in rows]
    whole = [row.finished - row.arrived for row in rows]
    return {
        "tokens/s": sum(lengths) / spent,
        "first token p50 ms": 1000 * statistics.median(first),
        "first token p95 ms": 1000 * float(np.quantile(first, 0.95)),
        "whole text p50 ms": 1000 * statistics.median(whole),
        "whole text p95 ms": 1000 * float(np.quantile(whole, 0.95)),
    }


def quantiles(name: str, seconds: list[float]) -> Results:
    """p50, p95 and p99 in milliseconds."""
    return {f"{name} p{q} ms": 1000 * float(np.quantile(seconds, q / 100)) for q in (50, 95, 99)}


class Refused(SystemExit):
    """The service has more under way than it takes: a figure in an open loop, the end of the benchmark elsewhere."""


class Client:
    """Random requests to a service."""

    def __init__(self, session: aiohttp.ClientSession, url: str, users: list[str], items: list[str]) -> None:
        self.session, self.url = session, url
        self._draw, self._users, self._items = random.Random(2), users, items

    def pair(self) -> dict[str, Any]:
        """A random pair."""
        return {"user": self._draw.choice(self._users), "item": self._draw.choice(self._items)}

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """One request; anything but 200 ends the benchmark."""
        async with self.session.post(self.url + path, json=body) as response:
            answer: dict[str, Any] = await response.json()
            if response.status in (429, 503):
                raise Refused(f"{path}: {response.status} {answer}")
            if response.status != 200:
                raise SystemExit(f"{path}: {response.status} {answer}")
            return answer

    async def explain(self, **options: Any) -> dict[str, Any]:
        """One explanation, with what the client waited."""
        started = time.perf_counter()
        answer = await self.post("/v1/explain", self.pair() | options)
        return answer | {"client_ms": 1000 * (time.perf_counter() - started)}

    async def route(self) -> dict[str, Any]:
        """Stage 1 alone."""
        return await self.post("/v1/route", self.pair())

    async def first_token(self, **options: Any) -> float:
        """Seconds to the first token of a stream, which is read to its end."""
        started, first = time.perf_counter(), 0.0
        async with self.session.post(
            f"{self.url}/v1/explain", json=self.pair() | options | {"stream": True}
        ) as response:
            async for line in response.content:
                if line.startswith(b"event: token") and not first:
                    first = time.perf_counter() - started
        return first or time.perf_counter() - started


async def closed_loop(
    clients: int, requests: int, ask: Callable[[], Awaitable[Any]]
) -> tuple[list[Any], list[float], float]:
    """`clients` that each ask again as soon as they are answered; answers, seconds of each, seconds of all."""
    left, answers, seconds = iter(range(requests)), [], []

    async def one() -> None:
        for _ in left:
            started = time.perf_counter()
            answers.append(await ask())
            seconds.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*[one() for _ in range(clients)])
    return answers, seconds, time.perf_counter() - started


async def open_loop(client: Client, rate: float, requests: int, options: dict[str, Any]) -> Results:
    """Requests that arrive at random, `rate` a second, whether or not others have been answered."""

    async def one() -> float | None:
        started = time.perf_counter()
        try:
            await client.explain(**options)
        except Refused:
            return None
        return time.perf_counter() - started

    tasks, draw = [], random.Random(3)
    started, at = time.perf_counter(), 0.0
    for _ in range(requests):
        at += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
        tasks.append(asyncio.create_task(one()))
    seconds = [answered for answered in await asyncio.gather(*tasks) if answered is not None]
    found = {"offered requests/s": rate, "refused": 1 - len(seconds) / requests}
    return found | (quantiles("answer", seconds) if seconds else {})


async def measure_path(url: str, requests: int) -> dict[str, Results]:
    """POST of a body like that of `/v1/route` to one address, closed loop."""
    results: dict[str, Results] = {}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask() -> None:
            async with session.post(url, json={"user": "U000017", "item": "I000042"}) as response:
                await response.read()

        await closed_loop(8, 100, ask)  # warms up
        for clients in (1, 32):
            _, seconds, spent = await closed_loop(clients, requests, ask)
            results[f"proxy, {clients} clients"] = {"requests/s": requests / spent} | quantiles("answer", seconds)
    return results


def measure_proxy(requests: int) -> dict[str, Results]:
    """Serve's proxy, set up as `gavamoe serve` does, before a deployment that does nothing."""
    from gavamoe.runtime.ray_train import free_port
    from gavamoe.serving.launch import prepared_environment

    with prepared_environment():
        return _measure_proxy(free_port(), requests)


def _measure_proxy(port: int, requests: int) -> dict[str, Results]:
    import ray
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import Response

    @serve.deployment(max_ongoing_requests=256)
    class Empty:
        async def __call__(self, request: Request) -> Response:
            await request.body()
            return Response("{}")

    ray.init(address="local", include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        serve.run(Empty.bind())
        return asyncio.run(measure_path(f"http://127.0.0.1:{port}/", requests))
    finally:
        serve.shutdown()
        ray.shutdown()


def cpu_by_process(pid: int) -> dict[str, float]:
    """CPU seconds so far of a service's processes, of `gavamoe serve` down, by what they are; and of this one."""
    spent: dict[str, float] = {"client": sum(psutil.Process().cpu_times()[:2])}
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline())
            replica = re.search(r"ServeReplica:gavamoe:(\w+)", command)
            kind = replica[1] if replica else "HAProxy" if process.name() == "haproxy" else "rest of Ray"
            spent[kind] = spent.get(kind, 0.0) + sum(process.cpu_times()[:2])
    return spent


async def measure_http(url: str, requests: int, options: dict[str, Any], pid: int | None) -> dict[str, Results]:
    """All HTTP measurements; with the process of the service also where the CPU time of a request goes."""
    results: dict[str, Results] = {}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        listed = [await (await session.get(f"{url}/v1/{kind}?limit=100")).json() for kind in ("users", "items")]
        users, items = ([entry["id"] for entry in found["results"]] for found in listed)
        client = Client(session, url, users, items)
        await closed_loop(8, 16, lambda: client.explain(**options))  # warms up
        best = 0.0
        for clients in CLIENTS:
            count = requests // 4 if clients == 1 else max(requests, clients)
            before = cpu_by_process(pid) if pid else {}
            answers, seconds, spent = await closed_loop(clients, count, lambda: client.explain(**options))
            after = cpu_by_process(pid) if pid else {}
            engine = [sum(a["timings_ms"][part] for part in ("route", "queue", "prefill", "decode")) for a in answers]
            overhead = [a["client_ms"] - ms for a, ms in zip(answers, engine, strict=True)]
            best = max(best, count / spent)
            results[f"explain, {clients} clients"] = {
                "requests/s": count / spent,
                "tokens/s": sum(a["new_tokens"] for a in answers) / spent,
                "overhead p50 ms": statistics.median(overhead),
                **{f"CPU ms of {kind}": 1000 * (after[kind] - before.get(kind, 0.0)) / count for kind in sorted(after)},
            } | quantiles("answer", seconds)
            firsts, _, _ = await closed_loop(clients, count // 2, lambda: client.first_token(**options))
            results[f"stream, {clients} clients"] = quantiles("first token", firsts)
        for share in (0.25, 0.5, 0.8):
            count = min(requests, round(OPEN_LOOP_S * share * best))
            results[f"explain, open loop at {share:.0%}"] = await open_loop(client, share * best, count, options)
        for clients in (1, 32):
            _, seconds, spent = await closed_loop(
                clients, requests * 2, lambda: client.post("/v1/route", client.pair())
            )
            results[f"route, {clients} clients"] = {"requests/s": len(seconds) / spent} | quantiles("answer", seconds)
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--url", help="of a running service; without it, HTTP is not measured")
    parser.add_argument("--pid", type=int, help="of `gavamoe serve`: also CPU time a request, by process")
    parser.add_argument("--proxy", action="store_true", help="also Serve's proxy alone; starts a Ray of its own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=96, help="of the engine's measurements")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--new-tokens", type=int, help="of each request over HTTP; default: as the run is configured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Results] = {}
    if (arguments.run / "stage2").is_dir():
        explainer = ExplanationGenerator.load(arguments.run / "stage2")
        results["engine, 16 rows"] = measure_engine(explainer, arguments.rows, arguments.rounds)
        rate = results["engine, 16 rows"]["engine tokens/s"] / 20
        for name, continuous in (("static batches", False), ("continuous batching", True)):
            results[f"{name}, {rate:.1f} arrivals/s"] = arrivals(explainer, arguments.rows, rate, continuous)
    else:
        print(f"{arguments.run}: no run there, so the engine is not measured; `make quickstart` makes one")
    if arguments.url:
        options = {"max_new_tokens": arguments.new_tokens} if arguments.new_tokens else {}
        results |= asyncio.run(measure_http(arguments.url.rstrip("/"), arguments.requests, options, arguments.pid))
        bare, served = results.get("engine, 16 rows"), results[f"explain, {SLOTS} clients"]
        if bare:
            served["of generate()"] = served["tokens/s"] / bare["generate tokens/s"]
    if arguments.proxy:
        limits = measure_proxy(2 * arguments.requests)
        for name, limit in limits.items():
            route = results.get(name.replace("proxy", "route"))
            if route:
                route["of the proxy's limit"] = route["requests/s"] / limit["requests/s"]
        results |= limits
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    for name, values in results.items():
        print(name + ": " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))


if __name__ == "__main__":
    main()
