"""What each cluster is, in words and numbers, and the map of the latent space (Figure 5).

Reads a dataset and its routes; `gavamoe route RUN` shows the result.

Shape letters: N training pairs, K clusters, U known users, V different values (items or features).
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import BaseModel, ConfigDict

from gavamoe.artifacts.files import write_file
from gavamoe.data.dataset import Dataset
from gavamoe.stage1.routes import Routes, mean_by_user, read_routes, route_pairs
from gavamoe.stage1.vae_gmm import VaeGmm

MAP_PAIRS = 3000
"""Training pairs on the latent map at most: t-SNE takes seconds for these, and more only hide each other."""
_PCA_DIMENSIONS = 30
_PRIOR_COUNT = 10.0
"""Occurrences, at the rate of the whole, added to each value's count, so that rare values don't lead the lists."""


class Standout(BaseModel):
    """An item or a feature that sets a cluster apart."""

    model_config = ConfigDict(frozen=True)
    name: str
    value: float
    """Lift: its share of the cluster's pairs over its share of all pairs. Or, for `liked` and `disliked`, how far
    the cluster's mean rating of pairs with this feature is from everyone's, in rating units."""


class Cluster(BaseModel):
    """One cluster of the training pairs."""

    model_config = ConfigDict(frozen=True)
    cluster: int
    pairs: int
    share: float
    """Of all training pairs."""
    users: int
    """Known users whose mean responsibility is highest here."""
    mean_rating: float | None
    features: list[Standout]
    """By lift."""
    items: list[Standout]
    """By lift."""
    liked: list[Standout]
    """Features rated higher here than elsewhere; empty for implicit data."""
    disliked: list[Standout]
    typical_users: list[str]
    """Raw ids, those with the highest mean responsibility first."""

    @staticmethod
    def labels() -> tuple[str, ...]:
        """Column titles of `row`, without the first, the cluster's number."""
        return (
            "pairs",
            "users",
            "mean rating",
            "features (lift)",
            "items (lift)",
            "liked",
            "disliked",
            "users such as",
        )

    def row(self) -> tuple[str, ...]:
        """A table row for people."""
        return (
            str(self.cluster),
            f"{self.pairs:,} ({self.share:.1%})",
            f"{self.users:,}",
            "" if self.mean_rating is None else f"{self.mean_rating:.2f}",
            ", ".join(f"{one.name} {one.value:.2f}" for one in self.features),
            ", ".join(f"{one.name} {one.value:.2f}" for one in self.items),
            ", ".join(f"{one.name} {one.value:+.2f}" for one in self.liked),
            ", ".join(f"{one.name} {one.value:+.2f}" for one in self.disliked),
            ", ".join(self.typical_users),
        )


def describe_clusters(dataset: Dataset, routes: Path, top: int = 5) -> list[Cluster]:
    """Describe every cluster of the training pairs by its `top` features, items and users.

    Raises:
        InputError: the routes are missing or of another dataset.
    """
    found = read_routes(routes, "train", rows=dataset.size("train"))
    pairs = dataset.arrays("train")
    values, place_P, pair_P = _features(dataset)
    feature_lift = _lift(place_P, found.cluster[pair_P], len(values), found)
    item_lift = _lift(pairs.item, found.cluster, dataset.catalog.n_items, found)
    gaps = None if dataset.implicit else _rating_gaps(place_P, pair_P, pairs.rating, found, len(values))
    means_UK = mean_by_user(pairs.user, found.responsibilities, dataset.catalog.known_users)
    described = []
    for cluster in range(found.responsibilities.shape[1]):
        own = found.cluster == cluster
        count = int(own.sum())
        described.append(
            Cluster(
                cluster=cluster,
                pairs=count,
                share=count / max(len(own), 1),
                users=int((means_UK.argmax(axis=1) == cluster).sum()),
                mean_rating=None if dataset.implicit or not count else float(pairs.rating[own].mean()),
                features=_leading(feature_lift[cluster], values, top, above=1.0),
                items=_leading(item_lift[cluster], _Titles(dataset), top, above=1.0),
                liked=[] if gaps is None else _leading(gaps[cluster], values, top, above=0.0),
                disliked=[] if gaps is None else _trailing(gaps[cluster], values, top),
                typical_users=_typical_users(dataset, means_UK, cluster, top),
            )
        )
    return described


class _Titles:
    """Names of items by index: the title, or the raw id where there is none."""

    def __init__(self, dataset: Dataset) -> None:
        self._catalog = dataset.catalog

    def __getitem__(self, index: int) -> str:
        return self._catalog.item_title(index) or self._catalog.item_id(index)


