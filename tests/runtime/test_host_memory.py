import subprocess
import sys

import pytest

PAGES = """
import ctypes, resource, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a page is 4 KiB here as well where huge ones are usual
from gavamoe.runtime.host_memory import keep_freed_memory
import torch
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
def step():
    return [torch.ones(10_000_000) for _ in range(3)]  # 114 MiB; glibc maps what is above 32 anew each time
for _ in range(6):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _pages_cleared(how: str) -> int:
    """Pages that the system gives to a process for five steps which make and free the same tensors."""
    done = subprocess.run([sys.executable, "-c", PAGES, how], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip("the C library here has no mallopt, which is glibc's")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_the_memory_of_a_step_serves_the_next_one() -> None:
    assert _pages_cleared("keep") < 20_000
    assert _pages_cleared("as it is") > 60_000
