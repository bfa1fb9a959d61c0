"""Folders, CSVs and zips of every shape people have -> the right samples, or one clear error."""

import os
from pathlib import Path

import pytest
from sample_folders import SPLIT_TABLE, SPLIT_TREE, plant, sheet, table

from featcache.data.dataset import UNLABELLED, ImageDataset, Sample, scan
from featcache.data.image_lists import list_images
from featcache.errors import ConfigError, DataError, FeatcacheWarning

needs_posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX file names, links and pipes")


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
        (("a/1.png", "b/x.gif"), r"none \(ignored: 1 x not an image ending: 1 \.gif\) \(.*b\)"),
        (("train/a/1.png", "test/"), r"at least one image, found none \(.*test\)"),
        (("train/a/1.png", "test/a/1.png", "test/b/", "train/b/2.png"), r"\(.*test.b\)"),
        (("COVID/1.png", "covid/1.png"), "found 'COVID' and 'covid'"),
        (("covid /1.png", "covid/1.png"), "found 'covid' and 'covid '"),
        (("caf\u00e9/1.png", "cafe\u0301/2.png"), r"found 'cafe\\u0301' and 'caf\\xe9', which"),
        (("train/caf\u00e9/1.png", "test/cafe\u0301/2.png"), "expected names in one Unicode form"),
        (("x.txt",), "at least one image"),
        ((), "at least one image"),
    ],
)
def test_contradicting_folders_are_named(tmp_path, paths, message):
    if os.name == "nt" and len({path.split("/")[0].strip().lower() for path in paths}) < 2:
        pytest.skip("needs case-sensitive names")
    with pytest.raises(DataError, match=message):
        scan(plant(tmp_path, *paths))


def test_a_source_that_is_not_a_data_set_is_refused(tmp_path):
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
    with pytest.warns(FeatcacheWarning, match="not used: 2 images"):
        dataset = scan(tmp_path)
    assert dataset.num_ignored == {"loose beside folders": 2}
    assert len(dataset.samples) == len(tree)


def test_loose_images_inside_a_split(tmp_path):
    plant(tmp_path, *SPLIT_TREE, "test/loose.png")
    with pytest.warns(FeatcacheWarning, match="1 image"):
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
    odd_folder = Path(os.fsdecode(os.fsencode(root) + b"/b/patient\xff"))
    odd_folder.mkdir()
    (odd_folder / "x.png").write_bytes(b"x")
    dataset = scan(root)
    assert table(dataset) == [
        ("all", "a", "a/1.png"), ("all", "a", "a/bad\udcff\udcfe.png"),
        ("all", "a", "a/linked.png"), ("all", "b", "b/2.png"),
        ("all", "b", "b/patient\udcff/x.png"),
    ]  # fmt: skip
    assert dataset.num_ignored == {
        "link to nothing": 2, "link to a folder": 3, "link to no regular file": 2,
        "not a regular file": 1, "not an image ending": 1,
    }  # fmt: skip
    assert [dataset.read(s) for s in dataset.samples] == [
        b"data/a/1.png", b"odd", b"outside/3.png", b"data/b/2.png", b"x",
    ]  # fmt: skip


@pytest.mark.parametrize("top", ["train/", ""])
@needs_posix
def test_linked_classes_and_splits_are_warned_of(tmp_path, top):
    plant(tmp_path, "raw/train/a/1.png", "elsewhere/b/2.png")
    root = tmp_path / "raw" / ("" if top else "train")
    (tmp_path / "raw" / "train" / "b").symlink_to(tmp_path / "elsewhere" / "b")
    (tmp_path / "raw" / "train" / "a" / "c").symlink_to(tmp_path / "elsewhere")  # is no class
    with pytest.warns(FeatcacheWarning, match=rf"linked folders .* used: {top}b\. Put"):
        dataset = scan(root)
    assert dataset.describe_ignored() == ["ignored: 2 (link to a folder)"]


