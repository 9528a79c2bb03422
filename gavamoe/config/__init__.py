"""Every setting with its bounds; YAML, presets, `--set`.

schema     the settings, section by section, with meaning, unit and bound of each
files      YAML in and out, presets, overrides, errors in one line
reference  the page of all settings, docs/config.md
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Settings by their former home, for one release: model cards say `from gavamoe.config import GenerationConfig`."""
    if name == "GenerationConfig":
        from gavamoe.config.schema import GenerationConfig

        return GenerationConfig
    raise AttributeError(f"module 'gavamoe.config' has no attribute {name!r}")
