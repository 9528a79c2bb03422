"""The way to a Ray: to a cluster that the environment names, to a job server, or to one that is started here.

Ray itself tries again for a minute or more where nothing answers, and then says little. What the environment or an
option says is looked at first, and refused in one line that names it and the form that it wants.
"""

import http.client
import os
import re
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gavamoe.artifacts.home import home_folder, writable_home
from gavamoe.errors import InputError, RunError, one_line

ADDRESS = "RAY_ADDRESS"
"""Variable with the address of the cluster, as Ray knows it."""
JOB_SERVER = "RAY_API_SERVER_ADDRESS"
"""Variable with the address of the cluster's dashboard, which has the job server."""
DEFAULT_JOB_SERVER = "http://127.0.0.1:8265"

_SECONDS = 5.0
"""Seconds in which something must answer at an address; a cluster that can be worked with takes far less."""
_SHORTEST_ANSWER = 1.0
"""Seconds in which a server of HTTP would have answered a request."""
_LONGEST_FOLDER = 35
"""Characters of the folder above Ray's: its sockets lie far below it, and their paths may have 107."""
_AGAIN = "run the command again, with --resume where it has that"
_RAY_IS_LOST = f"error: Ray has ended: one of its own processes was killed, perhaps for lack of memory; {_AGAIN}"
_CLUSTER_FORM = "expected HOST:PORT of the cluster's head, such as 10.0.0.5:6379"
_JOB_SERVER_FORM = "expected the cluster's dashboard, http://HOST:PORT, such as " + DEFAULT_JOB_SERVER


def cluster_address() -> str | None:
    """The cluster of RAY_ADDRESS, at which something listens; None where a Ray is to be started here.

    Raises:
        InputError: it has another form, or nothing answers there.
    """
    address = os.environ.get(ADDRESS, "").strip()
    if address in ("", "local"):
        return None
    if address == "auto":
        return address  # Ray looks for one on this machine, and finds none at once
    given = f"{ADDRESS} {address}"
    if address.startswith(("http://", "https://")):
        raise InputError(
            f"{given}: that is a dashboard, which takes jobs (gavamoe submit --address {address}); {_CLUSTER_FORM}"
        )
    host, port = _host_and_port(address.removeprefix("ray://"), given, _CLUSTER_FORM)
    try:
        with socket.create_connection((host, port), _SECONDS) as connection:
            speaks_http = not address.startswith("ray://") and _speaks_http(connection, host)
    except OSError as error:
        raise InputError(
            f"{given}: nothing answers there ({_problem(error)}); {_CLUSTER_FORM}, or unset it to start a Ray here"
        ) from error
    if speaks_http:
        raise InputError(f"{given}: a web server answers there, perhaps the cluster's dashboard; {_CLUSTER_FORM}")
    return address


