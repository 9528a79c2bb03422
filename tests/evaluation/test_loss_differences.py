"""Losses of rows: kept in a file, paired, pooled over seeds, bootstrapped over users, shown."""

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.losses import difference, loss_comparison, row_losses

from gavamoe.artifacts.csv_files import write_csv
from gavamoe.errors import InputError
from gavamoe.evaluation.losses.differences import Difference, Reading, find_differences
from gavamoe.evaluation.losses.display import CSV_HEADS, csv_rows, forest_plot, loss_tables
from gavamoe.evaluation.losses.row_losses import LOSSES_FILE, RowLosses
from gavamoe.evaluation.significance import ratio_intervals

USERS = ["a", "a", "b", "c", "c", "d"]
TRAINED = [0, 0, 3, 25, 25, 7]
TOKENS = [10, 20, 5, 4, 6, 5]


def readings(*gaps: list[float], system: str = "base-wide") -> list[Reading]:
    """Under each seed, the full system's losses are 1 to 6 and the other's are higher by these."""
    found = []
    for seed, gap in enumerate(gaps):
        own = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
        found.append(Reading("full", "GaVaMoE", seed, row_losses(USERS, TRAINED, TOKENS, own)))
        theirs = [one + other for one, other in zip(own, gap, strict=True)]
        found.append(Reading(system, system, seed, row_losses(USERS, TRAINED, TOKENS, theirs)))
    return found


def by_group(found: list[Difference]) -> dict[str, Difference]:
    assert {each.condition for each in found} == {"shown"}
    return {each.group: each for each in found}


def test_differences_by_hand() -> None:
    found, unpaired = find_differences(readings([1.0, 2.0, -1.0, 0.5, 0.5, 0.0]), "full", 0)
    assert unpaired == {}
    groups = by_group(found)
    assert {name: (each.users, each.rows, each.tokens) for name, each in groups.items()} == {
        "0": (1, 2, 30), "1-4": (1, 1, 5), "5-19": (1, 1, 5), "20+": (1, 2, 10), "all": (4, 6, 50),
    }  # fmt: skip
    assert {name: each.value for name, each in groups.items()} == pytest.approx(
        {"0": 3 / 30, "1-4": -1 / 5, "5-19": 0.0, "20+": 1 / 10, "all": 3 / 50}
    )
    assert groups["0"].low is None, "one user has no interval"
    assert groups["all"].low is not None
    assert groups["all"].low < groups["all"].value
    assert (groups["all"].seeds, groups["all"].seed_sd) == (1, None)


def test_seeds_are_averaged_by_row_first() -> None:
    found, _ = find_differences(readings([1.0] * 6, [3.0] * 6), "full", 0)
    groups = by_group(found)
    assert groups["all"].value == pytest.approx(12 / 50)
    assert groups["all"].rows == 6
    assert groups["all"].tokens == 50
    assert groups["all"].seed_sd == pytest.approx(np.std([6 / 50, 18 / 50], ddof=1))
    assert groups["all"].seeds == 2


def test_seeds_that_drew_other_rows_add_theirs() -> None:
    one, two = readings([1.0] * 6)
    part = {"rows": [4, 5, 9], "user": ["c", "d", "e"], "training_rows": [25, 7, 2], "tokens": [6, 5, 10]}
    found, _ = find_differences(
        [
            one, two,
            Reading("full", "GaVaMoE", 1, row_losses(**part, shown=[1.0, 1.0, 1.0])),
            Reading("base-wide", "base-wide", 1, row_losses(**part, shown=[4.0, 4.0, 4.0])),
        ],
        "full", 0,
    )  # fmt: skip
    groups = by_group(found)
    assert (groups["all"].rows, groups["all"].users, groups["all"].tokens) == (7, 5, 60)
    # rows 0 to 3 differ by 1, rows 4 and 5 by (1 + 3) / 2, row 9 by 3
    assert groups["all"].value == pytest.approx((4 * 1 + 2 * 2 + 3) / 60)
    assert groups["5-19"].value == pytest.approx(2 / 5)
    assert groups["1-4"].seeds == 2


def test_a_condition_counts_the_rows_that_both_read() -> None:
    full = row_losses(USERS, TRAINED, TOKENS, [1.0] * 6, stranger=[np.nan, np.nan, 1.0, 1.0, 1.0, 1.0])
    other = row_losses(USERS, TRAINED, TOKENS, [1.0] * 6, stranger=[np.nan, np.nan, 2.0, 2.0, 2.0, np.nan])
    found, _ = find_differences([Reading("full", "f", 0, full), Reading("base-wide", "b", 0, other)], "full", 0)
    strangers = {each.group: each for each in found if each.condition == "stranger"}
    assert {name: (each.users, each.rows) for name, each in strangers.items()} == {
        "1-4": (1, 1), "20+": (1, 2), "all": (2, 3),
    }  # fmt: skip
    assert strangers["all"].value == pytest.approx(3 / 15)


def test_the_bootstrap_over_users_equals_a_plain_loop() -> None:
    random = np.random.default_rng(3)
    gap_US, tokens_US = random.normal(size=(7, 2)), random.integers(1, 9, size=(7, 2)).astype(float)
    found = ratio_intervals(gap_US, tokens_US, resamples=200, seed=5)
    draws = np.random.default_rng(5)
    ratios: list[list[float]] = [[], []]
    for _ in range(200):
        users = draws.integers(7, size=7)
        for system in (0, 1):
            above = sum(gap_US[user, system] for user in users)
            ratios[system].append(above / sum(tokens_US[user, system] for user in users))
    assert found == pytest.approx(np.array([np.percentile(each, [2.5, 97.5]) for each in ratios]))


