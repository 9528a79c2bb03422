"""Train stage 2 (section 3.4.2): the explainer and stage 1 together, on the joint loss of Eq. 13.

`train_stage2` reads a dataset and a stage-1 folder and writes the artifact `stage2/`, which is complete in itself:
model, tokenizer, README.md, vae_gmm.*, catalog/, prompt.json, routes.parquet, metrics.json, artifact.json. It runs as
one of `context.world_size` workers. Every random choice is a function of (seed, step, worker), so that a resumed run
equals one that never stopped.

Routes: stage 1's at first; where stage 1 is trained too (alpha above 0), training pairs are routed again at the start
of each epoch and validation pairs before each validation: a state is judged by the gates that it would be served with.
In an experiment a rule of `route_overrides` routes instead, from the first step to the last.

The state that becomes the artifact is the best on validation (`stage2.keep`); `stage2.patience` ends a run early.
"""

import contextlib
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, distributed

from gavamoe.artifacts.files import read_json, write_json
from gavamoe.config.schema import RunConfig
from gavamoe.errors import InputError, RunError
from gavamoe.runtime.context import Context
from gavamoe.stage1.routes import route_pairs
from gavamoe.stage1.vae_gmm import VaeGmm
from gavamoe.stage2.best_state import BestState, Progress
from gavamoe.stage2.expert_movement import PROBE_ROWS, Movement, MovementProbe
from gavamoe.stage2.joint_model import VAE_GMM, Losses, part_of_state
from gavamoe.stage2.model_card import write_artifact
from gavamoe.stage2.schedule import rates_at, shared_steps
from gavamoe.stage2.setup import Setup, clusters_of, prepare
from gavamoe.stage2.step_batches import OneAhead, StepBatches
from gavamoe.stage2.training_engines import Engine, make_engine

LOG_EVERY = 10
"""Optimizer steps between log lines."""
SHORT_ROW = 256
"""Tokens up to which plain attention is the faster one on a CPU: the fused kernel's backward pass, made for long
rows, takes a tenth of a step at 96 tokens."""
_FLOAT32_WEIGHTS = "fp32 or bf16"
"""The precisions whose checkpoints hold the same kinds of numbers."""
STATE_FILE, CLUSTERS_FILE = "state.json", "clusters.safetensors"


def train_stage2(config: RunConfig, dataset: Path, stage1: Path, out: Path, context: Context) -> dict[str, Any]:
    """Train on this worker and, on rank 0, write the artifact `out`; every rank returns the metrics.

    Raises:
        InputError: wrong or unfitting inputs, `out` exists, or a checkpoint that this run can't continue.
        RunError: the loss is no longer finite.
    """
    started = time.perf_counter()
    if Path(out).exists():
        raise InputError(f"{out}: already exists; choose another folder or remove it first")
    torch.manual_seed(config.seed)
    # DeepSpeed sends rank 0's weights to the others: one worker in all reads the base model. Where workers share the
    # experts out, each needs its own ones.
    hollow = context.rank > 0 and config.stage2.expert_parallel == 1
    setup = prepare(config, dataset, stage1, empty_weights=hollow)
    prompt = config.stage2.prompt
    if context.device == "cpu" and prompt.max_tokens + prompt.max_explanation_tokens <= SHORT_ROW:
        setup.model.explainer.set_attn_implementation("eager")
    engine = make_engine(
        config.runtime.engine,
        setup.model,
        config.stage2,
        world_size=context.world_size,
        device=context.device,
    )
    try:
        with contextlib.closing(Training(config, setup, engine, context)) as training:
            if context.resume_from is not None:
                training.resume(context.resume_from)
            training.run()
        metrics = training.metrics() | {"seconds": time.perf_counter() - started}
        state = training.kept_state()
        if context.rank == 0:
            write_artifact(Path(out), config, setup, state, metrics, context.device)
    finally:
        engine.close()
    return metrics


