"""The table of a container against what libhdf5 itself reads."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from sample_containers import (
    FINGERPRINT,
    SAMPLES,
    edit_block,
    entry_of,
    read_block,
    some_arrays,
    write,
    write_block,
)

from featcache.cache import hdf5
from featcache.cache.container import Container, open_container
from featcache.cache.hdf5 import compare_with_hdf5

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")

# --- the table against libhdf5


def test_a_file_as_written_shows_no_differences(tmp_path: Path) -> None:
    assert compare_with_hdf5(write(tmp_path / "c", some_arrays())) == []


def test_swapped_offsets_in_the_table_are_found(tmp_path: Path) -> None:
    """Two arrays of one shape change places: every check of the table alone passes."""
    arrays = {"a": np.arange(40, dtype="<i8"), "b": -np.arange(40, dtype="<i8"), "c": np.zeros(3)}
    arrays["c"] = arrays["c"].astype("<f4")

    def swap(block: dict[str, Any]) -> None:
        a, b = entry_of(block, "a"), entry_of(block, "b")
        a["offset"], b["offset"] = b["offset"], a["offset"]

    write(tmp_path / "c", arrays)
    container = open_container(edit_block(tmp_path / "c", swap))
    assert container.map("a").tolist() == arrays["b"].tolist()
    found = compare_with_hdf5(container)
    assert [line.split(":")[0] for line in found] == ["/a", "/b"]


def test_every_wrong_table_entry_is_found(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "/a": lambda b: entry_of(b, "a").update(dtype="|S8"),
        "/a ": lambda b: entry_of(b, "a").update(shape=[20]),
        "/a  ": lambda b: entry_of(b, "a").update(shape=[4, 10]),
        "/none": lambda b: entry_of(b, "a").update(name="none"),
        "/a   ": lambda b: b["arrays"].pop(0),
        "attribute fingerprint": lambda b: b.update(fingerprint="f" * 64),
    }
    for wanted, change in changes.items():
        write(tmp_path / "c", {"a": np.arange(40, dtype="<i8"), "b": np.zeros(1, "<f4")})
        found = compare_with_hdf5(open_container(edit_block(tmp_path / "c", change)))
        assert any(line.startswith(wanted.strip()) for line in found), (wanted, found)


def wrap(path: Path, fill: Any) -> Container:
    """Return a container whose payload was made by h5py, with a table that looks honest."""
    block = read_block(write(path, {"a": np.zeros(8, "|u1")}).path)
    with h5py.File(path, "w", userblock_size=4096) as file:
        fill(file)
        file.attrs["format"] = np.bytes_("featcache")
        file.attrs["fingerprint"] = np.bytes_(FINGERPRINT)
    payload = path.read_bytes()[4096:]
    block["payload_sha256"] = hashlib.sha256(payload).hexdigest()
    block["payload_bytes"] = len(payload)
    entry_of(block, "a")["offset"] = 4096
    return open_container(write_block(path, block, payload))


def test_data_that_hdf5_would_fetch_from_elsewhere_is_a_difference(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"password")
    source = h5py.VirtualSource(str(tmp_path / "x.h5"), "a", (8,))

    def external(file: h5py.File) -> None:
        file.create_dataset("a", (8,), "u1", external=[(str(secret), 0, 8)])

    def virtual(file: h5py.File) -> None:
        layout = h5py.VirtualLayout((8,), "u1")
        layout[:] = source
        file.create_virtual_dataset("a", layout)

    def chunked(file: h5py.File) -> None:
        file.create_dataset("a", data=np.arange(8, dtype="u1"), chunks=(4,))

    for fill in (external, virtual, chunked):
        container = wrap(tmp_path / "c.h5", fill)
        found = compare_with_hdf5(container)
        assert found
        assert found[0].startswith("/a:")
        assert "password" not in "".join(found)


@pytest.mark.parametrize("sample", sorted(SAMPLES.glob("*.h5")) or [None], ids=str)
def test_files_that_hang_or_crash_libhdf5_cost_a_child_process(
    sample: Path | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sample is None:
        pytest.skip("the hostile samples of ../shared/research are not here")
    container = write(tmp_path / "c", some_arrays())
    found = compare_with_hdf5(dataclasses.replace(container, path=sample))
    assert found


@needs_linux
@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("import time; time.sleep(600)", "no answer of libhdf5 within 1 s"),
        (
            "import resource as r; r.setrlimit(r.RLIMIT_CPU, (1, 2)); any(iter(int, 1))",
            "no answer within 8 s of computing",
        ),
        ("import os; os.kill(os.getpid(), 11)", "cannot read it (exit -11)"),
        ("import sys; sys.exit('no such thing')", "no such thing"),
    ],
)
def test_a_child_that_hangs_crashes_or_fails_is_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, wanted: str
) -> None:
    container = write(tmp_path / "c", some_arrays())
    child = tmp_path / "python"
    child.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}"\n')
    child.chmod(0o755)
    monkeypatch.setattr(hdf5.sys, "executable", str(child))
    monkeypatch.setattr(hdf5, "_CHECK_WAIT_SECONDS", 1 if "sleep" in code else 300)
    (found,) = compare_with_hdf5(container)
    assert wanted in found


@needs_linux
def test_a_file_that_hdf5_could_not_lock_is_compared_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on network file systems: here another process holds the lock that HDF5 would take."""
    import fcntl

    container = write(tmp_path / "c", some_arrays())
    monkeypatch.setenv("HDF5_USE_FILE_LOCKING", "TRUE")
    with (tmp_path / "c").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert compare_with_hdf5(container) == []


def test_a_payload_of_too_many_objects_is_a_difference(tmp_path: Path) -> None:
    def crowd(file: h5py.File) -> None:
        for i in range(1001):
            file.create_group(f"g{i}")

    (found,) = compare_with_hdf5(wrap(tmp_path / "c.h5", crowd))
    assert "more than 1,000 objects" in found


def test_the_child_limits_its_memory_and_its_time() -> None:
    resource = pytest.importorskip("resource")
    code = (
        "import resource; from featcache.cache import hdf5; hdf5._limit_resources()\n"
        "print([resource.getrlimit(k)[0] for k in (resource.RLIMIT_AS, resource.RLIMIT_CPU)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    memory, seconds = json.loads(done.stdout)
    assert 0 < memory <= 1 << 30
    assert 0 < seconds <= hdf5._CHECK_SECONDS
    with contextlib.suppress(ValueError):
        assert resource.getrlimit(resource.RLIMIT_AS)[0] != memory
