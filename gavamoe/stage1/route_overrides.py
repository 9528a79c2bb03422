"""Route controls, which replace stage 1's routes to measure their worth: random routes, and the planted groups.

`stage2.routes` chooses them. A control is part of the stage-2 artifact (route_control.json, only where there is one),
so that texts are written through the gates that were trained. It is an experiment: such a model is not served.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from gavamoe.artifacts.files import read_json, write_json
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError, validated
from gavamoe.stage1.routes import Routes

CONTROL_FILE = "route_control.json"


class RouteControl(BaseModel):
    """A rule that gives a pair its cluster without stage 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["random", "oracle"]
    """The rule. random: a hash; oracle: the user's planted group."""
    by: Literal["pair", "user"] = "pair"
    """What random routes hash: the user, or, in artifacts of earlier versions, the pair."""
    clusters: int
    """K: number of clusters."""
    seed: int
    """Seed of random routes."""
    groups: tuple[int, ...] = ()
    """Planted group of each user, by user index; only for oracle routes."""

    @classmethod
    def of(cls, config: RunConfig, dataset: Dataset) -> "RouteControl | None":
        """The control that `stage2.routes` asks for; None for stage 1's own routes.

        Raises:
            InputError: oracle routes for data without planted groups, or with more groups than clusters.
        """
        kind, clusters = config.stage2.routes, config.stage1.clusters
        if kind == "learned":
            return None
        if kind == "random":
            return cls(kind=kind, by="user", clusters=clusters, seed=config.seed)
        truth = dataset.truth()
        if truth is None:
            raise InputError(
                f"stage2.routes oracle: {dataset.path} has no planted groups; only synthetic data have them"
            )
        if truth.groups > clusters:
            raise InputError(
                f"stage2.routes oracle: {truth.groups} planted groups need as many clusters,"
                f" stage1.clusters is {clusters}"
            )
        return cls(kind=kind, clusters=clusters, seed=config.seed, groups=tuple(map(int, truth.group)))

    def cluster(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """int64 (N,): random: a hash of seed and user; oracle: the user's group, 0 for users without one.

        Random routes are by user since routes by pair would be too weak a control: clusters of users tell the model
        which users it is not, and so something of who the user is, even if they mean nothing.
        """
        if self.kind == "random":
            mixed = _scramble(_scramble(np.uint64(self.seed)) ^ user.astype(np.uint64))
            if self.by == "pair":
                mixed = _scramble(mixed ^ item.astype(np.uint64))
            return (mixed % np.uint64(self.clusters)).astype(np.int64)
        groups = np.append(np.array(self.groups, dtype=np.int64), 0)
        return groups[np.minimum(user, len(self.groups))]

    def apply(self, routes: Routes, user: np.ndarray, item: np.ndarray) -> Routes:
        """`routes` with these clusters, each with all the responsibility; the predicted ratings stay stage 1's."""
        cluster = self.cluster(user, item)
        certain = np.eye(self.clusters, dtype=np.float32)[cluster]
        return Routes(cluster.astype(routes.cluster.dtype), certain, routes.rating)

    def save(self, folder: Path) -> None:
        write_json(folder / CONTROL_FILE, self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Path) -> "RouteControl | None":
        """The control of a stage-2 artifact; None where stage 1 routes.

        Raises:
            InputError: the file does not describe one.
        """
        path = folder / CONTROL_FILE
        if not path.is_file():
            return None
        return validated(cls, read_json(path), path, "a description of routes")


def _scramble(value: np.ndarray | np.uint64) -> np.ndarray:
    """The mixing function of SplitMix64: every bit of the input moves every bit of the output."""
    with np.errstate(over="ignore"):
        mixed = np.asarray(value, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(mixed ^ (mixed >> np.uint64(31)))
