"""Split rows into parts, stratified by class, with groups kept together.

A *unit* is a set of rows that stay together: rows of one group (also across classes) and rows of
equal content, joined until units share neither. Units are assigned one by one, large ones first, to
the part that lacks their classes most. If units have several classes, that alone leaves classes up
to 6 % of their rows off: single units are moved and swapped as long as that helps. The order
depends only on the seed and the rows' names, and on no random generator: the parts are the same on
every machine, in every version and for every order of rows.

Reads and writes nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import DataError

_ANY = "any"
_MAX_STEPS = 1000
_MAX_SWAPPED = 1000  # units; all pairs of them are looked at in each step


def build_units(
    groups: Sequence[Hashable | None], contents: Sequence[Hashable | None]
) -> list[list[int]]:
    """Join rows that share a group or a content, directly or through others (union-find).

    Args:
        groups: The group of each row; None for none.
        contents: A key of each row's content, such as a hash; None if it is not known.

    Returns:
        The rows of each unit, ascending; every row once. Units are sorted by their first row.
    """
    parents = list(range(len(groups)))

    def find(row: int) -> int:
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = parents[row]
        return row

    for keys in (groups, contents):
        first: dict[Hashable, int] = {}
        for row, key in enumerate(keys):
            if key is not None:
                parents[find(row)] = find(first.setdefault(key, row))
    units: dict[int, list[int]] = defaultdict(list)
    for row in range(len(groups)):
        units[find(row)].append(row)
    return list(units.values())


def assign_units(
    units: Sequence[Sequence[int]],
    labels: Sequence[str],
    names: Sequence[str],
    fractions: Mapping[str, float],
    *,
    seed: int,
) -> list[str]:
    """Assign each unit to a part, so that every part gets its fraction of every class.

    Units of several classes come first, then large ones; the single rows at the end even out the
    fractions. As soon as a class has no more units left than parts without it, its units go to
    those parts. If any unit has several classes, units are moved and swapped in the end.

    Args:
        units: The rows of each unit; every row in one of them.
        labels: The class of each row.
        names: A unique name of each row (its path); with the seed, it decides the order.
        fractions: Part -> its share of every class: above 0, adding up to 1.
        seed: Changes the order.

    Returns:
        The part of each row.

    Raises:
        DataError: If a class has too few units to reach every part. ``what`` is ``class NAME``;
            the caller adds ``where`` and ``hint``.
    """
    keys = [name.encode("utf-8", "surrogateescape") for name in names]
    # Everything follows the order of the names, sums of rounded numbers too.
    units = [sorted(unit, key=keys.__getitem__) for unit in units]
    per_unit = [Counter(labels[row] for row in unit) for unit in units]
    total = Counter(labels[row] for row in sorted(range(len(labels)), key=keys.__getitem__))
    need = {part: {label: f * total[label] for label in total} for part, f in fractions.items()}
    missing = {label: set(fractions) for label in total}  # parts without this class
    waiting = Counter(label for counts in per_unit for label in counts)
    _refuse_small_classes(waiting, fractions)

    def order(index: int) -> tuple[int, int, bytes]:
        key = f"{seed}/".encode() + keys[units[index][0]]
        return -len(per_unit[index]), -len(units[index]), hashlib.sha256(key).digest()

    chosen: dict[int, str] = {}  # unit -> part, in the order of assignment
    for index in sorted(range(len(units)), key=order):
        counts = per_unit[index]
        candidates = set(fractions)
        for label in counts:
            if waiting[label] <= len(missing[label]):
                candidates = (candidates & missing[label]) or candidates
        best = _best_part(counts, need, total, candidates)
        for label, count in counts.items():
            need[best][label] -= count
            missing[label].discard(best)
            waiting[label] -= 1
        chosen[index] = best
    reached = {label: len(fractions) - len(unreached) for label, unreached in missing.items()}
    _refuse_small_classes(reached, fractions)
    if any(len(counts) > 1 for counts in per_unit):
        better = _Balance([per_unit[index] for index in chosen], chosen.values(), fractions)
        better.improve()
        chosen = dict(zip(chosen, better.parts(), strict=True))
    parts = [""] * len(labels)
    for index, part in chosen.items():
        for row in units[index]:
            parts[row] = part
    return parts


class _Balance:
    """Moves and swaps units between parts, to lower the squared deviations of all class shares.

    Each step takes the best move or, if there is none, the best swap; the first of equal ones.
    Shares are whole numbers of a large unit: exact sums, so the same steps on every machine.

    Args:
        per_unit: Class -> number of rows, of each unit.
        parts: The part of each unit; every class is in every part, and stays there.
        fractions: Part -> its share of every class.
    """

    def __init__(
        self, per_unit: Sequence[Mapping[str, int]], parts: Collection[str],
        fractions: Mapping[str, float],
    ) -> None:  # fmt: skip
        self._names = list(fractions)
        classes = {label: c for c, label in enumerate(sorted(set().union(*per_unit)))}
        # One entry for each unit and class in it; entries of a unit follow each other.
        lengths = [len(counts) for counts in per_unit]
        self._class = np.array([classes[label] for counts in per_unit for label in counts])
        self._rows = np.array([n for counts in per_unit for n in counts.values()])
        self._unit = np.repeat(np.arange(len(per_unit)), lengths)
        self._start = np.cumsum([0, *lengths[:-1]])
        self._part = np.array([self._names.index(part) for part in parts])
        self._held = np.zeros((len(fractions), len(classes)), np.int64)  # rows
        np.add.at(self._held, (self._part[self._unit], self._class), self._rows)
        total = self._held.sum(axis=0)
        # A class' rows weigh alike in all, and sums of products fit 64 bits.
        self._weights = np.maximum(math.isqrt(2**58 // len(classes)) // total, 1)
        wanted = [[round(f * whole) for whole in (total * self._weights).tolist()]
                  for f in fractions.values()]  # fmt: skip
        self._excess = self._held * self._weights - np.array(wanted)
        self._shares = self._rows * self._weights[self._class]
        self._sizes = self._sum_units(self._shares**2)
        self._prepare_swaps(len(classes))

    def _prepare_swaps(self, num_classes: int) -> None:
        """Set the shares (K, C) of the units that may be swapped, and their products (K, K)."""
        most = min(len(self._part), _MAX_SWAPPED, math.isqrt(10**8 // num_classes))
        dense = np.zeros((most, num_classes), np.int64)
        entries = self._unit < most
        dense[self._unit[entries], self._class[entries]] = self._shares[entries]
        self._dense, self._products = dense, dense @ dense.T

    def _sum_units(self, of_entries: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        sums: npt.NDArray[np.int64] = np.add.reduceat(of_entries, self._start, axis=-1)
        return sums

    def parts(self) -> list[str]:
        """Return the part of each unit."""
        return [self._names[part] for part in self._part]

    def improve(self) -> None:
        """Move and swap units until nothing helps, in a limited number of steps."""
        for _ in range(_MAX_STEPS):
            pulls = self._sum_units(self._shares * self._excess[:, self._class])  # (parts, units)
            if not (self._move(pulls) or self._swap(pulls)):
                break

    def _move(self, pulls: npt.NDArray[np.int64]) -> bool:
        """Make the best move of one unit, if any helps."""
        own = pulls[self._part, np.arange(len(self._part))]
        changes = self._sizes + pulls - own
        is_last = self._held[self._part[self._unit], self._class] == self._rows
        changes[:, np.logical_or.reduceat(is_last, self._start)] = 0
        changes[self._part, np.arange(len(self._part))] = 0
        part, unit = np.unravel_index(changes.argmin(), changes.shape)
        if changes[part, unit] >= 0:
            return False
        self._put(int(unit), int(part))
        return True

    def _swap(self, pulls: npt.NDArray[np.int64]) -> bool:
        """Make the best swap of two units, if any helps."""
        most = len(self._dense)
        part, sizes = self._part[:most], self._sizes[:most]
        across = pulls[part][:, :most]  # [v, u]: of unit u in the part of v
        one = sizes - across.diagonal() + across
        changes = one + one.T - 2 * self._products
        is_in = self._dense > 0
        rows = self._dense // self._weights
        is_last = is_in & (self._held[part] == rows)
        lost = is_last.astype(np.float32) @ (~is_in).T.astype(np.float32)
        changes[(lost > 0) | (lost.T > 0)] = 0
        first, second = np.unravel_index(changes.argmin(), changes.shape)
        if changes[first, second] >= 0:
            return False
        there = int(part[second])
        self._put(int(second), int(part[first]))
        self._put(int(first), there)
        return True

    def _put(self, unit: int, part: int) -> None:
        for entry in np.flatnonzero(self._unit == unit):
            label, before = self._class[entry], self._part[unit]
            for place, sign in ((before, -1), (part, 1)):
                self._held[place, label] += sign * self._rows[entry]
                self._excess[place, label] += sign * self._shares[entry]
        self._part[unit] = part


def assign_labelled_units(
    units: Sequence[Sequence[int]],
    is_positive: npt.NDArray[np.bool_],
    names: Sequence[str],
    fractions: Mapping[str, float],
    *,
    seed: int,
) -> list[str]:
    """Do what ``assign_units`` does for rows with several labels each.

    A row is stratified by its rarest positive class that can reach every part: a class whose rows,
    without those of rarer classes, are in at least as many units as there are parts. All other rows
    form one more class; if that is too small, they join the largest. If a class still does not
    reach every part, because its units are joined, the smallest class is dropped and all is tried
    again.

    Args:
        units: As for ``assign_units``.
        is_positive: (N, C) bool.
        names: As for ``assign_units``.
        fractions: As for ``assign_units``.
        seed: As for ``assign_units``.

    Returns:
        The part of each row.

    Raises:
        DataError: If there are fewer units than parts.
    """
    unit_of = np.empty(len(names), np.int64)
    for number, unit in enumerate(units):
        unit_of[list(unit)] = number
    candidates = list(np.argsort(is_positive.sum(0), kind="stable"))
    while True:
        labels = _choose_labels(is_positive, candidates, unit_of, len(fractions))
        try:
            return assign_units(units, labels.tolist(), names, fractions, seed=seed)
        except DataError:
            tried, counts = np.unique(labels[labels != _ANY], return_counts=True)
            if not len(tried):
                raise
            candidates.remove(int(tried[counts.argmin()]))


def _choose_labels(
    is_positive: npt.NDArray[np.bool_], candidates: Sequence[int], unit_of: npt.NDArray[np.int64],
    num_parts: int,
) -> npt.NDArray[Any]:  # fmt: skip
    """Return the class to stratify each row by: its index as text, or ``_ANY``."""
    labels = np.full(len(unit_of), _ANY, object)
    for index in candidates:
        rows = is_positive[:, index] & (labels == _ANY)
        if len(np.unique(unit_of[rows])) >= num_parts:
            labels[rows] = str(index)
    others = labels == _ANY
    if not others.all() and len(np.unique(unit_of[others])) < num_parts:
        found, counts = np.unique(labels[~others], return_counts=True)
        labels[others] = found[counts.argmax()]
    return labels


def _best_part(
    counts: Mapping[str, int], need: Mapping[str, Mapping[str, float]], total: Mapping[str, int],
    candidates: Collection[str],
) -> str:  # fmt: skip
    """Return the part that lacks a unit's classes most; on ties, the one that lacks most rows."""

    def lack(part: str) -> tuple[float, float]:
        wanted = (count * need[part][label] / total[label] for label, count in counts.items())
        return sum(wanted), sum(need[part].values())

    return max((part for part in need if part in candidates), key=lack)


def _refuse_small_classes(enough_for: Mapping[str, int], fractions: Mapping[str, float]) -> None:
    for label, count in sorted(enough_for.items()):
        if count < len(fractions):
            raise DataError(
                f"class {label}",
                expected=f"at least {len(fractions)} images of different groups, one for each of "
                + ", ".join(fractions),
                found=f"enough for {count}",
            )
