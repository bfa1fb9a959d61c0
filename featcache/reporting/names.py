"""What images, classes and thresholds are called in the page, and what is shown of images.

Names of strangers are made printable here, and escaped by the template.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from featcache.errors import printable
from featcache.formatting import count, shorten
from featcache.reporting.facts import Facts, SplitFacts


@dataclass(frozen=True)
class Explained:
    """What in an image spoke for a class.

    Attributes:
        urls: ``data:`` URLs of its map, one for each backbone that has one.
        text: The same in words.
    """

    urls: list[str]
    text: str


@dataclass(frozen=True)
class Shown:
    """What is shown of images, by split and path.

    Attributes:
        pictures: ``data:`` URLs.
        maps: Maps of some of them.
        note: What the maps show, or why there are none.
        why: Why there are pictures of these images, in words.
    """

    pictures: Mapping[tuple[str, str], str] = field(default_factory=dict)
    maps: Mapping[tuple[str, str], Explained] = field(default_factory=dict)
    note: str = ""
    why: str = ""


@dataclass(frozen=True)
class Names:
    """What images are called in the page, and what is shown of them.

    Attributes:
        has_paths: Whether by their paths; else by split and number.
        shown: Their pictures.
    """

    has_paths: bool
    shown: Shown = field(default_factory=Shown)

    def picture(self, facts: SplitFacts, row: int) -> dict[str, Any] | None:
        """Return number, picture and map of a row; None where there is no picture."""
        key = facts.key(row)
        if key not in self.shown.pictures:
            return None
        explained = self.shown.maps.get(key, Explained([], ""))
        return {
            "row": row, "url": self.shown.pictures[key], "maps": explained.urls,
            "text": explained.text,
        }  # fmt: skip

    def of(self, facts: SplitFacts, row: int) -> str:
        """Return the name of a row of a split."""
        if self.has_paths:
            return printable(facts.rows.paths[row])
        return f"{facts.title} {row + 1}"


def count_pictures(facts: Facts, shown: Shown) -> str:
    """Return how many pictures there are, of which splits, and why of these."""
    if not shown.pictures:
        return "no images of patients"
    parts = []
    for split in (facts.valid, facts.test):
        if split is not None:
            keys = {split.key(row) for row in range(len(split.splits))}
            parts.append(f"{len(keys & {*shown.pictures}):,} {split.of}")
    number = count(len(shown.pictures), "small picture")
    return f"{number} of patients ({', '.join(parts)}: {shown.why})"


def short(name: str) -> str:
    """Return a class name that fits a heading."""
    return shorten(printable(name), 40)


def as_word(text: str) -> str:
    """Return a name as one word of a shell, safe to show."""
    return shlex.quote(printable(text))


def as_text(threshold: float) -> str:
    """Return a threshold as the page shows it."""
    return "above 1" if threshold > 1 else f"{threshold:.6g}"
