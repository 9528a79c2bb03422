"""Errors of a training in words, and which of them are worth going on from."""

from gavamoe.runtime.failures import failure_text, lost_surroundings


def test_the_lack_of_memory_is_named_without_rays_advice() -> None:
    from ray.exceptions import OutOfMemoryError

    killed = OutOfMemoryError(
        "1 worker(s) were killed due to the node running low on memory.\nRefer to a page, please."
    )
    assert failure_text(killed) == "a worker was killed, because its machine was running low on memory"
    assert failure_text(ValueError("first\nlast\n")) == "last"


def of_loop(error: Exception) -> Exception:
    """A loop's error as Ray Train hands it to the driver."""
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    return UserExceptionWithTraceback(error, f"Traceback\n  here\n{error}")


def of_ranks(*errors: Exception) -> Exception:
    from ray.train import WorkerGroupError

    return WorkerGroupError("several", dict(enumerate(errors)))


PEER = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9")


def test_only_lost_surroundings_are_worth_going_on_from() -> None:
    import torch
    from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError

    gone = WorkerHealthCheckFailedError("gone", failure=WorkerCrashedError())
    lost = [
        of_ranks(gone),
        of_ranks(of_loop(PEER), gone),
        of_ranks(gone, of_loop(ValueError("after its peer had gone"))),
        of_ranks(of_loop(PEER), of_loop(PEER)),
        of_ranks(of_loop(torch.distributed.DistNetworkError("timed out"))),
        of_ranks(of_loop(MemoryError())),
        of_ranks(of_loop(OSError("AWS Error NETWORK_CONNECTION during PutObject"))),
        ControllerError(WorkerGroupStartupTimeoutError(2)),
        OutOfMemoryError("killed"),
        NodeDiedError("gone"),
    ]
    assert [lost_surroundings(each) for each in lost] == [True] * len(lost)
    own = [
        of_ranks(of_loop(ValueError("as planned"))),
        of_ranks(of_loop(PEER), of_loop(IndexError("Target 288 is out of bounds."))),
        of_ranks(of_loop(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))),
        of_ranks(of_loop(TypeError("no"))),
        of_ranks(of_loop(FileNotFoundError(2, "No such file"))),
        of_ranks(of_loop(torch.OutOfMemoryError("CUDA out of memory"))),
    ]
    assert [lost_surroundings(each) for each in own] == [False] * len(own)


def test_the_rank_that_failed_by_itself_is_quoted_not_the_one_that_missed_it() -> None:
    assert failure_text(of_ranks(of_loop(PEER), of_loop(IndexError("Target 288 is out of bounds.")))) == (
        "Target 288 is out of bounds."
    )
