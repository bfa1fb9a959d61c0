"""Numbers and lists for people."""

from __future__ import annotations

import numpy as np
import pytest

from featcache.formatting import (
    FEW,
    count,
    decimal,
    in_bytes,
    in_time,
    join_few,
    list_counts,
    percent,
    shorten,
)


def test_plurals_and_thousands() -> None:
    assert [count(n, "image") for n in (0, 1, 2, 20_000)] == [
        "0 images", "1 image", "2 images", "20,000 images"
    ]  # fmt: skip
    assert count(3, "entry", "entries") == "3 entries"


@pytest.mark.parametrize("digits", [0, 1, 2])
def test_a_share_is_never_rounded_to_all_or_none(digits: int) -> None:
    """Whatever is neither 0 nor 1 is not shown as such, and all else as Python rounds it."""
    shares = np.concatenate([np.linspace(0, 1, 20_001), 10.0 ** -np.arange(1, 12)])
    for share in np.concatenate([shares, 1 - shares]).tolist():
        text = percent(share, digits)
        value = float(text.strip("<>%"))
        assert (value >= 100) == (share == 1), (share, text)
        assert (value <= 0) == (share == 0), (share, text)
        if text[0] not in "<>":
            assert text == f"{share:.{digits}%}"
    assert percent(0.9997, digits) == (">99%", ">99.9%", "99.97%")[digits]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1, "1.000"), (0, "0.000"), (0.9997, ">0.999"), (0.9994, "0.999"), (0.0004, "<0.001")],
)
def test_a_figure_is_never_rounded_to_all_or_none(value: float, text: str) -> None:
    assert decimal(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599.4, "59 min 59 s"),
        (7_500, "2 h 5 min"), (3_600_000, "1,000 h 0 min"),
    ],
)  # fmt: skip
def test_times(seconds: float, text: str) -> None:
    assert in_time(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999 bytes"), (1_900_000, "1.9 MB"), (3.3e12, "3.3 TB"), (5e15, "5,000.0 TB")],
)
def test_sizes(number: float, text: str) -> None:
    assert in_bytes(number) == text


def test_a_long_name_loses_its_middle() -> None:
    for longest in range(3, 30):
        short = shorten("abcdefghijklmnopqrstuvwxyz", longest)
        assert len(short) == min(longest, 26)
        assert short == "abcdefghijklmnopqrstuvwxyz" or (short[0], short[-1]) == ("a", "z")


def test_few_names_are_listed_and_of_many_the_first() -> None:
    names = [f"n{i}" for i in range(1000)]
    assert join_few(names[:FEW]) == ", ".join(names[:FEW])
    assert join_few(iter(names)) == "n0, n1, n2, n3, n4, n5 and 994 more"
    assert join_few(["a\x1b[31m"]) == "a\\x1b[31m"


def test_counts_of_few_classes_are_listed_and_of_many_the_extremes() -> None:
    assert list_counts({"covid": 1_084, "normal": 2}) == "1,084 covid, 2 normal"
    many = {f"n{i:03d}": 20 for i in range(1000)}
    assert list_counts(many) == "20,000 of 1,000 classes, 20 each"
    many["n007"], many["n500"] = 3, 40
    assert list_counts(many | {"unlabelled": 5}) == (
        "20,008 of 1,000 classes, 3 to 40 each; fewest: 3 n007, 20 n000, 20 n001; 5 unlabelled"
    )
