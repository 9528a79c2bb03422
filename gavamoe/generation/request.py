"""A request for an explanation, and the same with everything filled in that it leaves out.

`explain`, `evaluate` and the service fill requests in by this one code: stage 1 routes the pair and predicts its
rating in one pass. A rating that is not given is that prediction, moved to the nearest rating of the scale; features
that are not given are those that a review of the pair names most probably (`pair_features`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from gavamoe.data.catalog import Catalog
from gavamoe.errors import InputError
from gavamoe.generation.artifact import CATALOG_FOLDER, read_prompt_spec
from gavamoe.generation.evidence.pair_features import PairFeatures
from gavamoe.generation.evidence.quotes import Quotes
from gavamoe.generation.prompts import PromptSpec
from gavamoe.stage1.artifact import load_vae_gmm
from gavamoe.stage1.route_overrides import RouteControl
from gavamoe.stage1.routes import Routes, route_pairs
from gavamoe.stage1.strangers.fold_in import Crowd, FoldIn
from gavamoe.stage1.strangers.history import Entry, HistoryEntry, indexed
from gavamoe.stage1.user_words import ClusterWords
from gavamoe.stage1.vae_gmm import VaeGmm


@dataclass(frozen=True)
class ExplanationRequest:
    """A pair to explain. Indices at or above the known counts stand for users and items never seen."""

    user: int
    item: int
    rating: float | None = None
    """None: stage 1's prediction takes its place."""
    features: tuple[str, ...] | None = None
    """None: those that a review of the pair names most probably take their place; empty: none are named."""
    history: tuple[Entry, ...] = ()
    """What a user that training never saw tells of itself: it is then routed by that, and its rating predicted."""


@dataclass(frozen=True)
class FilledRequest:
    """A request with all that its prompt needs and all that an answer says about it, but for the text."""

    request: ExplanationRequest
    cluster: int
    responsibilities: tuple[float, ...]
    """(K,) of Eq. 8."""
    predicted_rating: float
    """Stage 1's expectation, off the scale's grid; the probability of interaction for implicit data."""
    rating: float | None
    """The rating whose sentiment the prompt says; None for implicit data."""
    features: tuple[str, ...]
    """The features that the prompt names, as far as they fit."""
    title: str | None
    user_known: bool
    """Whether the user has training rows."""
    item_known: bool
    quotes: tuple[str, ...] = ()
    """Training explanations that the prompt quotes, as far as they fit."""


