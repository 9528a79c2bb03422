"""Training of a baseline: the explainer's budget, rows and schedule around any `frame.Baseline`.

`train_baseline` runs as stage 2 does, by Ray Train on one worker or in this process, with checkpoints, and writes the
artifact `baseline/`, which is complete in itself. Equal to stage 2: rows of a step, tokens, schedule, clipping,
validation rows and how they are measured; the state of the lowest validation loss is kept.

Shapes: N rows of a split, B rows of a step, T tokens.
"""

import copy
import math
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gavamoe.artifacts.files import read_json, write_json
from gavamoe.artifacts.tensor_files import load_tensors
from gavamoe.baselines.frame import Baseline, Batch, Columns, Losses, Phase, Reader
from gavamoe.baselines.registry import find_baseline
from gavamoe.baselines.writing import write_artifact
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset, PairArrays, open_dataset
from gavamoe.errors import InputError, RunError
from gavamoe.runtime.context import Context
from gavamoe.stage2.batches import BatchPlan, Ragged, TextRows
from gavamoe.stage2.clear_texts import training_rows
from gavamoe.stage2.schedule import rate_at
from gavamoe.stage2.tokenized_rows import prompt_builder, rating_scale, validation_rows

LOG_EVERY = 10
"""Optimizer steps between log lines."""
_STATE, _TENSORS = "state.json", "training.pt"


def train_baseline(config: RunConfig, dataset: Path, out: Path, context: Context) -> dict[str, Any]:
    """Train `config.system` on this worker and write the artifact `out`; returns its metrics.

    Raises:
        InputError: `out` exists, data or settings that the baseline can't use, or a checkpoint of another training.
        RunError: the loss is no longer finite.
    """
    started = time.perf_counter()
    if Path(out).exists():
        raise InputError(f"{out}: already exists; choose another folder or remove it first")
    entry, data = find_baseline(config.system), open_dataset(dataset)
    kind = entry.load()
    kind.check(config, data)
    torch.manual_seed(config.seed)
    builder = prompt_builder(config, data)
    reader = Reader(builder.tokenizer, config.stage2.prompt, rating_scale(data))
    model = kind.create(config, data, reader, features=entry.features).to(context.device)
    train = Rows.read(data, "train", training_rows(config, data), model, reader)
    valid = Rows.read(data, "valid", validation_rows(config, data), model, reader)
    training = Training(config, model, train, valid, reader.end, context)
    if context.resume_from is not None:
        training.resume(context.resume_from)
    training.run()
    metrics = training.metrics() | {"seconds": time.perf_counter() - started}
    write_artifact(Path(out), config, data, model, reader, metrics)
    return metrics


class Rows:
    """The rows of a split as tokens, with their pairs."""

    def __init__(self, text: TextRows, pairs: PairArrays) -> None:
        self.text, self.pairs = text, pairs

    @classmethod
    def read(cls, data: Dataset, split: str, rows: np.ndarray, model: Baseline, reader: Reader) -> "Rows":
        """The given rows (ascending) of a split."""
        pairs = PairArrays(*(column[rows] for column in data.arrays(split)))
        table = data.table(split, ["text", "features"]).take(rows)
        spec = model.spec
        columns = Columns(
            users=np.minimum(pairs.user, spec.n_users).astype(np.int64),
            items=np.minimum(pairs.item, spec.n_items).astype(np.int64),
            ratings=pairs.rating,
            features=[words or () for words in table["features"].to_pylist()],
            titles=[data.catalog.item_title(int(item)) for item in pairs.item],
            rows=rows if split == "train" else None,
        )
        longest = reader.prompt.max_explanation_tokens - 1
        answers = [[*ids, reader.end] for ids in reader.encode(table["text"].to_pylist(), longest)]
        prefixes = model.prefixes(columns, reader)
        return cls(TextRows(Ragged.pack(prefixes), Ragged.pack(answers)), pairs)

    def __len__(self) -> int:
        return len(self.text)

    def batch(self, rows: np.ndarray, model: Baseline, end: int, hidden: np.ndarray | None = None) -> Batch:
        """Tensors of B rows; `hidden`, bool (2, B), hides a row's user or item behind the unknown one."""
        text = self.text.collate(rows, np.zeros(len(self.text), np.int64), pad=end)
        users = np.minimum(self.pairs.user[rows], model.spec.n_users).astype(np.int64)
        items = np.minimum(self.pairs.item[rows], model.spec.n_items).astype(np.int64)
        if hidden is not None:
            users[hidden[0]], items[hidden[1]] = model.spec.n_users, model.spec.n_items
        return {
            "users": torch.from_numpy(users),
            "items": torch.from_numpy(items),
            "ratings": torch.from_numpy(self.pairs.rating[rows]),
            "tokens": text["input_ids"],
            "labels": text["labels"],
            "prefix": torch.from_numpy(self.text.prompts.lengths[rows]),
        }


