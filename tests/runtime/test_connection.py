"""What the environment and options say of Ray is checked at once, in one line that names it."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from helpers.cli import Runner
from helpers.ports import free_port

from gavamoe.artifacts import home, remote
from gavamoe.artifacts.home import home_folder, writable_home
from gavamoe.errors import InputError, RunError
from gavamoe.runtime import connection
from gavamoe.runtime.jobs import Jobs

FORM = "expected HOST:PORT of the cluster's head, such as 10.0.0.5:6379"


class JobServer(BaseHTTPRequestHandler):
    """Answers as the job server of a cluster without jobs does."""

    def do_GET(self) -> None:
        found = {"/api/version": {"ray_version": "2.60.0", "version": "4"}, "/api/jobs/": []}.get(self.path)
        self.send_response(404 if found is None else 200)
        self.end_headers()
        self.wfile.write(json.dumps(found).encode())

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None: ...


@contextmanager
def web_server() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), JobServer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def silent_server() -> Iterator[str]:
    """Takes connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:8265", "that is a dashboard, which takes jobs"),
        ("127.0.0.1", FORM),
        ("ray://head", FORM),
        ("127.0.0.1:99999", "Port out of range"),
        ("[::1", "Invalid IPv6"),
        ("nosuch.invalid:6379", "nothing answers there"),
    ],
)
def test_addresses_of_another_form_are_refused(address: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError) as caught:
        connection.cluster_address()
    assert str(caught.value).startswith(f"RAY_ADDRESS {address}: ")
    assert message in str(caught.value)
    assert FORM in str(caught.value)


def test_a_dead_cluster_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    address, began = f"127.0.0.1:{free_port()}", time.monotonic()
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match=rf"^RAY_ADDRESS {address}: nothing answers there \(Connection refused\); "):
        connection.cluster_address()
    assert time.monotonic() - began < 5


