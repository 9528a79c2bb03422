"""Where the embeddings start: planted tastes are seen, streamed or not."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gavamoe.data.dataset import open_dataset
from gavamoe.stage1.pair_stream import Pairs, PairSource
from gavamoe.stage1.spectral_init import spectral_coordinates


def test_spectral_coordinates_find_planted_tastes(tiny_dataset: Path) -> None:
    """The two leading components separate the planted groups; the bias column follows the user's mean rating."""
    data = open_dataset(tiny_dataset)
    known = data.catalog.known_users, data.catalog.known_items
    source = PairSource(data, negatives=1, unknown_rate=0, seed=0)
    found = spectral_coordinates(source.observed, *known, components=8, seed=0)
    assert found is not None
    assert found.user.shape == (known[0], 9)
    assert found.item.shape == (known[1], 9)
    truth = data.truth()
    assert truth is not None
    points, groups = found.user[:, 1:3], truth.group[: known[0]]
    centres = np.stack([points[groups == group].mean(axis=0) for group in range(3)])
    nearest = ((points[:, None] - centres) ** 2).sum(axis=-1).argmin(axis=1)
    assert (nearest == groups).mean() > 0.9
    pairs = data.arrays("train")
    means = np.bincount(pairs.user, weights=pairs.rating) / np.bincount(pairs.user)
    assert np.corrcoef(found.user[:, 0], means)[0, 1] > 0.8


def random_pairs(users: int, items: int, count: int) -> Pairs:
    random = np.random.default_rng(0)
    user, item = (random.integers(size, size=count).astype(np.int32) for size in (users, items))
    taste = np.where(user % 3 == item % 3, 1.0, -0.5)
    return Pairs(user, item, np.clip(np.round(3 + taste + random.normal(size=count)), 1, 5).astype(np.float32))


@pytest.mark.parametrize("implicit", [False, True])
def test_coordinates_are_the_same_however_the_pairs_are_cut(implicit: bool) -> None:
    pairs = random_pairs(90, 60, 3000)
    if implicit:
        pairs = pairs._replace(rating=np.ones_like(pairs.rating))

    def pieces() -> Iterator[Pairs]:
        return (pairs.take(slice(start, start + 101)) for start in range(0, pairs.size, 101))

    whole = spectral_coordinates(lambda: [pairs], 90, 60, components=4, seed=0)
    cut = spectral_coordinates(pieces, 90, 60, components=4, seed=0)
    assert whole is not None
    assert cut is not None
    for one, other in zip(whole, cut, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-8)


def test_the_components_are_singular_vectors_of_the_scaled_residuals() -> None:
    """Against numpy's decomposition of the whole matrix; implicit data, whose residuals are 1."""
    pairs = random_pairs(40, 30, 500)
    pairs = pairs._replace(rating=np.ones_like(pairs.rating))
    found = spectral_coordinates(lambda: [pairs], 40, 30, components=3, seed=0)
    assert found is not None
    counts = np.zeros((40, 30))
    np.add.at(counts, (pairs.user, pairs.item), 1.0)
    user_scale, item_scale = (1 / np.sqrt(counts.sum(axis=axis) + counts.sum(axis=axis).mean()) for axis in (1, 0))
    left, singular, _ = np.linalg.svd(counts * user_scale[:, None] * item_scale)
    expected = left[:, :3] * (singular[:3] - singular[3]) * user_scale[:, None]
    expected = expected - expected.mean(axis=0)
    for column in range(3):  # up to sign and the common scale
        agreement = np.corrcoef(found.user[:, 1 + column], expected[:, column])[0, 1]
        assert abs(agreement) > 0.99
