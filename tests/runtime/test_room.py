"""Room on a cluster: what it has, what its autoscaler may bring, and how long that is waited for."""

from typing import Any

import pytest

from gavamoe.config.schema import RuntimeConfig
from gavamoe.runtime import room

GPUS = RuntimeConfig(workers=4, threads_per_worker=2, gpu=True, wait_minutes=1)


class Cluster:
    """A cluster whose autoscaler brings machines some polls after it is asked."""

    def __init__(self, limits: dict[str, int] | None, arrives_after: int) -> None:
        self.limits, self.left, self.asked = limits, arrives_after, list[Any]()

    def have(self) -> dict[str, float]:
        if self.asked and self.asked[0]:
            self.left -= 1
        return {"CPU": 64.0, "GPU": 8.0} if self.left < 0 else {"memory": 1e9}


@pytest.fixture
def time_flies(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(room.time, "sleep", lambda _: None)
    monkeypatch.setattr(room.time, "monotonic", lambda: float(next(clock)))


def connect(monkeypatch: pytest.MonkeyPatch, cluster: Cluster, address: str | None = "10.0.0.1:6379") -> None:
    monkeypatch.setattr(room, "_have", cluster.have)
    monkeypatch.setattr(room.connection, "cluster_address", lambda: address)
    monkeypatch.setattr(
        "ray._private.state.state.get_max_resources_from_cluster_config", lambda: cluster.limits, raising=False
    )
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: cluster.asked.append(bundles))


def test_what_workers_need() -> None:
    assert room.needs(GPUS, 4) == {"CPU": 8, "GPU": 4}
    assert room.needs(RuntimeConfig(threads_per_worker=3)) == {"CPU": 3}


@pytest.mark.usefixtures("time_flies")
@pytest.mark.parametrize("limits", [None, {"CPU": 384, "GPU": 16}])
def test_machines_are_asked_for_and_waited_for(
    limits: dict[str, int] | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = Cluster(limits, arrives_after=5)
    connect(monkeypatch, cluster)
    assert room.room_for(room.needs(GPUS), GPUS, 8) == 8
    assert cluster.asked == [[{"CPU": 2, "GPU": 1}] * 8, []]
    assert "waiting for machines" in caplog.text


@pytest.mark.usefixtures("time_flies")
@pytest.mark.parametrize(
    ("limits", "address"), [({"CPU": 384, "GPU": 4}, "10.0.0.1:6379"), ({"CPU": 384}, "10.0.0.1:6379"), (None, None)]
)
def test_what_can_never_come_is_not_waited_for(
    limits: dict[str, int] | None, address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(limits, arrives_after=5)
    connect(monkeypatch, cluster, address)
    assert room.room_for(room.needs(GPUS), GPUS, 8) == 0
    assert not cluster.asked


@pytest.mark.usefixtures("time_flies")
def test_waiting_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(None, arrives_after=1000)
    connect(monkeypatch, cluster)
    assert room.room_for(room.needs(GPUS), GPUS, 1) == 0
    assert cluster.asked[-1] == []
