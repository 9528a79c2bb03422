"""Do gates pay on this data set, for whom, by how much? Sentences, from the differences alone.

Gates pay where the full system beats every control that was run, each by an interval that leaves out 0: a lead over
some controls may come from parameters, from conditioning on a cluster or from any division of the users.
"""

from collections.abc import Iterable, Sequence

from gavamoe.evaluation.losses.differences import Difference
from gavamoe.evaluation.losses.row_losses import ALL, CONDITIONS, GROUPS

CONTROLS = {
    "base-active": "a dense model of equal active width",
    "base-wide": "a dense model with as many parameters",
    "no-multi-gating": "one gate for all",
    "random-routes": "gates dealt to users at random",
    "cluster-token": "a cluster token in the prompt",
}
"""The systems that gates must beat, and what each one is."""
FEW_USERS = 20
"""Below this, a bootstrap over users gives intervals that are too narrow."""
_CONDITION = {"shown": "user's slot shown", "hidden": "user's slot hidden", "stranger": "strangers"}
_GROUP = {
    "0": "users without training rows",
    "1-4": "users with 1 to 4 rows",
    "5-19": "users with 5 to 19 rows",
    "20+": "users with 20 and more rows",
    ALL: "all users",
}
Place = tuple[str, str]
"""Condition and group."""


def verdict(differences: Iterable[Difference], label: str = "GaVaMoE") -> list[str]:
    """One to four sentences about the full system, named `label`; systems that are no controls are not looked at."""
    ours = [difference for difference in differences if difference.system in CONTROLS]
    run = [name for name in CONTROLS if any(difference.system == name for difference in ours)]
    if not run:
        return [f"Whether gates pay can't be said: {label} was compared with none of {_listed(CONTROLS)}."]
    places = {
        (condition, group): [d for d in ours if (d.condition, d.group) == (condition, group)]
        for condition in CONDITIONS
        for group in (*GROUPS, ALL)
    }
    places = {place: found for place, found in places.items() if found}
    wins = {
        place: min(found, key=_value)
        for place, found in places.items()
        if len(found) == len(run) and all(difference.behind for difference in found)
    }
    losses = {
        place: min((difference for difference in found if difference.ahead), key=_value)
        for place, found in places.items()
        if any(difference.ahead for difference in found)
    }
    said = [_headline(places, wins, run, label)]
    if wins:
        said.append(f"Its lead over the best control, in nats a token: {_where(wins, 1)}.")
    if losses:
        said.append(f"A control is better, in nats a token: {_where(losses, -1)}.")
    elif not wins:
        said.append(_level(places, label))
    if doubts := _doubts(ours, run, [*wins.values(), *losses.values()]):
        said.append(doubts)
    return said


def _headline(places: dict[Place, list[Difference]], wins: dict[Place, Difference], run: list[str], label: str) -> str:
    beaten = "the one control that was run" if len(run) == 1 else f"all {len(run)} controls that were run"
    if not wins:
        return f"Gates do not pay on this data set: nowhere does {label} beat {beaten} by more than chance."
    groups = {place for place in places if place[1] != ALL}
    if ("shown", ALL) in wins and len(groups & wins.keys()) == len(groups):
        return f"Gates pay on this data set: {label} beats {beaten}, in every group of users."
    if ("shown", ALL) in wins:
        return f"Gates pay on this data set: {label} beats {beaten} over all users, though not in every group."
    if not any(condition == "shown" for condition, _ in wins):
        return (
            f"Gates pay on this data set only where the user's slot says nothing: there {label} beats {beaten}, with"
            " the slot shown it does not."
        )
    return f"Gates pay on this data set for some users only: there {label} beats {beaten}, over all users it does not."


def _where(found: dict[Place, Difference], sign: int) -> str:
    """ "user's slot hidden: users with 1 to 4 rows 0.031 (0.020 to 0.042; one gate), all users ..."."""
    parts = []
    for condition, words in _CONDITION.items():
        here = {group: difference for (at, group), difference in found.items() if at == condition}
        inside = [f"{_GROUP[group]} {_amount(difference, sign)}" for group, difference in here.items()]
        if inside:
            parts.append(f"{words}: {', '.join(inside)}")
    return "; ".join(parts)


def _amount(difference: Difference, sign: int) -> str:
    ends = [sign * end for end in (difference.low, difference.high) if end is not None]
    interval = f"{min(ends):.3f} to {max(ends):.3f}; " if ends else ""
    return f"{sign * difference.value:.3f} ({interval}{difference.label})"


def _level(places: dict[Place, list[Difference]], label: str) -> str:
    """Neither side leads: how far the best control is over all users."""
    place = ("shown", ALL) if ("shown", ALL) in places else next(iter(places))
    best = min(places[place], key=_value)
    interval = "" if best.low is None or best.high is None else f", {best.low:+.3f} to {best.high:+.3f}"
    return (
        f"No control is better by more than chance either: the best, {best.label}, has {best.value:+.3f} nats a token"
        f" over {label}'s ({_CONDITION[place[0]]}, {_GROUP[place[1]]}{interval})."
    )


def _doubts(ours: Sequence[Difference], run: list[str], named: Sequence[Difference]) -> str:
    """Controls that were not run, and what the intervals do not know: trainings differ, and few users differ more."""
    missing = [name for name in CONTROLS if name not in run]
    parts = [f"not compared with {_listed(missing)}"] if missing else []
    if all(difference.seeds < 2 for difference in ours):
        parts.append("one seed, so another training may come out otherwise")
    if few := sum(each.users < FEW_USERS for each in named):
        parts.append(f"resting on fewer than {FEW_USERS} users: {few} of these {len(named)} differences")
    if small := sum(each.seed_sd is not None and abs(each.value) < each.seed_sd for each in named):
        parts.append(f"smaller than their own spread over the seeds: {small} of these {len(named)} differences")
    said = "; ".join(parts)
    return f"{said[0].upper()}{said[1:]}." if said else ""


def _listed(names: Iterable[str]) -> str:
    words = [f"{CONTROLS[name]} ({name})" for name in names]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _value(difference: Difference) -> float:
    return difference.value
