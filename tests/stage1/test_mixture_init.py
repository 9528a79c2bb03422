"""The numbering of users' clusters."""

import numpy as np

from gavamoe.stage1 import mixture_init


def test_clusters_are_numbered_by_their_first_users() -> None:
    """A fit numbers clusters by rounding, which other processors do otherwise; a cluster without users comes last."""
    shares = np.array([[0.1, 0.2, 0.7, 0.0], [0.8, 0.1, 0.1, 0.0], [0.2, 0.1, 0.7, 0.0], [0.1, 0.1, 0.1, 0.7]])
    ordered = mixture_init._by_first_user(shares)
    assert ordered.argmax(axis=1).tolist() == [0, 1, 0, 2]
    assert np.array_equal(ordered, shares[:, [2, 0, 3, 1]])
