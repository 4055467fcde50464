"""Durations and sizes as a guard policy writes them: a number with its unit, nothing between.

A bare number is refused, since 256 may be bytes or MiB to its writer, and so are kB, MB and their like, which mean 1000
to some and 1024 to others. Arithmetic is exact: 0 is 0, and 1.5GiB is 1536MiB.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

DURATIONS: dict[str, Fraction] = {"ms": Fraction(1, 1000), "s": Fraction(1), "m": Fraction(60), "h": Fraction(3600)}
"""In seconds."""

SIZES: dict[str, Fraction] = {"KiB": Fraction(1), "MiB": Fraction(1024), "GiB": Fraction(1024**2)}
"""In KiB."""

_QUANTITY = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(\s*)([^\W\d_]*)")

# What people write instead, in lower case, and the unit they most likely mean.
_MEANT: dict[str, str] = {
    **dict.fromkeys(("msec", "msecs", "millis", "millisecond", "milliseconds"), "ms"),
    **dict.fromkeys(("sec", "secs", "second", "seconds"), "s"),
    **dict.fromkeys(("min", "mins", "minute", "minutes"), "m"),
    **dict.fromkeys(("hr", "hrs", "hour", "hours"), "h"),
    **dict.fromkeys(("k", "kb", "ki"), "KiB"),
    **dict.fromkeys(("m", "mb", "mi"), "MiB"),
    **dict.fromkeys(("g", "gb", "gi"), "GiB"),
}


def duration_s(written: object) -> Fraction:
    """Seconds of a duration such as `500ms`, `5s`, `2m` or `1h`; ValueError says what to write instead."""
    return _quantity(written, DURATIONS, noun="duration", example="5s")


def size_kib(written: object) -> Fraction:
    """KiB of a size such as `64KiB`, `256MiB` or `2GiB`; ValueError says what to write instead."""
    return _quantity(written, SIZES, noun="size", example="256MiB")


def write(amount: Fraction, units: Mapping[str, Fraction]) -> str:
    """An amount in the largest of `units` that leaves it a whole number, else in the smallest."""
    scale = sorted(units, key=lambda unit: units[unit], reverse=True)
    unit = next((unit for unit in scale if amount and (amount / units[unit]).denominator == 1), scale[-1])
    return f"{float(amount / units[unit]):.12g}{unit}"


def _quantity(written: object, units: Mapping[str, Fraction], *, noun: str, example: str) -> Fraction:
    if isinstance(written, (int, float)) and not isinstance(written, bool):
        unit = re.sub(r"[0-9]", "", example)
        raise ValueError(f"is {written:.12g}; write a unit, such as {written:.12g}{unit}")
    if not isinstance(written, str):
        raise ValueError(f"is not a {noun}; expected one such as {example}")
    if not (match := _QUANTITY.fullmatch(written)):
        raise ValueError(f"is {written!r}; expected a {noun} such as {example}")
    number, space, unit = match.groups()
    if unit in units and not space:
        return Fraction(number) * units[unit]
    raise ValueError(f"is {written!r}; {_advice(number, unit, units, example)}")


def _advice(number: str, unit: str, units: Mapping[str, Fraction], example: str) -> str:
    """What to write instead of a number with a unit that is none of ours."""
    if not unit:
        return f"write a unit, such as {number}{re.sub(r'[0-9]', '', example)}"
    if unit in units:
        return f"write it without a space, {number}{unit}"
    same = {known.lower(): known for known in units}
    meant = same.get(unit.lower()) or _MEANT.get(unit.lower())
    expected = f"units are {', '.join(units)}"
    if meant not in units:
        return expected
    if "KiB" in units and unit.lower() in ("kb", "mb", "gb"):
        return f"{unit} means 1000 to some and 1024 to others; write {number}{meant}"
    return f"{expected}; write {number}{meant}"
