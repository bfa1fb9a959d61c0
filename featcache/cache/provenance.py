"""Check whether rows of several caches can be in one cache, and join their provenance.

Reads: open caches. Writes: nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from featcache.cache.identity import name_differences
from featcache.cache.precisions import join_parities, with_parities
from featcache.cache.reading import Cache
from featcache.data.listing import Listing
from featcache.errors import CacheError, printable, warn_user
from featcache.files import canonical_json

# Copied only if all caches agree: an update then continues with this engine.
_ENGINE_FACTS = ("engine", "precision", "batch_size", "num_threads", "device_type")
_OTHER_FACTS = (
    "device", "concurrency", "weights_source", "listing", "group_salt", "path_names"
)  # fmt: skip
_ORIGIN_FACTS = (
    "date", "versions", "device", "engine", "precision", "parity", "parity_spread", "parity_bound",
    "lost",
)  # fmt: skip


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
            f"{split.shape[-1]} x {split.dtype.name}": None
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
        if text != cache.container.read("identity").item():  # NEW would have another fingerprint
            raise wrong("cache identity", "canonical JSON", cache, "other", "Extract it again")


def warn_of_salts(caches: Sequence[Cache]) -> None:
    """Warn where the patients of caches were hashed with different salts: nobody can join them."""
    salts: dict[str, Cache] = {}
    for cache in caches:
        salts.setdefault(str(cache.provenance.get("group_salt")), cache)
    salts.pop("None", None)
    if len(salts) > 1:
        names = " and ".join(printable(cache.path.name) for cache in salts.values())
        warn_user(
            f"{names} hashed their patients with different salts: one who is in both has two "
            "groups. Extract all with one --group-salt"
        )


def listing_of(cache: Cache) -> Listing:
    """Return the options that the images of a cache were listed with.

    Raises:
        ConfigError: If the cache has others than this version knows.
    """
    return Listing.from_json(cache.provenance.get("listing", {}), cache.path)


def training_data_note(backbone: str) -> str | None:
    """Return a warning about the images that a backbone was trained on, None if it needs none."""
    if not backbone.startswith("xrv:"):
        return None
    of_ending = {"nih": "NIH", "pc": "PadChest", "chex": "CheXpert", "rsna": "RSNA",
                 "mimic_nb": "MIMIC-CXR", "mimic_ch": "MIMIC-CXR"}  # fmt: skip
    every = "NIH, PadChest, CheXpert, MIMIC-CXR, Google, OpenI and RSNA"
    sets = of_ending.get(backbone.rpartition("-")[2], every)
    return f"{backbone} was trained on images of {sets}: figures on such images are too good"


def join_provenances(caches: Sequence[Cache]) -> dict[str, Any]:
    """Return the joint provenance of several caches, apart from the precision of their rows."""
    made = [cache.provenance for cache in caches]

    def common(keys: Sequence[str]) -> dict[str, Any]:
        return {k: made[0][k] for k in keys if all(p.get(k, made) == made[0].get(k) for p in made)}

    joined = common(_OTHER_FACTS)
    engine = common(_ENGINE_FACTS)
    if set(engine) == {key for p in made for key in p if key in _ENGINE_FACTS}:
        joined |= engine  # else rows were made by different engines or batch shapes
    else:
        joined["engine"] = ", ".join(sorted({str(p.get("engine", "unknown")) for p in made}))
    for key in ("lost", "identity"):  # that a converted file stated its identity, of any of them
        joined |= next(({key: p[key]} for p in made if key in p), {})
    return with_parities(joined, join_parities(caches))


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
