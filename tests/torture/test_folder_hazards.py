"""Folders as people have them and as nobody should: right targets, no blocked read, a clear word.

Each is scanned and read in a child with a time limit: a pipe that is opened blocks for ever.
"""

from __future__ import annotations

import csv
import json
import os
import re
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
from bounded import GIB, command, run_bounded
from PIL import Image

from featcache.csv_files import plain_cell
from featcache.data.dataset import ImageDataset, scan
from featcache.errors import DataError

TINY = ["--backbone", "python:tiny_network:build"]


def put(root: Path, *paths: str) -> None:
    """Make files that hold their own path."""
    for path in paths:
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(os.fsencode(path))


class Seen(NamedTuple):
    """What a scan found: (path, split, class) of each sample, what was ignored, failed reads."""

    samples: list[tuple[str, str, str]]
    ignored: dict[str, int]
    failed: dict[str, str]


def look(root: Path, kind: str) -> Seen:
    """Scan ``root``, let the hazard's change happen to it, read every sample."""
    os.chdir(root)  # the folders above are root's own
    hazard = HAZARDS[kind]
    if hazard.user is not None:
        os.setuid(hazard.user)
    dataset = scan(Path("data"))
    if hazard.change is not None:
        hazard.change(Path("data"))
    failed = {}
    for sample in dataset.samples:
        try:
            assert dataset.read(sample) == (Path("data") / sample.path).read_bytes()
        except DataError as error:
            failed[sample.path] = str(error)
    samples = [(s.path, s.split, _class(dataset, s.target)) for s in dataset.samples]
    return Seen(samples, dataset.num_ignored, failed)


def _class(dataset: ImageDataset, target: int) -> str:
    return dataset.classes[target] if target >= 0 else ""


NONE: Mapping[str, Any] = MappingProxyType({})


class Hazard(NamedTuple):
    """A folder, and what is right.

    Attributes:
        build: Makes it; ``a/1.png`` and ``b/2.png`` are there already unless ``bare``.
        found: Class of each path expected, or the reason of the refusal.
        ignored: What is counted as ignored.
        warning: Of a warning.
        change: Happens between scan and read.
        failed: Path -> reason, of reads.
        user: Who looks.
        bare: Whether nothing is there already.
    """

    build: Callable[[Path], object]
    found: dict[str, str] | str
    ignored: Mapping[str, int] = NONE
    warning: str = ""
    change: Callable[[Path], None] | None = None
    failed: Mapping[str, str] = NONE
    user: int | None = None
    bare: bool = False


GOOD = {"a/1.png": "a", "b/2.png": "b"}
NOBODY = 65534


def bind_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path may be 107 bytes long
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def device(root: Path) -> None:
    os.mknod(root / "a/zero.png", 0o20666, os.makedev(1, 5))


def replace_by_pipe(root: Path) -> None:
    (root / "a/1.png").unlink()
    os.mkfifo(root / "a/1.png")


def replace_by_folder(root: Path) -> None:
    (root / "a/1.png").unlink()
    (root / "a/1.png").mkdir()


def replace_by_link_to_device(root: Path) -> None:
    (root / "a/1.png").unlink()
    (root / "a/1.png").symlink_to("/dev/zero")


def names(*paths: str) -> Callable[[Path], None]:
    return lambda root: put(root, *paths)


def make(path: str) -> Callable[[Path], None]:
    return lambda root: (root / path).mkdir(parents=True)


def link(path: str, to: str) -> Callable[[Path], None]:
    return lambda root: (root / path).symlink_to(to)


def deny(path: str) -> Callable[[Path], None]:
    def build(root: Path) -> None:
        put(root, f"{path}/3.png") if path == "c" else put(root, path)
        (root / path).chmod(0)

    return build


def many_classes(root: Path) -> None:
    for number in range(5000):
        (root / f"c{number:04}").mkdir()
        (root / f"c{number:04}" / "1.png").write_bytes(b"1")


