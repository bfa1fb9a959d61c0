"""Open the caches of a run: those it was trained on, or others with the same features.

A run has one cache, or several of the same images side by side.

Reads: caches. Writes: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featcache.cache.earlier import refuse_misbuilt
from featcache.cache.identity import describe_values, differing_keys, name_differences
from featcache.cache.reading import Cache, open_cache
from featcache.cache.remote_copies import damage_told, fetch, place_of, url_from
from featcache.cache.side_by_side import Caches, caches_of, join_caches, list_caches
from featcache.errors import RunError, printable, warn_user
from featcache.formatting import count
from featcache.heads.run import Run
from featcache.untrusted import real_path, why_no_file

_NOT_NAMED = {"backbone", "weights_sha256", "num_features"}  # the first stands before all
_MAY_DIFFER = ("views", "augmentation", "feature_dtype")


def cache_paths(run: Run) -> list[Path]:
    """Return where the caches that the run was trained on should be.

    Of those in a store, where their local copies are or would be: see ``fetch_caches``.
    """
    places = [(str(cache["path"]), url_from(run.path, str(cache["path"]))) for cache in run.caches]
    return [
        real_path(run.path.resolve() / place) if url is None else place_of(url)
        for place, url in places
    ]


@damage_told()
def open_own_caches(run: Run, *, unchanged: bool = False) -> Cache:
    """Open the caches that a run was trained on, side by side if there are several.

    Args:
        run: The run.
        unchanged: Refuse one that has changed since, in place of a warning.

    Raises:
        RunError: If one is gone, has changed and may not, or was rebuilt with other settings.
        CacheError: If one is damaged, or they do not fit together any more.
    """
    opened = list[Cache]()
    fetch_caches(run)
    for path, trained_on in zip(cache_paths(run), run.caches, strict=True):
        if found := why_no_file(path):
            raise RunError(
                "the run's cache", expected="the cache it was trained on", found=found, where=path,
                hint="Put it back, or train again. For evaluate and predict name it: --cache",
            )  # fmt: skip
        cache = open_cache(path)
        refuse_misbuilt(cache.identity, path)
        _require_own_cache(trained_on["identity"], cache.identity, path)
        if cache.payload_sha256 != trained_on.get("payload_sha256"):
            if unchanged:
                raise RunError(
                    "the run's cache", expected="the one it was trained on",
                    found="one that has changed", where=path, hint="Train again on it",
                )  # fmt: skip
            warn_user(printable(f"{path} has changed since the training"))
        opened.append(cache)
    return _join(run, opened)


def fetch_caches(run: Run, *, max_bytes: int | None = None) -> None:
    """Fetch those caches of a run that lie in a store and are not here as they are there.

    Args:
        run: The run.
        max_bytes: Larger ones are not fetched.

    Raises:
        DataError: If the store refuses or cannot be reached.
    """
    for cache in run.caches:
        if url := url_from(run.path, str(cache["path"])):
            fetch(url, max_bytes=max_bytes)


def open_other_caches(run: Run, caches: Caches) -> Cache:
    """Open caches with features as a run was trained on, in any order.

    Raises:
        RunError: If there are more or fewer than the run has, or their features are others.
        CacheError: If one is damaged, or they do not fit together.
    """
    for trained_on in run.caches:
        refuse_misbuilt(trained_on["identity"], run.path)
    opened = [open_cache(path) for path in list_caches(caches)]
    if len(run.caches) == len(opened) == 1:
        require_same_features(run.cache["identity"], opened[0].identity, opened[0].path)
        return opened[0]
    names = _name_caches(run)
    if len(opened) != len(run.caches):
        raise RunError(
            "--cache", found=count(len(opened), "cache"), where=opened[0].path,
            expected=f"{count(len(run.caches), 'cache')}, as the run was trained on: "
            + " and ".join(names), hint="Name each with --cache",
        )  # fmt: skip
    return _join(run, _in_order(run, opened, names))


def is_own(run: Run, cache: Cache) -> bool:
    """Return whether a cache, or several side by side, is what a run was trained on, unchanged."""
    hashes = [trained_on.get("payload_sha256") for trained_on in run.caches]
    return [each.payload_sha256 for each in caches_of(cache)] == hashes


def _in_order(run: Run, opened: Sequence[Cache], names: Sequence[str]) -> list[Cache]:
    """Return caches in the order of the run's, found by their identities."""
    left, ordered = list(opened), list[Cache]()
    for trained_on, name in zip(run.caches, names, strict=True):
        equal = [c for c in left if c.fingerprint == trained_on["fingerprint"]]
        alike = [c for c in left if not _list_blocking(trained_on["identity"], c.identity)]
        if not equal + alike:
            raise RunError(
                "features", expected=f"those the head was trained on, {name}",
                found="others in " + ", ".join(cache.path.name for cache in left), where=run.path,
                hint="Extract the images again with the run's backbone and options",
            )  # fmt: skip
        chosen = (equal + alike)[0]
        require_same_features(trained_on["identity"], chosen.identity, chosen.path)
        left.remove(chosen)
        ordered.append(chosen)
    return ordered