@dataclass
class _Progress:
    """The loop's own state, which a checkpoint keeps."""

    step: int = 0
    """Optimizer steps done, of all phases."""
    validations: list[tuple[int, float]] = field(default_factory=list)
    """(Steps done, nats per token of the explanations)."""
    best: tuple[int, float] | None = None
    """The best validation of this phase."""
    train_loss: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    """Wall time spent in optimizer steps."""
    cpu_seconds: list[float] = field(default_factory=lambda: [0.0])
    """CPU time spent in optimizer steps: until each validation, and until now."""


class Training:
    """The loop of all phases."""

    def __init__(
        self, config: RunConfig, model: Baseline, train: Rows, valid: Rows, end: int, context: Context
    ) -> None:
        self._config, self._model, self._context, self._end = config, model, context, end
        self._train, self._valid = train, valid
        stage2 = config.stage2
        rows_of_step = stage2.batch_size * stage2.gradient_accumulation * config.runtime.workers
        self._plan = BatchPlan(train.text.lengths, rows_of_step, 1, 1, config.seed)
        planned = stage2.epochs * self._plan.steps_per_epoch
        self.steps = min(planned, stage2.max_steps) if stage2.max_steps else planned
        self._phases = _bounds(model.phases(config), self.steps)
        self._progress = _Progress()
        self._best: dict[str, Tensor] | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._unlogged: list[Losses] = []

    def run(self) -> None:
        """Take the steps that are left; the best state of the last phase is in the model at the end."""
        for phase, start, end in self._phases:
            if self._progress.step >= end:
                continue
            self._begin(phase, new=self._progress.step == start)
            while self._progress.step < end:
                self._step(phase, start, end)
                self._after_step(end)
        self._to_best()

    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json, but for the time that all took."""
        progress, model = self._progress, self._model
        loss = None if progress.best is None else progress.best[1]
        return {
            "kept_step": progress.step if progress.best is None else progress.best[0],
            "validation_loss": loss,
            "validation_perplexity": None if loss is None else math.exp(min(loss, 700)),
            "validation_losses": [{"step": step, "loss": value} for step, value in progress.validations],
            "validation_cpu_seconds": progress.cpu_seconds[:-1],
            "cpu_seconds": progress.cpu_seconds[-1],
            "train_loss": progress.train_loss,
            "steps": progress.step,
            "planned_steps": self.steps,
            "steps_per_epoch": self._plan.steps_per_epoch,
            "tokens": progress.tokens,
            "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else None,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "trained_parameters": sum(
                parameter.numel()
                for name, parameter in model.named_parameters()
                if any(phase.trained(name) for phase, _, _ in self._phases)
            ),
        }

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            InputError: it is one of another training.
        """
        state = read_json(folder / _STATE)
        for name, here in self._identity().items():
            if state["identity"].get(name) != here:
                raise InputError(
                    f"{folder / _STATE}: the checkpoint has {name} {state['identity'].get(name)}, this run has {here};"
                    " resume with the same value, or start without --resume"
                )
        values = state["progress"]
        self._progress = _Progress(
            **values
            | {
                "validations": [(int(step), float(loss)) for step, loss in values["validations"]],
                "best": None if values["best"] is None else tuple(values["best"]),
            }
        )
        tensors = load_tensors(folder / _TENSORS, self._context.device)
        self._model.load_state_dict(tensors["model"])
        self._best = tensors["best"]
        for phase, start, end in self._phases:
            if start < self._progress.step < end:
                self._begin(phase, new=False)
                assert self._optimizer is not None
                self._optimizer.load_state_dict(tensors["optimizer"])

    def _identity(self) -> dict[str, Any]:
        return {
            "system": self._config.system,
            "steps": self.steps,
            "steps per epoch": self._plan.steps_per_epoch,
            "seed": self._config.seed,
        }

    def _begin(self, phase: Phase, *, new: bool) -> None:
        """Make a phase's optimizer; a new phase begins with the best state of the one before."""
        if not new and self._optimizer is not None:
            return
        if new:
            self._to_best()
            self._progress.best = self._best = None
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(phase.trained(name))
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                decay = self._config.stage2.weight_decay if parameter.ndim > 1 else 0.0
                groups.setdefault((decay, phase.factor(name)), []).append(parameter)
        self._optimizer = torch.optim.AdamW(
            [
                {"params": parameters, "weight_decay": decay, "factor": factor}
                for (decay, factor), parameters in groups.items()
            ],
            lr=phase.rate,
            fused=True,
        )

    def _step(self, phase: Phase, start: int, end: int) -> None:
        """One optimizer step.

        Raises:
            RunError: the loss is no longer finite.
        """
        config, step = self._config, self._progress.step
        began, cpu = time.perf_counter(), time.process_time()
        optimizer = self._optimizer
        assert optimizer is not None
        # Dropout, samples and hidden ids are the same for this step, whatever ran before; hidden ids train the rows of
        # users and items never seen, as id dropout does in stage 2.
        random = np.random.default_rng([config.seed, step])
        torch.manual_seed(int(np.random.SeedSequence([config.seed, step, 1]).generate_state(1)[0]))
        rows = self._plan.rows(step).reshape(-1)
        hidden = random.random((2, len(rows))) < config.stage1.unknown_id_rate
        share = rate_at(step - start, end - start, config.stage2)
        for group in optimizer.param_groups:
            group["lr"] = phase.rate * group["factor"] * share
        self._model.train()
        optimizer.zero_grad(set_to_none=True)
        # Memory is that of `batch_size` rows, as in stage 2; parts weigh as much as they have explanation tokens.
        tokens = self._train.text.answers.lengths[rows]
        parts: list[Losses] = []
        for begin in range(0, len(rows), config.stage2.batch_size):
            part = slice(begin, begin + config.stage2.batch_size)
            batch = self._train.batch(rows[part], self._model, self._end, hidden[:, part])
            losses = self._losses(batch, step, start, end)
            weight = float(tokens[part].sum() / tokens.sum())
            (losses["loss"] * weight).backward()
            parts.append({name: value.detach().float() * weight for name, value in losses.items()})
        losses = {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}
        if not torch.isfinite(losses["loss"]):
            raise RunError(
                f"{config.system}: the loss is {float(losses['loss'])} at step {step + 1}; lower its learning rate"
                f" (baselines.{find_baseline(config.system).module})"
            )
        clip_gradients(self._model, config.stage2.clip_norm)
        optimizer.step()
        self._unlogged.append(losses)
        progress = self._progress
        progress.step += 1
        progress.tokens += int(self._train.text.lengths[rows].sum())
        progress.seconds += time.perf_counter() - began
        progress.cpu_seconds[-1] += time.process_time() - cpu

    def _losses(self, batch: Batch, step: int, start: int, end: int) -> Losses:
        device = self._context.device
        moved = {name: tensor.to(device) for name, tensor in batch.items()}
        moved["done"] = torch.tensor((step - start) / max(1, end - start), device=device)
        bf16 = self._config.stage2.precision != "fp32"
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            return self._model.losses(moved)

    def _after_step(self, end: int) -> None:
        stage2, step = self._config.stage2, self._progress.step
        validate, checkpoint = step == end or _due(step, stage2.evaluate_every), _due(step, stage2.checkpoint_every)
        if validate or checkpoint or _due(step, LOG_EVERY):
            self._log()
        if validate and len(self._valid):
            self._validate(end)
        if checkpoint or step == self.steps:
            self._checkpoint()

    def _log(self) -> None:
        means = {name: float(torch.stack([step[name] for step in self._unlogged]).mean()) for name in self._unlogged[0]}
        self._progress.train_loss, self._unlogged = means["loss"], []
        progress = self._progress
        self._context.log({"phase": "train", "step": progress.step, "steps": self.steps, **means})

    def _validate(self, end: int) -> None:
        """Nats per token of the validation rows' explanations, as stage 2 measures it; keeps the best state."""
        started, progress = time.perf_counter(), self._progress
        loss = validation_loss(self._valid, self._model, self._end, self._config.stage2.batch_size, self._losses_alone)
        progress.validations.append((progress.step, loss))
        progress.cpu_seconds.append(progress.cpu_seconds[-1])
        better = progress.best is None or loss < progress.best[1]
        if better or (self._config.stage2.keep == "last" and progress.step == end):
            progress.best = progress.step, loss
            self._best = copy.deepcopy(self._model.state_dict())
        seconds = time.perf_counter() - started
        self._context.log(
            {
                "phase": "valid",
                "step": progress.step,
                "steps": self.steps,
                "validation_loss": loss,
                "seconds": seconds,
            }
        )

    def _losses_alone(self, batch: Batch) -> Losses:
        return self._losses(batch, 1, 0, 1)

    def _to_best(self) -> None:
        """Take the best state of the phase that ended."""
        if self._best is not None:
            self._model.load_state_dict(self._best)

    def _checkpoint(self) -> None:
        with tempfile.TemporaryDirectory(prefix="gavamoe-checkpoint-") as name:
            folder = Path(name)
            write_json(folder / _STATE, {"identity": self._identity(), "progress": vars(self._progress)})
            optimizer = {} if self._optimizer is None else self._optimizer.state_dict()
            state = {"model": self._model.state_dict(), "best": self._best, "optimizer": optimizer}
            torch.save(state, folder / _TENSORS)
            self._context.checkpoint(folder, {"step": self._progress.step, "steps": self.steps})


