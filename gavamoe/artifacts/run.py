"""The run folder: the names in it, opening one, making one or checking that it is the same.

runs/NAME/
  config.yaml  dataset.json  stage1/  stage2/  evaluation/  report.html  clusters.png
  baseline/ in place of stage1/ and stage2/, where the run trains one
  logs/STEP.jsonl  logs/tensorboard/  checkpoints/STEP/
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gavamoe.artifacts import object_store, remote
from gavamoe.artifacts.files import read_json, write_file, write_json
from gavamoe.artifacts.manifest import MANIFEST, Kind
from gavamoe.config.baselines import baseline_section
from gavamoe.config.files import dump_config, load_config
from gavamoe.config.schema import GenerationConfig, RunConfig
from gavamoe.errors import InputError, validated

METRICS_FILE = "metrics.json"
"""The numbers of a step, in its folder."""
Step = Literal["stage1", "stage2", "baseline", "evaluation"]
"""A step of a run; each has a folder of its name."""
_DECIDE_NUMBERS = ("seed", "system", "stage1", "stage2")
"""Sections of the config that a run is bound to; where it runs and how it is evaluated may change."""


def steps_of(config: RunConfig) -> tuple[Step, ...]:
    """The steps of a run of this config, in order."""
    trained: tuple[Step, ...] = ("stage1", "stage2") if config.system == "gavamoe" else ("baseline",)
    return (*trained, "evaluation")


@dataclass(frozen=True)
class RunFolder:
    """Paths of everything in a run folder, whether it is there yet or not."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def dataset_file(self) -> Path:
        return self.path / "dataset.json"

    @property
    def stage1(self) -> Path:
        return self.path / "stage1"

    @property
    def stage2(self) -> Path:
        return self.path / "stage2"

    @property
    def baseline(self) -> Path:
        return self.path / "baseline"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def texts_under_way(self) -> Path:
        """What an evaluation has written that has not come to its end."""
        return self.path / ".evaluation"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def latent_map(self) -> Path:
        return self.path / "clusters.png"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def tensorboard(self) -> Path:
        return self.logs / "tensorboard"

    @property
    def mlflow(self) -> Path:
        """The database of the tracker `mlflow`, where it has no server."""
        return self.logs / "mlflow.db"

    def log(self, step: str) -> Path:
        """The log of a step, as JSON lines."""
        return self.logs / f"{step}.jsonl"

    def error(self, step: str) -> Path:
        """The traceback of a step that failed by itself."""
        return self.logs / f"{step}.error.txt"

    def checkpoints(self, step: str) -> Path:
        """The checkpoints of a step that has not come to its end."""
        return self.path / "checkpoints" / step

    def check(self) -> None:
        """Raise InputError unless a run was started here."""
        if not self.config_file.is_file():
            raise InputError(
                f"{self.path}: not a run folder ({self.config_file.name} is missing); `gavamoe train` makes one"
            )

    def write_config(self, config: RunConfig) -> None:
        """Write config.yaml."""
        with write_file(self.config_file) as aside:
            aside.write_text(dump_config(config), encoding="utf-8")


@dataclass(frozen=True)
class DatasetReference:
    """Content of dataset.json: the dataset that a run was trained on."""

    path: str
    """An absolute path or a URI."""
    fingerprint: str
    """Fingerprint of its content when the run was started."""


@dataclass(frozen=True)
class Run(RunFolder):
    """A run folder that was opened."""

    config: RunConfig
    reference: DatasetReference

    @property
    def writer(self) -> Kind:
        """The artifact, and folder, of what writes the run's texts."""
        return "stage2" if self.config.system == "gavamoe" else "baseline"

    def refuse_baseline(self, what: str) -> None:
        """Raise InputError where the run is a baseline's, for `what`, which only GaVaMoE has."""
        if self.config.system != "gavamoe":
            raise InputError(f"{self.path}: is a run of {self.config.system}; {what}")

    @property
    def dataset(self) -> Path:
        """The dataset's folder, where it is a local one.

        Raises:
            InputError: it is a URI. Whoever wrote the run chose it, and whoever opens it would go there with their
                own credentials: it is followed only if the command names it.
        """
        if remote.is_uri(self.reference.path):
            uri = object_store.without_keys(self.reference.path)
            raise InputError(
                f"{self.path}: was trained on {uri}; a URI that a run names is not opened unasked:"
                f" if you trust it, add --dataset {uri}"
            )
        return Path(self.reference.path)


