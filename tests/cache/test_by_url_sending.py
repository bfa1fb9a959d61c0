"""What is made for a URL: sent whole, by one of two writers, found again after a kill."""

from __future__ import annotations

import contextlib
import itertools
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from sample_images import write_tree
from sample_sides import write_side
from sample_urls import HEAD, another_computer, break_after, die_before, names, put, read, works

import featcache
from featcache.backbones.backbone import Backbone
from featcache.cache import remote_work
from featcache.cache.by_url import _own_folder
from featcache.cli.ending import Command
from featcache.errors import CacheError, ConfigError, DataError, FeatcacheWarning, RunError
from featcache.locking import writer_lock

pytestmark = pytest.mark.usefixtures("copies")


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
    assert lines[0].startswith(f"sends what an earlier command made, kept in {copies / 'work'}")
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


@pytest.mark.parametrize("name", ["lock", "work.json", "uploading.json"])
def test_a_run_may_have_any_name(cache: str, memory: str, name: str) -> None:
    featcache.train(cache, f"{memory}/{name}", **HEAD)
    assert featcache.load_run(f"{memory}/{name}")


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
    with pytest.MonkeyPatch.context() as patch:
        another_computer(patch, tmp_path / "another")
        with pytest.raises(DataError, match=r"whose upload has not ended.*--overwrite"):
            featcache.train(cache, run, **HEAD)
    (made,) = (path for path in works(copies) if path.is_dir())
    wanted = featcache.load_run(made).weights_sha256
    with pytest.raises(ConfigError, match="--learning-rate"):  # what waits outlives bad input
        featcache.train(cache, run, **HEAD, learning_rate=-1, overwrite=True)
    with pytest.raises(RunError, match="there already"):  # it is sent before
        featcache.train(cache, run, **HEAD | {"epochs": 2})
    assert "uploading.json" not in names(run)
    assert featcache.load_run(run).weights_sha256 == wanted
    assert works(copies) == []
    done = featcache.train(cache, run, **HEAD, overwrite=True)
    assert featcache.load_run(run).weights_sha256 == done.weights_sha256
    assert type(done) is featcache.TrainSummary
    assert done.as_dict()["run"] == run
    assert done.classes == ("covid", "normal")
    assert works(copies) == []


