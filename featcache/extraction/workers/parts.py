"""Parts of an extraction, ``--part I/N``, for queues: each is a command of its own, on any host.

Reads and writes: ``CACHE.partial/``. The plain command merges what the parts have made, see
``plans.merge_parts``, does what is missing, and writes the cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from featcache.errors import CacheError
from featcache.extraction.engine_choice import choose_engine
from featcache.extraction.plan import Job
from featcache.extraction.reports import ExtractionSummary, summarise_part
from featcache.extraction.workers.plans import (
    Part,
    Plan,
    publish_plan,
    read_plan,
    samples_sha256,
)
from featcache.files import disk_error, make_folder
from featcache.formatting import count
from featcache.heartbeat import alive, refuse_alive, sign_of
from featcache.locking import LOCK_NAME, refuse_held, refuse_strangers


@contextlib.contextmanager
def part_held(job: Job, part: Part) -> Iterator[None]:
    """Let nobody else make a part of a cache, nor merge its parts meanwhile.

    Raises:
        CacheError: If another process does, or an extraction was begun that is not in parts.
    """
    folder, what = job.partial.folder, f"part {part} of {job.path.name}"
    make_folder(job.path.parent)
    if not (folder / LOCK_NAME).exists():
        refuse_strangers(folder, what, r"manifest\.json|shard\.[0-9]+")
    make_folder(folder)
    if (folder / "manifest.json").exists() and read_plan(folder) is None:
        raise CacheError(
            what, expected="nothing begun, or parts of it", found="an unfinished extraction in "
            "one piece", where=folder, hint="Finish it without --part, or discard it: run that "
            "command with --rebuild",
        )  # fmt: skip
    try:
        (folder / LOCK_NAME).touch()  # it says that the folder is ours
    except OSError as error:
        raise disk_error(error, folder, 0) from error
    cache, say = f"cache {job.path.name}", job.options.say
    with alive(sign_of(folder, part.number), what, say) as check:
        # Who comes later sees this sign; now whoever came before.
        refuse_held(folder, cache, needs_locks=False)
        refuse_alive({sign_of(folder, 0): cache}, say)
        job.partial.guard = check
        try:
            yield
        finally:
            job.partial.abandon()


def take_part(
    jobs: Sequence[Job], part: Part, positions: Sequence[int], device: torch.device
) -> list[Job]:
    """Agree on the plan, choose engines, and leave out the images of all other parts.

    Args:
        jobs: The caches; what is known of their images was found.
        part: Which part.
        positions: The images that are to be run for one of them.
        device: Where.

    Returns:
        The caches that this part has images to run for.

    Raises:
        CacheError: If the plan is one of another N, other images or another recipe.
    """
    unfinished = []
    for job in jobs:
        plan = read_plan(job.partial.folder)
        if plan is None:
            plan = _make_plan(job, part, positions, device)
        else:
            _adopt(job, plan, part, device)
        mine = set(part.of(plan.positions))
        for position in range(len(job.dataset.samples)):
            if position not in mine and job.ledger.wants(position):
                job.ledger.leave_out(position)
        job.num_planned = len(mine)
        if job.ledger.num_wanted:
            if job.engine is None:
                choose_engine(job, device)
            unfinished.append(job)
    return unfinished


def _make_plan(job: Job, part: Part, positions: Sequence[int], device: torch.device) -> Plan:
    """Publish the plan of a cache; return it, or that of whoever was faster."""
    wanted = tuple(p for p in positions if job.ledger.wants(p))
    choose_engine(job, device)
    assert job.partial.engine is not None
    assert job.partial.probes is not None
    plan = Plan(
        job.recipe.fingerprint, part.num_parts, samples_sha256(job.dataset.samples), wanted,
        job.partial.engine, job.partial.probes,
    )  # fmt: skip
    try:
        if publish_plan(job.partial.folder, plan):
            return plan
    except OSError as error:
        raise disk_error(error, job.partial.folder, 0) from error
    other = read_plan(job.partial.folder)
    if other is None:  # it was finished meanwhile
        raise CacheError(
            f"part {part}", expected="a plan", found="none any more", where=job.partial.folder,
            hint="Run the same command again",
        )  # fmt: skip
    job.engine = None
    job.partial.file.unlink(missing_ok=True)  # its engine is not the plan's
    job.partial.forget()  # nothing was made yet
    _adopt(job, other, part, device)
    return other


def _adopt(job: Job, plan: Plan, part: Part, device: torch.device) -> None:
    """Do as the plan says, or refuse."""
    folder = job.partial.folder

    def refuse(what: str, expected: object, found: object, hint: str) -> CacheError:
        return CacheError(what, expected=expected, found=found, where=folder, hint=hint)

    if plan.num_parts != part.num_parts:
        raise refuse(
            f"--part {part}", f"parts of {plan.num_parts}, with which it was begun",
            f"parts of {part.num_parts}", f"Use I/{plan.num_parts}, or finish it without "
            "--part, or remove this folder to begin anew",
        )  # fmt: skip
    if plan.fingerprint != job.recipe.fingerprint:
        raise refuse(
            "unfinished extraction in parts", f"fingerprint {job.recipe.fingerprint[:16]}...",
            f"{plan.fingerprint[:16]}..., made with other settings",
            "Repeat the command it was begun with",
        )  # fmt: skip
    if plan.samples_sha256 != samples_sha256(job.dataset.samples):
        raise refuse(
            "data", "the images that the parts were planned for", "other names, sizes or times",
            "Run the command without --part: it merges the parts and does the rest",
        )  # fmt: skip
    if job.partial.engine is None or job.partial.is_worthless:  # died before it saw the plan
        job.partial.engine, job.partial.probes = plan.engine, plan.probes
    elif job.partial.engine != plan.engine:
        raise refuse(f"part {part}", plan.engine, job.partial.engine, "Remove its manifest")
    job.check_unfinished(device)


def finish_part(job: Job, part: Part, start: float) -> ExtractionSummary:
    """Note that a part is done, with the images that failed in it."""
    if job.partial.engine is not None:
        job.partial.facts_of_part = {
            "number": part.number, "of": part.num_parts, "is_done": True,
            "failures": [
                [f.path, f.image_bytes, f.mtime_ns, f.reason] for f in job.ledger.failures
            ],
        }  # fmt: skip
        job.partial.note_end(job.provenance)
    summary = summarise_part(job, str(part), start)
    job.options.say(
        f"{job.path.name}: part {part} is done: {count(summary.num_images, 'image')} "
        f"({summary.num_new:,} new, {summary.num_failed:,} failed). When all parts are, the same "
        "command without --part writes the cache."
    )
    return summary
