"""Nothing torn apart, nothing lost, near the fractions, the same everywhere, whole or absent."""

import hashlib
import json
import os
import random
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from sample_folders import PATIENT, plain, write_files

from featcache.data.dataset import scan
from featcache.data.splitting import split
from featcache.errors import FeatcacheWarning
from featcache.formatting import in_bytes

XRAYS = Path(__file__).resolve().parents[3] / "shared" / "data" / "xray-raw"
needs_links = pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")


def patients(root, seed=0):
    """Make two classes of patients with 1 to 12 images each, some of them in both classes."""
    generator = random.Random(seed)
    images = {}
    for patient in range(150):
        for number in range(min(12, 1 + int(generator.expovariate(0.5)))):
            label = generator.choice("ab") if patient < 20 else "ab"[patient % 3 == 0]
            images[f"{label}/p{patient}_{number}.png"] = None
    return write_files(root, images)


def table(dataset):
    return {
        (s.split, dataset.classes[s.target], s.path.rpartition("/")[2]) for s in dataset.samples
    }


def splits_of(dataset, key):
    """Return key -> the splits its samples stand in."""
    found = defaultdict(set)
    for sample in dataset.samples:
        found[key(sample)].add(sample.split)
    return found


def content_of(dataset):
    return lambda sample: hashlib.sha256(dataset.read(sample)).digest()


# Tree and manifest ---------------------------------------------------------------------------


def test_a_tree_holds_every_image_once(tmp_path):
    source = plain(tmp_path / "raw", covid=20, normal=40, other=9)
    lines = []
    summary = split(source, tmp_path / "new" / "dst", classes=["normal", "covid"], say=lines.append)
    dataset = scan(tmp_path / "new" / "dst")
    assert dataset.layout == "splits"
    assert dataset.classes == ("covid", "normal") == summary.classes
    assert Counter((s.split, dataset.classes[s.target]) for s in dataset.samples) == {
        ("train", "covid"): 14, ("valid", "covid"): 3, ("test", "covid"): 3,
        ("train", "normal"): 28, ("valid", "normal"): 6, ("test", "normal"): 6,
    }  # fmt: skip
    wanted = {f"covid/{n:03}.png" for n in range(20)} | {f"normal/{n:03}.png" for n in range(40)}
    assert {dataset.read(s).decode() for s in dataset.samples} == wanted
    assert {name.name for name in (tmp_path / "new").iterdir()} == {"dst"}
    assert (
        f"copying 60 images, {in_bytes(summary.image_bytes)}, to {tmp_path / 'new' / 'dst'}"
        in lines
    )
    assert "train: 42 images (14 covid, 28 normal)" in lines
    assert len(list(source.glob("*/*"))) == 69


def test_the_summary_is_json(tmp_path):
    summary = split(
        plain(tmp_path / "raw", a=10, b=10), tmp_path / "dst", fractions=(0.6, 0.2, 0.2)
    )
    assert json.loads(json.dumps(summary.as_dict(), allow_nan=False)) == {
        "destination": (tmp_path / "dst").as_posix(), "classes": ["a", "b"],
        "counts": {
            "train": {"a": 6, "b": 6}, "valid": {"a": 2, "b": 2}, "test": {"a": 2, "b": 2},
        },
        "num_groups": None, "num_matched": None, "num_ignored": {}, "ignored_endings": {},
        "num_identical": 0, "image_bytes": 180, "mode": "copy", "seed": 0,
    }  # fmt: skip