def clip_gradients(model: Baseline, norm: float) -> None:
    """Scale the gradients of what is trained to a norm of at most `norm`; those of `model.apart` on their own."""
    parts: dict[bool, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts.setdefault(name.startswith(model.apart), []).append(parameter)
    for part in parts.values():
        torch.nn.utils.clip_grad_norm_(part, norm)


@torch.inference_mode()
def validation_loss(rows: Rows, model: Baseline, end: int, size: int, losses: Any) -> float:
    """Mean of "explanation" over the tokens of all rows."""
    model.eval()
    order = np.argsort(rows.text.lengths, kind="stable")
    total = 0.0
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        tokens = int(rows.text.answers.lengths[chosen].sum())
        total += float(losses(rows.batch(chosen, model, end))["explanation"]) * tokens
    return total / max(1, int(rows.text.answers.lengths.sum()))


def _bounds(phases: list[Phase], steps: int) -> list[tuple[Phase, int, int]]:
    """Each phase with its first step and the one after its last; none is empty."""
    ends = [round(steps * sum(phase.share for phase in phases[: number + 1])) for number in range(len(phases))]
    ends[-1] = steps
    bounds = list(zip(phases, [0, *ends[:-1]], ends, strict=True))
    return [bound for bound in bounds if bound[1] < bound[2]]


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
