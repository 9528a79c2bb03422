"""What the HTTP interface stands on: routing and writing, wherever they run.

`LocalBackend` has both in this process; `deployments.RayBackend` calls other replicas.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gavamoe.generation.decoding_engine import EngineFull
from gavamoe.generation.engine_thread import use_torch_threads
from gavamoe.serving.routing import Pair, Ranking, RankRequest, RoutedPair, RoutingService
from gavamoe.serving.schema import CatalogResponse, ServerInfo
from gavamoe.serving.settings import ServeArgs
from gavamoe.serving.writing import Piece, TextRequest, WritingService, Written

_BATCHED = 64
"""Requests whose pairs are routed by one call, at most."""


class Overloaded(Exception):
    """No room for the request now; it was not begun."""


class Unavailable(Exception):
    """The replicas that were tried could not be reached."""


class Interrupted(Exception):
    """A text broke off after some of it had been sent."""


Result = TypeVar("Result")


class Backend(Protocol):
    """Routing and writing. Every method may raise InputError, Overloaded or Unavailable."""

    async def route(self, pairs: Sequence[Pair]) -> list[RoutedPair]:
        """Route pairs."""

    async def rank(self, request: RankRequest) -> Ranking:
        """The best items of a user."""

    async def search(self, kind: str, query: str, limit: int) -> CatalogResponse:
        """Look for users or items."""

    async def info(self) -> ServerInfo:
        """What is being served."""

    async def write(self, routed: RoutedPair, request: TextRequest) -> Written:
        """One whole text."""

    def stream(self, routed: RoutedPair, request: TextRequest) -> AsyncIterator[RoutedPair | Piece | Written]:
        """One text piece by piece; also raises Interrupted."""

    async def ready(self) -> str:
        """The version that is served; raises if a request could not be answered now."""


class RouteBatcher:
    """Sends the pairs of all requests that came while a call was under way as one call: a call costs as much as many
    pairs. A request that comes alone is sent at once."""

    def __init__(self, call: Callable[[Sequence[Pair]], Awaitable[list[RoutedPair]]]) -> None:
        self._call = call
        self._waiting: list[tuple[Sequence[Pair], asyncio.Future[list[RoutedPair]]]] = []
        self._sender: asyncio.Task[None] | None = None

    async def route(self, pairs: Sequence[Pair]) -> list[RoutedPair]:
        """The routes of one request's pairs; raises what their call raises."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((pairs, future))
        if self._sender is None:
            # In no request's context: when a client goes, Ray Serve cancels the calls that were made in its request's,
            # and this one is everybody's.
            self._sender = asyncio.create_task(self._send(), context=Context())
        routed: list[RoutedPair] = await future
        return routed

    async def _send(self) -> None:
        try:
            while self._waiting:
                requests, self._waiting = self._waiting[:_BATCHED], self._waiting[_BATCHED:]
                if not await self._answer(requests) and len(requests) > 1:
                    for request in requests:  # one of them is wrong: the others must not suffer
                        await self._answer([request])
        finally:
            self._sender = None

    async def _answer(self, requests: list[tuple[Sequence[Pair], "asyncio.Future[list[RoutedPair]]"]]) -> bool:
        """Whether the requests were answered; an error is the answer of one that stands alone."""
        try:
            routed = await self._call([pair for pairs, _ in requests for pair in pairs])
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            if len(requests) == 1 and not requests[0][1].done():  # the call was cancelled, not this task
                requests[0][1].set_exception(Unavailable("the call was cancelled"))
            return False
        except Exception as error:  # noqa: BLE001 - it belongs to the request that waits, whatever it is
            if len(requests) == 1 and not requests[0][1].done():
                requests[0][1].set_exception(error)
            return False
        for pairs, future in requests:
            answered, routed = routed[: len(pairs)], routed[len(pairs) :]
            if not future.done():  # its client may have gone
                future.set_result(answered)
        return True


class LocalBackend:
    """Both stages in this process."""

    def __init__(self, router: RoutingService, writer: WritingService, thread: ThreadPoolExecutor) -> None:
        """`thread`: what routes and ranks, one; requests that come in the meantime are routed together then."""
        self._router, self.writer, self._thread = router, writer, thread
        self._batcher = RouteBatcher(partial(self._beside, router.route))

    @classmethod
    def load(cls, args: ServeArgs) -> "LocalBackend":
        """Read the artifact; see `WritingService.load` for errors."""
        folder: Path = args.artifact
        # With torch's own threads to the engine alone, see `EngineThread`, which must be the last to set them.
        thread = ThreadPoolExecutor(1, "routing", initializer=use_torch_threads, initargs=(1,))
        router = thread.submit(RoutingService.load, folder).result()
        writer = WritingService.load(folder, args.generator, args.limits.max_new_tokens, args.withhold)
        return cls(router, writer, thread)

    async def route(self, pairs: Sequence[Pair]) -> list[RoutedPair]:
        return await self._batcher.route(pairs)

    async def rank(self, request: RankRequest) -> Ranking:
        return await self._beside(self._router.rank, request)

    async def _beside(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """A call in the thread for routing."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    async def search(self, kind: str, query: str, limit: int) -> CatalogResponse:
        return self._router.browser.search(kind, query, limit)

    async def info(self) -> ServerInfo:
        about = self.writer.info
        return self._router.info(about.max_new_tokens, about.layers, about.experts)

    async def write(self, routed: RoutedPair, request: TextRequest) -> Written:
        try:
            return await self.writer.write(routed, request)
        except EngineFull as error:
            raise Overloaded(str(error)) from error

    async def stream(self, routed: RoutedPair, request: TextRequest) -> AsyncIterator[RoutedPair | Piece | Written]:
        try:
            async for event in self.writer.stream(routed, request):
                yield event
        except EngineFull as error:
            raise Overloaded(str(error)) from error

    async def ready(self) -> str:
        self.writer.check()
        return self._router.version