def job_server(address: str | None) -> str:
    """The job server that an option, a variable or the default names, in this order, and that answers.

    Raises:
        InputError: it has another form, or nothing answers there.
    """
    cluster = os.environ.get(ADDRESS, "")
    if address:
        url, given = address, f"--address {address}"
    elif url := os.environ.get(JOB_SERVER, ""):
        given = f"{JOB_SERVER} {url}"
    elif cluster.startswith("http"):  # as `ray job` takes it
        url, given = cluster, f"{ADDRESS} {cluster}"
    else:
        url, given = DEFAULT_JOB_SERVER, f"--address {DEFAULT_JOB_SERVER} (the default)"
    if not re.match("https?://[^/]", url, flags=re.IGNORECASE):
        raise InputError(f"{given}: {_JOB_SERVER_FORM}")
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/api/version", timeout=_SECONDS):
            return url
    except urllib.error.HTTPError:
        return url  # it answers; a token that it misses is told to the client
    except (OSError, ValueError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        raise InputError(f"{given}: no job server answers ({_problem(cause)}); {_JOB_SERVER_FORM}") from error


def connect(address: str, **options: Any) -> None:
    """Connect this process to a cluster.

    Raises:
        InputError: there is none at the address.
        RunError: it refuses this client, or can't work with it.
    """
    import ray

    try:
        with _sigterm_kept():
            ray.init(address=address, log_to_driver=False, **options)
    except (ConnectionError, ValueError) as error:
        raise InputError(f"{ADDRESS} {address}: no cluster there ({one_line(error)}); {_CLUSTER_FORM}") from error
    except (RuntimeError, ray.exceptions.RayError) as error:
        raise RunError(f"{ADDRESS} {address}: the cluster can't be used ({one_line(error)})") from error


def start(**options: Any) -> None:
    """Start a Ray on this machine, which belongs to this process; its files are for this user alone.

    Raises:
        InputError: Ray can't keep its token or its own files where the environment says.
    """
    home_folder()  # libraries of the workers and replicas look for their caches there
    if os.environ.get("RAY_AUTH_MODE") != "disabled" and not has_token():
        writable_home()  # Ray makes the token there
    import ray

    private = _private_folder()
    if private is not None:
        options["_temp_dir"] = str(private / "ray")  # one below: Ray opens to everyone the folder that it is given
    try:
        with _sigterm_kept():
            ray.init(address="local", log_to_driver=False, **options)
    except OSError as error:
        name = next((each for each in ("RAY_TMPDIR", "TMPDIR") if each in os.environ), None)
        if name is None:
            raise RunError(f"Ray does not start: {_problem(error)}") from error
        too_long = "AF_UNIX path length" in str(error)
        problem = "too long for the sockets that Ray makes below it" if too_long else _problem(error)
        raise InputError(
            f"{name} {os.environ[name]}: {problem}; expected a folder that can be written, of {_LONGEST_FOLDER}"
            " characters at most, such as /tmp"
        ) from error
    except Exception as error:
        if type(error) is not Exception:  # which Ray raises where one of its processes ends too soon, or is late
            raise
        raise RunError(f"Ray does not start ({one_line(error)}); {_AGAIN}") from error
    _watch_raylet()
    # Ray writes its token with the umask's permissions, which often lets everyone on the machine read it.
    with suppress(FileNotFoundError, PermissionError):
        token_file().chmod(0o600)


def _watch_raylet() -> None:
    """Say so in one line, and exit with 1, when the Ray of this process ends without having been shut down.

    Its raylet ends with any of its agents, such as one that the system kills for lack of memory. Without it nothing can
    go on: Ray's C++ then ends this process without a word as soon as it needs an object (exit code 1, with no clean-up
    of Python's), and a search would wait for a worker without end. So the agents, whose end comes first, are watched.
    """
    from ray._private import worker

    processes = getattr(getattr(worker, "_global_node", None), "all_processes", {})
    raylet = next((info.process for info in processes.get("raylet", ())), None)
    if raylet is not None:
        threading.Thread(target=_end_with, args=(raylet,), name="raylet", daemon=True).start()


def _end_with(raylet: "subprocess.Popen[bytes]") -> None:
    import ray

    _wait_for_any([raylet.pid, *_agents(raylet.pid)], raylet)
    if ray.is_initialized():  # it is not during a shutdown
        sys.stderr.flush()
        os.write(2, f"{_RAY_IS_LOST}\n".encode())
        os._exit(1)


def _wait_for_any(pids: Sequence[int], raylet: "subprocess.Popen[bytes]") -> None:
    """Wait until one of some processes ends; of the raylet alone where the system can't tell it of others."""
    handles: list[int] = []
    try:
        poll = select.poll()
        for pid in pids:
            with suppress(OSError):  # gone already, or a kernel without such handles
                handles.append(os.pidfd_open(pid))
                poll.register(handles[-1], select.POLLIN)
        if len(handles) == len(pids):
            poll.poll()
            return
    except AttributeError:  # not on Linux
        pass
    finally:
        for handle in handles:
            os.close(handle)
    raylet.wait()


def _agents(raylet: int) -> list[int]:
    """Processes that Ray's raylet has for itself, on Linux."""
    try:
        children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
        return [int(pid) for pid in children if b"Agent" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]]
    except OSError:
        return []


def _private_folder() -> Path | None:
    """The folder gavamoe-UID, which only this user may enter, in TMPDIR or /tmp; None where Ray's own choice stays.

    Ray gives all users of the machine every right to its folders (mode 0777), with the logs and sockets in them. Its
    own choice stays where RAY_TMPDIR names a folder, and where this one can't be made or its path would be too long.
    """
    if "RAY_TMPDIR" in os.environ:
        return None
    above = Path((os.environ.get("TMPDIR") if sys.platform == "linux" else None) or "/tmp")  # as Ray chooses
    folder = above / f"gavamoe-{os.getuid()}"
    if max(len(str(folder)), len(str(above / "gavamoe-XXXXXXXX"))) > _LONGEST_FOLDER:
        return None
    try:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return folder
        return Path(tempfile.mkdtemp(prefix="gavamoe-", dir=above))  # somebody has taken the name
    except OSError:
        return None


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Keep this process's handler of SIGTERM, in whose place Ray puts one that ends it with exit code 15.

    While Ray starts, its own are there and raise SystemExit: the signal is then handed on to the one that was kept.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    try:
        yield
    except SystemExit:
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def token_file() -> Path:
    """Where Ray keeps the token that guards its own ports.

    Raises:
        InputError: the user has no home folder.
    """
    return home_folder() / ".ray" / "auth_token"


def has_token() -> bool:
    """Whether the environment or a file gives Ray a token.

    Raises:
        InputError: neither the environment does, nor has the user a home folder for the file.
    """
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return True
    return token_file().is_file()


def _problem(error: object) -> str:
    """What was wrong, without the number that the system has for it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error) if isinstance(error, Exception) else str(error)


def _host_and_port(text: str, given: str, form: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError as error:  # a port above 65535, a bracket that is not closed
        raise InputError(f"{given}: {one_line(error)}; {form}") from error
    if not host or port is None or parts.path:
        raise InputError(f"{given}: {form}")
    return host, port


def _speaks_http(connection: socket.socket, host: str) -> bool:
    """Whether a web server answers. Ray's own port, which does not, drops such a connection."""
    connection.settimeout(_SHORTEST_ANSWER)
    try:
        connection.sendall(f"HEAD / HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
        return connection.recv(5) == b"HTTP/"
    except OSError:
        return False
