"""Losses of the rows' own texts: equal to the model's own, with the user shown, hidden, and as a stranger."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.gates import gates_that_differ
from helpers.stage2_runs import Trained
from torch.nn import functional

from gavamoe.data.dataset import Dataset, PairArrays
from gavamoe.evaluation.losses.measure import BATCH_SIZE, Histories, histories, measure_row_losses
from gavamoe.evaluation.losses.row_losses import RowLosses
from gavamoe.evaluation.rows import EvaluatedRows, select_rows
from gavamoe.generation.generator import ExplanationGenerator
from gavamoe.generation.request import ExplanationRequest, FilledRequest
from gavamoe.stage1.route_overrides import RouteControl


@pytest.fixture(scope="module")
def explainer(torch_run: Trained) -> ExplanationGenerator:
    return gates_that_differ(torch_run.out)


@pytest.fixture(scope="module")
def rows(planted: Dataset) -> EvaluatedRows:
    """40 test rows; the third has no text."""
    chosen = select_rows(planted, "test", 40, 0)
    return replace(chosen, references=[text if n != 2 else " " for n, text in enumerate(chosen.references)])


@pytest.fixture(scope="module")
def losses(explainer: ExplanationGenerator, planted: Dataset, rows: EvaluatedRows) -> RowLosses:
    found = measure_row_losses(explainer, planted, rows, 0)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def told(planted: Dataset) -> Histories:
    train = planted.arrays("train")
    return histories(planted, np.arange(len(train.user)), np.arange(planted.catalog.n_users), 0)


def plain_loss(explainer: ExplanationGenerator, filled: FilledRequest, cluster: int, text: str) -> float:
    """One row, alone and unpadded: minus the sum of the log-probabilities of its answer's tokens."""
    [prompt], [answer] = explainer.prompts([filled]), explainer.builder.answers([text])
    with torch.no_grad():
        logits_1TV = explainer.model(
            input_ids=torch.tensor([prompt + answer]), cluster_ids=torch.tensor([cluster])
        ).logits
    log_TV = functional.log_softmax(logits_1TV[0].double(), dim=-1)
    return -float(sum(log_TV[len(prompt) + place - 1, token] for place, token in enumerate(answer)))


def request_of(rows: EvaluatedRows, row: int) -> ExplanationRequest:
    user, item, rating = (column[row] for column in rows.pairs)
    return ExplanationRequest(int(user), int(item), float(rating), tuple(rows.features[row]))


def test_losses_equal_a_plain_forward_pass(
    explainer: ExplanationGenerator, planted: Dataset, rows: EvaluatedRows, losses: RowLosses, told: Histories
) -> None:
    assert losses.row_N.tolist() == [index for n, index in enumerate(rows.index.tolist()) if n != 2]
    nobody = planted.catalog.n_users
    for place, row in ((0, 0), (1, 1), (2, 3), (38, 39)):
        asked, text = request_of(rows, row), rows.references[row]
        [filled] = explainer.filler.fill([asked])
        expected = {"shown": plain_loss(explainer, filled, filled.cluster, text)}
        [unknown] = explainer.filler.fill([replace(asked, user=nobody)])
        expected["hidden"] = plain_loss(explainer, unknown, filled.cluster, text)
        [stranger] = explainer.filler.fill([replace(asked, user=nobody, history=told[asked.user])])
        expected["stranger"] = plain_loss(explainer, stranger, stranger.cluster, text)
        assert {name: loss_N[place] for name, loss_N in losses.loss_N.items()} == pytest.approx(expected, rel=1e-4)
        assert losses.tokens_N[place] == len(explainer.builder.answers([text])[0])
        assert losses.cluster_N[place] == filled.cluster
        assert losses.user_N[place] == planted.catalog.user_id(asked.user)


def test_training_rows_of_the_user_are_those_with_a_text(
    planted: Dataset, rows: EvaluatedRows, losses: RowLosses
) -> None:
    count_U = np.bincount(planted.arrays("train").user, minlength=planted.catalog.n_users)
    assert losses.training_rows_N.tolist() == count_U[np.delete(rows.pairs.user, 2)].tolist()


