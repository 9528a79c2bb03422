"""`gavamoe serve`: the service on this machine, and a new run into a service that is up."""

import errno
import io
import ipaddress
import logging
import math
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from gavamoe.config.yaml_reader import read_yaml
from gavamoe.errors import InputError, RunError, one_line, validated
from gavamoe.generation.authorship import SingleAuthors
from gavamoe.runtime import connection
from gavamoe.runtime.ray_train import free_port
from gavamoe.serving import proxy
from gavamoe.serving.keys import KEYS_VARIABLE, ApiKeys, warnings_about
from gavamoe.serving.routing import RoutingService
from gavamoe.serving.settings import ServeArgs
from gavamoe.serving.writing import generation_defaults

APP_NAME = "gavamoe"
METRICS_PORT = 8001
"""The port of Prometheus' metrics where none is asked for and this one is free."""
_ADMIN_SOCKET = "RAY_SERVE_HAPROXY_SOCKET_PATH"
_MARGIN_S = 5.0
"""Seconds after which Ray ends a request that the service itself should have ended at its own limit."""


def read_args(
    run: Path, settings: Path | None, changes: dict[str, Any], base: dict[str, Any] | None = None
) -> ServeArgs:
    """Arguments for `run`: those of `base`, what a YAML file says on top, if one is given, then `changes`.

    Raises:
        InputError: a wrong field or value, or a run that can't be served.
    """
    given: Any = {} if settings is None else (read_yaml(settings) or {})
    if not isinstance(given, dict):
        raise InputError(f"{settings}: expected the arguments of the app builder, such as limits and generator")
    values = _on_top(_on_top(base or {}, given), changes)
    args = validated(ServeArgs, values | {"run": str(Path(run).absolute())}, settings or "serve", "usable settings")
    check_args(args)
    return args


