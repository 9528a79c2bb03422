"""Texts for the rows of a split, and every number about them: `gavamoe evaluate`.

Reads a run's stage1/ and stage2/ and its dataset; writes evaluation/ with metrics.json, artifact.json, a Parquet
file of texts for each protocol and, if asked for, one of losses. Text is made by `ExplanationGenerator`, as in serving.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gavamoe.artifacts.files import write_folder, write_json
from gavamoe.artifacts.manifest import read_manifest, write_manifest
from gavamoe.artifacts.run import METRICS_FILE, open_run
from gavamoe.config.files import parse_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset, dataset_of_run
from gavamoe.errors import InputError
from gavamoe.evaluation.faithfulness.features import feature_set
from gavamoe.evaluation.faithfulness.measure import Gates, Written, measure_faithfulness
from gavamoe.evaluation.kept_texts import KeptTexts
from gavamoe.evaluation.losses.row_losses import RowLosses
from gavamoe.evaluation.metrics.bertscore import BertScore, bert_score
from gavamoe.evaluation.metrics.text_scores import RowStatistics, aggregate, count, measure
from gavamoe.evaluation.metrics_file import SCHEMA_VERSION
from gavamoe.evaluation.planted_truth import recovered
from gavamoe.evaluation.reference_scores import most_frequent_text, rating_baselines
from gavamoe.evaluation.rows import (
    EvaluatedRows,
    generations_table,
    requests_of,
    select_rows,
    sparsity_thirds,
    summary_of,
)
from gavamoe.evaluation.significance import intervals, not_better
from gavamoe.evaluation.writers import ReadLosses, Scored, load_scored, open_writer
from gavamoe.generation.batch.blocks import Writer
from gavamoe.runtime.progress import OnProgress, Parts
from gavamoe.stage1.routes import ROUTES_FILE

if TYPE_CHECKING:
    from gavamoe.generation.generator import Explanation
    from gavamoe.generation.request import ExplanationRequest

GENERATIONS_FILE = "generations.parquet"
PREDICTED_FILE = "generations_predicted.parquet"
"""Texts of the second protocol, where both were evaluated."""


@dataclass(frozen=True)
class Evaluation:
    """Everything measured on a split, and the rows it was measured on."""

    metrics: dict[str, Any]
    """Content of metrics.json, JSON-safe: what is undefined is None."""
    generations: pa.Table
    predicted: pa.Table | None = None
    """Texts of the second protocol, where both were evaluated."""
    losses: RowLosses | None = None
    """Losses of the rows, where they were asked for and the writer is a model that can be read."""


@dataclass(frozen=True)
class _WrittenTexts:
    """The texts that a writer wrote under one protocol, what it was asked, and how long it took."""

    requests: "list[ExplanationRequest]"
    explanations: "list[Explanation]"
    seconds: float

    @property
    def texts(self) -> list[str]:
        return [explanation.text for explanation in self.explanations]


def evaluate_run(
    run: Path,
    *,
    split: str = "test",
    dataset: Path | None = None,
    device: str | None = None,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
    load: Callable[..., Scored] = load_scored,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a trained run and write its evaluation/ folder, replacing an earlier one.

    What an evaluation that was cut off has written is read, not written again.

    Args:
        options: fields of the config's `evaluation` section, and `quantize` of `generation`; None leaves the config's
            own.
        dataset: where the run's dataset is now, if it moved.
        device: torch device to write on; None: a GPU if the run trains on one and one is here, else the CPU.
        workers: Ray workers that write; 0: none, this process does; None: see `writing_workers`.
        load: module-level function that opens a run, as `load_scored` does.

    Raises:
        InputError: not a trained run, another dataset than it was trained on, or an impossible option, device or number
            of workers.
    """
    opened = open_run(run)
    config = _configured(opened.config, **options)
    data = dataset_of_run(opened, dataset)
    folder = opened.path / opened.writer
    trained = read_manifest(folder, opened.writer, verify=False)
    if forgotten := trained.details.get("forgotten_users"):
        raise InputError(f"{opened.path}: has forgotten {forgotten} user(s), whose rows its dataset holds; train again")
    if trained.inputs.get("dataset") != data.fingerprint:
        raise InputError(f"{folder}: was trained on another dataset than {data.path}; train it again")
    data.size(split)
    kept = opened.texts_under_way
    with open_writer(opened.path.absolute(), config, device, workers, load) as (writer, gates, losses):
        result = evaluate(
            KeptTexts(writer, kept, trained.fingerprint),
            data,
            config,
            split=split,
            routes=opened.stage1 / ROUTES_FILE,
            gates=gates,
            losses=losses,
            on_progress=on_progress,
        )
    inputs = {"dataset": data.fingerprint, opened.writer: trained.fingerprint}
    write_evaluation(opened.evaluation, result, config, inputs)
    shutil.rmtree(kept, ignore_errors=True)
    return result.metrics