def test_hidden_users_of_one_gate_are_one_user(explainer: ExplanationGenerator, planted: Dataset) -> None:
    """Every known user asks the same of the same item: what is hidden differs by the gate alone."""
    users = np.arange(planted.catalog.known_users, dtype=np.int32)
    same = EvaluatedRows(
        index=users.astype(np.int64),
        pairs=PairArrays(users, np.full_like(users, 5), np.full(len(users), 4.0, np.float32)),
        references=["What a fine book about ghosts!"] * len(users),
        features=[["ghosts"]] * len(users),
    )
    found = measure_row_losses(explainer, planted, same, 0)
    assert found is not None
    clusters = np.unique(found.cluster_N)
    assert len(clusters) > 1
    means = []
    for cluster in clusters:
        hidden, shown = (found.loss_N[name][found.cluster_N == cluster] for name in ("hidden", "shown"))
        assert hidden == pytest.approx(np.full(len(hidden), hidden[0]), rel=1e-5)
        assert len(np.unique(shown.round(4))) > 1
        means.append(hidden[0])
    assert len(np.unique(np.round(means, 3))) == len(clusters)


def test_blocks_change_nothing(
    explainer: ExplanationGenerator,
    planted: Dataset,
    rows: EvaluatedRows,
    losses: RowLosses,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert BATCH_SIZE > 5
    monkeypatch.setattr("gavamoe.evaluation.losses.measure.BLOCK_ROWS", 5)
    found = measure_row_losses(explainer, planted, rows, 0)
    assert found is not None
    for name, loss_N in losses.loss_N.items():
        assert found.loss_N[name] == pytest.approx(loss_N, rel=1e-5, nan_ok=True)
    assert found.row_N.tolist() == losses.row_N.tolist()


def test_strangers_are_told_by_three_training_rows(planted: Dataset, told: Histories) -> None:
    train, texts = planted.arrays("train"), planted.table("train", ["text"])["text"].to_pylist()
    theirs: dict[int, set[tuple[int, float, str]]] = {}
    for user, item, rating, text in zip(*(column.tolist() for column in train), texts, strict=True):
        theirs.setdefault(user, set()).add((item, rating, text))
    assert set(told) == set(theirs)
    for user, history in told.items():
        assert set(history) <= theirs[user]
        assert len(history) == min(3, len(theirs[user]))
    every = np.arange(len(texts))
    one = histories(planted, every, np.array([7]), 0)
    assert one == {7: told[7]}, "what is told of a user does not depend on who else is asked about"
    assert histories(planted, every, np.arange(60), 1) != told
    written = np.flatnonzero(train.user != 7)
    assert 7 not in histories(planted, written, np.arange(60), 0)


def test_users_without_a_training_text_are_no_strangers(planted: Dataset, losses: RowLosses) -> None:
    unheard = np.isnan(losses.loss_N["stranger"])
    assert 0 < unheard.sum() < len(unheard)
    assert (unheard == (losses.training_rows_N == 0)).all()
    assert not np.isnan(losses.loss_N["hidden"]).any()


def test_route_controls_deal_strangers_a_gate_or_leave_them(
    explainer: ExplanationGenerator,
    planted: Dataset,
    rows: EvaluatedRows,
    losses: RowLosses,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(explainer.filler, "control", RouteControl(kind="random", clusters=3, seed=0))
    dealt = measure_row_losses(explainer, planted, rows, 0)
    assert dealt is not None
    assert (np.isnan(dealt.loss_N["stranger"]) == np.isnan(losses.loss_N["stranger"])).all()
    assert (dealt.loss_N["stranger"] != dealt.loss_N["hidden"]).any(), "a stranger's gate is not the user's"
    groups = tuple(int(user % 3) for user in range(planted.catalog.n_users))
    monkeypatch.setattr(explainer.filler, "control", RouteControl(kind="oracle", clusters=3, seed=0, groups=groups))
    planned = measure_row_losses(explainer, planted, rows, 0)
    assert planned is not None
    assert np.isnan(planned.loss_N["stranger"]).all()


def test_runs_made_before_strangers_were_served_have_none(
    explainer: ExplanationGenerator, planted: Dataset, rows: EvaluatedRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explainer.filler, "_crowd", None)
    found = measure_row_losses(explainer, planted, rows, 0)
    assert found is not None
    assert np.isnan(found.loss_N["stranger"]).all()
    assert "stranger" not in found.summary()


def test_nothing_to_read(explainer: ExplanationGenerator, planted: Dataset, rows: EvaluatedRows) -> None:
    assert measure_row_losses(explainer, planted, replace(rows, references=[" "] * 40), 0) is None


def test_reading_changes_nothing(explainer: ExplanationGenerator, losses: RowLosses, tmp_path: Path) -> None:
    assert not any(parameter.grad is not None for parameter in explainer.model.parameters())
    losses.write(tmp_path)
    again = RowLosses.read(tmp_path)
    assert again is not None
    assert again.summary() == losses.summary()
