"""Caches and runs in a store that speaks S3 over HTTP: moto's server."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from command_line import TINY, assert_one_line_error, command
from sample_images import write_tree
from sample_sides import write_side
from sample_urls import keys

import featcache
from featcache.backbones.backbone import Backbone
from featcache.data import objects
from featcache.errors import DataError

pytestmark = pytest.mark.usefixtures("copies")


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


def test_what_a_verb_adds_is_not_fetched_again(
    bucket: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each verb: the objects that are got, and the objects that are put."""
    got, given = list[str](), list[str]()

    def log_request(self: Any, *_: object) -> None:
        bucket_path = urlsplit(self.path).path.removeprefix("/caches/")
        {"GET": got, "PUT": given}.get(self.command, list[str]()).append(bucket_path)

    write_side(tmp_path / "made.h5", 3)
    bucket[1].upload_file(str(tmp_path / "made.h5"), "caches", "added/c.h5")
    cache, run = f"{bucket[0]}/added/c.h5", f"{bucket[0]}/added/run"
    featcache.train(cache, run, hidden=(4,), epochs=1)
    serving: Any = pytest.importorskip("werkzeug.serving")
    monkeypatch.setattr(serving.WSGIRequestHandler, "log_request", log_request)
    calls: dict[str, Callable[[], Any]] = {
        "run/decision.json": lambda: featcache.decide(run, positive="covid", threshold=0.3),
        "run/evaluation/test.json": lambda: featcache.evaluate(run, split="test"),
        "run/report.html": lambda: featcache.report(run),
        "c.h5.audit.json": lambda: featcache.audit(cache),
    }
    for name, call in calls.items():
        got.clear()
        given.clear()
        call()
        assert f"added/{name}" in given
        call()
        assert [key for key in got if key.startswith("added/")] == []
