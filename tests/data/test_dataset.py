"""Folders, CSVs and zips of every shape people have -> the right samples, or one clear error."""

import os
import pickle
import stat
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from featcache.data.dataset import UNLABELLED, ImageDataset, Sample, list_images, scan
from featcache.errors import ConfigError, DataError, FeatcacheWarning
from featcache.files import write_csv

needs_posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX file names, links and pipes")


def plant(root, *paths):
    """Make files (their content is their own path) and, for names ending in /, folders."""
    for path in paths:
        place = root / path
        if path.endswith("/"):
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(path, encoding="utf-8")
    return root


def pack(place, *paths, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(place, "w", method) as archive:
        for path in paths:
            archive.writestr(path, "" if path.endswith("/") else path)
    return place


def table(dataset):
    """Return (split, class, path) of every sample."""
    return [
        (s.split, dataset.classes[s.target] if s.target != UNLABELLED else None, s.path)
        for s in dataset.samples
    ]


SPLIT_TREE = (
    "train/covid/a.png", "train/covid/b.PNG", "train/normal/c.jpg",
    "val/covid/d.jpeg", "val/normal/e.tif", "test/covid/f.bmp", "test/normal/g.webp",
)  # fmt: skip
SPLIT_TABLE = [
    ("train", "covid", "train/covid/a.png"),
    ("train", "covid", "train/covid/b.PNG"),
    ("train", "normal", "train/normal/c.jpg"),
    ("valid", "covid", "val/covid/d.jpeg"),
    ("valid", "normal", "val/normal/e.tif"),
    ("test", "covid", "test/covid/f.bmp"),
    ("test", "normal", "test/normal/g.webp"),
]


# Layouts -------------------------------------------------------------------------------------


def test_split_folders(tmp_path):
    dataset = scan(plant(tmp_path, *SPLIT_TREE))
    assert dataset.layout == "splits"
    assert dataset.classes == ("covid", "normal")
    assert dataset.splits == ("train", "valid", "test")
    assert table(dataset) == SPLIT_TABLE
    assert dataset.num_ignored == {}
    assert dataset.num_grouped is None
    sample = dataset.split("test")[0]
    status = (tmp_path / sample.path).stat()
    assert sample == Sample("test/covid/f.bmp", 0, "test", None, status.st_size, status.st_mtime_ns)
    assert dataset.read(sample) == b"test/covid/f.bmp"
    with pytest.raises(DataError, match="one of train, valid, test, found all"):
        dataset.split("all")


def test_class_folders_with_folders_in_them(tmp_path):
    dataset = scan(plant(tmp_path, "b/1.png", "a/deep/er/2.png", "a/3.png", "a/none/"))
    assert (dataset.layout, dataset.splits) == ("classes", ("all",))
    assert table(dataset) == [
        ("all", "a", "a/3.png"), ("all", "a", "a/deep/er/2.png"), ("all", "b", "b/1.png"),
    ]  # fmt: skip


def test_flat_images_are_unlabelled(tmp_path):
    dataset = scan(plant(tmp_path, "2.png", "10.png", "notes.txt"))
    assert (dataset.layout, dataset.classes) == ("images", ())
    assert table(dataset) == [("all", None, "10.png"), ("all", None, "2.png")]
    assert dataset.num_ignored == {"not an image ending": 1}


def test_an_unlabelled_test_split_is_taken(tmp_path):
    dataset = scan(plant(tmp_path, "train/a/1.png", "train/b/2.png", "test/3.png"))
    assert table(dataset)[-1] == ("test", None, "test/3.png")
    assert dataset.classes == ("a", "b")


def test_names_of_splits_in_any_case(tmp_path):
    dataset = scan(plant(tmp_path, "Train/a/1.png", "VALIDATION/a/2.png", "Test/a/3.png"))
    assert dataset.splits == ("train", "valid", "test")


def test_classes_and_paths_sort_as_strings_and_bytes(tmp_path):
    plant(tmp_path, "10/a.png", "2/a.png", "9/a.png", "9/Z.png", "9/é.png", "9/z.png")
    dataset = scan(tmp_path)
    assert dataset.classes == ("10", "2", "9")
    assert [s.path for s in dataset.samples] == [
        "10/a.png", "2/a.png", "9/Z.png", "9/a.png", "9/z.png", "9/é.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ((*SPLIT_TREE, "extra/a/1.png"), r"no others, found 'extra'"),
        ((*SPLIT_TREE, "valid/covid/1.png"), "expected one valid, found val and valid"),
        (("Training/a/1.png", "Testing/a/1.png"), "found 'Testing', 'Training'"),
        (("train/a/1.png", "Testing/a/1.png"), "found 'Testing'"),
        (("train/a/1.png", "train/b/1.png", "test/a/1.png"), "'b' in train but not in test"),
        (("train/a/1.png", "test/a/1.png", "test/new/1.png"), "'new' in test but not in train"),
        (("a/1.png", "b/"), r"at least one image, found none \(.*b\)"),
        (("a/1.png", "b/x.dcm"), r"none \(ignored: 1 x not an image ending\) \(.*b\)"),
        (("train/a/1.png", "test/"), r"at least one image, found none \(.*test\)"),
        (("train/a/1.png", "test/a/1.png", "test/b/", "train/b/2.png"), r"\(.*test.b\)"),
        (("COVID/1.png", "covid/1.png"), "found 'COVID' and 'covid'"),
        (("covid /1.png", "covid/1.png"), "found 'covid' and 'covid '"),
        (("x.txt",), "at least one image"),
        ((), "at least one image"),
    ],
)
def test_contradicting_folders_are_named(tmp_path, paths, message):
    if os.name == "nt" and len({path.split("/")[0].strip().lower() for path in paths}) < 2:
        pytest.skip("needs case-sensitive names")
    with pytest.raises(DataError, match=message):
        scan(plant(tmp_path, *paths))


