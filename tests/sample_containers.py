"""Containers and their user blocks to write, edit and damage."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featcache.cache.container import (
    MAX_USER_BLOCK_BYTES,
    Container,
)
from featcache.cache.hdf5 import ArraySource, write_container
from featcache.errors import CacheError
from featcache.files import canonical_json

FINGERPRINT = "0123456789abcdef" * 4

KEYS = {
    "format", "format_version", "user_block_bytes", "payload_bytes", "payload_sha256",
    "content_sha256", "fingerprint", "arrays",
}  # fmt: skip


def some_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "identity": np.array(b'{"a":1}'),
        "splits/train/features": rng.normal(size=(40, 16)).astype("<f4"),
        "splits/train/views": rng.normal(size=(5, 3, 7)).astype("<f2"),
        "splits/train/targets": rng.integers(-1, 2, 40).astype("<i8"),
        "splits/train/paths": np.array([b"a", b"bc", b"d\xff/e" * 3], "S15"),
        "splits/train/sha": rng.integers(0, 256, (7, 32)).astype("|u1"),
        "splits/none/features": np.empty((0, 16), "<f4"),
        "splits/none/paths": np.empty(0, "S1"),
        "number": np.array(-5, "<i8"),
    }


def write(path: Path, arrays: dict[str, np.ndarray]) -> Container:
    sources = [ArraySource.of(name, array) for name, array in arrays.items()]
    return write_container(path, sources, FINGERPRINT, ["splits/train/features"])


def read_block(path: Path) -> dict[str, Any]:
    block = json.loads(path.read_bytes()[:MAX_USER_BLOCK_BYTES].split(b"\0")[0])
    assert isinstance(block, dict)
    return block


def edit_block(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the user block and sign it again, as somebody would who wants to deceive."""
    raw, block = path.read_bytes(), read_block(path)
    change(block)
    return write_block(path, block, raw[block_size(raw) :])


def block_size(raw: bytes) -> int:
    return raw.index(b"\x89HDF")


def write_block(path: Path, block: dict[str, Any], payload: bytes) -> Path:
    if "user_block_sha256" in block:
        rest = {key: value for key, value in block.items() if key != "user_block_sha256"}
        with contextlib.suppress(ValueError):
            block["user_block_sha256"] = hashlib.sha256(canonical_json(rest).encode()).hexdigest()
    text = json.dumps(block, sort_keys=True, separators=(",", ":")).encode()
    path.write_bytes(text.ljust(4096, b"\0") + payload)
    return path


def entry_of(block: dict[str, Any], name: str) -> dict[str, Any]:
    return next(e for e in block["arrays"] if e["name"] == name)


def facts(container: Container) -> tuple[Any, ...]:
    return (
        container.fingerprint, container.payload_sha256, container.content_sha256,
        container.user_block_bytes, container.payload_bytes, dict(container.arrays),
    )  # fmt: skip


def same(one: np.ndarray, two: np.ndarray) -> bool:
    return one.shape == two.shape and one.dtype == two.dtype and one.tobytes() == two.tobytes()


HOSTILE: list[Any] = [
    -1, 0, 1, 7, True, False, None, 1.0, 24.0, 1e300, float("nan"), float("inf"), 2**31, 2**47,
    2**48, 2**63, 2**64, -(2**63), 10**4000, "", "x", "4096", "../x", "a//b", "A", "é", "\0", "<f4",
    "<i8", "|S1", "|u1", "|S9999999", "|S0", "<f8", "|O", "<f4,<f4", "S4", [], [1], [0], [-1],
    [True], [6.0], ["6"], [None], [1] * 4, [2**47], [2**47, 2], [2**48, 0], [0, 2**47], [2**47, 0],
    [0, 2**47, 2**47], [2**47, 0, 2**47], [2**47] * 3, {}, {"a": 1}, [[1]], [[[[]]]], [{}],
]  # fmt: skip


def hostile_changes(block: dict[str, Any]) -> list[dict[str, Any]]:
    """Return user blocks with one hostile value each, or one field missing."""
    made = []

    def variant(change: Callable[[dict[str, Any]], object]) -> None:
        made.append(copy.deepcopy(block))
        change(made[-1])

    for value in HOSTILE:
        for key in block:
            variant(lambda b, k=key, v=value: b.update({k: v}))
        for i, entry in enumerate(block["arrays"]):
            variant(lambda b, i=i, v=value: b["arrays"].__setitem__(i, v))
            for key in entry:
                variant(lambda b, i=i, k=key, v=value: b["arrays"][i].update({k: v}))
    for key in block:
        variant(lambda b, k=key: b.pop(k))
    for i, entry in enumerate(block["arrays"]):
        variant(lambda b, i=i: b["arrays"].pop(i))
        for key in entry:
            variant(lambda b, i=i, k=key: b["arrays"][i].pop(k))
    return made


def refused_or_read(path: Path, use: Callable[[Path], object], blocks: Sequence[Any]) -> int:
    """Use the file under every block; anything but success or CacheError escapes."""
    raw, refused = path.read_bytes(), 0
    payload = raw[block_size(raw) :]
    for block in blocks:
        write_block(path, copy.deepcopy(block), payload)
        try:
            use(path)
        except CacheError as error:
            refused += len(str(error).splitlines()) == 1
        except BaseException as error:
            error.add_note(json.dumps(block)[:3000])
            raise
    return refused


def container_of(path: Path, **change: np.ndarray | None) -> Path:
    """Write a container with right hashes whose data sets are those of a cache but for some."""
    arrays: dict[str, np.ndarray | None] = {
        "identity": np.array(b'{"a":1}'), "provenance": np.array(b"{}"),
        "task": np.array(b"multiclass"),
        "classes": np.array([b"x", b"y"]),
        "splits/train/features": np.ones((3, 4), "<f4"),
        "splits/train/targets": np.array([0, 1, -1]),
        "splits/train/paths": np.array([b"a", b"b", b"c"]),
        "splits/train/groups": np.array([b"a", b"b", b"c"]),
        "splits/train/image_sha256": np.zeros((3, 32), "|u1"),
        "splits/train/image_bytes": np.zeros(3, "<i8"),
        "splits/train/mtime_ns": np.zeros(3, "<i8"),
    }  # fmt: skip
    arrays |= {f"failures/{k}": np.array([b"train"]) for k in ("paths", "splits", "reasons")}
    arrays |= {f"failures/{k}": np.zeros(1, "<i8") for k in ("targets", "image_bytes", "mtime_ns")}
    arrays |= change
    text = arrays["identity"]
    fingerprint = hashlib.sha256(b"" if text is None else text.tobytes())
    sources = [ArraySource.of(name, array) for name, array in arrays.items() if array is not None]
    write_container(path, sources, fingerprint.hexdigest(), ["identity"])
    return path


SAMPLES = Path(__file__).parents[2] / "shared" / "research" / "rel" / "samples"
