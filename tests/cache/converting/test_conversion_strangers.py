"""Convert: damaged, hostile and huge files of strangers give one clear line, and no cache."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from sample_caches import small

from featcache.cache.converting import reading
from featcache.cache.converting.conversion import convert
from featcache.cache.converting.rows import METADATA
from featcache.cache.reading import open_cache
from featcache.errors import FeatcacheError

Change = Callable[[dict[str, Any]], object]


def refusal(source: Path, **options: Any) -> str:
    """Return the message of a conversion that fails in one line and leaves nothing."""
    folder = source.parent
    before = {file.name for file in folder.iterdir()}
    with pytest.raises(FeatcacheError) as caught:
        convert(source, folder / "made.h5", say=lambda _: None, **options)
    assert {file.name for file in folder.iterdir()} == before
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


def write_member(file: Path, name: str, data: bytes) -> None:
    """Write an npz of one good array path, and one of these bytes."""
    good = io.BytesIO()
    np.save(good, np.array(["a", "b"]))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("path.npy", good.getvalue())
        archive.writestr(f"{name}.npy", data)


class Evil:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


def header(shape: str, dtype: str = "<f4") -> bytes:
    text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}"
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


NPZ = {
    "a pickle": (header("(1,)", "|O") + pickle.dumps(Evil()), "never read"),
    "a pickle alone": (pickle.dumps(Evil()), "a header of .npy"),
    "a huge shape": (header(f"({10**15}, 4)") + b"0" * 64, "as its header says"),
    "numbers beyond 64 bits": (header(f"({10**30}, 4)"), "as its header says"),
    "a negative shape": (header("(-1, 4)"), "one or two dimensions"),
    "code in a header": (header("__import__('os').mkdir('unpickled')"), "a header of .npy"),
    "float64": (header("(2, 1)", "<f8") + bytes(16), "round"),
    "another length": (header("(3, 1)") + bytes(12), "3 rows"),
    "NaN": (header("(2, 1)") + b"\xff" * 8, "finite"),
}


@pytest.mark.parametrize("what", NPZ)
def test_a_hostile_npz(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, said = NPZ[what]
    write_member(tmp_path / "x.npz", "features", data)
    assert said in refusal(tmp_path / "x.npz", backbone_name="b")


def test_what_is_larger_than_memory_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_member(tmp_path / "bomb.npz", "features", header("(4000000, 4)") + bytes(64_000_000))
    assert (tmp_path / "bomb.npz").stat().st_size < 100_000
    for name in ("x.csv", "x.safetensors"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(32_000_000)
    with h5py.File(tmp_path / "x.h5ad", "w") as made:
        made.create_dataset("X", (10**9, 10**6), "<f4", chunks=(1, 1000))
    for name in ("bomb.npz", "x.csv", "x.safetensors", "x.h5ad"):
        monkeypatch.setattr(reading, "room", lambda: 3e7)
        assert "as memory is" in refusal(tmp_path / name, backbone_name="b")


@pytest.mark.parametrize("ending", [".npz", ".safetensors", ".csv"])
def test_damage_is_one_line_or_a_cache_of_other_content(ending: str, tmp_path: Path) -> None:
    cache = small(tmp_path / "c.h5")
    convert(cache.path, tmp_path / f"x{ending}", say=lambda _: None)
    whole = (tmp_path / f"x{ending}").read_bytes()
    draw = random.Random(3)
    for number in range(120):
        data = bytearray(whole)
        if number % 3 == 0:
            del data[draw.randrange(len(data)) :]
        else:
            for _ in range(draw.randrange(1, 4)):
                data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / f"x{ending}").write_bytes(data)
        with contextlib.suppress(FeatcacheError):
            convert(tmp_path / f"x{ending}", tmp_path / "y.h5", rebuild=True, say=lambda _: None,
                    backbone_name="b0")  # fmt: skip
            open_cache(tmp_path / "y.h5")


def test_a_broken_parquet_or_h5ad(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    small(tmp_path / "c.h5")
    for ending in (".parquet", ".h5ad"):
        convert(tmp_path / "c.h5", tmp_path / f"x{ending}", say=lambda _: None)
        whole = (tmp_path / f"x{ending}").read_bytes()
        (tmp_path / f"x{ending}").write_bytes(whole[: len(whole) // 2])
        assert "its library cannot read" in refusal(tmp_path / f"x{ending}")


def test_a_parquet_whose_texts_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int32()), ["x" * 500_000])
    table = pa.table({"path": names, "f0": pa.array([0.0] * 200, pa.float32())})
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd")
    assert (tmp_path / "x.parquet").stat().st_size < 5000
    monkeypatch.setattr(reading, "room", lambda: 3e7)
    assert "texts: expected at most" in refusal(tmp_path / "x.parquet", backbone_name="b")


def test_h5ad_follows_no_link_and_reads_no_other_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(64))
    with h5py.File(tmp_path / "external.h5ad", "w") as made:
        made.create_dataset("X", (4, 4), "<f4", external=[(str(secret), 0, 64)])
    with h5py.File(tmp_path / "linked.h5ad", "w") as made:
        made["X"] = h5py.ExternalLink(str(tmp_path / "external.h5ad"), "X")
    assert "in other files" in refusal(tmp_path / "external.h5ad", backbone_name="b")
    assert "a link" in refusal(tmp_path / "linked.h5ad", backbone_name="b")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.npz")
    assert "not a regular file" in refusal(tmp_path / "x.npz")


def changes() -> Iterator[tuple[str, Change]]:
    yield "format_version", lambda facts: facts.update(format_version=2)
    yield "identity", lambda facts: facts.update(identity=[1])
    yield "--backbone-name", lambda facts: facts.update(identity={})
    yield "a name twice", lambda facts: facts.update(classes=["covid", "normal", "covid"])
    yield "no texts", lambda facts: facts.update(classes=["covid", 3])
    yield "classes", lambda facts: facts.update(classes=["covid"])
    for value in (3, 4.0, "4", True):
        yield (
            "identity, num_features",
            lambda facts, value=value: facts["identity"].update(num_features=value),
        )
    yield "identity, feature_dtype", lambda facts: facts["identity"].update(feature_dtype="float16")
    yield "identity, views", lambda facts: facts["identity"].update(views=7)
    for value in ([1], "", "x" * 10**6, "\x1b[2J"):
        yield (
            "identity, backbone",
            lambda facts, value=value: facts["identity"].update(backbone=value),
        )
    yield "--backbone-name", lambda facts: facts["identity"].pop("backbone")
    yield "an empty one", lambda facts: facts.update(classes=["covid", "normal", ""])
    yield "a name in each row", lambda facts: facts.update(names={"c": ""})
    yield "float16", lambda facts: facts.update(feature_dtype="float16")
    yield "feature_dtype", lambda facts: facts.update(feature_dtype="object")
    yield "splits", lambda facts: facts.update(splits={"train": 3})
    yield (
        "splits that no cache has",
        lambda facts: facts["splits"].update(evil=facts["splits"]["train"]),
    )
    yield "failures", lambda facts: facts.update(failures=[{"path": 1}])
    yield "task", lambda facts: facts.update(task="regression")
    yield "different paths", lambda facts: facts.update(names={"a/1": "c"})
    yield "nested", lambda facts: facts.update(provenance=json.loads("[" * 90 + "]" * 90))


@pytest.mark.parametrize(("said", "change"), list(changes()))
def test_a_hostile_json_object(said: str, change: Change, tmp_path: Path) -> None:
    small(tmp_path / "c.h5")
    convert(tmp_path / "c.h5", tmp_path / "x.npz", say=lambda _: None)
    with np.load(tmp_path / "x.npz") as opened:
        arrays = dict(opened)
    facts = json.loads(str(arrays[METADATA]))
    change(facts)
    arrays[METADATA] = np.array(json.dumps(facts))
    np.savez(tmp_path / "x.npz", **arrays)
    assert any(word in refusal(tmp_path / "x.npz") for word in said.split("|"))


def test_a_csv_of_others_names_what_is_wrong(tmp_path: Path) -> None:
    for text, said in {
        "": "a header with path",
        "path,f0\n": "one or more rows",
        "path,f0,f2\na,1,2\n": "no f1",
        "path,f0\na,x\n": "line 2",
        "path,f0\na,1,2\n": "line 2",
        "path,f0\na,1e60\n": "finite",
        "path,f0,split\na,1,dev\n": "dev",
        "path,f0\na,1\na,2\n": "1 different",
        "path,f0,image_sha256\na,1,00\n": "64 hex digits",
        "path,f0,mtime_ns\na,1,99999999999999999999\n": "numbers",
        "path,f0,image_bytes\na,1,-1\n": "sizes of files",
        "path,f0\na,1\n,2\n": "a name in each row",
        "path,f0,target_\na,1,1\n": "an empty one",
        "path,f0,target,target_x\na,1,x,1\n": "both",
        "path,f0,target_x\na,1,0.5\n": "0, 1 or NaN",
        "path,f0\n\udcff,1\n": "UTF-8",
        'path,f0\n"a,1\n': "whole table",
        "path,f0,featcache\na,1,{\n": "not JSON",
    }.items():
        (tmp_path / "x.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
        assert said in refusal(tmp_path / "x.csv", backbone_name="b"), text
