"""Stage 1's model on disk: its specification as JSON, its weights as safetensors. Stage 2's folder holds a copy."""

from pathlib import Path

from gavamoe.artifacts.files import read_json, write_json
from gavamoe.artifacts.manifest import Manifest, load_weights, read_manifest, save_weights
from gavamoe.errors import InputError, one_line
from gavamoe.stage1.vae_gmm import VaeGmm

VAE_GMM_SPEC = "vae_gmm.json"
VAE_GMM_WEIGHTS = "vae_gmm.safetensors"


def save_vae_gmm(folder: Path, model: VaeGmm) -> None:
    """Write stage 1's model into a folder: its specification and its weights."""
    write_json(folder / VAE_GMM_SPEC, model.to_spec())
    save_weights(folder / VAE_GMM_WEIGHTS, model)


def load_vae_gmm(folder: Path) -> VaeGmm:
    """Rebuild stage 1's model from a folder, in evaluation mode.

    Raises:
        InputError: a file is missing or damaged, or they do not fit each other.
    """
    path = Path(folder) / VAE_GMM_SPEC
    try:
        model = VaeGmm.from_spec(read_json(path))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: does not describe a VAE-GMM ({one_line(error)})") from error
    load_weights(Path(folder) / VAE_GMM_WEIGHTS, model)
    return model.eval()


def load_stage1(folder: Path) -> tuple[VaeGmm, Manifest]:
    """The trained model of a stage-1 artifact, in evaluation mode, and the artifact's manifest."""
    manifest = read_manifest(folder, "stage1")
    return load_vae_gmm(folder), manifest
