"""Texts for the rows of a split, and every number about them: `gavamoe evaluate`.

Reads a run's stage1/ and stage2/ and its dataset; writes evaluation/ with metrics.json, generations.parquet
and artifact.json. Text is made by `generate.Explainer`, as in serving.

Shapes: N evaluated rows, U users, I items.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gavamoe.checkpoint import read_manifest, write_manifest
from gavamoe.config import GenerationConfig, RunConfig, load_config, parse_config
from gavamoe.dataset import Dataset, PairArrays, open_dataset
from gavamoe.errors import InputError
from gavamoe.files import read_json, write_folder, write_json
from gavamoe.planted import recovered
from gavamoe.scoring import score_files
from gavamoe.simple_baselines import most_frequent_text, rating_baselines
from gavamoe.text_metrics import (
    BertScore,
    RowStatistics,
    aggregate,
    bert_score,
    count,
    intervals,
    measure,
    not_better,
)

if TYPE_CHECKING:
    from gavamoe.generate import Explanation
    from gavamoe.prompts import ExplanationRequest

__all__ = ["Evaluation", "evaluate", "evaluate_run", "score_files", "sparsity_thirds", "write_evaluation"]

SCHEMA_VERSION = 1
METRICS_FILE = "metrics.json"
GENERATIONS_FILE = "generations.parquet"

OnProgress = Callable[[int, int], None]


class Writer(Protocol):
    """What evaluation needs of `generate.Explainer`."""

    def explain(
        self,
        requests: "Sequence[ExplanationRequest]",
        generation: GenerationConfig,
        seed: int = 0,
        on_progress: OnProgress | None = None,
    ) -> "list[Explanation]": ...


@dataclass(frozen=True)
class Evaluation:
    """Everything measured on a split, and the rows it was measured on."""

    metrics: dict[str, Any]
    """Content of metrics.json, JSON-safe: what is undefined is None."""
    generations: pa.Table


@dataclass(frozen=True)
class _Rows:
    """The evaluated rows of a split, in the split's order."""

    index: np.ndarray
    """int64 (N,): positions in the split."""
    pairs: PairArrays
    references: list[str]
    features: list[list[str]]


def evaluate_run(
    run: Path,
    *,
    split: str = "test",
    protocol: str | None = None,
    rows: int | None = None,
    bertscore_model: str | None = None,
    bertscore_layer: int | None = None,
    dataset: Path | None = None,
    device: str = "cpu",
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Evaluate a trained run and write its evaluation/ folder, replacing an earlier one.

    Args:
        protocol, rows, bertscore_model, bertscore_layer: in place of the config's `evaluation` section.
        dataset: where the run's dataset is now, if it moved.

    Raises:
        InputError: not a trained run, another dataset than it was trained on, or an impossible option.
    """
    from gavamoe.generate import Explainer

    run = Path(run)
    config = _configured(
        run, protocol=protocol, rows=rows, bertscore_model=bertscore_model, bertscore_layer=bertscore_layer
    )
    data = _dataset_of(run, dataset)
    trained = read_manifest(run / "stage2", "stage2", verify=False)
    if trained.inputs.get("dataset") != data.fingerprint:
        raise InputError(f"{run / 'stage2'}: was trained on another dataset than {data.path}; train it again")
    data.size(split)
    explainer = Explainer.load(run / "stage2", device=device)
    result = evaluate(
        explainer, data, config, split=split, routes=run / "stage1" / "routes.parquet", on_progress=on_progress
    )
    inputs = {"dataset": data.fingerprint, "stage2": trained.fingerprint}
    write_evaluation(run / "evaluation", result, config, inputs)
    return result.metrics


def evaluate(
    explainer: Writer,
    dataset: Dataset,
    config: RunConfig,
    *,
    split: str = "test",
    routes: Path = Path("routes.parquet"),
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Write and score the explanations of a split, under `config.evaluation`, `config.generation` and `config.seed`.

    Args:
        routes: stage 1's routes.parquet, for the recovery of planted groups; without it that is None.
        on_progress: called with rows written and rows in all.

    Raises:
        InputError: the split is unknown or has no rows, or BERTScore's model is not to be had.
    """
    chosen = _select(dataset, split, config.evaluation.rows, config.seed)
    requests = _requests(chosen, config.evaluation.protocol)
    started = time.perf_counter()
    explanations = explainer.explain(requests, config.generation, seed=config.seed, on_progress=on_progress)
    writing = time.perf_counter() - started
    texts = [explanation.text for explanation in explanations]
    predicted = _floats(explanation.predicted_rating for explanation in explanations)

    constant = most_frequent_text(dataset)
    ours, baseline, bert = _measure(dataset, chosen, texts, predicted, constant, config)
    clusters = np.array([explanation.cluster for explanation in explanations])
    train = dataset.arrays("train")
    training_rows = np.bincount(train.user, minlength=dataset.catalog.n_users)[chosen.pairs.user]
    metrics: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "dataset": _summary(dataset),
        "split": split,
        "protocol": config.evaluation.protocol,
        "rows": len(texts),
        "rows_in_split": dataset.size(split),
        "seed": config.seed,
        "generation": config.generation.model_dump(mode="json"),
        "bertscore": {"model": bert.model, "layer": bert.layer} if bert else None,
        **_scored(ours),
        "intervals": intervals(ours, seed=config.seed),
        "sparsity": {
            name: _scored(ours, index) | {"training_rows_per_user": _range(training_rows[index])}
            for name, index in sparsity_thirds(chosen.pairs.user, training_rows).items()
        },
        "clusters": {str(k): _scored(ours, np.flatnonzero(clusters == k)) for k in np.unique(clusters)},
        "baselines": {
            "constant": {"text": constant, **_scored(baseline)},
            "ratings": rating_baselines(train, chosen.pairs, dataset),
        },
        "not_better_than_constant": not_better(ours, baseline, seed=config.seed),
        "planted": recovered(
            dataset,
            routes,
            generated=texts,
            references=chosen.references,
            ratings=chosen.pairs.rating,
            seed=config.seed,
        ),
        "seconds_writing": round(writing, 3),
        "tokens_written": int(sum(explanation.new_tokens for explanation in explanations)),
    }
    metrics["not_measured"] = _not_measured(metrics)
    return Evaluation(metrics, _generations(dataset, split, chosen, explanations))


