"""`gavamoe ablate`: the systems of `variants` on one dataset, under one budget, over several seeds.

Every system and seed is an ordinary run folder, R/SYSTEM/seed-S, trained and evaluated; finished runs are not repeated.
Stage 1 is trained once for all that share its settings and seed. Seeds come one after the other, so that an interrupted
comparison has the first seeds of all systems rather than all seeds of the first ones.
"""

import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from gavamoe.artifacts.files import read_json, write_folder
from gavamoe.artifacts.manifest import MANIFEST, read_manifest
from gavamoe.artifacts.run import METRICS_FILE, RunFolder, claim_run, open_run
from gavamoe.artifacts.stage1_cache import STAGE1_CACHE, cached_stage1, stage1_key
from gavamoe.baselines.retrieval import Copier
from gavamoe.baselines.scores import evaluate_any
from gavamoe.config.files import override_config
from gavamoe.config.schema import RunConfig, Stage1Config
from gavamoe.data.dataset import Dataset, open_dataset
from gavamoe.errors import InputError
from gavamoe.evaluation.comparison import ChosenRate, Comparison, Outcome, at_equal_time, compare_losses, read_outcome
from gavamoe.evaluation.comparison_files import write_comparison
from gavamoe.evaluation.evaluate import evaluate, write_evaluation
from gavamoe.experiments.rates import choose_rate, chosen_rate, scaled_rates
from gavamoe.experiments.variants import SYSTEMS, System, find_systems
from gavamoe.pipeline import check_base_models, train_run
from gavamoe.report.latent_map import plot_latents
from gavamoe.runtime.progress import NoProgress, Progress
from gavamoe.runtime.ray_train import Line, ray_session
from gavamoe.stage1.artifact import load_stage1
from gavamoe.stage1.validation import LEAST_CLUSTERS, idle_gates


@dataclass
class Job:
    """One system under one seed."""

    system: System
    config: RunConfig
    folder: Path

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder)


@dataclass
class _Plan:
    jobs: list[Job] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Systems that make no sense here, with the reason."""
    rates: dict[str, ChosenRate] = field(default_factory=dict)
    """Learning rates by system, where they were chosen."""


def run_ablation(
    config: RunConfig,
    dataset: Path,
    out: Path,
    *,
    seeds: int = 3,
    only: Sequence[str] = (),
    rates: Sequence[float] = (),
    minutes: float | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Train and evaluate what is missing, and compare what is there.

    Args:
        seeds: number of seeds, from `config.seed` on; systems that copy have no seed and run once.
        only: names of systems; empty: all of `SYSTEMS` that make sense for the config and the data, but for the extra
            ones.
        rates: factors of every trained system's learning rates, of which the best on validation is taken, under the
            first seed; empty: the config's own rates.
        minutes: no further run starts after this time; None: no limit.

    Raises:
        InputError: an unknown system, one named that makes no sense here, folders of another comparison, or a base
            model, the config's or that of GaVaMoE[GPT2], that can't be trained from; leave the latter out by `only`.
    """
    started = time.monotonic()
    progress = progress or NoProgress()
    config = override_config(config, ["evaluation.row_losses=true"])  # what a comparison of systems rests on
    opened, out = open_dataset(dataset), Path(out)
    plan = _plan(config, opened, out, seeds, only)
    open_rates = set()
    for system in {job.system.name: job.system for job in plan.jobs if rates and job.system.model}.values():
        if chosen_rate(out / system.name, rates):
            _at_best_rate(system, plan, rates, opened, out, progress)
        else:
            open_rates.add(system.name)
    left = [job for job in plan.jobs if job.system.name in open_rates or not _evaluated(job, opened)]
    trained = [
        job
        for job in left
        if (kind := job.system.model)
        and (job.system.name in open_rates or not (job.folder / kind / MANIFEST).is_file())
    ]
    check_base_models([job.config for job in trained], opened)
    with ray_session(config.runtime) if trained else nullcontext():
        for number, job in enumerate(todo := tuple(left), start=1):
            if minutes is not None and time.monotonic() - started >= 60 * minutes:
                break
            shown = _Named(progress, f"[{number}/{len(todo)}] {job.system.name}, seed {job.config.seed}")
            if rates and job.system.model and job.system.name not in plan.rates:
                _at_best_rate(job.system, plan, rates, opened, out, shown)
            if job.system.name not in open_rates or not _evaluated(job, opened):
                _run(job, opened, out / STAGE1_CACHE, shown)
            left.remove(job)
            _write(config, opened, plan, left, out)  # an interrupted comparison can be looked at
    _draw_maps([job for job in plan.jobs if job not in left], opened, progress)
    return _write(config, opened, plan, left, out)


