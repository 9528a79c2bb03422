"""The trained model reads each evaluated row's own text, teacher-forced; nothing is written.

Three times, with less and less that is known of the user (`row_losses.CONDITIONS`):

    shown     what a request with rating and features gives: user's slot, own gate
    hidden    the unknown user's slot, own gate: all that the model knows of the user is the gate
    stranger  the unknown user's slot, and the gate that stage 1 finds for 3 of the user's training rows (item, rating,
              text), as `explain --history` does: the user as a service meets it first

For systems that are stage-2 artifacts: PETER has no gate, and its user row is no slot in a prompt.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gavamoe.data.dataset import Dataset
from gavamoe.evaluation.losses.row_losses import CONDITIONS, RowLosses
from gavamoe.evaluation.rows import EvaluatedRows, requests_of
from gavamoe.model.explainer import IGNORED
from gavamoe.stage1.strangers.history import MAX_TEXT_CHARS, Entry
from gavamoe.stage2.batches import Batch, Ragged, TextRows

if TYPE_CHECKING:
    from gavamoe.generation.generator import ExplanationGenerator
    from gavamoe.generation.request import ExplanationRequest, FilledRequest

BATCH_SIZE = 16
BLOCK_ROWS = 1024
"""Rows whose prompts are in memory together; batches of similar length are made within."""
HISTORY_ROWS = 3
"""Training rows by which a stranger is told, at most."""

Histories = dict[int, tuple[Entry, ...]]


def measure_row_losses(
    explainer: "ExplanationGenerator", dataset: Dataset, rows: EvaluatedRows, seed: int
) -> RowLosses | None:
    """Read the rows that have a text under each condition; None without any.

    Args:
        seed: of the training rows by which strangers are told.
    """
    read = np.flatnonzero([bool(text.strip()) for text in rows.references])
    if not len(read):
        return None
    requests = requests_of(rows, "given")
    train_user, written = dataset.arrays("train").user, _rows_with_text(dataset)
    training_rows_U = np.bincount(train_user[written], minlength=dataset.catalog.n_users)
    told = histories(dataset, written, rows.pairs.user[read], seed)
    losses: dict[str, list[np.ndarray]] = {condition: [] for condition in CONDITIONS}
    tokens, clusters = [], []
    for start in range(0, len(read), BLOCK_ROWS):
        block = read[start : start + BLOCK_ROWS].tolist()
        shown = explainer.filler.fill([requests[row] for row in block])
        answers = explainer.builder.answers([rows.references[row] for row in block])
        views: dict[str, Sequence[FilledRequest | None]] = {
            "shown": shown,
            "hidden": _hidden(explainer, shown),
            "stranger": _strangers(explainer, shown, told),
        }
        for condition, view in views.items():
            losses[condition].append(_read(explainer, view, answers))
        tokens.append(np.array([len(answer) for answer in answers], dtype=np.int64))
        clusters.append(np.array([filled.cluster for filled in shown], dtype=np.int16))
    user_N = rows.pairs.user[read]
    return RowLosses(
        row_N=rows.index[read].astype(np.int64),
        user_N=np.array([dataset.catalog.user_id(user) for user in user_N.tolist()], dtype=np.str_),
        training_rows_N=training_rows_U[user_N].astype(np.int64),
        tokens_N=np.concatenate(tokens),
        loss_N={condition: np.concatenate(parts) for condition, parts in losses.items()},
        cluster_N=np.concatenate(clusters),
    )


def histories(dataset: Dataset, written: np.ndarray, users: np.ndarray, seed: int) -> Histories:
    """Up to HISTORY_ROWS training rows of each of the users, drawn by the seed, in file order; none for users without.

    The draw depends on the dataset and the seed alone: every system is told the same of a user.

    Args:
        written: training rows with a text, ascending, int64.
    """
    train = dataset.arrays("train")
    key_N = np.random.default_rng(seed).random(len(train.user))
    rows = written[np.isin(train.user[written], users)]
    rows = rows[np.lexsort((key_N[rows], train.user[rows]))]
    first = np.flatnonzero(np.diff(train.user[rows], prepend=-1))  # where each user's rows begin
    place = np.arange(len(rows)) - np.repeat(first, np.diff(first, append=len(rows)))
    chosen = np.sort(rows[place < HISTORY_ROWS])
    told: dict[int, list[Entry]] = {}
    for row, text in zip(chosen.tolist(), _texts(dataset, chosen), strict=True):
        rating = float(train.rating[row])
        entry = Entry(int(train.item[row]), None if np.isnan(rating) else rating, text[:MAX_TEXT_CHARS])
        told.setdefault(int(train.user[row]), []).append(entry)
    return {user: tuple(entries) for user, entries in told.items()}


def _rows_with_text(dataset: Dataset) -> np.ndarray:
    """Training rows that have a text, ascending, a batch of texts in memory at a time: int64."""
    found, start = [], 0
    for batch in dataset.batches("train", ["text"]):
        written = [bool(text and text.strip()) for text in batch["text"].to_pylist()]
        found.append(start + np.flatnonzero(written))
        start += batch.num_rows
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _texts(dataset: Dataset, rows: np.ndarray) -> list[str]:
    """Texts of training rows, ascending, without holding the others in memory."""
    texts: list[str] = []
    start = 0
    for batch in dataset.batches("train", ["text"]):
        inside = rows[(rows >= start) & (rows < start + batch.num_rows)] - start
        texts += batch["text"].take(inside.tolist()).to_pylist()
        start += batch.num_rows
    return texts


def _hidden(explainer: "ExplanationGenerator", shown: Sequence["FilledRequest"]) -> list["FilledRequest | None"]:
    nobody = explainer.catalog.n_users
    return [replace(filled, request=replace(filled.request, user=nobody)) for filled in shown]


def _strangers(
    explainer: "ExplanationGenerator", shown: Sequence["FilledRequest"], told: Histories
) -> list["FilledRequest | None"]:
    """The rows with their users as strangers; None where nothing is told of the user, or the model takes no strangers.

    Random routes deal a stranger as they deal everybody. A planted group is known of nobody who comes.
    """
    filler = explainer.filler
    if not filler.serves_strangers and (filler.control is None or filler.control.kind != "random"):
        return [None] * len(shown)
    asked: dict[int, ExplanationRequest] = {}
    for row, filled in enumerate(shown):
        if history := told.get(filled.request.user):
            # An index of its own above all users': random routes give each stranger a gate that is not the user's.
            user = explainer.catalog.n_users + filled.request.user
            history = history if filler.control is None else ()
            asked[row] = replace(filled.request, user=user, history=history)
    found = dict(zip(asked, filler.fill(list(asked.values())), strict=True))
    return [found.get(row) for row in range(len(shown))]


def _read(
    explainer: "ExplanationGenerator", view: Sequence["FilledRequest | None"], answers: Sequence[list[int]]
) -> np.ndarray:
    """Nats of each row's answer, in batches of similar length: float64 (N,), NaN for rows without a request."""
    loss_N = np.full(len(view), np.nan)
    place = [row for row, filled in enumerate(view) if filled is not None]
    requests = [filled for filled in view if filled is not None]
    if not requests:
        return loss_N
    texts = TextRows(Ragged.pack(explainer.prompts(requests)), Ragged.pack([answers[row] for row in place]))
    cluster_ids_N = explainer.cluster_ids(requests)
    order = np.argsort(texts.lengths, kind="stable")
    for start in range(0, len(order), BATCH_SIZE):
        rows = order[start : start + BATCH_SIZE]
        batch = texts.collate(rows, np.zeros(len(texts), np.int64), explainer.builder.end)
        loss_N[np.array(place)[rows]] = answer_losses(explainer, batch, cluster_ids_N[torch.from_numpy(rows)])
    return loss_N


@torch.inference_mode()
def answer_losses(explainer: "ExplanationGenerator", batch: Batch, cluster_ids_B: Tensor) -> np.ndarray:
    """Negative log-likelihood of each row's answer, summed over its tokens, through the given gates: float64 (B,)."""
    device = explainer.device
    positions_P = scored_positions(batch).any(dim=0).nonzero()[:, 0]
    logits_BPV = explainer.model(
        input_ids=batch["input_ids"].to(device),
        attention_mask=batch["attention_mask"].to(device),
        cluster_ids=cluster_ids_B.to(device),
        logits_to_keep=positions_P.to(device),
        use_cache=False,
        right_padded=True,
    ).logits
    targets_BP = batch["labels"][:, positions_P + 1].to(device)
    loss_BP = functional.cross_entropy(
        logits_BPV.float().transpose(1, 2), targets_BP, ignore_index=IGNORED, reduction="none"
    )
    summed: np.ndarray = loss_BP.double().sum(dim=1).cpu().numpy()
    return summed


def scored_positions(batch: Batch) -> Tensor:
    """(B, T) bool: the positions whose next token belongs to the answer."""
    return functional.pad(batch["labels"] != IGNORED, (0, 1))[:, 1:]
