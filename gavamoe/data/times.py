"""Times of reviews, by which the last of repeated (user, item) pairs is found.

Seconds since 1970, or any other number that grows with time; timestamps; ISO 8601 dates and times in all its forms
(calendar, week and ordinal dates; basic and extended; fractions; offsets). Other ways of writing a date are not
guessed at: 01/02/2020 is a day in January or in February.
"""

import re
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc

from gavamoe.data.readers.batches import parse_numbers

_USUAL = (
    r"^(?P<date>\d{4}-\d{2}-\d{2})"
    r"(?:[Tt ](?P<clock>\d{2}:\d{2})(?P<seconds>:\d{2})?(?:[.,](?P<fraction>\d{1,9}))?)?"
    r" ?(?P<offset>[Zz]|UTC|[+-]\d{2}(?::?\d{2})?)?$"  # UTC: not of the standard, but what BigQuery writes
)
_BASIC_DATE = r"^(19|20)\d{2}(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])$"
_MONTH = re.compile(r"\d{4}-\d{2}")
_ORDINAL = re.compile(r"(\d{4})-?(\d{3})(?=T|$)")
_MIDNIGHT = re.compile(r"(?<=T)24(:?)00(\1(?:00))?(?=$|[Z+-])")
_MAX_CHARS = 64


def parse_times(values: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Read times.

    Args:
        values: double, timestamp or string (R,).

    Returns:
        double (R,): seconds, or the number as it is; null where there is none or it is not understood. And bool (R,):
        true where it is not understood. Blank strings are missing; times without an offset are taken as UTC.
    """
    if pa.types.is_temporal(values.type):
        seconds = pc.divide(values.cast(pa.timestamp("us")).cast(pa.int64()).cast(pa.float64()), 1e6)
        return seconds, pa.array([False] * len(values))
    if not pa.types.is_string(values.type):
        return parse_numbers(values)
    text = pc.utf8_trim_whitespace(values)
    text = pc.if_else(pc.equal(text, ""), None, text)
    # as seconds since 1970, eight digits would be a review of 1970 or 1971
    number, _ = parse_numbers(pc.if_else(pc.match_substring_regex(text, _BASIC_DATE), None, text))
    left = pc.and_(pc.is_null(number), pc.is_valid(text))
    if pc.any(left).as_py():
        number = pc.replace_with_mask(number, left, _usual(text.filter(left)))
        left = pc.and_(pc.is_null(number), pc.is_valid(text))
    if pc.any(left).as_py():
        other = [_iso_seconds(value) for value in text.filter(left).to_pylist()]
        number = pc.replace_with_mask(number, left, pa.array(other, pa.float64()))
    return number, pc.and_(pc.is_null(number), pc.is_valid(text))


def _usual(text: pa.Array) -> pa.Array:
    """double (R,): seconds of the commonest forms, all rows at once; null for the others."""
    parts = pc.extract_regex(text, _USUAL)
    if parts.null_count == len(parts):
        return pa.nulls(len(text), pa.float64())
    date, clock, seconds, fraction, offset = parts.flatten()
    clock, seconds = _filled(clock, "00:00"), _filled(seconds, ":00")
    moment = pc.strptime(
        pc.binary_join_element_wise(date, " ", clock, seconds, ""), "%Y-%m-%d %H:%M:%S", unit="s", error_is_null=True
    )
    day = pc.strptime(date, "%Y-%m-%d", unit="s", error_is_null=True)
    moment = pc.if_else(pc.equal(pc.strftime(day, "%Y-%m-%d"), date), moment, None)  # February 30 is read as March 1
    count = pc.utf8_length(fraction)
    digits = pc.cast(_filled(fraction, "0"), pa.float64())
    offset = pc.replace_substring_regex(_filled(pc.utf8_upper(offset), "Z"), "Z|UTC", "+0000")
    offset = pc.replace_substring(offset, ":", "")
    hours = pc.cast(pc.utf8_slice_codeunits(offset, 1, 3), pa.float64())
    minutes = pc.cast(_filled(pc.utf8_slice_codeunits(offset, 3, 5), "0"), pa.float64())
    sign = pc.if_else(pc.starts_with(offset, "-"), -60.0, 60.0)
    shift = pc.multiply(sign, pc.add(pc.multiply(hours, 60.0), minutes))
    total = pc.add(moment.cast(pa.int64()).cast(pa.float64()), pc.divide(digits, pc.power(10.0, count)))
    return pc.subtract(total, shift)


def _filled(values: pa.Array, default: str) -> pa.Array:
    return pc.if_else(pc.equal(values, ""), default, values)


def _iso_seconds(text: str) -> float | None:
    """Seconds of the rarer forms of ISO 8601; None for anything else."""
    if len(text) > _MAX_CHARS or not text.isascii():
        return None
    text = text.upper().replace(" ", "T", 1) if "T" not in text.upper() else text.upper()
    days = 0
    if _MONTH.fullmatch(text):
        text += "-01"
    if (ordinal := _ORDINAL.match(text)) and len(text.partition("T")[0]) in (7, 8) and text[:7].count("-") <= 1:
        if not 1 <= int(ordinal[2]) <= 366:
            return None
        text, days = f"{ordinal[1]}-01-01{text[ordinal.end() :]}", int(ordinal[2]) - 1
    if _MIDNIGHT.search(text):
        text, days = _MIDNIGHT.sub(lambda match: "00" + match[0][2:], text), days + 1
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    try:
        later = moment + timedelta(days=days)
    except OverflowError:
        return None
    return later.timestamp() if ordinal is None or later.year == moment.year else None
