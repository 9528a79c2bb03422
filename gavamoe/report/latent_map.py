"""The map of the latent space (Figure 5): latents of training pairs in two dimensions, colored by cluster."""

from pathlib import Path

import numpy as np
import torch

from gavamoe.artifacts.files import save_png
from gavamoe.data.dataset import PairArrays
from gavamoe.stage1.routes import TrainingPairs, route_pairs
from gavamoe.stage1.vae_gmm import VaeGmm

MAP_PAIRS = 3000
"""Training pairs on the map at most: t-SNE takes seconds for these, and more only hide each other."""
_PCA_DIMENSIONS = 30


def plot_latents(
    model: VaeGmm, pairs: PairArrays | TrainingPairs, out: Path, seed: int = 0, sample: int = MAP_PAIRS
) -> None:
    """Write a PNG: the latents of a seeded sample of the training pairs, by t-SNE, colored by cluster."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows = np.sort(np.random.default_rng(seed).permutation(len(pairs.user))[:sample])
    user, item = pairs.user[rows], pairs.item[rows]
    cluster = route_pairs(model, user, item).cluster
    with torch.no_grad():
        mu_NL, _ = model.eval().encode(torch.tensor(user), torch.tensor(item))
    points = _embed(mu_NL.numpy().astype(np.float64), seed)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot()
    colors = colormaps["tab10" if model.config.clusters <= 10 else "turbo"].resampled(max(model.config.clusters, 10))
    for index in range(model.config.clusters):
        own = cluster == index
        axes.scatter(
            points[own, 0],
            points[own, 1],
            s=5,
            color=colors(index),
            label=f"cluster {index} ({own.mean():.0%})",
            alpha=0.7,
        )
    axes.set(title=f"Latents of {len(rows):,} training pairs (t-SNE)", xticks=[], yticks=[])
    axes.legend(markerscale=3, loc="best", fontsize="small")
    save_png(figure, out)


def _embed(latents_NL: np.ndarray, seed: int) -> np.ndarray:
    """Two dimensions, (N, 2): t-SNE, after PCA where the latent is large."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    count, size = latents_NL.shape
    if size > _PCA_DIMENSIONS and count > _PCA_DIMENSIONS:
        latents_NL = PCA(_PCA_DIMENSIONS, random_state=seed).fit_transform(latents_NL)
    perplexity = min(30.0, max((count - 1) / 3, 1.0))
    return TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(latents_NL)