def _on_top(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Settings of two sources: within a section, only the fields that are named change."""
    merged = dict(below)
    for name, value in above.items():
        under = merged.get(name)
        if isinstance(value, dict) and isinstance(under, dict):
            merged[name] = under | value
        elif not isinstance(value, dict) or under is None:
            merged[name] = value
        # else a section lies under it that is none: left as it is, for the check of the whole to refuse it
    return merged


def check_args(args: ServeArgs) -> None:
    """Refuse here what would only fail in the replicas, where Ray Serve tries again and again."""
    generation_defaults(args.artifact)
    RoutingService.load(args.artifact)
    if args.withhold.single_author:
        SingleAuthors.load(args.artifact)
    ApiKeys.read(args)


def check_openness(args: ServeArgs, host: str) -> None:
    """Refuse a service that others can reach and everyone may use, unless that was said.

    Raises:
        InputError: no API keys, and `host` is not this machine's own.
    """
    if not args.no_api_keys and not _is_loopback(host) and not ApiKeys.read(args).required:
        raise InputError(
            f"--host {host}: other machines reach that, and no API key is set, so that everyone could ask; give keys by"
            f" --api-keys FILE or {KEYS_VARIABLE}, or say --no-api-keys"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run_service(args: ServeArgs, *, host: str, port: int, metrics_port: int | None, say: Callable[[str], None]) -> None:
    """Start Ray and the service, and stay until Ctrl-C, which is raised again when the requests in progress are done.

    Args:
        metrics_port: None: `METRICS_PORT`, or a free one where another service of the machine has that.

    Raises:
        InputError: a port that was asked for is taken; others could use it without an API key.
        RunError: the service did not come up.
    """
    check_openness(args, host)
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
    for warning in warnings_about(args):
        say(f"warning: {warning}")
    with prepared_environment():
        _run_service(args, host, port, metrics_port, say)


def _run_service(args: ServeArgs, host: str, port: int, metrics_port: int, say: Callable[[str], None]) -> None:
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)

    connection.start(
        num_cpus=max(os.cpu_count() or 1, math.ceil(2 * args.reserved_cpus)),  # 2: an update starts beside the old
        include_dashboard=False,
        logging_level="ERROR",
        _metrics_export_port=metrics_port,
    )
    try:
        # Until an ingress replica is up, requests wait in a proxy of Ray's, which by itself waits as long as it takes.
        deadline = args.limits.request_timeout_s + _MARGIN_S
        options = {"host": host, "port": port, "request_timeout_s": deadline}
        serve.start(proxy_location="HeadOnly", http_options=options)
        _deploy(args)
        address = ray.get_runtime_context().gcs_address
        say(f"serving {args.run} at http://{host}:{port}/  (documentation: /docs)")
        say(f"a new run: RAY_ADDRESS={address} gavamoe serve RUN --update   metrics: http://127.0.0.1:{metrics_port}/")
        threading.Event().wait()
    except KeyboardInterrupt:
        say("stopping: requests in progress are finished first")
        if admin := os.environ.get(_ADMIN_SOCKET):  # Ray's shutdown ends the proxy at once, with all its connections
            proxy.drain(Path(admin), args.limits.request_timeout_s)
        raise
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave half of Ray behind
        with redirect_stdout(io.StringIO()):  # Ray reports that its controller ended, as if that had failed
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
    found = _usable_haproxy()
    with tempfile.TemporaryDirectory(prefix="gavamoe-", dir="/tmp" if found else None) as folder:
        settings = _BASE | (_haproxy(Path(folder), found) if found else _NO_HAPROXY)
        for name, value in settings.items():
            os.environ.setdefault(name, value)
        yield


_BASE = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # A busy machine needs longer than Ray's 5 s to start a proxy, which is then started over and over.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    # Around what Ray Serve answers by itself.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "gavamoe.serving.proxy.middlewares",
}
_NO_HAPROXY = {"RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}
"""Without a proxy in front of them, replicas must not listen for clients themselves."""


def _usable_haproxy() -> str | None:
    """The HAProxy that is to be used, if there is one and it is wanted."""
    return None if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "0" else proxy.binary()


def _haproxy(folder: Path, binary: str) -> dict[str, str]:
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(proxy.write_launcher(folder, binary)),
        "RAY_SERVE_HAPROXY_LOG_TARGET": proxy.LOG_TARGET,
        # A client that is silent for as long loses its connection; Ray's default is an hour.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
        # A request whose ingress replica died before it answered goes to another one: asking twice gives the same
        # text, and nothing is stored.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        # What an ingress replica waits after it was taken out of the proxy's list, even with nothing to do.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        _ADMIN_SOCKET: str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        # Ray's defaults are fixed ports: a second service on the machine would not start.
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
    }


def update_service(run: Path, settings: Path | None, changes: dict[str, Any], *, say: Callable[[str], None]) -> None:
    """Put another run into the service at RAY_ADDRESS (or the only one of this machine), without a failed request.

    All else stays as the service was told when it started, but for what `settings` and `changes` name.

    Raises:
        InputError: no cluster there, wrong settings, or settings that would take the API keys off.
        RunError: no service there, or the new run did not come up; the old one then goes on.
    """
    read_args(run, settings, changes)  # what is wrong by itself is told before anything is connected to
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
        args = updated_args(_running_settings(), run, settings, changes)
        _deploy(args)
        say(f"now serving {args.run}")
    finally:
        ray.shutdown()


def updated_args(running: dict[str, Any], run: Path, settings: Path | None, changes: dict[str, Any]) -> ServeArgs:
    """The arguments of a running service (`Ingress.settings`), with another run and what is named.

    Raises:
        InputError: as `read_args`, requests would have more time, which Ray fixes when the service starts, or the
            service would need no API key any more without that having been said.
    """
    base = dict(running["args"])
    if changes.get("no_api_keys"):
        base |= {"api_keys_file": None, "api_key_hashes": ()}
    elif changes.get("api_keys_file") is not None:
        base["no_api_keys"] = False
    args = read_args(run, settings, changes, base)

    longest = float(base["limits"]["request_timeout_s"])
    if args.limits.request_timeout_s > longest:
        raise InputError(
            f"{settings}: limits.request_timeout_s {args.limits.request_timeout_s:g}: a running service can't be given"
            f" more than its {longest:g} s; stop it and start it again"
        )

    def needs_key(hashes: object, file: object, none: bool) -> bool:
        return not none and bool(hashes or file or running["environment_keys"])

    before = needs_key(base["api_key_hashes"], base["api_keys_file"], base["no_api_keys"])
    if before and not needs_key(args.api_key_hashes, args.api_keys_file, args.no_api_keys):
        raise InputError(f"{settings}: takes the API keys off a service that asks for them; only --no-api-keys does")
    return args


def _running_settings() -> dict[str, Any]:
    """What the running service was told.

    Raises:
        RunError: it does not say.
    """
    from ray import serve

    try:
        found: dict[str, Any] = serve.get_app_handle(APP_NAME).settings.remote().result(timeout_s=30)
    except Exception as error:
        raise RunError(
            f"the running service does not tell its settings ({one_line(error)}), so that an update could change more"
            " than the run; if an older version started it, stop it and start it again"
        ) from error
    return found


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
