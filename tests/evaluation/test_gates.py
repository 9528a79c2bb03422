"""Gates: losses equal the model's own, counts equal the routers' own, planted gates are told apart."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.gates import gates_by_hand, gates_that_differ
from helpers.tiny import tiny

from gavamoe.data.dataset import open_dataset
from gavamoe.evaluation.faithfulness.gates import measure_gates
from gavamoe.generation.generator import ExplanationGenerator, Prepared
from gavamoe.generation.request import ExplanationRequest
from gavamoe.model.router import MultiGateRouter
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.train import train_stage1
from gavamoe.stage2.batches import Ragged, TextRows
from gavamoe.stage2.train import train_stage2


@pytest.fixture(scope="module")
def stage2(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("gates")
    settings = tiny("stage2.max_steps=2", "stage2.evaluate_every=0", "stage2.checkpoint_every=0")
    train_stage1(settings, tiny_dataset, work / "stage1", LocalContext())
    train_stage2(settings, tiny_dataset, work / "stage1", work / "stage2", LocalContext())
    return work / "stage2"


@pytest.fixture
def explainer(stage2: Path) -> ExplanationGenerator:
    return gates_that_differ(stage2)


@pytest.fixture(scope="module")
def rows(tiny_dataset: Path) -> tuple[list[ExplanationRequest], list[str]]:
    """20 rows, the third without a text."""
    found = open_dataset(tiny_dataset).table("test").slice(0, 20).to_pylist()
    asked = [ExplanationRequest(r["user"], r["item"], r["rating"], tuple(r["features"])) for r in found]
    return asked, ["" if n == 2 else r["text"] for n, r in enumerate(found)]


def spread(explainer: ExplanationGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go to the gates in turn, whatever stage 1 says: every gate has some."""
    prepare = explainer.prepare

    def prepared(requests: list[ExplanationRequest]) -> Prepared:
        given = prepare(requests)
        spread_out = [replace(filled, cluster=n % 3) for n, filled in enumerate(given.requests)]
        return Prepared(spread_out, given.prompts)

    monkeypatch.setattr(explainer, "prepare", prepared)


Rows = tuple[list[ExplanationRequest], list[str]]


def test_losses_equal_the_models_own(
    explainer: ExplanationGenerator, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread(explainer, monkeypatch)
    use = measure_gates(explainer, *rows)
    assert use is not None
    assert use.loss_NK.shape == (19, 3)
    spoken = [n for n, text in enumerate(rows[1]) if text]
    prepared = explainer.prepare([rows[0][n] for n in spoken])
    texts = TextRows(
        Ragged.pack(prepared.prompts), Ragged.pack(explainer.builder.answers([rows[1][n] for n in spoken]))
    )
    for row in (0, 7, 18):
        batch = texts.collate(np.array([row]), prepared.clusters, explainer.builder.end)
        for gate in range(3):
            batch["cluster_ids"] = torch.tensor([gate])
            with torch.no_grad():
                loss = explainer.model(**batch).loss
            assert use.loss_NK[row, gate] == pytest.approx(float(loss), rel=1e-4)


def test_expert_counts_equal_the_routers_own(
    explainer: ExplanationGenerator, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread(explainer, monkeypatch)
    chosen: list[torch.Tensor] = []
    forward = MultiGateRouter.forward

    def recorded(self: MultiGateRouter, hidden: torch.Tensor, clusters: torch.Tensor | None):  # type: ignore[no-untyped-def]
        found = forward(self, hidden, clusters)
        chosen.append(found[2])
        return found

    monkeypatch.setattr(MultiGateRouter, "forward", recorded)
    # One row a batch and one gate: then all choices of a forward pass belong to it.
    monkeypatch.setattr("gavamoe.evaluation.faithfulness.gates.BATCH_SIZE", 1)
    use = measure_gates(explainer, rows[0][:1], rows[1][:1])
    assert use is not None
    layers = len(explainer.model.model.layers)
    own = chosen[-layers:]  # the last pass is through the row's own gate
    answer = len(explainer.builder.answers(rows[1][:1])[0])
    for layer, experts_MS in enumerate(own):
        scored = experts_MS[-answer - 1 : -1]
        counts = torch.bincount(scored.flatten(), minlength=use.used_LKE.shape[-1])
        assert use.used_LKE[layer, 0].tolist() == counts.tolist()
    assert use.used_LKE[:, 1:].sum() == 0


def test_equal_gates_overlap_and_opposite_gates_do_not(explainer: ExplanationGenerator, rows: Rows) -> None:
    with torch.no_grad():
        for layer in explainer.model.model.layers:
            weight = layer.mlp.router.weight
            weight[1] = weight[0]  # a copy
            weight[2] = -weight[0]  # its two best are the other's two worst of four
    use = measure_gates(explainer, *rows)
    assert use is not None
    assert use.shared_KK[0, 1] == pytest.approx(1.0)
    assert use.shared_KK[0, 2] == pytest.approx(0.0)
    assert np.diag(use.shared_KK) == pytest.approx(np.ones(3))
    assert use.loss_NK[:, 0] == pytest.approx(use.loss_NK[:, 1], rel=1e-5)
    assert (use.loss_NK[:, 0] != use.loss_NK[:, 2]).all()


def test_measures_by_hand() -> None:
    use = gates_by_hand()
    assert use.own_gap_N().tolist() == [2.0, -1.5, 1.5]
    assert use.own_best_N().tolist() == [1.0, 0.0, 1.0]
    # even over 4, then one of 4: mean of 1 and 0; two of four in both layers: ln 2 / ln 4
    assert use.entropy_K() == pytest.approx([0.5, math.log(2) / math.log(4), np.nan], nan_ok=True)
    shown = use.summary()
    assert shown["loss"] == [[2.0, 1.5, 3.0], [2.0, 2.0, 5.0], None]
    assert shown["rows"] == [2, 1, 0]
    assert shown["entropy"][2] is None
    assert shown["expert_use"][0] == pytest.approx([25 / 40, 5 / 40, 5 / 40, 5 / 40])
    assert shown["expert_use"][2] is None
    assert shown["chance_overlap"] == 0.5


def test_nothing_to_read(explainer: ExplanationGenerator, rows: Rows) -> None:
    assert measure_gates(explainer, rows[0][:2], ["", " "]) is None


def test_measuring_changes_nothing(explainer: ExplanationGenerator, rows: Rows) -> None:
    before = {name: tensor.clone() for name, tensor in explainer.model.state_dict().items()}
    one, two = (measure_gates(explainer, *rows) for _ in range(2))
    assert one is not None
    assert two is not None
    assert (one.loss_NK == two.loss_NK).all()
    assert all(torch.equal(before[name], tensor) for name, tensor in explainer.model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in explainer.model.modules())
