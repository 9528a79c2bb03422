"""PETER as a system of `gavamoe ablate`: trained on a dataset, kept in a folder, and a writer after that.

Its budget is stage 2's: as many steps of as many rows, the same tokens, schedule, clipping and validation rows; the
state of the lowest validation loss is kept. One process, no Ray: the model is small. What is ours, not its paper's:
byte-level tokens in place of words, AdamW, several features, and a row for users and items never seen.

Shapes: N rows of a split, B rows of a batch.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gavamoe.artifacts.files import read_json, write_folder, write_json
from gavamoe.artifacts.manifest import load_weights, read_manifest, save_weights, write_manifest
from gavamoe.config.schema import GenerationConfig, PromptConfig, RunConfig
from gavamoe.data.dataset import Dataset, PairArrays
from gavamoe.data.ratings import RatingScale
from gavamoe.errors import InputError, RunError, validated
from gavamoe.experiments.baselines.peter_model import IDS, Peter, PeterSpec
from gavamoe.generation.detokenize import clean_text
from gavamoe.generation.generator import Explanation
from gavamoe.generation.prompts import plain_line
from gavamoe.generation.request import ExplanationRequest
from gavamoe.model.base_model import encode_texts, special_ids
from gavamoe.runtime.progress import OnProgress
from gavamoe.stage2.batches import BatchPlan, Ragged, TextRows
from gavamoe.stage2.schedule import rate_at
from gavamoe.stage2.tokenized_rows import (
    encode_rows,
    prompt_builder,
    rating_scale,
    rows_with_text,
    usual_features,
    validation_rows,
)

_SPEC_FILE, _WEIGHTS_FILE, _TOKENIZER, _METRICS_FILE = "peter.json", "peter.safetensors", "tokenizer", "metrics.json"
_CHARACTERS = 1024
"""Characters of a row's features that are read, at most."""


def train_peter(
    config: RunConfig, data: Dataset, out: Path, *, features: bool, on_progress: OnProgress | None = None
) -> dict[str, Any]:
    """Train and write the artifact `out`, in place of an earlier one; returns its metrics.

    Raises:
        InputError: no training row has a text.
        RunError: the loss is no longer finite.
    """
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    stage2 = config.stage2
    builder = prompt_builder(config, data)
    tokenizer = builder.tokenizer
    prefix = _Prefix(tokenizer, stage2.prompt, features)
    rows = {"train": rows_with_text(data, "train"), "valid": validation_rows(config, data)}
    splits = {
        split: _Rows.read(data, split, chosen, prefix, encode_rows(builder, data, split, chosen).answers)
        for split, chosen in rows.items()
    }
    rated = splits["train"].pairs.rating
    positions = IDS + prefix.longest + max(stage2.prompt.max_explanation_tokens, config.generation.max_new_tokens)
    spec = PeterSpec(
        size=config.baselines.peter,
        vocabulary=len(tokenizer),
        n_users=data.catalog.known_users,
        n_items=data.catalog.known_items,
        places=positions,
        mean_rating=0.0 if np.isnan(rated).all() else float(np.nanmean(rated)),
        features=features,
    )
    model = Peter(spec)
    losses, kept, steps = _train(config, model, splits["train"], splits["valid"], builder.end, on_progress)
    metrics = {
        "validation_loss": losses.get(kept),
        "validation_losses": [{"step": step, "loss": loss} for step, loss in losses.items()],
        "kept_step": kept,
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": time.perf_counter() - started,
    }
    with write_folder(out, replace=True) as aside:
        write_json(aside / _SPEC_FILE, spec.model_dump(mode="json"))
        save_weights(aside / _WEIGHTS_FILE, model)
        tokenizer.save_pretrained(aside / _TOKENIZER)
        write_json(aside / _METRICS_FILE, metrics)
        write_manifest(aside, "peter", config, {"dataset": data.fingerprint})
    return metrics


