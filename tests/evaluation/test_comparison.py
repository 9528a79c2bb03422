"""What a comparison computes of outcomes and writes: means, differences, blocks, equal time, the verdict on gates."""

import csv
import json
import math
from pathlib import Path

import pytest
from helpers.losses import difference, loss_comparison, row_losses

from gavamoe.cli.output.systems import print_comparison
from gavamoe.errors import InputError
from gavamoe.evaluation.comparison import (
    GIVEN,
    PAIR,
    Comparison,
    Outcome,
    at_equal_time,
    blocks,
    compare_losses,
    difference_table,
    mean_of,
    means,
    read_comparison,
    table,
)
from gavamoe.evaluation.comparison import difference as seed_difference
from gavamoe.evaluation.comparison_files import (
    DIFFERENCES_FILE,
    FOREST_FILE,
    TABLE_FILE,
    markdown,
    plot,
    write_comparison,
)


def outcome(system: str, seed: int, value: float | None, *, trained: bool = True) -> Outcome:
    return Outcome(
        system=system, label=system, what="", seed=seed, trained=trained, folder="", rows=10,
        scores={"bleu_4": value, "parameters": 250_000 if trained else None}, intervals={},
    )  # fmt: skip


def test_means_and_intervals_by_hand() -> None:
    one = mean_of([1.0, 2.0, 3.0])
    assert one.mean == 2.0
    assert one.half == pytest.approx(4.302653 * 1.0 / math.sqrt(3))
    assert mean_of([4.0]).half is None
    assert mean_of([1.0, 3.0]).half == pytest.approx(12.7062, rel=1e-4)
    assert means([outcome("a", 0, 1.0), outcome("a", 1, None)], "bleu_4") is None
    assert one.text() == "2.000 ± 2.484"


def test_differences_are_paired_by_seed() -> None:
    full = [outcome("full", seed, value) for seed, value in enumerate([10.0, 20.0, 30.0])]
    other = [outcome("base", seed, value) for seed, value in enumerate([11.0, 21.0])]
    gap = seed_difference(other, full, "bleu_4")
    assert gap is not None
    assert (gap.mean, gap.half, gap.seeds) == (1.0, 0.0, 2)
    copied = seed_difference([outcome("constant", 0, 0.0, trained=False)], full, "bleu_4")
    assert copied is not None
    assert (copied.mean, copied.seeds) == (-20.0, 3)
    assert seed_difference([outcome("base", 7, 1.0)], full, "bleu_4") is None


def test_tables_name_systems_and_mark_differences() -> None:
    outcomes = [outcome("full", s, 10.0 + s) for s in range(3)] + [outcome("base", s, 8.0 + s) for s in range(3)]
    comparison = Comparison(dataset="d", fingerprint="f", config={}, outcomes=outcomes, skipped={}, left=[])
    heads, rows = table(comparison)
    assert heads == ["system", "seeds", "BLEU-4 ↑", "parameters"]
    assert rows[0] == ["full", "3", "11.00 ± 2.48", "250,000"]
    assert difference_table(comparison)[1] == [["base", "-2.000 ± 0.000 *"]]


def compared(protocol: str, *outcomes: Outcome) -> Comparison:
    config = {"evaluation": {"protocol": protocol}}
    return Comparison(dataset="d", fingerprint="f", config=config, outcomes=list(outcomes), skipped={}, left=[])


def test_what_is_told_features_is_never_ranked_with_what_is_not(tmp_path: Path) -> None:
    full, peter = outcome("full", 0, 10.0), outcome("peter", 0, 3.0).model_copy(update={"told": False})
    [(first, given), (second, pair)] = blocks(compared("given", full, peter))
    assert (first, second) == (GIVEN, PAIR)
    assert [[o.system for o in each.outcomes] for each in (given, pair)] == [["full"], ["peter"]]
    assert [title for title, _ in blocks(compared("given", full))] == [GIVEN]
    assert [title for title, _ in blocks(compared("predicted", full, peter))] == [PAIR]

    both = [one.model_copy(update={"predicted": {"bleu_4": 2.0 + place}}) for place, one in enumerate((full, peter))]
    comparison = compared("both", *both)
    [(_, given), (_, pair)] = blocks(comparison)
    assert [o.scores["bleu_4"] for o in given.outcomes] == [10.0]
    assert [(o.system, o.scores["bleu_4"]) for o in pair.outcomes] == [("full", 2.0), ("peter", 3.0)]
    text = markdown(comparison)
    assert (
        text.index(GIVEN) < text.index("| full | 1 | 10.00 |") < text.index(PAIR) < text.index("| full | 1 | 2.000 |")
    )
    plot(comparison, tmp_path / "both.png")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_losses_at_equal_time_are_those_before_the_fastest_system_ended() -> None:
    curves = {"full": [(0.0, 9.0), (10.0, 5.0), (20.0, 4.0)], "peter": [(0.0, 9.0), (4.0, 6.0), (12.0, 5.5)]}
    outcomes = [outcome(name, 0, 1.0).model_copy(update={"curve": curve}) for name, curve in curves.items()]
    found = at_equal_time([*outcomes, outcome("constant", 0, 1.0, trained=False)])
    assert [each.scores.get("loss_at_equal_time") for each in found] == [5.0, 5.5, None]