def _join(run: Run, caches: Sequence[Cache]) -> Cache:
    """Return caches side by side, each with as many features as it had."""
    if len(caches) > 1:
        for cache, trained_on in zip(caches, run.caches, strict=True):
            if cache.num_features != trained_on["num_features"]:
                raise RunError(
                    "features", expected=f"{trained_on['num_features']} per image, as trained on",
                    found=cache.num_features, where=cache.path,
                    hint="Extract the images with the run's backbone",
                )  # fmt: skip
    return join_caches(caches)


def _name_caches(run: Run) -> list[str]:
    """Return for each cache of a run in what it differs from the others, beside its backbone."""
    identities: list[Mapping[str, Any]] = [cache["identity"] for cache in run.caches]
    keys = {key for identity in identities for key in _list_blocking(identities[0], identity)}
    shown = [key for key in sorted(keys) if key not in _NOT_NAMED]
    return [
        " ".join([
            str(identity.get("backbone")), *(f"{key} {identity.get(key)}" for key in shown)
        ])
        for identity in identities
    ]  # fmt: skip


def require_same_features(
    run_identity: Mapping[str, Any], identity: Mapping[str, Any], where: Path | None = None
) -> None:
    """Insist that features were made as those the head was trained on.

    Number of views and stored dtype may differ, with a warning.

    Args:
        run_identity: The identity of the cache the run was trained on.
        identity: The identity of the features at hand.
        where: The file they are in, for the message.

    Raises:
        RunError: If backbone, weights or preprocessing differ; one line says in what.
    """
    differing = differing_keys(run_identity, identity)
    if blocking := _list_blocking(run_identity, identity):
        raise RunError(
            "features", found=describe_values(identity, blocking), where=where,
            expected="those the head was trained on, " + describe_values(run_identity, blocking),
            hint="Extract the images again with the run's backbone and options, or train on these",
        )  # fmt: skip
    if differing:
        message = (
            f"the head was trained on {describe_values(run_identity, differing)}; "
            f"these features have {describe_values(identity, differing)}"
        )
        warn_user(printable(message))


def _list_blocking(run_identity: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """Return the keys in which features differ from those that a head was trained on.

    Those that may differ, with a warning, are left out.
    """
    differing = differing_keys(run_identity, identity)
    return [key for key in differing if key not in _MAY_DIFFER]


def _require_own_cache(
    trained_on: Mapping[str, Any], cache_identity: Mapping[str, Any], where: Path
) -> None:
    """Insist that a cache a run was trained on still has the identity it had.

    Raises:
        RunError: If it was rebuilt with other settings; one line says in what they differ.
    """
    if differing_keys(trained_on, cache_identity):
        wanted, found = name_differences(trained_on, cache_identity)
        raise RunError(
            "the run's cache, rebuilt since the training", expected=wanted, found=found,
            where=where, hint="Train again on it, or name a cache like the old one with --cache",
        )  # fmt: skip
