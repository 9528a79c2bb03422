"""Run configurations as files: YAML in and out, presets by name, `--set a.b=c` overrides.

A wrong or unknown field raises `InputError` naming the field, the value, the bound, and the nearest known name.
"""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from gavamoe.config.schema import RunConfig
from gavamoe.config.yaml_reader import parse_yaml, read_yaml
from gavamoe.errors import InputError, did_you_mean, first_problem

PACKAGE = Path(str(resources.files("gavamoe")))
"""The folder of the installed package."""
FORMER_SECTIONS = {"peter": ("baselines", "peter")}
"""Sections that have moved: the name at the top level of earlier configs -> parent and name today."""


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file or a shipped preset by name, apply `a.b=c` overrides, validate.

    Raises:
        InputError: one line naming file, field, value, bound and the nearest known name.
    """
    path = find_config(source)
    return parse_config(read_yaml(path), str(path), overrides)


def parse_config(values: Any, source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Build a config from parsed YAML; `source` is named in errors."""
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{source}: expected fields and values, found {type(values).__name__}")
    values = translate_former(values, source)
    for override in overrides:
        values = _apply_override(values, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{source}: {_problem(error, RunConfig)}") from error


def translate_former(values: dict[str, Any], source: object) -> dict[str, Any]:
    """The same config with sections that have moved at their new places, as files of earlier versions need it.

    Raises:
        InputError: a section stands at its former place and at the new one.
    """
    for name, (parent, child) in FORMER_SECTIONS.items():
        if name not in values:
            continue
        section = values.get(parent) or {}
        if not isinstance(section, dict) or child in section:
            raise InputError(f"{source}: {name} has moved to {parent}.{child}, which is given too; keep that one")
        rest = {key: value for key, value in values.items() if key != name}
        values = rest | {parent: section | {child: values[name]}}
    return values


def override_config(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A copy of `config` with `a.b=c` overrides applied and validated."""
    return parse_config(config.model_dump(mode="json"), "--set", overrides)


def dump_config(config: RunConfig) -> str:
    """The complete config as YAML; `load_config` reads it back equal."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def find_config(source: str | Path) -> Path:
    """Path of a config file, or of a preset shipped with the package ("quickstart", "paper", ...)."""
    return find_file(source, "configs", "config file, nor one of the presets")


def find_file(source: str | Path, folder: Literal["configs", "tune_spaces"], what: str) -> Path:
    """Path of a YAML file, or of one that ships in `folder`, by its name.

    Raises:
        InputError: there is neither; `no such WHAT NAMES`.
    """
    path = Path(source)
    if _is_there(path):
        return path
    named = shipped(folder) / f"{source}.yaml"
    if path.name == str(source) and _is_there(named):
        return named
    known = sorted(file.stem for file in shipped(folder).glob("*.yaml"))
    raise InputError(f"{source}: no such {what} {', '.join(known)}")


def _is_there(path: Path) -> bool:
    try:
        return path.exists() and not path.is_dir()  # a pipe can be read too
    except OSError:  # a name longer than any file's
        return False


def shipped(folder: Literal["configs", "tune_spaces", "jobs"]) -> Path:
    """A folder that ships with the package: the checkout's, or its copy inside an installed wheel."""
    installed = PACKAGE / f"_{folder}"
    return installed if installed.is_dir() else PACKAGE.parent / folder


def field_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted paths of all leaf fields of a config model."""
    paths = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            paths += field_paths(annotation, f"{prefix}{name}.")
        else:
            paths.append(prefix + name)
    return paths


def _apply_override(values: dict[str, Any], override: str) -> dict[str, Any]:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"--set {override}: expected FIELD=VALUE, such as stage1.clusters=4")
    if keys[0] in FORMER_SECTIONS:
        moved = ".".join([*FORMER_SECTIONS[keys[0]], *keys[1:]])
        raise InputError(f"--set {override}: {name.strip()} has moved to {moved}")
    value = parse_yaml(text, f"--set {override}")
    result = dict(values)
    node = result
    for key in keys[:-1]:
        child = node.get(key)
        node[key] = dict(child) if isinstance(child, dict) else {}
        node = node[key]
    node[keys[-1]] = value
    return result


def _problem(error: ValidationError, root: type[BaseModel]) -> str:
    """One line for the first problem, with the count of the others."""
    first = error.errors(include_url=False, include_context=False)[0]
    hint = _nearest(first["loc"], root) if first["type"] == "extra_forbidden" else ""
    return first_problem(error, hint=hint, joint=".")


def _nearest(location: tuple[int | str, ...], root: type[BaseModel]) -> str:
    """The known name closest to an unknown one, looked for in its own section and then everywhere."""
    model = root
    for section in location[:-1]:
        annotation = model.model_fields[str(section)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ""
        model = annotation
    name = str(location[-1])
    if hint := did_you_mean(name, model.model_fields):
        return hint
    elsewhere = [path for path in field_paths(root) if path.rsplit(".", 1)[-1] == name]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; known here: {', '.join(model.model_fields)}"
