"""Numbers and lists as people read them: plurals, thousands, shares, sizes, times, few of many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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
