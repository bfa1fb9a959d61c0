"""The manifest of a cache in the making: which shards count, and how they have to be made.

Reads and writes: ``CACHE.partial/{manifest.json, part.I.json}``.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import CacheError
from featcache.files import canonical_json, json_sha256, read_regular, write_bytes
from featcache.untrusted import parse_json_object, reading_hint

_MAX_MANIFEST_BYTES = 1 << 28  # 150 bytes a shard of 16 MiB: features of 30 TB
_MAX_COUNT = 1 << 48  # of rows and vectors
_MAX_SHARDS = 10**9  # their numbers have nine digits at most
_FORMAT = "featcache-partial"
_FORMAT_VERSION = 2  # 1 kept the tables in the manifest, which then grew with the data set


@dataclass(frozen=True)
class EngineFacts:
    """What must not change between the shards of one cache."""

    engine: str
    precision: str
    batch_size: int
    num_threads: int
    device_type: str

    @property
    def is_possible(self) -> bool:
        """Whether the values, which come from files, are of the right kinds and in their ranges."""
        texts = (self.engine, self.precision, self.device_type)
        counts = ((self.batch_size, 1 << 16), (self.num_threads, 1 << 12))
        return all(isinstance(text, str) for text in texts) and all(
            type(count) is int and 1 <= count <= most for count, most in counts
        )


@dataclass(frozen=True)
class ProbeFacts:
    """What the library's own fp32 network makes of the probed images: every engine is within it.

    Attributes:
        pixels_sha256: Of each image as it was decoded, 64 hex digits.
        features: Of each, (D,) float32, one after the other in base64.
    """

    pixels_sha256: tuple[str, ...]
    features: str

    @classmethod
    def of(
        cls, probes: Sequence[npt.NDArray[np.uint8]], features: npt.NDArray[np.float32]
    ) -> ProbeFacts:  # fmt: skip
        """Note features (n, D) of n decoded images."""
        data = np.ascontiguousarray(features, "<f4").tobytes()
        return cls(tuple(map(_pixels_sha256, probes)), base64.b64encode(data).decode("ascii"))

    @classmethod
    def from_json(cls, value: Any) -> ProbeFacts | None:
        """Read what ``asdict`` made of one; None where a manifest has none.

        Raises:
            ValueError: If it is something else.
        """
        if value is None:
            return None
        if not (isinstance(value, dict) and value.keys() == {"pixels_sha256", "features"}):
            raise ValueError(f"probes of {value!r:.80}")
        hashes, features = value["pixels_sha256"], value["features"]
        if not isinstance(hashes, list) or not all(isinstance(h, str) for h in [*hashes, features]):
            raise ValueError(f"probes of {hashes!r:.80}")
        base64.b64decode(features.encode(), validate=True)
        return cls(tuple(hashes), features)

    def features_of(
        self, probes: Sequence[npt.NDArray[np.uint8]], num_features: int
    ) -> npt.NDArray[np.float32] | None:
        """Return the features (n, D), None where these are other images."""
        data = base64.b64decode(self.features)
        is_same = self.pixels_sha256 == tuple(map(_pixels_sha256, probes))
        if not probes or not is_same or len(data) != 4 * num_features * len(probes):
            return None
        features = np.frombuffer(data, "<f4").reshape(len(probes), num_features)
        return features.astype(np.float32) if np.isfinite(features).all() else None


def _pixels_sha256(pixels: npt.NDArray[np.uint8]) -> str:
    head = canonical_json(list(pixels.shape)).encode()
    return hashlib.sha256(head + np.ascontiguousarray(pixels).tobytes()).hexdigest()


@dataclass(frozen=True)
class Receipt:
    """A shard that was written: its line in the manifest.

    Attributes:
        file: Its name.
        num_rows: Images in its table.
        num_vectors: M, vectors of all of them together.
        sha256: Of the file, 64 hex digits.
    """

    file: str
    num_rows: int
    num_vectors: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says.

    Attributes:
        fingerprint: Of the recipe.
        engine: What must not change between the shards.
        provenance: How the rows were made.
        running: Whether the run did not end by itself.
        shards: The shards that count.
        probes: What the library's own network makes of some images; None in older manifests.
        num_reserved: Numbers of shards below it may have been given to workers.
        facts_of_part: Of the manifest of a part, as it stands there.
    """

    fingerprint: str
    engine: EngineFacts
    provenance: dict[str, Any]
    running: bool
    shards: tuple[Receipt, ...]
    probes: ProbeFacts | None = None
    num_reserved: int = 0
    facts_of_part: dict[str, Any] = field(default_factory=dict)