NOT_UTF8 = "bad\udcff\udcfe"
LONG = "x" * 251
SPLITS = ("train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png")
VALIDATION = ("validation/a/5.png", "validation/b/6.png")
HAZARDS: dict[str, Hazard] = {
    "link in a circle": Hazard(link("a/loop.png", "loop.png"), GOOD, {"link to nothing": 1}),
    "folder in a circle": Hazard(link("a/loop", "../a"), GOOD, {"link to a folder": 1}),
    "link to the parent": Hazard(link("again", ".."), GOOD, {"link to a folder": 1}),
    "dangling link": Hazard(link("a/x.png", "nowhere.png"), GOOD, {"link to nothing": 1}),
    "link to an image": Hazard(link("b/x.png", "../a/1.png"), {**GOOD, "b/x.png": "b"}),
    "link to a device": Hazard(link("b/x.png", "/dev/zero"), GOOD, {"link to no regular file": 1}),
    "pipe": Hazard(lambda r: os.mkfifo(r / "a/p.png"), GOOD, {"not a regular file": 1}),
    "socket": Hazard(lambda r: bind_socket(r / "a/s.png"), GOOD, {"not a regular file": 1}),
    "device": Hazard(device, GOOD, {"not a regular file": 1}),
    "hidden": Hazard(names(".x.png", ".git/x.png", "a/._1.png"), GOOD, {"hidden": 3}),
    "of systems": Hazard(
        names("__MACOSX/a/._1.png", "a/.ipynb_checkpoints/1-checkpoint.png", "Thumbs.db"),
        GOOD, {"hidden": 2, "not an image ending": 1},
    ),
    "case twins": Hazard(names("COVID/1.png", "covid/1.png"), "more than case", bare=True),
    "trailing blank": Hazard(names("a /1.png"), "'a' and 'a '"),
    "class not UTF-8": Hazard(names(f"{NOT_UTF8}/1.png"), "names in UTF-8.*bad.udcff"),
    "file not UTF-8": Hazard(
        names(f"a/{NOT_UTF8}.png"), {**GOOD, f"a/{NOT_UTF8}.png": "a"}
    ),
    "numbers sort as strings": Hazard(
        names("10/1.png", "2/1.png", "9/1.png"),
        {"10/1.png": "10", "2/1.png": "2", "9/1.png": "9"}, bare=True,
    ),
    "5,000 classes": Hazard(
        many_classes, {f"c{n:04}/1.png": f"c{n:04}" for n in range(5000)}, bare=True
    ),
    "class missing in a split": Hazard(
        names("train/a/1.png", "train/b/1.png", "test/a/1.png"), "'b' in train but not in test",
        bare=True,
    ),
    "class too many in a split": Hazard(
        names("train/a/1.png", "test/a/1.png", "test/b/1.png"), "'b' in test but not in train",
        bare=True,
    ),
    "empty class": Hazard(make("c"), "at least one image, found none.*data/c"),
    "class of other files": Hazard(names("c/1.gif"), "ignored: 1 x not an image ending"),
    "val and valid": Hazard(
        names(*SPLITS, "val/a/1.png", "valid/a/1.png"), "one valid, found val and valid", bare=True
    ),
    "validation": Hazard(
        names(*SPLITS, *VALIDATION), {path: path.split("/")[1] for path in SPLITS + VALIDATION},
        bare=True,
    ),
    "splits beside classes": Hazard(names("train/a/3.png"), "no others, found 'a', 'b'"),
    "splits called otherwise": Hazard(
        names("Training/a/1.png", "Testing/a/1.png"), "found 'Testing', 'Training'", bare=True
    ),
    "split names as classes": Hazard(  # train/valid/1.png: a class called valid in split train
        names("train/valid/1.png", "train/test/2.png", "test/valid/3.png", "test/test/4.png"),
        {"train/valid/1.png": "valid", "train/test/2.png": "test", "test/valid/3.png": "valid",
         "test/test/4.png": "test"}, bare=True,
    ),
    "loose images": Hazard(
        names("cover.png"), GOOD, {"loose beside folders": 1}, warning="loose .*: 1 image of"
    ),
    "folder nobody may read": Hazard(
        deny("c"), "a readable one, found Permission denied.*c", user=NOBODY
    ),
    "file nobody may read": Hazard(
        deny("a/3.png"), {**GOOD, "a/3.png": "a"}, user=NOBODY,
        failed={"a/3.png": "Permission denied"},
    ),
    "long names": Hazard(
        names(f"{LONG}/{LONG}.png", f"a/{'y' * 200}/{'z' * 200}/{LONG}.png"),
        {**GOOD, f"{LONG}/{LONG}.png": LONG, f"a/{'y' * 200}/{'z' * 200}/{LONG}.png": "a"},
    ),
    "folder called .png": Hazard(make("a/folder.png"), GOOD),
    "becomes a pipe": Hazard(
        names(), GOOD, change=replace_by_pipe, failed={"a/1.png": "not a regular file"}
    ),
    "becomes a folder": Hazard(
        names(), GOOD, change=replace_by_folder, failed={"a/1.png": "directory|regular"}
    ),
    "becomes a device": Hazard(
        names(), GOOD, change=replace_by_link_to_device, failed={"a/1.png": "not a regular file"}
    ),
    "vanishes": Hazard(
        names(), GOOD, change=lambda r: (r / "a/1.png").unlink(),
        failed={"a/1.png": "No such file"},
    ),
}  # fmt: skip


def case_matters(folder: Path) -> bool:
    (folder / "case").mkdir()
    return not (folder / "CASE").exists()


