"""cluster.yaml against Ray's schema, Kubernetes manifests against KubeRay's published fields, the image, Grafana."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from gavamoe.runtime.jobs import STEPS

ROOT = Path(__file__).parent.parent.parent

# Fields of ray.io/v1 as https://ray-project.github.io/kuberay/reference/api/ lists them, as far as we use objects.
FIELDS: dict[str, set[str]] = {
    "RayClusterSpec": {
        "suspend", "managedBy", "authOptions", "autoscalerOptions", "headServiceAnnotations", "enableInTreeAutoscaling",
        "gcsFaultToleranceOptions", "headGroupSpec", "rayVersion", "workerGroupSpecs",
    },
    "AuthOptions": {"mode"},
    "AutoscalerOptions": {
        "resources", "image", "imagePullPolicy", "securityContext", "idleTimeoutSeconds", "upscalingMode", "version",
        "env", "envFrom", "volumeMounts",
    },
    "HeadGroupSpec": {"template", "headService", "enableIngress", "rayStartParams", "serviceType"},
    "WorkerGroupSpec": {
        "suspend", "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "rayStartParams",
        "template", "scaleStrategy", "numOfHosts",
    },
    "RayJobSpec": {
        "activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata",
        "clusterSelector", "submitterConfig", "managedBy", "deletionStrategy", "entrypoint", "runtimeEnvYAML", "jobId",
        "submissionMode", "entrypointResources", "entrypointNumCpus", "entrypointNumGpus", "ttlSecondsAfterFinished",
        "shutdownAfterJobFinishes", "suspend",
    },
    "RayServiceSpec": {
        "serveService", "upgradeStrategy", "serveConfigV2", "rayClusterConfig", "excludeHeadPodFromServeSvc",
    },
}  # fmt: skip
CONTAINER = {
    "name",
    "image",
    "env",
    "envFrom",
    "ports",
    "resources",
    "volumeMounts",
    "readinessProbe",
    "livenessProbe",
    "securityContext",
}
POD = {
    "containers",
    "volumes",
    "nodeSelector",
    "tolerations",
    "terminationGracePeriodSeconds",
    "securityContext",
    "automountServiceAccountToken",
}


def documents(name: str) -> dict[str, dict[str, Any]]:
    """What a manifest makes, by kind."""
    document = yaml.safe_load((ROOT / name).read_text())
    return {item["kind"]: item for item in (document["items"] if document["kind"] == "List" else [document])}


def check_pod(template: dict[str, Any]) -> None:
    spec = template["spec"]
    assert spec.keys() <= POD
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    for container in spec["containers"]:
        assert container.keys() <= CONTAINER
        assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
        assert container["resources"]["requests"] == container["resources"]["limits"]


def check_cluster(spec: dict[str, Any]) -> None:
    import ray

    assert spec.keys() <= FIELDS["RayClusterSpec"]
    assert spec["rayVersion"] == ray.__version__, "the image holds this version"
    assert spec.get("autoscalerOptions", {}).keys() <= FIELDS["AutoscalerOptions"]
    head = spec["headGroupSpec"]
    assert head.keys() <= FIELDS["HeadGroupSpec"]
    assert head.get("serviceType", "ClusterIP") == "ClusterIP"
    assert not head.get("enableIngress")
    for group in (head, *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        check_pod(group["template"])
    for group in spec["workerGroupSpecs"]:
        assert group.keys() <= FIELDS["WorkerGroupSpec"]
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_kuberay_training_manifests() -> None:
    found = documents("cluster/kuberay.yaml")
    assert set(found) == {"RayCluster", "RayJob", "NetworkPolicy"}
    for kind in ("RayCluster", "RayJob"):
        assert found[kind]["apiVersion"] == "ray.io/v1"
        assert found[kind].keys() == {"apiVersion", "kind", "metadata", "spec"}
    job = found["RayJob"]["spec"]
    assert job.keys() <= FIELDS["RayJobSpec"]
    assert job["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
    assert job["shutdownAfterJobFinishes"] is True
    for spec in (found["RayCluster"]["spec"], job["rayClusterSpec"]):
        check_cluster(spec)
        assert spec["authOptions"] == {"mode": "token"}
        assert [group["minReplicas"] for group in spec["workerGroupSpecs"]] == [0], "GPUs from zero"
    [source] = found["NetworkPolicy"]["spec"]["ingress"]
    assert all("podSelector" in peer for peer in source["from"]), "nobody from outside"


def test_the_jobs_entrypoint_is_a_command_that_exists() -> None:
    words = documents("cluster/kuberay.yaml")["RayJob"]["spec"]["entrypoint"].split()
    script = Path(words[1])
    assert words[0] == "python"
    assert script.stem in STEPS
    assert str(script.parent.parent) == workdir(), "where the image has the code"
    from gavamoe.config.files import load_config

    overrides = [words[place + 1] for place, word in enumerate(words) if word == "--set"]
    assert load_config(words[2], overrides).runtime.workers == 8


def test_kuberay_serving_manifest() -> None:
    service = documents("serve/kuberay.yaml")["RayService"]
    assert service["apiVersion"] == "ray.io/v1"
    assert service["spec"].keys() <= FIELDS["RayServiceSpec"]
    check_cluster(service["spec"]["rayClusterConfig"])


@pytest.fixture
def cluster() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return found


def test_cluster_yaml_passes_rays_own_checks(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster)
    validate_config(prepared)
    assert prepared["available_node_types"]["gpu_spot"]["min_workers"] == 0
    broken = {**prepared, "idle_timeout_minute": 3}
    with pytest.raises(Exception, match="idle_timeout_minute"):
        validate_config(broken)


def test_cluster_yaml_is_closed_and_costs_nothing_idle(cluster: dict[str, Any]) -> None:
    starts = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    [head] = [command for command in starts if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in head
    assert not [command for command in starts if "0.0.0.0" in command]
    options = cluster["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    [token] = [o.split("=", 1)[1] for o in options if o.startswith("--env RAY_AUTH_TOKEN_PATH=")]
    assert token in cluster["file_mounts"]
    assert "IpPermissions" not in cluster["provider"]["security_group"], "Ray's default: SSH and the group itself"
    assert cluster["provider"]["cache_stopped_nodes"] is False
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    workers = types["gpu_spot"]
    assert workers["min_workers"] == 0
    assert workers["max_workers"] <= cluster["max_workers"]
    assert workers["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "--gpus all" in workers["docker"]["worker_run_options"]


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster/kuberay.yaml"])
def test_commands_in_the_comments_parse(name: str) -> None:
    """Every `gavamoe submit` there names a step, and only options that its command has."""
    text = re.sub(r" \\\n# +", " ", (ROOT / name).read_text())
    found = re.findall(r"gavamoe submit (\w+) (.*)", text)
    assert found
    for step, rest in found:
        assert step in STEPS
        assert set(re.findall(r"--[a-z-]+", rest)) <= {"--dataset", "--run-dir", "--set", "--driver-gpus"}


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile."""
    text = "\n".join(line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(line.split(" ", 1)[0], " ".join(line.split()[1:])) for line in lines if line.strip()]


