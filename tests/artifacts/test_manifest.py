"""Artifacts hold what an artifact of their kind holds, and nothing beside it."""

import json
from pathlib import Path

import pytest
from helpers.stage2_runs import FILES
from helpers.tiny import tiny

from gavamoe.artifacts.manifest import MANIFEST, read_manifest, write_manifest
from gavamoe.errors import InputError


def stage2(folder: Path, *others: str) -> Path:
    """A folder that lists the files of a stage-2 artifact, and others."""
    for name in (*FILES, *others):
        if name != MANIFEST:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
    write_manifest(folder, "stage2", tiny(), {})
    return folder


@pytest.mark.parametrize(
    "name",
    ["modeling_evil.py", "pytorch_model.bin", "sub/config.json", "tokenizer.py", "model.safetensors.py", "a\x1b[2J.md"],
)
def test_a_stage_2_artifact_lists_known_files_only(name: str, tmp_path: Path) -> None:
    """A stranger can list what they like, with hashes that are right."""
    folder = stage2(tmp_path, name)
    with pytest.raises(
        InputError, match=r"lists .*, which no stage-2 artifact holds; it may be there to be run"
    ) as caught:
        read_manifest(folder, "stage2")
    assert "\x1b" not in str(caught.value)
    assert name in json.loads((folder / MANIFEST).read_text())["files"]


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja", "merges.txt",
        "vocab.json", "special_tokens_map.json", "tokenizer.model", "route_control.json",
    ],
)  # fmt: skip
def test_shards_and_tokenizers_of_all_kinds_are_known(name: str, tmp_path: Path) -> None:
    assert name in read_manifest(stage2(tmp_path, name), "stage2").files
