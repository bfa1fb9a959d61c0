"""Images of any time: int64 in ns ends in 2262, and file systems go further."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from command_line import TINY
from sample_images import write_image, write_tree

from featcache.cache.reading import open_cache
from featcache.data.dataset import scan
from featcache.data.image_lists import list_images
from featcache.data.splitting import split
from featcache.errors import FeatcacheWarning
from featcache.extraction.extraction import extract
from featcache.extraction.verification import verify

pytestmark = pytest.mark.usefixtures("children_here")

SECOND, YEAR = 10**9, 31_556_952 * 10**9
TIMES = {
    "2261": 291 * YEAR, "2263": 293 * YEAR, "2300": 330 * YEAR, "2445": 475 * YEAR,
    "1901": -69 * YEAR, "before 1677": -300 * YEAR, "before 1677 by far": -600 * YEAR,
    "beyond 2554": 700 * YEAR,
}  # fmt: skip


def set_time(path: Path, time: int) -> None:
    os.utime(path, ns=(time, time))
    if path.stat().st_mtime_ns != time:
        pytest.skip("this file system has no such time")


@pytest.mark.parametrize("year", TIMES)
def test_an_image_of_any_time_is_extracted_known_again_and_looked_at_when_it_changes(
    year: str, tmp_path: Path
) -> None:
    root = write_tree(tmp_path / "data", {"train": 2, "valid": 2})
    odd = sorted(root.rglob("*.png"))[0]
    odd.write_bytes(odd.read_bytes().ljust(8000, b"\0"))
    set_time(odd, TIMES[year])
    made: dict[str, Any] = {"backbone": TINY[1], "device": "cpu"}
    assert extract(root, tmp_path / "c.h5", **made).num_new == 8
    again = extract(root, tmp_path / "c.h5", **made)
    assert (again.status, again.num_new) == ("up to date", 0)
    verify(tmp_path / "c.h5", data=root, samples="all", backbone=TINY[1], device="cpu")
    write_image(odd, 99)  # another image; of the same size, so that the time alone tells
    odd.write_bytes(odd.read_bytes().ljust(8000, b"\0"))
    set_time(odd, TIMES[year] + 2 * SECOND)
    assert extract(root, tmp_path / "c.h5", **made).num_new == 1
    assert sum(map(len, open_cache(tmp_path / "c.h5").splits.values())) == 8


def test_an_image_of_2300_that_fails_is_listed(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "data", {"train": 2})
    odd = sorted(root.rglob("*.png"))[0]
    odd.write_bytes(b"no image")
    set_time(odd, TIMES["2300"])
    with pytest.warns(FeatcacheWarning, match="1 image could not be read"):
        summary = extract(root, tmp_path / "c.h5", backbone=TINY[1], device="cpu", max_errors=1)
    assert (summary.num_images, summary.num_failed) == (3, 1)


def test_times_are_folded_into_int64_wherever_images_are_listed(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "data", {"train": 1})
    for file in root.rglob("*.*"):
        if file.is_file():
            set_time(file, TIMES["2300"])
    files = sorted(p.relative_to(tmp_path).as_posix() for p in root.rglob("*.*") if p.is_file())
    (tmp_path / "d.csv").write_text("path\n" + "\n".join(files))
    for dataset in (scan(root), scan(tmp_path / "d.csv"), list_images([root])):
        assert {s.mtime_ns for s in dataset.samples} == {TIMES["2300"] - 2**64}
    split(root / "train", tmp_path / "parts", fractions=(1, 0, 0))
    assert len(list((tmp_path / "parts").rglob("*.*"))) == 2
