"""Every setting with its bounds; YAML, presets, `--set`.

schema      the whole config, and the rules across its sections
stage1      section of stage 1, with meaning, unit and bound of each setting; the same in the next five
stage2      section of stage 2, with base model, experts, adapters, prompts
generation  section of decoding
evaluation  section of the measures
baselines   section of the baselines of `gavamoe ablate`
runtime     section of workers, engine, tracking
section     what the sections have in common
files       YAML in and out, presets, overrides, shipped folders, errors in one line
yaml_reader  YAML text to values: no key twice, bounded
reference   the page of all settings, docs/config.md
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """Settings by their former home, for one release: model cards say `from gavamoe.config import GenerationConfig`."""
    if name == "GenerationConfig":
        from gavamoe.config.schema import GenerationConfig

        return GenerationConfig
    raise AttributeError(f"module 'gavamoe.config' has no attribute {name!r}")
