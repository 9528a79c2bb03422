"""Do gates pay? The sentences that made-up differences lead to."""

import pytest
from helpers.losses import difference

from gavamoe.evaluation.losses.differences import Difference
from gavamoe.evaluation.losses.verdict import CONTROLS, verdict

GROUPS = ("0", "1-4", "5-19", "20+", "all")
EVERYWHERE = [("shown", group) for group in GROUPS] + [("hidden", group) for group in GROUPS]
EVERYWHERE += [("stranger", group) for group in GROUPS[1:]]


def five(leads: dict[str, float], condition: str, group: str, *, other: float = 0.05) -> list[Difference]:
    """All five controls; those that are not named are behind by `other`."""
    return [difference(name, leads.get(name, other), condition=condition, group=group) for name in CONTROLS]


def test_gates_pay_everywhere() -> None:
    found = [each for place in EVERYWHERE for each in five({"base-wide": 0.03}, *place)]
    first, second = verdict(found)
    assert first == ("Gates pay on this data set: GaVaMoE beats all 5 controls that were run, in every group of users.")
    assert second.startswith(
        "Its lead over the best control, in nats a token: user's slot shown: users without training rows 0.030 (0.025"
        " to 0.035; Base, as large), users with 1 to 4 rows 0.030"
    )
    assert "; strangers: users with 1 to 4 rows 0.030" in second
    assert second.endswith("all users 0.030 (0.025 to 0.035; Base, as large).")


def test_gates_pay_over_all_users_though_not_for_each() -> None:
    found = five({}, "shown", "all") + five({"base-wide": 0.001}, "shown", "20+") + five({}, "shown", "1-4")
    first, second = verdict(found)
    assert first.endswith("over all users, though not in every group.")
    assert "users with 1 to 4 rows 0.050" in second
    assert "20 and more" not in second


def test_gates_pay_where_the_slot_says_nothing_and_cost_elsewhere() -> None:
    found = five({"cluster-token": 0.02}, "hidden", "1-4") + five({"no-multi-gating": -0.012}, "shown", "20+")
    first, second, third = verdict(found)
    assert first == (
        "Gates pay on this data set only where the user's slot says nothing: there GaVaMoE beats all 5 controls that"
        " were run, with the slot shown it does not."
    )
    assert second == (
        "Its lead over the best control, in nats a token: user's slot hidden: users with 1 to 4 rows 0.020 (0.015 to"
        " 0.025; cluster token)."
    )
    assert third == (
        "A control is better, in nats a token: user's slot shown: users with 20 and more rows 0.012 (0.007 to 0.017;"
        " w/o multi-gating)."
    )


def test_gates_pay_for_some_users_only() -> None:
    found = five({}, "shown", "1-4") + five({"base-active": 0.0}, "shown", "all")
    assert verdict(found)[0] == (
        "Gates pay on this data set for some users only: there GaVaMoE beats all 5 controls that were run, over all"
        " users it does not."
    )


def test_one_control_that_is_level_is_enough_for_no() -> None:
    found = five({"cluster-token": 0.004}, "shown", "all")
    first, second = verdict(found)
    assert first == (
        "Gates do not pay on this data set: nowhere does GaVaMoE beat all 5 controls that were run by more than chance."
    )
    assert second == (
        "No control is better by more than chance either: the best, cluster token, has +0.004 nats a token over"
        " GaVaMoE's (user's slot shown, all users, -0.001 to +0.009)."
    )


def test_what_does_better_is_named_where_gates_do_not_pay() -> None:
    found = five({"base-wide": -0.02, "base-active": -0.01}, "shown", "all")
    first, second = verdict(found)
    assert first.startswith("Gates do not pay on this data set")
    assert second == (
        "A control is better, in nats a token: user's slot shown: all users 0.020 (0.015 to 0.025; Base, as large)."
    )


@pytest.mark.parametrize("half", [0.05, None], ids=["touches 0", "no interval"])
def test_an_interval_that_does_not_leave_out_0_is_no_win(half: float | None) -> None:
    found = [difference(name, 0.05, half) for name in CONTROLS]
    assert verdict(found)[0].startswith("Gates do not pay")
    assert "the best, Base, as active, has +0.050 nats" in verdict(found)[1]
    lost = [difference(name, -0.05, half) for name in CONTROLS]
    assert "No control is better by more than chance either" in verdict(lost)[1]


def test_ties_are_no_win_and_no_loss() -> None:
    found = [difference(name, 0.0, 0.0) for name in CONTROLS]
    assert [sentence.split(":")[0] for sentence in verdict(found)] == [
        "Gates do not pay on this data set", "No control is better by more than chance either",
    ]  # fmt: skip


def test_a_control_that_lacks_a_group_leaves_it_open() -> None:
    found = five({}, "stranger", "1-4")[1:] + five({"base-wide": 0.001}, "shown", "all")
    assert verdict(found)[0].startswith("Gates do not pay")


def test_missing_controls_and_one_seed_are_said() -> None:
    found = [difference(name, 0.05, seeds=1) for name in ("base-wide", "random-routes")]
    *_, last = verdict(found)
    assert verdict(found)[0].startswith("Gates pay on this data set: GaVaMoE beats all 2 controls that were run")
    assert last == (
        "Not compared with a dense model of equal active width (base-active), one gate for all (no-multi-gating) and a"
        " cluster token in the prompt (cluster-token); one seed, so another training may come out otherwise."
    )
    single = verdict([difference("base-wide", 0.05)])
    assert "beats the one control that was run" in single[0]
    assert verdict([difference(name, 0.05, seeds=1) for name in CONTROLS])[-1] == (
        "One seed, so another training may come out otherwise."
    )


def test_leads_below_the_spread_of_the_seeds_are_said() -> None:
    found = [difference(name, 0.003, 0.001) for name in CONTROLS]
    found += [difference(name, 0.05, group="1-4") for name in CONTROLS]
    assert verdict(found)[-1] == "Smaller than their own spread over the seeds: 1 of these 2 differences."


def test_few_users_are_said() -> None:
    found = [difference(name, 0.03).model_copy(update={"users": 19}) for name in CONTROLS]
    assert verdict(found)[-1] == "Resting on fewer than 20 users: 1 of these 1 differences."


def test_without_a_control_nothing_is_said() -> None:
    for found in ([], [difference("gpt2", 0.5)]):
        [only] = verdict(found, "Ours")
        assert only.startswith("Whether gates pay can't be said: Ours was compared with none of a dense model of equal")
        assert only.endswith("and a cluster token in the prompt (cluster-token).")


def test_other_systems_decide_nothing() -> None:
    found = five({}, "shown", "all")
    assert verdict([*found, difference("gpt2", -0.5)]) == verdict(found)
