"""llama.cpp's server beside ours: the same run as GGUF, the same pairs, the same clients as in `benchmarks.serve`.

    gavamoe export RUN OUT --format gguf --gate 0 --dtype q8_0
    python -m benchmarks.llama_server --export OUT [--requests 64] [--new-tokens 24] [--threads 2]

`xllamacpp`, a development dependency, runs the server in this process, on the loopback interface; clients ask its
`/completion` for greedy texts of prompts that the export's own client builds, closed loop at 1, 8, 16 and 32 clients.
Without --export nothing is measured.
"""

import argparse
import asyncio
import importlib.util
import itertools
import json
import random
from pathlib import Path
from typing import Any

import aiohttp
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from benchmarks.serve import CLIENTS, Results, closed_loop, quantiles

_POSITIONS = 256
"""Of a prompt and its text at most."""


def prompts_of(export: Path, count: int) -> list[list[int]]:
    """Prompts of random pairs, as the export's client builds them."""
    described = importlib.util.spec_from_file_location("client", export / "client.py")
    assert described is not None
    assert described.loader is not None
    client = importlib.util.module_from_spec(described)
    described.loader.exec_module(client)
    tokenizer = AutoTokenizer.from_pretrained(export / "tokenizer")
    users, items = (pq.read_table(export / f"{kind}s.parquet")[kind].to_pylist() for kind in ("user", "item"))
    draw = random.Random(2)
    return [client.prompt(tokenizer, draw.choice(users), draw.choice(items)) for _ in range(count)]


def start(model: Path, threads: int) -> Any:
    """A server with as many slots as there are clients at most; it ends with this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.verbosity = str(model), 0
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.n_parallel, params.fit_params = max(CLIENTS), False
    params.n_ctx = params.n_parallel * _POSITIONS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(params)


async def measure(url: str, prompts: list[list[int]], requests: int, new_tokens: int) -> dict[str, Results]:
    """Tokens a second and seconds of an answer at each number of clients."""
    results: dict[str, Results] = {}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        numbers = itertools.count()

        async def ask() -> int:
            options = {"n_predict": new_tokens, "temperature": 0, "cache_prompt": False}
            body = {"prompt": prompts[next(numbers) % len(prompts)], **options}
            async with session.post(f"{url}/completion", json=body) as response:
                answer: dict[str, Any] = await response.json()
                if response.status != 200:
                    raise SystemExit(f"/completion: {response.status} {answer}")
                return int(answer["tokens_predicted"])

        await closed_loop(8, 16, ask)  # warms up
        for clients in CLIENTS:
            count = max(requests // 4, 8) if clients == 1 else max(requests, 4 * clients)
            tokens, seconds, spent = await closed_loop(clients, count, ask)
            results[f"{clients} clients"] = {"tokens/s": sum(tokens) / spent} | quantiles("answer", seconds)
    return results


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--export", type=Path, help="a folder that `gavamoe export --format gguf` has written")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    if asked.export is None:
        print("no --export, so nothing is measured; gavamoe export RUN OUT --format gguf --gate 0 makes one")
        return
    model = asked.export / json.loads((asked.export / "prompt.json").read_text(encoding="utf-8"))["models"][0]
    server = start(model, asked.threads)
    prompts = prompts_of(asked.export, 16 + 2 * max(asked.requests, 4 * max(CLIENTS)))
    results = asyncio.run(measure(server.listening_address, prompts, asked.requests, asked.new_tokens))
    for name, values in results.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))


if __name__ == "__main__":
    main()
