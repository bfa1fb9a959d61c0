"""Near copies by their pictures: candidates by features and by thumbnails, confirmed or rejected.

Reads: arrays. Writes: nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from featcache.evaluation.auditing.copies import (
    LEAST_ROWS,
    AuditRows,
    NearPairs,
    PicturePairs,
    choose_threshold,
)
from featcache.evaluation.auditing.registration import compare_pictures
from featcache.evaluation.auditing.thumbnails import find_candidates

if TYPE_CHECKING:
    from featcache.evaluation.auditing.images import AuditImages

# Agreement of pictures. 404 chest X-rays: of 1,690 pairs of neighbours the first (one radiograph,
# twice) has 0.99, the next, of one patient, 0.89, 99 % up to 0.75. 340 planted copies of 17 kinds
# have 0.95 to 1. Where most pictures have copies the null is theirs: hence the second number.
_FLOOR, _CEILING = 0.9, 0.95
# 95 % of pairs drawn at random have up to 0.58 (X-rays), 0.77 (phantoms); handwritten digits 0.97.
_NUM_DRAWN, _ALIKE = 400, 0.85
_MOST_BY_FEATURES = 100_000  # pairs that are laid over each other: 3 ms each

Pairs = npt.NDArray[np.int64]


def confirm_near(rows: AuditRows, images: AuditImages, by_features: NearPairs) -> NearPairs:
    """Return the near pairs that are one picture, of those by features and by thumbnails.

    The threshold comes from the pictures themselves, as in ``choose_threshold``: the null is each
    picture's middle agreement with its five nearest neighbours. It stays between 0.9 and 0.95.
    Pictures of which many agree anyway, such as digits, are not compared.

    Args:
        rows: Those with the same pixels are of one image.
        images: Their pictures.
        by_features: Pairs of ``find_near``. Those with an image that was not read stay as they are.
    """
    if by_features.threshold is None:
        return by_features
    pictures = _different_pictures(rows, images)
    if len(pictures) < LEAST_ROWS or not _can_be_told(images, pictures):
        no = np.zeros(len(by_features.pairs), np.bool_)
        return replace(by_features, pictures=PicturePairs(None, 0, 0, no, no, no))
    can_compare = images.is_read[by_features.pairs].all(axis=1)
    asked = by_features.pairs[can_compare]
    by_thumbnails = pictures[find_candidates(images.small[pictures])]
    pairs = _join(by_thumbnails, asked[:_MOST_BY_FEATURES])
    found = compare_pictures(images.small, pairs)
    threshold = _choose_threshold(found.scores, pairs, by_thumbnails)
    is_one = found.scores >= threshold
    left = ~can_compare
    similarities = np.concatenate([found.scores[is_one], by_features.similarities[left]])
    order = np.argsort(-similarities, kind="stable")
    nothing = np.zeros(int(left.sum()), np.bool_)
    return replace(
        by_features,
        pairs=np.concatenate([pairs[is_one], by_features.pairs[left]])[order],
        similarities=similarities[order],
        is_cut=by_features.is_cut or len(asked) > _MOST_BY_FEATURES,
        pictures=PicturePairs(
            threshold, len(pairs), int((~is_one[_are_in(pairs, asked)]).sum()),
            np.concatenate([np.ones(int(is_one.sum()), np.bool_), nothing])[order],
            np.concatenate([found.mirrored[is_one], nothing])[order],
            np.concatenate([found.inverted[is_one], nothing])[order],
        ),
    )  # fmt: skip


def _different_pictures(rows: AuditRows, images: AuditImages) -> Pairs:
    """Return a row of each image that was read."""
    read = np.flatnonzero(images.is_read)
    _, first = np.unique(rows.images[read], return_index=True)
    return np.sort(read[first])


def _can_be_told(images: AuditImages, pictures: Pairs) -> bool:
    """Return whether pictures drawn at random have something to compare, and differ in it."""
    drawn = np.random.default_rng(0).choice(pictures, (_NUM_DRAWN, 2))
    scores = compare_pictures(images.small, drawn[drawn[:, 0] != drawn[:, 1]]).scores
    scores = scores[scores > -1]
    return len(scores) >= _NUM_DRAWN / 2 and bool(np.quantile(scores, 0.95) < _ALIKE)


def _join(one: Pairs, other: Pairs) -> Pairs:
    return np.unique(np.sort(np.concatenate([one, other]), axis=1), axis=0)


def _are_in(pairs: Pairs, others: Pairs) -> npt.NDArray[np.bool_]:
    """Return (P,) whether each pair is among others."""
    known = {*map(tuple, np.sort(others, axis=1).tolist())}
    return np.array([tuple(pair) in known for pair in pairs.tolist()], np.bool_)


def _choose_threshold(scores: npt.NDArray[np.float32], pairs: Pairs, by_thumbnails: Pairs) -> float:
    is_null = _are_in(pairs, by_thumbnails)
    ends = pairs[is_null].T.ravel()
    values = np.tile(scores[is_null], 2)
    order = np.lexsort((values, ends))
    ends, values = ends[order], values[order]
    _, starts, counts = np.unique(ends, return_index=True, return_counts=True)
    # of five and more the third: few pictures have three copies
    third = starts + np.maximum(counts - 3, 0)
    return min(max(choose_threshold(values[third])[0], _FLOOR), _CEILING)
