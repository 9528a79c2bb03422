"""What generation reads of a stage-2 artifact, which is complete in itself: names, prompt description, settings."""

from pathlib import Path

from gavamoe.artifacts.files import read_json
from gavamoe.artifacts.manifest import read_manifest
from gavamoe.config.schema import GenerationConfig
from gavamoe.errors import validated
from gavamoe.generation.prompts import PromptSpec

CATALOG_FOLDER = "catalog"
PROMPT_FILE = "prompt.json"


def read_prompt_spec(folder: Path) -> PromptSpec:
    """What the model's prompts look like.

    Raises:
        InputError: prompt.json is missing or damaged.
    """
    path = Path(folder) / PROMPT_FILE
    return validated(PromptSpec, read_json(path), path, "a prompt description")


def model_version(folder: Path) -> str:
    """The version of an artifact: the first 12 digits of its fingerprint."""
    return read_manifest(folder, "stage2", verify=False).fingerprint[:12]


def generation_settings(folder: Path) -> GenerationConfig:
    """The generation settings that the artifact's run was configured with."""
    values = read_manifest(folder, "stage2", verify=False).config.get("generation")
    return validated(GenerationConfig, values, folder, "an artifact with generation settings")
