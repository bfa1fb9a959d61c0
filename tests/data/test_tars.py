"""Images of tars: WebDataset's samples with labels beside them, and packed folders."""

import io
import json
import pickle
import tarfile
import tracemalloc

import pytest
from sample_folders import SPLIT_TABLE, SPLIT_TREE, plant, table
from sample_shards import contents, write_tar

from featcache.data.dataset import scan
from featcache.data.image_lists import list_images
from featcache.errors import ConfigError, DataError, FeatcacheWarning


def sample(key, label, **beside):
    """The files of one sample, as WebDataset has them."""
    return {f"{key}.png": key, f"{key}.cls": label} | {f"{key}.{e}": t for e, t in beside.items()}


@pytest.mark.parametrize("top", ["", "data/", "./data/"])
def test_a_tar_of_folders_equals_the_folders(tmp_path, top):
    plant(tmp_path / "f", *SPLIT_TREE)
    path = write_tar(tmp_path / "d.tar", {top + name: name for name in SPLIT_TREE})
    dataset = scan(path)
    assert (dataset.layout, table(dataset)) == ("tar", SPLIT_TABLE)
    assert contents(dataset) == contents(scan(tmp_path / "f"))


def test_labels_beside_images(tmp_path):
    files = sample("0001", "covid") | sample("0002", "7\n") | {"0003.jpg": "x", "0003.txt": "a cat"}
    dataset = scan(write_tar(tmp_path / "a.tar", files))
    assert table(dataset) == [
        ("all", "covid", "0001.png"), ("all", "7", "0002.png"), ("all", None, "0003.jpg")
    ]  # fmt: skip
    assert dataset.notes == ("classes: .cls beside each image",)
    assert dataset.ignored_endings == {".txt": 1}


@pytest.mark.parametrize(("key", "other"), [("cls", "label"), ("label", "class"), ("class", "x")])
def test_labels_in_json(tmp_path, key, other):
    files = {}
    for number, value in enumerate((0, 1, "b")):
        files |= {f"{number}.png": "x", f"{number}.json": json.dumps({key: value, other: 9})}
    dataset = scan(write_tar(tmp_path / "a.tar", files))
    assert [dataset.class_of(s) for s in dataset.samples] == ["0", "1", "b"]
    assert dataset.notes == (f"classes: key {key!r} of the JSON beside each image",)


def test_texts_are_classes_where_they_repeat_and_captions_else(tmp_path):
    def files(*texts):
        pairs = ({f"{n}.png": "x", f"{n}.txt": text} for n, text in enumerate(texts))
        return {name: text for pair in pairs for name, text in pair.items()}

    assert scan(write_tar(tmp_path / "a.tar", files("b", "a", "b", "a"))).classes == ("a", "b")
    for captions in (("one dog", "a cat", "some fish", "b"), ("b", "b", "b", "a\nb")):
        path = write_tar(tmp_path / "a.tar", files(*captions))
        assert scan(path).classes == ()
        assert len(scan(path, columns={"target": "txt"}).classes) == len(set(captions))


def test_columns_name_endings_and_keys(tmp_path):
    files = {}
    for number, split in enumerate(("train", "val", "train")):
        facts = {"diagnosis": "ab"[number % 2], "patient": 5, "part": split, "label": "no"}
        files |= sample(f"{number}.front", "no") | {f"{number}.json": json.dumps(facts)}
    path = write_tar(tmp_path / "a.tar", files)
    columns = {"target": "diagnosis", "group": "patient", "split": "part"}
    dataset = scan(path, columns=columns, include=["[02]*"])
    assert [(s.split, dataset.class_of(s), s.group) for s in dataset.samples] == [
        ("train", "a", "5"), ("train", "a", "5")
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"--columns target.*found 'none' beside none"):
        scan(path, columns={"target": "none"})
    with pytest.raises(ConfigError, match="target, split or group, for a tar, found image"):
        scan(path, columns={"image": "x"})