def _write(config: RunConfig, dataset: Dataset, plan: _Plan, left: Sequence[Job], out: Path) -> Comparison:
    """The comparison of the runs that are there, also as the files in its folder."""
    outcomes = at_equal_time([_outcome(job) for job in plan.jobs if job not in left])
    comparison = Comparison(
        dataset=dataset.path.name,
        fingerprint=dataset.fingerprint,
        config=config.model_dump(mode="json"),
        outcomes=outcomes,
        skipped=plan.skipped,
        left=[f"{job.system.name}, seed {job.config.seed}" for job in left],
        rates=plan.rates,
        losses=compare_losses(outcomes, out, config.seed),
    )
    if comparison.outcomes:
        write_comparison(out, comparison)
    return comparison


def _plan(config: RunConfig, dataset: Dataset, out: Path, seeds: int, only: Sequence[str]) -> _Plan:
    plan = _Plan()
    chosen: list[tuple[System, list[str]]] = []
    for system in find_systems(only) if only else [system for system in SYSTEMS.values() if not system.extra]:
        try:
            chosen.append((system, system.changes(config, dataset) if system.changes else []))
        except InputError as reason:
            if only:
                raise InputError(f"system {system.name}: {reason}") from reason
            plan.skipped[system.name] = str(reason)
    for seed in range(config.seed, config.seed + seeds):
        for system, changes in chosen:
            if system.model or seed == config.seed:
                changed = override_config(config, [*changes, f"seed={seed}"])
                plan.jobs.append(Job(system, changed, out / system.name / f"seed-{seed}"))
    return plan


def _evaluated(job: Job, dataset: Dataset) -> bool:
    """Whether the job's scores are there, made under the same settings from the same data and model."""
    folder = job.run.evaluation
    if not folder.is_dir():
        return False
    # A folder of other settings is refused here.
    claim_run(job.folder, job.config, dataset.path, dataset.fingerprint, continuing=True)
    manifest = read_manifest(folder, "evaluation", verify=False)
    now = job.config.model_dump(mode="json")
    if job.config.generation.choose:
        now["generation"] = open_run(job.folder).config.generation.model_dump(mode="json")
    same = all(manifest.config.get(section) == now[section] for section in ("generation", "evaluation"))
    kind = job.system.model
    if kind is None:
        return same
    return same and manifest.inputs.get(kind) == read_manifest(job.folder / kind, kind, verify=False).fingerprint


def _at_best_rate(
    system: System, plan: _Plan, factors: Sequence[float], dataset: Dataset, out: Path, progress: Progress
) -> None:
    """Choose a system's learning rates, or read which were chosen, and give them to all of its runs."""
    own = [job for job in plan.jobs if job.system.name == system.name]

    def train(system: System, config: RunConfig, folder: Path) -> None:
        shown = _Named(progress, f"{folder.name}")
        _train(Job(system, config, folder), dataset, out / STAGE1_CACHE, shown)

    chosen = choose_rate(system, own[0].config, out / system.name, factors, train)
    plan.rates[system.name] = chosen
    for job in own:
        job.config = override_config(job.config, scaled_rates(job.config, chosen.factor))


