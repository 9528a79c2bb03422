"""The service as Ray Serve deployments: `ClusterRouter`, `Generator`, and `Ingress` in front of them; or
`WholeService`, which is all three in one replica.

`build` is the app builder for `serve deploy`, KubeRay and `gavamoe serve`; each part scales by its own settings.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter, Gauge, Histogram
from starlette.types import ASGIApp

from gavamoe.errors import InputError, RunError
from gavamoe.generation.decoding_engine import EngineFull
from gavamoe.serving import schema
from gavamoe.serving.api import create_api
from gavamoe.serving.backend import Interrupted, LocalBackend, Overloaded, RouteBatcher, Unavailable
from gavamoe.serving.keys import environment_keys
from gavamoe.serving.routing import Pair, Ranking, RankRequest, RoutedPair, RoutingService
from gavamoe.serving.settings import GeneratorSettings, Scaling, ServeArgs, Withhold
from gavamoe.serving.writing import Piece, TextRequest, WriterInfo, WritingService, Written

_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]
_RETRY_PAUSE_S = 0.05


class ClusterRouter:
    """Stage 1: routes, ranks, and the catalog."""

    def __init__(self, artifact: str) -> None:
        self._router = RoutingService.load(Path(artifact))

    async def route(self, pairs: Sequence[Pair]) -> list[RoutedPair]:
        """Route the pairs of one request."""
        return self._router.route(pairs)

    async def rank(self, request: RankRequest) -> Ranking:
        """The best items of a user; in a thread, as it may look at all items."""
        return await asyncio.to_thread(self._router.rank, request)

    async def search(self, kind: str, query: str, limit: int) -> schema.CatalogResponse:
        """Look for users or items."""
        return await asyncio.to_thread(self._router.browser.search, kind, query, limit)

    async def info(self, about: WriterInfo) -> schema.ServerInfo:
        """What is being served."""
        return await asyncio.to_thread(self._router.info, about.max_new_tokens, about.layers, about.experts)


class Generator:
    """Stage 2: an engine that writes the texts of many requests at once."""

    def __init__(self, artifact: str, settings: GeneratorSettings, max_new_tokens: int, withhold: Withhold) -> None:
        self._writer = WritingService.load(Path(artifact), settings, max_new_tokens, withhold)
        self._health = EngineHealth(self._writer)

    async def write(self, routed: RoutedPair, request: TextRequest) -> Written:
        """One whole text."""
        return await self._writer.write(routed, request)

    async def stream(self, routed: RoutedPair, request: TextRequest) -> AsyncIterator[RoutedPair | Piece | Written]:
        """One text, piece by piece."""
        async for event in self._writer.stream(routed, request):
            yield event

    async def info(self) -> WriterInfo:
        """About the model; fails when no answer can be expected."""
        self._writer.check()
        return self._writer.info

    async def load(self) -> tuple[int, int]:
        """Texts being written, and texts that wait."""
        return self._writer.engine.load

    def check_health(self) -> None:
        """Called by Ray Serve every few seconds: a replica that fails is replaced."""
        self._health.check()

    def __del__(self) -> None:
        if hasattr(self, "_writer"):  # not if loading failed
            self._writer.engine.close()


class EngineHealth:
    """What Ray Serve and Prometheus are told of a replica's engine."""

    def __init__(self, writer: WritingService) -> None:
        self._writer = writer
        self._active = Gauge("gavamoe_engine_rows", "Texts being written by a generator replica.")
        self._waiting = Gauge("gavamoe_engine_waiting", "Texts that wait for a slot of a generator replica.")

    def check(self) -> None:
        """Raise RunError if no answer can be expected."""
        active, waiting = self._writer.engine.load
        self._active.set(active)
        self._waiting.set(waiting)
        self._writer.check()