def with_losses(found: Comparison, out: Path, leads: dict[str, float]) -> None:
    """Losses of four users' rows in the folders of outcomes: the system's is higher by its lead, in nats a token."""
    user, tokens = ["a", "a", "b", "c", "d"], [10, 20, 5, 8, 7]
    for each in found.outcomes:
        if each.system in leads:
            higher = [count * (4.0 + leads[each.system]) for count in tokens]
            losses = row_losses(user, [2, 2, 3, 4, 0], tokens, higher, hidden=higher)
            (out / each.folder / "evaluation").mkdir(parents=True)
            losses.write(out / each.folder / "evaluation")


def test_losses_of_the_same_rows_decide_whether_gates_pay(tmp_path: Path) -> None:
    names = ["full", "base-wide", "random-routes", "constant"]
    outcomes = [
        outcome(name, seed, 10.0).model_copy(update={"folder": f"{name}/seed-{seed}", "label": name})
        for name in names
        for seed in range(2)
    ]
    comparison = Comparison(dataset="d", fingerprint="f", config={}, outcomes=outcomes, skipped={}, left=[])
    with_losses(comparison, tmp_path, {"full": 0.0, "base-wide": 0.02, "random-routes": 0.05})
    losses = compare_losses(outcomes, tmp_path, 0)
    assert losses is not None
    assert {each.system for each in losses.differences} == {"base-wide", "random-routes"}
    assert losses.losses["hidden"]["1-4"] == pytest.approx(4.0)
    assert losses.verdict[0] == (
        "Gates pay on this data set: full beats all 2 controls that were run over all users, though not in every group."
    )
    assert "users with 1 to 4 rows 0.020 (0.020 to 0.020; base-wide)" in losses.verdict[1]
    write_comparison(tmp_path, comparison.model_copy(update={"losses": losses}))
    assert read_comparison(tmp_path).losses == losses
    table_file = (tmp_path / TABLE_FILE).read_text()
    assert table_file.startswith("Gates pay on this data set")
    assert (
        "| base-wide | +0.020 | +0.020 (+0.020 to +0.020) * | +0.020 (+0.020 to +0.020) * | 2 | 0.000 |" in table_file
    )
    with (tmp_path / DIFFERENCES_FILE).open() as file:
        lines = list(csv.DictReader(file))
    assert {(line["system"], line["condition"], line["group"]) for line in lines} == {
        (name, condition, group)
        for name in ("base-wide", "random-routes")
        for condition in ("shown", "hidden")
        for group in ("0", "1-4", "all")
    }
    assert (tmp_path / FOREST_FILE).read_bytes().startswith(b"\x89PNG")
    assert compare_losses(outcomes[-2:], tmp_path, 0) is None, "systems that copy have none"
    assert compare_losses(outcomes[:2], tmp_path, 0) is None, "nothing to compare with"
    without_full = compare_losses(outcomes[2:], tmp_path, 0)
    assert without_full is not None
    assert (without_full.reference, without_full.verdict) == ("base-wide", [])


def test_a_comparison_of_an_earlier_version_has_no_losses(tmp_path: Path) -> None:
    stored = Comparison(
        dataset="d", fingerprint="f", config={}, outcomes=[outcome("full", 0, 1.0)], skipped={}, left=[]
    )
    values = json.loads(stored.model_dump_json())
    del values["losses"]
    (tmp_path / "comparison.json").write_text(json.dumps(values))
    assert read_comparison(tmp_path) == stored


def test_the_terminal_says_first_whether_gates_pay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = loss_comparison([difference("base-wide", 0.021), difference("gpt2", -0.2)])
    comparison = Comparison(
        dataset="d", fingerprint="f", config={}, outcomes=[outcome("full", 0, 1.0)], skipped={}, left=[], losses=losses
    )
    print_comparison(comparison, tmp_path, as_json=False)
    shown = capsys.readouterr().err
    assert shown.startswith("Gates pay on this data set: GaVaMoE beats the one control that was run")
    assert "Loss over GaVaMoE's, shown: user's slot, item's slot, rating and features given" in shown
    assert "+0.021 *" in shown
    assert "GPT-2" not in shown, "in a terminal the controls alone"
    assert str(tmp_path / FOREST_FILE) in shown


def test_a_damaged_comparison_is_named(tmp_path: Path) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps({"dataset": 1}))
    with pytest.raises(InputError, match=r"comparison\.json: not a comparison"):
        read_comparison(tmp_path)
