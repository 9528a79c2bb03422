"""The Serve config files say what the app builder takes; the app has the parts and limits that they ask for."""

import asyncio
import os
import stat
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import yaml

from gavamoe.errors import InputError
from gavamoe.serving.launch import read_args
from gavamoe.serving.routing import Pair
from gavamoe.serving.settings import ServeArgs

FOLDER = Path(__file__).parent.parent.parent / "serve"


def configs() -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        document = yaml.safe_load(path.read_text())
        if "items" in document:
            document = yaml.safe_load(document["items"][0]["spec"]["serveConfigV2"])
        found[path.name] = document
    return found


@pytest.mark.parametrize("name", configs())
def test_config_files_are_valid(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = configs()[name]
    schema = ServeDeploySchema.model_validate(config)
    [application] = schema.applications
    module, _, function = application.import_path.partition(":")
    assert (module, function) == ("gavamoe.serving.deployments", "build")
    args = ServeArgs.model_validate(application.args)
    for scaling in (args.router_scaling, args.generator_scaling, args.ingress_scaling):
        assert scaling.min_replicas <= scaling.max_replicas
    assert "kuberay" in name or config["http_options"]["host"] == "127.0.0.1"


def test_pods_are_restricted_and_reached_by_one_port() -> None:
    service, policy = yaml.safe_load((FOLDER / "kuberay.yaml").read_text())["items"]
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        [container] = pod["containers"]
        allowed = container["securityContext"]
        assert (allowed["allowPrivilegeEscalation"], allowed["readOnlyRootFilesystem"]) == (False, True)
        assert allowed["capabilities"] == {"drop": ["ALL"]}
        assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}
    assert (policy["kind"], policy["spec"]["policyTypes"]) == ("NetworkPolicy", ["Ingress"])
    own, clients = policy["spec"]["ingress"]
    assert all("podSelector" in peer for peer in own["from"]), "nobody from outside"
    assert clients["ports"] == [{"port": 8000, "protocol": "TCP"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("generator: {slots: yes}", "generator.slots: True: input should be a number, not true or false"),
        ("router_scaling: {num_cpus: on}", "router_scaling.num_cpus: True: input should be a number"),
        ("limits: {retries: 1, retries: 2}", "retries is given twice, in lines 1 and 1"),
        ("generator_scaling: 3", "generator_scaling: 3: input should be a valid dictionary"),
        ("- page", "expected the arguments of the app builder"),
    ],
)
def test_wrong_settings_are_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(text)
    replicas = {"generator_scaling": {"min_replicas": 2, "max_replicas": 2}}
    with pytest.raises(InputError, match=rf"^{tmp_path}/s\.yaml: ") as caught:
        read_args(tmp_path, tmp_path / "s.yaml", replicas)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_app_is_built_as_asked(tmp_path: Path) -> None:
    from gavamoe.serving.deployments import build

    args = ServeArgs.model_validate(
        {
            "run": str(tmp_path),
            "generator": {"slots": 5, "max_waiting": 7, "threads": 3, "device": "cuda"},
            "generator_scaling": {"min_replicas": 1, "max_replicas": 4, "num_gpus": 1},
        }
    )
    app = build(args)
    ingress = app._bound_deployment
    router, generator = (bound._bound_deployment for bound in ingress.init_args[1:])
    assert [ingress.name, router.name, generator.name] == ["Ingress", "ClusterRouter", "Generator"]
    assert generator.max_ongoing_requests == 12
    scaling = generator._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 4)
    options = generator.ray_actor_options
    assert options["num_gpus"] == 1
    assert options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == "3"
    assert ingress._deployment_config.backpressure_config.status_code == 429


def test_all_in_one_replica_is_one_deployment(tmp_path: Path) -> None:
    from gavamoe.serving.deployments import WholeService, build

    scaling = {"min_replicas": 2, "max_replicas": 2, "num_cpus": 1}
    args = ServeArgs.model_validate({"run": str(tmp_path), "composed": False, "generator_scaling": scaling})
    [whole] = [build(args)._bound_deployment]
    assert (whole.name, whole.func_or_class.__name__) == ("Ingress", WholeService.__name__)
    assert whole.init_args == (args,)
    assert whole.num_replicas == 2
    assert whole._deployment_config.backpressure_config.status_code == 429
    assert whole._deployment_config.health_check_period_s == 2
    assert args.reserved_cpus == 2, "no other deployment reserves anything"


