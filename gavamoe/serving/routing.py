"""Stage 1 as a service: routes pairs, ranks items, and fills in what a request leaves out.

Inputs: a stage-2 artifact, which is complete in itself; of it the language model is not read. Raw ids in, raw ids out.
Shape letters: N pairs, K clusters.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import ValidationError

from gavamoe.artifacts.files import read_json
from gavamoe.artifacts.manifest import read_manifest
from gavamoe.data.catalog import Catalog
from gavamoe.errors import InputError
from gavamoe.generation.generator import CATALOG_FOLDER, PROMPT_FILE, prompt_features, prompt_rating
from gavamoe.generation.prompts import PromptSpec
from gavamoe.serving.catalog_search import Browser, TrainingRoutes, summarise_clusters
from gavamoe.serving.schema import ClusterInfo, ServerInfo
from gavamoe.stage1.artifact import load_vae_gmm
from gavamoe.stage1.route_overrides import CONTROL_FILE
from gavamoe.stage1.routes import ROUTES_FILE, route_pairs
from gavamoe.stage1.vae_gmm import VaeGmm


class Pair(NamedTuple):
    """A pair as a client names it, with what the client gives."""

    user: str
    item: str
    rating: float | None = None
    features: tuple[str, ...] | None = None


@dataclass(frozen=True)
class RoutedPair:
    """A pair with all that its prompt needs and all that an answer says about it, but for the text."""

    pair: Pair
    user_index: int
    item_index: int
    user_known: bool
    item_known: bool
    title: str | None
    cluster: int
    responsibilities: tuple[float, ...]
    """(K,) of Eq. 8."""
    predicted_rating: float
    rating: float | None
    """Whose sentiment the prompt says."""
    features: tuple[str, ...]
    """Named in the prompt."""
    model_version: str
    """Of the artifact that routed it: a generator of another version routes anew."""
    seconds: float
    """Spent on routing."""


class Ranking(NamedTuple):
    """The first items of a user by predicted rating."""

    items: list[str]
    compared: int
    unknown: list[str]
    user_known: bool


def model_version(folder: Path) -> str:
    """The version of an artifact: the first 12 digits of its fingerprint."""
    return read_manifest(folder, "stage2", verify=False).fingerprint[:12]


class Router:
    """Routes pairs by stage 1."""

    def __init__(self, model: VaeGmm, catalog: Catalog, spec: PromptSpec, folder: Path, device: str = "cpu") -> None:
        self.model, self.catalog, self.spec, self.device = model.to(device).eval(), catalog, spec, device
        self.version = model_version(folder)
        self._folder = folder
        self._training: TrainingRoutes | None = None
        self._browser: Browser | None = None

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "Router":
        """Read a stage-2 artifact.

        Raises:
            InputError: it is missing, of another kind, damaged or not whole.
        """
        manifest = read_manifest(folder, "stage2", verify=False)
        if CONTROL_FILE in manifest.files:
            raise InputError(f"{folder}: its routes are a control (stage2.routes), not stage 1's; it is not served")
        try:
            spec = PromptSpec.model_validate(read_json(folder / PROMPT_FILE))
        except ValidationError as error:
            raise InputError(f"{folder / PROMPT_FILE}: not a prompt description") from error
        return cls(load_vae_gmm(folder), Catalog.load(folder / CATALOG_FOLDER), spec, folder, device)

    @property
    def training(self) -> TrainingRoutes:
        """Where the training pairs went; read when first asked for."""
        if self._training is None:
            self._training = TrainingRoutes.read(self._folder / ROUTES_FILE, self.model.config.clusters)
        return self._training

    @property
    def browser(self) -> Browser:
        """Search in users and items; read when first asked for."""
        if self._browser is None:
            self._browser = Browser(self._folder / CATALOG_FOLDER, self.catalog)
        return self._browser

    def route(self, pairs: Sequence[Pair]) -> list[RoutedPair]:
        """Route pairs and choose rating and features of their prompts.

        Raises:
            InputError: a rating off the scale, or one for a model of data without ratings.
        """
        started = time.perf_counter()
        users = [self._user(pair.user) for pair in pairs]
        items = [self._item(pair.item) for pair in pairs]
        routes = route_pairs(self.model, np.array(users), np.array(items), device=self.device)
        seconds = time.perf_counter() - started
        return [
            RoutedPair(
                pair=pair,
                user_index=users[row],
                item_index=items[row],
                user_known=users[row] < self.catalog.known_users,
                item_known=items[row] < self.catalog.known_items,
                title=self.catalog.item_title(items[row]),
                cluster=int(routes.cluster[row]),
                responsibilities=tuple(map(float, routes.responsibilities[row])),
                predicted_rating=float(routes.rating[row]),
                rating=prompt_rating(self.spec, pair.rating, float(routes.rating[row])),
                features=prompt_features(self.spec, self.catalog, users[row], items[row], pair.features),
                model_version=self.version,
                seconds=seconds,
            )
            for row, pair in enumerate(pairs)
        ]

    def rank(self, user: str, k: int, candidates: Sequence[str] | None, *, exclude_seen: bool) -> Ranking:
        """The `k` items with the highest predicted rating; of two equal ones, that with the lower index."""
        index = self._user(user)
        if candidates is None:
            items, unknown = np.arange(self.catalog.known_items), []
        else:
            found = {raw: self.catalog.item_index(raw) for raw in candidates}
            unknown = [raw for raw, at in found.items() if at is None or at >= self.catalog.known_items]
            items = np.array(sorted(at for raw, at in found.items() if raw not in unknown and at is not None), int)
        if exclude_seen:
            items = np.setdiff1d(items, self.training.items_of(index))
        ratings = route_pairs(self.model, np.full(len(items), index), items, device=self.device).rating
        best = np.argsort(-ratings, kind="stable")[:k]
        chosen = [self.catalog.item_id(int(at)) for at in items[best]]
        return Ranking(chosen, len(items), unknown, index < self.catalog.known_users)

    def info(self, max_new_tokens: int, layers: int, experts: int) -> ServerInfo:
        """What is being served; the arguments are the generator's side of it."""
        scale = self.spec.scale
        return ServerInfo(
            model_version=self.version,
            clusters=self.clusters(),
            rating_scale=None if scale is None else (scale.low, scale.high),
            known_users=self.catalog.known_users,
            known_items=self.catalog.known_items,
            max_new_tokens=max_new_tokens,
            layers=layers,
            experts=experts,
        )

    def clusters(self) -> list[ClusterInfo]:
        """What tells each cluster apart."""
        return summarise_clusters(self.training, self.browser.item_features)

    def _user(self, raw: str) -> int:
        index = self.catalog.user_index(raw)
        return self.catalog.n_users if index is None else index

    def _item(self, raw: str) -> int:
        index = self.catalog.item_index(raw)
        return self.catalog.n_items if index is None else index
