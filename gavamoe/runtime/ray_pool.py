"""Ray actors that each hold one object, made once, and call its method for block after block of work.

For work whose object is dear to make, such as a model on a GPU, and whose blocks don't depend on each other. A block
whose actor died, or that failed, is given to another one; one that failed three times is reported, and the rest goes
on.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from gavamoe.artifacts import remote
from gavamoe.config.schema import RuntimeConfig
from gavamoe.errors import InputError, RunError
from gavamoe.runtime.failures import failure_text
from gavamoe.runtime.ray_train import worker_environment
from gavamoe.runtime.room import described, needs, room_for

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


class BlockPool:
    """`workers` actors that each hold `make(**arguments)`; a context manager, at whose end they are gone."""

    def __init__(
        self, make: Callable[..., Any], arguments: dict[str, Any], *, workers: int, placement: RuntimeConfig
    ) -> None:
        """Start the actors.

        Args:
            make: module-level function; it gets one more argument, `device`.
            arguments: paths of staged runs and datasets are fetched by actors on other machines.
            placement: threads of an actor, and whether each has a GPU of its own.

        Raises:
            InputError: the cluster has no room for `workers` actors.
        """
        import ray

        need = needs(placement)
        if (room := room_for(need, placement, workers)) < workers:
            other = "--device cpu without workers" if placement.gpu else "--set runtime.threads_per_worker=1"
            raise InputError(
                f"--workers {workers}: the cluster has room for {room} (a worker needs {described(need)}); fewer"
                f" workers, or {other}"
            )
        self.workers = workers
        kind = ray.remote(_Holder).options(
            num_cpus=placement.threads_per_worker,
            num_gpus=1 if placement.gpu else 0,
            runtime_env={"env_vars": worker_environment(placement)},
        )
        portable = {name: remote.portable(value) for name, value in arguments.items()}
        self._start = lambda: kind.remote(make, portable, placement)
        self._actors = [self._start() for _ in range(workers)]
        self._given: dict[Any, tuple[Block, Any]] = {}

    def map(self, method: str, blocks: Iterable[Block]) -> Iterator[Done]:
        """Call the held objects' method for every block; results as they come.

        Few blocks are under way at a time, so `blocks` may be an iterator over more than memory holds.

        Raises:
            InputError, RunError: as raised by `make` or by a block; these are not tried again.
        """
        import ray

        waiting, tries, left = deque[Block](), dict[int, int](), iter(blocks)
        try:
            while True:
                while self._free and (block := waiting.popleft() if waiting else next(left, None)) is not None:
                    self._give(method, block)
                if not self._given:
                    return
                block, actor, reference = self._ended()
                try:
                    yield Done(block.number, ray.get(reference))
                    continue
                except ray.exceptions.RayError as error:
                    cause = getattr(error, "cause", None)
                    if isinstance(cause, InputError | RunError):
                        raise cause from None
                    problem = failure_text(error)
                    if isinstance(error, ray.exceptions.RayActorError):
                        self._replace(actor)
                tries[block.number] = tries.get(block.number, 0) + 1
                if tries[block.number] < ATTEMPTS:
                    waiting.append(block)
                else:
                    yield Done(block.number, None, problem)
        finally:
            self._given.clear()  # an actor ends what it has begun, and nobody asks for it

    def call(self, method: str, *arguments: Any) -> Any:
        """One call on some actor.

        Raises:
            RunError: it failed each time that it was tried.
        """
        [done] = self.map(method, [Block(0, arguments)])
        if done.problem:
            raise RunError(f"{method} failed {ATTEMPTS} times on Ray workers: {done.problem}")
        return done.result

    def __enter__(self) -> "BlockPool":
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)

    @property
    def _free(self) -> bool:
        return len(self._given) < _QUEUED * len(self._actors)

    def _give(self, method: str, block: Block) -> None:
        load = [sum(actor is mine for _, actor in self._given.values()) for mine in self._actors]
        actor = self._actors[load.index(min(load))]
        self._given[actor.call.remote(method, tuple(map(remote.portable, block.arguments)))] = (block, actor)

    def _ended(self) -> tuple[Block, Any, Any]:
        """The next block that is done or failed, the actor that had it, and the reference to its result."""
        import ray

        [reference], _ = ray.wait(list(self._given))
        block, actor = self._given.pop(reference)
        return block, actor, reference

    def _replace(self, actor: Any) -> None:
        """Start another actor in place of one that died; its other blocks fail by themselves."""
        if actor in self._actors:
            self._actors[self._actors.index(actor)] = self._start()


class _Holder:
    """The actor: makes the object when it starts, calls its method for each block."""

    def __init__(self, make: Callable[..., Any], arguments: dict[str, Any], placement: RuntimeConfig) -> None:
        import torch

        torch.set_num_threads(placement.threads_per_worker)
        here = {name: remote.here(value) for name, value in arguments.items()}
        self._held = make(**here, device="cuda" if placement.gpu else "cpu")

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        return getattr(self._held, method)(*map(remote.here, arguments))