@serve.ingress()
class Ingress:
    """HTTP in front of the other two."""

    def __init__(self, args: ServeArgs, router: DeploymentHandle, generator: DeploymentHandle) -> None:
        self._args = args
        self._backend = RayBackend(router, generator, args.limits.retries)
        self._metrics = Metrics()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray Serve when the replica starts."""
        return create_api(self._backend, self._args, self._metrics.observe, behind_serve=True)

    async def settings(self) -> dict[str, Any]:
        """What this service was told; see `described`."""
        return described(self._args)


@serve.ingress()
class WholeService:
    """HTTP, router and generator in one replica."""

    def __init__(self, args: ServeArgs) -> None:
        self._args = args
        self._backend = LocalBackend.load(args)
        self._health, self._metrics = EngineHealth(self._backend.writer), Metrics()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray Serve when the replica starts."""
        return create_api(self._backend, self._args, self._metrics.observe, behind_serve=True)

    async def settings(self) -> dict[str, Any]:
        """See `Ingress.settings`."""
        return described(self._args)

    def check_health(self) -> None:
        """See `Generator.check_health`."""
        self._health.check()

    def __del__(self) -> None:
        if hasattr(self, "_backend"):  # not if loading failed
            self._backend.writer.engine.close()


def described(args: ServeArgs) -> dict[str, Any]:
    """What a service was told, for `gavamoe serve --update`; and whether the environment holds API keys."""
    return {"args": args.model_dump(mode="json"), "environment_keys": bool(environment_keys())}


class Metrics:
    """Prometheus metrics of finished answers, in seconds; Ray exports them on each node's metrics port."""

    def __init__(self) -> None:
        self._parts = {
            part: Histogram(f"gavamoe_{part}_seconds", f"Seconds of an answer: {part}.", _SECONDS, tag_keys=("route",))
            for part in ("route", "queue", "prefill", "decode", "total")
        }
        self._tokens = Counter("gavamoe_new_tokens", "Tokens written.", tag_keys=("route",))
        self._answers = Counter("gavamoe_answers", "Finished answers.", tag_keys=("route", "user_known"))
        self._withheld = Counter("gavamoe_withheld", "Answers whose text was withheld.", tag_keys=("route",))

    def observe(self, route: str, answer: schema.Explanation) -> None:
        """Count one finished answer."""
        for part, histogram in self._parts.items():
            histogram.observe(getattr(answer.timings_ms, part) / 1000, tags={"route": route})
        self._tokens.inc(answer.new_tokens, tags={"route": route})
        self._answers.inc(tags={"route": route, "user_known": str(answer.user_known).lower()})
        if answer.finish_reason == "withheld":
            self._withheld.inc(tags={"route": route})


class RayBackend:
    """`backend.Backend` over deployment handles: tries another replica when one dies."""

    def __init__(self, router: DeploymentHandle, generator: DeploymentHandle, retries: int) -> None:
        self._router, self._generator, self._retries = router, generator, retries
        self._streaming = generator.options(stream=True)
        self._batcher = RouteBatcher(lambda pairs: self._call(self._router.route, pairs))

    async def route(self, pairs: Sequence[Pair]) -> list[RoutedPair]:
        return await self._batcher.route(pairs)

    async def rank(self, request: RankRequest) -> Ranking:
        return await self._call(self._router.rank, request)

    async def search(self, kind: str, query: str, limit: int) -> schema.CatalogResponse:
        return await self._call(self._router.search, kind, query, limit)

    async def info(self) -> schema.ServerInfo:
        return await self._call(self._router.info, await self._call(self._generator.info))

    async def write(self, routed: RoutedPair, request: TextRequest) -> Written:
        return await self._call(self._generator.write, routed, request)

    async def ready(self) -> str:
        about: WriterInfo = await self._call(self._generator.info)
        await self._call(self._router.route, [Pair("", "")])
        return about.model_version

    async def stream(self, routed: RoutedPair, request: TextRequest) -> AsyncIterator[RoutedPair | Piece | Written]:
        """Another replica takes over until the first piece of text was sent."""
        announced = wrote = False
        for attempt in range(self._retries + 1):
            responses = self._streaming.stream.remote(routed, request)
            try:
                async for event in responses:
                    if isinstance(event, RoutedPair):
                        if not announced:
                            yield event
                        announced = True
                        continue
                    wrote = True
                    yield event
                return
            except RayActorError as error:
                if wrote:
                    raise Interrupted from error
                await asyncio.sleep(_RETRY_PAUSE_S * 2**attempt)
            except Exception as error:
                raise _translated(error) from error
            finally:
                responses.cancel()  # frees the row when the client has gone; of no effect on a finished one
        raise Unavailable

    async def _call(self, method: Any, *arguments: Any) -> Any:
        for attempt in range(self._retries + 1):
            response = method.remote(*arguments)
            try:
                return await response
            except RayActorError:
                await asyncio.sleep(_RETRY_PAUSE_S * 2**attempt)
            except asyncio.CancelledError:
                response.cancel()
                raise
            except Exception as error:
                raise _translated(error) from error
        raise Unavailable


