"""Images of Parquet files are those that Arrow reads; what is damaged or unclear is one error."""

import contextlib
import json
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sample_shards import contents, with_features

from featcache.data import parquet_columns, parquet_index
from featcache.data.dataset import UNLABELLED, scan
from featcache.data.parquet import ParquetStore
from featcache.errors import ConfigError, DataError, FeatcacheError

RNG = np.random.default_rng(0)
IMAGES = [RNG.bytes(int(size)) for size in RNG.integers(0, 3000, 60)]
LABELS = ["covid" if n % 3 else "normal" for n in range(60)]
PATHS = [f"{n:03}.png" for n in range(60)]


def write(path, images=IMAGES, *, options=(), **columns):
    table = pa.table({"image": images} | columns)
    pq.write_table(table, path, **dict(options))
    return path


def structs(images, paths=PATHS):
    return [{"bytes": i, "path": p} for i, p in zip(images, paths, strict=True)]


OPTIONS = {
    "default": {}, "plain": {"use_dictionary": False}, "unpacked": {"compression": "none"},
    "unpacked plain": {"compression": "none", "use_dictionary": False},
    "second version": {"data_page_version": "2.0", "compression": "zstd"},
    "second version, unpacked": {"data_page_version": "2.0", "compression": "none"},
    "many pages": {"data_page_size": 2000, "write_batch_size": 3, "use_dictionary": False},
    "small dictionary": {"dictionary_pagesize_limit": 9000, "write_batch_size": 3},
    "row groups": {"row_group_size": 7, "compression": "gzip"},
    "lengths": {"use_dictionary": False, "column_encoding": "DELTA_LENGTH_BYTE_ARRAY"},
    "lengths, brotli": {
        "use_dictionary": False, "column_encoding": "DELTA_LENGTH_BYTE_ARRAY",
        "compression": "brotli", "data_page_version": "2.0",
    },
    "lz4": {"compression": "lz4"}, "index": {"write_page_index": True},
}  # fmt: skip


def test_bytes_are_those_that_were_written(tmp_path):
    """In one folder, as a process of Arrow takes half a second to start."""
    copies = [*IMAGES[:20], *IMAGES[:40]]  # some twice: a dictionary is worth it
    wanted: dict[str, list[bytes | None]] = {}
    for kind, given in OPTIONS.items():
        for number, column in enumerate((
            pa.array(copies), pa.array(copies, pa.large_binary()), structs(copies),
            pa.array([None, *copies[1:]]), [None, *structs(copies)[1:]],
        )):  # fmt: skip
            options = dict(given)
            if "column_encoding" in options:
                leaf = "image.bytes" if isinstance(column, list) else "image"
                options["column_encoding"] = {leaf: options["column_encoding"]}
            name = f"{kind} {number}.parquet"
            pq.write_table(pa.table({"image": column}), tmp_path / name, **options)
            wanted[name] = [None, *copies[1:]] if number > 2 else copies
    dataset = scan(tmp_path, companions="ignore")
    reasons = []
    found: dict[str, list[bytes | None]] = {name: [None] * 60 for name in wanted}
    for sample in dataset.samples:
        name, _, row = sample.path.partition("/")
        number = int(row.removesuffix(".png"))
        try:
            found[name][number] = dataset.read(sample)
            assert len(found[name][number] or b"") == sample.image_bytes
        except DataError as error:
            reasons.append(str(error))
    assert found == wanted
    assert len(reasons) == 2 * len(OPTIONS)
    assert all("found no bytes, a null" in reason for reason in reasons)


def test_hugging_face_files(tmp_path):
    names = ["normal", "covid"]
    table = pa.table({"image": structs(IMAGES), "label": [names.index(i) for i in LABELS]})
    pq.write_table(with_features(table, names), tmp_path / "data.parquet")
    dataset = scan(tmp_path / "data.parquet")
    assert dataset.notes == ("classes: column 'label' (ClassLabel)",)
    assert contents(dataset) == {
        path: ("all", label, image)
        for path, label, image in zip(PATHS, LABELS, IMAGES, strict=True)
    }