def write_evaluation(out: Path, result: Evaluation, config: RunConfig, inputs: dict[str, str]) -> None:
    """Write the artifact folder `out` whole, in place of an earlier one; `inputs`: fingerprints by name."""
    with write_folder(out, replace=True) as folder:
        write_json(folder / METRICS_FILE, result.metrics)
        pq.write_table(result.generations, folder / GENERATIONS_FILE)
        write_manifest(folder, "evaluation", config, inputs, {"split": result.metrics["split"]})


def sparsity_thirds(user: np.ndarray, training_rows: np.ndarray) -> dict[str, np.ndarray]:
    """Row positions of ds1 (most frequent users), ds2, ds3 (least frequent) and zero_shot (never in training).

    As in section 4.5.4: rows are ordered by their user's training rows and cut in three equal parts, which differ
    by one row at most. Ties go by user index, so a user at a border may have rows on both sides.

    Args:
        user: (N,) user index of each row; `training_rows`: (N,) training rows of that user.
    """
    known = np.flatnonzero(training_rows > 0)
    order = known[np.lexsort((user[known], -training_rows[known]))]
    thirds = {f"ds{number}": np.sort(part) for number, part in enumerate(np.array_split(order, 3), start=1)}
    return thirds | {"zero_shot": np.flatnonzero(training_rows == 0)}


def _configured(run: Path, **options: Any) -> RunConfig:
    """The run's config with the given evaluation options in place of its own."""
    if not (run / "config.yaml").is_file():
        raise InputError(f"{run}: not a run folder (config.yaml is missing); `gavamoe train` makes one")
    values = load_config(run / "config.yaml").model_dump(mode="json")
    values["evaluation"] |= {name: value for name, value in options.items() if value is not None}
    return parse_config(values, "evaluate")


def _dataset_of(run: Path, moved_to: Path | None) -> Dataset:
    """The dataset a run was trained on, checked by fingerprint."""
    recorded = read_json(run / "dataset.json")
    if not isinstance(recorded, dict) or not {"path", "fingerprint"} <= recorded.keys():
        raise InputError(f"{run / 'dataset.json'}: expected path and fingerprint of the dataset")
    dataset = open_dataset(Path(recorded["path"]) if moved_to is None else Path(moved_to))
    if dataset.fingerprint != recorded["fingerprint"]:
        raise InputError(
            f"{dataset.path}: not the dataset of {run} (fingerprint {dataset.fingerprint[:12]},"
            f" the run has {str(recorded['fingerprint'])[:12]})"
        )
    return dataset


def _select(dataset: Dataset, split: str, limit: int, seed: int) -> _Rows:
    """All rows of a split, or `limit` of them drawn by the seed, in the split's order."""
    size = dataset.size(split)
    if size == 0:
        raise InputError(f"{dataset.path}: the {split} split has no rows to evaluate")
    index = np.arange(size)
    if 0 < limit < size:
        index = np.sort(np.random.default_rng(seed).choice(size, limit, replace=False))
    table = dataset.table(split, ["text", "features"]).take(pa.array(index))
    return _Rows(
        index=index,
        pairs=PairArrays(*(column[index] for column in dataset.arrays(split))),
        references=[text or "" for text in table["text"].to_pylist()],
        features=[row or [] for row in table["features"].to_pylist()],
    )


