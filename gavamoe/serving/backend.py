"""What the HTTP interface stands on: routing and writing, wherever they run.

`LocalBackend` has both in this process; `deployments.RayBackend` calls other replicas.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Protocol

from gavamoe.generation.decoding_engine import EngineFull
from gavamoe.serving.routing import Pair, Ranking, RankRequest, RoutedPair, RoutingService
from gavamoe.serving.schema import CatalogResponse, ServerInfo
from gavamoe.serving.settings import ServeArgs
from gavamoe.serving.writing import Piece, TextRequest, WritingService, Written


class Overloaded(Exception):
    """No room for the request now; it was not begun."""


class Unavailable(Exception):
    """The replicas that were tried could not be reached."""


class Interrupted(Exception):
    """A text broke off after some of it had been sent."""


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


class LocalBackend:
    """Both stages in this process."""

    def __init__(self, router: RoutingService, writer: WritingService) -> None:
        self._router, self.writer = router, writer

    @classmethod
    def load(cls, args: ServeArgs) -> "LocalBackend":
        """Read the artifact; see `WritingService.load` for errors."""
        folder: Path = args.artifact
        writer = WritingService.load(folder, args.generator, args.limits.max_new_tokens, args.withhold)
        return cls(RoutingService.load(folder), writer)

    async def route(self, pairs: Sequence[Pair]) -> list[RoutedPair]:
        return self._router.route(pairs)

    async def rank(self, request: RankRequest) -> Ranking:
        return await asyncio.to_thread(self._router.rank, request)

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
