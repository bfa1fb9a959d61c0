"""Caches and runs by URL go the whole way; copies of them are checked and used again."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from sample_images import write_tree
from sample_sides import write_side
from sample_urls import HEAD, names, put, works

import featcache
from featcache.backbones.backbone import Backbone
from featcache.cache import remote_copies
from featcache.data import objects, remote
from featcache.errors import CacheError, ConfigError, DataError, FeatcacheWarning, RunError

pytestmark = pytest.mark.usefixtures("copies")


def test_extract_updates_a_cache_in_a_store(
    memory: str, tmp_path: Path, copies: Path, tiny_backbone: Backbone,
) -> None:  # fmt: skip
    tree = write_tree(tmp_path / "tree", {"train": 2, "valid": 1, "test": 1})
    url, lines = f"{memory}/c.h5", list[str]()
    made = featcache.extract(tree, url, backbone=tiny_backbone, say=lines.append)
    assert made.num_new == 8
    assert made.as_dict()["cache"] == url
    assert f"{url}: 8 images" in "\n".join(lines)
    assert str(copies / "work") in lines[0], "a killed command is found again"
    assert names(memory) == ["c.h5"]
    assert works(copies) == []
    fetched = []
    with pytest.MonkeyPatch.context() as patch:  # what was sent is the copy: nothing is fetched
        patch.setattr(remote_copies, "fetch_object", lambda *a: fetched.append(a))
        assert featcache.open_cache(url).content_sha256 == made.content_sha256
        assert featcache.extract(tree, url, backbone=tiny_backbone).status == "up to date"
        assert featcache.plan(tree, url, backbone=tiny_backbone).num_known == 8
    assert not fetched
    shutil.copyfile(tree / "test/covid/tec000_0.jpg", tree / "train/covid/x.jpg")
    again = tmp_path / "here.h5"
    another = os.environ["FEATCACHE_COPIES"] + "2"
    os.environ["FEATCACHE_COPIES"] = another  # another computer: monkeypatch sets it back
    assert featcache.extract(tree, url, backbone=tiny_backbone).num_new <= 1
    featcache.extract(tree, again, backbone=tiny_backbone)
    assert featcache.open_cache(Path(url)).content_sha256 == (
        featcache.open_cache(again).content_sha256
    )
    with pytest.raises(ConfigError, match=rf"--part.*found {url}"):
        featcache.extract(tree, url, backbone=tiny_backbone, part="1/2")
    with pytest.raises(ConfigError, match=rf"several backbones.*found {url}"):
        featcache.extract(tree, url, backbone=tiny_backbone, image_size=[32, 64])
    with pytest.raises(ConfigError, match=r"--group-salt: expected a FILE"):
        featcache.extract(tree, url, backbone=tiny_backbone, path_names="hash", rebuild=True)


def test_a_run_goes_the_whole_way(
    cache: str, memory: str, tmp_path: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, lines = f"{memory}/runs/a", list[str]()
    made = featcache.train(cache, run, **HEAD, say=lines.append)
    assert made.as_dict()["run"] == run
    assert made.run.is_dir()
    assert f"written to {run}" in lines[-1]
    assert "run.json" in names(run)
    assert featcache.info(run).cache["path"] == "../../c.h5"
    with pytest.raises(RunError, match=rf"a run that is there already \({run}\)"):
        featcache.train(cache, run, **HEAD)
    with monkeypatch.context() as patch:
        patch.setattr(remote_copies, "fetch_object", None)  # what was sent is the copy
        evaluated = featcache.evaluate(run, split="test", say=lines.append)
        assert any(f"written to {run}/evaluation/: test.json" in line for line in lines)
        positive = evaluated.classes[0]
        featcache.decide(run, positive=positive, threshold=0.3)
        page = featcache.report(run)
    assert page.as_dict()["file"] == f"{run}/report.html"
    assert page.file.read_bytes() == fsspec.filesystem("memory").cat_file(f"{run}/report.html")
    assert {"decision.json", "evaluation/test.json", "report.html"} < {*names(run)}
    assert featcache.audit(cache, only="same").num_leaks == 0
    with pytest.warns(FeatcacheWarning, match=r"114 rows of c\.h5"):
        assert featcache.predict(run, cache=[cache]).as_dict()["thresholds"]
    featcache.train([cache], run, **HEAD | {"epochs": 2}, overwrite=True)
    assert not {"decision.json", "evaluation/test.json", "uploading.json"} & {*names(run)}
    here = tmp_path / "here"
    featcache.train(cache, here, **HEAD)
    assert featcache.info(here).cache["path"] == cache
    assert featcache.evaluate(here, split="test").accuracy == evaluated.accuracy
    shutil.rmtree(copies)
    featcache.train(tmp_path / "made.h5", run, **HEAD, overwrite=True)
    assert featcache.info(run).cache["path"] == str(tmp_path / "made.h5")
    assert featcache.evaluate(run, split="test").accuracy == evaluated.accuracy
    assert works(copies) == []


def test_other_verbs(cache: str, memory: str, tmp_path: Path) -> None:
    folds = f"{memory}/folds"
    done = featcache.crossval(cache, folds, folds=2, keep_ensemble=True, **HEAD)
    assert done.as_dict()["ensemble"] == f"{folds}/ensemble"
    ensemble = featcache.load_run(f"{folds}/ensemble")
    assert ensemble.num_members == 2
    assert featcache.load_head(f"{folds}/ensemble") is not None
    assert featcache.info(folds).as_dict()["kind"] == "cross-validation"
    swept = featcache.sweep(cache, f"{memory}/swept", trials=2, seed=1)
    assert "trials.csv" in names(swept.as_dict()["run"])
    some = featcache.select([cache], f"{memory}/some.h5", classes=["covid"])
    assert some.as_dict()["cache"] == f"{memory}/some.h5"
    assert some.as_dict()["sources"][0]["path"] == cache
    with pytest.raises(CacheError, match=rf"there already \({memory}/some.h5\)"):
        featcache.select(cache, f"{memory}/some.h5")
    with pytest.raises(ConfigError, match=rf"NEW: expected another place .* found {cache}"):
        featcache.select(cache, f"{cache}/", classes=["covid"], rebuild=True)
    path = featcache.open_cache(cache).splits["train"].paths[0]
    assert featcache.neighbours(cache, path, k=1).rows
    rows = np.ones((2, 3), np.float32)
    featcache.write_cache(tmp_path / "plain.h5", rows, ["a", "b"], ["1", "2"])
    plain = put(tmp_path / "plain.h5", f"{memory}/plain.h5")
    featcache.convert(plain, f"{memory}/rows.npz")
    featcache.convert(f"{memory}/rows.npz", f"{memory}/again.h5")
    assert featcache.verify(f"{memory}/again.h5").num_rows == 2
    with pytest.raises(ConfigError, match="caches and runs may be URLs"):
        featcache.export(f"{memory}/swept", f"{memory}/x.pt")


def test_what_is_not_there(cache: str, memory: str) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file(f"{memory}/other/x.png", b"x")
    for call, message in (
        (lambda: featcache.open_cache(f"{memory}/no.h5"), "cache or a run, found nothing"),
        (lambda: featcache.load_run(f"{memory}/other"), "found other objects, such as x.png"),
        (lambda: featcache.info("nonsense://x/y"), "a URL that fsspec knows"),
        (lambda: featcache.train(cache, f"{memory}/other", **HEAD), "other objects"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            call()
    with pytest.raises(ConfigError, match=r"RUN: .*a name in the bucket.* s3://bucket/NAME"):
        featcache.train(cache, "s3://bucket/", **HEAD)


def test_a_store_that_refuses(cache: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("403 Forbidden")

    run = f"{memory}/run"
    featcache.train(cache, run, **HEAD)
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    with pytest.raises(DataError, match=rf"found 403 Forbidden .* \({memory}/run2\)"):
        featcache.train(cache, f"{memory}/run2", **HEAD)
    monkeypatch.setattr(MemoryFileSystem, "put_file", refuse)
    with pytest.warns(FeatcacheWarning, match=rf"not kept in {run}: .*403"):
        assert featcache.evaluate(run, split="test").num_samples
    with pytest.raises(DataError, match="403"):
        featcache.decide(run, positive="covid", threshold=0.3)
    monkeypatch.setattr(MemoryFileSystem, "info", refuse)
    with pytest.raises(DataError, match=rf"found 403 Forbidden .* \({cache}\)"):
        featcache.open_cache(cache)


def test_an_object_that_changes_while_it_is_read(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "CHUNK_BYTES", 1024)
    write_side(tmp_path / "new.h5", 3, seed=5)
    plain, left = remote.RemoteFile.read, [1]

    def read(self: remote.RemoteFile, offset: int, num_bytes: int) -> bytes:
        data = plain(self, offset, num_bytes)
        if left[0] and offset:
            left[0] -= 1
            put(tmp_path / "new.h5", cache)
        return data

    monkeypatch.setattr(remote.RemoteFile, "read", read)
    wanted = featcache.open_cache(tmp_path / "new.h5").content_sha256
    assert featcache.open_cache(cache).content_sha256 == wanted
    assert left == [0]
    put(tmp_path / "made.h5", cache)
    left[0] = 10**6
    with pytest.raises(DataError, match=rf"others each of 3 times.*\({cache}\)"):
        featcache.open_cache(cache)


def test_a_run_that_is_replaced_while_it_is_read(
    cache: str, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plain, changed = f"{memory}/run", remote_copies.fetch_object, list[str]()
    fs = fsspec.filesystem("memory")

    def fetch_and_change(file: remote.RemoteFile, *args: Any) -> str:
        sha256 = plain(file, *args)
        if not changed and file.url.endswith("environment.json"):
            changed.append(file.url)
            fs.pipe_file(file.url, b"{}")
        return sha256

    featcache.train(cache, run, **HEAD)
    shutil.rmtree(remote_copies.place_of(run).parent)
    monkeypatch.setattr(remote_copies, "fetch_object", fetch_and_change)
    assert (featcache.load_run(run).path / "environment.json").read_bytes() == b"{}"
    assert changed == [f"{run}/environment.json"]


def test_another_process_that_fetches_an_older_version(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It read all before the object changed, and its file gets the name after ours."""
    write_side(tmp_path / "old.h5", 3, seed=5)
    plain = remote_copies.fetch_object

    def fetch(file: remote.RemoteFile, target: Path, *args: Any) -> str:
        sha256 = plain(file, target, *args)
        shutil.copyfile(tmp_path / "old.h5", tmp_path / "theirs")
        (tmp_path / "theirs").replace(target)
        return sha256

    with monkeypatch.context() as patch:
        patch.setattr(remote_copies, "fetch_object", fetch)
        featcache.open_cache(cache)
    wanted = featcache.open_cache(tmp_path / "made.h5").content_sha256
    assert featcache.open_cache(cache).content_sha256 == wanted