def test_a_manifest_moves_nothing_and_splits_alike(tmp_path):
    source = patients(tmp_path / "raw")
    before = sorted(source.rglob("*"))
    tree = split(source, tmp_path / "dst", group_by=PATIENT)
    (tmp_path / "lists").mkdir()
    manifest = split(source, tmp_path / "lists" / "m.csv", group_by=PATIENT)
    assert manifest.counts == tree.counts
    assert manifest.mode == "csv"
    assert sorted(source.rglob("*")) == before
    from_csv, from_tree = scan(tmp_path / "lists" / "m.csv"), scan(tmp_path / "dst")
    assert table(from_csv) == table(from_tree)
    assert all(s.path.startswith("../raw/") for s in from_csv.samples)
    assert all(s.group == s.path.rpartition("/")[2].partition("_")[0] for s in from_csv.samples)
    shutil.move(tmp_path / "raw", tmp_path / "lists" / "raw")
    split(tmp_path / "lists" / "raw", tmp_path / "lists" / "n.csv", group_by=PATIENT)
    shutil.move(tmp_path / "lists", tmp_path / "elsewhere")
    moved = scan(tmp_path / "elsewhere" / "n.csv")
    assert table(moved) == table(from_tree)
    assert moved.read(moved.samples[0])


@needs_links
def test_a_manifest_in_a_linked_folder_finds_its_images(tmp_path):
    source = plain(tmp_path / "raw", a=5, b=5)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    (tmp_path / "deep" / "er" / "data").symlink_to(source)
    split(tmp_path / "link" / "data", tmp_path / "link" / "m.csv")
    dataset = scan(tmp_path / "link" / "m.csv")
    assert len({dataset.read(s) for s in dataset.samples}) == 10
    assert all(s.path.startswith("../../raw/") for s in dataset.samples)


def test_a_manifest_without_groups_leaves_them_open(tmp_path):
    split(plain(tmp_path / "raw", a=5, b=5), tmp_path / "m.csv")
    text = (tmp_path / "m.csv").read_text()
    assert text.startswith("path,target,split,group\nraw/a/")
    assert {s.group for s in scan(tmp_path / "m.csv").samples} == {None}


def test_names_like_formulas_survive_the_manifest(tmp_path):
    names = ("-1.png", "=2.png", " @3.png", "+4.png", "'5.png", "a,6.png", 'q"7.png', "8\n.png")
    names = [name for name in names if os.name != "nt" or not set(name) & set('"\n')]
    write_files(tmp_path, {f"{label}/{name}": None for label in ("-a", "b") for name in names})
    for source, destination in ((tmp_path, tmp_path / "m.csv"), (tmp_path / "-a" / "..", "m.csv")):
        split(source, tmp_path / destination)
        dataset = scan(tmp_path / "m.csv")
        assert dataset.classes == ("-a", "b")
        assert sorted(dataset.read(s) for s in dataset.samples) == sorted(
            f"{label}/{name}".encode() for label in ("-a", "b") for name in names
        )
        (tmp_path / "m.csv").unlink()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_names_that_are_not_utf8(tmp_path):
    source = plain(tmp_path / "raw", a=4, b=4)
    Path(os.fsdecode(os.fsencode(source) + b"/a/bad\xff.png")).write_bytes(b"odd")
    split(source, tmp_path / "dst")
    assert len(scan(tmp_path / "dst").samples) == 9
    split(source, tmp_path / "m.csv")
    (tmp_path / "m.csv").read_text("utf-8")
    dataset = scan(tmp_path / "m.csv")
    (odd,) = (s for s in dataset.samples if "bad" in s.path)
    assert (odd.path, dataset.read(odd)) == ("raw/a/bad\udcff.png", b"odd")


@needs_links
@pytest.mark.parametrize("mode", ["symlink", "hardlink"])
def test_links_take_no_room_and_read_alike(tmp_path, mode, monkeypatch):
    source = plain(tmp_path / "raw", a=10, b=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: pytest.fail("not asked for"))
    monkeypatch.chdir(tmp_path)
    lines = []
    assert split("raw", "dst", mode=mode, say=lines.append).mode == mode
    assert not any("copying" in line for line in lines)
    monkeypatch.chdir("/")
    dataset = scan(tmp_path / "dst")
    assert {dataset.read(s).decode() for s in dataset.samples} == {
        path.relative_to(source).as_posix() for path in source.glob("*/*")
    }
    for path in (tmp_path / "dst").glob("*/*/*"):
        assert path.is_symlink() == (mode == "symlink")
        assert path.samefile(
            source / path.relative_to(tmp_path / "dst").relative_to(path.parts[-3])
        )
    # A tree of links can be split again, to links to the files themselves.
    again = tmp_path / "again"
    split(tmp_path / "dst" / "train", again, mode=mode)
    shutil.rmtree(tmp_path / "dst")
    assert all(path.read_bytes() for path in again.glob("*/*/*"))