class Training:
    """Stage 2's training loop, on one worker."""

    def __init__(self, config: RunConfig, setup: Setup, engine: Engine, context: Context) -> None:
        self._config, self._setup, self._engine, self._context = config, setup, engine, context
        stage2 = config.stage2
        self._batches = StepBatches(config, setup, context)
        self._ahead = OneAhead(self._batches.make)
        self._epoch_steps = self._batches.plan.steps_per_epoch
        planned = stage2.epochs * self._epoch_steps
        self.steps = min(planned, stage2.max_steps) if stage2.max_steps else planned
        self._clusters = dict(setup.clusters)
        self._progress = Progress()
        self._best = BestState(stage2)
        self._probe = MovementProbe(setup.model.explainer) if stage2.alpha < 1 else None
        self._checkpointed = time.monotonic()
        self._unlogged: list[Losses] = []
        self._unlogged_tokens, self._unlogged_since = 0, time.perf_counter()

    def run(self) -> None:
        """Take the steps that are left, or fewer by `patience`; validate at the start, in between and at the end."""
        stage2, progress = self._config.stage2, self._progress
        if progress.step == 0:
            if self._probe:
                self._probe.start(self._pass_probe_rows)
            if stage2.evaluate_every:
                self._validate()
        while not self._ended():
            self._start_step()
            self._step()
            last = progress.step == self.steps
            validate = last or _due(progress.step, stage2.evaluate_every)
            checkpoint = last or _due(progress.step, stage2.checkpoint_every)
            if checkpoint or validate or _due(progress.step, LOG_EVERY):  # no step is lost between two runs' lines
                checkpoint |= self._log()
            if validate:
                self._validate()
                self._best.follow(progress.validations, self._engine)
            if checkpoint or self._ended():
                self._checkpoint()

    def close(self) -> None:
        """End the thread that makes batches."""
        self._ahead.close()

    def kept_state(self) -> dict[str, Tensor]:
        """The joint state that becomes the artifact, on rank 0, empty on others; every rank calls it."""
        return self._best.kept_state(self._progress.validations, self._progress.step, self._engine)

    def _ended(self) -> bool:
        return self._progress.step >= self.steps or self._best.exhausted(self._progress.validations)

    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json, but for the seconds that the whole training took."""
        progress = self._progress
        losses = dict(progress.validations)
        kept_step = self._best.kept_step(progress.validations, progress.step)
        kept = losses.get(kept_step)
        return {
            "kept_step": kept_step,
            "validation_loss": kept,
            "validation_perplexity": None if kept is None else math.exp(min(kept, 700)),
            "validation_loss_at_start": losses.get(0),
            "validation_loss_at_end": losses.get(progress.step),
            "validation_losses": [{"step": step, "loss": loss} for step, loss in progress.validations],
            "validation_cpu_seconds": [seconds * self._context.world_size for seconds in progress.cpu_seconds[:-1]],
            "cpu_seconds": progress.cpu_seconds[-1] * self._context.world_size,
            "experts": self._experts_of(kept_step),
            "train_loss": progress.train_loss,
            "steps": progress.step,
            "planned_steps": self.steps,
            "stopped_early": progress.step < self.steps,
            "steps_per_epoch": self._epoch_steps,
            "tokens": progress.tokens,
            "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else None,
            "parameters": self._setup.parameters,
            "trained_parameters": self._setup.trained,
            "workers": self._context.world_size,
        }

    def _experts_of(self, step: int) -> dict[str, Any] | None:
        """What the experts of the kept state do beside the dense network; None where there is none beside them."""
        values = dict(self._progress.movements).get(step)
        if values is None:
            return None
        movement = Movement(**values)
        return movement.scalars() | {"movement_ratio": movement.ratio, "layers": values}

    def resume(self, folder: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            InputError: it was written under another engine, ZeRO stage, worker count or number of steps.
        """
        path = folder / STATE_FILE
        state = read_json(path)
        saved = {"stage2.precision": _FLOAT32_WEIGHTS} | state["identity"]  # earlier checkpoints don't say it
        for name, here in self._identity().items():
            if saved.get(name) != here:
                raise InputError(
                    f"{path}: the checkpoint has {name} {saved.get(name)}, this run has {here}, so its"
                    " steps would hold other rows, or its states would not fit; resume with the same value, or start"
                    " without --resume"
                )
        self._engine.load(folder)
        for split, clusters in load_file(folder / CLUSTERS_FILE).items():
            self._set_clusters(split, clusters)
        if self._probe:
            self._probe.load(folder)
        pairs = ("validations", "movements")
        values = state["progress"]
        self._progress = Progress(**values | {name: [tuple(pair) for pair in values[name]] for name in pairs})
        self._best.load(folder, self._progress.validations, self._progress.step, self._engine, self._context.rank)

    def _identity(self) -> dict[str, Any]:
        """The settings that a checkpoint and the run that resumes from it must share: its state and data order."""
        stage2, runtime = self._config.stage2, self._config.runtime
        return {
            "runtime.engine": runtime.engine,
            "runtime.workers": self._context.world_size,
            "stage2.zero_stage": stage2.zero_stage,
            "stage2.expert_parallel": stage2.expert_parallel,
            "stage2.precision": stage2.precision if stage2.precision == "bf16_weights" else _FLOAT32_WEIGHTS,
            "steps": self.steps,
            "steps per epoch": self._epoch_steps,
            "seed": self._config.seed,
            "stage2.experts": stage2.experts.model_dump(mode="json"),
            "stage2.soft_routes": stage2.soft_routes,
            "stage2.shared_first": stage2.shared_first,
            "dataset": self._setup.data.fingerprint,
        }

    def _start_step(self) -> None:
        if self._progress.step and self._progress.step % self._epoch_steps == 0:
            self._refresh_routes("train")
        # Dropout and latent samples: the same for this step on this worker, whatever ran before.
        words = np.random.SeedSequence([self._config.seed, self._progress.step, self._context.rank])
        torch.manual_seed(int(words.generate_state(1)[0]))

    def _step(self) -> None:
        started, cpu, step = time.perf_counter(), time.process_time(), self._progress.step
        # An epoch's first batches have to wait for its routes.
        following = step + 1 < self.steps and (step + 1) % self._epoch_steps != 0
        taken = self._ahead.take(step, ahead=following)
        losses = self._engine.train_step(taken.batches, rates_at(step, self.steps, self._config.stage2))
        self._unlogged.append(losses)
        self._unlogged_tokens += taken.tokens
        self._progress.tokens += taken.tokens
        self._progress.seconds += time.perf_counter() - started
        self._progress.cpu_seconds[-1] += time.process_time() - cpu
        self._progress.step += 1

    def _log(self) -> bool:
        """Write the means since the last line, over all workers. Returns whether `checkpoint_minutes` are over: by rank
        0's clock, whose verdict is summed along, so that all workers get it and none waits for it."""
        names = sorted(self._unlogged[0])
        means = torch.stack([torch.stack([step[name] for step in self._unlogged]).mean() for name in names])
        summed = self._sum(torch.cat([means, means.new_full((1,), float(self._minutes_are_over()))])).tolist()
        minutes_over = summed.pop() > 0
        values = {name: value / self._context.world_size for name, value in zip(names, summed, strict=True)}
        progress, elapsed = self._progress, time.perf_counter() - self._unlogged_since
        if not math.isfinite(values["loss"]):
            raise RunError(f"stage 2: the loss is {values['loss']} at step {progress.step}; lower the learning rates")
        progress.train_loss = values["loss"]
        rates = rates_at(progress.step - 1, self.steps, self._config.stage2)
        self._context.log(
            {
                "phase": "train",
                "step": progress.step,
                "steps": self.steps,
                "epoch": (progress.step - 1) // self._epoch_steps,
                **values,
                "learning_rate": max(rates.shared, rates.routed) * self._config.stage2.learning_rate,
                "tokens_per_second": self._unlogged_tokens / elapsed,
            }
        )
        self._unlogged, self._unlogged_tokens, self._unlogged_since = [], 0, time.perf_counter()
        return minutes_over

    def _minutes_are_over(self) -> bool:
        """On rank 0, whether the last checkpoint was begun that long ago; False on others."""
        minutes = self._config.stage2.checkpoint_minutes
        return self._context.rank == 0 and minutes > 0 and time.monotonic() - self._checkpointed >= 60 * minutes

    def _validate(self) -> None:
        """Mean negative log-likelihood per token of the validation rows' explanations, over all workers."""
        valid, context = self._setup.valid, self._context
        if not len(valid):
            return
        started = time.perf_counter()
        if self._progress.step:
            self._refresh_routes("valid")
        experts = self._measure_experts()
        share = self._config.stage2.batch_size
        order = np.argsort(valid.lengths, kind="stable")
        total = torch.zeros(2, dtype=torch.float64)  # summed loss, tokens
        # Every worker takes the same number of batches: with ZeRO-3 each one is a collective operation.
        for start in range(0, len(order), share * context.world_size):
            rows = order[start + context.rank * share : start + (context.rank + 1) * share]
            counts = len(rows) > 0
            batch = valid.collate(rows if counts else order[:1], self._clusters["valid"], self._setup.pad)
            loss = self._engine.evaluate(batch)["explanation_loss"]
            labels = int(valid.answers.lengths[rows].sum())
            total += torch.tensor([float(loss) * labels, labels], dtype=torch.float64)
        summed, labels_all = self._sum(total).tolist()
        self._progress.validations.append((self._progress.step, summed / labels_all))
        self._progress.cpu_seconds.append(self._progress.cpu_seconds[-1])
        context.log(
            {
                "phase": "valid",
                "step": self._progress.step,
                "steps": self.steps,
                "validation_loss": summed / labels_all,
                "seconds": time.perf_counter() - started,
                **experts,
            }
        )
        self._unlogged_since = time.perf_counter()

    def _pass_probe_rows(self) -> None:
        rows = np.arange(min(PROBE_ROWS, len(self._setup.train)))
        self._engine.evaluate(self._setup.train.collate(rows, self._clusters["train"], self._setup.pad))

    def _measure_experts(self) -> dict[str, Any]:
        """How much the routed experts do, and how fast they change: means for the log, and each layer's values."""
        if not self._probe or not self._progress.step:
            return {}
        movement = self._probe.measure(self._pass_probe_rows)
        self._progress.movements.append((self._progress.step, vars(movement)))
        values: dict[str, Any] = movement.scalars() | {"layers": vars(movement)}
        halfway = (self.steps + shared_steps(self.steps, self._config.stage2)) / 2  # of the experts' own training
        if movement.idle and self._progress.step >= halfway:
            values["warning"] = movement.warning()
        return values

    def _refresh_routes(self, split: str) -> None:
        """Route a split's pairs by stage 1's present parameters; each worker routes a slice."""
        if self._config.stage2.alpha == 0 or self._setup.control is not None:
            return
        state = part_of_state(self._engine.state_dict(VAE_GMM, everywhere=True), VAE_GMM)
        model = VaeGmm.from_spec(self._setup.model.vae_gmm.to_spec())
        model.load_state_dict(state)
        model.to(self._context.device)
        users, items = self._setup.routed[split]
        cuts = np.linspace(0, len(users), self._context.world_size + 1).astype(int)
        rows = slice(cuts[self._context.rank], cuts[self._context.rank + 1])
        clusters = np.zeros_like(self._clusters[split])
        routes = route_pairs(model, users[rows], items[rows], device=self._context.device)
        clusters[rows] = clusters_of(routes, self._config.stage2)
        self._set_clusters(split, self._sum(torch.from_numpy(clusters)).numpy())
        self._unlogged_since = time.perf_counter()

    def _set_clusters(self, split: str, clusters: np.ndarray) -> None:
        self._clusters[split] = clusters
        if split == "train":
            self._batches.clusters_N = clusters

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over the workers."""
        if self._context.world_size == 1:
            return values
        moved = values.to(self._context.device)
        distributed.all_reduce(moved)
        return moved.cpu()

    def _checkpoint(self) -> None:
        self._context.settle()  # never two of them among the temporary files
        self._checkpointed, unchanged = time.monotonic(), list[str]()
        with tempfile.TemporaryDirectory(prefix="gavamoe-checkpoint-") as name:
            folder = Path(name)
            self._engine.save(folder)
            if self._context.rank == 0:
                write_json(folder / STATE_FILE, {"identity": self._identity(), "progress": vars(self._progress)})
                save_file(self._clusters, folder / CLUSTERS_FILE)
                unchanged = self._best.save(folder, self._progress.validations, self._progress.step)
                if self._probe:
                    self._probe.save(folder)
            self._context.checkpoint(folder, {"step": self._progress.step, "steps": self.steps}, unchanged)
        self._unlogged_since = time.perf_counter()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