def test_a_kill_before_any_request_that_writes(
    cache: str, memory: str, tmp_path: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next command sends what was made; meanwhile others see the old run, or none."""
    run, num_requests = f"{memory}/run", 0
    seen = list[str | None]()
    old = featcache.train(cache, run, **HEAD).weights_sha256
    with monkeypatch.context() as patch:
        break_after(patch, 0)
        with pytest.raises(DataError, match="cut"):
            featcache.train(cache, run, **HEAD | {"epochs": 2}, overwrite=True)
    (made,) = (path for path in works(copies) if path.is_dir())
    new = featcache.load_run(made).weights_sha256
    while True:
        num_requests += 1
        with monkeypatch.context() as patch:
            die_before(patch, num_requests)
            with pytest.raises((KeyboardInterrupt, RunError)) as caught:
                featcache.train(cache, run, **HEAD)
        if caught.type is RunError:
            break
        with monkeypatch.context() as patch:
            another_computer(patch, tmp_path / "another")
            seen.append(None)
            with contextlib.suppress(DataError):
                seen[-1] = featcache.load_run(run).weights_sha256
    assert num_requests > 2 * len(names(run))
    left = [name.partition(".")[0] for name in names(run) if name.endswith(".tmp")]
    assert left in ([], ["uploading"]), "in memory a rename is a copy and a removal"
    assert [sha256 for sha256, _ in itertools.groupby(seen)] == [old, None]
    assert featcache.load_run(run).weights_sha256 == new
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


def test_an_upload_that_another_has_taken_over(
    cache: str, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plain = f"{memory}/run", remote_work.send_object

    def send_object(source: Path, url: str, *how: Any) -> Any:
        answer = plain(source, url, *how)
        if url == f"{run}/run.json":
            put(tmp_path / "made.h5", f"{run}/uploading.json")
        return answer

    monkeypatch.setattr(remote_work, "send_object", send_object)
    with pytest.raises(CacheError, match="written in the meantime"):
        featcache.train(cache, run, **HEAD)
    with pytest.raises(DataError, match="has not ended"):
        featcache.load_run(run)


def test_an_answer_that_is_lost(
    cache: str, memory: str, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is there, and the sender did not live to note it: nothing is sent again."""

    def lose(plain: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            answer = plain(*args)
            if name in args:
                raise KeyboardInterrupt
            return answer

        return call

    url, run = f"{memory}/some.h5", f"{memory}/run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote_work, "send_object", lose(remote_work.send_object, url))
        with pytest.raises(KeyboardInterrupt):
            featcache.select(cache, url)
        last = f"{run}/uploading.json"
        patch.setattr(remote_work, "remove_object", lose(remote_work.remove_object, last))
        with pytest.raises(KeyboardInterrupt):
            featcache.train(cache, run, **HEAD)
    assert len({path.parent for path in works(copies)}) == 2
    monkeypatch.setattr(MemoryFileSystem, "put_file", None)
    with pytest.raises(CacheError, match="there already"):
        featcache.select(cache, url)
    with pytest.raises(RunError, match="there already"):
        featcache.train(cache, run, **HEAD)
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
    assert said.pop().startswith(f"{url} is whole in {lock.parent}, and not sent: the next command")
    with writer_lock(lock, "it"), pytest.raises(CacheError, match=rf"{url}: .*no other writer"):
        featcache.select(cache, url)
    assert lock.with_name("some.h5").exists()
    with pytest.raises(CacheError, match="there already"):  # it is sent before
        featcache.select(cache, url)
    featcache.select(cache, url, rebuild=True)
    assert names(memory) == ["c.h5", "some.h5"]


_KILLED = """
import os, signal
import featcache
from fsspec.implementations.local import LocalFileSystem
plain, left = LocalFileSystem.put_file, [NUMBER]
def put_file(self, source, target, **how):
    left[0] -= 1
    if not left[0]:
        self.pipe_file(target, open(source, "rb").read()[:100])
        os.kill(os.getpid(), signal.SIGKILL)
    plain(self, source, target, **how)
LocalFileSystem.put_file = put_file
"""


def kill_at(number: int, code: str) -> None:
    """Run code that sends files to a folder, in a process that is killed when it sends one."""
    code = _KILLED.replace("NUMBER", str(number)) + code
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_sender_that_is_killed(
    tmp_path: Path, copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_side(tmp_path / "made.h5", 3)
    url = "local://store/run"
    kill_at(3, f'featcache.train("made.h5", "{url}", hidden=(4,), epochs=1)')
    assert "uploading.json" in names(url)
    with pytest.raises(DataError, match="has not ended"):
        featcache.load_run(url)
    with pytest.raises(RunError, match="there already"):  # it is sent before
        featcache.train("made.h5", url, **HEAD)
    assert not [name for name in names(url) if name.endswith((".tmp", "uploading.json"))]
    assert works(copies) == []
    kill_at(1, f'featcache.decide("{url}", positive="covid", threshold=0.3)')
    assert [*(copies / "added").rglob("decision.json")]
    assert "decision.json" not in names(url)
    assert featcache.evaluate(url, split="test").num_samples
    assert not [*(copies / "added").iterdir()], "what the killed command would have added is gone"


def test_commands_that_add_to_one_run_at_once(tmp_path: Path) -> None:
    with _own_folder(tmp_path / "copies/added/x") as one, _own_folder(one.parent) as other:
        assert one.is_dir()
        assert one != other
    assert not one.parent.exists()


def test_tables_and_pages(cache: str, memory: str, tmp_path: Path, copies: Path) -> None:
    run, table, page = f"{memory}/run", f"{memory}/table.csv", f"{memory}/page.html"
    featcache.train(cache, run, **HEAD)
    for _ in range(2):  # what is there is replaced
        featcache.evaluate(run, split="test", csv=table)
        assert read(table).startswith(b"path,")
    assert featcache.report(run, page).as_dict()["file"] == page
    assert read(page).startswith(b"<!DOCTYPE html>")
    assert "report.html" not in names(run)
    audited = featcache.audit(cache, only="same", csv=f"{memory}/copies.csv")
    assert audited.as_dict()["csv"] == f"{memory}/copies.csv"
    with pytest.warns(FeatcacheWarning, match="trained on"):
        featcache.predict(run, cache=cache, csv=f"{memory}/predictions.csv")
    for place, message in ((cache, "those that are read"), (run, "something that is no CSV")):
        with pytest.raises(ConfigError, match=rf"{message}.* \({place}\)"):
            featcache.evaluate(run, split="test", csv=place)
    with pytest.MonkeyPatch.context() as patch:
        break_after(patch, 0)
        with pytest.raises(DataError, match="cut"):
            featcache.report(run, page)
    put(tmp_path / "made.h5", page)
    with pytest.raises(ConfigError, match="no featcache report"):
        featcache.report(run, page)
    assert works(copies) == []
