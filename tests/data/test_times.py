"""Times of reviews: every form of ISO 8601, and what is none."""

from datetime import UTC, datetime

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gavamoe.data.times import parse_times

TEN = datetime(2020, 1, 2, 10, tzinfo=UTC).timestamp()
MIDNIGHT = datetime(2020, 1, 2, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2020-01-02T10:00:00Z", TEN),
        ("2020-01-02t10:00:00z", TEN),
        ("2020-01-02 10:00:00", TEN),
        ("2020-01-02 10:00", TEN),
        ("2020-01-02T10", TEN),
        ("2020-01-02T10:00:00.250Z", TEN + 0.25),
        ("2020-01-02T10:00:00,5", TEN + 0.5),
        ("2020-01-02T12:00:00+02:00", TEN),
        ("2020-01-02 12:00:00+0200", TEN),
        ("2020-01-02T05:00:00-05", TEN),
        ("2020-01-02 15:30:00 +05:30", TEN),
        ("2020-01-02 10:00:00 UTC", TEN),
        ("20200102T100000Z", TEN),
        ("2020-W01-4T10:00", TEN),
        ("2020-002T10:00", TEN),
        ("2020002T100000", TEN),
        ("2020-01-02", MIDNIGHT),
        ("20200102", MIDNIGHT),
        ("2020-W01-4", MIDNIGHT),
        ("2020-002", MIDNIGHT),
        ("2020-01-01T24:00:00", MIDNIGHT),
        ("2020-01", MIDNIGHT - 86_400),
        ("1577959200", TEN),
        (" 1577959200.5 ", TEN + 0.5),
        ("-86400", -86_400.0),
    ],
)
def test_iso_8601_and_numbers(text: str, seconds: float) -> None:
    found, unknown = parse_times(pa.array([text]))
    assert found.to_pylist() == [seconds]
    assert unknown.to_pylist() == [False]


@pytest.mark.parametrize(
    "text",
    ["01/02/2020", "January 2, 2020", "01 2, 2020", "2020-13-01", "2020-02-30", "2019-366", "99999-01-01", "yesterday"],
)
def test_what_is_not_understood_is_known_as_such(text: str) -> None:
    found, unknown = parse_times(pa.array([text, "2020-01-02"]))
    assert found.to_pylist() == [None, MIDNIGHT]
    assert unknown.to_pylist() == [True, False]


def test_missing_times_are_missing() -> None:
    found, unknown = parse_times(pa.array(["", "  ", None]))
    assert found.null_count == 3
    assert not any(unknown.to_pylist())


def test_timestamps_dates_and_numbers_of_columns() -> None:
    moment = datetime(2020, 1, 2, 10)
    for kind in ("s", "ms", "us", "ns"):
        assert parse_times(pa.array([moment], pa.timestamp(kind)))[0].to_pylist() == [TEN]
    assert parse_times(pa.array([moment.date()]))[0].to_pylist() == [MIDNIGHT]
    found, unknown = parse_times(pa.array([1.5, None, float("nan")]))
    assert found.to_pylist() == [1.5, None, None]
    assert unknown.to_pylist() == [False, False, True]


@settings(max_examples=100, deadline=None)
@given(st.datetimes(datetime(1970, 1, 2), datetime(2100, 1, 1), timezones=st.timezones()))
def test_what_datetime_prints_is_read_back(moment: datetime) -> None:
    offset = moment.utcoffset()
    text = moment.isoformat()
    found, unknown = parse_times(pa.array([text]))
    if offset is not None and offset.total_seconds() % 60 == 0:
        assert found[0].as_py() == pytest.approx(moment.timestamp(), abs=1e-4)
    else:  # offsets with seconds are no ISO 8601
        assert found[0].as_py() is None or unknown[0].as_py() is False


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=5))
def test_any_text_goes_through(texts: list[str]) -> None:
    array = pa.array([text.encode("utf-8", "replace").decode() for text in texts], pa.string())
    found, unknown = parse_times(array)
    assert len(found) == len(unknown) == len(texts)
