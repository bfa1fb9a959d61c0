"""What the pipeline made, on its way into shards: images, repeated contents, failures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.data.dataset import Sample
from featcache.errors import BackboneError
from featcache.extraction.inventory import Inventory
from featcache.extraction.pipeline import Outcome
from featcache.extraction.shards import PartialCache
from featcache.runtime import Timer


@dataclass(frozen=True)
class _Done:
    """An image that has features but is in no shard yet.

    Attributes:
        position: Of the sample in the data set.
        outcome: Of its decoding.
        features: (V, D) in the stored dtype, None where they are those of the same content
            elsewhere.
        number: Of its content.
    """

    position: int
    outcome: Outcome
    features: npt.NDArray[Any] | None
    number: int


class Intake:
    """Images that have features but are in no shard yet.

    Args:
        partial: Where shards are written.
        inventory: What is known; it hears of every image that has come into a shard.
        dtype: Of the stored features.
        fail: Called with each image that has failed, and why. What it raises goes on.
    """

    def __init__(
        self, partial: PartialCache, inventory: Inventory, dtype: np.dtype[Any],
        fail: Callable[[Sample, str], None],
    ) -> None:  # fmt: skip
        self.num_new = 0
        self._partial, self._inventory, self._dtype, self._fail = partial, inventory, dtype, fail
        self._done: list[_Done] = []
        self._in_hand: set[int] = set()  # contents whose features are among them
        # Images of a content that another image has claimed and that is still under way.
        self._waiting: dict[int, list[tuple[int, Outcome]]] = {}
        self._unsettled: list[int] = []  # positions of those it has failed, to be run themselves

    def take(
        self, position: int, outcome: Outcome, features: npt.NDArray[np.float32] | None, *,
        claimed: bool,
    ) -> None:  # fmt: skip
        """Keep what the pipeline made of one image that this cache wants.

        Args:
            position: Of the sample in the data set.
            outcome: What became of it.
            features: (V, D), or None where it failed or was not claimed.
            claimed: Whether this cache claimed its content.

        Raises:
            DataError: If more images have failed than are allowed.
            BackboneError: If features are not finite in the stored dtype.
        """
        sample, contents = outcome.sample, self._inventory.contents
        number = contents.claimed_by(sample.path) if claimed else None
        if number is not None and contents.sha256_of(number) != outcome.sha256:
            reason = "it changed while it was read"
            features, outcome = None, replace(outcome, reason=reason, is_transient=True)
        if features is not None:
            assert number is not None
            self._done.append(_Done(position, outcome, self._stored(features, outcome), number))
            self._in_hand.add(number)
        elif number is not None:
            if outcome.is_transient:
                contents.release(sample.path)
            else:
                contents.fail(sample.path, str(outcome.reason))
            self._fail(sample, str(outcome.reason))
        elif outcome.reason is not None:  # it could not even be read
            self._fail(sample, str(outcome.reason))
        else:
            self._take_repeated(position, outcome)
        if number is not None:
            for other, repeated in self._waiting.pop(number, ()):
                self._take_repeated(other, repeated)

    def _take_repeated(self, position: int, outcome: Outcome) -> None:
        """Give an image the features of the same content elsewhere, as soon as there are any."""
        contents = self._inventory.contents
        number = self._inventory.find(outcome.sample, outcome.sha256)
        if number is None:  # the image that claimed it failed by an accident of its own
            self._unsettled.append(position)
        elif (reason := contents.failure(number)) is not None:
            self._fail(outcome.sample, reason)
        elif contents.is_made(number) or number in self._in_hand:
            self._done.append(_Done(position, outcome, None, number))
        else:
            self._waiting.setdefault(number, []).append((position, outcome))

    def pop_unsettled(self) -> list[int]:
        """Return, once, the positions of images that have to be run themselves after all."""
        unsettled, self._unsettled = self._unsettled, []
        return unsettled

    def close(self) -> None:
        """Fail, when all images have come, those whose content nobody has made after all.

        Their twin hung its decoder and came back too late to be taken; the next run tries again.
        """
        for repeated in self._waiting.values():
            for _, outcome in repeated:
                self._fail(outcome.sample, "an image of the same content hung its decoder")
        self._waiting = {}

    def __len__(self) -> int:
        """Return how many images have features but are in no shard yet."""
        return len(self._done)

    def flush(self, timer: Timer, at_least: int = 1) -> None:
        """Write the images that are in no shard yet into one, if they are so many."""
        if len(self._done) < at_least:
            return
        done = self._done
        own = [(d.outcome, d.features) for d in done if d.features is not None]
        rows = [
            {
                "path": d.outcome.sample.path, "image_bytes": d.outcome.sample.image_bytes,
                "mtime_ns": d.outcome.sample.mtime_ns, "image_sha256": d.outcome.sha256.hex(),
                "truncated": d.outcome.truncated,
                "views": 0 if d.features is None else len(d.features),
            }
            for d in done
        ]  # fmt: skip
        with timer("write"):
            vectors = self._partial.add_shard([features for _, features in own], rows)
        self._done, self._in_hand = [], set()  # listed: an interruption must not write them again
        self._inventory.contents.add_made(
            vectors, [o.sample.path for o, _ in own], [o.truncated for o, _ in own]
        )
        for d in done:
            self._inventory.set_content(d.position, d.number)
        self.num_new += len(own)

    def _stored(self, features: npt.NDArray[np.float32], outcome: Outcome) -> npt.NDArray[Any]:
        """Return features in the stored dtype, all finite."""
        with np.errstate(over="ignore"):
            stored = features.astype(self._dtype)
        if not np.isfinite(stored).all():
            raise BackboneError(
                "features", expected=f"finite {self._dtype.name} values", found="NaN or infinity",
                where=outcome.sample.path,
                hint="Use --precision fp32 and --feature-dtype float32",
            )  # fmt: skip
        return stored
