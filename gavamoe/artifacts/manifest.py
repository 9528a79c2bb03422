"""Artifact folders: complete, versioned, loaded strictly. Weights are safetensors, the rest JSON and Parquet.

A folder's `artifact.json` says what made it (config, seed, versions, fingerprints of its inputs) and
lists its files with size and SHA-256, so that a folder with a missing, added or changed file is refused.
"""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gavamoe.artifacts.checksums import (
    FileEntry,
    find_damage,
    fingerprint,
    hashed_once,
    list_files,
    refuse_links,
)
from gavamoe.artifacts.files import read_json, recover_folder, versions, write_json
from gavamoe.artifacts.home import cache_folder
from gavamoe.config.schema import RunConfig
from gavamoe.errors import InputError, one_line, printable, validated

FORMAT_VERSION = 1
MANIFEST = "artifact.json"

Kind = Literal["stage1", "stage2", "baseline", "evaluation"]
_STAGE2_NAMES = re.compile(
    r"README\.md|(metrics|prompt|route_control|vae_gmm|config|generation_config)\.json|vae_gmm\.safetensors"
    r"|(routes|cluster_words|pair_features|quotes|single_author_texts)\.parquet|strangers\.safetensors|catalog/(catalog\.json|(users|items)\.parquet)"
    r"|tables/(user|item)_embedding-\d{5}-of-\d{5}\.safetensors"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    # Tokenizers of the kinds that transformers writes.
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|(merges|vocab)\.txt"
    r"|chat_template\.jinja|additional_chat_templates/[\w-]+\.jinja|(tokenizer|spiece|sentencepiece\.bpe)\.model"
)
"""All that a stage-2 artifact may hold: libraries that open the folder find nothing else to make something of."""


class Manifest(BaseModel):
    """Content of `artifact.json`."""

    model_config = ConfigDict(extra="forbid")
    kind: Kind
    format_version: int
    created: str
    config: dict[str, Any]
    versions: dict[str, str]
    inputs: dict[str, str]
    """Fingerprints of what it was made from, by name ("dataset", "stage1")."""
    details: dict[str, Any]
    files: dict[str, FileEntry]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names and hashes of the files."""
        return fingerprint(dict(sorted(self.files.items())))


def write_manifest(
    folder: Path, kind: Kind, config: RunConfig, inputs: dict[str, str], details: dict[str, Any] | None = None
) -> Manifest:
    """Describe the finished content of `folder` in its `artifact.json`; the last file to be written."""
    manifest = Manifest(
        kind=kind,
        format_version=FORMAT_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        config=config.model_dump(mode="json"),
        versions=versions(),
        inputs=inputs,
        details=details or {},
        files=list_files(folder),
    )
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    return manifest


def read_manifest(folder: Path, kind: Kind, *, verify: bool | Literal["once"] = True) -> Manifest:
    """Read and check a folder's manifest.

    Args:
        verify: False compares the files' sizes only, not their hashes; "once" does without hashes where another process
            of this machine has compared them less than a day ago (`checksums.hashed_once`).

    Raises:
        InputError: no artifact, another kind, a newer format, files missing, added or changed, or one that an artifact
            of the kind never holds.
    """
    path = Path(folder) / MANIFEST
    recover_folder(Path(folder))
    if not path.is_file():
        raise InputError(f"{folder}: no {kind} artifact here ({MANIFEST} is missing); was this step run to its end?")
    manifest = validated(Manifest, read_json(path), path, "a valid manifest")
    if manifest.kind != kind:
        raise InputError(f"{folder}: holds a {manifest.kind} artifact, not {kind}")
    if manifest.format_version > FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {manifest.format_version} is newer than {FORMAT_VERSION}, the newest known here;"
            " update gavamoe"
        )
    if verify == "once":
        _check_once(Path(folder), manifest)
    else:
        _check_files(Path(folder), manifest, verify)
    return manifest


def _check_once(folder: Path, manifest: Manifest) -> None:
    _check_files(folder, manifest, False)
    try:
        notes = cache_folder() / "hashed"
    except InputError:  # a container's user may have no home, and needs none for this
        _check_files(folder, manifest, True)
        return
    with hashed_once(folder, manifest.files, notes) as known:
        if not known:
            _check_files(folder, manifest, True)


def _check_files(folder: Path, manifest: Manifest, verify: bool) -> None:
    refuse_links(folder)
    strange = [name for name in manifest.files if manifest.kind == "stage2" and not _STAGE2_NAMES.fullmatch(name)]
    if strange:
        raise InputError(
            f"{folder}: lists {printable(strange[0])}, which no stage-2 artifact holds; it may be there to be run by"
            " whatever opens the folder: get the run anew from where it comes from"
        )
    damage = find_damage(folder, manifest.files, unlisted={MANIFEST}, hashes=verify)
    if damage is None:
        return
    if damage.kind == "content":
        path = folder / damage.name
        raise InputError(f"{path}: content differs from what {MANIFEST} records; the artifact is damaged")
    raise InputError(f"{folder}: {damage.kind} file {damage.name}; the artifact has changed since it was written")


def save_weights(path: Path, module: torch.nn.Module) -> None:
    """Write a module's state as safetensors; tied tensors are stored once per name."""
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}, path)


def load_weights(path: Path, module: torch.nn.Module) -> None:
    """Load safetensors into a module, strictly.

    Raises:
        InputError: the file is damaged, or its names or shapes differ from the module's.
    """
    try:
        module.load_state_dict(load_file(path), strict=True)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise InputError(f"{path}: weights do not load ({one_line(error)})") from error
