"""What is measured of gates, by hand."""

import numpy as np

from gavamoe.evaluation.faithfulness.gates import GateProbe


def gates_by_hand() -> GateProbe:
    """Three rows of clusters 0, 0, 1; gate 2 is idle; two layers of four experts."""
    used = np.zeros((2, 3, 4))
    used[0, 0], used[1, 0] = [5, 5, 5, 5], [20, 0, 0, 0]
    used[:, 1] = [3, 3, 0, 0]
    return GateProbe(
        loss_NK=np.array([[1.0, 2.0, 4.0], [3.0, 1.0, 2.0], [2.0, 2.0, 5.0]]),
        cluster_N=np.array([0, 0, 1]),
        used_LKE=used,
        shared_KK=np.eye(3),
        top_k=2,
    )
