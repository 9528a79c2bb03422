"""A function over a stream of jobs as Ray tasks side by side, with the results in the jobs' order.

No more run at a time than there are workers, whatever room the cluster has. The next job is made while they run, and
few results wait for an earlier one, so that neither pile up in memory. A task whose process died starts again.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa

from gavamoe.errors import InputError, RunError
from gavamoe.runtime.failures import failure_text

_AHEAD = 2
"""Jobs of each worker whose results have not been given out, at most."""


class OrderedTasks:
    """Calls functions on `workers` Ray workers of the connected cluster, each on one core."""

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def __call__(
        self, function: Callable[..., Any], shared: tuple[Any, ...], jobs: Iterable[tuple[Any, ...]]
    ) -> Iterator[Any]:
        """Call `function(*shared, *job)` for every job; results come in the jobs' order.

        Args:
            function: module-level.
            shared: sent once, not with every job.

        Raises:
            InputError, RunError: as raised by a job; else RunError.
        """
        import ray

        task = ray.remote(_call).options(num_cpus=1)
        lent = ray.put((function, shared))
        under_way: deque[Any] = deque()
        for job in jobs:
            sent = ray.put(tuple(map(_apart, job)))  # while workers are busy, so that one who ends waits for nothing
            while len(running := _running(under_way)) == self._workers or len(under_way) == _AHEAD * self._workers:
                if under_way[0] in running and len(under_way) < _AHEAD * self._workers:
                    ray.wait(running, num_returns=1)
                else:
                    yield _result(under_way.popleft())
            under_way.append(task.remote(lent, sent))
        while under_way:
            yield _result(under_way.popleft())


def _running(under_way: Iterable[Any]) -> list[Any]:
    """Those tasks that have not ended."""
    import ray

    tasks = list(under_way)
    return ray.wait(tasks, num_returns=len(tasks), timeout=0)[1] if tasks else []


def _apart(value: Any) -> Any:
    """An Arrow array, or a dict of them, without the rows around it: a slice is sent with all that it is a slice of."""
    if isinstance(value, dict):
        return {name: _apart(each) for name, each in value.items()}
    if isinstance(value, pa.ChunkedArray):
        return value.combine_chunks()
    return pa.concat_arrays([value]) if isinstance(value, pa.Array) and len(value) else value


def _call(lent: tuple[Callable[..., Any], tuple[Any, ...]], job: tuple[Any, ...]) -> Any:
    function, shared = lent
    return function(*shared, *job)


def _result(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, InputError | RunError):
            raise cause from None
        raise RunError(f"a task failed: {failure_text(error)}") from error