def open_run(path: Path) -> Run:
    """Read a run folder's config and dataset reference; the dataset itself is not looked at. Generation settings that
    training chose (`generation.choose`) stand in place of the config's.

    Raises:
        InputError: not a run folder, or a file of it is damaged.
    """
    folder = RunFolder(Path(path))
    folder.check()
    config = load_config(folder.config_file)
    if config.generation.choose and (manifest := folder.stage2 / MANIFEST).is_file():
        chosen = read_json(manifest).get("config", {}).get("generation")
        generation = validated(GenerationConfig, chosen, manifest, "an artifact with generation settings")
        config = config.model_copy(update={"generation": generation})
    return Run(folder.path, config, read_reference(folder))


def read_reference(folder: RunFolder) -> DatasetReference:
    """Read a run's dataset.json.

    Raises:
        InputError: it is missing or damaged.
    """
    values = read_json(folder.dataset_file)
    if not isinstance(values, dict) or not all(isinstance(values.get(name), str) for name in ("path", "fingerprint")):
        raise InputError(f"{folder.dataset_file}: expected path and fingerprint of the dataset")
    return DatasetReference(values["path"], values["fingerprint"])


def claim_run(run_dir: Path, config: RunConfig, dataset: Path, fingerprint: str, *, continuing: bool) -> RunFolder:
    """Start a run in `run_dir`, or check that it holds this one.

    Args:
        dataset: the folder of the dataset, which has this fingerprint.

    Raises:
        InputError: it holds a run of other settings or data, or any run where `continuing` is False; or it can't be
            made or written to.
    """
    folder = RunFolder(Path(run_dir))
    if not folder.config_file.is_file():
        make_run_folder(folder.path)
        stored = remote.stored_path(dataset)
        path = str(dataset.absolute()) if stored is None else stored.uri
        write_json(folder.dataset_file, {"path": path, "fingerprint": fingerprint})
        folder.write_config(config)
        return folder
    if not continuing:
        raise InputError(f"{run_dir}: already holds a run; --resume continues it, --run-dir names another folder")
    _check_same_config(folder, config)
    recorded = read_reference(folder).fingerprint
    if recorded != fingerprint:
        raise InputError(
            f"{run_dir}: was started on another dataset (fingerprint {recorded[:12]}, {dataset} has"
            f" {fingerprint[:12]}); use another --run-dir"
        )
    return folder


def make_run_folder(path: Path) -> None:
    """Make a run's folder where it isn't there yet, and see whether files can be made in it.

    Raises:
        InputError: it can't be made, is no folder, or can't be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        way_out = "name another folder with --run-dir"
        if isinstance(error, FileExistsError):
            raise InputError(f"{path}: is a file, and a run needs a folder; {way_out}") from error
        raise InputError(f"{path}: no run can be kept there ({error.strerror}); {way_out}") from error


def _check_same_config(folder: RunFolder, config: RunConfig) -> None:
    decide: dict[str, Any] = dict.fromkeys(_DECIDE_NUMBERS, True)
    if config.system != "gavamoe":
        decide["baselines"] = {baseline_section(config.system)}
    before, now = (each.model_dump(include=decide) for each in (load_config(folder.config_file), config))
    difference = first_difference(before, now)
    if difference is not None:
        field, old, new = difference
        raise InputError(
            f"{folder.path}: was started with {field}={old}, now {new}; use the same value or another --run-dir"
        )


def first_difference(before: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The path of the first field in which two values of nested dictionaries differ, with both; None if they agree.

    A field that one side lacks is None there.
    """
    if before == now:
        return None
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *before]:
            inner = first_difference(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
            if inner is not None:
                return inner
    return name, before, now
