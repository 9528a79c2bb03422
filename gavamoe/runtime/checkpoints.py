"""The checkpoints of a step: stored by each rank through Ray Train in the background with checksums, found whole again.

A checkpoint holds the loop's files, `log.jsonl` (the log so far: the driver's is set back to it when workers restart)
and `checksums-RANK.json` for each rank. Rank 0 checks them before anything is resumed, and goes back to the checkpoint
before where one is damaged. One counts from the moment when all ranks' files are stored: a training that dies before
leaves files that no list names, and the checkpoint before.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from gavamoe.artifacts import object_store, remote
from gavamoe.artifacts.checksums import FileEntry, find_damage, list_files
from gavamoe.artifacts.files import read_json, write_json
from gavamoe.artifacts.run import RunFolder
from gavamoe.errors import InputError, RunError, validated
from gavamoe.runtime.context import Metrics

LOG_FILE = "log.jsonl"
_SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of the checkpoints that count."""
_STREAMED = 2**26
"""Bytes that are copied at once from a storage to itself."""
_NO_SPACE = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file would be larger than is allowed",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
}
_TORCH_WRITE_ERRORS = ("file write failed", "unexpected pos")
"""Messages with which torch.save reports a full disk: a RuntimeError without an error number."""


class StepCheckpoints:
    """The checkpoints that Ray Train keeps of a step: below the run folder, or below its URI."""

    def __init__(self, folder: Path, name: str) -> None:
        stored = remote.stored_path(folder)
        self.base = folder if stored is None else stored.uri
        self._local = RunFolder(folder).checkpoints(name)
        self._uri = None if stored is None else f"{stored.uri}/checkpoints/{name}"
        self.filesystem, self.path = None, str(self._local.parent)
        if stored is not None:
            self.filesystem, self.path = object_store.filesystem(f"{stored.uri}/checkpoints")

    def exist(self) -> bool:
        """Whether there are any that count."""
        return (self._local / _SNAPSHOT).exists() if self._uri is None else remote.exists(f"{self._uri}/{_SNAPSHOT}")

    def remove(self) -> None:
        """Remove them, their list first: checkpoints that are in no list don't count, should the removal break off."""
        if self._uri is None:
            (self._local / _SNAPSHOT).unlink(missing_ok=True)
            shutil.rmtree(self._local, ignore_errors=True)
        else:
            remote.remove(f"{self._uri}/{_SNAPSHOT}")
            remote.remove(self._uri)


class RankChecksums(BaseModel):
    """Content of `checksums-RANK.json`."""

    model_config = ConfigDict(extra="forbid")
    workers: int
    """Number of ranks that wrote the checkpoint."""
    files: dict[str, FileEntry]
    """The files that this rank wrote."""


class Uploads:
    """Stores this rank's checkpoints one after the other, each on a thread while the training goes on."""

    def __init__(self, rank: int, workers: int, refuse: Callable[[Exception], None]) -> None:
        """`refuse` is told, on that thread, of a disk that can't be written: another attempt would end the same way."""
        self._rank, self._workers, self._refuse = rank, workers, refuse
        self._underway = False
        self._last: tuple[str, dict[str, FileEntry]] | None = None
        """Where the last one is stored, and its files."""

    def start(self, folder: Path, metrics: Metrics, unchanged: Sequence[str]) -> None:
        """Take the folder's files away and have them stored, together with the last checkpoint's files `unchanged`."""
        from ray import train

        self.settle()
        aside = Path(tempfile.mkdtemp(prefix="gavamoe-checkpoint-", dir=folder.parent))
        for path in folder.iterdir():
            path.rename(aside / path.name)
        storage = train.get_context().get_storage()

        def store(checkpoint: Any, name: str) -> Any:
            try:
                return self._store(storage, checkpoint, name, unchanged)
            except (OSError, RuntimeError) as error:
                shutil.rmtree(aside, ignore_errors=True)
                problem = storage_problem(error)
                if problem is not None:
                    self._refuse(RunError(f"{problem}; make room or give permission, then continue with --resume"))
                raise

        self._underway = True
        train.report(
            dict(metrics),
            checkpoint=train.Checkpoint.from_directory(aside),
            checkpoint_upload_mode=train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
            checkpoint_upload_fn=store,
        )

    def settle(self, seconds: float | None = None) -> None:
        """Wait until the last one counts, or that long."""
        from ray import train

        if self._underway:
            train.get_all_reported_checkpoints(
                consistency_mode=train.CheckpointConsistencyMode.COMMITTED, timeout_s=seconds
            )
            self._underway = False

    def _store(self, storage: Any, checkpoint: Any, name: str, unchanged: Sequence[str]) -> Any:
        """Note the files' checksums, copy them to the storage, and copy there what is unchanged."""
        files = list_files(Path(checkpoint.path))
        source, known = self._last or ("", {})
        write_checksums(
            Path(checkpoint.path), self._rank, self._workers, files | {name: known[name] for name in unchanged}
        )
        stored = storage.persist_current_checkpoint(checkpoint, name)
        for file in unchanged:
            _copy_within(stored.filesystem, f"{source}/{file}", f"{stored.path}/{file}")
            files[file] = known[file]
        self._last = stored.path, files
        return stored


