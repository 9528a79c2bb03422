"""What is wrong with a config, in one line: the field, the value, the bound, the nearest known name."""

from pydantic import BaseModel, ValidationError

from gavamoe.errors import did_you_mean, first_problem


def describe(error: ValidationError, root: type[BaseModel]) -> str:
    """One line for the first problem, with the count of the others."""
    first = error.errors(include_url=False, include_context=False)[0]
    hint = _nearest(first["loc"], root) if first["type"] == "extra_forbidden" else ""
    return first_problem(error, hint=hint, joint=".")


def _nearest(location: tuple[int | str, ...], root: type[BaseModel]) -> str:
    """The known name closest to an unknown one, looked for in its own section and then everywhere."""
    model = root
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation
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