class PeterWriter:
    """A writer of texts for `evaluate`, with the interface of `ExplanationGenerator`; it writes greedily."""

    def __init__(self, model: Peter, tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig, data: Dataset) -> None:
        self.model, self.tokenizer, self.catalog = model.eval(), tokenizer, data.catalog
        self._prefix = _Prefix(tokenizer, prompt, model.spec.features)
        self._scale: RatingScale | None = rating_scale(data)
        self._usual = usual_features(data, prompt.max_features)

    @classmethod
    def load(cls, folder: Path, data: Dataset, prompt: PromptConfig) -> "PeterWriter":
        """Read the artifact.

        Raises:
            InputError: missing, damaged, or trained on another dataset.
        """
        manifest = read_manifest(folder, "peter")
        if manifest.inputs.get("dataset") != data.fingerprint:
            raise InputError(f"{folder}: was trained on another dataset than {data.path}; remove it to train again")
        spec = validated(PeterSpec, read_json(folder / _SPEC_FILE), folder / _SPEC_FILE, "a PETER model")
        model = Peter(spec)
        load_weights(folder / _WEIGHTS_FILE, model)
        tokenizer = AutoTokenizer.from_pretrained(folder / _TOKENIZER, trust_remote_code=False, local_files_only=True)
        return cls(model, tokenizer, prompt, data)

    def explain(
        self,
        requests: Sequence[ExplanationRequest],
        generation: GenerationConfig,
        seed: int = 0,
        on_progress: OnProgress | None = None,
    ) -> list[Explanation]:
        """One text per request, in their order; only the batch size and the length of `generation` are used."""
        del seed
        spec = self.model.spec
        features = [self._features(request) for request in requests]
        prefixes = self._prefix.encode(features)
        users = np.array([min(request.user, spec.n_users) for request in requests], dtype=np.int64)
        items = np.array([min(request.item, spec.n_items) for request in requests], dtype=np.int64)
        end = self._prefix.end
        banned = sorted(special_ids(self.tokenizer) - {end})
        explanations: dict[int, Explanation] = {}
        for batch in _equally_long(prefixes, generation.batch_size):
            texts, ratings = self.model.write(
                torch.from_numpy(users[batch]),
                torch.from_numpy(items[batch]),
                torch.tensor([prefixes[row] for row in batch]),
                generation.max_new_tokens,
                end,
                banned,
            )
            for row, tokens, predicted in zip(batch, texts, ratings, strict=True):
                explanations[row] = self._explanation(requests[row], features[row], tokens, predicted)
            if on_progress:
                on_progress(len(explanations), len(requests))
        return [explanations[row] for row in range(len(requests))]

    def _features(self, request: ExplanationRequest) -> tuple[str, ...]:
        if not self.model.spec.features:
            return ()
        if request.features is None:
            return self.catalog.usual_features(request.user, request.item, self._usual)
        return request.features

    def _explanation(
        self, request: ExplanationRequest, features: tuple[str, ...], tokens: list[int], predicted: float
    ) -> Explanation:
        usual = None if self._scale is None else self._scale.nearest(predicted)
        return Explanation(
            text=clean_text(self.tokenizer, tokens),
            cluster=0,
            responsibilities=(1.0,),
            rating=usual if request.rating is None else request.rating,
            rating_given=request.rating is not None,
            predicted_rating=predicted,
            features=features,
            features_given=request.features is not None,
            user_known=0 <= request.user < self.catalog.known_users,
            item_known=0 <= request.item < self.catalog.known_items,
            new_tokens=len(tokens),
        )


class _Prefix:
    """What stands between the two ids and the explanation: feature tokens, then <s>."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig, features: bool) -> None:
        self._tokenizer, self._most, self._features = tokenizer, prompt.max_features, features
        self.longest = (prompt.max_tokens if features else 0) + 1
        end = tokenizer.eos_token_id
        assert isinstance(end, int)  # load_tokenizer refuses one without
        self.end = end
        self._start = tokenizer.bos_token_id if isinstance(tokenizer.bos_token_id, int) else end

    def encode(self, features: Sequence[Sequence[str]]) -> list[list[int]]:
        if not self._features:
            return [[self._start] for _ in features]
        lines = [plain_line(", ".join(words[: self._most]), _CHARACTERS) for words in features]
        return [[*ids[: self.longest - 1], self._start] for ids in encode_texts(self._tokenizer, lines)]


class _Rows:
    """The rows of a split with their pairs."""

    def __init__(self, text: TextRows, pairs: PairArrays) -> None:
        self.text, self.pairs = text, pairs

    @classmethod
    def read(cls, data: Dataset, split: str, rows: np.ndarray, prefix: _Prefix, answers: Ragged) -> "_Rows":
        words = data.table(split, ["features"])["features"].take(rows).to_pylist()
        prefixes = prefix.encode([word or () for word in words])
        pairs = PairArrays(*(column[rows] for column in data.arrays(split)))
        return cls(TextRows(Ragged.pack(prefixes), answers), pairs)

    def batch(self, rows: np.ndarray, spec: PeterSpec, end: int, hidden: np.ndarray | None = None) -> dict[str, Tensor]:
        """Tensors of B rows; `hidden`, bool (2, B), hides a row's user or item behind the unknown one."""
        text = self.text.collate(rows, np.zeros(len(self.text), np.int64), pad=end)
        users = np.minimum(self.pairs.user[rows], spec.n_users).astype(np.int64)
        items = np.minimum(self.pairs.item[rows], spec.n_items).astype(np.int64)
        if hidden is not None:
            users[hidden[0]], items[hidden[1]] = spec.n_users, spec.n_items
        return {
            "users": torch.from_numpy(users),
            "items": torch.from_numpy(items),
            "ratings": torch.from_numpy(self.pairs.rating[rows]),
            "tokens": text["input_ids"],
            "labels": text["labels"],
        }


