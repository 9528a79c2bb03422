"""The command line: help at once, one clear line and exit code 2 for wrong input, nothing half-written."""

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.chaos_faults import heed_ctrl_c
from helpers.cli import Runner

from gavamoe import __version__
from gavamoe.errors import InputError


def test_help_teaches_without_heavy_imports() -> None:
    code = (
        "import sys; sys.argv = ['gavamoe', '--help']\n"
        "from gavamoe.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'transformers', 'pyarrow', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "heavy: []" in shown
    for command in ("quickstart", "data", "train", "route", "explain", "evaluate", "score", "report"):
        assert command in shown


def test_every_command_has_help(gavamoe: Runner) -> None:
    for command in (["data", "prepare"], ["data", "synthesize"], ["data", "describe"], ["train"], ["explain"]):
        result = gavamoe(*command, "--help")
        assert result.code == 0
        assert "Usage: gavamoe " + " ".join(command) in result.out


def test_version(gavamoe: Runner) -> None:
    assert gavamoe("--version").out == f"gavamoe {__version__}\n"


def test_warnings_of_our_own_are_shown_and_those_of_libraries_are_not() -> None:
    program = (
        "import logging\n"
        "from gavamoe.cli.app import _quiet_libraries\n"
        "_quiet_libraries(debug=False)\n"
        "logging.getLogger('gavamoe.runtime.room').warning('waiting for %s', 'machines')\n"
        "logging.getLogger('library').warning('something else')\n"
        "logging.getLogger('library').error('a loss')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "warning: waiting for machines\nerror: a loss\n")


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.csv"
    path.write_text(
        "user,item,rating,text\n" + "".join(f"u{n % 7},i{n % 5},{1 + n % 5},fine film\n" for n in range(40))
    )
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "prepare", "missing.csv", "OUT", "--format", "table"], "missing.csv: no such file"),
        (["data", "prepare", "REVIEWS", "OUT", "--format", "tabel"], "tabel"),
        (["data", "prepare", "REVIEWS", "OUT", "--format", "table", "--column", "user"], "--column user: expected"),
        (["data", "prepare", "REVIEWS", "OUT", "--format", "table", "--column", "user=usr"], "usr"),
        (["data", "prepare", "REVIEWS", "OUT", "--format", "table", "--split", "8:1"], "--split 8:1: expected"),
        (["data", "prepare", "REVIEWS", "OUT", "--format", "table", "--split", "0:1:1"], "train is above 0"),
        (["data", "prepare", "REVIEWS", "OUT", "--format", "table", "--rating-scale", "5:1"], "--rating-scale 5:1"),
        (["data", "prepare", "REVIEWS", "HERE", "--format", "table"], "already exists"),
        (["data", "prepare", "REVIEWS", "OUT", "--format", "table", "--sentence", "best"], "--text-mode review"),
        (["data", "synthesize", "HERE"], "already exists"),
        (["data", "describe", "missing"], "missing: no such dataset folder"),
        (["train", "nosuch", "--dataset", "DATASET"], "nosuch: no such config file"),
        (["train", "quickstart", "--dataset", "DATASET", "--set", "stage1.cluster=2"], "did you mean clusters?"),
        (["train", "quickstart", "--dataset", "DATASET", "--stage", "3"], "--stage 3: expected 1, 2 or all"),
        (["train", "quickstart", "--dataset", "missing", "--run-dir", "OUT"], "missing: no such dataset folder"),
        (["train", "quickstart", "--dataset", "DATASET", "--stage", "2", "--run-dir", "OUT"], "no stage1 artifact"),
        (["evaluate", "missing"], "missing: not a run folder"),
        (["explain", "missing", "--user", "a", "--item", "b"], "missing: not a run folder"),
        (["route", "missing"], "missing: not a run folder"),
        (["route", "missing", "--user", "a"], "--user and --item go together"),
        (["report", "missing"], "missing"),
        (["score", "missing.txt", "missing.txt"], "missing.txt: no such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    gavamoe: Runner,
    tmp_path: Path,
    tiny_dataset: Path,
    reviews: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "here"
    here.mkdir()
    paths = {"REVIEWS": reviews, "OUT": tmp_path / "out", "HERE": here, "DATASET": tiny_dataset}
    before = sorted(path.name for path in tmp_path.iterdir())
    result = gavamoe(*[paths.get(argument, argument) for argument in arguments])
    assert result.code == 2
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.err
    assert not list(here.iterdir())
    if "--stage" not in arguments:
        assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_usage_error_is_exit_code_2(gavamoe: Runner) -> None:
    assert gavamoe("train").code == 2
    assert gavamoe("nosuch").code == 2


def test_prepare_and_describe_speak_json(gavamoe: Runner, tmp_path: Path, reviews: Path) -> None:
    prepared = gavamoe("data", "prepare", reviews, tmp_path / "out", "--format", "table", "--json")
    assert prepared.code == 0
    assert json.loads(prepared.out)["kept"] == 35
    described = gavamoe("data", "describe", tmp_path / "out", "--json")
    assert json.loads(described.out)["users"] == 7


def test_unexpected_error_is_a_line_and_exit_code_1(gavamoe: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr("gavamoe.data.dataset.open_dataset", broken)
    result = gavamoe("data", "describe", "x")
    assert result.code == 1
    assert "error: ZeroDivisionError: surprise (--debug shows where)" in result.err
    with pytest.raises(ZeroDivisionError):
        gavamoe("--debug", "data", "describe", "x")


@pytest.mark.parametrize("command", [("status",), ("copy", "."), ("serve",)])
def test_names_that_no_file_can_have_are_wrong_input(
    command: tuple[str, ...], gavamoe: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").touch()
    result = gavamoe(*command, tmp_path.parent / ("x" * 300))
    assert (result.code, result.err.count("\n")) == (2, 1), result.err
    assert result.err.endswith(": File name too long\n")


def test_a_full_disk_is_a_line_and_exit_code_1(gavamoe: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x")

    monkeypatch.setattr("gavamoe.cli.status.read_status", full)
    result = gavamoe("status", "x")
    assert (result.code, result.err) == (1, "error: runs/x: No space left on device (--debug shows where)\n")


def test_uris_are_named_as_they_were_given(
    gavamoe: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_dataset: Path
) -> None:
    monkeypatch.setenv("GAVAMOE_CACHE", str(tmp_path / "cache"))
    nothing = f"file://{tmp_path}/nothing"
    for command in (["route", nothing], ["report", nothing], ["plan", "quickstart", "--dataset", nothing]):
        result = gavamoe(*command)
        assert result.code == 2
        assert result.err.startswith(f"error: {nothing}: no dataset or run is stored there"), command
    stored = f"file://{tmp_path}/stored"
    assert gavamoe("copy", tiny_dataset, stored).code == 0
    result = gavamoe("route", stored)  # a dataset, not a run
    assert result.code == 2
    assert stored in result.err
    assert "cache" not in result.err


def test_quickstart_needs_no_option(gavamoe: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Path] = []

    def quickstart(folder: Path, *_: object, **__: object) -> None:
        called.append(folder)
        raise InputError("enough")

    monkeypatch.setattr("gavamoe.pipeline.quickstart", quickstart)
    assert gavamoe("quickstart").err == "error: enough\n"
    assert gavamoe("quickstart", "--run-dir", tmp_path).err == "error: enough\n"
    assert called == [Path("runs/quickstart"), tmp_path]


def test_a_command_that_writes_locally_refuses_a_uri(gavamoe: Runner, tiny_dataset: Path) -> None:
    result = gavamoe("ablate", "quickstart", "--dataset", tiny_dataset, "--run-dir", "s3://bucket/compare")
    assert result.code == 2
    assert result.err.startswith("error: s3://bucket/compare: this command writes to local folders")


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "inter")]
)
def test_signals_end_a_command_in_one_line(
    number: int, code: int, word: str, gavamoe: Runner, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler's SIGTERM ends it as Ctrl-C does: what it was writing is removed."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("gavamoe.data.describe.describe", lambda dataset: signal.raise_signal(number))
    result = gavamoe("data", "describe", tiny_dataset)
    assert (result.code, result.err.count("\n")) == (code, 1), result.err
    assert result.err.startswith(word)
    assert signal.getsignal(signal.SIGTERM) is before


class Doomed:
    """Is sent a signal while its destructor runs, where Python ignores exceptions."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


def test_ctrl_c_that_python_ignores_comes_again(
    gavamoe: Runner, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once met in tune: it came in a callback of fork(), and the search went on."""
    slept = []

    def describe(dataset: object) -> None:
        Doomed(signal.SIGINT)
        time.sleep(20)
        slept.append(20)

    monkeypatch.setattr("gavamoe.data.describe.describe", describe)
    result = gavamoe("data", "describe", tiny_dataset)
    assert (result.code, slept) == (130, [])
    assert result.err.startswith("interrupted")


def test_a_sigterm_that_python_ignores_as_a_command_ends_comes_again_as_what_it_is(tiny_dataset: Path) -> None:
    """Once met in data prepare: it came back as Ctrl-C, behind the command's end, where a scheduler sees exit code -2
    for what it had ended by SIGTERM."""
    program = (
        "import signal, sys, time\n"
        "class Doomed:\n"
        "    def __del__(self):\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "import gavamoe.cli.app, gavamoe.data.describe\n"
        "gavamoe.data.describe.describe = lambda dataset: Doomed() and None or sys.exit(0)\n"
        f"sys.argv = ['gavamoe', 'data', 'describe', {str(tiny_dataset)!r}]\n"
        "from gavamoe.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    time.sleep(20)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")


def test_a_sigterm_that_python_ignores_while_ray_starts_comes_again(
    gavamoe: Runner, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While Ray starts, the handler is Ray's, which raises SystemExit."""
    slept = []

    def describe(dataset: object) -> None:
        ours = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        Doomed(signal.SIGTERM)
        signal.signal(signal.SIGTERM, ours)
        time.sleep(20)
        slept.append(20)

    monkeypatch.setattr("gavamoe.data.describe.describe", describe)
    result = gavamoe("data", "describe", tiny_dataset)
    assert (result.code, slept) == (143, [])
    assert result.err == "terminated\n"


def test_ctrl_c_while_the_command_is_imported_is_one_line() -> None:
    program = (
        "import builtins, sys\n"
        "real = builtins.__import__\n"
        "def load(name, *rest):\n"
        "    if name == 'typer':\n"
        "        raise KeyboardInterrupt\n"
        "    return real(name, *rest)\n"
        "from gavamoe.cli import main\n"
        "builtins.__import__ = load\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_ctrl_c_after_the_end_of_a_command_ends_it_in_silence() -> None:
    """Once met in data prepare: Python's shutdown, which waits for threads, showed a traceback and exited with 0."""
    program = (
        "import sys, threading, time\n"
        "def outlive():\n"
        "    while threading.main_thread().is_alive():\n"
        "        time.sleep(0.01)\n"
        "    print('waiting', flush=True)\n"
        "    time.sleep(60)\n"
        "threading.Thread(target=outlive).start()\n"
        "sys.argv = ['gavamoe', '--version']\n"
        "from gavamoe.cli import main\n"
        "main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == [f"gavamoe {__version__}\n", "waiting\n"]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (-signal.SIGINT, "")


@pytest.mark.parametrize("code", [130, 143])
def test_what_crashes_when_python_ends_does_not_change_how_a_signal_ended_the_command(code: int) -> None:
    """Once met: exit code -11 after "interrupted", of a thread of Ray's."""
    program = (
        "import atexit, ctypes, sys, types\n"
        "def run():\n"
        "    atexit.register(print, 'cleaned up')\n"
        "    libc = ctypes.CDLL(None)\n"
        "    libc.__cxa_atexit(libc.abort, None, None)\n"
        f"    sys.exit({code})\n"
        "app = types.SimpleNamespace(main=run)\n"
        "import gavamoe.cli as cli\n"
        "sys.modules['gavamoe.cli.app'] = cli.app = app\n"
        "print('interrupted', file=sys.stderr)\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (code, "cleaned up\n", "interrupted\n")