def test_endings_that_are_not_used_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("featcache.data.dicom_files.is_installed", lambda: False)
    endings = ("jfif", "jpe", "pjpeg", "pbm", "pnm", "pgm", "JFIF", "png")
    plant(
        tmp_path, *(f"a/{n}.dcm" for n in range(3)), "a/x.NII.GZ", "b/notes", "b/.x", "b/y.xyz",
        *(f"a/{n}.{e}" for n, e in enumerate(endings)), "b/1.png",
    )  # fmt: skip
    dataset = scan(tmp_path)
    assert len(dataset.samples) == 9
    assert dataset.ignored_endings == {
        ".dcm": 3, ".nii.gz": 1, ".xyz": 1, "without an ending": 1,
    }  # fmt: skip
    assert dataset.describe_ignored() == [
        "ignored: 1 (hidden)",
        "ignored: 6 (not an image ending: 3 .dcm, 1 .nii.gz, 1 .xyz, 1 without an ending)",
        "DICOM files are not read without pydicom: pip install 'featcache[dicom]'",
    ]


@pytest.mark.parametrize(("names", "advice"), [
    (["1.dcm", "2.DCM"], "2 .dcm.*DICOM files are not read"),
    (["IM0001"], "1 DICOM without an ending.*DICOM files are not read"),
    (["1.heic"], "HEIC and AVIF photos are not read"), (["1.nii.gz"], "save their slices as PNG"),
    (["shard-000.tar.gz"], "unpack others first"), (["1.txt"], r"Images end in \.bmp, .*\.pjpeg"),
])  # fmt: skip
def test_a_folder_of_other_files_says_what_to_do(tmp_path, names, advice, monkeypatch):
    monkeypatch.setattr("featcache.data.dicom_files.is_installed", lambda: False)
    for name in names:
        plant(tmp_path, f"classes/a/{name}", f"flat/{name}")
        for folder in ("classes/a", "flat"):
            (tmp_path / folder / name).write_bytes(bytes(128) + b"DICM")
    with pytest.raises(DataError, match=advice):
        scan(tmp_path / "flat")
    if "Images end" not in advice:
        for find in (scan, lambda folder: list_images([folder])):
            with pytest.raises(DataError, match=advice):
                find(tmp_path / "classes")


def test_archives_are_to_be_unpacked(tmp_path):
    plant(tmp_path, "d.tar", "d.zip", "a/1.png")
    with pytest.raises(DataError, match=r"found another kind of file.*unpack"):
        scan(tmp_path / "d.tar")
    for name in ("d.tar", "d.zip"):
        with pytest.raises(DataError, match=r"found a \.\w+ file .*unpack"):
            list_images([tmp_path / name])


def test_a_csv_lists_its_images_unlabelled(tmp_path, monkeypatch):
    text = f"file,label,fold,split\n1.png,a,0,train\n{tmp_path / 'x/2.png'},b,1,test\n"
    file = sheet(tmp_path / "d", text, "1.png", "3.png")
    plant(tmp_path, "x/2.png")
    options = {"columns": {"path": "file"}, "ignore_columns": ["label", "fold"]}
    monkeypatch.chdir(tmp_path)
    dataset = list_images(["d/table.csv", "d/3.png"], **options)
    paths = [(tmp_path / "x/2.png").as_posix(), "d/1.png", "d/3.png"]
    assert [(s.path, s.target, s.split) for s in dataset.samples] == [
        (path, UNLABELLED, "all") for path in paths
    ]
    assert dataset.read(dataset.samples[1]) == b"1.png"
    assert len(list_images([file], exclude="1.png", **options).samples) == 1
    file.write_text("path\nnowhere.png\n")
    with pytest.raises(DataError, match=r"found 1 of 1 missing: nowhere\.png"):
        list_images([file])


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
        ("pipe.png", "not a regular file"),
    ):
        with pytest.raises(DataError, match=message):
            list_images([tmp_path / name])
