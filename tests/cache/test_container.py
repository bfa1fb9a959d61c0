from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import mmap
import os
import pickle
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from failing import failing
from sample_containers import (
    FINGERPRINT,
    KEYS,
    SAMPLES,
    edit_block,
    entry_of,
    facts,
    hostile_changes,
    read_block,
    refused_or_read,
    same,
    some_arrays,
    write,
)

from featcache.cache.container import (
    content_sha256,
    is_payload_whole,
    open_container,
)
from featcache.errors import CacheError

# --- what is written can be read


def test_arrays_come_back_by_both_ways_of_reading(tmp_path: Path) -> None:
    arrays = some_arrays()
    write(tmp_path / "c", arrays)
    container = open_container(tmp_path / "c")
    assert list(container.arrays) == list(arrays)
    for name, array in arrays.items():
        assert same(container.map(name), array)
        assert same(container.read(name), array)


def test_a_mapped_array_cannot_change_the_file(tmp_path: Path) -> None:
    container = write(tmp_path / "c", some_arrays())
    view = container.map("splits/train/features")
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 1
    container.read("splits/train/features")[0, 0] = 1
    assert same(container.map("splits/train/features"), some_arrays()["splits/train/features"])


@pytest.mark.parametrize("seed", range(12))
def test_arrays_of_any_size_are_aligned_and_come_back(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = {}
    for i in range(int(rng.integers(1, 40))):
        shape = tuple(int(n) for n in rng.integers(0, 40, int(rng.integers(0, 4))))
        dtype = rng.choice(["<f4", "<f2", "<i8", "|u1", f"|S{rng.integers(1, 60)}"])
        data = rng.integers(1, 256, 60 * int(np.prod(shape)) + 60, np.uint8).tobytes()
        size = int(np.prod(shape))
        arrays[f"g{i % 3}/a{i}"] = np.frombuffer(data, dtype, size).reshape(shape)
    container = write(tmp_path / "c", arrays)
    for name, array in arrays.items():
        assert same(container.map(name), array)
        entry = container.arrays[name]
        if entry.num_bytes >= 256:
            assert entry.offset % 64 == 0
        if entry.num_bytes and array.dtype.kind != "S":
            assert container.map(name).flags.aligned


def test_no_handle_stays_open(tmp_path: Path) -> None:
    container = write(tmp_path / "c", some_arrays())
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("counts handles in /proc")
    before = len(list(folder.iterdir()))
    kept = [open_container(tmp_path / "c") for _ in range(50)]
    kept_arrays = [container.read("splits/train/features") for _ in range(50)]
    assert len(list(folder.iterdir())) <= before + 1
    assert len(kept) == len(kept_arrays)


def test_a_missing_array_is_named(tmp_path: Path) -> None:
    container = write(tmp_path / "c", some_arrays())
    for get in (container.map, container.read):
        with pytest.raises(CacheError, match="a data set splits/test/features"):
            get("splits/test/features")


def test_a_container_survives_pickling(tmp_path: Path) -> None:
    container = write(tmp_path / "c", some_arrays())
    assert facts(pickle.loads(pickle.dumps(container))) == facts(container)


# --- the user block


def test_the_user_block_says_what_stands_behind_it(tmp_path: Path) -> None:
    arrays = some_arrays()
    container = write(tmp_path / "c", arrays)
    raw, block = (tmp_path / "c").read_bytes(), read_block(tmp_path / "c")
    assert block.keys() >= KEYS
    assert (block["format"], block["format_version"]) == ("featcache", 1)
    assert (block["user_block_bytes"], block["fingerprint"]) == (4096, FINGERPRINT)
    assert raw[4096:].startswith(b"\x89HDF\r\n\x1a\n")
    assert block["payload_bytes"] == len(raw) - 4096
    assert block["payload_sha256"] == hashlib.sha256(raw[4096:]).hexdigest()
    assert raw[:4096].rstrip(b"\0").endswith(b"}")
    for entry, (name, array) in zip(block["arrays"], arrays.items(), strict=True):
        assert entry["name"] == name
        stop = entry["offset"] + array.nbytes
        assert entry["dtype"] == array.dtype.str
        assert (entry["shape"], raw[entry["offset"] : stop]) == (list(array.shape), array.tobytes())
    assert (container.payload_sha256, container.content_sha256) == (
        block["payload_sha256"], block["content_sha256"],
    )  # fmt: skip


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs tail and sha256sum")
def test_anyone_can_check_the_payload_with_two_old_tools(tmp_path: Path) -> None:
    container = write(tmp_path / "c", some_arrays())
    line = f"tail -c +4097 '{tmp_path / 'c'}' | sha256sum"
    found = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout
    assert found.split()[0] == container.payload_sha256


def test_many_arrays_take_a_larger_user_block(tmp_path: Path) -> None:
    arrays = {f"group{i % 7}/array{i}": np.full((i % 5, 3), i, "<i8") for i in range(400)}
    container = write(tmp_path / "c", arrays)
    size = container.user_block_bytes
    assert size > 4096
    assert size & (size - 1) == 0
    raw = (tmp_path / "c").read_bytes()
    assert len(raw[:size].rstrip(b"\0")) > size // 2, "not larger than it has to be"
    assert hashlib.sha256(raw[size:]).hexdigest() == container.payload_sha256
    again = open_container(tmp_path / "c")
    with h5py.File(tmp_path / "c") as file:
        assert file.userblock_size == size
        for name, array in arrays.items():
            assert same(again.map(name), array)
            assert same(file[name][()], array)


def test_no_length_of_the_table_falls_between_two_block_sizes(tmp_path: Path) -> None:
    """At every length around 4,096 bytes the file opens: the zero that ends the text is there."""
    texts = []
    used = len(
        (write(tmp_path / "c", {"a": np.zeros(3, "<f4")}).path).read_bytes()[:4096].rstrip(b"\0")
    )
    for length in range(4096 - used - 3, 4096 - used + 6):
        write(tmp_path / "c", {"a" * length: np.arange(3, dtype="<f4")})
        container = open_container(tmp_path / "c")
        assert container.map("a" * length).tolist() == [0, 1, 2]
        texts.append(container.user_block_bytes)
    assert {4096, 8192} == set(texts)


def test_the_content_hash_is_what_its_definition_says() -> None:
    a, b = np.arange(6, dtype="<f4").reshape(2, 3), np.array([b"x", b"yz"])
    digests = {
        name: (array.dtype, array.shape, hashlib.sha256(array.tobytes()).hexdigest())
        for name, array in {"b": b, "a": a}.items()
    }
    text = '[["a","<f4",[2,3],"%s"],["b","|S2",[2],"%s"]]' % (digests["a"][2], digests["b"][2])  # noqa: UP031
    wanted = hashlib.sha256(text.encode()).hexdigest()
    assert content_sha256(digests) == content_sha256(dict(reversed(digests.items()))) == wanted


# --- what is not whole is refused


def test_other_files_are_refused_by_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["features"] = np.zeros((3, 4))
    with pytest.raises(CacheError, match="an HDF5 file without featcache's user block"):
        open_container(path)
    with h5py.File(path, "w", userblock_size=4096) as file:
        file["features"] = np.zeros((3, 4))
    cases: dict[str, bytes] = {
        "other data": path.read_bytes(),
        "an empty file": b"",
        "another format": b'{"format":"other"}'.ljust(5000, b"\0"),
        "an unreadable user block": b'{"format":"featcache",'.ljust(5000, b"\0"),
    }
    cases |= {f"other data {i}": data for i, data in enumerate([b"\0" * 9999, b"\x89PNG" * 2000])}
    cases |= {f"an unreadable user block {i}": data for i, data in enumerate([
        b"{" * 9000, b'{"a":' * 200000, b"{\xff}" * 3000, b'{"a":' + b"[" * 100000, b"{" + b"9" * 9,
        b'{"format_version":' + b"9" * 5000 + b"}",
    ])}  # fmt: skip
    for found, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(CacheError, match=found.rstrip("0123456789 ")):
            open_container(path, verify=False)
    for data in (b"[]", b'"featcache"', b"1", b"null", b"{}"):
        path.write_bytes(data.ljust(8192, b"\0"))
        with pytest.raises(CacheError, match=r"^cache: expected a featcache file"):
            open_container(path, verify=False)


def test_a_missing_file_a_folder_and_a_file_as_folder_are_one_line_each(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(CacheError, match="found no such file"):
        open_container(tmp_path / "no.h5")
    with pytest.raises(CacheError, match="expected a cache, which is a file, found a folder"):
        open_container(tmp_path)
    with pytest.raises(CacheError, match="expected a readable file"):
        open_container(tmp_path / "file" / "c.h5")


@pytest.mark.parametrize("sample", sorted(SAMPLES.glob("*.h5")) or [None], ids=str)
def test_files_that_hang_or_crash_libhdf5_are_refused_unread(sample: Path | None) -> None:
    if sample is None:
        pytest.skip("the hostile samples of ../shared/research are not here")
    with pytest.raises(CacheError, match="expected a featcache file"):
        open_container(sample)


def test_a_newer_format_says_to_upgrade(tmp_path: Path) -> None:
    write(tmp_path / "c", some_arrays())
    edit_block(tmp_path / "c", lambda block: block.update(format_version=2, arrays="other"))
    with pytest.raises(CacheError, match=r"format version 1, found version 2 .*pip install -U"):
        open_container(tmp_path / "c")


@pytest.mark.parametrize("verify", [False, True])
def test_a_cut_or_longer_file_is_refused_without_hashing(tmp_path: Path, verify: bool) -> None:
    write(tmp_path / "c", some_arrays())
    raw, path = (tmp_path / "c").read_bytes(), tmp_path / "d"
    for length in [*range(0, len(raw), 61), len(raw) - 1]:
        path.write_bytes(raw[:length])
        with pytest.raises(CacheError):
            open_container(path, verify=verify)
    path.write_bytes(raw + b"\0")
    with pytest.raises(CacheError, match="length"):
        open_container(path, verify=verify)


def test_any_changed_bit_of_the_payload_is_found(tmp_path: Path) -> None:
    container = write(tmp_path / "c", some_arrays())
    raw, rng = (tmp_path / "c").read_bytes(), random.Random(0)
    assert is_payload_whole(container)
    for _ in range(300):
        damaged = bytearray(raw)
        damaged[rng.randrange(4096, len(raw))] ^= 1 << rng.randrange(8)
        (tmp_path / "c").write_bytes(damaged)
        with pytest.raises(CacheError, match="payload sha256"):
            open_container(tmp_path / "c")
        assert facts(open_container(tmp_path / "c", verify=False)) == facts(container)


def test_damage_of_the_user_block_is_found_or_changes_nothing(
    tmp_path: Path, rounds: Callable[[int, int], int]
) -> None:
    """The payload's hash does not cover the table, and a table that lies gives other data."""
    arrays = some_arrays()
    container = write(tmp_path / "c", arrays)
    raw, rng = (tmp_path / "c").read_bytes(), random.Random(1)
    used = len(raw[:4096].rstrip(b"\0"))
    different = []
    for _ in range(rounds(500, 3000)):
        damaged = bytearray(raw)
        for _ in range(rng.choice([1, 1, 2, 8])):
            damaged[rng.randrange(used + 4)] = rng.choice(b'0123456789abcdefstu_/"<|S, ')
        (tmp_path / "d").write_bytes(damaged)
        with contextlib.suppress(CacheError):
            if facts(open_container(tmp_path / "d")) != facts(container):
                different.append(bytes(damaged[:used]))
    assert not different, f"{len(different)} silently different, such as {different[0]!r}"


# --- a table that lies (the file's other hashes are right): refused, or read within the file


def read_all(path: Path) -> None:
    container = open_container(path, verify=False)
    for name in container.arrays:
        assert same(container.map(name), container.read(name))


def test_a_hostile_table_is_refused_or_read_within_the_file(
    tmp_path: Path, rounds: Callable[[int, int], int]
) -> None:
    few = ("identity", "splits/train/targets", "splits/train/paths", "splits/none/features")
    write(tmp_path / "c", {name: some_arrays()[name] for name in few})
    # 29 fields a value and 59 values: every 7th meets each field and each value several times.
    blocks = hostile_changes(read_block(tmp_path / "c"))[:: rounds(7, 1)]
    refused = refused_or_read(tmp_path / "c", read_all, blocks)
    assert len(blocks) > rounds(200, 1000)
    assert refused > 0.9 * len(blocks)


@pytest.mark.parametrize("depth", [50, 500, 900, 950, 970, 980, 990, 1000, 1500])
@pytest.mark.parametrize("key", ["format", "format_version", "fingerprint", "arrays"])
def test_nested_json_is_refused(tmp_path: Path, depth: int, key: str) -> None:
    path = write(tmp_path / "c", {"a": np.zeros(1, "<f4")}).path
    raw, block = path.read_bytes(), read_block(path)
    text = json.dumps(block | {key: "@@"}).replace('"@@"', "[" * depth + "]" * depth)
    path.write_bytes(text.encode().ljust(4096, b"\0") + raw[4096:])
    with pytest.raises(CacheError):
        open_container(path, verify=False)


def change_entry(name: str, /, **change: Any) -> Callable[[dict[str, Any]], object]:
    return lambda block: entry_of(block, name).update(change)


def shift(name: str, other: str, by: int) -> Callable[[dict[str, Any]], object]:
    return lambda b: entry_of(b, name).update(offset=entry_of(b, other)["offset"] + by)


LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "overlap": (shift("b", "a", 8), "runs into"),
    "same place": (shift("b", "a", 0), "runs into"),
    "a name twice": (change_entry("b", name="a"), "a name twice"),
    "before the payload": (change_entry("a", offset=0), "outside the file"),
    "negative offset": (change_entry("a", offset=-8), "outside the file"),
    "behind the end": (change_entry("a", offset=1 << 40), "outside the file"),
    "last byte outside": (
        lambda b: entry_of(b, "a").update(
            offset=b["user_block_bytes"] + b["payload_bytes"] - 8 * 3 + 8
        ),
        "outside the file",
    ),
    "longer than the file": (change_entry("a", shape=[1 << 30]), "outside the file|of shape"),
    "negative rows": (change_entry("a", shape=[-3]), "of shape"),
    "pickled objects": (change_entry("a", dtype="|O"), "of dtype"),
    "true as a number": (change_entry("a", shape=[True]), "of shape"),
    "version true": (lambda b: b.update(format_version=True), "format_version"),
    "version 0": (lambda b: b.update(format_version=0), "format_version"),
    "user block 5000": (lambda b: b.update(user_block_bytes=5000), "user_block_bytes"),
    "payload shorter": (lambda b: b.update(payload_bytes=b["payload_bytes"] - 1), "length"),
    "hash not hex": (lambda b: b.update(payload_sha256="g" * 64), "hashes"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_wrong_table_entry_is_named(tmp_path: Path, lie: str) -> None:
    change, message = LIES[lie]
    arrays = {"a": np.arange(3, dtype="<i8"), "b": np.arange(40, dtype="<i8")}
    write(tmp_path / "c", arrays)
    edit_block(tmp_path / "c", change)
    with pytest.raises(CacheError, match=message):
        open_container(tmp_path / "c")


# --- a file that changes under an open container


def test_a_file_cut_after_opening_is_noticed(tmp_path: Path) -> None:
    container = write(tmp_path / "c", some_arrays())
    for length in (container.user_block_bytes + 100, 0):
        os.truncate(tmp_path / "c", length)
        for get in (container.map, container.read):
            with pytest.raises(CacheError, match="another one under its name"):
                get("splits/train/features")
    (tmp_path / "c").unlink()
    for get in (container.map, container.read):
        with pytest.raises(CacheError):
            get("splits/train/features")


@pytest.mark.parametrize("how", ["map", "read"])
def test_a_file_replaced_after_opening_is_never_mixed_with_the_old_one(
    tmp_path: Path, how: str
) -> None:
    """Same arrays, same length: only the file itself is another."""
    container = write(tmp_path / "c", some_arrays())
    first = container.map("splits/train/targets")
    write(tmp_path / "c", some_arrays(seed=1))
    assert same(first, some_arrays()["splits/train/targets"])
    try:
        found = getattr(container, how)("splits/train/features")
    except CacheError as error:
        found = None
        message = str(error)
    if found is None:
        assert "another one under its name" in message
    else:
        assert same(found, some_arrays()["splits/train/features"])


@pytest.mark.parametrize("code", [errno.ENODEV, errno.EINVAL, errno.EACCES, errno.ENOTSUP])
def test_where_files_cannot_be_mapped_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    container = write(tmp_path / "c", some_arrays())
    monkeypatch.setattr(mmap, "mmap", failing(OSError(code, os.strerror(code))))
    for name, array in some_arrays().items():
        view = container.map(name)
        assert same(view, array)
        assert not array.size or not view.flags.writeable


def test_a_disk_that_fails_is_named_with_the_file_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = write(tmp_path / "c", some_arrays())
    name = "splits/train/features"

    class FailingFile(io.FileIO):
        readinto = read = readall = failing(OSError(errno.EIO, "Input/output error"))

    monkeypatch.setattr(io, "FileIO", FailingFile)
    again = r"found Input/output error \(.*/c\)\. Run the same command again\. If"
    for read in (
        lambda: container.read(name), lambda: is_payload_whole(container),
        lambda: open_container(tmp_path / "c"),
    ):  # fmt: skip
        with pytest.raises(CacheError, match=again):
            read()
