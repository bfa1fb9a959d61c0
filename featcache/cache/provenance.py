"""Check whether rows of several caches can be in one cache, and join their provenance.

Reads: open caches. Writes: nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from featcache.cache.reading import Cache, name_differences
from featcache.data.listing import Listing
from featcache.errors import CacheError, printable, warn_user
from featcache.files import canonical_json
from featcache.precision import FLOAT16_STORAGE_ERROR, PARITY_BOUNDS

# Copied only if all caches agree: an update then continues with this engine.
_ENGINE_FACTS = ("engine", "precision", "batch_size", "num_threads", "device_type")
_OTHER_FACTS = ("device", "concurrency", "weights_source", "listing")
MAX_PARITY = 8  # number of parity errors to keep: the largest ones
_ORIGIN_FACTS = ("date", "versions", "device", "engine", "precision", "parity", "lost")


def check_alike(caches: Sequence[Cache]) -> None:
    """Refuse caches whose rows cannot be in one cache.

    Raises:
        CacheError: If identity, task, or the width or dtype of features differ; says how.
    """
    first = caches[0]

    example = f"as {first.path.as_posix()} has"

    def wrong(what: str, expected: object, cache: Cache, found: object, hint: str) -> CacheError:
        return CacheError(what, expected=expected, found=found, where=cache.path, hint=hint)

    for cache in caches:
        if cache.fingerprint != first.fingerprint:
            wanted, found = name_differences(first.identity, cache.identity)
            hint = "Extract both with the same backbone and options"
            raise wrong("cache identity", f"{wanted}, {example}", cache, found, hint)
        if cache.task != first.task:
            raise wrong(
                "cache",
                f"a {first.task} task, {example}",
                cache,
                cache.task,
                "Select from one kind",
            )
        kinds = [first, cache]
        wanted_kind, *others = {
            f"{split.features.shape[-1]} x {split.features.dtype.name}": None
            for c in kinds
            for split in c.splits.values()
        }
        if others:
            raise wrong(
                "features", f"{wanted_kind}, {example}", cache, others[0], "Extract them alike"
            )
        try:
            text = canonical_json(cache.identity).encode()
            canonical_json(cache.provenance)
        except (ValueError, RecursionError) as error:
            raise wrong("cache", "plain JSON", cache, error, "Extract it again") from error
        if text != cache.container.map("identity").item():  # NEW would have another fingerprint
            raise wrong("cache identity", "canonical JSON", cache, "other", "Extract it again")


def warn_of_precisions(caches: Sequence[Cache]) -> None:
    """Warn of caches with different precision; refuse one with a parity above its bound.

    Raises:
        CacheError: If there is one.
    """
    seen: dict[str, str] = {}
    for cache in caches:
        precision, parity = known_precision(cache), _parity(cache)
        if precision is None:
            continue
        worst = max(parity, default=0.0)
        if worst > PARITY_BOUNDS[precision]:
            raise CacheError(
                "parity of the cache",
                expected=f"at most {PARITY_BOUNDS[precision]:.0e} at {precision}",
                found=f"{worst:.1e}", where=cache.path, hint="Extract it again",
            )  # fmt: skip
        known = f"parity {worst:.1e}" if parity else "parity unknown"
        seen.setdefault(precision, f"{cache.path.as_posix()} {precision} ({known})")
    if len(seen) > 1:
        warn_user(
            printable("features were made at different precision: " + ", ".join(seen.values()))
        )


def _parity(cache: Cache) -> list[float]:
    parity = cache.provenance.get("parity") or []
    if not isinstance(parity, list) or not all(
        type(error) in {int, float} and 0 <= error < 1e9 for error in parity
    ):
        raise CacheError(
            "provenance of the cache", expected="a list of numbers as parity",
            found=f"{parity!r:.40}", where=cache.path, hint="Extract it again",
        )  # fmt: skip
    return [float(error) for error in parity]


def listing_of(cache: Cache) -> Listing:
    """Return the options that the images of a cache were listed with.

    Raises:
        ConfigError: If the cache has others than this version knows.
    """
    return Listing.from_json(cache.provenance.get("listing", {}), cache.path)


def known_precision(cache: Cache) -> str | None:
    """Return the precision of a cache; None if it is not known.

    It is unknown for features made elsewhere, and after a repair that lost the provenance.
    """
    precision = str(cache.provenance.get("precision"))
    return precision if precision in PARITY_BOUNDS and "lost" not in cache.provenance else None


def error_bound(cache: Cache) -> float:
    """Return the largest allowed relative L2 error of a row, against the eager fp32 network.

    If the precision is not known, the strictest bound is returned.

    Raises:
        CacheError: If the cache states an unknown precision.
    """
    precision = known_precision(cache)
    stated = cache.provenance.get("precision")
    if precision is None and stated is not None and "lost" not in cache.provenance:
        raise CacheError(
            "precision of the cache", expected=" or ".join(PARITY_BOUNDS), found=stated,
            where=cache.path, hint="It was not made by this version of featcache extract",
        )  # fmt: skip
    narrow = cache.identity.get("feature_dtype") == "float16"
    return PARITY_BOUNDS[precision or "fp32"] + (FLOAT16_STORAGE_ERROR if narrow else 0)


def join_provenances(caches: Sequence[Cache]) -> dict[str, Any]:
    """Return the joint provenance of several caches: common facts, and the loosest precision."""
    made = [cache.provenance for cache in caches]

    def common(keys: Sequence[str]) -> dict[str, Any]:
        return {k: made[0][k] for k in keys if all(p.get(k, made) == made[0].get(k) for p in made)}

    joined = common(_OTHER_FACTS)
    engine = common(_ENGINE_FACTS)
    if set(engine) == {key for p in made for key in p if key in _ENGINE_FACTS}:
        joined |= engine  # else rows were made by different engines or batch shapes
    else:
        joined["engine"] = ", ".join(sorted({str(p.get("engine", "unknown")) for p in made}))
        precisions = [str(p.get("precision")) for p in made]
        known = [name for name in precisions if name in PARITY_BOUNDS]
        if known:
            joined["precision"] = max(known, key=PARITY_BOUNDS.__getitem__)
    joined |= next(({"lost": p["lost"]} for p in made if "lost" in p), {})
    parity = sorted({error for cache in caches for error in _parity(cache)})[-MAX_PARITY:]
    return joined | ({"parity": parity} if parity else {})


def list_origins(caches: Sequence[Cache]) -> list[dict[str, Any]]:
    """Return facts of the caches that the rows were first extracted into, each once.

    The list is flat, or caches that are selected from each other every night would nest for ever.
    """
    origins: dict[str, dict[str, Any]] = {}
    for cache in caches:
        own = {
            "path": cache.path.as_posix(), "payload_sha256": cache.payload_sha256,
            "content_sha256": cache.content_sha256, "fingerprint": cache.fingerprint,
        }  # fmt: skip
        own |= {key: cache.provenance[key] for key in _ORIGIN_FACTS if key in cache.provenance}
        earlier = cache.provenance.get("origins")
        for origin in earlier if isinstance(earlier, list) and earlier else [own]:
            origins[canonical_json(origin)] = origin
    return list(origins.values())