def test_a_folder_of_shards(tmp_path):
    for name in ("train-00000-of-00002.tar", "train-00001-of-00002.tar", "validation-0.tar"):
        write_tar(tmp_path / name, sample("0001", "covid") | sample("0002", "normal"))
    dataset = scan(tmp_path)
    assert dataset.count() == {
        s: {"covid": n, "normal": n} for s, n in (("train", 2), ("valid", 1))
    }
    assert dataset.samples[0].path == "train-00000-of-00002.tar/0001.png"
    assert dataset.num_ignored == {}
    grouped = scan(tmp_path, group_by_path=r"^(\d+)\.")  # below the tar's name
    assert {s.group for s in grouped.samples} == {"0001", "0002"}
    assert contents(pickle.loads(pickle.dumps(dataset))) == contents(dataset)


def test_splits_come_from_folders_names_and_folders_inside(tmp_path):
    inside = {"covid/1.png": "a", "normal/1.png": "b"}
    for name in ("a/train/x.tar", "a/val/x.tar", "b/cxr-train-0.tar", "b/cxr-test-0.tar"):
        write_tar(tmp_path / name, inside)
    for name, top in (("c/1.tar", "train/"), ("c/2.tar", "test/")):
        write_tar(tmp_path / name, {top + path: text for path, text in inside.items()})
    assert table(scan(tmp_path / "a")) == [
        (split, label, f"{folder}/x.tar/{label}/1.png")
        for split, folder in (("train", "train"), ("valid", "val")) for label in ("covid", "normal")
    ]  # fmt: skip
    assert scan(tmp_path / "b").splits == scan(tmp_path / "c").splits == ("train", "test")
    write_tar(tmp_path / "b/more.tar", inside)
    with pytest.raises(DataError, match=r"one for cxr-test-0\.tar.*none for more\.tar"):
        scan(tmp_path / "b")
    assert scan(tmp_path / "b", exclude="more.tar").splits == ("train", "test")  # and no warning


def test_the_same_path_in_two_tars_are_two_images(tmp_path):
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", {"x/covid/1.png": name, "x/normal/1.png": name * 2})
    assert contents(scan(tmp_path)) == {
        f"{tar}.tar/x/{label}/1.png": ("all", label, (tar * n).encode())
        for tar in "ab" for n, label in ((1, "covid"), (2, "normal"))
    }  # fmt: skip


