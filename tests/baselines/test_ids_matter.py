"""What ids tell: on planted data, where a user's group decides style and features, systems that read ids gain by them,
and nothing once the ids of rows are dealt anew."""

from pathlib import Path

import numpy as np
import pytest

from gavamoe.baselines import training
from gavamoe.baselines.frame import Baseline, Reader
from gavamoe.baselines.training import Rows, train_baseline
from gavamoe.config.files import load_config
from gavamoe.data.dataset import Dataset, PairArrays
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.runtime.context import LocalContext

SYSTEMS = ("peter", "nete", "pepler", "pevae", "xrec", "cier", "g-refer")
SETTINGS = (
    "stage2.max_steps=500", "stage2.evaluate_every=100", "stage2.checkpoint_every=0", "stage2.epochs=100",
    "stage2.learning_rate=0.003", "baselines.pevae.width=64", "baselines.xrec.graph.epochs=40",
    "baselines.cier.embedding_size=96",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ids") / "dataset"
    synthesize(folder, users=150, items=80, ratings=5000)
    return folder


SLOW_STARTS = {"pevae": "stage2.max_steps=1000"}
"""Its texts leave the constant one after some 500 steps."""


def validation_loss(system: str, data: Path, out: Path) -> float:
    changes = [f"system={system}", *SETTINGS, *([SLOW_STARTS[system]] if system in SLOW_STARTS else [])]
    metrics = train_baseline(load_config("quickstart", changes), data, out, LocalContext())
    return float(metrics["validation_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_ids_gain_and_shuffled_ids_gain_nothing(
    system: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = validation_loss(system, data, tmp_path / "own")
    read = Rows.read

    def shuffled(dataset: Dataset, split: str, rows: np.ndarray, model: Baseline, reader: Reader) -> Rows:
        """The rows, with the ids of a random other row."""
        arrays = dataset.arrays

        def dealt(name: str) -> PairArrays:
            user, item, *rest = arrays(name)
            order = np.random.default_rng(0).permutation(len(user))
            return PairArrays(user[order], item[order], *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dataset, "arrays", dealt)
            return read(dataset, split, rows, model, reader)

    monkeypatch.setattr(training.Rows, "read", shuffled)
    dealt_anew = validation_loss(system, data, tmp_path / "dealt")
    assert own < dealt_anew - 0.02