def _copy_within(filesystem: Any, source: str, target: str) -> None:
    """Copy a file of a storage: on a disk as a second name of it. Elsewhere through this machine, for what object
    stores copy by themselves may have 5 GB at most."""
    from pyarrow.fs import LocalFileSystem

    if isinstance(filesystem, LocalFileSystem):
        try:
            os.link(source, target)
        except OSError:  # a file system without links
            shutil.copyfile(source, target)
        return
    with filesystem.open_input_stream(source) as read, filesystem.open_output_stream(target) as write:
        shutil.copyfileobj(read, write, _STREAMED)


def newest_whole_checkpoint(rank: int, resources: ExitStack) -> tuple[Path | None, list[str]]:
    """The folder of the newest registered checkpoint whose files are as they were written (None: nothing to resume),
    the same one on all ranks, and on rank 0 what is wrong with the newer ones.

    Args:
        resources: holds the copies of what lies at a URI. Rank 0's, which it has checked, serves its whole machine.

    Raises:
        InputError: there are checkpoints, and all are damaged.
    """
    from ray import train
    from ray.train.collective import broadcast_from_rank_zero

    reported = train.get_all_reported_checkpoints(consistency_mode=train.CheckpointConsistencyMode.COMMITTED)
    damaged: list[str] = []
    chosen = -1
    if rank == 0:
        for index in reversed(range(len(reported))):
            with ExitStack() as fetched:
                problem = checkpoint_problem(Path(fetched.enter_context(reported[index].checkpoint.as_directory())))
                if problem is None:
                    chosen = index
                    resources.push(fetched.pop_all())
                    break
            damaged.append(f"{reported[index].checkpoint.path}: {problem}")
    chosen = broadcast_from_rank_zero(chosen)
    if chosen >= 0:
        return Path(resources.enter_context(reported[chosen].checkpoint.as_directory())), damaged
    if reported:
        reason = f" ({damaged[0]})" if damaged else ""
        raise InputError(f"no whole checkpoint is left{reason}; start again without --resume")
    return None, damaged


def write_checksums(folder: Path, rank: int, workers: int, files: dict[str, FileEntry]) -> None:
    """Note size and SHA-256 of this rank's files beside them."""
    checksums = RankChecksums(workers=workers, files=files)
    write_json(folder / _checksums_file(rank), checksums.model_dump(mode="json"))


def checkpoint_problem(folder: Path) -> str | None:
    """The first damage of a checkpoint's files, in words; None if all ranks' files are as they were written."""
    try:
        ranks = range(_read_checksums(folder, 0).workers)
        files = {name: entry for rank in ranks for name, entry in _read_checksums(folder, rank).files.items()}
    except InputError as error:
        return f"its checksums can't be read ({error})"
    damage = find_damage(folder, files)
    return None if damage is None else damage.text


def _read_checksums(folder: Path, rank: int) -> RankChecksums:
    path = folder / _checksums_file(rank)
    return validated(RankChecksums, read_json(path), path, "the checksums of a rank's files")


def _checksums_file(rank: int) -> str:
    return f"checksums-{rank}.json"


def storage_problem(error: BaseException | None) -> str | None:
    """The reason why a disk can't be written, in words, if an error comes from that; None for any other error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            where = f"{error.filename}: " if error.filename else ""
            return f"{where}can't be written: {_NO_SPACE[error.errno]}"
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _TORCH_WRITE_ERRORS):
            return "a checkpoint can't be written: the disk for temporary files (TMPDIR) seems full"
        error = error.__cause__ or error.__context__
    return None
