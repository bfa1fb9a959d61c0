"""A CSV and a zip give the samples that the folders do, or one clear error."""

import pickle
import stat
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from sample_folders import SPLIT_TABLE, SPLIT_TREE, plant, sheet, table

from featcache.csv_files import write_csv
from featcache.data.dataset import UNLABELLED, scan
from featcache.errors import DataError, FeatcacheWarning


def pack(place, *paths, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(place, "w", method) as archive:
        for path in paths:
            archive.writestr(path, "" if path.endswith("/") else path)
    return place


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
        ("file,target\ni/1.png,a\n", r"found 'file' \(path\?\).*--columns path=file"),
        ("number,target\ni/1.png,a\n", "found number, target.*--columns path=HEADER"),
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
    with pytest.warns(FeatcacheWarning, match="loose .*: 1 image of"):
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
