"""Pairs of pictures that may be one picture: nearest neighbours of thumbnails.

Thumbnails are normalised locally, so that brightness, contrast and marks in the border change
little, and inversion changes the sign alone. Mirror images and cropped borders are looked for by
their own thumbnails.

Reads: arrays. Writes: nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# Of 20 copies of each of 17 kinds among 404 X-rays (cropped by 3 to 5 %, mirrored, inverted, with
# marks, all at once ...), 337 are the nearest of their neighbours and the other three the second.
NUM_NEIGHBOURS = 5
_CROPPED = 0.04  # of each side: it finds crops of 0 to 6 %
_SIDE = 16  # of what is compared, averaged from 32 x 32
_BLOCK_BYTES = 64 << 20  # of similarities at a time
_ROWS = 4096

Array = npt.NDArray[Any]


def normalise(pictures: Array, fine: float, coarse: float) -> npt.NDArray[np.float32]:
    """Return pictures (N, S, S) less their local mean, by their local standard deviation.

    Args:
        pictures: Grey, uint8 or float.
        fine: Standard deviation in pixels of the Gaussian that removes noise.
        coarse: Of the one that takes local mean and deviation.
    """
    values = pictures.astype(np.float32)
    spread = values.std(axis=(1, 2), keepdims=True)
    values -= values.mean(axis=(1, 2), keepdims=True)
    values *= 64 / np.where(spread > 0.5, spread, np.inf)  # one colour: nothing to compare
    smooth = _blur(values, fine)
    mean = _blur(smooth, coarse)
    variance = _blur(smooth**2, coarse) - mean**2
    smooth -= mean
    smooth /= np.sqrt(np.maximum(variance, 0) + 1)  # rounding does not become structure
    return smooth


def halve(pictures: Array) -> npt.NDArray[np.float32]:
    """Return pictures (N, S, S) as (N, S / 2, S / 2), averaged."""
    n, side = len(pictures), pictures.shape[1] // 2
    halved: npt.NDArray[np.float32] = pictures.reshape(n, side, 2, side, 2).mean(
        axis=(2, 4), dtype=np.float32
    )
    return halved


def find_candidates(
    small: npt.NDArray[np.uint8], num_neighbours: int = NUM_NEIGHBOURS
) -> npt.NDArray[np.int64]:
    """Return pairs (P, 2) of pictures that are among each other's nearest, each pair once.

    Memory: a kilobyte for each picture four times over, and blocks of 64 MiB.

    Args:
        small: (N, 64, 64) grey; different pictures.
        num_neighbours: How many of each picture's nearest are returned.
    """
    number = len(small)
    num_neighbours = min(num_neighbours, number - 1)
    if num_neighbours < 1:
        return np.empty((0, 2), np.int64)
    whole, cropped = _describe(small)
    # A picture's halves by symmetry: the mirror image has the second one's sign changed.
    half = whole.shape[1] // 2
    size = max(1, _BLOCK_BYTES // (4 * number))
    found = []
    for start in range(0, number, size):
        one = whole[start : start + size]
        alike = np.full((len(one), number), -1, np.float32)
        for other in (whole, cropped):
            even = one[:, :half] @ other[:, :half].T
            odd = one[:, half:] @ other[:, half:].T
            # max(|e + o|, |e - o|): inverted or not, mirrored or not
            np.abs(even, out=even)
            np.abs(odd, out=odd)
            even += odd
            np.maximum(alike, even, out=alike)
        alike[np.arange(len(one)), np.arange(start, start + len(one))] = -1
        nearest = np.argpartition(alike, -num_neighbours, axis=1)[:, -num_neighbours:]
        rows = np.repeat(np.arange(start, start + len(one)), num_neighbours)
        found.append(np.sort(np.stack([rows, nearest.ravel()], axis=1), axis=1))
    pairs: npt.NDArray[np.int64] = np.unique(np.concatenate(found), axis=0)
    return pairs


def _describe(small: npt.NDArray[np.uint8]) -> tuple[Array, Array]:
    """Return descriptions (N, 256) float32 of length 1 (or 0) of the pictures and their middles.

    The first half is the part that is its own mirror image, the second what changes its sign.
    """
    whole, cropped = (np.empty((len(small), _SIDE**2), np.float32) for _ in range(2))
    middle = _hat(small.shape[1], 1 - 2 * _CROPPED)
    for i in range(0, len(small), _ROWS):
        part = small[i : i + _ROWS].astype(np.float32)
        for out, pictures in ((whole, part), (cropped, middle @ part @ middle.T)):
            detail = halve(normalise(halve(pictures), 0.7, 3))
            even, odd = detail + detail[:, :, ::-1], detail - detail[:, :, ::-1]
            left = np.s_[:, :, : _SIDE // 2]
            flat = np.concatenate([even[left], odd[left]], axis=1).reshape(len(part), -1)
            lengths = np.linalg.norm(flat, axis=1, keepdims=True)
            out[i : i + _ROWS] = flat / np.where(lengths > 0, lengths, 1)
    return whole, cropped


def _hat(side: int, scale: float) -> npt.NDArray[np.float32]:
    """Return the matrix (S, S) that interpolates the middle ``scale`` of a line."""
    grid = np.arange(side, dtype=np.float32)
    places = (grid - (side - 1) / 2) * scale + (side - 1) / 2
    weights: npt.NDArray[np.float32] = np.maximum(0, 1 - np.abs(places[:, None] - grid))
    return weights.astype(np.float32)


def _blur(pictures: Array, sigma: float) -> npt.NDArray[np.float32]:
    side = pictures.shape[1]
    reach = int(4 * sigma + 0.5)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    matrix = np.zeros((side, side), np.float32)
    for offset, weight in zip(offsets.tolist(), weights / weights.sum(), strict=True):
        rows = np.arange(side)
        np.add.at(matrix, (rows, np.clip(rows + offset, 0, side - 1)), np.float32(weight))
    blurred: npt.NDArray[np.float32] = matrix @ pictures @ matrix.T
    return blurred
