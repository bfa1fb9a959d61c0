"""An extraction in parts: the plan that all parts share, and who is at work on which.

Parts run on hosts that may have no lock in common, so nothing here depends on one: the plan is
published once, by whoever comes first, and who works shows a sign of life (module ``heartbeat``).

Reads and writes: ``CACHE.partial/{plan.json, part.I.json, alive.0}``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featcache.cache.workers import read_workers, told_workers
from featcache.data.dataset import Sample
from featcache.errors import CacheError, ConfigError
from featcache.extraction.manifest import (
    EngineFacts,
    Manifest,
    ProbeFacts,
    open_manifest,
    part_manifest,
)
from featcache.extraction.partial_cache import PLAN_NAME, PartialCache
from featcache.files import canonical_json, json_sha256, read_regular, write_temporary
from featcache.formatting import count
from featcache.heartbeat import alive, refuse_alive, sign_of, signs_in
from featcache.locking import refuse_held
from featcache.runtime import Say
from featcache.untrusted import parse_json_object

PATIENCE_SECONDS = 5.0
"""It may take so long until a plan that is being written is whole."""
_MOST_PARTS = 999  # each has a million numbers of shards, which have nine digits
_MAX_PLAN_BYTES = 1 << 28
_MOST_POSITIONS = 1 << 28
_FORMAT = "featcache-plan"
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Part:
    """Which part of an extraction: ``2/4``.

    Attributes:
        number: From 1.
        num_parts: Of how many.
    """

    number: int
    num_parts: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read ``I/N``.

        Raises:
            ConfigError: If it is no such text, or there is no such part.
        """
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        number, num_parts = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= num_parts <= _MOST_PARTS:
            raise ConfigError(
                "--part", expected=f"I/N: 1/N to N/N, N at most {_MOST_PARTS}", found=text,
                hint="Parts are counted from 1: --part 1/4, --part 2/4, --part 3/4, --part 4/4",
            )  # fmt: skip
        return cls(number, num_parts)

    def __str__(self) -> str:
        return f"{self.number}/{self.num_parts}"

    def of(self, positions: Sequence[int]) -> Sequence[int]:
        """Return this part of all positions: neighbours, which are neighbours in their files."""
        ends = [len(positions) * n // self.num_parts for n in (self.number - 1, self.number)]
        return positions[ends[0] : ends[1]]


@dataclass(frozen=True)
class Plan:
    """What all parts of an extraction have in common.

    Attributes:
        fingerprint: Of the recipe.
        num_parts: N.
        samples_sha256: Of the images: their paths, sizes and times.
        positions: Of the images to be run, in the order in which they are read fastest.
        engine: What runs the network in all parts.
        probes: What it is checked on.
    """

    fingerprint: str
    num_parts: int
    samples_sha256: str
    positions: tuple[int, ...]
    engine: EngineFacts
    probes: ProbeFacts


def samples_sha256(samples: Sequence[Sample]) -> str:
    """Return a sha256 that tells images of other names, sizes, times, splits or classes apart."""
    digest = hashlib.sha256()
    for s in samples:
        facts = [s.path, s.image_bytes, s.mtime_ns, s.split, s.target]
        digest.update(canonical_json(facts).encode())
    return digest.hexdigest()


def publish_plan(folder: Path, plan: Plan) -> bool:
    """Write the plan unless there is one; return whether it is this one that counts now.

    Raises:
        OSError: If it cannot be written.
    """
    ranges = list[list[int]]()  # of positions, which are mostly all: [start, end)
    for position in plan.positions:
        if ranges and ranges[-1][1] == position:
            ranges[-1][1] += 1
        else:
            ranges.append([position, position + 1])
    facts: dict[str, Any] = {
        "format": _FORMAT, "format_version": _FORMAT_VERSION, "fingerprint": plan.fingerprint,
        "num_parts": plan.num_parts, "samples_sha256": plan.samples_sha256, "positions": ranges,
        "engine": asdict(plan.engine), "probes": asdict(plan.probes),
    }  # fmt: skip
    signed = facts | {"sha256": json_sha256(facts, without="sha256")}
    return _publish_once(folder / PLAN_NAME, canonical_json(signed).encode())


def _publish_once(path: Path, data: bytes) -> bool:
    """Write a file whole under its name, unless something has that name."""
    temporary = write_temporary(path, data)
    try:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # no hard links: readers try again while the file is not whole
            try:
                with path.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            except FileExistsError:
                return False
        return True
    finally:
        temporary.unlink(missing_ok=True)


def read_plan(folder: Path, *, patience: float | None = None) -> Plan | None:
    """Read the plan of an extraction in parts; None if there is none.

    Args:
        folder: ``CACHE.partial``.
        patience: So many seconds it may take until the one that another process writes is whole.
            Default: ``PATIENCE_SECONDS``.

    Raises:
        CacheError: If it cannot be read.
    """
    deadline = time.monotonic() + (PATIENCE_SECONDS if patience is None else patience)
    while True:
        try:
            return _parse_plan(read_regular(folder / PLAN_NAME, max_bytes=_MAX_PLAN_BYTES))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            if time.monotonic() > deadline:
                raise CacheError(
                    "unfinished extraction in parts", expected="a readable plan",
                    found=getattr(error, "strerror", None) or error, where=folder / PLAN_NAME,
                    hint="Start afresh with --rebuild",
                ) from error  # fmt: skip
        time.sleep(0.1)


def _parse_plan(data: bytes) -> Plan:
    facts = parse_json_object(data)
    if facts.get("sha256") != json_sha256(facts, without="sha256"):
        raise ValueError("one whose sha256 is another")
    if (facts.get("format"), facts.get("format_version")) != (_FORMAT, _FORMAT_VERSION):
        raise ValueError(f"format version {facts.get('format_version')!r:.20}")
    engine, probes = EngineFacts(**facts["engine"]), ProbeFacts.from_json(facts["probes"])
    num_parts = facts["num_parts"]
    if not engine.is_possible or probes is None:
        raise ValueError(f"an engine of {facts['engine']!r:.80}")
    if type(num_parts) is not int or not 1 <= num_parts <= _MOST_PARTS:
        raise ValueError(f"{num_parts!r:.20} parts")
    positions = list[int]()
    for first, last in facts["positions"]:
        if type(first) is not int or type(last) is not int or not 0 <= first < last < 1 << 31:
            raise ValueError(f"positions of {first!r:.20}")
        if len(positions) + last - first > _MOST_POSITIONS:
            raise ValueError(f"more than {_MOST_POSITIONS:,} positions")
        positions += range(first, last)
    if len(set(positions)) < len(positions):
        raise ValueError("a position twice")
    return Plan(
        str(facts["fingerprint"]), num_parts, str(facts["samples_sha256"]), tuple(positions),
        engine, probes,
    )  # fmt: skip


def read_parts(folder: Path, plan: Plan) -> dict[int, Manifest]:
    """Return the manifests of the parts that were begun, by number.

    Raises:
        CacheError: If one cannot be read, or is of another recipe.
    """
    found = {}
    for number in range(1, plan.num_parts + 1):
        file = folder / part_manifest(number)
        if not file.exists():
            continue
        manifest = open_manifest(file)
        is_other = manifest.fingerprint != plan.fingerprint or manifest.engine != plan.engine
        if is_other and not manifest.shards:
            continue  # of a part that died before it saw the plan
        if is_other:
            raise CacheError(
                f"part {number}/{plan.num_parts}", expected="what the plan has", where=file,
                found="another recipe or engine", hint="Remove this file: the part is made again",
            )  # fmt: skip
        found[number] = manifest
    return found


def failures_of(manifest: Manifest) -> Mapping[str, tuple[int, int, str]]:
    """Return the images that failed in a part: path -> size, time, reason."""
    listed = manifest.facts_of_part.get("failures")
    kinds = (str, int, int, str)
    return {
        line[0]: (line[1], line[2], line[3])
        for line in (listed if isinstance(listed, list) else [])
        if isinstance(line, list) and tuple(map(type, line)) == kinds
    }


@contextlib.contextmanager
def merging_held(partial: PartialCache, name: str, say: Say) -> Iterator[None]:
    """Let nobody else merge the parts of a cache or make one; no lock is needed.

    Args:
        partial: The cache in the making.
        name: Of the cache.
        say: Called if it takes a while to tell whether a part is being made.

    Raises:
        CacheError: If another process does.
    """
    folder = partial.folder
    own = sign_of(folder, 0)
    with alive(own, f"cache {name}", say) as check:
        # Who comes later sees this sign; now whoever came before.
        refuse_held(folder, f"cache {name}", needs_locks=False)
        others = signs_in(folder, name)
        refuse_alive({path: what for path, what in others.items() if path != own}, say)
        partial.guard = check
        yield


def merge_parts(
    partial: PartialCache, fingerprint: str, name: str, say: Say
) -> tuple[Manifest, ...]:
    """Take over what parts have made of a cache; say what is missing, which is done next.

    Args:
        partial: The cache in the making, opened.
        fingerprint: Of its recipe.
        name: Of the cache.
        say: Called with lines about the parts.

    Returns:
        The manifests of the parts that were begun.

    Raises:
        CacheError: If the parts are of another recipe.
    """
    folder = partial.folder
    plan = read_plan(folder)
    if plan is None:
        return ()
    if plan.fingerprint != fingerprint:
        raise CacheError(
            "unfinished extraction in parts", where=folder,
            expected=f"fingerprint {fingerprint[:16]}...",
            found=f"{plan.fingerprint[:16]}..., made with other settings",
            hint="Repeat the command it was begun with, or discard it with --rebuild",
        )  # fmt: skip
    parts = read_parts(folder, plan)
    partial.is_in_parts = True
    if partial.engine is None:
        partial.engine, partial.probes = plan.engine, plan.probes
        partial.provenance = _join_provenance([*parts.values()])
    rows = [partial.take_over(manifest) for manifest in parts.values()]
    say(f"Parts of {name}: {len(parts)} of {plan.num_parts}, {count(sum(rows), 'image')}.")
    for number in range(1, plan.num_parts + 1):
        if number not in parts:
            say(f"Part {number}/{plan.num_parts} was never begun: it is done here.")
        elif not parts[number].facts_of_part.get("is_done"):
            say(f"Part {number}/{plan.num_parts} is not finished: the rest of it is done here.")
    return tuple(parts.values())


def _join_provenance(parts: Sequence[Manifest]) -> dict[str, Any]:
    """Return the provenance of the first part, with the receipts and devices of all."""
    if not parts:
        return {}
    lines, devices = list[dict[str, Any]](), set[str]()
    for part in parts:
        of_part = read_workers(part.provenance)
        lines += of_part
        devices |= set() if of_part else {str(part.provenance.get("device"))}  # it was killed
    return parts[0].provenance | told_workers(lines, *devices)