class RequestFiller:
    """Stage 1's part of every explanation."""

    def __init__(
        self,
        vae_gmm: VaeGmm,
        catalog: Catalog,
        spec: PromptSpec,
        device: str = "cpu",
        control: RouteControl | None = None,
        crowd: Crowd | None = None,
        words: ClusterWords | None = None,
        features: PairFeatures | None = None,
        quotes: Quotes | None = None,
    ) -> None:
        """`control` routes in stage 1's place; `crowd` and `words`: of the clusters' users, for histories; `features`:
        what pairs are asked about when nobody says; None: the item's usual ones; `quotes`: of prompts that quote."""
        self.vae_gmm = vae_gmm.to(device).eval()
        self.catalog, self.spec, self.device, self.control = catalog, spec, device, control
        self._crowd, self._words, self._pair_features, self._quotes = crowd, words, features, quotes

    @classmethod
    def load(cls, folder: Path, device: str = "cpu") -> "RequestFiller":
        """Read stage 1, catalog and prompt description of a stage-2 artifact; the language model is not read.

        Raises:
            InputError: a part is missing or damaged.
        """
        folder = Path(folder)
        spec, catalog = read_prompt_spec(folder), Catalog.load(folder / CATALOG_FOLDER)
        vae_gmm = load_vae_gmm(folder)
        clusters = vae_gmm.config.clusters
        words, features = ClusterWords.load(folder, clusters), PairFeatures.load(folder, catalog, clusters)
        crowd, control = Crowd.load(folder, vae_gmm), RouteControl.load(folder)
        quotes = Quotes.load(folder) if spec.prompt.quotes else None
        return cls(vae_gmm, catalog, spec, device, control, crowd, words, features, quotes)

    @cached_property
    def fold_in(self) -> FoldIn:
        """Folds histories of strangers in; made when first asked for.

        Raises:
            InputError: an earlier version made the artifact, and kept nothing to compare a stranger with.
        """
        if self._crowd is None:
            raise InputError("history: this run was made before strangers were served; train it again, or leave it out")
        return FoldIn(self.vae_gmm, self._crowd, self._words, self.device)

    @property
    def serves_strangers(self) -> bool:
        """Whether users that training never saw are routed by their history."""
        return self._crowd is not None and self.control is None

    def history(self, entries: Sequence[HistoryEntry]) -> tuple[Entry, ...]:
        """A history by item index; raises InputError, with the entry's number, for a rating off the scale."""
        return indexed(entries, self.catalog.item_or_unknown, self.spec.scale)

    def routes_of_stranger(self, user: int, history: Sequence[Entry], items: np.ndarray) -> Routes:
        """As `routes`, of the pairs of a user with a history.

        Raises:
            InputError: the user is known, the routes are a control's, or an earlier version made the artifact.
        """
        self._check_stranger(user)
        return self.fold_in.routes(self.fold_in.stranger(history), items)

    def _check_stranger(self, user: int) -> None:
        if user < self.catalog.known_users:
            raise InputError("history: the user is known by its training rows; leave out the history, or the user")
        if self.control is not None:
            raise InputError("history: this run routes by a rule (stage2.routes), which knows none; leave it out")
        assert self.fold_in is not None  # refuses artifacts of earlier versions

    def routes(self, users: np.ndarray, items: np.ndarray) -> Routes:
        """Clusters, responsibilities and predicted ratings of pairs by index: int64 (N,) each."""
        routes = route_pairs(self.vae_gmm, users, items, device=self.device)
        return routes if self.control is None else self.control.apply(routes, users, items)

    def check(self, request: ExplanationRequest) -> None:
        """Raise InputError for a request that `fill` would refuse."""
        if request.rating is not None:
            self._rating(request.rating, 0.0)
        if request.history:
            self._check_stranger(request.user)

    def fill(self, requests: Sequence[ExplanationRequest]) -> list[FilledRequest]:
        """The requests, in order, with all that they leave out.

        Raises:
            InputError: a rating off the scale, one for a model of data without ratings, or a history of a known user.
        """
        users = np.array([request.user for request in requests], dtype=np.int64)
        items = np.array([request.item for request in requests], dtype=np.int64)
        routes = self.routes(users, items)
        strangers: dict[tuple[int, tuple[Entry, ...]], list[int]] = {}
        for row, request in enumerate(requests):
            if request.history:
                strangers.setdefault((request.user, request.history), []).append(row)
        for (user, history), rows in strangers.items():
            own = self.routes_of_stranger(user, history, items[rows])
            for column, values in zip(routes, own, strict=True):
                column[rows] = values
        return [self._filled(request, routes, row) for row, request in enumerate(requests)]

    def _filled(self, request: ExplanationRequest, routes: Routes, row: int) -> FilledRequest:
        predicted = float(routes.rating[row])
        rating = self._rating(request.rating, predicted)
        features = self._features(request, routes.responsibilities[row])
        quotes: tuple[str, ...] = ()
        if self._quotes is not None:
            quotes = self._quotes.nearest(request.user, request.item, rating, features, self.spec.prompt.quotes)
        return FilledRequest(
            request=request,
            cluster=int(routes.cluster[row]),
            responsibilities=tuple(map(float, routes.responsibilities[row])),
            predicted_rating=predicted,
            rating=rating,
            features=features,
            quotes=quotes,
            title=self.catalog.item_title(request.item),
            user_known=0 <= request.user < self.catalog.known_users,
            item_known=0 <= request.item < self.catalog.known_items,
        )

    def _rating(self, given: float | None, predicted: float) -> float | None:
        """The rating whose sentiment a prompt says: as given, else stage 1's; None for data without ratings."""
        scale = self.spec.scale
        if given is None:
            return None if scale is None else scale.nearest(predicted)
        if scale is None:
            raise InputError(f"rating {given:g}: this model's dataset has no ratings; leave it out")
        scale.check(given)
        return given

    def _features(self, request: ExplanationRequest, gamma_K: np.ndarray) -> tuple[str, ...]:
        """As given, else those that a review of the pair names most probably; none where prompts name no features."""
        if not self.spec.prompt.features:
            return ()
        if request.features is not None:
            return request.features[: self.spec.prompt.max_features]
        count = self.spec.usual_features
        if self._pair_features is None:
            return self.catalog.usual_features(request.user, request.item, count)
        texts = [entry.text for entry in request.history if entry.text]
        return self._pair_features.rank(request.user, request.item, gamma_K.tolist(), count, texts)
