"""Predict and explain take images by URL: the rows and the probabilities of the local folder."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from command_line import assert_one_line_error
from sample_shards import write_hugging_face, write_webdataset
from sample_stores import Stores, moto_bucket, upload

from featcache.data import remote
from featcache.data.image_lists import list_images
from featcache.deployment.explanation import explain
from featcache.deployment.inputs import list_inputs
from featcache.deployment.predictions import Predictions, predict
from featcache.errors import ConfigError, DataError, FeatcacheWarning
from featcache.extraction.recipe import NUM_PROBES
from featcache.heads.training import train

TINY = "python:tiny_network:build"
pytestmark = pytest.mark.usefixtures("children_here", "no_waiting")


@pytest.fixture
def trained(cache_of_tree: Path, tmp_path: Path) -> Path:
    train(cache_of_tree, tmp_path / "run", hidden=(4,), epochs=1, device="cpu")
    return tmp_path / "run"


def by_name(predictions: Predictions, top: str | Path) -> dict[str, list[float]]:
    """Return path below a folder -> probabilities."""
    names = [path.removeprefix(f"{top}").lstrip("/") for path in predictions.paths]
    return dict(zip(names, predictions.probs.tolist(), strict=True))


def test_a_folder_objects_a_glob_and_a_csv(trained: Path, tree: Path, memory: str) -> None:
    upload(tree, memory)
    fs, path = fsspec.url_to_fs(memory)
    fs.pipe_file(f"{path}/some.csv", b"path\ntest/covid/tec000_1.png\ntest/normal/ten002_0.jpg\n")
    here = by_name(predict(trained, tree / "test", backbone=TINY), tree / "test")
    there = predict(trained, f"{memory}/test", backbone=TINY)
    assert len(here) == 12
    assert by_name(there, f"{memory}/test") == here
    assert [*there.paths] == sorted(there.paths)
    names = [f"{memory}/test/{name}" for name in ("normal/ten002_0.jpg", "covid/tec000_1.png")]
    mixed = [names[0], np.zeros((40, 40), np.uint8), Path(names[1]), names[0]]
    assert predict(trained, mixed, backbone=TINY).paths == (names[0], "1", names[1], names[0])
    table = predict(trained, f"{memory}/some.csv", backbone=TINY)
    assert [*table.paths] == names[::-1]
    assert by_name(table, f"{memory}/test").items() <= here.items()
    glob = predict(trained, f"{memory}/test/*/*0.jpg", backbone=TINY)
    assert by_name(glob, f"{memory}/test") == {n: p for n, p in here.items() if n.endswith("0.jpg")}


def test_packed_images(trained: Path, tree: Path, tmp_path: Path, memory: str) -> None:
    upload(write_webdataset(tree, tmp_path / "t"), f"{memory}/tars")
    upload(write_hugging_face(tree, tmp_path / "p" / "parquet"), f"{memory}/parquet")
    with zipfile.ZipFile(tmp_path / "p" / "a.zip", "w") as archive:
        for file in tree.rglob("*.*"):
            archive.write(file, file.relative_to(tree))
    upload(tmp_path / "p", memory)
    for here, there in (
        (tmp_path / "t", "tars"), (f"{tmp_path}/t/*.tar", "tars/*.tar"),
        (tmp_path / "p" / "a.zip", "a.zip"), (tmp_path / "p" / "parquet", "parquet"),
        (sorted((tmp_path / "t").iterdir())[0], "tars/test-00000.tar"),
    ):  # fmt: skip
        local = predict(trained, here, backbone=TINY)
        stored = predict(trained, f"{memory}/{there}", backbone=TINY)
        assert by_name(stored, "") == by_name(local, "")
        assert len(stored.paths) in {46, 6}


def test_each_url_is_listed_once(tree: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    upload(tree, memory)
    listed, plain = [], remote.list_files
    monkeypatch.setattr(
        "featcache.data.stored_files.list_files",
        lambda url, **how: listed.append(url) or plain(url, **how),
    )
    urls = [f"{memory}/test", f"{memory}/train/covid/trc000_0.jpg", f"{memory}/test"]
    inputs = list_inputs(urls)
    assert sorted(listed) == sorted(set(urls))
    assert (len(inputs.names), len(inputs.dataset.samples)) == (25, 13)


def test_one_request_an_image(trained: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    remote._file_systems.clear()
    with Stores() as stores:
        stores.put(tree / "test", "images/new")
        for name, value in stores.environment().items():
            monkeypatch.setenv(name, value)
        there = predict(trained, ["s3://images/new", "s3://images/new"], backbone=TINY)
        assert len(there.paths) == 24
        gets = Counter(line for line in stores.log if "list-type" not in line)
        assert len(stores.log) - gets.total() == 1  # page of a listing
        assert len(gets) == 12
        looked_at = 12 + NUM_PROBES  # before: for dark 16-bit colour, and to compare the engine
        assert gets.total() == 12 + looked_at
    remote._file_systems.clear()


def test_what_is_left_out_and_what_looks_like_a_mask(tree: Path, memory: str) -> None:
    upload(tree / "test", memory)
    fs, path = fsspec.url_to_fs(memory)
    image = (tree / "test/covid/tec000_1.png").read_bytes()
    for name in (".hidden.png", "__MACOSX/x.png", "a.tar", "notes.txt", "scan"):
        fs.pipe_file(f"{path}/{name}", image)
    assert len(list_inputs(memory).names) == 12  # and not what is in the tar beside them
    found = list_images([memory])
    assert (len(found.samples), found.num_ignored) == (12, {"hidden": 2, "not an image ending": 3})
    assert [s.path for s in list_images([f"{memory}/scan"]).samples] == [f"{memory}/scan"]
    assert found.read(found.samples[0]) == (tree / "test/covid/tec000_0.jpg").read_bytes()
    assert len(list_images([memory], exclude="covid/*").samples) == 6
    with pytest.warns(FeatcacheWarning, match=rf"matches nothing in {memory}/scan;"):
        assert not list_images([f"{memory}/scan"], include="*.txt").samples


def test_local_tables_of_urls_and_both_kinds_at_once(
    trained: Path, tree: Path, tmp_path: Path, memory: str
) -> None:
    upload(tree, memory)
    url = f"{memory}/test/covid/tec000_1.png"
    (tmp_path / "t.csv").write_text(f"path\n{url}\n")
    assert predict(trained, tmp_path / "t.csv", backbone=TINY).paths == (url,)
    for given in ([url, tree / "test"], [tmp_path / "t.csv", tree / "test"]):
        with pytest.raises(ConfigError, match="expected paths or URLs, found both"):
            list_inputs(given)


def test_failures_are_listed_and_refusals_are_one_line(
    trained: Path, tree: Path, memory: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(tree / "test", memory)
    fs, path = fsspec.url_to_fs(memory)
    plain = list_inputs(memory)

    def changed(*_: Any, **__: Any) -> Any:
        fs.pipe_file(f"{path}/covid/tec000_0.jpg", b"another")
        fs.rm(f"{path}/covid/tec000_1.png")
        return plain

    command = ["predict", "run", "--backbone", TINY]
    with monkeypatch.context() as patch:
        patch.setattr("featcache.deployment.classifier.list_inputs", changed)
        facts = json.loads(run(*command, memory, "--json").out)
    assert len(facts["predictions"]) == 10
    first, second = facts["failures"]
    assert first["path"] == f"{memory}/covid/tec000_0.jpg"
    assert "has changed since it was listed" in first["reason"]
    assert second["path"] == f"{memory}/covid/tec000_1.png"
    fs.pipe_file(f"{path}/empty/notes.txt", b"x")
    for name, message in (
        ("nowhere", "found none"), ("a.csv", "found none"), ("*.dcm", "found none"),
        ("empty", "found none (ignored: 1 x not an image ending"),
    ):  # fmt: skip
        assert_one_line_error(run(*command, f"{memory}/{name}"), f"{memory}/{name}", message)
    result = run(*command, f"{memory}/covid", "data/test")
    assert_one_line_error(result, "paths or URLs, found both")


def test_explain(trained: Path, tree: Path, tmp_path: Path, memory: str) -> None:
    upload(tree / "test", memory)
    fs, path = fsspec.url_to_fs(memory)
    fs.pipe_file(f"{path}/bad.png", b"broken")
    urls = [f"{memory}/bad.png", f"{memory}/covid/tec000_1.png"]
    there = explain(trained, urls, tmp_path / "there", backbone=TINY, say=lambda _: None)
    ((name, _),), (explained,) = there.failures, there.explanations
    assert [name, explained.path] == urls
    here = predict(trained, tree / "test/covid/tec000_1.png", backbone=TINY)
    assert explained.probs == pytest.approx(here.probs[0], abs=1e-6)
    assert (tmp_path / "there" / "0001_tec000_1.png").is_file()


def test_s3_over_http(trained: Path, tree: Path, request: pytest.FixtureRequest) -> None:
    with moto_bucket(request, "looked-at"):
        upload(tree / "test", "s3://looked-at/images")
        here = predict(trained, tree / "test", backbone=TINY)
        there = predict(trained, "s3://looked-at/images", backbone=TINY)
        assert by_name(there, "s3://looked-at/images") == by_name(here, tree / "test")
        for url in ("s3://nobody/images", "s3://looked-at/nothing"):
            with pytest.raises(DataError, match=r"bucket does not exist|found none") as caught:
                predict(trained, url, backbone=TINY)
            assert len(str(caught.value).splitlines()) == 1
