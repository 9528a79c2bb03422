"""Stage 1 as a service: routes pairs, ranks items, and fills in what a request leaves out.

Inputs: a stage-2 artifact, which is complete in itself; of it the language model is not read. Raw ids in, raw ids out.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gavamoe.artifacts.manifest import read_manifest
from gavamoe.errors import InputError
from gavamoe.generation.artifact import CATALOG_FOLDER, model_version
from gavamoe.generation.request import ExplanationRequest, FilledRequest, RequestFiller
from gavamoe.serving.catalog_search import Browser
from gavamoe.serving.schema import ClusterInfo, ServerInfo
from gavamoe.stage1.clusters import describe_clusters
from gavamoe.stage1.route_overrides import CONTROL_FILE
from gavamoe.stage1.routes import ROUTES_FILE, TrainingPairs
from gavamoe.stage1.strangers.history import HistoryEntry
from gavamoe.stage1.user_words import ClusterWords

CLUSTER_FEATURES = 6
"""Features by which a cluster is described to clients."""


class Pair(NamedTuple):
    """A pair as a client names it, with what the client gives."""

    user: str | None
    item: str
    rating: float | None = None
    features: tuple[str, ...] | None = None
    history: tuple[HistoryEntry, ...] = ()


@dataclass(frozen=True)
class RoutedPair:
    """A pair with all that its prompt needs and all that an answer says about it, but for the text."""

    pair: Pair
    filled: FilledRequest
    model_version: str
    """Version of the artifact that routed it: a generator of another version routes anew."""
    seconds: float
    """Time spent on routing."""


class RankRequest(NamedTuple):
    """Which items a client wants ranked, and for whom."""

    user: str | None
    k: int
    candidates: tuple[str, ...] | None
    """None: all known items."""
    exclude_seen: bool
    history: tuple[HistoryEntry, ...] = ()


class Ranking(NamedTuple):
    """The first items of a user by predicted rating."""

    items: list[str]
    compared: int
    unknown: list[str]
    user_known: bool


class RoutingService:
    """Routes pairs by stage 1, over one stage-2 artifact."""

    def __init__(self, filler: RequestFiller, folder: Path) -> None:
        self._filler, self._folder = filler, folder
        self.catalog = filler.catalog
        self.version = model_version(folder)

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "RoutingService":
        """Read a stage-2 artifact.

        Raises:
            InputError: it is missing, of another kind, damaged or not whole, or an experiment that is not served.
        """
        manifest = read_manifest(folder, "stage2", verify=False)
        if CONTROL_FILE in manifest.files:
            raise InputError(f"{folder}: its routes are a control (stage2.routes), not stage 1's; it is not served")
        return cls(RequestFiller.load(folder, device), folder)

    @cached_property
    def training(self) -> TrainingPairs:
        """Where the training pairs went; read when first asked for."""
        return TrainingPairs.read(self._folder / ROUTES_FILE, self.catalog.known_users)

    @cached_property
    def browser(self) -> Browser:
        """Search in users and items; read when first asked for."""
        return Browser(self._folder / CATALOG_FOLDER, self.catalog)

    def route(self, pairs: Sequence[Pair]) -> list[RoutedPair]:
        """Route pairs and choose rating and features of their prompts.

        Raises:
            InputError: a rating off the scale, or one for a model of data without ratings.
        """
        started = time.perf_counter()
        filled = self._filler.fill([self._request(pair) for pair in pairs])
        seconds = time.perf_counter() - started
        return [RoutedPair(pair, each, self.version, seconds) for pair, each in zip(pairs, filled, strict=True)]

    def _request(self, pair: Pair) -> ExplanationRequest:
        item = self.catalog.item_or_unknown(pair.item)
        return ExplanationRequest(
            self._user(pair.user), item, pair.rating, pair.features, self._filler.history(pair.history)
        )

    def _user(self, raw: str | None) -> int:
        return self.catalog.n_users if raw is None else self.catalog.user_or_unknown(raw)

    def rank(self, request: RankRequest) -> Ranking:
        """The `k` items with the highest predicted rating; of two equal ones, that with the lower index.

        Raises:
            InputError: as `route`.
        """
        index, entries = self._user(request.user), self._filler.history(request.history)
        candidates = request.candidates
        if candidates is None:
            items, unknown = np.arange(self.catalog.known_items), []
        else:
            index_of = {raw: self.catalog.item_index(raw) for raw in candidates}
            unknown = [raw for raw, at in index_of.items() if at is None or at >= self.catalog.known_items]
            items = np.array(sorted(at for raw, at in index_of.items() if raw not in unknown and at is not None), int)
        compared = len(items)  # before anything is left out: how many are missing is the user's own affair
        if request.exclude_seen:
            met = [entry.item for entry in entries]
            items = np.setdiff1d(items, met if entries else self.training.items_of_user(index))
        if entries:
            ratings = self._filler.routes_of_stranger(index, entries, items).rating
        else:
            ratings = self._filler.routes(np.full(len(items), index), items).rating
        best = np.argsort(-ratings, kind="stable")[: request.k]
        chosen = [self.catalog.item_id(int(at)) for at in items[best]]
        return Ranking(chosen, compared, unknown, index < self.catalog.known_users)

    def info(self, max_new_tokens: int, layers: int, experts: int) -> ServerInfo:
        """What is being served; the arguments are the generator's side of it."""
        scale = self._filler.spec.scale
        return ServerInfo(
            model_version=self.version,
            clusters=self.clusters,
            rating_scale=None if scale is None else (scale.low, scale.high),
            known_users=self.catalog.known_users,
            known_items=self.catalog.known_items,
            max_new_tokens=max_new_tokens,
            layers=layers,
            experts=experts,
        )

    @cached_property
    def clusters(self) -> list[ClusterInfo]:
        """What tells each cluster apart; computed when first asked for."""
        implicit = self._filler.spec.scale is None
        words = ClusterWords.load(self._folder, self.training.clusters)
        described = describe_clusters(self.training, self.catalog, words, implicit=implicit, top=CLUSTER_FEATURES)
        return [
            ClusterInfo(
                cluster=cluster.cluster,
                share=cluster.share,
                mean_predicted_rating=cluster.mean_predicted_rating,
                words=[trait.name for trait in cluster.words],
                features=[trait.name for trait in cluster.features],
            )
            for cluster in described
        ]