def test_large_objects_are_fetched_in_turn(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes 64 MiB of memory: eight stretches of 8 MiB."""
    monkeypatch.setattr(remote_copies, "CHUNK_BYTES", 1024)
    monkeypatch.setattr(objects, "CHUNK_BYTES", 1024)
    for number in range(4):
        write_side(tmp_path / "made.h5", 3, seed=number)
        put(tmp_path / "made.h5", f"{memory}/caches/{number}.h5")
    asked, plain = list[str](), remote.RemoteFile.read

    def read(file: remote.RemoteFile, offset: int, num_bytes: int) -> bytes:
        asked.append(file.url)
        return plain(file, offset, num_bytes)

    monkeypatch.setattr(remote.RemoteFile, "read", read)
    copy = remote_copies.fetch(f"{memory}/caches")
    assert copy is not None
    assert len(asked) > 4 * 8
    assert [url for url, _ in itertools.groupby(asked)] == [
        f"{memory}/caches/{n}.h5" for n in range(4)
    ]


def test_a_damaged_copy(cache: str, copies: Path) -> None:
    wanted = featcache.open_cache(cache).content_sha256
    (file,) = (copies / "read").glob("*/c.h5")
    status, data = file.stat(), bytearray(file.read_bytes())
    data[-9] ^= 1
    with file.open("rb+") as out:
        out.write(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CacheError, match=rf"local copy: .*\({cache}\).*fetched anew"):
        featcache.open_cache(cache)
    assert featcache.open_cache(cache).content_sha256 == wanted
    with file.open("rb+") as out:
        out.write(data)  # its time tells
    assert featcache.open_cache(cache).content_sha256 == wanted
    (file.parent / "copy.json").write_text('{"files": [1]}')
    assert featcache.open_cache(cache).content_sha256 == wanted


def test_a_full_disk(cache: str, copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("featcache.files.sync_file", full)
    with pytest.raises(CacheError, match=r"disk space: expected [\d,]+ bytes, found"):
        featcache.open_cache(cache)
    assert not [file for file in copies.rglob("*") if file.is_file()]


@pytest.mark.parametrize("name", ["c#1.h5", "copy.json", "\N{GRINNING FACE}" * 150 + ".h5"])
def test_names_of_all_kinds(cache: str, memory: str, tmp_path: Path, name: str) -> None:
    url = put(tmp_path / "made.h5", f"{memory}/{name}")
    run = f"{memory}/{name.replace('copy.json', 'lock')}.run"
    featcache.train(url, run, **HEAD)
    assert featcache.info(run).cache["path"] == f"../{name}"
    assert featcache.evaluate(run, split="test").num_samples


def test_passwords_and_signatures_are_kept_nowhere(
    cache: str, memory: str, tmp_path: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "https://ann:s3cret@host/c.h5?X-Amz-Signature=s3cret&X-Amz-Date=1"
    file = remote.RemoteFile(cache, (tmp_path / "made.h5").stat().st_size, "tag")
    monkeypatch.setattr(
        remote_copies, "find_objects", lambda u: {"": file} if u.startswith(url) else {}
    )

    def fetch_object(_: object, target: Path, __: object, publish: Callable[[Path], None]) -> str:
        shutil.copyfile(tmp_path / "made.h5", target.with_name("new"))
        publish(target.with_name("new"))
        return "0" * 64

    monkeypatch.setattr(remote_copies, "fetch_object", fetch_object)
    monkeypatch.setattr(remote_copies, "BESIDE", ())
    featcache.train(url, tmp_path / "run", **HEAD)
    assert "s3cret" not in f"{featcache.info(url).as_dict()} {featcache.open_cache(url)}"
    kept = [f for top in (copies, tmp_path / "run") for f in top.rglob("*.json")]
    assert len(kept) > 2
    assert not [f for f in kept if "s3cret" in f.read_text()]
    with pytest.raises(DataError, match=r"\(https://host/no.h5\?\.\.\.\)\. Check") as caught:
        featcache.open_cache(url.replace("c.h5", "no.h5"))
    assert "s3cret" not in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="no such modes")
def test_copies_are_for_their_owner_alone(cache: str, copies: Path) -> None:
    featcache.open_cache(cache)
    assert copies.stat().st_mode & 0o777 == 0o700


def test_a_server_in_run_json_is_not_asked(cache: str, memory: str, copies: Path) -> None:
    for url, place, found in (
        (f"{memory}/run", "../c.h5", cache), (f"{memory}/run", "s3://a/c.h5", "s3://a/c.h5"),
        (f"{memory}/run", "https://there/c.h5", None), ("https://x/r", "../../c.h5", "https://x/c.h5"),
        (f"{memory}/run", "/data/c.h5", None), ("https://x/r", "https://x/a.h5", "https://x/a.h5"),
    ):  # fmt: skip
        run = remote_copies.place_of(url)
        assert remote_copies.url_from(run, place) == found
    assert remote_copies.url_from(copies, "../c.h5") is None
