"""Durations and sizes: a number with its unit, nothing between, and no guessing."""

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopguard.policy.units import DURATIONS, SIZES, duration_s, size_kib, write

NUMBERS = st.integers(min_value=0, max_value=10**11)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("500ms", Fraction(1, 2)), ("5s", 5), ("2m", 120), ("1h", 3600), ("1.5s", Fraction(3, 2)), ("0s", 0)],
)
def test_durations_are_exact(written, seconds):
    assert duration_s(written) == seconds


@pytest.mark.parametrize(
    ("written", "kib"),
    [("64KiB", 64), ("256MiB", 262144), ("1.5GiB", 1572864), ("0MiB", 0), ("0.5KiB", Fraction(1, 2))],
)
def test_sizes_are_exact(written, kib):
    assert size_kib(written) == kib


@pytest.mark.parametrize(
    ("written", "advice"),
    [
        (256, "is 256; write a unit, such as 256MiB"),
        (0, "is 0; write a unit, such as 0MiB"),
        (0.5, "is 0.5; write a unit, such as 0.5MiB"),
        ("256", "is '256'; write a unit, such as 256MiB"),
        ("256 MiB", "is '256 MiB'; write it without a space, 256MiB"),
        ("256MB", "is '256MB'; MB means 1000 to some and 1024 to others; write 256MiB"),
        ("16kB", "is '16kB'; kB means 1000 to some and 1024 to others; write 16KiB"),
        ("256mib", "is '256mib'; units are KiB, MiB, GiB; write 256MiB"),
        ("256M", "is '256M'; units are KiB, MiB, GiB; write 256MiB"),
        ("2TiB", "is '2TiB'; units are KiB, MiB, GiB"),
        ("5s", "is '5s'; units are KiB, MiB, GiB"),
        ("-1MiB", "is '-1MiB'; expected a size such as 256MiB"),
        ("1e3MiB", "is '1e3MiB'; expected a size such as 256MiB"),
        ("0x10MiB", "is '0x10MiB'; expected a size such as 256MiB"),
        ("1:30", "is '1:30'; expected a size such as 256MiB"),
        ("", "is ''; expected a size such as 256MiB"),
        ("lots", "is 'lots'; expected a size such as 256MiB"),
        ("\u0663MiB", "is '\u0663MiB'; expected a size such as 256MiB"),
        (True, "is not a size; expected one such as 256MiB"),
        (["1MiB"], "is not a size; expected one such as 256MiB"),
    ],
)
def test_what_is_no_size_is_refused_with_the_fix(written, advice):
    with pytest.raises(ValueError, match=f"^{re.escape(advice)}$"):
        size_kib(written)


@pytest.mark.parametrize(
    ("written", "advice"),
    [
        (5, "is 5; write a unit, such as 5s"),
        ("5 s", "is '5 s'; write it without a space, 5s"),
        ("5min", "is '5min'; units are ms, s, m, h; write 5m"),
        ("5S", "is '5S'; units are ms, s, m, h; write 5s"),
        ("1d", "is '1d'; units are ms, s, m, h"),
        ("1h30m", "is '1h30m'; expected a duration such as 5s"),
    ],
)
def test_what_is_no_duration_is_refused_with_the_fix(written, advice):
    with pytest.raises(ValueError, match=f"^{re.escape(advice)}$"):
        duration_s(written)


@given(number=NUMBERS, unit=st.sampled_from(sorted(DURATIONS)))
def test_any_duration_comes_back_as_it_was_written(number, unit):
    assert duration_s(f"{number}{unit}") == number * DURATIONS[unit]
    assert duration_s(write(duration_s(f"{number}{unit}"), DURATIONS)) == number * DURATIONS[unit]


@given(number=NUMBERS, unit=st.sampled_from(sorted(SIZES)))
def test_any_size_comes_back_as_it_was_written(number, unit):
    assert size_kib(f"{number}{unit}") == number * SIZES[unit]
    assert size_kib(write(size_kib(f"{number}{unit}"), SIZES)) == number * SIZES[unit]


@given(written=st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none()))
def test_anything_else_is_a_value_error_and_never_a_number(written):
    """Whatever is accepted ends in a unit; nothing else raises anything but ValueError."""
    for read, units in ((duration_s, DURATIONS), (size_kib, SIZES)):
        try:
            read(written)
        except ValueError:
            continue
        assert isinstance(written, str)
        assert written.endswith(tuple(units))