def test_builder_arguments_are_typed() -> None:
    for wrong in ({"run": "x", "slots": 3}, {"run": "x", "limits": {"max_batch": 65}}, {}):
        with pytest.raises(ValueError, match=r"slots|max_batch|run"):
            ServeArgs.model_validate(wrong)


def test_the_way_through_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """HAProxy where there is one, its sockets out of others' reach; what is set already stays."""
    from gavamoe.serving import launch, proxy

    def prepared(found: bool, **given: str) -> dict[str, str]:
        monkeypatch.setattr(os, "environ", dict(given))
        monkeypatch.setattr(proxy, "binary", lambda: "/usr/sbin/haproxy" if found else None)
        with launch.prepared_environment():
            if "RAY_SERVE_HAPROXY_SOCKET_PATH" in os.environ:
                folder = Path(os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
                assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            return dict(os.environ)

    fast = prepared(True, RAY_SERVE_HAPROXY_STATS_PORT="8404")
    assert fast["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert fast["RAY_SERVE_HAPROXY_STATS_PORT"] == "8404"
    assert "RAY_SERVE_ENABLE_DIRECT_INGRESS" not in fast
    for slow in (prepared(False), prepared(True, RAY_SERVE_ENABLE_HA_PROXY="0")):
        assert slow["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "0", "or replicas would listen with no proxy before them"
        assert slow.get("RAY_SERVE_ENABLE_HA_PROXY", "0") == "0"


def test_requests_that_come_during_a_call_share_the_next_one() -> None:
    from gavamoe.serving.backend import RouteBatcher

    calls: list[list[str]] = []

    async def call(pairs: Sequence[Any]) -> list[Any]:
        calls.append([pair.user for pair in pairs])
        await asyncio.sleep(0.02)
        if any(pair.rating == 9 for pair in pairs):
            raise InputError("rating 9")
        return [f"route of {pair.user}" for pair in pairs]

    async def ask() -> list[Any]:
        together = RouteBatcher(call)
        first = asyncio.create_task(together.route([Pair("a", "i")]))
        await asyncio.sleep(0.005)
        others = [together.route([Pair("b", "i"), Pair("c", "i")]), together.route([Pair("d", "i", 9)])]
        found = await asyncio.gather(first, *others, return_exceptions=True)
        return [*found, await together.route([Pair("e", "i")])]

    one, two, wrong, later = asyncio.run(ask())
    assert (one, two, later) == (["route of a"], ["route of b", "route of c"], ["route of e"])
    assert isinstance(wrong, InputError), "and it alone"
    assert calls == [["a"], ["b", "c", "d"], ["b", "c"], ["d"], ["e"]]


def test_a_call_that_is_cancelled_does_not_end_routing() -> None:
    """Ray Serve cancels the calls of a request whose client is gone: those who were routed with it are answered."""
    from gavamoe.serving.backend import RouteBatcher, Unavailable

    client = ContextVar("client", default="nobody")
    calls: list[tuple[str, int]] = []

    async def call(pairs: Sequence[Pair]) -> Any:
        calls.append((client.get(), len(pairs)))
        await asyncio.sleep(0.01)
        if len(calls) in (2, 4):
            raise asyncio.CancelledError
        return [pair.user for pair in pairs]

    async def ask(name: str, together: RouteBatcher) -> Any:
        client.set(name)
        return await asyncio.wait_for(together.route([Pair(name, "item")]), 5)

    async def run() -> list[Any]:
        together = RouteBatcher(call)
        asked = [asyncio.create_task(ask("first", together))]
        await asyncio.sleep(0.002)
        asked += [asyncio.create_task(ask(name, together)) for name in ("second", "third")]
        answers: list[Any] = await asyncio.gather(*asked, return_exceptions=True)
        return [*answers, await ask("later", together)]

    first, second, third, later = asyncio.run(run())
    assert (first, second) == (["first"], ["second"])
    assert isinstance(third, Unavailable), "cancelled when it stood alone too"
    assert later == ["later"]
    assert calls == [("nobody", 1), ("nobody", 2), ("nobody", 1), ("nobody", 1), ("nobody", 1)]


@pytest.mark.parametrize(("generator", "gpus"), [({"device": "cuda"}, 0), ({}, 1), ({"device": "cpu"}, 0.5)])
def test_a_gpu_is_used_where_it_is_reserved_and_only_there(generator: dict[str, str], gpus: float) -> None:
    with pytest.raises(ValueError, match=r"device: cuda and generator_scaling\.num_gpus"):
        ServeArgs.model_validate({"run": "x", "generator": generator, "generator_scaling": {"num_gpus": gpus}})
