"""What a report reads of a run folder: config, scores, texts, the stages' metrics and their logs. Never the dataset."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gavamoe.artifacts.files import read_json
from gavamoe.artifacts.logs import read_log
from gavamoe.artifacts.manifest import Manifest, read_manifest
from gavamoe.artifacts.run import METRICS_FILE, RunFolder
from gavamoe.config.baselines import reads_features
from gavamoe.config.files import load_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.catalog import Catalog
from gavamoe.errors import InputError
from gavamoe.evaluation.evaluate import GENERATIONS_FILE
from gavamoe.evaluation.metrics_file import read_metrics
from gavamoe.generation.artifact import CATALOG_FOLDER
from gavamoe.stage1.clusters import describe_clusters
from gavamoe.stage1.routes import ROUTES_FILE, TrainingPairs
from gavamoe.stage1.user_words import ClusterWords

MAX_PICTURE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class RunData:
    """All that a report needs of a run."""

    name: str
    long_name: str
    """With the parent folder's, or the dataset's."""
    config: RunConfig
    manifest: Manifest
    metrics: dict[str, Any]
    generations: pa.Table
    stages: dict[str, dict[str, Any]]
    """metrics.json of stage1, stage2 and baseline, where they are."""
    logs: dict[str, list[dict[str, Any]]]
    """Lines of the logs of stage1, stage2 and baseline, where they are."""

    cluster_features: dict[int, list[str]]
    """Words and features that set each cluster of the training pairs apart; empty for systems without stage 1."""
    latent_map: str | None
    """clusters.png, as `gavamoe route` leaves it in the run folder, in base 64."""
    told: bool
    """Whether the system reads the rating or the features of a request."""
    other_seeds: tuple[dict[str, Any], ...] = ()
    """Metrics of the same system's further seeds, in a comparison."""

    @property
    def seeds(self) -> list[dict[str, Any]]:
        """Metrics of all seeds."""
        return [self.metrics, *self.other_seeds]

    def score(self, name: str) -> float | None:
        value = self.metrics["metrics"].get(name)
        return None if value is None else float(value)

    def constant(self, name: str) -> float | None:
        """The score of the most frequent training explanation; for ratings, of the user + item bias model."""
        baselines = self.metrics["baselines"]
        if name in ("rmse", "mae"):
            return baselines["ratings"]["bias_model"][name] if baselines["ratings"] else None
        value = baselines["constant"]["metrics"].get(name)
        return None if value is None else float(value)


def read_run(run: Path) -> RunData:
    """Read what a run folder has for a report.

    Raises:
        InputError: it is not a run folder, or its evaluation is missing, damaged or of another format.
    """
    folder = RunFolder(run)
    folder.check()
    manifest = read_manifest(folder.evaluation, "evaluation")
    metrics = read_metrics(folder.evaluation / METRICS_FILE)
    stages = {
        stage: read_json(run / stage / METRICS_FILE)
        for stage in ("stage1", "stage2", "baseline")
        if (run / stage / METRICS_FILE).is_file()
    }
    config = load_config(folder.config_file)
    return RunData(
        name=run.resolve().name,
        long_name="/".join(run.resolve().parts[-2:]),
        config=config,
        manifest=manifest,
        metrics=metrics,
        generations=pq.read_table(folder.evaluation / GENERATIONS_FILE),
        stages=stages,
        cluster_features=_cluster_features(folder),
        latent_map=_read_picture(folder.latent_map),
        logs={stage: read_log(folder.log(stage)) for stage in ("stage1", "stage2", "baseline")},
        told=reads_features(config.system),
    )


def distinct_names(runs: Sequence[RunData]) -> list[RunData]:
    """Folders of one name get their parent's before it, and a number where that does not tell them apart."""
    once = [run.name for run in runs]
    longer = [run.long_name if once.count(run.name) > 1 else run.name for run in runs]
    names = [
        f"{name} ({longer[: index + 1].count(name)})" if longer.count(name) > 1 else name
        for index, name in enumerate(longer)
    ]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _cluster_features(folder: RunFolder) -> dict[int, list[str]]:
    routes, catalog_folder = folder.stage1 / ROUTES_FILE, folder.stage2 / CATALOG_FOLDER
    if not (routes.is_file() and catalog_folder.is_dir()):
        return {}
    catalog = Catalog.load(catalog_folder)
    pairs = TrainingPairs.read(routes, catalog.known_users)
    words = ClusterWords.load(folder.stage1, pairs.clusters)
    described = describe_clusters(pairs, catalog, words, implicit=True)
    return {each.cluster: [trait.name for trait in (*each.words, *each.features)] for each in described}


def _read_picture(path: Path) -> str | None:
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_PICTURE_BYTES:
        raise InputError(f"{path}: larger than the {MAX_PICTURE_BYTES} bytes that a report takes in")
    return base64.b64encode(path.read_bytes()).decode("ascii")