def _train(job: Job, dataset: Dataset, cache: Path, progress: Progress) -> None:
    if job.system.model == "stage2":
        _share_stage1(job, dataset, cache, progress)
        _check_gates(job)
    train_run(job.config, dataset.path, job.folder, resume=True, progress=progress)


def _run(job: Job, dataset: Dataset, cache: Path, progress: Progress) -> None:
    if job.system.source is not None:
        claim_run(job.folder, job.config, dataset.path, dataset.fingerprint, continuing=True)
        job.run.write_config(job.config)
        progress.step("write and score texts")
        result = evaluate(Copier(dataset, job.system.source), dataset, job.config, on_progress=progress.count)
        write_evaluation(job.run.evaluation, result, job.config, {"dataset": dataset.fingerprint})
        return
    _train(job, dataset, cache, progress)
    job.run.write_config(job.config)  # an earlier session may have evaluated it in another way
    progress.step("write and score texts")
    evaluate_any(job.folder, dataset=dataset.path, on_progress=progress.count)


def _check_gates(job: Job) -> None:
    """Refuse a comparison of gates of which all but one would never see a row.

    Raises:
        InputError: fewer than LEAST_CLUSTERS clusters in effect.
    """
    clusters, metrics = job.config.gates, read_json(job.run.stage1 / METRICS_FILE)
    effective = metrics.get("effective_clusters")
    if job.config.stage2.routes == "learned" and clusters > 1 and effective is not None and effective < LEAST_CLUSTERS:
        raise InputError(f"{job.run.stage1}: {idle_gates(metrics, clusters)[0]}")


def _share_stage1(job: Job, dataset: Dataset, cache: Path, progress: Progress) -> None:
    """Put stage 1 into the job's run: trained there, or copied from the run that trained it under the same settings."""
    key = stage1_key(job.config, dataset.fingerprint)
    log = cache / f"{key}.jsonl"

    def train(folder: Path) -> None:
        train_run(job.config, dataset.path, job.folder, stage="1", resume=True, progress=progress)
        with write_folder(folder) as aside:
            shutil.copytree(job.run.stage1, aside, dirs_exist_ok=True)
        shutil.copyfile(job.run.log("stage1"), log)

    shared, _ = cached_stage1(cache, key, train)
    if not job.run.stage1.exists():
        claim_run(job.folder, job.config, dataset.path, dataset.fingerprint, continuing=True)
        with write_folder(job.run.stage1) as aside:
            shutil.copytree(shared, aside, dirs_exist_ok=True)
        job.run.logs.mkdir(exist_ok=True)
        shutil.copyfile(log, job.run.log("stage1"))


def _draw_maps(jobs: Sequence[Job], dataset: Dataset, progress: Progress) -> None:
    """The latent map of each different stage 1 of the first seed, into its run folder: Figure 5 where K differs."""
    drawn: list[Stage1Config] = []
    for job in jobs:
        if job.system.model != "stage2" or job.config.seed != jobs[0].config.seed or job.config.stage1 in drawn:
            continue
        drawn.append(job.config.stage1)
        picture = job.run.latent_map
        if not picture.is_file():
            progress.step(f"draw the latents of {job.system.name}")
            model, _ = load_stage1(job.run.stage1)
            plot_latents(model, dataset.arrays("train"), picture, seed=job.config.seed)


def _outcome(job: Job) -> Outcome:
    system = job.system
    return read_outcome(system.name, system.label, system.what, job.config.seed, job.folder, told=system.told)


class _Named:
    """A `Progress` whose steps say which run they belong to."""

    def __init__(self, inner: Progress, name: str) -> None:
        self._inner, self._name = inner, name

    def step(self, title: str) -> None:
        self._inner.step(f"{self._name}: {title}")

    def line(self, line: Line) -> None:
        self._inner.line(line)

    def count(self, done: int, total: int) -> None:
        self._inner.count(done, total)
