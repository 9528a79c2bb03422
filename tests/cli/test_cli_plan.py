"""`gavamoe plan`: tables and JSON, sizes with units, and one line for wrong input."""

import json
from pathlib import Path

import pytest

from gavamoe.cli.plan import bytes_of
from gavamoe.data.dataset import open_dataset
from gavamoe.errors import InputError


def entry(arguments: list[str]) -> None:
    """The command line in this process; raises instead of exiting."""
    from gavamoe.cli.app import app

    app(arguments, standalone_mode=False)


def test_plan_as_json_and_as_tables(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--users", "9765", "--items", "6280", "--rows", "320023", "--device-memory", "48GiB"]
    entry(["plan", "paper", *sizes, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["workload"]["rows"] == 256_018
    assert found["hardware"]["devices"] == 8
    entry(["plan", "quickstart", *sizes])
    shown = capsys.readouterr().err
    for title in ("Parameters, scratch", "memory per device", "sent by one device", "Stage 1"):
        assert title in shown


def test_plan_of_a_dataset(tiny_dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry(["plan", "quickstart", "--dataset", str(tiny_dataset), "--json"])
    load = json.loads(capsys.readouterr().out)["workload"]
    catalog = open_dataset(tiny_dataset).catalog
    assert (load["users"], load["items"]) == (catalog.known_users, catalog.known_items)
    assert load["rows"] == 1200
    assert 10 < load["prompt_tokens"] < 96
    assert 4 < load["answer_tokens"] < 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["paper"], "give --dataset, or all of --users, --items and --rows"),
        (["paper", "--users", "3"], "give --dataset, or all of"),
        (["paper", "--dataset", "D", "--users", "3"], "exclude each other"),
        (["paper", "SIZES", "--device-memory", "48"], "--device-memory 48: expected a number and a unit"),
        (["paper", "SIZES", "--utilization", "0"], "utilization: 0.0 is not between 0 and 1"),
        (["paper", "SIZES", "--utilization", "1.5"], "utilization: 1.5 is not between 0 and 1"),
        (["paper", "SIZES", "--set", "stage2.base_model=no/where"], "base_model no/where: its config cannot be read"),
        (["paper", "SIZES", "--base-config", "CONFIG"], "architecture 'bert' is not supported"),
        (["quickstart", "--dataset", "missing"], "missing: no such dataset folder"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    words = {"SIZES": ["--users", "9", "--items", "6", "--rows", "32"], "CONFIG": [str(tmp_path / "config.json")]}
    with pytest.raises(InputError, match=message) as caught:
        entry(["plan", *(word for argument in arguments for word in words.get(argument, [argument]))])
    assert "\n" not in str(caught.value)


def test_sizes_with_units() -> None:
    assert bytes_of("48GiB") == 48 * 2**30
    assert bytes_of("80 GB") == 80e9
    with pytest.raises(InputError, match="expected a number and a unit"):
        bytes_of("GiB")