def evaluate(
    explainer: Writer,
    dataset: Dataset,
    config: RunConfig,
    *,
    split: str = "test",
    routes: Path = Path(ROUTES_FILE),
    gates: Gates | None = None,
    losses: ReadLosses | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Write and score the explanations of a split, under `config.evaluation`, `config.generation` and `config.seed`.

    Args:
        routes: stage 1's routes.parquet, for the recovery of planted groups; without it that is None.
        gates: measures the writer's gates, if it has any.
        losses: reads the rows' own texts, if the writer can; asked where `evaluation.row_losses` wants it.
        on_progress: called with rows written and rows in all, those that are written for another user among them.

    Raises:
        InputError: the split is unknown or has no rows, or BERTScore's model is not available.
    """
    options = config.evaluation
    chosen = select_rows(dataset, split, options.rows, config.seed)
    protocols = ("given", "predicted") if options.protocol == "both" else (options.protocol,)
    rows = len(chosen.references)
    probes = min(options.probe_rows, rows)
    progress = Parts(on_progress, len(protocols) * (rows + probes))
    texts = {each: _write_texts(explainer, chosen, each, config, progress.part(rows)) for each in protocols}
    constant = most_frequent_text(dataset)
    measured, bert = _measure(dataset, chosen, texts, constant, config)
    row_losses = losses(dataset, chosen, config.seed) if losses and options.row_losses else None
    train = dataset.arrays("train")
    training_rows = np.bincount(train.user, minlength=dataset.catalog.n_users)[chosen.pairs.user]

    def section(protocol: str) -> dict[str, Any]:
        written = texts[protocol]
        return _section(measured[protocol], measured["constant"], written, chosen, training_rows, config) | {
            "planted": recovered(
                dataset,
                routes,
                generated=written.texts,
                references=chosen.references,
                ratings=chosen.pairs.rating,
                seed=config.seed,
            ),
            "faithfulness": _faithfulness(explainer, dataset, chosen, written, gates, config, progress.part(probes))
            if options.probe_rows
            else None,
        }

    metrics: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "dataset": summary_of(dataset),
        "split": split,
        "protocol": protocols[0],
        "style": options.style,
        "rows": rows,
        "rows_in_split": dataset.size(split),
        "seed": config.seed,
        "generation": config.generation.model_dump(mode="json"),
        "bertscore": bert.described() if bert else None,
        **section(protocols[0]),
        "predicted": section("predicted") if len(protocols) > 1 else None,
        "losses": row_losses and row_losses.summary(),
        "baselines": {
            "constant": {"text": constant, **_scored(measured["constant"])},
            "ratings": rating_baselines(train, chosen.pairs, dataset),
        },
    }
    progress.end()
    metrics["not_measured"] = _not_measured(metrics)
    first, *second = (generations_table(dataset, split, chosen, texts[each].explanations) for each in protocols)
    return Evaluation(metrics, first, second[0] if second else None, row_losses)


def write_evaluation(out: Path, result: Evaluation, config: RunConfig, inputs: dict[str, str]) -> None:
    """Write the artifact folder `out` whole, in place of an earlier one; `inputs`: fingerprints by name."""
    with write_folder(out, replace=True) as folder:
        write_json(folder / METRICS_FILE, result.metrics)
        pq.write_table(result.generations, folder / GENERATIONS_FILE)
        if result.predicted is not None:
            pq.write_table(result.predicted, folder / PREDICTED_FILE)
        if result.losses is not None:
            result.losses.write(folder)
        write_manifest(folder, "evaluation", config, inputs, {"split": result.metrics["split"]})


def _write_texts(
    explainer: Writer, rows: EvaluatedRows, protocol: str, config: RunConfig, on_progress: OnProgress
) -> _WrittenTexts:
    requests = requests_of(rows, protocol)
    started = time.perf_counter()
    explanations = explainer.explain(requests, config.generation, seed=config.seed, on_progress=on_progress)
    seconds = explainer.seconds if isinstance(explainer, KeptTexts) else time.perf_counter() - started
    return _WrittenTexts(requests, explanations, seconds)


def _section(
    rows: RowStatistics,
    constant: RowStatistics,
    written: _WrittenTexts,
    chosen: EvaluatedRows,
    training_rows: np.ndarray,
    config: RunConfig,
) -> dict[str, Any]:
    """The scores of one protocol's texts, of all rows and by group."""
    clusters = np.array([explanation.cluster for explanation in written.explanations])
    return {
        **_scored(rows),
        "intervals": intervals(rows, seed=config.seed),
        "sparsity": {
            name: _scored(rows, index) | {"training_rows_per_user": _range(training_rows[index])}
            for name, index in sparsity_thirds(chosen.pairs.user, training_rows).items()
        },
        "clusters": {str(k): _scored(rows, np.flatnonzero(clusters == k)) for k in np.unique(clusters)},
        "not_better_than_constant": not_better(rows, constant, seed=config.seed),
        "seconds_writing": round(written.seconds, 3),
        "tokens_written": int(sum(explanation.new_tokens for explanation in written.explanations)),
    }


def _faithfulness(
    explainer: Writer,
    dataset: Dataset,
    chosen: EvaluatedRows,
    written: _WrittenTexts,
    gates: Gates | None,
    config: RunConfig,
    on_progress: OnProgress,
) -> dict[str, Any]:
    rows = Written(written.requests, written.explanations, chosen.references, chosen.pairs.rating, chosen.features)
    return measure_faithfulness(
        rows,
        dataset,
        write=partial(explainer.explain, generation=config.generation, seed=config.seed, on_progress=on_progress),
        gates=gates,
        probe_rows=config.evaluation.probe_rows,
        seed=config.seed,
    )


def _measure(
    dataset: Dataset, rows: EvaluatedRows, by_protocol: dict[str, _WrittenTexts], constant: str, config: RunConfig
) -> tuple[dict[str, RowStatistics], BertScore | None]:
    """Statistics of each protocol's texts and of the constant text on the same rows, and what BERTScore ran on."""
    texts = {protocol: written.texts for protocol, written in by_protocol.items()}
    texts["constant"] = [constant] * len(rows.references)
    errors = {
        protocol: _floats(explanation.predicted_rating for explanation in written.explanations) - rows.pairs.rating
        for protocol, written in by_protocol.items()
    }
    bert = _bert_scores(texts, rows.references, config)
    known = feature_set(dataset)
    measured = {
        name: measure(
            system_texts,
            rows.references,
            style=config.evaluation.style,
            features=rows.features,
            feature_set=known,
            rating_error=errors.get(name),
            bertscore=bert.get(name),
        )
        for name, system_texts in texts.items()
    }
    return measured, bert.get("constant")


def _bert_scores(texts: dict[str, list[str]], references: list[str], config: RunConfig) -> dict[str, BertScore]:
    """One call for all systems: bert-score encodes a text that occurs twice only once."""
    options = config.evaluation
    if not options.bertscore_model:
        return {}
    together = bert_score(
        [text for system_texts in texts.values() for text in system_texts],
        references * len(texts),
        options.bertscore_model,
        options.bertscore_layer,
        seed=config.seed,
    )
    size = len(references)
    return {name: together.rows(slice(n * size, (n + 1) * size)) for n, name in enumerate(texts)}


def _configured(config: RunConfig, **options: Any) -> RunConfig:
    """The run's config with the given options in place of its own."""
    values = config.model_dump(mode="json")
    if (bits := options.pop("quantize", None)) is not None:
        values["generation"]["quantize"] = bits
    values["evaluation"] |= {name: value for name, value in options.items() if value is not None}
    return parse_config(values, "evaluate")


def _scored(rows: RowStatistics, index: np.ndarray | None = None) -> dict[str, Any]:
    return {"counts": count(rows, index), "metrics": aggregate(rows, index)}


def _not_measured(metrics: dict[str, Any]) -> list[dict[str, str]]:
    """What the numbers don't cover, and why."""
    counts = metrics["counts"]
    reasons = {
        "BERTScore": "" if metrics["bertscore"] else "no model was named (--bertscore-model: hub id or folder)",
        "FMR, FCR, DIV": "" if counts["rows_with_features"] else "no evaluated row has features",
        "RMSE, MAE": "" if counts["rows_with_rating"] else "no evaluated row has a rating",
        "BLEU, ROUGE": "" if counts["empty_references"] < counts["rows"] else "no evaluated row has a text",
        "Recovery of groups, sentiment, noise floor": "" if metrics["planted"] else "only synthetic data has a truth",
        "Features, sentiment, copies, personalization, gates": ""
        if metrics["faithfulness"]
        else "evaluation.probe_rows is 0",
        "Loss of the rows' own texts": "" if metrics["losses"] else "evaluation.row_losses is off, or nothing to read",
        "Human evaluation (section 4.5.5)": "people were not asked",
    }
    return [{"what": what, "why": why} for what, why in reasons.items() if why]


def _floats(values: Any) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _range(values: np.ndarray) -> list[int] | None:
    return [int(values.min()), int(values.max())] if values.size else None