def open_manifest(file: Path) -> Manifest:
    """Read and check the manifest of an unfinished extraction.

    Raises:
        CacheError: If it cannot be read, or is not what ``PartialCache`` writes.
    """
    try:
        return read_manifest(file)
    except (OSError, ValueError) as error:
        hint = "Start afresh with --rebuild"
        if isinstance(error, OSError):  # of the disk: it may pass
            hint = reading_hint(error, hint)
        raise CacheError(
            "unfinished extraction", expected="a readable manifest",
            found=getattr(error, "strerror", None) or error, where=file, hint=hint,
        ) from error  # fmt: skip


def read_manifest(file: Path) -> Manifest:
    """Read and check the manifest of an unfinished extraction.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is not what ``PartialCache`` writes; says in a few words why.
    """
    facts = parse_json_object(read_regular(file, max_bytes=_MAX_MANIFEST_BYTES))
    if facts.get("sha256") != json_sha256(facts, without="sha256"):
        raise ValueError("one whose sha256 is another")
    version = facts.get("format_version")
    if facts.get("format") != _FORMAT or version != _FORMAT_VERSION:
        raise ValueError(f"format version {version!r:.20}")
    try:
        engine, provenance = EngineFacts(**facts["engine"]), facts["provenance"]
        if not isinstance(facts["fingerprint"], str) or not isinstance(provenance, dict):
            raise ValueError("one of another fingerprint or provenance")
        if not engine.is_possible:
            raise ValueError(f"an engine of {facts['engine']!r:.80}")
        shards = tuple(_read_receipt(line) for line in facts["shards"])
        probes, num_reserved = (
            ProbeFacts.from_json(facts.get("probes")),
            facts.get("num_reserved", 0),
        )
        if type(num_reserved) is not int or not 0 <= num_reserved < _MAX_SHARDS:
            raise ValueError(f"{num_reserved!r:.20} reserved shards")
        facts_of_part = facts.get("part", {})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"one without {error}") from error
    return Manifest(
        facts["fingerprint"], engine, provenance, bool(facts.get("running")), shards, probes,
        num_reserved, facts_of_part if isinstance(facts_of_part, dict) else {},
    )  # fmt: skip


def write_manifest(file: Path, manifest: Manifest) -> None:
    """Write a manifest, whole or not at all, with a sha256 of its own.

    Raises:
        CacheError: If the disk is full.
        OSError: If it cannot be written.
    """
    facts = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "fingerprint": manifest.fingerprint,
        "engine": asdict(manifest.engine),
        "provenance": manifest.provenance,
        "running": manifest.running,
        "shards": [asdict(receipt) for receipt in manifest.shards],
        **({"probes": asdict(manifest.probes)} if manifest.probes else {}),
        **({"num_reserved": manifest.num_reserved} if manifest.num_reserved else {}),
        **({"part": manifest.facts_of_part} if manifest.facts_of_part else {}),
    }
    signed = facts | {"sha256": json_sha256(facts, without="sha256")}
    write_bytes(file, canonical_json(signed).encode())


def _read_receipt(line: Any) -> Receipt:
    """Return a line of the manifest if it names a file of this folder and its sizes."""
    receipt = Receipt(**line)
    name, sha256 = receipt.file, receipt.sha256
    # A number of more digits is none that ``next_shard`` came to.
    if not re.fullmatch(r"shard\.[0-9]{5,9}", str(name)) or not isinstance(sha256, str):
        raise ValueError(f"a shard {name!r:.80}")
    sizes = (receipt.num_rows, receipt.num_vectors)
    if any(type(n) is not int or not 0 <= n <= _MAX_COUNT for n in sizes):
        raise ValueError(f"sizes of {name}")
    return receipt


def part_manifest(part: int) -> str:
    """Return the name of the manifest of a part."""
    return f"part.{part}.json"