def test_what_is_no_data_is_refused(tmp_path):
    with pytest.raises(DataError, match="nothing there"):
        scan(tmp_path / "missing")
    plant(tmp_path, "a.png")
    with pytest.raises(DataError, match="another kind of file"):
        scan(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="--limit"):
        scan(tmp_path, limit=0)


@pytest.mark.parametrize("tree", [("a/1.png", "b/1.png"), SPLIT_TREE])
def test_loose_images_are_counted_and_warned_of(tmp_path, tree):
    plant(tmp_path, *tree, "loose.png", "overview.jpg")
    with pytest.warns(FeatcacheWarning, match="2 images .* lie loose"):
        dataset = scan(tmp_path)
    assert dataset.num_ignored == {"loose beside folders": 2}
    assert len(dataset.samples) == len(tree)


def test_loose_images_inside_a_split(tmp_path):
    plant(tmp_path, *SPLIT_TREE, "test/loose.png")
    with pytest.warns(FeatcacheWarning, match="1 images"):
        assert table(scan(tmp_path)) == SPLIT_TABLE


# What is no image ----------------------------------------------------------------------------


def test_hidden_and_system_names_are_no_classes(tmp_path):
    plant(
        tmp_path, "a/1.png", "a/._1.png", "a/.2.png", ".ipynb_checkpoints/3.png",
        "__MACOSX/a/4.png", "a/.ipynb_checkpoints/5.png", ".git/x", "a/Thumbs.db", "a/png",
    )  # fmt: skip
    dataset = scan(tmp_path)
    assert table(dataset) == [("all", "a", "a/1.png")]
    assert dataset.num_ignored == {"hidden": 6, "not an image ending": 2}