def test_a_web_server_is_no_cluster_and_anything_else_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with web_server() as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(InputError, match=f"^RAY_ADDRESS {address}: a web server answers there"):
            connection.cluster_address()
    with silent_server() as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert connection.cluster_address() == address
    for here in ("", "local"):
        monkeypatch.setenv("RAY_ADDRESS", here)
        assert connection.cluster_address() is None
    monkeypatch.delenv("RAY_ADDRESS")
    assert connection.cluster_address() is None


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "auto", "http://", "http://[", "http://x y"])
def test_job_servers_have_an_http_address(address: str, gavamoe: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    form = "expected the cluster's dashboard, http://HOST:PORT, such as http://127.0.0.1:8265"
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    for arguments in (("jobs", "list"), ("jobs", "logs", "x"), ("jobs", "stop", "x"), ("submit", "stage1")):
        refused = gavamoe(*arguments, "--address", address)
        assert (refused.code, refused.err.count("\n")) == (2, 1), refused.err
        assert refused.err.startswith(f"error: --address {address}: ")
        assert form in refused.err
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
    assert gavamoe("jobs", "list").err.startswith(f"error: RAY_API_SERVER_ADDRESS {address}: ")


def test_the_option_is_above_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own client turns to the variables first, whatever address it is given."""
    with web_server() as address:
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            with monkeypatch.context() as patch:
                patch.setenv("RAY_API_SERVER_ADDRESS", "")
                patch.setenv(name, f"http://127.0.0.1:{free_port()}")
                jobs = Jobs(f"http://{address}")
                assert jobs.list() == []
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            with monkeypatch.context() as patch:
                patch.setenv("RAY_API_SERVER_ADDRESS", "")
                patch.setenv(name, f"http://{address}")
                assert Jobs().address == f"http://{address}"


def test_a_silent_job_server_is_told_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_SECONDS", 0.2)
    with silent_server() as address, pytest.raises(InputError, match=r"no job server answers \(timed out\)"):
        Jobs(f"http://{address}")


@pytest.mark.parametrize(
    ("folder", "problem"), [(f"/tmp/{'a' * 86}", "too long for the sockets"), ("/proc/x", "No such file")]
)
def test_folders_that_ray_can_not_use_are_wrong_input(folder: str, problem: str) -> None:
    """In a process of its own: a start, even one that fails, turns Ray's token on for the process."""
    code = (
        "from gavamoe.errors import InputError\n"
        "from gavamoe.runtime import connection\n"
        "try: connection.start(include_dashboard=False, logging_level='ERROR')\n"
        "except InputError as error: print(error)\n"
    )
    environment = os.environ | {"RAY_TMPDIR": folder, "RAY_AUTH_TOKEN": "0" * 32}
    began = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert began.stdout.startswith(f"RAY_TMPDIR {folder}: {problem}"), began.stderr
    assert "expected a folder that can be written, of 35 characters at most" in began.stdout


def test_the_token_is_for_its_owner_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    token = tmp_path / ".ray" / "auth_token"

    def init(**_: object) -> None:
        token.parent.mkdir()
        token.write_text("secret")
        token.chmod(0o644)

    monkeypatch.setattr("ray.init", init)
    connection.start()
    assert token.stat().st_mode & 0o777 == 0o600


@pytest.fixture
def above(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a short path, in which Ray is to keep its files."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    with tempfile.TemporaryDirectory(prefix="gm", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def folder_of_ray(monkeypatch: pytest.MonkeyPatch) -> Path | None:
    """The folder that a Ray would be started with; None: the one of Ray's own choice."""
    given: dict[str, str] = {}
    monkeypatch.setattr("ray.init", lambda **options: given.update(options))
    connection.start()
    return Path(given["_temp_dir"]) if "_temp_dir" in given else None


@pytest.mark.skipif(sys.platform != "linux", reason="Ray knows TMPDIR on Linux only")
def test_rays_files_lie_where_no_other_user_may_enter(above: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = above / f"gavamoe-{os.getuid()}"
    for _ in range(2):  # made, and then found
        assert folder_of_ray(monkeypatch) == own / "ray"
        assert own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o777)
    open_to_all = folder_of_ray(monkeypatch)
    own.chmod(0o700)
    own.rename(above / "elsewhere")
    own.symlink_to(above / "elsewhere")
    a_link = folder_of_ray(monkeypatch)
    own.unlink()
    own.touch()
    a_file = folder_of_ray(monkeypatch)
    own.unlink()
    own.mkdir(0o700)
    monkeypatch.setattr("os.getuid", lambda: 12345)
    (above / "gavamoe-12345").mkdir(0o700)
    of_another = folder_of_ray(monkeypatch)
    for taken in (open_to_all, a_link, a_file, of_another):
        assert taken is not None
        assert taken.parent.parent == above
        assert taken.parent not in (own, above / "elsewhere", above / "gavamoe-12345")
        assert taken.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(sys.platform != "linux", reason="Ray knows TMPDIR on Linux only")
def test_rays_folder_is_its_own_choice_where_that_was_said_or_none_fits(
    above: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = above / ("x" * 20)
    long.mkdir()
    for name, folder in (("TMPDIR", long), ("TMPDIR", above / "missing"), ("RAY_TMPDIR", above)):
        monkeypatch.setenv(name, str(folder))
        assert folder_of_ray(monkeypatch) is None
    assert list(above.rglob("*")) == [long], "nothing was made"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Ray knows TMPDIR on Linux only")
def test_a_ray_in_a_private_folder_is_found(above: Path) -> None:
    """By its address, and in the list of the machine's Rays, in which `gavamoe serve --update` looks for it."""
    code = (
        "import sys, ray\n"
        "from gavamoe.runtime import connection\n"
        "connection.start(num_cpus=1, include_dashboard=False, logging_level='ERROR', object_store_memory=10**8)\n"
        "print(ray.get_runtime_context().gcs_address, flush=True)\n"
        "sys.stdin.read()\n"
    )
    join = (
        "import sys, ray\n"
        "from ray._private.services import find_gcs_addresses\n"
        "from gavamoe.runtime import connection\n"
        "connection.connect(sys.argv[1])\n"
        "print(ray.nodes()[0]['Alive'], sys.argv[1] in find_gcs_addresses())\n"
    )
    started = [sys.executable, "-c", code]
    with subprocess.Popen(started, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        address = running.stdout.readline().strip()
        environment = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
        joined = subprocess.run(
            [sys.executable, "-c", join, address],
            env=environment | {"RAY_AUTH_MODE": "token"},
            capture_output=True,
            text=True,
            check=False,
        )
        [sockets] = (above / f"gavamoe-{os.getuid()}" / "ray").glob("session_2*/sockets")
        assert len(list(sockets.iterdir())) >= 2
        running.communicate()
    assert joined.stdout.strip() == "True True", joined.stderr


def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a container's user without an entry in passwd."""
    for name in ("HOME", "XDG_CACHE_HOME", "GAVAMOE_CACHE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)

    def missing(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", missing)


def test_without_a_home_the_way_out_is_told(
    gavamoe: Runner, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_home(monkeypatch)
    with pytest.raises(InputError, match="has no home folder: set HOME to a folder that can be written"):
        home_folder()
    with pytest.raises(InputError, match="set HOME to a folder that can be written"):
        connection.start()
    refused = gavamoe("data", "describe", f"file://{tiny_dataset}")
    assert (refused.code, refused.err.count("\n")) == (2, 1), refused.err
    assert "set HOME to a folder that can be written" in refused.err
    assert gavamoe("data", "describe", tiny_dataset).code == 0
    assert remote.with_uris("a message") == "a message"
    monkeypatch.setenv("GAVAMOE_CACHE", str(tmp_path))
    assert home.cache_folder() == tmp_path


def test_a_home_that_can_not_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/proc")
    with pytest.raises(InputError, match=r"^/proc: the home folder can't be written .*: set HOME to a folder"):
        writable_home()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert writable_home() == tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("while_it_starts", [False, True])
def test_a_command_s_own_end_by_sigterm_survives_ray(while_it_starts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray puts its own handler there, which once kept `gavamoe serve` from finishing requests first."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    heard = list[int]()

    def init(**options: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        if while_it_starts:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("ray.init", init)
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with pytest.raises(SystemExit) if while_it_starts else nullcontext():
            connection.start()
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM] * (2 if while_it_starts else 1)


@pytest.mark.parametrize("shut_down", [False, True])
@pytest.mark.parametrize("victim", ["raylet", "agent"])
def test_the_end_of_ray_is_told_in_one_line(shut_down: bool, victim: str) -> None:
    """Once met: one of Ray's agents was killed, and the command ended with 1 and no word. Ray is played here."""
    program = (
        "import os, subprocess, sys, time, types\n"
        "sys.modules['ray'] = ray = types.ModuleType('ray')\n"
        "sys.modules['ray._private'] = private = types.ModuleType('ray._private')\n"
        "private.worker = types.ModuleType('ray._private.worker')\n"
        "script = '(exec -a ray::DashboardAgent sleep 20) & echo $!; wait; sleep 20'\n"
        "process = subprocess.Popen(['bash', '-c', script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)\n"
        "agent = int(process.stdout.readline())\n"
        "raylet = types.SimpleNamespace(process=process)\n"
        "private.worker._global_node = types.SimpleNamespace(all_processes={'raylet': [raylet]})\n"
        f"ray.is_initialized = lambda: {not shut_down}\n"
        "from gavamoe.runtime import connection\n"
        "connection._watch_raylet()\n"
        "time.sleep(0.5)\n"  # until it watches
        f"os.kill({'agent' if victim == 'agent' else 'process.pid'}, 9)\n"
        "time.sleep(2)\n"
        "print('goes on')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    if shut_down:
        assert (done.returncode, done.stdout, done.stderr) == (0, "goes on\n", "")
        return
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert done.stderr.startswith("error: Ray has ended")
    assert "--resume" in done.stderr


def test_a_ray_that_does_not_come_up_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")

    def init(**options: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(RunError, match=r"^Ray does not start \(The current node timed out .*\); run .* --resume"):
        connection.start()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found by their names")
@pytest.mark.parametrize("agent", ["RuntimeEnvAgent", "DashboardAgent"])
def test_ray_ends_with_any_of_its_agents(agent: str) -> None:
    program = (
        "import time\n"
        "from gavamoe.runtime import connection\n"
        "connection.start(num_cpus=1, include_dashboard=False, logging_level='ERROR', object_store_memory=10**8)\n"
        "print('ready', flush=True)\n"
        "time.sleep(120)\n"
    )
    started = [sys.executable, "-c", program]
    with subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        processes = psutil.Process(running.pid).children(recursive=True)
        [victim] = [each for each in processes if f"ray::{agent}" in each.cmdline()[0]]
        victim.kill()
        _, shown = running.communicate(timeout=60)
    assert running.returncode == 1
    assert shown.splitlines()[-1].startswith("error: Ray has ended"), shown
