"""Images change, runs crash, files are damaged: the cache is f(current bytes), or a refusal.

A Hypothesis state machine (``state_machine.py``). The planted bugs show that it would find real
ones.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from featcache.cache.reading import Cache, open_cache
from featcache.errors import DataError, FeatcacheError
from featcache.extraction import finish, ledger, plan, shards, update, view_stream
from featcache.extraction.ledger import Ledger
from featcache.extraction.partial_cache import PartialCache
from featcache.pixels.views import Rendering

pytest.importorskip("fcntl", reason="flock and posix_fallocate: Linux")

from shortcuts import Shortcuts, take_shortcuts
from state_machine import BITS, CONTENTS, NUM_GOOD, RECIPES, run_machines, truth


def test_contents_are_told_apart_by_their_features() -> None:
    """Or the machine could not see one in another's place."""
    good = CONTENTS[:NUM_GOOD]
    rows = [truth(content, recipe, 1)[0] for content in good for recipe in RECIPES[:3]]
    rows += [truth(content, RECIPES[0], 2)[1] for content in good]
    distances = [np.abs(a - b).max() for i, a in enumerate(rows) for b in rows[:i]]
    assert min(distances) > 1e-3
    assert len({len(content) for content in CONTENTS[:5]} | {len(CONTENTS[-2])}) == 1


@pytest.fixture
def shortcuts() -> Iterator[Shortcuts]:
    with take_shortcuts(rows_per_shard=2) as taken, mock.patch.object(os, "fsync"):
        yield taken


def test_a_cache_is_what_its_images_are_now_or_refused(
    tmp_path: Path, shortcuts: Shortcuts, tally: Callable[..., None],
    rounds: Callable[[int, int], int],
) -> None:  # fmt: skip
    counts: Counter[str] = Counter()
    run_machines(rounds(120, 5000), rounds(8, 14), counts, tmp_path, shortcuts)
    for outcome, count in counts.items():
        tally("state machine", outcome, count)
    assert counts["extracted"] > counts["machines"] // 2, "the machine idles"
    assert min(counts[what] for what in ("refused", "crashed", "damaged", "up to date")) > 20


# ----------------------------------------------------------------- planted bugs, that must be found


def note_paths_only(self: Ledger, keys: Any, numbers: Any) -> None:
    NOTE(self, [(path, 0, 0) for path, _, _ in keys], numbers)


class AnyChecksum(str):
    """A checksum that is always the wanted one."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, _: object) -> bool:
        return True

    def __ne__(self, _: object) -> bool:
        return False


def open_of_any_recipe(self: PartialCache) -> bool:
    with contextlib.suppress(OSError, ValueError):
        self._fingerprint = json.loads((self.folder / "manifest.json").read_bytes())["fingerprint"]
    return OPEN(self)


def render_black(data: bytes, recipes: Any, sha256: bytes) -> Rendering:
    try:
        return RENDER(data, recipes, sha256)
    except DataError:
        sides = [(views.num_views, *2 * (rules.image_size,)) for rules, views in recipes]
        return Rendering(tuple(np.zeros(side, np.uint8) for side in sides), truncated=False)


def write_old_targets(path: Path, splits: Any, **facts: Any) -> Cache:
    """A content keeps the target it had, wherever it was moved."""
    if path.exists():
        with contextlib.suppress(FeatcacheError):
            had = {
                row.tobytes(): int(target)
                for split in open_cache(path).splits.values()
                for row, target in zip(split.image_sha256, split.targets, strict=True)
            }
            for rows in splits.values():
                for i, row in enumerate(rows.image_sha256):
                    rows.targets[i] = had.get(row.tobytes(), rows.targets[i])
    return WRITE_ROWS(path, splits, **facts)


def write_new_rows_last(path: Path, splits: Any, **facts: Any) -> Cache:
    """Rows that were there stay where they were, new ones come behind them."""
    with contextlib.suppress(FeatcacheError):
        old = open_cache(path).splits
        for name in old.keys() & splits.keys():
            rows, had = splits[name], set(old[name].paths)
            order = sorted(range(len(rows.paths)), key=lambda i: rows.paths[i] not in had)
            features = np.concatenate(list(rows.feature_blocks()))[order]
            splits[name] = replace(
                rows, paths=[rows.paths[i] for i in order], groups=[rows.groups[i] for i in order],
                feature_blocks=lambda features=features: [features],
                **{k: getattr(rows, k)[order] for k in ("targets", *FACTS)},
            )  # fmt: skip
    return WRITE_ROWS(path, splits, **facts)


def match_by_time(self: Ledger, *, rehash: bool) -> list[int]:
    return MATCH(self)


def drop_repeated(self: Ledger) -> list[int]:
    """The second image of a content is lost."""
    self.take_unsettled()
    return []


FACTS = ("image_sha256", "image_bytes", "mtime_ns")
NOTE, OPEN, RENDER = Ledger._note, PartialCache.open, view_stream.render
WRITE_ROWS, MATCH, HOLDS = finish.write_rows, Ledger.match, plan.holds

BUGS: dict[str, list[tuple[Any, str, Any]]] = {
    "a moved image keeps its old target": [(finish, "write_rows", write_old_targets)],
    "another recipe's shards are mixed in": [(PartialCache, "open", open_of_any_recipe)],
    "a broken image is taken for a black one": [(view_stream, "render", render_black)],
    "of images with one content one is lost": [(Ledger, "settle_repeated", drop_repeated)],
    "a shard is believed without its checksum": [
        (shards, "sha256_stream", lambda file: AnyChecksum("0" * 64))
    ],
    "an image is known by its path alone": [
        (Ledger, "_note", note_paths_only),
        (ledger, "image_key", lambda sample: (sample.path, 0, 0)),
        (update, "image_key", lambda sample: (sample.path, 0, 0)),
    ],
    "new rows are written behind the old ones": [(finish, "write_rows", write_new_rows_last)],
    "--rehash believes size and time": [
        (Ledger, "match", match_by_time)
    ],
    "an update that only removes images is none": [
        (plan, "holds", lambda old, dataset, failed: HOLDS(old, dataset, failed) or {
            sample.path for sample in dataset.samples
        } <= {path for split in old.splits.values() for path in split.paths})
    ],
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(
    bug: str, tmp_path: Path, shortcuts: Shortcuts, tally: Callable[..., None],
    rounds: Callable[[int, int], int],
) -> None:  # fmt: skip
    if list(BUGS).index(bug) >= rounds(4, len(BUGS)):
        pytest.skip("found after 40 to 300 machines: by scripts/torture.sh")
    counts: Counter[str] = Counter()
    BITS.clear()  # another bug may have written wrong ones
    with contextlib.ExitStack() as stack:
        for owner, name, value in BUGS[bug]:
            stack.enter_context(mock.patch.object(owner, name, value))
        with pytest.raises(AssertionError):
            run_machines(rounds(300, 2000), 14, counts, tmp_path, shortcuts)
    tally("state machine: planted bugs", "found")
