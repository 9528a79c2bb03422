"""Stage-1 results shared between the trials of a search or the runs of a comparison.

Those that agree in everything that stage 1 reads train it once. A result is a stage-1 artifact in a folder named by
its key. One process makes it while others that want it wait; the folder appears whole, by a rename. Waiting is an
economy, not what correctness rests on: where locks don't hold (some network file systems), two processes make the same
result, and either rename leaves a whole one.

The lock is the kernel's (flock), so a killed owner frees it at once, without a heartbeat that could be judged
wrongly; the lock file names the owner for whoever looks.
"""

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gavamoe import __version__
from gavamoe.artifacts.manifest import FORMAT_VERSION, read_manifest
from gavamoe.config.schema import RunConfig
from gavamoe.errors import InputError

STAGE1_CACHE = "stage1_cache"
"""The folder of the results in that of a search or a comparison."""


def stage1_key(config: RunConfig, dataset_fingerprint: str) -> str:
    """SHA-256 over everything that stage 1 reads: its config, the seed, the data, and the code's version."""
    read = {
        "stage1": config.stage1.model_dump(mode="json"),
        "seed": config.seed,
        "dataset": dataset_fingerprint,
        "version": [__version__, FORMAT_VERSION],
    }
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()[:32]


def cached_stage1(cache: Path, key: str, train: Callable[[Path], object]) -> tuple[Path, bool]:
    """The folder of a stage-1 result, and whether it was there already.

    Args:
        train: makes the artifact at the path it gets, whole (as `write_folder` does); called under the lock.

    Raises:
        what `train` raises: nothing is kept then, and the next one that wants it tries again.
    """
    folder = cache / key
    if folder.is_dir():
        return folder, True
    with _only_one(cache / f"{key}.lock"):
        if folder.is_dir():
            return folder, True
        train(folder)
        read_manifest(folder, "stage1", verify=False)
    return folder, False


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Hold the lock; waits for its owner, and takes over from a dead one."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = lock.open("a+", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{lock}: cannot be written ({error.strerror})") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            _name_owner(file)
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def _name_owner(file: IO[str]) -> None:
    file.truncate(0)
    file.write(f"{socket.gethostname()} {os.getpid()}\n")
    file.flush()