def workdir() -> str:
    [found] = [arguments for instruction, arguments in dockerfile() if instruction == "WORKDIR"]
    return found


def copies() -> list[list[str]]:
    return [
        [part for part in arguments.split() if not part.startswith("--")]
        for instruction, arguments in dockerfile()
        if instruction == "COPY"
    ]


def test_the_images_first_layer_has_what_installing_reads() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    hatch = project["tool"]["hatch"]
    needed = {
        "pyproject.toml",
        "Makefile",
        "constraints.txt",
        project["project"]["readme"],
        *project["project"]["license-files"],
        hatch["version"]["path"],
        *hatch["build"]["targets"]["wheel"]["force-include"],
    }
    assert {source for *sources, _ in copies()[:-1] for source in sources} == needed


def test_the_image_holds_what_both_commands_need(tmp_path: Path) -> None:
    """A tree of what .dockerignore lets through: make knows both targets and the package starts from it."""
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in kept:
        assert (ROOT / name).exists(), f".dockerignore lets {name} through, which is not there"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert {path.split("/")[0] for path in tracked} <= set(kept), "all that is tracked is in the image"
    for name in kept:
        ignored = shutil.ignore_patterns("__pycache__")
        source = ROOT / name
        shutil.copytree(source, tmp_path / name, ignore=ignored) if source.is_dir() else shutil.copy(source, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".ready").touch()
    instructions = dockerfile()
    assert instructions[-1] == ("CMD", '["make", "quickstart"]')
    assert ("USER", "gavamoe") in instructions, "not root"
    alone = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    planned = subprocess.run(  # as if no `make test` were around it
        ["make", "--dry-run", "quickstart", "test"], cwd=tmp_path, env=alone, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    assert planned[:2] == [".venv/bin/gavamoe quickstart", ".venv/bin/pytest"]
    code = "import gavamoe, gavamoe.config.files as f; f.load_config('quickstart'); print(gavamoe.__file__)"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.strip() == str(tmp_path / "gavamoe" / "__init__.py")


def test_grafana_names_metrics_that_exist() -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    from gavamoe.runtime.worker import GAUGES

    board = json.loads((ROOT / "cluster" / "grafana.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    named = {name for expression in expressions for name in re.findall(r"\bray_[a-z_]+", expression)}
    ours = {f"ray_gavamoe_{name}" for name in GAUGES.values()}
    assert ours <= named, "all of ours are shown"
    assert named - ours <= {f"ray_{name}" for name in METRICS_GAUGES}
    assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource", "run"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