@needs_posix
def test_links_pipes_and_odd_names_neither_hang_nor_count(tmp_path):
    plant(tmp_path, "data/a/1.png", "data/b/2.png", "outside/3.png", "outside/notes.txt")
    root = tmp_path / "data"
    (root / "a/linked.png").symlink_to(tmp_path / "outside/3.png")  # taken
    (root / "a/dead.png").symlink_to(tmp_path / "nowhere.png")
    (root / "a/circle.png").symlink_to(root / "a/circle.png")
    (root / "a/loop").symlink_to(root)
    (root / "again").symlink_to(root / "a")
    (root / "a/folder.png").symlink_to(tmp_path / "outside")
    os.mkfifo(root / "a/pipe.png")
    (root / "b/pipe_link.png").symlink_to(root / "a/pipe.png")
    (root / "b/null.png").symlink_to("/dev/zero")
    (root / "b/notes.png.txt").symlink_to(tmp_path / "outside/notes.txt")
    (root / "b/folder.jpg").mkdir()
    odd = os.fsencode(root / "a") + b"/bad\xff\xfe.png"
    Path(os.fsdecode(odd)).write_bytes(b"odd")
    odd_folder = Path(os.fsdecode(os.fsencode(root) + b"/class\xff"))
    odd_folder.mkdir()
    (odd_folder / "x.png").write_bytes(b"x")
    dataset = scan(root)
    assert table(dataset) == [
        ("all", "a", "a/1.png"), ("all", "a", "a/bad\udcff\udcfe.png"),
        ("all", "a", "a/linked.png"), ("all", "b", "b/2.png"),
    ]  # fmt: skip
    assert dataset.num_ignored == {
        "link to nothing": 2, "link to a folder": 3, "link to no regular file": 2,
        "not a regular file": 1, "not an image ending": 1, "folder name not UTF-8": 1,
    }  # fmt: skip
    assert [dataset.read(s) for s in dataset.samples] == [
        b"data/a/1.png", b"odd", b"outside/3.png", b"data/b/2.png",
    ]  # fmt: skip


@needs_posix
def test_a_file_that_changed_into_something_else_does_not_block(tmp_path):
    dataset = scan(plant(tmp_path, "1.png", "2.png", "3.png"))
    for name in ("1.png", "2.png", "3.png"):
        (tmp_path / name).unlink()
    os.mkfifo(tmp_path / "1.png")
    (tmp_path / "2.png").mkdir()
    for sample in dataset.samples:
        with pytest.raises(DataError, match=r"\d\.png\)\. Scan again"):
            dataset.read(sample)


@needs_posix
def test_unreadable_folders_are_named(tmp_path, monkeypatch):
    plant(tmp_path, "a/1.png")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        scan(tmp_path)


# Groups and limits ---------------------------------------------------------------------------


def test_groups_come_from_file_names(tmp_path):
    plant(tmp_path, "00000001/00000007_000.png", "b/00000007_001.png", "b/x_00000009_1.png")
    dataset = scan(tmp_path, group_by=r"^(\d{8})_")
    assert [s.group for s in dataset.samples] == ["00000007", "00000007", "b/x_00000009_1.png"]
    assert dataset.num_grouped == 2
    anywhere = scan(tmp_path, group_by=r"(\d{8})(_)")
    assert [s.group for s in anywhere.samples] == ["00000007", "00000007", "00000009"]
    empty = scan(tmp_path, group_by=r"^x(_0)?|^()")
    assert [s.group for s in empty.samples][:2] == [s.path for s in empty.samples][:2]
    assert empty.num_grouped == 1


@pytest.mark.parametrize("group_by", ["([", r"\d+", "(?:a)"])
def test_a_regular_expression_without_group_is_refused(tmp_path, group_by):
    with pytest.raises(ConfigError, match="--group-by"):
        scan(plant(tmp_path, "a/1.png"), group_by=group_by)


def test_limit_is_spread_over_splits_and_classes(tmp_path):
    for split, count in (("train", 20), ("test", 3)):
        plant(tmp_path, *(f"{split}/a/{n:02}.png" for n in range(count)))
        plant(tmp_path, *(f"{split}/b/{n:02}.png" for n in range(2 * count)))
    whole = scan(tmp_path)
    assert scan(tmp_path, limit=10**6) == whole
    some = scan(tmp_path, limit=14)
    assert [s.path for s in some.samples] == [
        *(f"train/a/{n:02}.png" for n in range(4)), *(f"train/b/{n:02}.png" for n in range(4)),
        *(f"test/a/{n:02}.png" for n in range(3)), *(f"test/b/{n:02}.png" for n in range(3)),
    ]  # fmt: skip
    assert some.classes == whole.classes
    assert len(scan(tmp_path, limit=1).samples) == 1
    assert scan(tmp_path, limit=5, group_by="(0)").num_grouped == 5


# CSV -----------------------------------------------------------------------------------------