def test_nested_files_of_equal_names_stay_apart(tmp_path):
    paths = [f"{label}/{folder}/x.png" for label in "ab" for folder in "123456"]
    split(write_files(tmp_path / "raw", dict.fromkeys(paths)), tmp_path / "dst")
    dataset = scan(tmp_path / "dst")
    assert sorted(dataset.read(s).decode() for s in dataset.samples) == paths
    assert dataset.classes == ("a", "b")


def test_copies_keep_the_time(tmp_path):
    source = plain(tmp_path / "raw", a=3, b=3)
    os.utime(source / "a" / "001.png", ns=(10**18, 10**18))
    split(source, tmp_path / "dst")
    copied = next((tmp_path / "dst").glob("*/a/001.png"))
    assert copied.stat().st_mtime_ns == 10**18


# Nothing torn apart --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together_also_across_classes(tmp_path, seed):
    source = patients(tmp_path / "raw", seed)
    summary = split(source, tmp_path / "m.csv", group_by=PATIENT, seed=seed)
    dataset = scan(tmp_path / "m.csv")
    groups = splits_of(dataset, lambda s: s.group)
    assert all(len(splits) == 1 for splits in groups.values())
    classes = defaultdict(set)
    for sample in dataset.samples:
        classes[sample.group].add(sample.target)
    assert sum(len(targets) == 2 for targets in classes.values()) >= 5
    assert summary.num_groups == len(groups)
    assert summary.num_matched == dict(
        sorted(Counter(dataset.classes[s.target] for s in dataset.samples).items())
    )


@pytest.mark.parametrize("seed", range(5))
def test_uneven_groups_come_near_the_fractions(tmp_path, seed):
    source = patients(tmp_path / "raw", seed)
    counts = split(source, tmp_path / "m.csv", group_by=PATIENT, seed=seed).counts
    for label in "ab":
        total = sum(counts[name][label] for name in counts)
        for name, share in (("train", 0.7), ("valid", 0.15), ("test", 0.15)):
            assert abs(counts[name][label] - share * total) <= 2, (name, label, counts)


@pytest.mark.parametrize("count", [10, 11, 84, 200, 333])
def test_single_images_meet_the_fractions(tmp_path, count):
    source = plain(tmp_path / "raw", a=count, b=50)
    counts = split(source, tmp_path / "m.csv", fractions=(0.7, 0.2, 0.1)).counts
    for name, share in (("train", 0.7), ("valid", 0.2), ("test", 0.1)):
        assert abs(counts[name]["a"] - share * count) < 1
    assert [counts[name]["b"] for name in counts] == [35, 10, 5]


def test_identical_files_stay_together_and_join_groups(tmp_path):
    images = {f"{label}/p{n}_{i}.png": None for label in "ab" for n in range(40) for i in range(2)}
    images = {path.replace("b/p", "b/p1") if path[0] == "b" else path: None for path in images}
    generator = random.Random(3)
    names = sorted(images)
    for number in range(25):  # the same picture under other names, patients and sizes of class
        for path in generator.sample([n for n in names if n[0] == "ab"[number % 2]], 2):
            images[path] = f"picture {number:02}"
    source = write_files(tmp_path / "raw", images)
    for group_by in (None, PATIENT):
        lines = []
        summary = split(source, tmp_path / "m.csv", group_by=group_by, say=lines.append)
        dataset = scan(tmp_path / "m.csv")
        twins = splits_of(dataset, content_of(dataset))
        assert len(twins) < len(dataset.samples)
        assert all(len(splits) == 1 for splits in twins.values())
        assert f"{summary.num_identical} images have a byte-identical copy" in "\n".join(lines)
        contents = Counter(map(content_of(dataset), dataset.samples))
        assert summary.num_identical == sum(n for n in contents.values() if n > 1)
        if group_by:
            groups = splits_of(dataset, lambda s: s.group)
            assert all(len(splits) == 1 for splits in groups.values())
        (tmp_path / "m.csv").unlink()