def test_class_labels_of_minus_one_are_unlabelled_and_others_known(tmp_path):
    table = pa.table({"image": IMAGES[:3], "y": [-1, 0, None]})
    pq.write_table(with_features(table, ["a"], "y"), tmp_path / "a.parquet")
    assert [s.target for s in scan(tmp_path / "a.parquet").samples] == [UNLABELLED, 0, UNLABELLED]
    table = pa.table({"image": IMAGES[:1], "y": [1]})
    pq.write_table(with_features(table, ["a"], "y"), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="numbers of 1 classes, found 1"):
        scan(tmp_path / "a.parquet")


def test_classes_are_texts_or_numbers_taken_as_names(tmp_path):
    texts = ["1", "0", "1"]
    kinds = [texts, [1, 0, 1], pa.array(texts).dictionary_encode(), pa.array(texts, pa.string())]
    for number, labels in enumerate(kinds):
        write(tmp_path / f"{number}.parquet", IMAGES[:3], label=labels)
    dataset = scan(tmp_path)
    assert dataset.classes == ("0", "1")
    assert [s.target for s in dataset.samples] == [1, 0, 1] * 4


def test_columns_split_and_group(tmp_path):
    path = write(
        tmp_path / "a.parquet", IMAGES[:4], pixels=IMAGES[4:8], dx=["a", "b", "a", "b"],
        part=["train", "train", "val", "val"], who=[7, 7, None, 8], note=["x"] * 4, name=PATHS[:4],
    )  # fmt: skip
    columns = {"image": "pixels", "target": "dx", "split": "part", "group": "who", "path": "name"}
    dataset = scan(path, columns=columns)
    assert [(s.path, s.split, dataset.class_of(s), s.group) for s in dataset.samples] == [
        ("000.png", "train", "a", "7"), ("001.png", "train", "b", "7"),
        ("002.png", "valid", "a", "002.png"), ("003.png", "valid", "b", "8"),
    ]  # fmt: skip
    assert dataset.ignored_columns == ("image", "note")
    assert [dataset.read(s) for s in dataset.samples] == IMAGES[4:8]
    named = scan(path, columns=columns, group_by=r"00([0])", exclude="*[23].png")
    assert [s.group for s in named.samples] == ["0", "001.png"]


def test_paths_that_are_missing_or_repeated_give_way_to_numbers(tmp_path):
    for name, paths in (("a", "xyx"), ("b", ["x", None, "y"]), ("c", ["x", "", "y"]), ("d", "zyx")):
        table = pa.table({"image": structs(IMAGES[:3], paths)})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    assert [s.path for s in scan(tmp_path).samples] == [
        *(f"{name}.parquet/{row}" for name in "abc" for row in range(3)),
        "d.parquet/x", "d.parquet/y", "d.parquet/z",
    ]  # fmt: skip


