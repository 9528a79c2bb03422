"""What a GPU does with this project: is it right, how fast, and does it fit? `make gpu-check`, or by itself:

    python -m benchmarks.gpu [--out FOLDER] [--seconds 560] [--only NAME,...] [--tiny]

    __main__  runs the checks, each in a process of its own with a budget, and prints a table
    models    explainers of known shapes with random weights
    equality  the same numbers as on a CPU
    speed     rates, memory, waits
    whole     versions, whole trainings, Ray
    clock     timing on either device

Results are a line of JSON each in FOLDER/gpu.jsonl, written at once. Exit code 1 if a check failed, 2 without a GPU.
`--tiny` takes tiny shapes and runs on the CPU too: it shows that the checks still run, its figures mean nothing. Ray,
DeepSpeed and PEFT may be missing: the checks that need them are skipped and say so.
"""

from collections.abc import Callable
from typing import Any

Figures = dict[str, Any]
Check = Callable[[str, bool], tuple[str, Figures]]
"""A check of a torch device, perhaps at tiny sizes: PASS, FAIL or SKIP, and what was found."""