def _train(
    config: RunConfig, model: Peter, train: _Rows, valid: _Rows, end: int, on_progress: OnProgress | None
) -> tuple[dict[int, float], int, int]:
    """Leaves the best state in `model`; returns validation losses by step, the kept step, the steps taken."""
    stage2 = config.stage2
    rows_of_step = stage2.batch_size * stage2.gradient_accumulation * config.runtime.workers
    plan = BatchPlan(train.text.lengths, rows_of_step, 1, 1, config.seed)
    planned = stage2.epochs * plan.steps_per_epoch
    steps = min(planned, stage2.max_steps) if stage2.max_steps else planned
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.baselines.peter.learning_rate, weight_decay=stage2.weight_decay, fused=True
    )
    losses: dict[int, float] = {}
    kept: tuple[int, dict[str, Tensor]] | None = None
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = config.baselines.peter.learning_rate * rate_at(step, steps, stage2)
        _take_step(config, model, train, plan.rows(step).reshape(-1), step, end, optimizer)
        done = step + 1
        if len(valid.text) and (done == steps or (stage2.evaluate_every and done % stage2.evaluate_every == 0)):
            losses[done] = _validation_loss(model, valid, end, stage2.batch_size)
            if stage2.keep == "last" or kept is None or losses[done] < losses[kept[0]]:
                kept = done, {name: value.clone() for name, value in model.state_dict().items()}
        if on_progress:
            on_progress(done, steps)
    if kept is None:  # nothing to judge by: the last state
        return losses, steps, steps
    model.load_state_dict(kept[1])
    return losses, kept[0], steps


def _take_step(
    config: RunConfig,
    model: Peter,
    train: _Rows,
    rows: np.ndarray,
    step: int,
    end: int,
    optimizer: torch.optim.Optimizer,
) -> None:
    """One optimizer step on the given rows.

    Raises:
        RunError: the loss is no longer finite.
    """
    # Hidden ids train the row of the unknown user and item, as id dropout does in stage 2.
    random = np.random.default_rng([config.seed, step])
    hidden = random.random((2, len(rows))) < config.stage1.unknown_id_rate
    model.train()
    loss = model.losses(train.batch(rows, model.spec, end, hidden), end)["loss"]
    if not torch.isfinite(loss):
        raise RunError(f"PETER: the loss is {float(loss)} at step {step + 1}; lower baselines.peter.learning_rate")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.stage2.clip_norm)
    optimizer.step()


@torch.inference_mode()
def _validation_loss(model: Peter, valid: _Rows, end: int, size: int) -> float:
    """Nats per explanation token, as stage 2 measures it."""
    model.eval()
    order = np.argsort(valid.text.lengths, kind="stable")
    total = 0.0
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        tokens = int(valid.text.answers.lengths[rows].sum())
        total += float(model.losses(valid.batch(rows, model.spec, end), end)["explanation"]) * tokens
    return total / max(1, int(valid.text.answers.lengths.sum()))


def _equally_long(prefixes: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Rows in batches of at most `size` whose prefixes have one length: no padding inside."""
    order = sorted(range(len(prefixes)), key=lambda row: len(prefixes[row]))
    batches: list[list[int]] = []
    for row in order:
        if batches and len(batches[-1]) < size and len(prefixes[batches[-1][0]]) == len(prefixes[row]):
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