def sheet(tmp_path, text, *paths, name="table.csv", encoding="utf-8"):
    plant(tmp_path, *(paths or ("i/1.png", "i/2.png", "i/3.png", "i/4.png")))
    (tmp_path / name).write_text(text, encoding=encoding, newline="")
    return tmp_path / name


def test_csv_with_every_column(tmp_path):
    absolute = tmp_path / "i/4.png"
    plant(tmp_path, "i/4.png")
    text = (
        "\ufeffgroup,path,split,target,remark\r\n"
        "p1,i/1.png,val,7,x\r\n\r\n"
        'p1,"i/2.png",train,10,"a,b"\r\n'
        ",./i/3.png,train,7,\r\n"
        f"p2,{absolute},valid,10,\r\n"
    )
    dataset = scan(sheet(tmp_path, text))
    assert dataset.layout == "csv"
    assert dataset.classes == ("10", "7")
    assert [(s.path, s.target, s.split, s.group) for s in dataset.samples] == [
        ("./i/3.png", 1, "train", "./i/3.png"),
        ("i/2.png", 0, "train", "p1"),
        (str(absolute), 0, "valid", "p2"),
        ("i/1.png", 1, "valid", "p1"),
    ]
    assert dataset.read(dataset.samples[0]) == b"i/3.png"
    assert dataset.read(dataset.samples[2]) == b"i/4.png"
    other = scan(tmp_path / "table.csv", group_by=r"(\d)")
    assert [s.group for s in other.samples] == ["3", "2", "4", "1"]


def test_csv_of_paths_alone(tmp_path):
    dataset = scan(sheet(tmp_path, "path\ni/2.png\ni/1.png\n"))
    assert (dataset.classes, dataset.splits) == ((), ("all",))
    assert [(s.path, s.target, s.group) for s in dataset.samples] == [
        ("i/1.png", UNLABELLED, None), ("i/2.png", UNLABELLED, None),
    ]  # fmt: skip


def test_csv_may_leave_targets_open(tmp_path):
    dataset = scan(sheet(tmp_path, "path,target\ni/1.png,a\ni/2.png,\n"))
    assert table(dataset) == [("all", "a", "i/1.png"), ("all", None, "i/2.png")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "path and, if known"),
        ("file,target\ni/1.png,a\n", "found file, target"),
        ("path;target\ni/1.png;a\n", "found path;target"),
        ("path,path\ni/1.png,a\n", "once each"),
        ("path\n", "at least one image"),
        ("path\ni/1.png\ni/2.png\ni/1.png\n", "every path once, found i/1.png twice"),
        ("path\ni/1.png\n./i/../i/1.png\n", "twice"),
        ("path\ni/1.png\nx.png\ny.png\nz.png\nw.png\n", "4 of 5 missing: x.png, y.png, z.png"),
        ("path\ni\n", "1 of 1 missing: i"),
        ("path\n\0\n", "CSV line 2: .* without NUL"),
        ("path,target\ni/1.png\n", "CSV line 2: expected 2 cells.* found i/1.png"),
        ("path,target\n,a\n", "CSV line 2"),
        ("path,split\ni/1.png,dev\n", "expected train, valid or test, found 'dev'"),
        ("path,target,split\ni/1.png,a,train\ni/2.png,b,test\n", "'a' in train but not in test"),
        ("path,target\ni/1.png,a\ni/2.png,A\n", "'A' and 'a'"),
    ],
)
def test_bad_csvs_are_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        scan(sheet(tmp_path, text))


def test_csv_must_be_utf8(tmp_path):
    with pytest.raises(DataError, match="expected UTF-8 text"):
        scan(sheet(tmp_path, "path\ni/é.png\n", encoding="latin-1"))


def test_names_like_formulas_come_back_from_our_own_csv(tmp_path):
    plant(tmp_path, "1.png", "2.png")
    write_csv(tmp_path / "t.csv", ("path", "target", "group"), [
        ("1.png", "-a", "=g"), ("2.png", "b", "@"),
    ])  # fmt: skip
    dataset = scan(tmp_path / "t.csv")
    assert dataset.classes == ("-a", "b")
    assert [s.group for s in dataset.samples] == ["=g", "@"]


