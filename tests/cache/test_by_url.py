"""Caches and runs by URL are as those of files: in memory, in a folder, and in S3 of moto."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from command_line import TESTS, TINY, assert_one_line_error, command
from fsspec.implementations.memory import MemoryFileSystem
from sample_images import write_tree
from sample_sides import write_side
from sample_stores import moto_bucket

import featcache
from featcache.backbones.backbone import Backbone
from featcache.cache import remote_copies, remote_work
from featcache.cli.ending import Command
from featcache.data import objects, remote
from featcache.errors import COPIES, CacheError, ConfigError, DataError, FeatcacheWarning, RunError
from featcache.locking import writer_lock

HEAD: dict[str, Any] = {"hidden": (4,), "epochs": 1}


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where local copies lie."""
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    monkeypatch.setenv("FEATCACHE_COPIES", str(tmp_path / "copies"))
    COPIES.clear()
    return tmp_path / "copies"


@pytest.fixture
def memory() -> str:
    """A URL of a new folder in memory."""
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def cache(memory: str, tmp_path: Path) -> str:
    """A cache in memory."""
    write_side(tmp_path / "made.h5", 3)
    return put(tmp_path / "made.h5", f"{memory}/c.h5")


def put(file: Path, url: str) -> str:
    fs, path = fsspec.url_to_fs(url)
    fs.pipe_file(path, file.read_bytes())
    return url


def names(url: str) -> list[str]:
    fs, path = fsspec.url_to_fs(url)
    return sorted(name[len(path) + 1 :] for name in fs.find(path))


def works(copies: Path) -> list[Path]:
    return list((copies / "work").glob("*/*"))