@pytest.mark.parametrize("kind", HAZARDS)
def test_hazardous_folders_are_read_or_refused(kind: str, tmp_path: Path, tally: Any) -> None:
    hazard = HAZARDS[kind]
    if (hazard.build is device or hazard.user is not None) and os.geteuid() != 0:
        pytest.skip("only root makes devices and becomes another user")
    if "twins" in kind and not case_matters(tmp_path):
        pytest.skip("this file system does not tell case apart")
    root = tmp_path / "data"
    root.mkdir()
    tmp_path.chmod(0o755)
    if not hazard.bare:
        put(root, *GOOD)
    try:
        hazard.build(root)
    except (OSError, UnicodeEncodeError) as error:
        pytest.skip(f"this machine cannot have that: {error}")
    ended = run_bounded(look, tmp_path, kind)
    assert ended.peak_bytes < GIB
    for path in (root / "c", root / "a/3.png"):  # so that pytest can clear it away
        if path.exists():
            path.chmod(0o700)
    if isinstance(hazard.found, str):
        assert re.search(hazard.found, str(ended.error)), ended.error or ended.value
        tally("folder hazards", "refused with place and reason")
        return
    assert ended.error is None, ended.error
    seen = ended.value
    assert {path: label for path, _, label in seen.samples} == hazard.found
    for path, split, _ in seen.samples:
        top = path.split("/")[0]
        assert split == {"train": "train", "validation": "valid", "test": "test"}.get(top, "all")
    assert seen.ignored == hazard.ignored
    assert bool(hazard.warning) == bool(ended.warnings)
    assert re.search(hazard.warning, " ".join(ended.warnings))
    assert seen.failed.keys() == hazard.failed.keys()
    for path, reason in hazard.failed.items():
        assert re.search(reason, seen.failed[path])
        assert path in seen.failed[path]
    tally("folder hazards", "read rightly")


def test_names_that_are_not_utf8_go_all_the_way(tmp_path: Path, tally: Any) -> None:
    """Extract, cache, train, evaluate --csv, and back to the file."""
    wanted = set()
    dice = np.random.default_rng(0)
    for split in ("train", "valid", "test"):
        for label in ("a", "b"):
            for number in range(3):
                path = f"{split}/{label}/{NOT_UTF8}{number}\udce9.png"
                (tmp_path / "data" / path).parent.mkdir(parents=True, exist_ok=True)
                pixels = dice.integers(0, 256, (40, 40), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / path)
                wanted.add(path)
    for arguments in (
        ["extract", "data", "c.h5", *TINY],
        ["train", "c.h5", "run", "--hidden", "none", "--epochs", 1],
        ["evaluate", "run", "--csv", "e.csv", "--cache", "c.h5"],
    ):
        done = command(tmp_path, *arguments)
        assert done.code == 0, done.err
    with (tmp_path / "e.csv").open(encoding="utf-8", newline="") as file:
        found = {plain_cell(row["path"]) for row in csv.DictReader(file)}
    assert found == {path for path in wanted if path.startswith("test")}
    assert all((tmp_path / "data" / path).is_file() for path in found)
    facts = json.loads(command(tmp_path, "predict", "run", "--cache", "c.h5", "--json").out)
    assert {row["path"] for row in facts["predictions"]} == wanted
    tally("folder hazards", "names not UTF-8 came back", len(wanted))


def test_images_that_change_during_an_extraction_are_listed_failures(
    tmp_path: Path, tally: Any
) -> None:
    """Unreadable, vanished and turned into a pipe: each is a listed failure of the real command."""
    for number in range(30):
        (tmp_path / "data").mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{number:02}.png")
    ended = run_bounded(extract_changing, tmp_path)
    assert ended.error is None
    facts = json.loads(command(tmp_path, "info", "c.h5", "--json").out)
    failed = {row["path"]: row["reason"] for row in facts["failures"]}
    assert failed == {
        "03.png": "No such file or directory", "07.png": "not a regular file",
        "11.png": "Is a directory" if "director" in failed["11.png"] else "not a regular file",
    }  # fmt: skip
    assert facts["splits"]["all"]["num_samples"] == 27
    tally("folder hazards", "changed while extracting, listed", 3)


def extract_changing(folder: Path) -> None:
    """Extract, and change files once all have been scanned."""
    import tiny_network

    from featcache.extraction.extraction import extract

    def change(line: str) -> None:
        if line.startswith("Backbone:") and (folder / "data/03.png").exists():
            (folder / "data/03.png").unlink()
            (folder / "data/07.png").unlink()
            os.mkfifo(folder / "data/07.png")
            (folder / "data/11.png").unlink()
            (folder / "data/11.png").mkdir()

    backbone = tiny_network.build()
    extract(folder / "data", folder / "c.h5", backbone=backbone, max_errors=3, say=change)
