"""Stage 1's model on disk: its specification as JSON, its weights as safetensors. Stage 2's folder holds a copy."""

from pathlib import Path

import torch

from gavamoe.artifacts.files import read_json, write_json
from gavamoe.artifacts.manifest import Manifest, load_weights, read_manifest, save_weights
from gavamoe.errors import InputError, one_line
from gavamoe.model.tables.layout import TableLayout, mapped_tables
from gavamoe.stage1.vae_gmm import VaeGmm

VAE_GMM_SPEC = "vae_gmm.json"
VAE_GMM_WEIGHTS = "vae_gmm.safetensors"


def save_vae_gmm(folder: Path, model: VaeGmm) -> None:
    """Write stage 1's model into a folder: its specification, its weights, and the files of sharded tables."""
    write_json(folder / VAE_GMM_SPEC, model.to_spec())
    for table in mapped_tables(model):
        table.copy_files(folder)
    save_weights(folder / VAE_GMM_WEIGHTS, model)


def load_vae_gmm(folder: Path) -> VaeGmm:
    """Rebuild stage 1's model from a folder, in evaluation mode.

    Raises:
        InputError: a file is missing or damaged, or they do not fit each other.
    """
    model = _from_spec(Path(folder))
    load_weights(Path(folder) / VAE_GMM_WEIGHTS, model)
    for table in mapped_tables(model):
        table.attach(folder)
    return model.eval()


def layout_of(folder: Path) -> TableLayout:
    """How the tables of the model in a folder are kept.

    Raises:
        InputError: no such model, or one that can't be read.
    """
    with torch.device("meta"):
        return _from_spec(Path(folder)).layout


def _from_spec(folder: Path) -> VaeGmm:
    path = folder / VAE_GMM_SPEC
    try:
        return VaeGmm.from_spec(read_json(path))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: does not describe a VAE-GMM ({one_line(error)})") from error


def load_stage1(folder: Path) -> tuple[VaeGmm, Manifest]:
    """The trained model of a stage-1 artifact, in evaluation mode, and the artifact's manifest."""
    manifest = read_manifest(folder, "stage1")
    return load_vae_gmm(folder), manifest
