"""The HTTP interface: FastAPI over a `Backend`. docs/serve.md describes it for clients."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, Generic, TypeVar

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from gavamoe import __version__
from gavamoe.data import bounds
from gavamoe.errors import InputError
from gavamoe.serving import errors, schema
from gavamoe.serving.backend import Backend, Interrupted, Overloaded
from gavamoe.serving.keys import ApiKeys
from gavamoe.serving.pages import page_router
from gavamoe.serving.routing import Pair, RankRequest, RoutedPair
from gavamoe.serving.security import Gate, Guard
from gavamoe.serving.settings import Browse, Limits, ServeArgs
from gavamoe.serving.writing import Piece, TextRequest, Written

T = TypeVar("T")
REMEMBERED_S = 1.0
"""Seconds for which `/readyz` and `/v1/info` repeat their last answer."""
REMEMBERED_MOST_S = 5.0
"""Seconds after which such an answer is given up."""
Observe = Callable[[str, schema.Explanation], None]
"""Told the route and every finished answer: for metrics."""


class Remembered(Generic[T]):
    """An answer that is the same for everyone, asked for once a second however many want it; failures are remembered
    likewise. A caller that goes away does not take the answer from the others."""

    def __init__(self, ask: Callable[[], Awaitable[T]]) -> None:
        self._ask = ask
        self._asked: asyncio.Task[T] | None = None
        self._since = 0.0

    async def __call__(self) -> T:
        """The answer; raises what asking for it raised."""
        now = time.monotonic()
        if self._asked is None or (self._asked.done() and now - self._since > REMEMBERED_S):
            self._asked = asyncio.ensure_future(self._answer())
            self._since = now
        return await asyncio.shield(self._asked)

    async def _answer(self) -> T:
        async with asyncio.timeout(REMEMBERED_MOST_S):  # or one answer that never comes would be waited for by all
            return await self._ask()


class Service:
    """The requests' logic: admission, time limit, routing, writing, answers."""

    def __init__(self, backend: Backend, limits: Limits, observe: Observe | None = None) -> None:
        self.backend, self.limits = backend, limits
        self.in_flight = 0
        self.info, self.ready = Remembered(backend.info), Remembered(backend.ready)
        self._observe = observe or (lambda route, answer: None)

    def enter(self) -> None:
        """Count a request in, or turn it away; `leave` counts it out."""
        if self.in_flight >= self.limits.max_in_flight:
            raise Overloaded("too many requests are in progress")
        self.in_flight += 1

    def leave(self) -> None:
        """The end of a request that entered."""
        self.in_flight -= 1

    async def admitted(self) -> AsyncIterator[None]:
        """FastAPI dependency: the request counts until it is answered."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    async def explain(self, request: schema.ExplainRequest) -> schema.Explanation:
        """One whole explanation."""
        started = time.perf_counter()
        text = self.text_request(request)
        async with asyncio.timeout(self.limits.request_timeout_s):
            [routed] = await self.backend.route([_pair(request)])
            return await self._answer("explain", routed, text, started)

    async def explain_batch(self, request: schema.BatchRequest) -> schema.BatchResponse:
        """Many explanations, written side by side."""
        started = time.perf_counter()
        if len(request.requests) > self.limits.max_batch:
            raise InputError(f"requests: {len(request.requests)} pairs; this server takes {self.limits.max_batch}")
        text = self.text_request(request)
        async with asyncio.timeout(self.limits.request_timeout_s):
            routed = await self.backend.route([_pair(item) for item in request.requests])
            return schema.BatchResponse(results=await self._answers("batch", routed, text, started))

    async def recommend(self, request: schema.RecommendRequest, *, exclude_seen: bool) -> schema.RecommendResponse:
        """Ranked items, explained unless only ranks are wanted."""
        started = time.perf_counter()
        if request.explain and request.k > self.limits.max_batch:
            raise InputError(f"k: {request.k} explanations; this server writes {self.limits.max_batch} at once")
        text = self.text_request(request)
        async with asyncio.timeout(self.limits.request_timeout_s):
            history = tuple(request.history)
            candidates = None if request.candidates is None else tuple(request.candidates)
            ranking = await self.backend.rank(RankRequest(request.user, request.k, candidates, exclude_seen, history))
            pairs = [Pair(request.user, item, history=history) for item in ranking.items]
            routed = await self.backend.route(pairs) if pairs else []
            answers: list[Any] = [None] * len(routed)
            if request.explain:
                answers = await self._answers("recommend", routed, text, started)
        return schema.RecommendResponse(
            user=request.user,
            user_known=ranking.user_known,
            ranked=ranking.compared,
            unknown_candidates=ranking.unknown,
            items=[
                schema.RankedItem(
                    rank=rank,
                    item=pair.pair.item,
                    title=pair.filled.title,
                    predicted_rating=pair.filled.predicted_rating,
                    cluster=pair.filled.cluster,
                    explanation=answer,
                )
                for rank, (pair, answer) in enumerate(zip(routed, answers, strict=True), 1)
            ],
            model_version=routed[0].model_version if routed else (await self.info()).model_version,
        )

    async def route(self, request: schema.PairRequest) -> schema.RouteResponse:
        """Stage 1 alone."""
        async with asyncio.timeout(self.limits.request_timeout_s):
            [routed] = await self.backend.route([Pair(request.user, request.item, history=tuple(request.history))])
        return schema.RouteResponse(**_route(routed))

    async def look_up(self, answer: Awaitable[T]) -> T:
        """An answer from the catalog, within the time limit."""
        async with asyncio.timeout(self.limits.request_timeout_s):
            return await answer

    async def open_stream(self, request: schema.ExplainRequest, request_id: str | None) -> Response:
        """Begin to write; whatever goes wrong up to here is an ordinary error answer."""
        started = time.perf_counter()
        text = self.text_request(request)
        self.enter()
        try:
            async with asyncio.timeout(self.limits.request_timeout_s):
                [routed] = await self.backend.route([_pair(request)])
                events = self.backend.stream(routed, text)
                first = await anext(events)
        except BaseException:
            self.leave()
            raise
        body = self._events(first, events, started, request_id)
        return EventStream(body, events, self.leave)

    async def _events(
        self, first: Any, events: AsyncIterator[RoutedPair | Piece | Written], started: float, request_id: str | None
    ) -> AsyncIterator[str]:
        """Server-sent events: route, token (many), and last either done or error."""
        limit = self.limits.request_timeout_s - (time.perf_counter() - started)
        try:
            async with asyncio.timeout(limit):
                yield self._event(first, started)
                async for event in events:
                    yield self._event(event, started)
        except Interrupted:
            body = errors.detail("interrupted", "the replica that wrote this text was lost; ask again", request_id)
            yield _sse("error", body.model_dump())
        except Exception as error:  # noqa: BLE001 - headers are sent: the stream itself must say that it failed
            _, body = errors.describe(error, self.limits.request_timeout_s, request_id)
            yield _sse("error", body.model_dump())

    def _event(self, event: RoutedPair | Piece | Written, started: float) -> str:
        if isinstance(event, RoutedPair):
            return _sse("route", _route(event))
        if isinstance(event, Piece):
            return _sse("token", {"text": event.text, "tokens": event.tokens})
        answer = explanation(event, event.routed.seconds, time.perf_counter() - started)
        self._observe("stream", answer)
        return _sse("done", answer.model_dump())

    def text_request(self, options: schema.TextOptions) -> TextRequest:
        """The server's own limit on length, applied."""
        limit = self.limits.max_new_tokens
        if options.max_new_tokens is not None and options.max_new_tokens > limit:
            raise InputError(f"max_new_tokens: {options.max_new_tokens} is above this server's {limit}")
        return TextRequest(options.max_new_tokens, options.temperature, options.top_p, options.seed, options.trace)

    async def _answer(self, route: str, routed: RoutedPair, text: TextRequest, started: float) -> schema.Explanation:
        written = await self.backend.write(routed, text)
        answer = explanation(written, routed.seconds, time.perf_counter() - started)
        self._observe(route, answer)
        return answer

    async def _answers(
        self, route: str, routed: list[RoutedPair], text: TextRequest, started: float
    ) -> list[schema.Explanation]:
        """Texts side by side; the first that fails ends the others."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._answer(route, pair, text, started)) for pair in routed]
        except ExceptionGroup as errors_of_tasks:
            raise errors_of_tasks.exceptions[0] from errors_of_tasks
        return [task.result() for task in tasks]


class EventStream(StreamingResponse):
    """A stream that is closed behind, even when its client was gone before the first byte."""

    def __init__(self, body: AsyncIterator[str], events: Any, leave: Callable[[], None]) -> None:
        super().__init__(body, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        self._events, self._leave = events, leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()
            await self._events.aclose()


def explanation(written: Written, route_s: float, total_s: float) -> schema.Explanation:
    """The answer for a finished text."""
    routed, timings = written.routed, written.timings
    return schema.Explanation(
        **_route(routed),
        text=written.text,
        rating=routed.filled.rating,
        rating_given=routed.pair.rating is not None,
        features=list(routed.filled.features),
        features_given=routed.pair.features is not None,
        new_tokens=written.new_tokens,
        finish_reason=written.finish_reason,
        experts=written.experts,
        timings_ms=schema.TimingsMs(
            route=_ms(route_s),
            queue=_ms(timings.queue),
            prefill=_ms(timings.prefill),
            decode=_ms(timings.decode),
            total=_ms(total_s),
        ),
    )


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _route(routed: RoutedPair) -> dict[str, Any]:
    return {
        "user": routed.pair.user,
        "item": routed.pair.item,
        "item_title": routed.filled.title,
        "user_known": routed.filled.user_known,
        "item_known": routed.filled.item_known,
        "history_entries": len(routed.pair.history),
        "cluster": routed.filled.cluster,
        "responsibilities": list(routed.filled.responsibilities),
        "predicted_rating": routed.filled.predicted_rating,
        "model_version": routed.model_version,
    }


def _pair(item: schema.ExplainItem) -> Pair:
    features = None if item.features is None else tuple(item.features)
    return Pair(item.user, item.item, item.rating, features, tuple(item.history))


def _sse(event: str, data: dict[str, Any]) -> str:
    return f"event: {event}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


def create_api(
    backend: Backend, args: ServeArgs, observe: Observe | None = None, *, behind_serve: bool = False
) -> ASGIApp:
    """The whole ASGI application.

    Args:
        behind_serve: Ray Serve is in front, and sends the request id itself.

    Raises:
        InputError: the API keys can't be used.
    """
    service = Service(backend, args.limits, observe)
    keys = ApiKeys.read(args)
    app = FastAPI(
        title="GaVaMoE",
        version=__version__,
        summary="Why is this recommended to me?",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # the target would be plain http and the client's own Host header
    )
    errors.install(app, args.limits.request_timeout_s, args.limits.retry_after_s)
    app.include_router(_interface(service, args.browse, keys))
    app.include_router(_health(service))
    if args.page:
        app.include_router(page_router(app))
    app.add_middleware(Gate, keys=keys, limits=args.limits)
    if args.allowed_origins:  # around the gate: what asks whether it may ask has no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(args.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-api-key"],
        )
    return Guard(app, answers_with_id=not behind_serve)


def _interface(service: Service, allowed: Browse, keys: ApiKeys) -> APIRouter:
    router = APIRouter(prefix="/v1", responses=errors.DOCUMENTED)  # type: ignore[arg-type]
    busy = [Depends(service.admitted)]

    @router.post("/explain", response_model=schema.Explanation, summary="Explain one pair")
    async def explain(request: schema.ExplainRequest, raw: Request) -> Any:
        if request.stream:
            return await service.open_stream(request, raw.state.request_id)
        service.enter()
        try:
            return await service.explain(request)
        finally:
            service.leave()

    @router.post("/explain/batch", dependencies=busy, summary="Explain many pairs")
    async def explain_batch(request: schema.BatchRequest) -> schema.BatchResponse:
        return await service.explain_batch(request)

    @router.post("/recommend", dependencies=busy, summary="Rank items for a user and explain the first")
    async def recommend(request: schema.RecommendRequest) -> schema.RecommendResponse:
        if request.exclude_seen and not allowed.exclude_seen:
            raise HTTPException(403, "this server does not tell what a user has reviewed: leave exclude_seen out")
        leave_out = request.candidates is None and allowed.exclude_seen and request.exclude_seen is not False
        return await service.recommend(request, exclude_seen=leave_out)

    @router.post("/route", dependencies=busy, summary="Cluster and predicted rating of one pair")
    async def route(request: schema.PairRequest) -> schema.RouteResponse:
        return await service.route(request)

    _browsing(router, service, allowed, keys)
    return router


def _browsing(router: APIRouter, service: Service, allowed: Browse, keys: ApiKeys) -> None:
    busy = [Depends(service.admitted)]
    Search = Annotated[str, Query(max_length=bounds.MAX_ID_CHARS)]
    Limit = Annotated[int, Query(ge=1, le=100)]

    @router.get("/items", dependencies=busy, summary="Find items by id or title")
    async def items(query: Search = "", limit: Limit = 20) -> schema.CatalogResponse:
        return await service.look_up(service.backend.search("items", query, limit))

    @router.get("/users", dependencies=busy, summary="Find users by id, where the server lists them")
    async def users(query: Search = "", limit: Limit = 20) -> schema.CatalogResponse:
        listed = not keys.required if allowed.users is None else allowed.users
        if not listed:
            raise HTTPException(403, "this server does not list users")
        return await service.look_up(service.backend.search("users", query, limit))

    @router.get("/info", dependencies=busy, summary="What is being served, and what its clusters are about")
    async def info() -> schema.ServerInfo:
        return await service.look_up(service.info())


def _health(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/healthz", summary="This process answers")
    async def healthz() -> schema.Status:
        return schema.Status(status="ok")

    @router.get("/readyz", summary="A request could be answered now", responses={503: {"model": schema.Status}})
    async def readyz(response: Response) -> schema.Status:
        try:
            async with asyncio.timeout(5):
                return schema.Status(status="ready", detail=await service.ready())
        except Exception as error:  # noqa: BLE001 - whatever it is, the answer is "not ready"
            response.status_code = 503
            return schema.Status(status="not ready", detail=type(error).__name__)

    return router
