"""What is wrong with a config, in one line: the field, the value, the bound, the nearest known name."""

import difflib

from pydantic import BaseModel, ValidationError


def describe(error: ValidationError, root: type[BaseModel]) -> str:
    """One line for the first problem, with the count of the others."""
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        text = f"{field}: unknown field{_nearest(first['loc'], root)}"
    elif first["type"] == "value_error":
        text = f"{field}.{first['msg']}" if field else first["msg"]
        text = text.replace("Value error, ", "")
    else:
        text = f"{field}: {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
    others = len(problems) - 1
    return text + (f" (and {others} more)" if others else "")


def _nearest(location: tuple[int | str, ...], root: type[BaseModel]) -> str:
    """The known name closest to an unknown one, looked for in its own section and then everywhere."""
    model = root
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ""
        model = annotation
    name = str(location[-1])
    close = difflib.get_close_matches(name, list(model.model_fields), n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    elsewhere = [path for path in field_paths(root) if path.rsplit(".", 1)[-1] == name]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return f"; known here: {', '.join(model.model_fields)}"


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
