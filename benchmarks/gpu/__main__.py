"""Run the checks, each in a process of its own: a device that stops ends one check, not all. See the package."""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import Check

CHECKS = {
    "versions": ("whole", 40),
    "model": ("equality", 60),
    "experts": ("equality", 40),
    "training": ("speed", 150),
    "writing": ("speed", 120),
    "pipeline": ("whole", 120),
    "deepspeed": ("equality", 150),
    "ray": ("whole", 200),
    "waits": ("speed", 40),
    "ceilings": ("speed", 40),
    "layer": ("speed", 60),
    "largest": ("speed", 90),
    "tables": ("speed", 60),
    "stage1": ("equality", 60),
}
"""Name to the module that has it, and seconds that it may take; in order of value."""
_MARK = "GPU-CHECK-RESULT "


def main() -> None:
    """Parse, run, print, exit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="folder for gpu.jsonl and the logs")
    parser.add_argument("--seconds", type=float, default=560, help="no check begins or goes on after this")
    parser.add_argument("--only", default="", help="comma-separated names: " + ", ".join(CHECKS))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on the CPU where there is no GPU")
    parser.add_argument("--child", choices=CHECKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _run_here(arguments.child, tiny=arguments.tiny)
        return
    names = arguments.only.split(",") if arguments.only else list(CHECKS)
    if unknown := sorted(set(names) - set(CHECKS)):
        parser.error(f"unknown check {unknown[0]}; known: {', '.join(CHECKS)}")
    if not arguments.tiny and _device() == "cpu":
        print("gpu-check: torch sees no GPU here; --tiny runs the checks at tiny sizes on the CPU", file=sys.stderr)
        sys.exit(2)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = _run_all(names, arguments.out, arguments.seconds, tiny=arguments.tiny)
    _print_table(results)
    sys.exit(1 if any(result["result"] == "FAIL" for result in results) else 0)


def _device() -> str:
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def _run_here(name: str, *, tiny: bool) -> None:
    """One check in this process, and its result as the last line."""
    check: Check = getattr(importlib.import_module(f"benchmarks.gpu.{CHECKS[name][0]}"), name)
    result, figures = check(_device(), tiny)
    print(_MARK + json.dumps({"result": result, "figures": figures}), flush=True)


def _run_all(names: Sequence[str], out: Path, seconds: float, *, tiny: bool) -> list[dict[str, Any]]:
    """The checks one after the other; each result is written as it comes."""
    deadline = time.monotonic() + seconds
    results = []
    with (out / "gpu.jsonl").open("w", encoding="utf-8") as lines:
        for name in names:
            left = deadline - time.monotonic()
            started = time.monotonic()
            result = (
                _run_apart(name, min(CHECKS[name][1], left), out, tiny=tiny) if left > 5 else _skipped("no time left")
            )
            result = {"check": name, **result, "seconds": round(time.monotonic() - started, 1)}
            lines.write(json.dumps(result) + "\n")
            lines.flush()
            print(f"{result['result']:5} {name} ({result['seconds']} s)", file=sys.stderr, flush=True)
            results.append(result)
    return results


def _run_apart(name: str, budget: float, out: Path, *, tiny: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--child", name, *(["--tiny"] if tiny else [])]
    log = out / f"{name}.log"
    with log.open("w", encoding="utf-8") as output:
        # A session of its own, so that what the check started ends with it.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(budget)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    found = [line for line in text.splitlines() if line.startswith(_MARK)]
    if code == 0 and found:
        value: dict[str, Any] = json.loads(found[-1].removeprefix(_MARK))
        return value
    if code is None:
        return _skipped(f"not done in {budget:.0f} s; see {log.name}")
    return {"result": "FAIL", "figures": {"exit code": code, "said": text[-800:]}}


def _skipped(reason: str) -> dict[str, Any]:
    return {"result": "SKIP", "figures": {"reason": reason}}


def _print_table(results: Sequence[dict[str, Any]]) -> None:
    for result in results:
        print(f"\n== {result['check']}: {result['result']} ({result['seconds']} s)")
        _print_figures(result["figures"], "  ")


def _print_figures(figures: dict[str, Any], indent: str) -> None:
    for name, value in figures.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            _print_figures(value, indent + "  ")
        elif isinstance(value, list):
            print(f"{indent}{name}:")
            for row in value:
                cells = row.items() if isinstance(row, dict) else [("", row)]
                print(indent + "  " + "  ".join(f"{key} {_short(cell)}".strip() for key, cell in cells))
        else:
            print(f"{indent}{name}: {_short(value)}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
