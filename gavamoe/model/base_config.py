"""The shape of a base model, that is its Hugging Face config, without its weights.

For the common base models the config is shipped as data (`shapes/*.json`, written from the published ones), so that a
plan needs no hub; for others it is read from the folder, the GGUF file or the hub, which is some kilobytes.
"""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from gavamoe.artifacts.files import read_json
from gavamoe.config.files import PACKAGE
from gavamoe.config.schema import Stage2Config
from gavamoe.errors import InputError, one_line
from gavamoe.model.base_model import SUPPORTED, check_layers, read_base_config, scratch_config

SHAPES = PACKAGE / "model" / "shapes"


def base_shape(stage2: Stage2Config, config_file: Path | None = None) -> PreTrainedConfig:
    """The config of `stage2.base_model`: from `config_file` where given, else shipped, else from where the model is.

    The scratch model is given the largest vocabulary that its settings allow.

    Raises:
        InputError: the model is unknown or can't be found, its config is unreadable, or its architecture unsupported.
    """
    if config_file is not None:
        return _from_values(read_json(config_file), str(config_file))
    if stage2.base_model == "scratch":
        return scratch_config(stage2.scratch, stage2.scratch.vocabulary)
    shipped = shipped_shapes()
    if stage2.base_model in shipped:
        return _from_values(shipped[stage2.base_model], stage2.base_model)
    known = ", ".join(sorted(shipped))
    return read_base_config(
        stage2.base_model, f"give its config.json with --base-config, or plan with a known model: {known}"
    )


def shipped_shapes() -> dict[str, dict[str, Any]]:
    """The shipped configs of common base models: hub id to the values of config.json."""
    shapes = (read_json(path) for path in sorted(SHAPES.glob("*.json")))
    return {shape["hub_id"]: shape["config"] for shape in shapes}


def _from_values(values: Any, source: str) -> PreTrainedConfig:
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise InputError(f"{source}: not a model's config.json (model_type is missing)")
    model_type = values["model_type"]
    if model_type not in SUPPORTED:
        raise InputError(f"{source}: architecture {model_type!r} is not supported; supported: {', '.join(SUPPORTED)}")
    try:
        config = AutoConfig.for_model(**values)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"{source}: not a usable config ({one_line(error, 200)})") from error
    check_layers(config, source)
    return config
