"""Timing on a GPU, whose work is asynchronous, or on a CPU; memory; and where a program waits for the GPU."""

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: str, rounds: int = 5, warmups: int = 2) -> float:
    """Median seconds of a call, the device's work included."""
    for _ in range(warmups):
        run()
    taken = []
    for _ in range(rounds):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def peak_bytes(run: Callable[[], object], device: str) -> float:
    """Most bytes that tensors held on the GPU during a call; 0 on a CPU."""
    if device == "cpu":
        run()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return float(torch.cuda.max_memory_allocated())


def launches(run: Callable[[], object], device: str) -> dict[str, float]:
    """Kernels, operators and copies of one call, and the share of the device's time that casts and copies take."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device != "cpu":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    run()
    with torch.profiler.profile(activities=kinds) as profile:
        run()
        synchronize(device)
    events = profile.key_averages()
    operators = sum(event.count for event in events if event.key.startswith("aten::"))
    casts = sum(event.count for event in events if event.key == "aten::_to_copy")
    kernels = [event for event in events if event.device_type == torch.profiler.DeviceType.CUDA]
    total = sum(event.self_device_time_total for event in kernels)
    copying = sum(event.self_device_time_total for event in kernels if "copy" in event.key.lower())
    return {
        "operators": operators,
        "casts": casts,
        "kernels": sum(event.count for event in kernels),
        "device ms": total / 1000,
        "share of copies and casts": copying / total if total else 0.0,
    }


def waits(run: Callable[[], object], device: str) -> dict[str, int]:
    """How often, and where, one call makes the program wait for the GPU: FILE:LINE to times."""
    run()
    if device == "cpu":
        return {}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = (
        f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught if "synchron" in str(warning.message)
    )
    return dict(Counter(places).most_common(12))
