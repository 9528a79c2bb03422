"""One count over the parts of a job."""

from gavamoe.runtime.progress import Parts


def test_parts_are_one_count_that_never_falls_and_ends_at_all() -> None:
    told: list[tuple[int, int]] = []
    parts = Parts(lambda done, total: told.append((done, total)), 10)
    first = parts.part(6)
    first(2, 6)
    first(6, 6)
    second = parts.part(4)  # stops early: fewer rows than were counted on
    second(1, 3)
    parts.end()
    assert [done for done, _ in told] == [2, 6, 6, 7, 10]
    assert {total for _, total in told} == {10}


def test_nobody_who_looks_is_told_nothing() -> None:
    parts = Parts(None, 3)
    parts.part(3)(1, 3)
    parts.end()
