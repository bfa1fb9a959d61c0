"""Choose what runs the network, so that new rows are made as those that are there were.

And say in the provenance how all of them were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from featcache.backbones.backbone import state_sha256
from featcache.backbones.engine import Engine, build_engine, eager_features
from featcache.cache.precisions import MAX_PARITY, read_parities, with_parities, with_spread
from featcache.cache.workers import read_workers, told_workers
from featcache.errors import BackboneError, CacheError, warn_user
from featcache.extraction.manifest import EngineFacts, ProbeFacts
from featcache.extraction.plan import Job, Probes, Work
from featcache.extraction.recipe import decode_probes
from featcache.formatting import count
from featcache.precision import PARITY_BOUNDS
from featcache.runtime import environment_facts

AS_BEFORE = "as for the rows that are there"
"""Why an engine is taken that others were made with."""

# What ``select``, ``verify --repair`` and ``convert`` said of the rows holds also after an update.
_KEPT_FACTS = ("selected_from", "origins", "lost", "converted_from", "identity")


def facts_as_before(job: Job, device: torch.device) -> EngineFacts | None:
    """Return how the rows that are there were made, None where that does not bind new ones."""
    values: dict[str, Any] = {f.name: job.provenance.get(f.name) for f in fields(EngineFacts)}
    told = EngineFacts(**values)
    made = told if told.is_possible else None
    here = (device.type, job.options.precision)
    is_alike = made is not None and (made.device_type, made.precision) == here
    return job.partial.engine or (made if is_alike else None)


def choose_engine(job: Job, device: torch.device) -> None:
    """Build the engine of a job; the choices of the rows that are there already stand.

    Raises:
        CacheError: If those were made by batches that do not fit the memory here.
    """
    options, dataset, recipe = job.options, job.dataset, job.recipe
    name, batch_size = options.engine, options.batch_size
    fixed, as_before = job.partial.engine, facts_as_before(job, device)
    if as_before:
        name, batch_size = as_before.engine, as_before.batch_size
        torch.set_num_threads(as_before.num_threads)
    with job.partial.probing():
        probes = decode_probes(
            dataset, dataset.samples, recipe.rules, isolate=job.partial.was_killed
        )
    reference = None
    if job.partial.probes:  # of whoever began it, perhaps on another machine
        reference = job.partial.probes.features_of(probes, recipe.backbone.num_features)
    if reference is None:
        reference = eager_features(recipe.backbone, probes)
    job.probes = Probes(tuple(probes), reference)
    # Chosen by the number of images, not of views: view 0 equals a cache without views.
    engine = build_engine(
        recipe.backbone, device, probes, precision=options.precision, batch_size=batch_size,
        name=name, num_images=len(dataset.samples), feature_dtype=recipe.feature_dtype,
        reference=reference,
    )  # fmt: skip
    if as_before and engine.batch_size == as_before.batch_size:
        engine = replace(engine, reason=AS_BEFORE)
    if fixed and engine.batch_size != fixed.batch_size:
        raise CacheError(
            "unfinished extraction", expected=f"memory for batches of {fixed.batch_size}",
            found=f"{engine.batch_size} at most", where=job.partial.folder,
            hint="Finish it on the device it was begun on, or pass --rebuild",
        )  # fmt: skip
    job.engine = engine
    check_frozen(job)
    _note_engine(job, engine)


def _note_engine(job: Job, engine: Engine) -> None:
    """Say which engine it is, and note it for resuming and for provenance."""
    against = "no readable image to check it with"
    if engine.parity:
        worst, images = max(engine.parity), count(len(engine.parity), "image")
        stored = " in float16" if job.recipe.feature_dtype == "float16" else ""
        against = f"within {worst:.1e} of the eager fp32 network on {images}{stored}"
    backbone, old = job.recipe.backbone, job.old
    parities = {} if old is None else read_parities(old)
    parity = [] if old is None else old.parity
    job.options.say(
        f"Engine: {backbone.name} by {engine.name} {engine.precision} on {engine.device} "
        f"({engine.reason}), {engine.concurrency} x {engine.batch_size} images at once, {against}."
    )
    warn_of_update(job.path.name, job.provenance, parity, engine)
    began = read_workers(job.partial.provenance)
    job.provenance = extend_provenance(job.provenance, parities, engine, backbone.weights_source)
    if began:
        job.provenance |= told_workers(began, job.provenance["device"])
    facts = EngineFacts(
        engine.name, engine.precision, engine.batch_size, torch.get_num_threads(),
        engine.device.type,
    )  # fmt: skip
    assert job.probes is not None
    job.partial.start(facts, job.provenance, ProbeFacts.of(job.probes.images, job.probes.features))


def check_threads(jobs: Sequence[Job]) -> None:
    """Refuse to resume caches together that were begun with other numbers of torch's threads.

    Raises:
        CacheError: If there are such.
    """
    for job in jobs:
        fixed = job.partial.engine
        if fixed and fixed.num_threads != torch.get_num_threads():
            is_one = isinstance(job.options.image_size, int | str)
            side = "" if is_one else f" --image-size {job.recipe.rules.image_size}"
            raise CacheError(
                "unfinished extraction",
                expected=f"{fixed.num_threads} torch threads, with which it was begun",
                found=f"{torch.get_num_threads()}, with which another backbone's rows were made",
                where=job.path,
                hint=f"Finish it by itself: featcache extract DATA {job.path.as_posix()} "
                f"--backbone {job.recipe.backbone.name}{side}",
            )  # fmt: skip


def check_frozen(job: Work) -> None:
    """Check that the backbone, and the copy of it that runs, are what they were.

    Raises:
        BackboneError: If not; the rows that it made are dropped.
    """
    assert job.engine is not None
    backbone = job.recipe.backbone
    if state_sha256(backbone.network) != backbone.weights_sha256 or not job.engine.is_frozen():
        raise drop_rows(job)


def drop_rows(job: Work) -> BackboneError:
    """Drop the rows of a network that is not frozen; return what to raise."""
    job.partial.clear()
    backbone = job.recipe.backbone
    return BackboneError(
        "frozen backbone", expected=f"state {backbone.weights_sha256[:16]}...",
        found="another one after a forward pass", where=backbone.name,
        hint="Its forward pass changes its own state: make it stateless in eval mode",
    )  # fmt: skip


def warn_of_update(
    name: str, provenance: Mapping[str, Any], parity: Sequence[float], engine: Engine
) -> None:
    """Warn where an engine adds rows to those of another precision, or of one that is lost.

    Another precision is no other identity, but whoever mixes them should know.

    Args:
        name: Of the cache.
        provenance: Of the rows that are there.
        parity: Of the engine that made them.
        engine: What makes the new ones.
    """
    made = provenance.get("precision", engine.precision)
    if "lost" in provenance:
        old = "nobody knows how its rows were made, since its provenance was damaged"
        new = engine.precision
    elif made != engine.precision:
        pairs = ((made, parity), (engine.precision, engine.parity))
        old, new = (f"{p} (within {max(e, default=0):.1e})" for p, e in pairs)
        old = f"its rows were made at {old} of the eager fp32 network"
    else:
        return
    warn_user(f"{name}: {old}, new ones will be at {new}")


def extend_provenance(
    provenance: Mapping[str, Any], parities: Mapping[str, Mapping[str, Any]], engine: Engine,
    weights_source: str,
) -> dict[str, Any]:  # fmt: skip
    """Return the provenance of old and new rows together.

    It names every precision; when the cache is written, it is known which rows are left.

    Args:
        provenance: Of the rows that are there.
        parities: Of them: see ``read_parities``.
        engine: What makes the new ones.
        weights_source: Where the backbone's weights came from.
    """
    told = {engine.precision, *str(provenance.get("precision")).split(", ")}
    old = parities.get(engine.precision, {"errors": [], "num_probed": 0})
    # of older engines the worst: an update a night would else add to it for ever
    errors = [*sorted(old["errors"])[-MAX_PARITY:], *engine.parity]
    measured = {"errors": errors, "num_probed": old["num_probed"] + len(engine.parity)}
    measured = with_spread(engine.precision, measured, old.get("spread"), engine.spread)
    facts = {
        **{key: provenance[key] for key in _KEPT_FACTS if key in provenance},
        **environment_facts(engine.device), "device_type": engine.device.type,
        "weights_source": weights_source, "engine": engine.name,
        "engine_reason": engine.reason, "concurrency": engine.concurrency,
        "precision": ", ".join(sorted(told & PARITY_BOUNDS.keys())),
        "batch_size": engine.batch_size,
    }  # fmt: skip
    return with_parities(facts, {**parities, engine.precision: measured})
