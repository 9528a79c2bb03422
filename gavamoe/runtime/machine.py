"""`gavamoe doctor`: is this machine ready? What it has, what is wrong, and the way out.

Each check looks at one thing and never raises: what it can't find out it says. Nothing is started, trained or
downloaded; the hub is asked for a model's description alone.
"""

import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from gavamoe.errors import InputError, one_line

State = Literal["ok", "warning", "wrong"]
_GIB = 2**30
_LEAST_DISK, _LEAST_MEMORY, _LEAST_SHARED = 10 * _GIB, 4 * _GIB, _GIB
_PORTS = {8000: "gavamoe serve --port", 8265: "Ray's dashboard: ray start --dashboard-port"}
_SECONDS = 3.0
"""How long another machine may take to answer."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    what: str
    state: State
    found: str
    way_out: str = ""
    """What to do about it; empty where nothing is wrong."""


def examine(base_model: str, folder: Path) -> list[Finding]:
    """All findings on this machine.

    Args:
        base_model: the one that is to be reached, as `stage2.base_model` names it.
        folder: where runs are to be written.
    """
    found: list[Finding] = []
    for check in (_packages, _processor, _gpus, _compiler, _ray, _ports, lambda: _disks(folder)):
        try:
            found += check()
        except Exception as error:  # noqa: BLE001 - what a library says of a broken driver is a finding as well
            name = getattr(check, "__name__", "check").strip("_<>")
            found.append(Finding(name, "wrong", one_line(error), "the check itself failed; see the message"))
    return [*found, _base_model(base_model)]


def _packages() -> Iterator[Finding]:
    """Python and what gavamoe requires, against the ranges of its own metadata."""
    from packaging.requirements import Requirement

    version = platform.python_version()
    yield Finding("Python", "ok", f"{version}, {sys.executable}")
    wrong, shown = [], []
    for line in metadata.requires("gavamoe") or []:
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            have = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is missing")
            continue
        if need.name in ("torch", "transformers", "ray", "deepspeed"):
            shown.append(f"{need.name} {have}")
        if not need.specifier.contains(have, prereleases=True):
            wrong.append(f"{need.name} {have} is not {need.specifier}")
    way_out = "pip install --upgrade gavamoe" if wrong else ""
    yield Finding("packages", "wrong" if wrong else "ok", "; ".join([*wrong, ", ".join(shown)]), way_out)


def _processor() -> Iterator[Finding]:
    import psutil
    import torch

    cores, usable = os.cpu_count() or 1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    extras = [
        name
        for name, has in (
            ("AVX512", torch.cpu._is_avx512_supported()),
            ("VNNI", torch.cpu._is_vnni_supported()),
            ("bfloat16", torch.cpu._is_avx512_bf16_supported()),
            ("AMX", torch.cpu._is_amx_tile_supported()),
        )
        if has
    ]
    of = f" ({usable} of them for this process)" if usable and usable != cores else ""
    yield Finding("processor", "ok", f"{platform.machine()}, {cores} cores{of}; {', '.join(extras) or 'no AVX512'}")
    memory = psutil.virtual_memory()
    low = memory.available < _LEAST_MEMORY
    yield Finding(
        "memory",
        "warning" if low else "ok",
        f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free",
        "training SmolLM2 takes 5 GiB, the quickstart 3; end other programs" if low else "",
    )


def _gpus() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            one = torch.cuda.get_device_properties(number)
            old = one.major < 8
            yield Finding(
                f"GPU {number}",
                "warning" if old else "ok",
                f"{one.name}, {one.total_memory / _GIB:.0f} GiB, capability {one.major}.{one.minor},"
                f" CUDA {torch.version.cuda}",
                "no fast bfloat16 before capability 8.0; set stage2.precision=fp32" if old else "",
            )
        return
    if shutil.which("nvidia-smi") is None:
        yield Finding("GPU", "ok", "none; everything runs on the CPU")
        return
    if torch.version.cuda is None:
        way_out = "pip install torch from the CUDA index that pytorch.org names for this driver"
        yield Finding("GPU", "wrong", f"a driver is here, but torch {torch.__version__} is built without CUDA", way_out)
        return
    way_out = "`nvidia-smi` shows the driver; it must be as new as torch's CUDA, and CUDA_VISIBLE_DEVICES not empty"
    yield Finding("GPU", "wrong", f"torch with CUDA {torch.version.cuda} sees none", way_out)


def _compiler() -> Iterator[Finding]:
    """DeepSpeed compiles a small operation at its first start."""
    missing = [name for name, here in (("c++", shutil.which("c++")), ("ninja", _ninja())) if not here]
    way_out = "install g++ and `pip install ninja`, or set runtime.engine=torch for one worker" if missing else ""
    found = f"{', '.join(missing)} not found" if missing else "c++ and ninja, for DeepSpeed's first start"
    yield Finding("compiler", "warning" if missing else "ok", found, way_out)
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    locks = sorted(cache.rglob("lock")) if cache.is_dir() else []
    if locks:
        way_out = "if no training is starting now, remove it: a build that was killed leaves it, and others wait for it"
        yield Finding("compiler", "warning", f"{locks[0]} is locked", way_out)


def _ninja() -> bool:
    return shutil.which("ninja") is not None or Path(sys.executable).with_name("ninja").exists()


def _ray() -> Iterator[Finding]:
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        yield Finding("Ray", "ok", "RAY_ADDRESS is not set: commands start a Ray of their own on this machine")
        return
    host, _, port = address.removeprefix("ray://").removeprefix("http://").rpartition(":")
    if not host or not port.isdecimal():
        yield Finding(
            "Ray", "warning", f"RAY_ADDRESS {address}", "expected HOST:PORT; unset it to work on this machine"
        )
        return
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS).close()
    except OSError as error:
        way_out = "`ray start --head` there, or unset RAY_ADDRESS to work on this machine"
        yield Finding("Ray", "wrong", f"RAY_ADDRESS {address} does not answer ({one_line(error)})", way_out)
        return
    yield Finding("Ray", "ok", f"RAY_ADDRESS {address} answers")


def _ports() -> Iterator[Finding]:
    taken = []
    for port, option in _PORTS.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                taken.append(f"{port} ({option})")
    found = f"taken: {', '.join(taken)}" if taken else f"free: {', '.join(map(str, _PORTS))}"
    yield Finding("ports", "warning" if taken else "ok", found, "name other ones by these options" if taken else "")


def _disks(folder: Path) -> Iterator[Finding]:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache")
    places = {"runs": there, "temporary files (TMPDIR)": Path(tempfile.gettempdir()), "model cache (HF_HOME)": cache}
    for what, path in places.items():
        if not path.exists():
            continue
        free, writable = shutil.disk_usage(path).free, os.access(path, os.W_OK)
        problem = "" if writable else f"{path} can't be written; choose another"
        if writable and free < _LEAST_DISK:
            problem = "checkpoints of SmolLM2 take 3 GiB, those of an 8B model 135; make room or choose another disk"
        state: State = "wrong" if not writable else "warning" if problem else "ok"
        yield Finding(f"disk for {what}", state, f"{free / _GIB:.1f} GiB free at {path}", problem)
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        small = size < _LEAST_SHARED
        way_out = "Ray keeps objects there: docker run --shm-size=4g" if small else ""
        yield Finding("shared memory", "warning" if small else "ok", f"{size / _GIB:.1f} GiB at {shared}", way_out)


def _base_model(base_model: str, reach: Callable[[str], str] | None = None) -> Finding:
    what = f"base model {base_model}"
    if base_model == "scratch":
        return Finding(what, "ok", "trained from nothing, with a tokenizer of its own")
    try:
        return Finding(what, "ok", (reach or _reached)(base_model))
    except InputError as error:
        return Finding(what, "wrong", one_line(error), "name a folder or a file, or install what is named")
    except Exception as error:  # noqa: BLE001 - whatever the network says
        way_out = "a gated model wants `hf auth login`; without a network name a folder, a .gguf file or package:NAME"
        return Finding(what, "wrong", f"the hub does not give it ({one_line(error, 160)})", way_out)


def _reached(base_model: str) -> str:
    if Path(base_model).exists():
        return "is here"
    if base_model.startswith("package:"):
        from importlib.util import find_spec

        name = base_model.removeprefix("package:")
        if find_spec(name) is None:
            raise InputError(f"the Python package {name} is not installed")
        return "is installed"
    from huggingface_hub import HfApi

    described = HfApi().model_info(base_model, timeout=_SECONDS)
    return f"the hub has it, last changed {described.last_modified:%Y-%m-%d}"
