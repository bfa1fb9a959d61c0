"""Are two small pictures one picture? They are laid over each other and compared part by part.

Reads: arrays. Writes: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.evaluation.auditing.thumbnails import halve, normalise

_PAIRS = 256  # at a time: 4 MiB an array
_SCALES = (1.0, 0.94, 1 / 0.94)  # begun from: neither, or one of them is cropped
_MOST_SCALE, _MOST_SHIFT = 1.15, 0.08  # of the side: crops of 7 % of each border
_TILE = 8
_LEAST_ENERGY = 0.1  # of a tile, where 1 is usual: black borders say nothing
_LEAST_TILES = 16  # of 64: fewer are no evidence
_HOPELESS = 0.5  # at half the size, where different X-rays have 0.6 and copies 0.95

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Agreements:
    """How much pairs of pictures agree.

    Attributes:
        scores: (P,) the median over 8 x 8 tiles of the local correlation, -1 to 1.
        mirrored: (P,) bool, one is the other's mirror image.
        inverted: (P,) bool, black and white are exchanged.
    """

    scores: npt.NDArray[np.float32]
    mirrored: npt.NDArray[np.bool_]
    inverted: npt.NDArray[np.bool_]


def compare_pictures(small: npt.NDArray[np.uint8], pairs: npt.NDArray[np.int64]) -> Agreements:
    """Compare pairs of pictures in the best of four ways: mirrored or not, inverted or not.

    Each pair is registered by scale and shift along either axis (Gauss-Newton, at half and at full
    size), then compared tile by tile, so that marks and labels in a few tiles change nothing.

    Args:
        small: (N, 64, 64) grey.
        pairs: (P, 2) numbers of pictures.
    """
    scores = np.full(len(pairs), -1, np.float32)
    mirrored, inverted = (np.zeros(len(pairs), np.bool_) for _ in range(2))
    for start in range(0, len(pairs), _PAIRS):
        part = slice(start, start + _PAIRS)
        scores[part], mirrored[part], inverted[part] = _compare(
            small[pairs[part, 0]], small[pairs[part, 1]]
        )
    return Agreements(scores, mirrored, inverted)


def _compare(one: Array, other: Array) -> tuple[Array, Array, Array]:
    still, moved = (normalise(halve(pictures), 0.7, 3) for pictures in (one, other))
    warps, mirrored, inverted = _begin(still, moved)
    other = np.where(mirrored[:, None, None], other[:, :, ::-1], other)
    other = np.where(inverted[:, None, None], 255 - other, other)
    moved = normalise(halve(other), 0.7, 3)
    warps = _register(still, moved, warps, 8)
    scores = _agreement(still, *_warp(moved, warps), tile=_TILE // 2)
    near = np.flatnonzero(scores >= _HOPELESS)
    if len(near):
        still, moved = (normalise(pictures[near], 0.5, 2) for pictures in (one, other))
        warps = _register(still, moved, warps[near], 4)
        scores[near] = _agreement(still, *_warp(moved, warps), tile=_TILE)
    return scores, mirrored, inverted


def _begin(still: Array, moved: Array) -> tuple[Array, Array, Array]:
    """Return the best warps (P, 2, 2) to begin with, and whether mirrored and inverted."""
    best = np.full(len(still), -1, np.float32)
    scales = np.ones(len(still), np.float32)
    mirrored, inverted = (np.zeros(len(still), np.bool_) for _ in range(2))
    for scale in _SCALES:
        warps = np.zeros((len(still), 2, 2), np.float32)
        warps[:, :, 0] = scale
        placed, inside = _warp(moved, warps)
        for is_mirrored in (False, True):
            laid = placed[:, :, ::-1] if is_mirrored else placed  # the warp has no shift yet
            shown = still * inside
            product = (shown * laid).sum(axis=(1, 2))
            lengths = np.sqrt((shown**2).sum(axis=(1, 2)) * ((laid * inside) ** 2).sum(axis=(1, 2)))
            alike = product / np.maximum(lengths, 1e-6)
            better = np.abs(alike) > best
            best = np.where(better, np.abs(alike), best)
            scales = np.where(better, np.float32(scale), scales)
            mirrored = np.where(better, is_mirrored, mirrored)
            inverted = np.where(better, alike < 0, inverted)
    warps = np.zeros((len(still), 2, 2), np.float32)
    warps[:, :, 0] = scales[:, None]
    return warps, mirrored, inverted


def _grid(side: int) -> Array:
    """Return coordinates in shares of the side, 0 in the middle."""
    return ((np.arange(side) - (side - 1) / 2) / side).astype(np.float32)


def _warp(pictures: Array, warps: Array) -> tuple[Array, Array]:
    """Return pictures (P, S, S) moved, and where they are inside.

    Args:
        pictures: They.
        warps: (P, 2, 2): of x and of y, scale and shift in shares of the side.
    """
    side = pictures.shape[1]
    pixels = np.arange(side, dtype=np.float32)
    places = warps[:, :, :1] * _grid(side) + warps[:, :, 1:]
    places = places * side + (side - 1) / 2
    hats = np.maximum(0, 1 - np.abs(places[..., None] - pixels))
    inside = (places >= 0) & (places <= side - 1)
    moved = hats[:, 1] @ pictures @ hats[:, 0].transpose(0, 2, 1)
    return moved, inside[:, 1, :, None] & inside[:, 0, None, :]


def _register(still: Array, moved: Array, warps: Array, num_steps: int) -> Array:
    """Return warps that lay ``moved`` over ``still`` (Baker and Matthews, 2004: inverse steps)."""
    number, side = len(still), still.shape[1]
    grid = _grid(side)
    down, across = np.gradient(still, axis=(1, 2))
    down, across = down * side, across * side
    slopes = np.stack([across * grid, across, down * grid[:, None], down], axis=1)
    slopes = slopes.reshape(number, 4, -1)
    curvature = slopes @ slopes.transpose(0, 2, 1)
    damping = 1e-3 * np.trace(curvature, axis1=1, axis2=2)[:, None, None] + 1e-6
    inverse = np.linalg.inv(curvature + damping * np.eye(4, dtype=np.float32))
    for _ in range(num_steps):
        laid, inside = _warp(moved, warps)
        error = ((laid - still) * inside).reshape(number, -1, 1)
        step = (inverse @ (slopes @ error)).reshape(number, 2, 2)
        scale = 1 / (1 + np.clip(step[:, :, 0], -0.05, 0.05))
        shift = np.clip(step[:, :, 1], -0.03, 0.03)
        warps = np.stack(
            [warps[:, :, 0] * scale, warps[:, :, 1] - warps[:, :, 0] * scale * shift], axis=2
        )
        np.clip(warps[:, :, 0], 1 / _MOST_SCALE, _MOST_SCALE, out=warps[:, :, 0])
        np.clip(warps[:, :, 1], -_MOST_SHIFT, _MOST_SHIFT, out=warps[:, :, 1])
    return warps


def _agreement(still: Array, laid: Array, inside: Array, tile: int) -> Array:
    """Return the median of the tiles' correlations, of tiles that show something; -1 for few."""

    def sums(values: Array) -> Array:
        number, side = len(values), values.shape[1] // tile
        tiles = values.reshape(number, side, tile, side, tile)
        return np.asarray(tiles.sum(axis=(2, 4), dtype=np.float32))

    here = inside.astype(np.float32)
    still, laid = still * here, laid * here
    area = sums(here)
    ours, theirs = sums(still**2), sums(laid**2)
    alike = sums(still * laid) / np.maximum(np.sqrt(ours * theirs), 1e-6)
    shows = np.minimum(ours, theirs) >= _LEAST_ENERGY * np.maximum(area, 1)
    shows &= area >= tile**2 / 2
    enough = shows.sum(axis=(1, 2)) >= _LEAST_TILES
    alike[~shows] = np.nan
    alike[~enough] = -1
    medians = np.nanmedian(alike.reshape(len(alike), -1), axis=1)
    return np.asarray(medians, np.float32)