def _translated(error: Exception) -> Exception:
    """An error of a handle in the service's own terms; those of user code come wrapped with their traceback."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, InputError):
        return InputError(str(cause))
    if isinstance(cause, EngineFull | BackPressureError):
        return Overloaded(str(cause))
    if isinstance(cause, DeploymentUnavailableError | RequestCancelledError | TaskCancelledError):
        return Unavailable(str(cause))
    if isinstance(cause, RunError):
        return Unavailable(str(cause))
    return error


def build(args: ServeArgs) -> serve.Application:
    """The application: `import_path: gavamoe.serving.deployments:build` in a Serve config file."""
    artifact, limits, generator = str(args.artifact.absolute()), args.limits, args.generator
    environment = {"OMP_NUM_THREADS": str(generator.threads), "TOKENIZERS_PARALLELISM": "false"}
    writing = {"health_check_period_s": 2, "health_check_timeout_s": 10}
    http = {
        # Above what the ingress itself admits, bodies that it waits for included: it answers 429 in the interface's own
        # form, and health checks always find room. Ray's is the second line.
        "max_ongoing_requests": limits.max_in_flight + limits.max_unfinished_bodies + 64,
        "max_queued_requests": limits.max_in_flight,
        "backpressure_config": {"status_code": 429, "retry_after_s": limits.retry_after_s},
    }
    finishing = {"graceful_shutdown_timeout_s": limits.request_timeout_s + 5}
    if not args.composed:
        scaled = _scaled(args.generator_scaling, environment)
        # Under the name that `serve --update` asks for the settings.
        return serve.deployment(WholeService, name="Ingress", **http, **writing, **finishing, **scaled).bind(args)
    router = serve.deployment(
        ClusterRouter,
        max_ongoing_requests=256,
        max_queued_requests=limits.max_in_flight,
        **_scaled(args.router_scaling, environment),
    ).bind(artifact)
    writers = serve.deployment(
        Generator,
        max_ongoing_requests=generator.slots + generator.max_waiting,
        max_queued_requests=max(generator.max_waiting, 1),
        **writing,
        **finishing,
        **_scaled(args.generator_scaling, environment),
    ).bind(artifact, generator, limits.max_new_tokens, args.withhold)
    ingress = serve.deployment(Ingress, **http, **finishing, **_scaled(args.ingress_scaling, environment))
    return ingress.bind(args, router, writers)


def _scaled(scaling: Scaling, environment: dict[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = {
        "ray_actor_options": {
            "num_cpus": scaling.num_cpus,
            "num_gpus": scaling.num_gpus,
            "runtime_env": {"env_vars": environment},
        },
        "max_surge_percent": scaling.max_surge_percent,
        "rolling_update_percentage": 1.0 if scaling.max_surge_percent == 100 else 0.2,
    }
    if scaling.min_replicas == scaling.max_replicas:
        return options | {"num_replicas": scaling.min_replicas}
    return options | {
        "autoscaling_config": {
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": scaling.target_ongoing_requests,
        }
    }
