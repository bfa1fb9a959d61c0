"""Numbers and lists as people read them: plurals, thousands, shares, sizes, times, few of many."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from featcache.errors import printable

FEW = 12
"""Names that are listed; of more, a few stand for all."""


def count(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: ``1 image``, ``20,000 images``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def percent(share: float, digits: int = 0) -> str:
    """Return a share in [0, 1] in per cent: never 0 or 100 where it is not.

    ``0.9997`` is ``>99%``, or with one digit ``>99.9%``.
    """
    text, least = f"{share:.{digits}%}", 10.0**-digits
    if share < 1 and float(text[:-1]) >= 100:
        return f">{100 - least:.{digits}f}%"
    if share > 0 and float(text[:-1]) <= 0:
        return f"<{least:.{digits}f}%"
    return text


def decimal(value: float, digits: int = 3) -> str:
    """Return a figure in [0, 1] with decimals: never 0 or 1 where it is not.

    ``0.9997`` is ``>0.999``, with four digits ``0.9997``.
    """
    text = f"{value:.{digits}f}"
    if value < 1 and float(text) >= 1:
        return f">{1 - 10.0**-digits:.{digits}f}"
    if value > 0 and float(text) <= 0:
        return f"<{10.0**-digits:.{digits}f}"
    return text


def in_bytes(number: float) -> str:
    """Return a size in the unit that suits it: ``1.9 MB``."""
    unit = "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if number < 1000:
            break
        number, unit = number / 1000, larger
    return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"


def in_time(seconds: float) -> str:
    """Return a duration: ``45 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def shorten(text: str, longest: int) -> str:
    """Cut out the middle of a long text: names often differ at both ends."""
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}…{text[head + 1 - longest :]}"


def join_few(names: Iterable[str]) -> str:
    """Return names joined by commas, as text that can be printed; of more than 12 the first 6."""
    listed = [*map(printable, names)]
    if len(listed) <= FEW:
        return ", ".join(listed)
    return f"{', '.join(listed[: FEW // 2])} and {len(listed) - FEW // 2:,} more"


def list_counts(counts: Mapping[str, int]) -> str:
    """Return how many of what: ``84 covid, 200 normal``; of many classes the extremes.

    Args:
        counts: Numbers by class; ``unlabelled`` may be among them.
    """
    if len(counts) <= FEW:
        return ", ".join(f"{n:,} {printable(name)}" for name, n in counts.items())
    classes = {name: n for name, n in counts.items() if name != "unlabelled"}
    total, most, least = sum(counts.values()), max(classes.values()), min(classes.values())
    sizes = f"{least:,} each" if least == most else f"{least:,} to {most:,} each"
    text = f"{total:,} of {len(classes):,} classes, {sizes}"
    if least < most:
        fewest = sorted(classes, key=lambda name: (classes[name], name))[:3]
        text += "; fewest: " + ", ".join(f"{classes[n]:,} {printable(n)}" for n in fewest)
    if unlabelled := counts.get("unlabelled"):
        text += f"; {unlabelled:,} unlabelled"
    return text


class _Brief(reprlib.Repr):
    """Values of a result as a notebook shows them: of long lists the first, of arrays the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 60, 60
        self.maxlist = self.maxtuple = self.maxdict = 4

    def repr_instance(self, x: Any, level: int) -> str:
        """Return an array's dtype and shape, the type of a network, and others cut to 60."""
        if hasattr(x, "dtype") and hasattr(x, "shape"):
            return f"<{x.dtype} {tuple(x.shape)}>"
        if hasattr(x, "state_dict"):
            return f"<{type(x).__name__}>"
        if dataclasses.is_dataclass(x) and "\n" not in (text := repr(x)) and len(text) < 200:
            return text
        return super().repr_instance(x, level)

    repr_ndarray = repr_instance  # reprlib looks for the name of the type first


_BRIEF = _Brief()


def brief_repr(self: Any) -> str:
    """Return ``Name(field=value, ...)`` of a dataclass, every value short: its ``__repr__``.

    Fields that are None, most of which were not asked for, are left out.
    """
    values = (
        f"{field.name}={_BRIEF.repr(getattr(self, field.name))}"
        for field in dataclasses.fields(self)
        if field.repr and getattr(self, field.name) is not None
    )
    return f"{type(self).__name__}({', '.join(values)})"