def test_hard_links_have_the_bytes_of_their_member(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a/1.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
        for name, target in (("b/1.png", "a/1.png"), ("b/2.png", "gone.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, target
            tar.addfile(info)
    dataset = scan(path)
    assert {p: data for p, (_, _, data) in contents(dataset).items()} == {
        "a/1.png": b"abc", "b/1.png": b"abc"
    }  # fmt: skip
    assert dataset.num_ignored == {"link to nothing": 1}


def test_what_is_not_used_is_counted(tmp_path):
    files = sample("1", "a") | {"__MACOSX/1.png": "", ".x/2.png": "", "notes.pdf": "", "1.mp3": ""}
    dataset = scan(write_tar(tmp_path / "a.tar", files))
    assert dataset.num_ignored == {"hidden": 2, "not an image ending": 2}
    assert dataset.ignored_endings == {".pdf": 1, ".mp3": 1}


def test_img2dataset(tmp_path):
    for shard in ("00000", "00001"):
        files = {}
        for n in range(2):
            facts = {"caption": "a dog", "url": "http://x", "key": f"{shard}{n}", "error": None}
            files |= {f"{shard}{n}.jpg": "x", f"{shard}{n}.txt": f"dog {shard}{n}"}
            files[f"{shard}{n}.json"] = json.dumps(facts)
        write_tar(tmp_path / f"{shard}.tar", files)
        (tmp_path / f"{shard}.parquet").write_bytes(b"PAR1")
        (tmp_path / f"{shard}_stats.json").write_text("{}")
    dataset = scan(tmp_path)
    assert (len(dataset.samples), dataset.classes, dataset.notes) == (4, (), ())
    assert dataset.ignored_endings == {".json": 6, ".txt": 4, ".parquet": 2}
    write_tar(tmp_path / "other/x.tar", files)
    (tmp_path / "other/y.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="found 3 Parquet files and 3 tar files"):
        scan(tmp_path)
    assert len(scan(tmp_path, exclude="**/y.parquet").samples) == 6
    with pytest.raises(DataError, match=r"found none .ignored: 6 x --exclude"):
        scan(tmp_path, exclude=["**/*.parquet", "**/*.tar"])


def test_images_beside_tars_are_the_data(tmp_path):
    plant(tmp_path, "a/1.png", "b/2.png")
    write_tar(tmp_path / "x.tar", sample("1", "c"))
    with pytest.warns(FeatcacheWarning, match="1 tar file beside them are not"):
        assert scan(tmp_path).classes == ("a", "b")


def test_a_member_that_changes_is_noticed(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample("1", "a") | sample("2", "b"))
    before = scan(path)
    assert [s.mtime_ns // 10**9 for s in before.samples] == [1_700_000_000] * 2
    assert len({s.mtime_ns for s in before.samples}) == 2
    assert scan(path).samples == before.samples
    write_tar(path, sample("1", "a") | sample("2", "b") | sample("3", "b"))
    after = scan(path).samples
    assert not {s.mtime_ns for s in before.samples} & {s.mtime_ns for s in after}
    with pytest.raises(DataError, match=r"changed since it was scanned.*Scan again"):
        before.read(before.samples[0])


def test_bad_labels_and_doubles(tmp_path):
    twice = [("1.png", "x"), ("1.png", "y")]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, text in twice:
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    with pytest.raises(DataError, match=r"every name once.*1\.png"):
        scan(tmp_path / "a.tar")
    path = write_tar(tmp_path / "b.tar", {"1.png": "x", "1.json": '{"label": [1, 2]}'})
    with pytest.raises(DataError, match=r"\[1, 2\] \(.*b\.tar: 1\.json\).*--columns target=KEY"):
        scan(path)
    path = write_tar(tmp_path / "b.tar", {"1.png": "x", "1.json": "{broken"})
    assert scan(path).num_ignored == {"JSON that cannot be read": 1, "not an image ending": 1}


def test_tars_to_predict_are_refused_as_zips_are(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample("1", "a"))
    with pytest.raises(DataError, match=r"found a \.tar file.*predict by --cache"):
        list_images([path])


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["covid", "normal"], ("covid", "normal")),
        (["train/covid", "train/normal", "test/covid", "test/normal"], ("covid", "normal")),
        (["00000", "00001"], ()), (["a-0", "a-1", "b-0"], ()), (["train-covid", "test-covid"], ()),
    ],
)  # fmt: skip
def test_names_of_tars_are_classes_where_nothing_else_is(tmp_path, names, classes):
    for name in names:
        write_tar(tmp_path / f"{name}.tar", {"1.png": name, "2.png": name * 2})
    dataset = scan(tmp_path)
    assert dataset.classes == classes
    (note,) = dataset.notes
    assert note.startswith("classes: the names of the tars" if classes else "unlabelled: ")
    of_classes = {dataset.class_of(s) for s in dataset.samples}
    assert of_classes == set(classes or [""])
    assert len({s.path for s in dataset.samples}) == 2 * len(names)
    bare = scan(tmp_path, no_classes=True)
    assert (bare.classes, bare.notes, bare.splits) == ((), (), dataset.splits)


def test_a_million_images_fit_into_memory(tmp_path):
    """110 bytes an image are kept and 280 at the peak; as objects it was 270 and 390."""
    num_images = 4000
    path = write_tar(tmp_path / "a.tar", {f"c{n % 2}/{n:08}.pgm": b"x" for n in range(num_images)})
    scan(path)  # what is made once for all
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        dataset = scan(path)
        kept, peak = (memory - before for memory in tracemalloc.get_traced_memory())
    finally:
        tracemalloc.stop()
    assert len(dataset.samples) == num_images
    assert kept < 160 * num_images
    assert peak < 360 * num_images
