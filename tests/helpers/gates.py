"""What is measured of gates, by hand; and a trained model whose gates differ."""

from pathlib import Path

import numpy as np
import torch

from gavamoe.evaluation.faithfulness.gates import GateProbe
from gavamoe.generation.generator import ExplanationGenerator


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


def gates_that_differ(folder: Path) -> ExplanationGenerator:
    """A stage-2 artifact's model with routed experts that say something, and gates that differ."""
    loaded = ExplanationGenerator.load(folder)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in loaded.model.model.layers:
            torch.nn.init.normal_(layer.mlp.experts.down_proj, std=0.5, generator=random)
            torch.nn.init.normal_(layer.mlp.router.weight, std=1.0, generator=random)
    return loaded