def test_a_folder_of_files(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        write(tmp_path / f"data/{name}.parquet", IMAGES[:6], target=list("ababab"))
    (tmp_path / "README.md").write_text("A data set of Hugging Face")
    dataset = scan(tmp_path)
    assert dataset.count() == {"train": {"a": 6, "b": 6}, "valid": {"a": 3, "b": 3}}
    assert dataset.samples[0].path == "data/train-00000-of-00002.parquet/0"
    assert dataset.ignored_endings == {".md": 1}


@pytest.mark.parametrize(("columns", "options", "message"), [
    ({"target": ["a"]}, {"columns": {"target": "no"}}, "columns of the file: image, target.*'no'"),
    ({"other": [b"x"]}, {}, "found several: image, other.*--columns image=image"),
    ({"label": ["a"], "cls": ["b"]}, {}, "found several: label, cls.*--columns target=label"),
    ({"diagnosis": ["a"]}, {}, r"'diagnosis' \(target\?\).*--columns target=diagnosis"),
    ({"patient_id": ["a"]}, {}, r"'patient_id' \(group\?\)"),
    ({"label": [0.5]}, {}, "expected texts or whole numbers, found double.*Cast it"),
    ({"x": [1]}, {"columns": {"image": "x"}}, "a column of bytes, found x: int64"),
    ({"x": ["a"]}, {"columns": {"image": "x"}}, "a column of bytes, found x: string"),
])  # fmt: skip
def test_unclear_columns_are_one_error(tmp_path, columns, options, message):
    path = write(tmp_path / "a.parquet", IMAGES[:1], **columns)
    with pytest.raises(DataError, match=message) as caught:
        scan(path, **options)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_no_use(tmp_path):
    def refused(message, path):
        with pytest.raises(DataError, match=message) as caught:
            scan(path)
        assert len(str(caught.value).splitlines()) == 1

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": [1]}), path)
    refused("one column with the bytes of images, found none among x", path)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(structs([None] * 2, "ab"), kind)}), path)
    refused("every image has a path and no bytes.*embeds them", path)
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), path)
    refused("at least one image", path)
    (tmp_path / "b.parquet").write_bytes(b"PK\x03\x04" + bytes(100))
    refused("a whole Parquet file", tmp_path / "b.parquet")
    pq.write_table(pa.table({"image": IMAGES}), path, use_dictionary=False,
                   column_encoding={"image": "DELTA_BYTE_ARRAY"})  # fmt: skip
    refused("DELTA_BYTE_ARRAY, which is not read", path)
    (tmp_path / "a.csv").write_text("path\n")
    with pytest.raises(ConfigError, match="for a CSV, found image"):
        scan(tmp_path / "a.csv", columns={"image": "path"})


def test_ignored_columns_and_no_classes(tmp_path):
    path = write(tmp_path / "a.parquet", IMAGES[:2], label=["a", "b"], diagnosis=["x", "y"])
    assert scan(path).classes == ("a", "b")  # there are classes: another column is none
    assert scan(path, ignore_columns=["label", "diagnosis"]).classes == ()
    assert scan(path, no_classes=True).classes == ()