def _features(dataset: Dataset) -> tuple[list[str], np.ndarray, np.ndarray]:
    """All feature words, and for every occurrence its word's place in them and its pair's row."""
    column = dataset.table("train", ["features"])["features"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    encoded = column.flatten().dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy(), pc.list_parent_indices(column).to_numpy()


def _counts(place: np.ndarray, cluster: np.ndarray, values: int, clusters: int) -> np.ndarray:
    """Occurrences of every value in every cluster, (K, V)."""
    flat = cluster.astype(np.int64) * values + place
    return np.bincount(flat, minlength=clusters * values).reshape(clusters, values).astype(np.float64)


def _lift(place: np.ndarray, cluster: np.ndarray, values: int, routes: Routes) -> np.ndarray:
    """Smoothed lift of every value in every cluster, (K, V)."""
    clusters = routes.responsibilities.shape[1]
    share_K1 = np.bincount(routes.cluster, minlength=clusters)[:, None] / max(len(routes.cluster), 1)
    counts_KV = _counts(place, cluster, values, clusters)
    expected_KV = counts_KV.sum(axis=0) * share_K1
    return (counts_KV + _PRIOR_COUNT) / (expected_KV + _PRIOR_COUNT)


def _rating_gaps(
    place_P: np.ndarray, pair_P: np.ndarray, rating_N: np.ndarray, routes: Routes, values: int
) -> np.ndarray:
    """Mean rating of every feature in every cluster less its mean over all, shrunk to 0 where rare, (K, V)."""
    clusters = routes.responsibilities.shape[1]
    counts_V = np.bincount(place_P, minlength=values)
    means_V = np.bincount(place_P, weights=rating_N[pair_P], minlength=values) / np.maximum(counts_V, 1)
    flat = routes.cluster[pair_P].astype(np.int64) * values + place_P
    gap = np.bincount(flat, weights=rating_N[pair_P] - means_V[place_P], minlength=clusters * values)
    return gap.reshape(clusters, values) / (_counts(place_P, routes.cluster[pair_P], values, clusters) + _PRIOR_COUNT)


def _leading(score_V: np.ndarray, names: "list[str] | _Titles", top: int, above: float) -> list[Standout]:
    """The values with the highest scores, those above a bound only."""
    order = np.argsort(-score_V, kind="stable")[:top]
    return [Standout(name=names[int(v)], value=float(score_V[v])) for v in order if score_V[v] > above]


def _trailing(score_V: np.ndarray, names: list[str], top: int) -> list[Standout]:
    """The values with the lowest scores, those below 0 only."""
    return [one.model_copy(update={"value": -one.value}) for one in _leading(-score_V, names, top, above=0.0)]


def _typical_users(dataset: Dataset, means_UK: np.ndarray, cluster: int, top: int) -> list[str]:
    own = np.flatnonzero(means_UK.argmax(axis=1) == cluster)
    order = own[np.argsort(-means_UK[own, cluster], kind="stable")[:top]]
    return [dataset.catalog.user_id(int(user)) for user in order]


def plot_latents(model: VaeGmm, dataset: Dataset, out: Path, seed: int = 0, sample: int = MAP_PAIRS) -> None:
    """Write a PNG: the latents of a seeded sample of the training pairs, by t-SNE, coloured by cluster."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = dataset.arrays("train")
    rows = np.sort(np.random.default_rng(seed).permutation(len(pairs.user))[:sample])
    user, item = pairs.user[rows], pairs.item[rows]
    cluster = route_pairs(model, user, item).cluster
    with torch.no_grad():
        mu_NL, _ = model.eval().encode(torch.tensor(user), torch.tensor(item))
    points = _embed(mu_NL.numpy().astype(np.float64), seed)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps["tab10" if model.config.clusters <= 10 else "turbo"].resampled(max(model.config.clusters, 10))
    for index in range(model.config.clusters):
        own = cluster == index
        axes.scatter(
            points[own, 0],
            points[own, 1],
            s=5,
            color=colours(index),
            label=f"cluster {index} ({own.mean():.0%})",
            alpha=0.7,
        )
    axes.set(title=f"Latents of {len(rows):,} training pairs (t-SNE)", xticks=[], yticks=[])
    axes.legend(markerscale=3, loc="best", fontsize="small")
    FigureCanvasAgg(figure)
    with write_file(out) as aside:
        figure.savefig(aside, format="png", dpi=130)


def _embed(latents_NL: np.ndarray, seed: int) -> np.ndarray:
    """Two dimensions, (N, 2): t-SNE, after PCA where the latent is large."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    count, size = latents_NL.shape
    if size > _PCA_DIMENSIONS and count > _PCA_DIMENSIONS:
        latents_NL = PCA(_PCA_DIMENSIONS, random_state=seed).fit_transform(latents_NL)
    perplexity = min(30.0, max((count - 1) / 3, 1.0))
    return TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(latents_NL)