def _requests(rows: _Rows, protocol: str) -> "list[ExplanationRequest]":
    """given: the row's rating (if it has one) and features; predicted: neither."""
    from gavamoe.prompts import ExplanationRequest

    pairs = zip(rows.pairs.user.tolist(), rows.pairs.item.tolist(), strict=True)
    if protocol == "predicted":
        return [ExplanationRequest(user=user, item=item) for user, item in pairs]
    return [
        ExplanationRequest(
            user=user, item=item, rating=None if np.isnan(rating) else float(rating), features=tuple(features)
        )
        for (user, item), rating, features in zip(pairs, rows.pairs.rating, rows.features, strict=True)
    ]


def _measure(
    dataset: Dataset, rows: _Rows, texts: list[str], predicted: np.ndarray, constant: str, config: RunConfig
) -> tuple[RowStatistics, RowStatistics, BertScore | None]:
    """Statistics of our texts and of the constant text on the same rows, and our BERTScore."""
    repeated = [constant] * len(texts)
    bert = _bert_of_both(texts, repeated, rows.references, config)
    feature_set = _feature_set(dataset)
    ours = measure(
        texts,
        rows.references,
        features=rows.features,
        feature_set=feature_set,
        rating_error=predicted - rows.pairs.rating,
        bertscore=bert[0] if bert else None,
    )
    baseline = measure(
        repeated,
        rows.references,
        features=rows.features,
        feature_set=feature_set,
        bertscore=bert[1] if bert else None,
    )
    return ours, baseline, bert[0] if bert else None


def _bert_of_both(
    ours: list[str], other: list[str], references: list[str], config: RunConfig
) -> tuple[BertScore, BertScore] | None:
    """One call for both systems: bert-score encodes a text that occurs twice only once."""
    options = config.evaluation
    if not options.bertscore_model:
        return None
    both = bert_score(ours + other, references * 2, options.bertscore_model, options.bertscore_layer)
    parts = both.values[: len(ours)], both.values[len(ours) :]
    return BertScore(parts[0], both.model, both.layer), BertScore(parts[1], both.model, both.layer)


def _feature_set(dataset: Dataset) -> set[str]:
    """All features of the dataset, whatever the split: what FCR measures coverage of."""
    return {
        feature
        for split in dataset.meta.rows
        for batch in dataset.batches(split, ["features"])
        for feature in batch["features"].flatten().to_pylist()
    }


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
        "Human evaluation (section 4.5.5)": "people were not asked",
    }
    return [{"what": what, "why": why} for what, why in reasons.items() if why]


def _summary(dataset: Dataset) -> dict[str, Any]:
    """The paper's Table 1 for the dataset, so that a report needs no data."""
    meta = dataset.meta
    rows = sum(meta.rows.values())
    return {
        "name": dataset.path.name,
        "source": meta.source,
        "format": meta.format,
        "fingerprint": dataset.fingerprint,
        "users": meta.users,
        "items": meta.items,
        "rows": rows,
        "rows_by_split": dict(meta.rows),
        "rows_per_user": rows / meta.users,
        "rows_per_item": rows / meta.items,
        "density_percent": 100 * rows / (meta.users * meta.items),
        "zero_shot_users": meta.users - meta.known_users,
        "zero_shot_items": meta.items - meta.known_items,
        "rating_range": list(meta.rating_range) if meta.rating_range else None,
        "implicit": meta.implicit,
        "seed": meta.seed,
        "split": meta.split,
    }


def _generations(dataset: Dataset, split: str, rows: _Rows, explanations: "Sequence[Explanation]") -> pa.Table:
    """One row a text: what was asked, what was written, what it should have been, and which way it went."""
    catalog = dataset.catalog
    users, items = rows.pairs.user.tolist(), rows.pairs.item.tolist()
    columns = {
        "split": pa.array([split] * len(users), pa.string()),
        "row": pa.array(rows.index, pa.int64()),
        "user": pa.array([catalog.user_id(user) for user in users], pa.string()),
        "item": pa.array([catalog.item_id(item) for item in items], pa.string()),
        "title": pa.array([catalog.item_title(item) for item in items], pa.string()),
        "rating": pa.array(rows.pairs.rating, pa.float32(), from_pandas=True),
        "predicted_rating": pa.array([e.predicted_rating for e in explanations], pa.float32(), from_pandas=True),
        "features": pa.array(rows.features, pa.list_(pa.string())),
        "prompt_features": pa.array([list(e.features) for e in explanations], pa.list_(pa.string())),
        "reference": pa.array(rows.references, pa.string()),
        "generated": pa.array([e.text for e in explanations], pa.string()),
        "cluster": pa.array([e.cluster for e in explanations], pa.int16()),
        "responsibilities": pa.array([list(e.responsibilities) for e in explanations], pa.list_(pa.float32())),
        "user_known": pa.array([e.user_known for e in explanations], pa.bool_()),
        "item_known": pa.array([e.item_known for e in explanations], pa.bool_()),
    }
    return pa.table(columns)


def _floats(values: Any) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _range(values: np.ndarray) -> list[int] | None:
    return [int(values.min()), int(values.max())] if values.size else None
