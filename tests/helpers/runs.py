"""Run folders without a trained model, and configs of an evaluation."""

from pathlib import Path

from gavamoe.artifacts.files import write_json
from gavamoe.artifacts.manifest import write_manifest
from gavamoe.config.files import dump_config, parse_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset


def evaluation_config(**evaluation: object) -> RunConfig:
    """The default config with these values of `evaluation`; without probes, unless `probe_rows` asks for them."""
    return parse_config({"evaluation": {"probe_rows": 0} | evaluation}, "test")


def make_run(folder: Path, dataset: Dataset, settings: RunConfig | None = None) -> Path:
    """A run folder whose stage 2 is an artifact without a model."""
    settings = settings or RunConfig()
    (folder / "stage2").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(settings))
    write_json(folder / "dataset.json", {"path": str(dataset.path), "fingerprint": dataset.fingerprint})
    write_manifest(folder / "stage2", "stage2", settings, {"dataset": dataset.fingerprint})
    return folder
