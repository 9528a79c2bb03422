"""What the end of a training by Ray means: what was lost or went wrong, and whether going on can help."""

from pathlib import Path

_KNOWN_FAILURES = {
    "running low on memory": "a worker was killed, because its machine was running low on memory",
    "worker group startup timed out": "the workers did not start within runtime.wait_minutes: too few nodes",
}
"""Part of an error message of Ray's -> what it means, in the words of this project."""
_PEER_ERRORS = ("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe")
"""Parts, in lower case, of gloo's and NCCL's messages about a rank that has gone; gloo's are plain RuntimeErrors."""
_OF_INPUT = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""Errors of the operating system that come of what a training was given, not of a disk or network that failed."""


def lost_surroundings(failure: BaseException) -> bool:
    """Whether a training ended because of its surroundings: a process, machine, network or memory that was lost.

    A rank whose peer has vanished fails in a collective operation, so that one lost process decides for all ranks; and
    an error of some rank's own decides where the others only complain of their peers.
    """
    causes = [_cause(error) for error in _worker_errors(failure)]
    if any(_is_loss(cause) for cause in causes):
        return True
    return all(_is_of_peers(cause) for cause in causes)


def _worker_errors(failure: BaseException) -> list[BaseException]:
    """The errors of the ranks, or the controller's; the failure itself where there are none."""
    failures = getattr(failure, "worker_failures", None)
    return list(failures.values()) if failures else [getattr(failure, "controller_failure", failure)]


def _cause(error: BaseException) -> BaseException:
    """The error that a loop raised, without what Ray wraps it in; Ray's own errors as they are."""
    from ray.exceptions import RayTaskError

    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, BaseException) else error
    inner = getattr(error, "_base_exc", None)  # of Ray Train's UserExceptionWithTraceback
    return inner if isinstance(inner, BaseException) else error


def _is_loss(error: BaseException) -> bool:
    from ray.exceptions import RayError, RayTaskError
    from ray.train.v2._internal.exceptions import RayTrainError

    if isinstance(error, RayTaskError) or type(error) is RayError:
        return False  # a loop's error that could not be sent here as it was
    if isinstance(error, OSError):
        return not isinstance(error, _OF_INPUT) and not _is_of_peers(error)
    return isinstance(error, RayError | RayTrainError | MemoryError)


def _is_of_peers(error: BaseException) -> bool:
    """Whether an error came over the network from a rank that has gone."""
    from torch.distributed import DistError

    text = str(error).lower()
    return isinstance(error, DistError | ConnectionError) or any(sign in text for sign in _PEER_ERRORS)


def keep_traceback(path: Path, failure: BaseException) -> str:
    """Write the workers' tracebacks to a file; returns what to tell the user of it."""
    text = "resuming meets the same error again until its cause is removed"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{failure}\n", encoding="utf-8")
    except OSError:
        return text
    return f"{text}; traceback: {path}"


def failure_text(error: Exception) -> str:
    """What went wrong: the last line of the first worker's error, or of the controller's."""
    failures = getattr(error, "worker_failures", None)
    errors = list(failures.values()) if failures else [error]
    # A rank that lost its peer says less than the rank that was lost, or that failed by itself.
    cause = next((each for each in errors if not _is_of_peers(_cause(each))), errors[0])
    for sign, meaning in _KNOWN_FAILURES.items():
        if sign in str(cause):
            return meaning
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if lines else type(cause).__name__
