"""A function over a stream of jobs as Ray tasks side by side, with the results in the jobs' order.

Few jobs are under way at a time, so that neither they nor their results pile up in memory. A task whose process died
starts again.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa

from gavamoe.errors import InputError, RunError
from gavamoe.runtime.failures import failure_text

_AHEAD = 2
"""Jobs that each worker has at a time: the next one is there when one ends."""


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
            under_way.append(task.remote(lent, tuple(map(_apart, job))))
            if len(under_way) == _AHEAD * self._workers:
                yield _result(under_way.popleft())
        while under_way:
            yield _result(under_way.popleft())


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
