from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightwad_agent.errors import UsageError
from tightwad_agent.units import count, duration, parse_duration, parse_size, percent, size


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("30m", 1800), ("12h", 43200), ("7d", 604800), (" 1 h ", 3600)]
)
def test_durations_people_write(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "0s", "-1h", "1.5h", "1w", "h", "1h30m", "1hh", "1e3", "9" * 10, "0x10", "1h\n2", "1_0", "∞"]
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_duration(text)
    assert "30m" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("0", 0),
        ("123", 123),
        ("5 B", 5),
        ("200GB", 200 * 10**9),
        ("200 gb", 200 * 10**9),
        ("1.5TB", 15 * 10**11),
        ("0.125 kB", 125),
        ("2.5MiB", 2621440),
        ("3G", 3 * 10**9),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes_people_write(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "-1", "1,5GB", "1.GB", "GB", "1PB", "1e9", "1.2345MB", "9" * 16, "٣GB", "1iB"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert "200GB" in caught.value.hint


@given(st.integers(0, 10**15 - 1), st.sampled_from(["", "B", "kB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB"]))
def test_whole_sizes_are_exact(n: int, unit: str) -> None:
    base, power = (1024 if "i" in unit else 1000), " kmgt".index((unit[:1] or " ").lower().replace("b", " "))
    assert parse_size(f"{n}{unit}") == n * base**power


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0 K"), (134_515_008, "134.5 M"), (7_615_616_512, "7.6 B"), (10**12, "1.0 T")],
)
def test_counts_as_people_say_them(n: int, text: str) -> None:
    assert count(n) == text


@given(st.text(max_size=12))
def test_no_text_breaks_the_parser(text: str) -> None:
    try:
        assert parse_duration(text) > 0
    except UsageError:
        pass


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (999.6, "1.0 kB"),
        (1000, "1.0 kB"),
        (99_949, "99.9 kB"),
        (99_951, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (98_441_600, "98.4 MB"),
        (25_757_220_864, "25.8 GB"),
        (10**12, "1.0 TB"),
        (123_456 * 10**12, "123456 TB"),
        (-5_000, "-5.0 kB"),
        (-500_000_000, "-500 MB"),
    ],
)
def test_sizes_with_the_digits_that_matter(n: float, text: str) -> None:
    assert size(n) == text


@given(st.floats(0, 9.9e14))
def test_a_size_is_short_and_right_to_three_digits(n: float) -> None:
    text = size(n)
    number, unit = text.split()
    factor = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert len(number) <= 4
    assert float(number) * factor == pytest.approx(n, rel=0.051, abs=0.51)


@pytest.mark.parametrize(
    ("s", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (119.4, "119 s"),
        (119.6, "2 min"),
        (7199, "119 min"),
        (7200, "2 h 0 min"),
        (7500, "2 h 5 min"),
        (172799, "47 h 59 min"),
        (172800, "2 d 0 h"),
        (273600, "3 d 4 h"),
        (1e12, "11574074 d 1 h"),
    ],
)
def test_durations_people_read(s: float, text: str) -> None:
    assert duration(s) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(0, 10, "0 %"), (5, 10, "50 %"), (9999, 10000, "99 %"), (10, 10, "100 %"), (11, 10, "100 %"), (0, 0, "100 %")],
)
def test_a_hundred_percent_only_when_it_is_whole(part: float, whole: float, text: str) -> None:
    assert percent(part, whole) == text


@given(st.integers(-(2**70), 2**70), st.integers(-(2**70), 2**70))
def test_a_percentage_is_one(part: int, whole: int) -> None:
    n = int(percent(part, whole).removesuffix(" %"))
    assert 0 <= n <= 100
    assert (n == 100) == (whole <= 0 or part >= whole)
