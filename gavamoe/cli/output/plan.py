"""What `gavamoe plan` prints: tables of parameters, memory, time and traffic, each with what it assumes."""

from typing import Any

from gavamoe.cli.terminal import console, print_json, print_table
from gavamoe.plan.memory import USABLE

_DISK = 1e9
"""Bytes a second to a disk, or to a storage, for the time that checkpoints take."""
_USES = {
    "compute": "computing",
    "memory": "reading and writing weights, gradients, moments",
    "communication": "communicating",
}
_UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"))


def print_plan(plan: dict[str, Any], *, as_json: bool) -> None:
    """The plan as tables on standard error, or as one JSON document on standard output."""
    if as_json:
        print_json(plan)
        return
    _print_parameters(plan)
    _print_memory(plan)
    _print_training(plan)
    _print_traffic(plan)
    _print_stage1(plan)


def _print_parameters(plan: dict[str, Any]) -> None:
    parameters = plan["parameters"]
    rows = [(name, each["total"], each["trained"], each["active"]) for name, each in parameters["parts"].items()]
    for title, key in (("explainer", "explainer"), ("with stage 1", "all")):
        rows.append((title, *(parameters[key][column] for column in ("total", "trained", "active"))))
    print_table(f"Parameters, {plan['base_model']}", ["part", "total", "trained", "active per token"], rows)


def _print_memory(plan: dict[str, Any]) -> None:
    """A row a scheme with checkpointing as configured, short enough for a terminal of 80 columns."""
    hardware = plan["hardware"]
    checkpointing = any(row["checkpointed"]["own"] for row in plan["memory"])
    schemes = [(_short(row["scheme"]), row["checkpointed" if checkpointing else "plain"]) for row in plan["memory"]]
    most = max(memory["device"] for _, memory in schemes)
    unit, name = next((unit for unit in _UNITS if most >= unit[0]), _UNITS[-1])
    uses = ("weights", "gradients", "optimizer", "buffers", "activations")
    rows = []
    for scheme, memory in schemes:
        *kept, device, host = (f"{memory[use] / unit:.4g}" for use in (*uses, "device", "host"))
        rows.append((scheme, *kept, f"{device} {_mark(memory)}", host))
    ways = "with" if checkpointing else "without"
    print_table(
        f"Stage 2, memory per device in {name}: {hardware['devices']} x {size(hardware['memory'])}, longest batch,"
        f" {ways} gradient checkpointing\n(o) optimizer, (w) weights on host; + fits into {USABLE:.0%}, - does not,"
        " * this config",
        ["scheme", "weight", "grad.", "optim.", "buffer", "activ.", "device", "host"],
        rows,
    )


def _short(scheme: str) -> str:
    name, _, host = scheme.partition(", ")
    return f"{name} ({', '.join(word[0] for word in host.removesuffix(' on host').split(' and '))})" if host else name


def _mark(memory: dict[str, Any]) -> str:
    return ("+" if memory["fits"] else "-") + ("*" if memory["own"] else " ")


def _print_training(plan: dict[str, Any]) -> None:
    work, load, hardware = plan["training"], plan["workload"], plan["hardware"]
    writing = work["checkpoints"] * work["checkpoint_bytes"]
    rows = [
        ("rows of training", load["rows"]),
        ("tokens per row, prompt + answer", f"{load['prompt_tokens']:.0f} + {load['answer_tokens']:.0f}"),
        ("optimizer steps per epoch", work["steps_per_epoch"]),
        ("optimizer steps", work["steps"]),
        ("tokens per epoch", f"{work['tokens_per_epoch']:.3g}"),
        ("FLOPs per epoch", f"{work['flops_per_epoch']:.3g}"),
        *_times(work["epoch_seconds"], "epoch"),
        *_times(work["seconds"], "whole run"),
        ("checkpoints", f"{work['checkpoints']} of {size(work['checkpoint_bytes'])}"),
        (f"whole run: waiting for them, written at {_DISK / 1e9:g} GB/s", duration(writing / _DISK)),
    ]
    title = (
        f"Stage 2, work: {hardware['flops'] / 1e12:g} TFLOP/s in bf16 at {hardware['utilization']:.0%},"
        f" {hardware['memory_bandwidth'] / 1e12:g} TB/s in a device's memory, {hardware['bandwidth'] / 1e9:g} GB/s"
        " between devices"
    )
    print_table(title, ["", "value"], rows)


def _times(seconds: dict[str, float], name: str) -> list[tuple[str, str]]:
    """Each in full, and the bounds between which a run lies: all at once, or one after the other."""
    bounds = f"{duration(max(seconds.values()))} to {duration(sum(seconds.values()))}"
    return [
        *((f"{name}: {_USES[use]}", duration(each)) for use, each in seconds.items()),
        (f"{name}: all, overlapped to one after the other", bounds),
    ]


def _print_traffic(plan: dict[str, Any]) -> None:
    rows = [
        (row["scheme"], *(size(row[name]) for name in ("gradients", "weights", "tokens", "total")))
        for row in plan["traffic"]
    ]
    print_table(
        "Stage 2, sent by one device per optimizer step", ["scheme", "gradients", "weights", "tokens", "all"], rows
    )


def _print_stage1(plan: dict[str, Any]) -> None:
    stage1 = plan["stage1"]
    memory = stage1["memory"]
    rows: list[tuple[str, object]] = [
        ("parameters", stage1["parameters"]["all"]),
        ("of these in user and item tables", stage1["parameters"]["tables"]),
        *((name, size(memory[name])) for name in ("weights", "gradients", "optimizer", "best", "activations")),
        ("device", f"{size(memory['device'])} {'+' if stage1['fits'] else '-'}"),
        ("host, for pairs", size(memory["host"])),
        ("host, for users' clusters", size(memory["users"])),
        ("host of rank 0, at the start", size(memory["start"])),
        ("epochs, pretraining included", stage1["epochs"]),
        ("FLOPs per epoch", f"{stage1['flops_per_epoch']:.3g}"),
        ("sent by one device per step", size(stage1["traffic_per_step"])),
        *_times(stage1["seconds"], "all epochs"),
    ]
    print_table(f"Stage 1, stage1.tables={stage1['tables']}", ["", "value"], rows)
    print_table(
        "Stage 1 by stage1.tables: on a device; temporary files; sent per step",
        ["tables", "numbers", "states", "device", "files", "sent"],
        [
            (
                kind,
                memory["tables"],
                size(memory["weights"] + memory["optimizer"] + memory["best"]),
                f"{size(memory['device'])} {'+' if memory['fits'] else '-'}",
                size(memory["files"]),
                size(memory["sent"]),
            )
            for kind, memory in stage1["kinds"].items()
        ],
    )
    if not stage1["fits"]:
        fitting = [kind for kind, memory in stage1["kinds"].items() if memory["fits"]]
        way_out = f"; stage1.tables={fitting[0]} does" if fitting else ", of any kind; take more devices"
        console.print(f"stage 1's tables do not fit on one device{way_out}: see docs/plan.md, 10^8 users", markup=False)


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count / 1024:.1f} KiB" if count else "0"


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.2g} s"
