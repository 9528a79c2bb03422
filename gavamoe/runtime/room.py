"""Whether a cluster has room for actors or trials, also on machines that an autoscaler first has to get."""

import logging
import time
from collections.abc import Mapping

from gavamoe.config.schema import RuntimeConfig
from gavamoe.runtime import connection

_log = logging.getLogger(__name__)
_POLL_SECONDS = 2.0


def needs(placement: RuntimeConfig, workers: int = 1) -> dict[str, int]:
    """What so many workers take of a cluster."""
    need = {"CPU": workers * placement.threads_per_worker}
    return need | {"GPU": workers} if placement.gpu else need


def room_for(need: Mapping[str, float], placement: RuntimeConfig, wanted: int = 1) -> int:
    """How many times the connected cluster can hold `need`.

    Where a cluster that was not started here may bring enough for `wanted` of them, its autoscaler is asked to, and
    waited for as long as `runtime.wait_minutes` says.
    """
    from ray.autoscaler import sdk

    room = _times(need, _have())
    if room >= wanted or not _may_grow(need, wanted):
        return room
    _log.warning("waiting for machines: %s, asked for %d times", described(need), wanted)
    sdk.request_resources(bundles=[dict(need)] * wanted)
    try:
        end = time.monotonic() + 60 * placement.wait_minutes
        while room < wanted and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            room = _times(need, _have())
    finally:
        sdk.request_resources(bundles=[])  # what is used meanwhile stays
    return room


def described(need: Mapping[str, float]) -> str:
    """`need` beside what the cluster has, for messages."""
    have, wanted = _have(), ", ".join(f"{count:g} {kind}" for kind, count in need.items())
    return f"{wanted}, the cluster has {have.get('CPU', 0):g} CPU, {have.get('GPU', 0):g} GPU"


def _have() -> Mapping[str, float]:
    import ray

    have: Mapping[str, float] = ray.cluster_resources()
    return have


def _may_grow(need: Mapping[str, float], wanted: int) -> bool:
    """Whether waiting can help: the autoscaler's limits allow it, or the cluster does not tell them."""
    from ray._private.state import state

    if connection.cluster_address() is None:
        return False
    limits = state.get_max_resources_from_cluster_config()  # of autoscaler v2; the first one does not tell
    return limits is None or _times(need, limits) >= wanted


def _times(need: Mapping[str, float], have: Mapping[str, float]) -> int:
    return min(int(have.get(kind, 0) // count) for kind, count in need.items())