def test_the_same_picture_in_two_classes_is_warned_of(tmp_path):
    source = plain(tmp_path / "raw", a=9, b=9)
    twins = dict.fromkeys(("a/twin.png", "b/twin.png", "b/twin2.png"), "same")
    write_files(source, twins | {"a/other.png": "other", "b/other.png": "other"})
    with pytest.warns(
        FeatcacheWarning,
        match=r"5 images \(2 different by content\) .* another class.* a/other.png = b/other.png",
    ):
        split(source, tmp_path / "m.csv")
    dataset = scan(tmp_path / "m.csv")
    assert len({s.split for s in dataset.samples if "twin" in s.path}) == 1


# The same everywhere -------------------------------------------------------------------------


def test_only_seed_and_paths_decide(tmp_path, monkeypatch):
    first = patients(tmp_path / "raw")
    other = tmp_path / "other" / "place"
    files = sorted(first.glob("*/*"), reverse=True)
    random.Random(0).shuffle(files)
    for path in files:
        copy = other / path.relative_to(first)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    split(first, tmp_path / "1.csv", group_by=PATIENT)
    scandir = os.scandir

    class Backwards(list):
        __enter__ = list.__iter__

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", lambda path: Backwards(list(scandir(path))[::-1]))
    split(other, tmp_path / "2.csv", group_by=PATIENT)
    split(first, tmp_path / "3.csv", group_by=PATIENT, seed=1)
    monkeypatch.undo()
    tables = [table(scan(tmp_path / f"{n}.csv")) for n in (1, 2, 3)]
    assert tables[0] == tables[1]
    assert len(tables[0] & tables[2]) < 0.8 * len(tables[0])


def test_the_split_of_a_seed_never_changes(tmp_path):
    """Splits are written into papers: this one must be the same in every later version."""
    split(plain(tmp_path / "raw", a=10, b=10), tmp_path / "m.csv", seed=7)
    dataset = scan(tmp_path / "m.csv")
    held_out = [s.path[4:] for s in dataset.samples if s.split != "train"]
    assert held_out == [
        "a/000.png",
        "b/000.png",
        "b/003.png",
        "a/006.png",
        "a/007.png",
        "b/001.png",
    ]


# Real X-rays ---------------------------------------------------------------------------------


@pytest.mark.xray
def test_real_xrays_no_patient_in_two_splits(tmp_path):
    if not XRAYS.is_dir():
        pytest.skip(f"no real X-rays at {XRAYS}")
    summaries = []
    for name in ("dst", "m.csv"):
        with pytest.warns(FeatcacheWarning, match="matches no file name of covid"):
            summaries.append(
                split(
                    XRAYS,
                    tmp_path / name,
                    classes=["covid", "normal"],
                    group_by=r"^(\d{8})_",
                    mode="symlink" if os.name != "nt" else "copy",
                )
            )
    tree, manifest = summaries
    assert tree.counts == manifest.counts == {
        "train": {"covid": 59, "normal": 140},
        "valid": {"covid": 12, "normal": 30},
        "test": {"covid": 13, "normal": 30},
    }  # fmt: skip
    assert tree.num_matched == {"covid": 0, "normal": 200}
    assert tree.image_bytes == sum(
        path.stat().st_size for c in ("covid", "normal") for path in (XRAYS / c).iterdir()
    )
    dataset = scan(tmp_path / "dst", group_by=r"^(\d{8})_")
    assert len(dataset.samples) == 284
    assert dataset.num_grouped == 200
    normal = [s for s in dataset.samples if dataset.classes[s.target] == "normal"]
    patients_of = defaultdict(set)
    for sample in normal:
        patients_of[Path(sample.path).name[:8]].add(sample.split)
    assert len(patients_of) == 159 < len(normal) == 200
    assert all(len(splits) == 1 for splits in patients_of.values())
    assert table(scan(tmp_path / "m.csv")) == table(dataset)
