"""YAML that people write: nothing in it is dropped unseen, and nothing in it unfolds without end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gavamoe.config.files import load_config, parse_config
from gavamoe.config.yaml_reader import MAX_YAML_BYTES, parse_yaml, read_yaml
from gavamoe.errors import InputError
from gavamoe.serving.launch import read_args
from gavamoe.tune.space import load_space

READERS: dict[str, Callable[[Path], Any]] = {
    "config": load_config,
    "space": load_space,
    "serve": lambda path: read_args(path.parent, path, {}),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_key_given_twice_is_refused_with_its_lines(reader: str, tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("stage1:\n  clusters: 4\nstage2:\n  epochs: 1\nstage1:\n  beta: 0.2\n")
    with pytest.raises(InputError) as caught:
        READERS[reader](path)
    assert str(caught.value) == f"{path}: stage1 is given twice, in lines 1 and 5; keep one of them"


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("a:\n  b: 1\n  c: 2\n  b: 3", "b", "2 and 4"),
        ("{a: 1, 'a': 2}", "a", "1 and 1"),
        ("- x\n- {k: {m: 1, m: 1}}", "m", "2 and 2"),
        ("a: &x {q: 1}\nb:\n  <<: *x\n  <<: *x", "<<", "3 and 4"),
    ],
)
def test_at_any_depth(text: str, key: str, lines: str) -> None:
    with pytest.raises(InputError, match=rf"^s: {key} is given twice, in lines {lines}"):
        parse_yaml(text, "s")


def test_also_in_a_value_of_the_command_line() -> None:
    with pytest.raises(InputError, match=r"^--set stage1=\{beta: 1, beta: 2\}: beta is given twice"):
        parse_config({}, "x", ["stage1={beta: 1, beta: 2}"])


def test_aliases_and_merge_keys_do_what_they_are_for() -> None:
    assert parse_yaml("a: &x {q: 1, r: 2}\nb:\n  <<: *x\n  r: 3\nc: *x", "s") == {
        "a": {"q": 1, "r": 2}, "b": {"q": 1, "r": 3}, "c": {"q": 1, "r": 2},
    }  # fmt: skip
    assert parse_yaml("", "s") is None


def test_aliases_of_aliases_are_bounded() -> None:
    levels = [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 10)]
    with pytest.raises(InputError, match="s: stands for more than 100,000 values, its aliases unfolded"):
        parse_yaml("\n".join(["a0: &a0 [x]", *levels]), "s")
    merges = [f"m{level}: &m{level}\n  <<: [{', '.join([f'*m{level - 1}'] * 9)}]" for level in range(1, 10)]
    with pytest.raises(InputError, match="stands for more than"):
        parse_yaml("\n".join(["m0: &m0 {x: 1}", *merges]), "s")
    with pytest.raises(InputError, match="an anchor in line 2 holds an alias of itself"):
        parse_yaml("a: 1\nb: &b [*b]", "s")


@pytest.mark.parametrize(
    "text",
    ["a: 2020-13-45", "a: " + "9" * 5000, "? [a]\n: 1", "a: !!binary x", "a: !!python/name:os.system", "[" * 5000, "{"],
    ids=["date", "digits", "list as key", "binary", "python", "deep", "open"],
)
def test_values_that_can_not_be_are_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"^s: not valid YAML") as caught:
        parse_yaml(text, "s")
    assert "\n" not in str(caught.value)


def test_files_that_can_not_be_read_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"can't be read \(Is a directory\)"):
        read_yaml(tmp_path)
    (tmp_path / "latin").write_bytes("stadt: münchen".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin: not UTF-8 text .*; save it as UTF-8"):
        read_yaml(tmp_path / "latin")
    (tmp_path / "huge").write_text("#" * (MAX_YAML_BYTES + 1))
    with pytest.raises(InputError, match="larger than the 1048576 bytes"):
        read_yaml(tmp_path / "huge")
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbfseed: 3")  # as Windows editors save it
    assert read_yaml(tmp_path / "marked") == {"seed": 3}
