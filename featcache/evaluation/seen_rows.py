"""Which rows of a cache has the head of a run seen: was it trained on them, or chosen by them?

Reads: a run, and the cache it was trained on where it has no ``rows.bin``. Writes: nothing.
"""

from __future__ import annotations

import numpy as np

from featcache.cache.cache_split import CacheSplit
from featcache.cache.reading import Cache, open_cache
from featcache.cache.side_by_side import join_caches
from featcache.errors import CacheError, FeatcacheError, RunError, warn_user
from featcache.formatting import count
from featcache.heads.config import check_valid_fraction
from featcache.heads.rows import RowNumbers, choose_rows
from featcache.heads.run import Run
from featcache.heads.run_caches import cache_paths, fetch_caches, is_own
from featcache.heads.trained_rows import SeenRows, TrainedRows
from featcache.runtime import Say


def load_trained_rows(run: Run, cache: Cache) -> TrainedRows | None:
    """Return the rows that the head of a run was trained on, None where nothing tells.

    Older runs have no ``rows.bin``: their rows are chosen again from the cache they name.

    Args:
        run: The run.
        cache: An open cache, which may be the one that it was trained on.

    Raises:
        RunError: If ``rows.bin`` is damaged.
    """
    rows = TrainedRows.read(run.path, run.weights_sha256)
    if rows is not None:
        return rows
    try:
        if not is_own(run, cache):
            fetch_caches(run)
            cache = join_caches([open_cache(path) for path in cache_paths(run)])
        if not is_own(run, cache):
            return None
        fraction = check_valid_fraction(run.training.get("valid_fraction"))
        return TrainedRows.of(choose_rows(cache, fraction, run.data_seed, lambda _: None))
    except (FeatcacheError, OSError):
        return None


def find_seen(run: Run, cache: Cache, split: CacheSplit, rows: RowNumbers) -> SeenRows | None:
    """Return which of some rows the head of a run has seen, None where nothing tells.

    Raises:
        RunError: If ``rows.bin`` is damaged.
        CacheError: If a feature is not finite.
    """
    known = load_trained_rows(run, cache)
    return None if known is None else known.find(split, rows)


def find_all_seen(run: Run, cache: Cache) -> SeenRows | None:
    """Return which rows of all splits, one split after the other, the head of a run has seen.

    Raises:
        RunError: If ``rows.bin`` is damaged.
        CacheError: If a feature is not finite.
    """
    known = load_trained_rows(run, cache)
    if known is None:
        return None
    parts = [known.find(split, np.arange(len(split))) for split in cache.splits.values()]
    return SeenRows(
        np.concatenate([part.trained for part in parts]),
        np.concatenate([part.validated for part in parts]),
        np.concatenate([part.unclear for part in parts]),
    )


def warn_of_seen(seen: SeenRows | None, where: str, consequence: str) -> None:
    """Warn of rows that the head has seen.

    Args:
        seen: Of all rows that are looked at.
        where: What they are rows of, such as ``test``.
        consequence: What follows, for people.
    """
    if seen is None:
        warn_user(
            f"whether the head was trained on rows of {where} cannot be told: the run has no "
            "rows.bin, and the cache that it was trained on is gone or has changed"
        )
        return
    rows = count(len(seen.trained), "row")
    trained, validated, unclear = seen.counts
    what = [f"was trained on {trained:,}"] * bool(trained)
    what += [f"was chosen by {validated:,}"] * bool(validated)
    if what:
        warn_user(f"the head {' and '.join(what)} of the {rows} of {where}: {consequence}")
    if unclear:
        warn_user(
            f"of {unclear:,} of the {rows} of {where} the path is that of a row that the head has "
            "seen, but the features are others, and there is no hash of the image: whether it is "
            "the same image cannot be told"
        )


def leave_out_seen(
    rows: RowNumbers, seen: SeenRows | None, cache: Cache, split: str, say: Say, *,
    head: str = "the head",
) -> RowNumbers:  # fmt: skip
    """Return the rows that the head is known not to have seen.

    Args:
        rows: Numbers of the rows.
        seen: Of them, which the head has seen.
        cache: Where they are.
        split: Their split.
        say: Receives a line for people.
        head: What the head is called in it.

    Raises:
        RunError: If nothing tells.
        CacheError: If no row is left.
    """
    if seen is None:
        raise RunError(
            "--unseen", expected="rows.bin in the run, or the cache it was trained on, unchanged",
            found="neither", where=cache.path, hint="Train the head again, or leave it out",
        )  # fmt: skip
    unseen = rows[~seen.any]
    trained, chosen, unclear = seen.counts
    found = f"{trained:,} that {head} was trained on, {chosen:,} that it was chosen by"
    found += f", {unclear:,} of which it cannot be told" * bool(unclear)
    if not len(unseen):
        raise CacheError(
            f"split {split}", expected=f"labelled rows that {head} has not seen", found=found,
            where=cache.path, hint="Evaluate on other images, or leave --unseen out",
        )  # fmt: skip
    say(f"rows left out: {found}")
    return unseen
