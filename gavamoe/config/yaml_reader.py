"""YAML that people write, read strictly: a key given twice is refused, and so are aliases that unfold without end.

PyYAML alone keeps the last of two equal keys and drops the first one, with all that stands below it.
"""

from pathlib import Path
from typing import Any

import yaml

from gavamoe.errors import InputError, one_line

MAX_YAML_BYTES = 2**20
MAX_YAML_VALUES = 100_000
"""Values that a file may stand for once its aliases (`*name`) are unfolded."""


def read_yaml(path: Path) -> Any:
    """The values of a YAML file that a user wrote.

    Raises:
        InputError: it can't be read, is too large, is not YAML, or gives a key twice.
    """
    try:
        with path.open("rb") as file:  # a pipe has no size to ask for
            content = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from error
    if len(content) > MAX_YAML_BYTES:
        raise InputError(f"{path}: larger than the {MAX_YAML_BYTES} bytes such a file may have")
    try:
        return parse_yaml(content.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({one_line(error)}); save it as UTF-8") from error


def parse_yaml(text: str, source: str) -> Any:
    """The values of YAML text; `source` is named in errors.

    Raises:
        InputError: it is not YAML, gives a key twice, or unfolds into more than `MAX_YAML_VALUES` values.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _unfolded(node, {}, source)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    # ValueError: a date that does not exist, a number of thousands of digits.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{source}: not valid YAML ({one_line(error)})") from error


def _unfolded(node: yaml.Node, known: dict[int, int], source: str) -> int:
    """How many values a node stands for, with every alias in it unfolded; its keys are checked on the way.

    Args:
        known: the numbers of the nodes met so far, by identity: an alias is the node that it names. 0 while a node is
            being counted.
    """
    if (count := known.get(id(node))) is not None:
        if count == 0:
            raise InputError(f"{source}: an anchor in line {_line(node)} holds an alias of itself")
        return count
    known[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _refuse_repeated_keys(node, source)
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    count = 1 + sum(_unfolded(child, known, source) for child in children)
    if count > MAX_YAML_VALUES:
        raise InputError(f"{source}: stands for more than {MAX_YAML_VALUES:,} values, its aliases unfolded")
    known[id(node)] = count
    return count


def _refuse_repeated_keys(node: yaml.MappingNode, source: str) -> None:
    # The nodes as they were written: keys that `<<` merges in may be given again, for that is what it is for.
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name = (key.tag, key.value)
        if name in lines:
            raise InputError(
                f"{source}: {key.value} is given twice, in lines {lines[name]} and {_line(key)}; keep one of them"
            )
        lines[name] = _line(key)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