def test_users_are_drawn_whole() -> None:
    """Forty rows of two users who differ are no more evidence than two rows of them."""
    user = ["a"] * 20 + ["b"] * 20
    full = row_losses(user, [3] * 40, [1] * 40, [1.0] * 40)
    other = row_losses(user, [3] * 40, [1] * 40, [2.0] * 20 + [1.0] * 20)
    found, _ = find_differences([Reading("full", "f", 0, full), Reading("base-wide", "b", 0, other)], "full", 0)
    [whole] = [each for each in found if each.group == "all"]
    assert (whole.low, whole.high) == (0.0, 1.0)
    assert not whole.behind


def test_ratios_of_too_few_users_have_no_interval() -> None:
    found = ratio_intervals(np.array([[1.0, 1.0], [1.0, 0.0]]), np.array([[1.0, 1.0], [1.0, 0.0]]), resamples=9)
    assert found[0].tolist() == [1.0, 1.0]
    assert np.isnan(found[1]).all()
    assert np.isnan(ratio_intervals(np.zeros((0, 1)), np.zeros((0, 1)))).all()


def test_other_rows_are_refused_and_other_tokens_left_out() -> None:
    full, other = readings([1.0] * 6)
    fewer = row_losses(USERS[:5], TRAINED[:5], TOKENS[:5], [1.0] * 5)
    with pytest.raises(
        InputError, match=r"losses of base-wide and full: 5 and 6 rows, which are not the same"
    ) as caught:
        find_differences([full, other._replace(losses=fewer)], "full", 0)
    assert "\n" not in str(caught.value)
    moved = row_losses(USERS, TRAINED, TOKENS, [1.0] * 6, rows=[0, 1, 2, 3, 4, 9])
    with pytest.raises(InputError, match="6 and 6 rows, which are not the same"):
        find_differences([full, other._replace(losses=moved)], "full", 0)
    longer = row_losses(USERS, TRAINED, [11, *TOKENS[1:]], [1.0] * 6)
    found, unpaired = find_differences([full, other._replace(losses=longer)], "full", 0)
    assert found == []
    assert unpaired == {"base-wide": "reads other tokens than full, so that nats per token do not compare"}
    _, unpaired = find_differences([full, other._replace(seed=7)], "full", 0)
    assert unpaired == {"base-wide": "no seed in common with full"}


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    losses = row_losses(USERS, TRAINED, TOKENS, [1.5] * 6, stranger=[np.nan] * 5 + [2.0])
    losses.write(tmp_path)
    table = pq.read_table(tmp_path / LOSSES_FILE)
    assert table.column_names == [
        "row", "user", "training_rows", "tokens", "loss_shown", "loss_hidden", "loss_stranger", "cluster",
    ]  # fmt: skip
    assert table["loss_stranger"].null_count == 5
    again = RowLosses.read(tmp_path)
    assert again is not None
    for name in ("row_N", "user_N", "training_rows_N", "tokens_N", "cluster_N"):
        assert getattr(again, name).tolist() == getattr(losses, name).tolist()
    for condition, loss_N in losses.loss_N.items():
        np.testing.assert_array_equal(again.loss_N[condition], loss_N)


def test_files_that_are_none_of_these_are_named(tmp_path: Path) -> None:
    assert RowLosses.read(tmp_path) is None
    (tmp_path / LOSSES_FILE).write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match=r"losses\.parquet: can't be read .*evaluate the run again"):
        RowLosses.read(tmp_path)
    pq.write_table(pa.table({"row": [1]}), tmp_path / LOSSES_FILE)
    with pytest.raises(InputError, match=r"losses\.parquet: columns row, not those of losses"):
        RowLosses.read(tmp_path)


def test_summary_by_hand() -> None:
    losses = row_losses(USERS, TRAINED, TOKENS, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], stranger=[np.nan] * 5 + [2.5])
    summary = losses.summary()
    assert set(summary) == {"shown", "stranger"}
    assert summary["shown"]["0"] == {"users": 1, "rows": 2, "tokens": 30, "loss": pytest.approx(3 / 30)}
    assert summary["shown"]["all"] == {"users": 4, "rows": 6, "tokens": 50, "loss": pytest.approx(21 / 50)}
    assert summary["stranger"] == {
        group: {"users": 1, "rows": 1, "tokens": 5, "loss": pytest.approx(0.5)} for group in ("5-19", "all")
    }


def test_tables_lines_and_picture(tmp_path: Path) -> None:
    differences = [
        difference("base-wide", 0.021, group="1-4"),
        difference("base-wide", -0.001),
        difference("gpt2", 0.5, None),
        difference("base-wide", 0.03, condition="stranger"),
    ]
    losses = loss_comparison(differences)
    heads, rows = loss_tables(losses)["shown"]
    assert heads == ["nats a token", "1-4 rows", "all users", "seeds", "sd over seeds, all users"]
    assert rows == [
        ["GaVaMoE", "4.500", "4.500", "", ""],
        ["Base, as large", "+0.021 (+0.016 to +0.026) *", "-0.001 (-0.006 to +0.004)", "3", "0.004"],
        ["GPT-2", "-", "+0.500", "3", "0.004"],
    ]
    assert loss_tables(losses, brief=True)["shown"][1][1:] == [["Base, as large", "+0.021 *", "-0.001"]]
    assert list(loss_tables(losses)) == ["shown", "stranger"]
    write_csv(tmp_path / "d.csv", CSV_HEADS, csv_rows(losses))
    with (tmp_path / "d.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["system"] for line in lines] == ["base-wide", "base-wide", "gpt2", "base-wide"]
    assert float(lines[0]["difference"]) == 0.021
    assert (lines[2]["low"], lines[2]["high"]) == ("", "")
    forest_plot(losses, tmp_path / "d.png")
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
