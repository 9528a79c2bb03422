"""For the tests of jobs: a Ray head with its job server on this machine's loopback, token authentication on."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from helpers.ports import free_port

ROOT = Path(__file__).parent.parent.parent


@contextmanager
def ray_head(folder: Path, cpus: int = 2) -> Iterator[dict[str, str]]:
    """Start a head of its own and end it; yields the environment that a client of it needs."""
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": "",  # the job's code is what is uploaded
        # A job runs `python`: this environment's, activated or not.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    # All ports that another Ray on this machine might hold; without the agent's no job is taken.
    port, dashboard, metrics, agent, client = (free_port() for _ in range(5))
    # A socket's path may have 107 characters: Ray's folder can't lie below a test's.
    temporary = Path("/tmp") / f"gm-{secrets.token_hex(3)}"
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address", "127.0.0.1",
        "--port", str(port), "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard),
        "--metrics-export-port", str(metrics), "--num-cpus", str(cpus),
        "--dashboard-agent-listen-port", str(agent), "--ray-client-server-port", str(client),
        "--temp-dir", str(temporary), "--object-store-memory", "200000000",
    ]  # fmt: skip
    with open(folder / "head.log", "wb") as log:
        head = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        _wait_until_up(dashboard, head, folder / "head.log")
        yield environment | {"RAY_API_SERVER_ADDRESS": address, "TEST_METRICS_PORT": str(metrics)}
    finally:
        head.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            head.wait(20)
        _kill_children(temporary)
        subprocess.run(["rm", "-rf", str(temporary)], check=False)


def _kill_children(temporary: Path) -> None:
    """End what the head left, known by its folder on the command line."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        if any(str(temporary) in part for part in process.info["cmdline"] or []):
            process.kill()


def _wait_until_up(port: int, head: "subprocess.Popen[bytes]", log: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if head.poll() is not None:
            break
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the head did not come up: {log.read_text()[-2000:]}")
