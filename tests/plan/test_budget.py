"""Budgets as users write them."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reltune.errors import InputError
from reltune.plan.budget import Budget, parse_budget, read_budget

MILLION = 1_000_000


@pytest.mark.parametrize(
    ("budget", "count"),
    [
        ("0.5%", 5_000),
        (" 0.5 % ", 5_000),
        (".5%", 5_000),
        ("5.%", 50_000),
        ("+5%", 50_000),
        ("1e-3%", 10),
        ("100%", MILLION),
        ("0.1%", 1_000),
        ("0.57%", 5_700),  # 0.57 / 100 · 10⁶ is 5699.999… in floats
        ("0.00019%", 1),
        ("50000", 50_000),
        (50000, 50_000),
        (50000.0, 50_000),
        (1e6, MILLION),
        ("5e4", 50_000),
        ("50k", 50_000),
        ("50 K", 50_000),
        ("0.5M", 500_000),
        ("1m", MILLION),
        ("0.001b", MILLION),
        ("0.0005B", 500_000),
        ("1.001k", 1_001),  # 1000.9999… in floats
        ("8.001k", 8_001),
        ("10_000", 10_000),
        ("10,000", 10_000),
        ("1,000,000", MILLION),
        ("1", 1),
    ],
)
def test_what_a_budget_allows(budget, count):
    assert parse_budget(budget, MILLION) == count


@pytest.mark.parametrize(
    ("budget", "why"),
    [
        ("0", "allows nothing"),
        (0, "allows nothing"),
        (0.0, "allows nothing"),
        ("0%", "allows nothing"),
        ("-5%", "allows nothing"),
        (-1, "allows nothing"),
        ("101%", "above 100%"),
        ("100.0000001%", "above 100%"),
        (MILLION + 1, "more than the 1,000,000 parameters"),
        ("2M", "more than the 1,000,000 parameters"),
        ("1e400", "more than the 1,000,000 parameters"),
        ("0.00009%", "less than one"),
        ("1e-400%", "less than one"),
        (0.3, r"no whole number of parameters; for a share write 0\.3%"),
        ("1.5", "no whole number"),
        ("1.0005k", "no whole number"),
        ("1e-7", "no whole number"),
        ("abc", "is no number"),
        ("", "is no number"),
        ("%", "is no number"),
        ("k", "is no number"),
        ("nan", "is no number"),
        ("nan%", "is no number"),
        (float("nan"), "is no number"),
        (float("inf"), "is no number"),
        ("inf%", "is no number"),
        ("1e99999999999", "is no number"),
        ("0,5%", "is no number"),  # half a percent where commas are decimal, never five
        ("1,5M", "is no number"),
        ("1,0000", "is no number"),
        ("5%%", "is no number"),
        ("5k%", "is no number"),
        ("5 GB", "is no number"),
        ("0x10", "is no number"),
        (True, "is no number"),
        (None, "is no number"),
    ],
)
def test_what_no_budget_is(budget, why):
    with pytest.raises(InputError, match=why) as caught:
        parse_budget(budget, MILLION)
    assert repr(budget) in str(caught.value)


@settings(deadline=None)
@given(st.integers(1, 10**13), st.integers(1, 10**6))
def test_a_percentage_is_exact_and_rounded_down(base, share):
    """Shares with four decimals, against fractions."""
    exact = Fraction(base) * share / 10**6
    text = f"{share // 10**4}.{share % 10**4:04d}%"
    if exact < 1:
        with pytest.raises(InputError, match="less than one"):
            parse_budget(text, base)
    else:
        assert parse_budget(text, base) == exact.numerator // exact.denominator


@pytest.mark.parametrize(
    ("budget", "parts"),
    [
        ("0.5%", Budget("0.5%")),
        (2000, Budget("2000")),
        ("memory=12GiB", Budget(memory=12 * 2**30)),
        ("memory=12G", Budget(memory=12 * 2**30)),
        ("memory=.5gi", Budget(memory=2**29)),
        ("memory=800MB", Budget(memory=800 * 10**6)),
        ("memory=1.5KiB", Budget(memory=1536)),
        ("memory=2tb", Budget(memory=2 * 10**12)),
        ("time=0.5", Budget(time=0.5)),
        ("TIME = .25", Budget(time=0.25)),
        ("hours=2", Budget(hours=2.0)),
        ("5% memory=1GB time=1 hours=3.", Budget("5%", 10**9, 1.0, 3.0)),
        ("time=1 5 %", Budget("5 %", time=1.0)),
        ("parameters=2M memory=1GB", Budget("2M", 10**9)),
    ],
)
def test_the_parts_of_a_budget(budget, parts):
    assert read_budget(budget) == parts
    assert parts.is_limited == ((parts.memory, parts.time, parts.hours) != (None, None, None))
    assert parse_budget(budget, 10**7) == (10**7 if parts.parameters is None else parse_budget(parts.parameters, 10**7))


@pytest.mark.parametrize(
    ("budget", "why"),
    [
        ("memry=1GiB", "'memry' is nothing that can be limited; .*memory"),
        ("time=1 time=2", "says twice how much time"),
        ("5% parameters=2M", "says twice how much parameters"),
        ("memory=12", "'12' is no size"),
        ("memory=1PiB", "'1PiB' is no size"),
        ("memory=", "'' is no size"),
        ("memory=0.5GiB0", "is no size"),
        ("memory=0GiB", "allows nothing"),
        ("memory=0.0004KiB", "allows nothing"),
        ("time=0", "time must be a number above 0, like time=0.5, half of what full"),
        ("time=-1", "time must be a number above 0"),
        ("hours=long", "hours must be a number above 0, like hours=2"),
        ("5 GB time=1", "is no number"),
        ("0 time=1", "allows nothing"),
    ],
)
def test_parts_that_cannot_be_read(budget, why):
    with pytest.raises(InputError, match=why):
        read_budget(budget)
    with pytest.raises(InputError, match=why):
        parse_budget(budget, MILLION)
