"""The points that users are clustered by, and the numbering of the clusters."""

import numpy as np
import torch
from sklearn.decomposition import PCA

from gavamoe.stage1 import mixture_init


def test_clusters_are_numbered_by_their_first_users() -> None:
    """A fit numbers clusters by rounding, which other processors do otherwise; a cluster without users comes last."""
    shares = np.array([[0.1, 0.2, 0.7, 0.0], [0.8, 0.1, 0.1, 0.0], [0.2, 0.1, 0.7, 0.0], [0.1, 0.1, 0.1, 0.7]])
    ordered = mixture_init._by_first_user(shares)
    assert ordered.argmax(axis=1).tolist() == [0, 1, 0, 2]
    assert np.array_equal(ordered, shares[:, [2, 0, 3, 1]])


def test_points_are_the_principal_components_of_all_blocks_together() -> None:
    """scikit-learn's, up to the sign of each direction; on two workers, each of which has some of the users, too."""
    random = np.random.default_rng(0)
    embedding_UE = random.normal(size=(90, 7)) @ random.normal(size=(7, 7)) + 3
    expected = PCA(3).fit_transform(embedding_UE)
    parts = [torch.from_numpy(part) for part in np.array_split(embedding_UE, 4)]
    found = mixture_init.principal_points(lambda: parts, (90, 7), 4)
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-10)

    def of_worker(own: list[torch.Tensor]) -> np.ndarray:
        """Its part of the sums is replaced by those of both, as an exchange does."""
        sums = iter([embedding_UE.sum(axis=0), 89 * np.cov(embedding_UE.T)])
        return mixture_init.principal_points(lambda: own, (90, 7), 4, lambda _: next(sums))

    two = np.concatenate([of_worker(parts[:1]), of_worker(parts[1:])])
    np.testing.assert_allclose(two, found, atol=1e-10)