def test_without_pyarrow(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet")
    monkeypatch.setattr(parquet_index.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'featcache\[parquet\]'"):
        scan(path)


def test_pages_are_unpacked_once_by_threads_that_read_in_order(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", options=OPTIONS["many pages"])
    dataset = pickle.loads(pickle.dumps(scan(path)))
    unpacked, plain = [], ParquetStore._unpack
    monkeypatch.setattr(
        ParquetStore, "_unpack", lambda *a: unpacked.append(a[1]) or plain(*a)
    )  # fmt: skip
    order = dataset.reading_order(range(60))
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(lambda p: dataset.read(dataset.samples[p]), order))
    assert sorted(read) == sorted(IMAGES)
    assert len(unpacked) == len(set(unpacked)) == len(dataset._store.pages) > 5


def test_a_file_that_changes_is_noticed(tmp_path):
    path = write(tmp_path / "a.parquet")
    before = scan(path)
    assert scan(path).samples == before.samples
    write(path, IMAGES[1:])
    with pytest.raises(DataError, match="changed since it was scanned"):
        before.read(before.samples[0])
    assert not {s.mtime_ns for s in before.samples} & {s.mtime_ns for s in scan(path).samples}


def test_damaged_files_are_read_or_refused_in_one_line(tmp_path, rounds):
    table = pa.table({"image": structs(IMAGES), "label": LABELS})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=20, compression="zstd")
    whole, generator = (tmp_path / "a.parquet").read_bytes(), random.Random(0)
    folder, refused = tmp_path / "damaged", []
    for number in range(rounds(6, 600)):
        data = bytearray(whole)
        if number % 3 == 0:
            del data[generator.randrange(len(data)) :]
        else:
            tail = len(data) - 3000 if number % 3 == 1 else 0  # the footer is at the end
            for _ in range(generator.randint(1, 6)):
                data[generator.randrange(max(tail, 0), len(data))] = generator.randrange(256)
        folder.mkdir(exist_ok=True)
        (folder / "a.parquet").write_bytes(data)
        try:
            dataset = scan(folder, companions="ignore")
        except FeatcacheError as error:
            refused.append(str(error))
            continue
        for sample in dataset.samples:
            with contextlib.suppress(DataError):
                assert len(dataset.read(sample)) == sample.image_bytes
    assert refused
    assert all(len(text.splitlines()) == 1 for text in refused)


def test_cut_pages_in_this_process(tmp_path, rounds):
    """Many more damages, as no child process is started for each."""
    generator = random.Random(1)
    for kind in ("default", "lengths", "second version", "unpacked plain"):
        options = dict(OPTIONS[kind])
        if "column_encoding" in options:
            options["column_encoding"] = {"image": options["column_encoding"]}
        path = write(tmp_path / "a.parquet", options=options)
        column = pq.ParquetFile(path).metadata.row_group(0).column(0)
        start = column.dictionary_page_offset or column.data_page_offset
        whole, end = path.read_bytes(), start + column.total_compressed_size
        codec = parquet_index._CODECS.get(column.compression, "")
        for _ in range(rounds(100, 5000)):
            data = bytearray(whole)
            for _ in range(generator.randint(1, 3)):
                data[generator.randrange(start, min(start + 200, end))] = generator.randrange(256)

            def read(offset, size, data=data):
                return bytes(data[offset : offset + size])

            chunk = parquet_index.Chunk(read, start, end, 60, 1, parquet_index.unpacker(codec))
            try:
                places = parquet_index.locate_values(chunk)
            except (ValueError, IndexError):
                continue
            assert len(places.size) == len(places.page) == len(places.offset)
            assert places.size.max() <= 2**31


def test_json_of_hugging_face_that_is_none(tmp_path):
    table = pa.table({"image": IMAGES[:1], "label": [3]})
    for text in ("{", "[]", '{"info": 3}', json.dumps({"info": {"features": {"label": []}}})):
        named = table.replace_schema_metadata({"huggingface": text})
        pq.write_table(named, tmp_path / f"{len(text)}.parquet")
    assert scan(tmp_path).classes == ("3",)


def test_rows_are_bounded_by_the_bytes_of_the_file(tmp_path):
    """A million nulls take no bytes, and would take 900 MB."""
    images = pa.array([IMAGES[0]] + [None] * 999_999, pa.binary())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": images}), path)
    assert path.stat().st_size < 20_000
    with pytest.raises(DataError, match=r"at most 65,536 rows in [\d,]+ bytes, found 1,000,000"):
        scan(path)


def test_texts_are_bounded_by_the_bytes_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_columns, "_RATIO_FREE_BYTES", 1 << 16)
    path = write(tmp_path / "a.parquet", [b"x"] * 60, target=["a" * 100_000] * 60)
    with pq.ParquetFile(path) as parquet, pytest.raises(parquet_columns.Refusal) as caught:
        parquet_columns.read_texts(parquet, "target", 60, path.stat().st_size)
    assert caught.value.parts[0] == "column 'target'"


def test_a_file_that_takes_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_index, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(parquet_index, "_SLOW_BYTES", 1e12)
    with pytest.raises(DataError, match=r"listed in 0 s, found no answer.*--exclude"):
        scan(write(tmp_path / "a.parquet"))


def test_dicom_without_paths_is_recognised_by_its_bytes(tmp_path):
    dicom = bytes(128) + b"DICM"
    for images, wanted in (([*IMAGES[:2], dicom], [False, False, True]), (IMAGES[:3], [False] * 3)):
        dataset = scan(write(tmp_path / "a.parquet", images))
        assert [dataset.is_dicom(sample) for sample in dataset.samples] == wanted
        assert dataset.has_dicom == any(wanted)
