"""Several backbones at once: one decoding, and caches as by an extraction of each."""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_network
import torch
from sample_images import write_image

from featcache.backbones.backbone import Backbone, wrap_backbone
from featcache.cache.writing import partial_folder
from featcache.errors import CacheError, ConfigError, FeatcacheWarning
from featcache.extraction import view_stream, work
from featcache.extraction.extraction import extract
from featcache.extraction.work import ShardWriter
from featcache.pixels.views import render


def second_backbone() -> Backbone:
    """Another network, another size, another normalization."""
    return wrap_backbone(
        "python:second:build",
        tiny_network.network(),
        image_size=48,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )


@pytest.fixture
def num_decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[bytes]:
    """How often each image, by its sha256, was decoded by the pipeline."""
    counts: Counter[bytes] = Counter()

    def counting(data: bytes, recipes: Any, sha256: bytes) -> Any:
        counts[sha256] += 1
        return render(data, recipes, sha256)

    monkeypatch.setattr(view_stream, "render", counting)
    return counts


@pytest.mark.parametrize("engine", ["folded", "onnx"])
def test_several_backbones_share_one_decoding_and_equal_their_own_extractions(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, num_decoded: Counter[bytes], engine: str
) -> None:
    backbones = [tiny_backbone, second_backbone()]
    options: dict[str, Any] = {"engine": engine, "views": 3, "augment": "crop"}
    summaries = extract(tree, tmp_path / "many", backbone=backbones, **options)
    assert set(num_decoded.values()) == {1}
    assert len(num_decoded) == 46
    names = ["python-tiny_network-build.h5", "python-second-build.h5"]
    assert [Path(s.cache).name for s in summaries.values()] == names
    assert list(summaries) == [backbone.name for backbone in backbones]
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == sorted(names)
    for i, (backbone, summary) in enumerate(zip(backbones, summaries.values(), strict=True)):
        alone = extract(tree, tmp_path / f"{i}.h5", backbone=backbone, **options)
        assert summary.content_sha256 == alone.content_sha256
        assert (summary.num_new, summary.num_known) == (46, 0)
    again = extract(tree, tmp_path / "many", backbone=backbones, **options)
    assert [s.status for s in again.values()] == ["up to date"] * 2


def test_a_backbone_that_is_ahead_runs_nothing_again(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, num_decoded: Counter[bytes]
) -> None:
    """One knows the test split's images already; those of train are new to both."""
    folder = tmp_path / "many"
    backbones = [tiny_backbone, second_backbone()]
    hidden = tmp_path / "hidden"
    shutil.move(tree / "train", hidden)
    (bad := tree / "test" / "covid" / "tec000_0.jpg").write_bytes(b"broken")
    with pytest.warns(FeatcacheWarning, match="1 image could not be read"):
        extract(tree, folder / "python-tiny_network-build.h5", backbone=tiny_backbone)
    write_image(bad, 77)
    shutil.move(hidden, tree / "train")
    num_decoded.clear()
    first, second = extract(tree, folder, backbone=backbones).values()
    assert set(num_decoded.values()) == {1}
    assert (first.num_new, first.num_known) == (25, 21)
    assert (second.num_new, second.num_known) == (46, 0)
    for i, (backbone, summary) in enumerate(zip(backbones, (first, second), strict=True)):
        alone = extract(tree, tmp_path / f"{i}.h5", backbone=backbone)
        assert summary.content_sha256 == alone.content_sha256


def test_an_interrupted_run_of_several_backbones_goes_on(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its own shards; what one has lost, the other need not run again."""
    monkeypatch.setattr(work, "SHARD_BYTES", tiny_network.shard_bytes(4, 1))
    taken, broken = Counter[int](), list[ShardWriter]()
    take, flush = ShardWriter.take, ShardWriter.flush

    def taking(self: ShardWriter, *arguments: Any) -> None:
        taken[id(self)] += 1
        if len(taken) == 2 and min(taken.values()) == 20:  # the second cache's
            broken.append(self)
            raise KeyboardInterrupt
        take(self, *arguments)

    def flushing(self: ShardWriter) -> None:
        if self in broken:
            raise KeyboardInterrupt
        flush(self)

    monkeypatch.setattr(ShardWriter, "take", taking)
    monkeypatch.setattr(ShardWriter, "flush", flushing)
    backbones = [tiny_backbone, second_backbone()]
    with pytest.raises(KeyboardInterrupt):
        extract(tree, tmp_path / "many", backbone=backbones, batch_size=1)
    monkeypatch.setattr(ShardWriter, "take", take)
    monkeypatch.setattr(ShardWriter, "flush", flush)
    first, second = extract(tree, tmp_path / "many", backbone=backbones, batch_size=1).values()
    assert (first.num_known, second.num_known) == (20, 16)  # whole shards
    for i, (backbone, summary) in enumerate(zip(backbones, (first, second), strict=True)):
        alone = extract(tree, tmp_path / f"{i}.h5", backbone=backbone, batch_size=1)
        assert summary.content_sha256 == alone.content_sha256


def test_backbones_begun_with_other_threads_are_finished_one_by_one(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over other threads have other bits: rows of one cache are of one number of them."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    backbones, threads = [tiny_backbone, second_backbone()], torch.get_num_threads()
    files = [
        tmp_path / "many" / (backbone.name.replace(":", "-") + ".h5") for backbone in backbones
    ]
    try:
        with monkeypatch.context() as broken:
            broken.setattr(work, "SHARD_BYTES", tiny_network.shard_bytes(4, 1))
            broken.setattr(work, "held_signals", lambda _: contextlib.nullcontext(stop))
            for number, (file, backbone) in enumerate(zip(files, backbones, strict=True)):
                torch.set_num_threads(1 + number)
                with pytest.raises(KeyboardInterrupt):
                    extract(tree, file, backbone=backbone, batch_size=1)
                assert partial_folder(file).exists()
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(CacheError) as refused:
        extract(tree, tmp_path / "many", backbone=backbones, batch_size=1)
    assert str(refused.value) == (
        "unfinished extraction: expected 1 torch threads, with which it was begun, found 2, with "
        f"which another backbone's rows were made ({files[0]}). Finish it by itself: featcache "
        f"extract DATA {files[0]} --backbone {tiny_backbone.name}."
    )
    for file, backbone in zip(files, backbones, strict=True):
        assert extract(tree, file, backbone=backbone).num_images == 46
    assert torch.get_num_threads() == threads


def test_one_backbone_in_a_list_gets_a_folder_too(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    made = extract(tree, tmp_path / "one", backbone=[tiny_backbone])
    assert list(made) == [tiny_backbone.name]
    assert (tmp_path / "one" / "python-tiny_network-build.h5").exists()


def test_several_backbones_that_make_no_sense_are_refused(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match="different backbones"):
        extract(tree, tmp_path / "many", backbone=[tiny_backbone, tiny_backbone])
    with pytest.raises(ConfigError, match="different backbones"):
        extract(tree, tmp_path / "many", backbone=[])
    both = [tiny_backbone, second_backbone()]
    with pytest.raises(ConfigError, match=r"--weights.*one backbone at a time"):
        extract(tree, tmp_path / "many", backbone=both, weights="file.pth")
    with pytest.raises(ConfigError, match=r"a folder.*file"):
        extract(tree, tmp_path / "file", backbone=both)
    with pytest.raises(ConfigError, match="outside the folder of images"):
        extract(tree, tree, backbone=both)
    assert not (tmp_path / "many").exists()
