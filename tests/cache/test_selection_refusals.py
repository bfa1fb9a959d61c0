"""A selection is whole or absent; damaged sources and full disks are one line."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_containers import container_of
from sample_selections import IDENTITY, refused

from featcache.cache.reading import open_cache
from featcache.cache.selection import select
from featcache.cache.writing import SplitRows, partial_folder, write_cache, write_rows
from featcache.errors import CacheError, ConfigError
from featcache.locking import writer_lock

# ------------------------------------------------------------------------------ whole or absent


def test_an_existing_file_is_kept_unless_rebuild_is_given(make: Any, tmp_path: Path) -> None:
    a, b = make("a", "all/x/1", "all/y/2"), make("b", "all/x/3", "all/y/4")
    for source in (a.path, tmp_path / "." / "a.h5", os.path.relpath(a.path)):
        with pytest.raises(ConfigError, match="NEW: expected another file than the caches"):
            select([source, b.path], a.path, rebuild=True)
    (tmp_path / "link.h5").symlink_to(a.path)
    with pytest.raises(ConfigError, match="another file than"):
        select([a.path], tmp_path / "link.h5", rebuild=True)
    with pytest.raises(CacheError, match=r"found a cache that is there already.*--rebuild"):
        select(a.path, b.path)
    (tmp_path / "letter").write_text("dear")
    for place in (tmp_path / "letter", tmp_path):
        with pytest.raises(CacheError, match="something that is no cache"):
            select(a.path, place, rebuild=True)
    assert (tmp_path / "letter").read_text() == "dear"
    partial_folder(tmp_path / "new.h5").mkdir()
    (partial_folder(tmp_path / "new.h5") / "manifest.json").write_text("{}")
    with pytest.raises(CacheError, match=r"found new\.h5\.partial of somebody else"):
        select(a.path, tmp_path / "new.h5", rebuild=True)
    (partial_folder(tmp_path / "new.h5") / "lock").write_text("process 7 on this since then")
    with pytest.raises(CacheError, match="an unfinished extraction of that name"):
        select(a.path, tmp_path / "new.h5")
    assert (partial_folder(tmp_path / "new.h5") / "manifest.json").exists()
    with pytest.raises(ConfigError):
        select(a.path, tmp_path / "new.h5", classes=["z"], rebuild=True)
    assert (partial_folder(tmp_path / "new.h5") / "manifest.json").exists()
    select(a.path, tmp_path / "new.h5", rebuild=True)
    (tmp_path / ".new.h5.0123456789abcdef.tmp").write_bytes(b"of a run that was killed")
    damaged = bytearray((tmp_path / "new.h5").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "new.h5").write_bytes(damaged)
    made = select(b.path, tmp_path / "new.h5", rebuild=True)
    assert made.content_sha256 == b.content_sha256
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.h5", "b.h5", "letter", "link.h5", "new.h5",
    ]  # fmt: skip


def test_a_second_writer_is_refused(make: Any, tmp_path: Path) -> None:
    a = make("a", "all/x/1", "all/y/2")
    with (
        writer_lock(partial_folder(tmp_path / "new.h5") / "lock", "cache new.h5"),
        pytest.raises(
            CacheError, match=f"no other writer, found one at work: process {os.getpid()}"
        ),
    ):
        select(a.path, tmp_path / "new.h5")
    assert not (tmp_path / "new.h5").exists()


def test_damaged_and_odd_sources_are_refused(make: Any, tmp_path: Path) -> None:
    a = make("a", "all/x/1", "all/y/2")
    b = make("b", "all/x/3", "all/y/4", images={"all/x/3": 3})
    for value in (np.nan, np.inf):
        odd = write_cache(
            tmp_path / "odd.h5", np.ones((2, 3), np.float32), [0, 0], ["p", "q"], classes=["x"],
            identity=IDENTITY, overwrite=True,
        )  # fmt: skip
        data = bytearray(odd.path.read_bytes())
        entry = odd.container.arrays["splits/all/features"]
        data[entry.offset + 12 : entry.offset + 16] = np.float32(value).tobytes()
        odd.path.write_bytes(data)
        assert "payload sha256" in refused(tmp_path, CacheError, a, odd)
    for value in (np.nan, np.inf):  # whole, but not finite
        features = np.array([[1, 2, 3], [4, value, 6]], "<f4")
        zeros = np.zeros(2, np.int64)
        rows = SplitRows((2, 3), features.dtype, lambda features=features: [features], zeros,
                         ["p", "q"], None, np.zeros((2, 32), np.uint8), zeros, zeros)  # fmt: skip
        odd = write_rows(odd.path, {"all": rows}, identity=IDENTITY, provenance={}, classes=["x"],
                         task="multiclass")  # fmt: skip
        assert "features of q: expected finite numbers" in refused(tmp_path, CacheError, a, odd)
    b.path.unlink()
    assert "no such file" in refused(tmp_path, CacheError, a, b)
    with pytest.raises(ConfigError, match="CACHE: expected one or more, found none"):
        select([], tmp_path / "new.h5")
    assert "at least one row" in refused(
        tmp_path, CacheError,
        write_cache(tmp_path / "e.h5", np.empty((0, 3), np.float32), np.empty(0, int), [],
                    classes=["x"]),
    )  # fmt: skip


def test_json_that_another_program_wrote_is_no_crash(tmp_path: Path) -> None:
    container_of(tmp_path / "odd.h5", identity=np.array(b'{"a": 1}'))
    assert "canonical JSON" in refused(tmp_path, CacheError, open_cache(tmp_path / "odd.h5"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_FSIZE as on Linux")
def test_a_full_disk_says_what_is_needed_and_leaves_nothing(make: Any, tmp_path: Path) -> None:
    import resource

    a = make("a", *(f"all/{c}/{i}" for c in "xy" for i in range(300)))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, before[1]))
    try:
        text = refused(tmp_path, CacheError, a)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.search(r"file size: expected [\d,]+ bytes, found a limit", text)
