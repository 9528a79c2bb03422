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
from helpers.cli import Runner

from gavamoe.runtime.jobs import STEPS
from gavamoe.serving.settings import ServeArgs

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


def test_kuberay_serving_on_gpus() -> None:
    """By the manifest's comment: generators as serve/gpu.yaml has them, each with room in a pod of the group."""
    spec = documents("serve/kuberay.yaml")["RayService"]["spec"]
    [application] = yaml.safe_load(spec["serveConfigV2"])["applications"]
    [on_gpus] = yaml.safe_load((ROOT / "serve/gpu.yaml").read_text())["applications"]
    taken = {name: on_gpus["args"][name] for name in ("generator", "generator_scaling")}
    settings = ServeArgs.model_validate(application["args"] | taken)
    assert settings.generator.device == "cuda"
    workers, gpus = spec["rayClusterConfig"]["workerGroupSpecs"]
    [pod], [plain] = (group["template"]["spec"]["containers"] for group in (gpus, workers))
    assert pod["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert settings.generator_scaling.num_gpus == 1
    assert settings.generator_scaling.num_cpus <= int(pod["resources"]["limits"]["cpu"])
    assert settings.generator_scaling.max_replicas <= gpus["maxReplicas"]
    assert {**pod, "resources": None} == {**plain, "resources": None}
    assert gpus["template"]["spec"]["securityContext"] == workers["template"]["spec"]["securityContext"]


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
        assert set(re.findall(r"--[a-z-]+", rest)) <= {"--dataset", "--run-dir", "--set"}


Stage = list[tuple[str, str]]
"""(instruction, arguments) of a stage of the Dockerfile, after its FROM."""


def stages() -> dict[str, tuple[str, Stage]]:
    """Name -> the stage or image it begins with, and what it does, in the order of the Dockerfile."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    found: dict[str, tuple[str, Stage]] = {}
    current: Stage = []
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        instruction, _, arguments = " ".join(line.split()).partition(" ")
        if instruction == "FROM":
            below, _, name = arguments.partition(" AS ")
            found[name] = below, (current := [])
        elif instruction:
            current.append((instruction, arguments))
    return found


def image(name: str) -> Stage:
    """All that makes a stage, from its base on."""
    below, own = stages()[name]
    return (image(below) if below in stages() else []) + own


def last(stage: Stage, instruction: str) -> str:
    return [arguments for each, arguments in stage if each == instruction][-1]


def copied(stage: Stage) -> set[str]:
    words = [arguments.split() for instruction, arguments in stage if instruction == "COPY"]
    return {word for each in words for word in each[:-1] if not word.startswith("--")}


def commands(stage: Stage) -> str:
    return "\n".join(arguments for instruction, arguments in stage if instruction == "RUN")


def workdir() -> str:
    [found] = {arguments for name in stages() for each, arguments in image(name) if each == "WORKDIR"}
    return found


def dry_run(folder: Path, *targets: str) -> list[str]:
    """The commands of make, as if no `make test` were around it."""
    alone = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(
        ["make", "--dry-run", *targets], cwd=folder, env=alone, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_the_wheels_are_made_from_what_building_reads(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    hatch = project["tool"]["hatch"]
    made = image("package")
    assert copied(made) == {
        "Makefile",
        "constraints.hashes.txt",
        "pyproject.toml",
        "gavamoe",
        project["project"]["readme"],
        *project["project"]["license-files"],
        *hatch["build"]["targets"]["wheel"]["force-include"],
    }
    shutil.copy(ROOT / "Makefile", tmp_path)
    *_, tools, packages, package = dry_run(tmp_path, "wheels", "package", "WHEELS=/wheels")
    for command in (tools, packages):
        assert "--require-hashes" in command
    assert "--no-build-isolation --wheel-dir /wheels --requirement constraints.hashes.txt" in packages
    assert "--no-index --no-deps --no-build-isolation" in package
    assert "make wheels WHEELS=/wheels" in commands(made)
    assert "make package WHEELS=/wheels" in commands(made)


def test_images_install_from_these_wheels_alone() -> None:
    for name in ("serve", "full"):
        for command in re.findall(r"pip install [^&]*", commands(image(name))):
            assert "--no-index" in command, command
            assert "--find-links /wheels" in command or "--no-deps" in command, command
        _, own = stages()[name]
        assert re.search(r"--mount=type=bind,from=(wheels|package),source=/wheels,target=/wheels", commands(own))


def test_the_image_of_the_service_has_what_it_needs_and_no_more() -> None:
    serve = image("serve")
    installed = set(re.findall(r"install --yes --no-install-recommends ([a-z0-9. +-]+)", commands(serve)))
    assert {word for words in installed for word in words.split()} == {"wget"}
    assert "find-links /wheels gavamoe" in commands(serve), "no extra"
    assert copied(serve) == set(), "the package is all of ours that is in it"
    assert last(serve, "USER") == "gavamoe", "not root"
    command = json.loads(last(serve, "CMD"))
    assert command[0] == "gavamoe"
    manifest = documents("serve/kuberay.yaml")["RayService"]["spec"]
    assert command[2] == yaml.safe_load(manifest["serveConfigV2"])["applications"][0]["args"]["run"]
    [pod] = manifest["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert pod["image"].split("/")[-1].startswith("gavamoe-serve:")
    [launcher] = [each["value"] for each in pod["env"] if each["name"] == "RAY_SERVE_HAPROXY_BINARY_PATH"]
    assert f"gavamoe.serving.proxy {Path(launcher).parent}" in commands(serve)
    assert str(Path(launcher).parent.parent) == workdir()


def test_the_command_of_the_service_image_asks_for_keys(gavamoe: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is understood, and serves nobody who has no key."""
    from helpers.serve_run import tiny_artifact

    monkeypatch.delenv("GAVAMOE_API_KEYS", raising=False)
    _, *arguments = json.loads(last(image("serve"), "CMD"))
    refused = gavamoe(*[tiny_artifact() if each == "/runs/quickstart" else each for each in arguments])
    assert refused.code == 2, refused.err
    assert "no API key is set" in refused.err


def test_the_other_image_holds_what_both_commands_need(tmp_path: Path) -> None:
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
    assert list(stages())[-1] == "full", "what is built where no target is named"
    full = image("full")
    assert last(full, "CMD") == '["make", "quickstart"]'
    assert last(full, "USER") == "gavamoe", "not root"
    assert "." in copied(full)
    assert dry_run(tmp_path, "quickstart", "test") == [
        ".venv/bin/gavamoe quickstart",
        ".venv/bin/pytest --numprocesses 2",
    ]
    code = "import gavamoe, gavamoe.config.files as f; f.load_config('quickstart'); print(gavamoe.__file__)"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.strip() == str(tmp_path / "gavamoe" / "__init__.py")


def test_commands_are_found_in_login_shells(tmp_path: Path) -> None:
    """Ray's launcher runs its commands by `bash --login`, where Debian's /etc/profile sets PATH anew."""
    [line] = re.findall(r"echo '(.*)' > /etc/profile\.d/gavamoe\.sh", (ROOT / "Dockerfile").read_text())
    scripts = tmp_path / "venv" / "bin"
    scripts.mkdir(parents=True)
    (scripts / "ray").write_text("#!/bin/sh\n")
    (scripts / "ray").chmod(0o755)
    assert f"{workdir()}/.venv/bin" in line
    profile = tmp_path / ".bash_profile"  # read by login shells after /etc/profile, as /etc/profile.d is by Debian's
    profile.write_text(line.replace(f"{workdir()}/.venv/bin", str(scripts)) + "\n")
    shell = ["env", "-i", f"HOME={tmp_path}", "bash", "--login", "-c", "command -v ray"]
    assert subprocess.run(shell, capture_output=True, text=True, check=True).stdout.strip() == str(scripts / "ray")


def test_the_image_names_no_base_that_it_does_not_build_on() -> None:
    """Ubuntu's images own uid 1000, and CUDA's bring another CUDA than torch's wheels, which need none of it."""
    text = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^ARG BASE=(.*)$", text, flags=re.MULTILINE) == ["python:3.11-slim-bookworm"]
    assert not re.findall(r"ubuntu|nvidia/cuda|cudnn", text, flags=re.IGNORECASE)
    assert "--uid 1000" in text
    driver = re.search(r"a driver of (\d+) or newer", text)
    assert driver, "the driver that torch's wheels need"
    assert int(driver[1]) >= 580


def test_one_training_stays_on_one_machine(cluster: dict[str, Any]) -> None:
    """Nothing here sets up a fast network between machines."""
    assert cluster["max_workers"] == 1
    spec = documents("cluster/kuberay.yaml")["RayCluster"]["spec"]
    assert [group["maxReplicas"] for group in spec["workerGroupSpecs"]] == [1]


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