# Zip -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", ["", "data set/", "./"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_of_the_folders_equals_the_folders(tmp_path, top, method):
    noise = ("__MACOSX/._x.png", ".DS_Store", top + "train/covid/._a.png", top + "readme.txt")
    place = pack(tmp_path / "d.zip", *(top + path for path in SPLIT_TREE), *noise, method=method)
    dataset = scan(place)
    assert dataset.layout == "zip"
    assert table(dataset) == SPLIT_TABLE
    assert [dataset.read(s) for s in dataset.samples] == [
        (top + s.path).encode() for s in dataset.samples
    ]
    assert dataset.num_ignored == {"hidden": 3, "not an image ending": 1}
    assert {s.image_bytes for s in dataset.samples} == {len(top + p) for p in SPLIT_TREE}


def test_zip_layouts(tmp_path):
    assert table(scan(pack(tmp_path / "1.zip", "a/1.png", "b/1.png")))[0][1] == "a"
    assert scan(pack(tmp_path / "2.zip", "1.png", "2.png")).classes == ()
    assert scan(pack(tmp_path / "3.zip", "top/1.png", "top/2.png")).classes == ()
    only_train = scan(pack(tmp_path / "4.zip", "train/a/1.png", "train/b/1.png"))
    assert (only_train.splits, only_train.classes) == (("train",), ("a", "b"))
    with pytest.warns(FeatcacheWarning, match="1 images .* loose"):
        beside = scan(pack(tmp_path / "9.zip", "top/1.png", "2.png"))
    assert table(beside) == [("all", "top", "top/1.png")]
    windows = scan(pack(tmp_path / "5.zip", "a\\1.png", "b\\2.png"))
    assert windows.classes == ("a", "b")
    with pytest.raises(DataError, match=r"at least one image.*b\)"):
        scan(pack(tmp_path / "6.zip", "top/a/1.png", "top/b/"))
    with pytest.raises(DataError, match="'b' in train but not in test"):
        scan(pack(tmp_path / "7.zip", "train/a/1.png", "train/b/1.png", "test/a/1.png"))
    grouped = scan(pack(tmp_path / "8.zip", "a/7_1.png", "b/x.png"), group_by=r"(\d)_", limit=2)
    assert [s.group for s in grouped.samples] == ["7", "b/x.png"]


