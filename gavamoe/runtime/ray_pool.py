"""Ray actors that each hold one object, made once, and call its method for block after block of work.

For work whose object is dear to make, such as a model on a GPU, and whose blocks don't depend on each other. A block
whose actor died, or that failed, is given to another one; one that failed three times is reported, and the rest goes
on.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from gavamoe.config.schema import RuntimeConfig
from gavamoe.errors import InputError, RunError
from gavamoe.runtime.failures import failure_text
from gavamoe.runtime.ray_train import worker_environment

ATTEMPTS = 3
"""How often a block is tried."""
_QUEUED = 2
"""Blocks that an actor has at a time: the next one is there when one ends."""


class Block(NamedTuple):
    """A piece of work."""

    number: int
    arguments: tuple[Any, ...]


class Done(NamedTuple):
    """What became of a block."""

    number: int
    result: Any
    problem: str = ""
    """Why the block was given up; empty: it was done."""


def map_blocks(
    make: Callable[..., Any],
    arguments: dict[str, Any],
    method: str,
    blocks: Iterable[Block],
    *,
    workers: int,
    placement: RuntimeConfig,
) -> Iterator[Done]:
    """Call `make(**arguments).METHOD(*block.arguments)` for every block, on `workers` actors; results as they come.

    Few blocks are under way at a time, so `blocks` may be an iterator over more than memory holds.

    Args:
        make: module-level function; it gets one more argument, `device`.
        placement: threads of an actor, and whether each has a GPU of its own.

    Raises:
        InputError: the cluster has no room for `workers` actors.
        InputError, RunError: as raised by `make` or by a block; these are not tried again.
    """
    import ray

    check_room(workers, placement)
    kind = ray.remote(_Holder).options(
        num_cpus=placement.threads_per_worker,
        num_gpus=1 if placement.gpu else 0,
        runtime_env={"env_vars": worker_environment(placement)},
    )
    pool = _Pool(lambda: kind.remote(make, arguments, placement), method, workers)
    waiting, tries, left = deque[Block](), dict[int, int](), iter(blocks)
    try:
        while True:
            while pool.free and (block := waiting.popleft() if waiting else next(left, None)) is not None:
                pool.give(block)
            if not pool.busy:
                return
            block, actor, reference = pool.ended()
            try:
                yield Done(block.number, ray.get(reference))
                continue
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, InputError | RunError):
                    raise cause from None
                problem = failure_text(error)
                if isinstance(error, ray.exceptions.RayActorError):
                    pool.replace(actor)
            tries[block.number] = tries.get(block.number, 0) + 1
            if tries[block.number] < ATTEMPTS:
                waiting.append(block)
            else:
                yield Done(block.number, None, problem)
    finally:
        pool.close()


def check_room(workers: int, placement: RuntimeConfig) -> None:
    """Refuse more actors than the connected cluster can ever hold at once.

    Raises:
        InputError: with what is there.
    """
    import ray

    have = ray.cluster_resources()
    need = {"CPU": placement.threads_per_worker} | ({"GPU": 1} if placement.gpu else {})
    room = min(int(have.get(kind, 0) // count) for kind, count in need.items())
    if room < workers:
        raise InputError(
            f"--workers {workers}: the cluster has room for {room} ({have.get('CPU', 0):g} CPU, {have.get('GPU', 0):g}"
            f" GPU; a worker needs {', '.join(f'{count} {kind}' for kind, count in need.items())}); fewer workers, or"
            " --set runtime.threads_per_worker=1"
        )


class _Holder:
    """The actor: makes the object when it starts, calls its method for each block."""

    def __init__(self, make: Callable[..., Any], arguments: dict[str, Any], placement: RuntimeConfig) -> None:
        import torch

        torch.set_num_threads(placement.threads_per_worker)
        self._held = make(**arguments, device="cuda" if placement.gpu else "cpu")

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        return getattr(self._held, method)(*arguments)


class _Pool:
    """Actors with the blocks that they have; the least busy one gets the next."""

    def __init__(self, start: Callable[[], Any], method: str, workers: int) -> None:
        self._start, self._method = start, method
        self._actors = [start() for _ in range(workers)]
        self._given: dict[Any, tuple[Block, Any]] = {}

    @property
    def busy(self) -> bool:
        return bool(self._given)

    @property
    def free(self) -> bool:
        return len(self._given) < _QUEUED * len(self._actors)

    def give(self, block: Block) -> None:
        load = [sum(actor is mine for _, actor in self._given.values()) for mine in self._actors]
        actor = self._actors[load.index(min(load))]
        self._given[actor.call.remote(self._method, block.arguments)] = (block, actor)

    def ended(self) -> tuple[Block, Any, Any]:
        """The next block that is done or failed, the actor that had it, and the reference to its result."""
        import ray

        [reference], _ = ray.wait(list(self._given))
        block, actor = self._given.pop(reference)
        return block, actor, reference

    def replace(self, actor: Any) -> None:
        """Start another actor in place of one that died; its other blocks fail by themselves."""
        if actor in self._actors:
            self._actors[self._actors.index(actor)] = self._start()

    def close(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)
