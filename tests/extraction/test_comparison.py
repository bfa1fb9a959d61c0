"""Comparison: what became of the images a cache was made of, whatever form they come in."""

from __future__ import annotations

import csv
import os
import shutil
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from sample_caches import TINY, rewrite
from sample_images import write_image, write_tree

from featcache.backbones.backbone import Backbone
from featcache.cache.reading import Cache, open_cache
from featcache.errors import CacheError, FeatcacheWarning
from featcache.extraction.comparison import Comparison, compare
from featcache.extraction.extraction import extract
from featcache.untrusted import MAX_PIXELS

SIZES = {"train": 2, "valid": 2, "test": 1}


def look(cache: Cache, data: Path, samples: int | str = "all") -> tuple[Comparison, list[str]]:
    said: list[str] = []
    comparison = compare(
        open_cache(cache.path), data, samples=samples, weights=None, backbone=TINY, device="cpu",
        max_pixels=MAX_PIXELS, say=said.append,
    )  # fmt: skip
    return comparison, said


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_tree(folder / "data", SIZES)
    (folder / "data" / "train" / "covid" / "broken.png").write_bytes(b"no image")
    with pytest.warns(FeatcacheWarning, match="1 image could not be read"):
        extract(folder / "data", folder / "c.h5", backbone=tiny_backbone, max_errors=1)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "x")


def test_other_times_alone_change_nothing(folder: Path) -> None:
    for path in (folder / "data").rglob("*.png"):
        os.utime(path, ns=(1, 1))
    comparison, said = look(open_cache(folder / "c.h5"), folder / "data")
    assert (comparison.bad_rows, comparison.num_compared) == ((), 10)
    assert (comparison.changed, comparison.vanished, comparison.appeared) == ((), (), ())
    assert len(said) == 1


def test_every_changed_image_is_named_in_the_order_of_the_cache(folder: Path) -> None:
    """By size without being read, by content where the size is the same, and unreadable ones."""
    data, cache = folder / "data", open_cache(folder / "c.h5")
    small, same, broken = (data / cache.splits[s].paths[0] for s in ("test", "valid", "train"))
    write_image(small, 99)
    size = same.stat().st_size
    Image.new("L", (8, 8), 99).save(same)
    same.write_bytes(same.read_bytes().ljust(size, b"\0"))  # decoders stop at the image's end
    broken.write_bytes(b"\0" * broken.stat().st_size)
    comparison, said = look(cache, data)
    names = [path.relative_to(data).as_posix() for path in (broken, same, small)]
    assert [(bad.split, bad.row, bad.path) for bad in comparison.bad_rows] == [
        ("train", 0, names[0]), ("valid", 0, names[1]), ("test", 0, names[2]),
    ]  # fmt: skip
    found = [bad.found for bad in comparison.bad_rows]
    assert found[0].startswith("an unreadable one")
    assert found[1] == "another one"
    assert found[2] == f"one of {small.stat().st_size:,} bytes"
    assert comparison.changed == tuple(sorted(names))
    assert {f"changed: {name}" for name in names} <= set(said)
    assert comparison.num_compared == 7


def test_a_sample_reads_no_more_than_it_was_asked_for(folder: Path) -> None:
    comparison, _ = look(open_cache(folder / "c.h5"), folder / "data", samples=3)
    assert comparison.num_compared == 3


def test_a_failed_image_is_known_until_it_is_another(folder: Path) -> None:
    cache, broken = open_cache(folder / "c.h5"), folder / "data" / "train" / "covid" / "broken.png"
    assert look(cache, folder / "data")[0].appeared == ()
    write_image(broken, 5)
    assert look(cache, folder / "data")[0].appeared == ("train/covid/broken.png",)
    broken.unlink()
    comparison, _ = look(cache, folder / "data")
    assert (comparison.appeared, comparison.vanished) == ((), ())


def test_many_names_are_counted_behind_the_first_twenty(folder: Path) -> None:
    for i in range(23):
        write_image(folder / "data" / "test" / "covid" / f"z{i:02d}.png", i)
    comparison, said = look(open_cache(folder / "c.h5"), folder / "data")
    assert len(comparison.appeared) == 23
    assert sum(line.startswith("appeared: test") for line in said) == 20
    assert "appeared: and 3 more" in said


def test_a_zip_of_the_images_is_compared_alike(
    folder: Path, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    (folder / "data" / "train" / "covid" / "broken.png").unlink()

    def pack(name: str) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            for path in sorted((folder / "data").rglob("*.*")):
                file.write(path, path.relative_to(folder / "data"))
        return tmp_path / name

    extract(pack("a.zip"), tmp_path / "z.h5", backbone=tiny_backbone)
    cache = open_cache(tmp_path / "z.h5")
    assert look(cache, pack("a.zip"))[0].num_compared == 10
    changed, gone = cache.splits["train"].paths[1], cache.splits["valid"].paths[0]
    write_image(folder / "data" / changed, 77)
    (folder / "data" / gone).unlink()
    comparison, _ = look(cache, pack("b.zip"))
    assert (comparison.changed, comparison.vanished) == ((changed,), (gone,))


def test_a_table_of_the_images_is_compared_alike(
    folder: Path, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    images = [p for p in sorted((folder / "data").rglob("*.*")) if p.name != "broken.png"]

    def list_images(name: str) -> Path:
        with (folder / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "target", "split"])
            for path in images:
                parts = path.relative_to(folder).parts
                writer.writerow(["/".join(parts), parts[2], parts[1]])
        return folder / name

    extract(list_images("a.csv"), tmp_path / "t.h5", backbone=tiny_backbone)
    cache = open_cache(tmp_path / "t.h5")
    assert look(cache, folder / "a.csv")[0].num_compared == 10
    write_image(images[0], 78)
    wanted = images.pop(3).relative_to(folder).as_posix()
    comparison, _ = look(cache, list_images("b.csv"))
    assert comparison.changed == (images[0].relative_to(folder).as_posix(),)
    assert comparison.vanished == (wanted,)


def test_a_precision_that_we_do_not_know_is_refused(folder: Path) -> None:
    cache = open_cache(folder / "c.h5")
    cache.provenance["precision"] = "fp8"
    features = {name: split.read_features() for name, split in cache.splits.items()}
    rewrite(cache, features)
    with pytest.raises(CacheError, match=r"precision of the cache: expected fp32 or .*found fp8"):
        look(cache, folder / "data")