def test_zip_links_and_devices_are_ignored(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("a/1.png", "1")
        for name, kind in (("a/2.png", stat.S_IFLNK), ("a/3.png", stat.S_IFIFO)):
            info = zipfile.ZipInfo(name)
            info.external_attr = (kind | 0o644) << 16
            archive.writestr(info, "/etc/passwd")
    dataset = scan(tmp_path / "d.zip")
    assert [s.path for s in dataset.samples] == ["1.png"]  # in the one top folder
    assert dataset.num_ignored == {"link": 1, "not a regular file": 1}


def test_zip_damage_is_noticed(tmp_path):
    place = pack(tmp_path / "d.zip", "a/1.png", "b/1.png")
    dataset = scan(place)
    whole = place.read_bytes()
    first = dataset.samples[0]
    for position in (0, 40, 41):
        data = bytearray(whole)
        data[position] ^= 0x40
        place.write_bytes(data)
        with pytest.raises(DataError, match=r"a/1\.png"):
            dataset.read(first)
    place.write_bytes(whole[:20])
    with pytest.raises(DataError, match=r"a/1\.png"):
        dataset.read(first)
    with pytest.raises(DataError, match="a whole zip file"):
        scan(place)
    place.unlink()
    with pytest.raises(DataError, match="No such file"):
        dataset.read(first)


def test_a_zip_we_do_not_trust_is_refused_whole(tmp_path):
    with pytest.raises(DataError, match="a name inside the zip"):
        scan(pack(tmp_path / "d.zip", "a/1.png", "b/1.png", "../c.png"))
    with pytest.warns(UserWarning, match="Duplicate name"):
        pack(tmp_path / "d.zip", "a/1.png", "b/1.png", "readme.txt", "a/1.png", "readme.txt")
    with pytest.raises(DataError, match="every name once"):
        scan(tmp_path / "d.zip")
    with zipfile.ZipFile(tmp_path / "d.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a/readme.txt", "not asked for, so not checked")
        archive.writestr("a/1.png", "1", compress_type=zipfile.ZIP_STORED)
    assert [s.path for s in scan(tmp_path / "d.zip").samples] == ["1.png"]


# Counts --------------------------------------------------------------------------------------


def test_counts_are_those_of_the_samples(tmp_path):
    dataset = scan(plant(tmp_path, *SPLIT_TREE))
    assert list(dataset.count().items()) == [
        ("train", {"covid": 2, "normal": 1}), ("valid", {"covid": 1, "normal": 1}),
        ("test", {"covid": 1, "normal": 1}),
    ]  # fmt: skip
    (tmp_path / "test" / "covid" / "f.bmp").rename(tmp_path / "test" / "f.bmp")
    (tmp_path / "test" / "normal" / "g.webp").rename(tmp_path / "test" / "g.webp")
    for name in ("covid", "normal"):
        (tmp_path / "test" / name).rmdir()
    assert scan(tmp_path).count()["test"] == {"unlabelled": 2}


def test_a_class_called_unlabelled_loses_no_sample(tmp_path):
    text = "path,target\ni/1.png,unlabelled\ni/2.png,\ni/3.png,b\n"
    counts = scan(sheet(tmp_path, text)).count()
    assert counts == {"all": {"unlabelled": 2, "b": 1}}


# Reading from many places --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "zip", "csv"])
def test_pickled_and_read_by_many_threads(tmp_path, kind):
    names = [f"{'ab'[n % 2]}/{n:03}.png" for n in range(200)]
    plant(tmp_path / "data", *names)
    if kind == "zip":
        place = pack(tmp_path / "d.zip", *names)
    elif kind == "csv":
        place = sheet(tmp_path / "data", "path\n" + "\n".join(names), *names)
    else:
        place = tmp_path / "data"
    dataset = pickle.loads(pickle.dumps(scan(place)))
    assert dataset == scan(place)
    start = threading.Barrier(8)

    def work(_):
        start.wait()
        return [dataset.read(s).decode() == s.path for s in dataset.samples]

    with ThreadPoolExecutor(8) as pool:
        assert all(all(right) for right in pool.map(work, range(8)))


def test_reading_a_zip_does_not_parse_its_directory_again(tmp_path, monkeypatch):
    dataset = scan(pack(tmp_path / "d.zip", "a/1.png", "b/1.png"))
    monkeypatch.setattr(zipfile, "ZipFile", None)
    assert dataset.read(dataset.samples[1]) == b"b/1.png"


# Lists of images -----------------------------------------------------------------------------


def test_list_images(tmp_path, monkeypatch):
    plant(tmp_path, "x/1.png", "x/deep/2.jpg", "x/.hidden.png", "x/notes.txt", "odd.name")
    folder, file = tmp_path / "x", tmp_path / "odd.name"
    dataset = list_images([folder, str(file), folder / "1.png"])
    assert isinstance(dataset, ImageDataset)
    assert (dataset.layout, dataset.classes, dataset.splits) == ("images", (), ("all",))
    wanted = [file, folder / "1.png", folder / "deep/2.jpg"]
    assert [s.path for s in dataset.samples] == [path.as_posix() for path in wanted]
    assert {s.target for s in dataset.samples} == {UNLABELLED}
    assert [dataset.read(s) for s in dataset.samples] == [path.read_bytes() for path in wanted]
    assert dataset.num_ignored == {"hidden": 1, "not an image ending": 1}
    monkeypatch.chdir(tmp_path)
    assert [s.path for s in list_images(["x"]).samples] == ["x/1.png", "x/deep/2.jpg"]
    monkeypatch.chdir(folder)
    here = list_images(["."])
    assert [s.path for s in here.samples] == ["1.png", "deep/2.jpg"]
    assert here.read(here.samples[0]) == b"x/1.png"


@needs_posix
def test_list_images_refuses_what_is_none(tmp_path):
    plant(tmp_path, "empty/")
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in (
        ("missing.png", "nothing there"),
        ("empty", "expected images, found none"),
        ("pipe.png", "no regular file"),
    ):
        with pytest.raises(DataError, match=message):
            list_images([tmp_path / name])
