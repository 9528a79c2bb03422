"""How a process on a CPU keeps the memory of its tensors between steps.

A training step makes and frees the same activations and gradients as the one before. glibc maps each block above 32 MB
anew and gives back what lies on top of the rest, and the system clears it page by page: on two cores a fifth of a step
of a model of 135 million parameters.
"""

import ctypes

KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62), "MALLOC_ARENA_MAX": "1"}
"""The same for a process that is still to start, as its environment. One arena: other threads than the first, as Ray
trains on, have arenas that can't hold large blocks, and map them all the same."""
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Numbers of two of glibc's settings (malloc.h)."""


def keep_freed_memory() -> bool:
    """Have this process keep freed memory for its next tensors, in place of returning each large block to the system.

    For the thread that calls it, where that is the process's first. The process stays as large as it has once been.

    Returns:
        Whether the C library here has these settings (glibc).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