def another_computer(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("FEATCACHE_COPIES", str(folder))


# --------------------------------------------------------------------------------- the whole way


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


def test_a_run_goes_the_whole_way(cache: str, memory: str, tmp_path: Path, copies: Path) -> None:
    run, lines = f"{memory}/runs/a", list[str]()
    made = featcache.train(cache, run, **HEAD, say=lines.append)
    assert made.as_dict()["run"] == run
    assert made.run.is_dir()
    assert f"written to {run}" in lines[-1]
    assert "run.json" in names(run)
    assert featcache.info(run).cache["path"] == "../../c.h5"
    with pytest.raises(RunError, match=rf"a run that is there already \({run}\)"):
        featcache.train(cache, run, **HEAD)
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
    with pytest.raises(ConfigError, match="Only images, caches and runs"):
        featcache.export(f"{memory}/swept", f"{memory}/x.pt")


# ------------------------------------------------------------------------------------------ reading


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
    monkeypatch.setattr(objects, "_CHUNK_BYTES", 1024)
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


# ------------------------------------------------------------------------------------------ writing


def break_after(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Let a store take so many files, half of one more, and then nothing; return what it took."""
    plain, taken = MemoryFileSystem.put_file, list[str]()

    def put_file(self: Any, source: str, target: str, **how: Any) -> None:
        if len(taken) >= number:
            self.pipe_file(target, Path(source).read_bytes()[:100])
            raise ConnectionError("cut")
        taken.append(target)
        plain(self, source, target, **how)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    return taken


def test_an_upload_that_fails_is_made_up_for(
    memory: str, tmp_path: Path, copies: Path, tiny_backbone: Backbone,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tree = write_tree(tmp_path / "tree", {"train": 2, "valid": 1, "test": 1})
    url, lines = f"{memory}/c.h5", list[str]()
    with pytest.MonkeyPatch.context() as patch:
        break_after(patch, 0)
        with pytest.raises(DataError, match=rf"cut.*\({url}\)"):
            featcache.extract(tree, url, backbone=tiny_backbone, say=lines.append)
    assert names(memory) == []
    assert f"whole and kept in {copies / 'work'}" in lines[-1]
    lines.clear()
    done = featcache.extract(tree, url, backbone=tiny_backbone, say=lines.append)
    assert (done.status, done.num_new) == ("up to date", 0)
    assert any("goes on with what is kept" in line for line in lines)
    assert names(memory) == ["c.h5"]
    assert featcache.verify(url).num_rows == 8
    assert works(copies) == []


def test_what_waits_outlives_a_store_that_still_refuses(
    cache: str, memory: str, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("403 Forbidden")

    run = f"{memory}/run"
    break_after(monkeypatch, 0)
    with pytest.raises(DataError, match="cut"):
        featcache.train(cache, run, **HEAD)
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    for overwrite in (False, True):
        with pytest.raises(DataError, match="403"):
            featcache.train(cache, run, **HEAD, overwrite=overwrite)
        (work,) = (path for path in works(copies) if path.is_dir())
        assert (work / "run.json").exists()


def test_a_kill_after_all_was_sent(
    cache: str, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    url = f"{memory}/some.h5"
    with monkeypatch.context() as patch:
        patch.setattr(remote_work, "keep_record", die)
        with pytest.raises(KeyboardInterrupt):
            featcache.select(cache, url)
    with pytest.raises(CacheError, match="there already"):
        featcache.select(cache, url)


def test_nothing_is_added_to_a_run_that_was_replaced(
    cache: str, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = f"{memory}/run"
    featcache.train(cache, run, **HEAD)

    def meanwhile() -> None:
        with pytest.MonkeyPatch.context() as patch:
            another_computer(patch, tmp_path / "another")
            featcache.train(cache, run, **HEAD | {"epochs": 2}, overwrite=True)

    def link(*args: Any) -> Any:
        monkeypatch.undo()
        monkeypatch.setenv("FEATCACHE_COPIES", str(tmp_path / "copies"))
        meanwhile()
        return remote_work.link(*args)

    monkeypatch.setattr("featcache.cache.by_url.link", link)
    with pytest.warns(FeatcacheWarning, match=r"not kept in .*written in the meantime"):
        featcache.evaluate(run, split="test")
    assert not [name for name in names(run) if name.startswith("evaluation")]


@pytest.mark.parametrize("name", ["c#1.h5", "copy.json", "\N{GRINNING FACE}" * 150 + ".h5"])
def test_names_of_all_kinds(cache: str, memory: str, tmp_path: Path, name: str) -> None:
    url = put(tmp_path / "made.h5", f"{memory}/{name}")
    run = f"{memory}/{name.replace('copy.json', 'lock')}.run"
    featcache.train(url, run, **HEAD)
    assert featcache.info(run).cache["path"] == f"../{name}"
    assert featcache.evaluate(run, split="test").num_samples


@pytest.mark.parametrize("name", ["lock", "work.json", "uploading.json"])
def test_a_run_may_have_any_name(cache: str, memory: str, name: str) -> None:
    featcache.train(cache, f"{memory}/{name}", **HEAD)
    assert featcache.load_run(f"{memory}/{name}")


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


def test_a_run_whose_upload_was_cut_is_no_run(
    cache: str, memory: str, tmp_path: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = f"{memory}/run"
    with pytest.MonkeyPatch.context() as patch:
        break_after(patch, 3)
        with pytest.raises(DataError, match="cut"):
            featcache.train(cache, run, **HEAD)
    assert len(names(run)) == 3
    assert "run.json" not in names(run)
    with pytest.raises(DataError, match=rf"whose upload has not ended \({run}\)"):
        featcache.load_run(run)
    with pytest.raises(CacheError, match="waits to be sent"):
        featcache.train(cache, run, **HEAD)
    with pytest.MonkeyPatch.context() as patch:
        another_computer(patch, tmp_path / "another")
        with pytest.raises(DataError, match=r"whose upload has not ended.*--overwrite"):
            featcache.train(cache, run, **HEAD)
    done = featcache.train(cache, run, **HEAD, overwrite=True)
    assert "uploading.json" not in names(run)
    assert featcache.load_run(run).weights_sha256 == done.weights_sha256
    assert type(done) is featcache.TrainSummary
    assert done.as_dict()["run"] == run
    assert done.classes == ("covid", "normal")
    assert works(copies) == []


def test_a_cut_replacement_is_no_mixture(
    cache: str, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = f"{memory}/run"
    featcache.train(cache, run, **HEAD)
    featcache.evaluate(run, split="test")
    with pytest.MonkeyPatch.context() as patch:
        break_after(patch, 2)
        with pytest.raises(DataError, match="cut"):
            featcache.train(cache, run, **HEAD | {"epochs": 2}, overwrite=True)
    with pytest.raises(DataError, match="has not ended"):
        featcache.evaluate(run, split="test")
    another_computer(monkeypatch, tmp_path / "another")
    done = featcache.train(cache, run, **HEAD | {"epochs": 3}, overwrite=True)
    assert featcache.load_run(run).weights_sha256 == done.weights_sha256
    assert not [name for name in names(run) if name.startswith(("evaluation", "uploading"))]


def test_two_who_write_the_same(
    cache: str, memory: str, tmp_path: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, theirs = f"{memory}/some.h5", tmp_path / "theirs.h5"
    write_side(theirs, 3, seed=9)

    def meanwhile(_: object) -> None:
        put(theirs, url)

    select: Callable[..., Any] = featcache.select
    with pytest.raises(CacheError, match=r"written in the meantime.*--rebuild"):
        select(cache, url, say=meanwhile)
    assert featcache.open_cache(url).content_sha256 == featcache.open_cache(theirs).content_sha256
    with pytest.raises(CacheError, match="written in the meantime"):
        select(cache, url)
    done = select(cache, url, rebuild=True)
    assert featcache.open_cache(url).content_sha256 == done.content_sha256
    run = f"{memory}/run"
    with pytest.raises(CacheError, match=r"written in the meantime"):
        featcache.train(cache, run, **HEAD, say=lambda _: put(theirs, f"{run}/run.json"))
    assert names(run) == ["run.json"]


def test_an_answer_that_is_lost(
    cache: str, memory: str, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object is there, and the sender did not live to note it."""
    url = f"{memory}/some.h5"
    plain = remote_work.send_object

    def lose(*args: Any) -> None:
        plain(*args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_work, "send_object", lose)
        with pytest.raises(KeyboardInterrupt):
            featcache.select(cache, url)
    with pytest.raises(CacheError, match="there already"):
        featcache.select(cache, url)
    assert works(copies) == []


def test_what_an_interrupted_command_says_is_kept(
    cache: str, memory: str, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, said = f"{memory}/some.h5", list[str]()

    def interrupt(*_: object) -> None:
        said.append(Command("select", {"new": Path(url)}).what_is_kept())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        featcache.select(cache, url, say=interrupt)
    assert said.pop() == "nothing is kept; the same command starts again"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_work, "send_object", interrupt)
        with pytest.raises(KeyboardInterrupt):
            featcache.select(cache, url)
    (lock,) = (copies / "work").glob("*/lock")
    assert said.pop() == f"{url} is whole in {lock.parent}, and not sent"
    with writer_lock(lock, "it"), pytest.raises(CacheError, match=rf"{url}: .*no other writer"):
        featcache.select(cache, url)
    with pytest.raises(CacheError, match=r"waits to be sent.*--rebuild"):
        featcache.select(cache, url)
    assert lock.with_name("some.h5").exists()
    featcache.select(cache, url, rebuild=True)
    assert names(memory) == ["c.h5", "some.h5"]


def test_a_server_in_run_json_is_not_asked(cache: str, memory: str, copies: Path) -> None:
    for url, place, found in (
        (f"{memory}/run", "../c.h5", cache), (f"{memory}/run", "s3://a/c.h5", "s3://a/c.h5"),
        (f"{memory}/run", "https://there/c.h5", None), ("https://x/r", "../../c.h5", "https://x/c.h5"),
        (f"{memory}/run", "/data/c.h5", None), ("https://x/r", "https://x/a.h5", "https://x/a.h5"),
    ):  # fmt: skip
        run = remote_copies.place_of(url)
        assert remote_copies.url_from(run, place) == found
    assert remote_copies.url_from(copies, "../c.h5") is None


_KILLED = """
import os, signal, sys
import featcache
from fsspec.implementations.local import LocalFileSystem
plain, left = LocalFileSystem.put_file, [3]
def put_file(self, source, target, **how):
    left[0] -= 1
    if not left[0]:
        self.pipe_file(target, open(source, "rb").read()[:100])
        os.kill(os.getpid(), signal.SIGKILL)
    plain(self, source, target, **how)
LocalFileSystem.put_file = put_file
featcache.train("made.h5", "local://store/run", hidden=(4,), epochs=1)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_sender_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_side(tmp_path / "made.h5", 3)
    done = subprocess.run(
        [sys.executable, "-c", _KILLED], env=os.environ | {"PYTHONPATH": str(TESTS)}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    url = "local://store/run"
    assert "uploading.json" in names(url)
    with pytest.raises(DataError, match="has not ended"):
        featcache.load_run(url)
    again = featcache.train("made.h5", url, **HEAD, overwrite=True)
    assert featcache.load_run(url).weights_sha256 == again.weights_sha256
    assert featcache.evaluate(url, split="test").num_samples
    leftovers = [name for name in names(url) if name.endswith((".tmp", "uploading.json"))]
    assert len(leftovers) <= 1, "a temporary file of the killed sender, nothing under a final name"


# ------------------------------------------------------------------------------------- S3, by moto


@pytest.fixture(scope="module")
def bucket(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    """A URL in moto's server, and a client of it."""
    with moto_bucket(request, "caches") as client:
        yield "s3://caches", client


def keys(client: Any) -> list[str]:
    return [one["Key"] for one in client.list_objects_v2(Bucket="caches").get("Contents", [])]


def test_s3_takes_parts_and_only_what_is_meant(
    bucket: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, client = bucket[0] + "/o/a.bin", bucket[1]
    file, sent = tmp_path / "a.bin", list[int]()
    file.write_bytes(os.urandom(objects._PART_BYTES + 5))
    tag = objects.send_object(file, url, None, sent.append).tag
    assert tag.endswith('-2"')
    assert sum(sent) == file.stat().st_size
    copy = tmp_path / "copy.bin"
    objects.fetch_object(objects.find_objects(url)[""], copy, sent.append)
    assert copy.read_bytes() == file.read_bytes()
    with monkeypatch.context() as patch:  # the store itself refuses, not only a look before
        patch.setattr(objects, "_require", lambda *_: None)
        other = '"0123456789abcdef0123456789abcdef"'
        # moto does not look at If-Match of parts that are put together; AWS does
        for size, was in ((objects._PART_BYTES + 9, None), (9, None), (9, other)):
            file.write_bytes(os.urandom(size))
            with pytest.raises(objects.ObjectChangedError):
                objects.send_object(file, url, was, sent.append)
    assert objects.find_objects(url)[""].tag == tag
    assert "-" not in objects.send_object(file, url, tag, sent.append).tag
    assert not client.list_multipart_uploads(Bucket="caches").get("Uploads")
    objects.check_writable(url + "2")
    objects.remove_object(url)
    assert objects.find_objects(url) == {}
    assert keys(client) == []
    with pytest.raises(DataError, match=r"bucket does not exist.*s3://nobody/x"):
        objects.check_writable("s3://nobody/x")


def test_the_command_line_with_s3(
    bucket: tuple[str, Any], tmp_path: Path, tiny_backbone: Backbone
) -> None:
    url, client = bucket
    tree = write_tree(tmp_path / "tree", {"train": 4, "valid": 2, "test": 2})
    for file in tree.rglob("*.*"):
        client.upload_file(str(file), "caches", f"images/{file.relative_to(tree).as_posix()}")
    cache, run = f"{url}/c.h5", f"{url}/run"
    for line, said in (
        (["extract", f"{url}/images", cache, *TINY], f"{cache}: 16 images (16 new)"),
        (["extract", f"{url}/images", cache, *TINY], f"{cache}: up to date"),
        (["train", cache, run, "--hidden", "4", "--epochs", "1"], f"written to {run}"),
        (["evaluate", run, "--positive", "covid"], f"written to {run}/evaluation/: test.json"),
        (["predict", run, tree / "test/covid", "--backbone", TINY[1]], "2 images: "),
    ):
        done = command(*line, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
    done = command("train", cache, run, cwd=tmp_path)
    assert_one_line_error(done, f"a run that is there already ({run})")
    assert "run/evaluation/test.json" in keys(client)
