"""For the tests of serving: a tiny artifact, trained once a session, and a client of the interface in one process."""

import functools
import json
import threading
import time
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.testclient import TestClient

from gavamoe.data.synthetic.generator import synthesize
from gavamoe.generation.generator import ExplanationGenerator
from gavamoe.runtime.context import LocalContext
from gavamoe.serving.api import create_api
from gavamoe.serving.backend import LocalBackend
from gavamoe.serving.settings import ServeArgs
from gavamoe.stage1.train import train_stage1
from gavamoe.stage2.train import train_stage2
from helpers.scratch import scratch_folder
from helpers.tiny import tiny

PAIR = {"user": "U000001", "item": "I000001"}


@functools.cache
def tiny_artifact() -> Path:
    """A stage-2 folder of 60 users and 40 items, K = 3."""
    work = scratch_folder("gavamoe-serve-")
    synthesize(work / "data", users=60, items=40, ratings=1500, groups=3, seed=0)
    config = tiny("stage2.max_steps=150", "stage2.evaluate_every=0", "stage2.checkpoint_every=0")
    train_stage1(config, work / "data", work / "stage1", LocalContext())
    train_stage2(config, work / "data", work / "stage1", work / "stage2", LocalContext())
    return work / "stage2"


def exact_explainer(folder: Path) -> ExplanationGenerator:
    """The artifact in float64, with experts that say something: texts are long, differ by cluster, and have no ties."""
    loaded = ExplanationGenerator.load(folder)
    with torch.no_grad():
        for layer in loaded.model.model.layers:
            torch.nn.init.normal_(layer.mlp.experts.down_proj, std=0.3, generator=torch.Generator().manual_seed(0))
    loaded.model.double().set_experts_implementation("eager")
    return loaded


def client(backend: Any, **values: Any) -> TestClient:
    """A client of the HTTP interface over `backend`; `values` are arguments of the server."""
    args = ServeArgs(run="unused", **values)
    return TestClient(create_api(backend, args), raise_server_exceptions=False)


class Site:
    """The service over a real connection: on a free port of 127.0.0.1, in a thread of this process."""

    def __init__(self, folder: Path | None = None, **values: Any) -> None:
        """`folder` is a stage-2 artifact, by default `tiny_artifact`; `values` are arguments of the server."""
        args = ServeArgs(run=str(folder or tiny_artifact()), **values)
        self.backend = LocalBackend.load(args)
        config = uvicorn.Config(create_api(self.backend, args), host="127.0.0.1", port=0, log_level="error")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.05)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def close(self) -> None:
        """Stop."""
        self._server.should_exit = True
        self._thread.join(timeout=20)
        self.backend.writer.engine.close()


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and data of each server-sent event."""
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found
