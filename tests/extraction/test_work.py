"""Working on a cache: killed, interrupted, shared and cramped, it loses nothing and lies never."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sample_partial
import tiny_network
import torch
from children import TINY, wait_for, warm_parent

from featcache.backbones.backbone import Backbone, wrap_backbone
from featcache.cache.reading import open_cache
from featcache.errors import CacheError, FeatcacheError
from featcache.extraction import finish, pipeline, work
from featcache.extraction.extraction import extract, plan
from featcache.extraction.partial_cache import PartialCache
from featcache.files import canonical_json

TESTS = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize(
    ("number", "engine"), [(signal.SIGKILL, "onnx"), (signal.SIGINT, "folded")]
)
def test_a_killed_extraction_goes_on_and_ends_equal(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, number: signal.Signals, engine: str
) -> None:
    whole = extract(
        tree, tmp_path / "whole.h5", backbone=tiny_backbone, batch_size=2, engine=engine
    )
    before = (("small_shards", 4, 2), ("slow", 0.03))
    command = ("extract", "data", "c.h5", *TINY[:2], "--batch-size", "2", "--engine", engine)
    child = warm_parent().start(*command, cwd=tmp_path, before=before)
    shards = tmp_path / "c.h5.partial"
    assert wait_for(lambda: len(list(shards.glob("shard.*"))) >= 3, child)
    child.kill(number)
    assert child.wait().code != 0
    assert not (tmp_path / "c.h5").exists()
    summary = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, batch_size=2)
    assert summary.num_known >= 4
    assert summary.num_new == 46 - summary.num_known
    assert summary.content_sha256 == whole.content_sha256
    assert not shards.exists()


def test_an_unfinished_run_of_other_settings_is_refused_then_discarded(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finish, "write_rows", fail)
    with pytest.raises(KeyboardInterrupt):
        extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    monkeypatch.undo()
    assert (tmp_path / "c.h5.partial" / "manifest.json").exists()
    with pytest.raises(CacheError, match=r"unfinished extraction.*--rebuild"):
        extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, crop_mode="border")
    assert (tmp_path / "c.h5.partial" / "manifest.json").exists()
    summary = extract(
        tree, tmp_path / "c.h5", backbone=tiny_backbone, crop_mode="border", rebuild=True
    )
    assert summary.num_new == 46


@pytest.mark.skipif(sys.platform == "win32", reason="limits are POSIX")
def test_a_full_disk_is_one_line_and_leaves_no_cache(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    import resource

    # Python ignores SIGXFSZ, as the default is to end the process. Only the soft limit is lowered.
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
    try:
        with pytest.raises(FeatcacheError) as caught:
            extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "file size: expected" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "c.h5").exists()
    assert list(tmp_path.glob(".*tmp")) == []


def test_a_run_that_only_has_to_finish_knows_how_its_rows_were_made(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finish, "write_rows", fail)
    with pytest.raises(KeyboardInterrupt):
        extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, precision="bf16")
    monkeypatch.undo()
    summary = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, precision="bf16")
    assert summary.num_new == 0
    made = open_cache(tmp_path / "c.h5").provenance
    assert made["precision"] == "bf16"
    assert made["engine"] == "folded"
    assert made["parity"]


def test_a_killed_rebuild_goes_on(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    options: dict[str, Any] = {
        "backbone": tiny_backbone, "crop_mode": "center", "rebuild": True
    }  # fmt: skip
    monkeypatch.setattr(finish, "write_rows", fail)
    with pytest.raises(KeyboardInterrupt):
        extract(tree, tmp_path / "c.h5", **options)
    monkeypatch.undo()
    summary = extract(tree, tmp_path / "c.h5", **options)
    assert (summary.num_new, summary.num_known) == (0, 46)
    assert open_cache(tmp_path / "c.h5").identity["crop_mode"] == "center"


def test_a_rebuild_at_another_precision_starts_afresh(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finish, "write_rows", fail)
    with pytest.raises(KeyboardInterrupt):
        extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, precision="bf16")
    monkeypatch.undo()
    with pytest.raises(CacheError, match=r"expected bf16 on cpu, found fp32 on cpu.*--rebuild"):
        extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    summary = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, rebuild=True)
    assert (summary.num_new, summary.num_known) == (46, 0)
    assert open_cache(tmp_path / "c.h5").provenance["precision"] == "fp32"


def test_a_shard_has_a_bounded_number_of_rows_however_narrow_they_are(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(work, "SHARD_ROWS", 12)  # with three batches of one under way
    monkeypatch.setattr(finish, "write_rows", fail)
    with pytest.raises(KeyboardInterrupt):
        extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, batch_size=1)
    manifest = json.loads((tmp_path / "c.h5.partial" / "manifest.json").read_text())
    assert [shard["num_rows"] for shard in manifest["shards"]] == [10, 10, 10, 10, 6]
    assert (tmp_path / "c.h5.partial" / "manifest.json").read_text() == canonical_json(manifest)
    monkeypatch.undo()
    assert extract(tree, tmp_path / "c.h5", backbone=tiny_backbone).num_known == 46


@pytest.mark.parametrize("options", [
    {"batch_size": 2}, {"batch_size": 3, "views": 5, "augment": "crop"}, {"batch_size": 40},
    {"batch_size": 1, "engine": "onnx"},
])  # fmt: skip
def test_what_is_run_and_not_listed_is_a_shard_at_most(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """It is what a kill would lose, at any moment."""
    lock, unlisted, rows, most = threading.Lock(), [0, 0], list[int](), list[int]()
    forward, add_shard, sizes = pipeline._Forward.__call__, PartialCache.add_shard, list[Any]()
    numbers = dict[int, int]()

    def noting_forward(self: Any, paths: Any, images: Any) -> Any:
        with lock:
            number = numbers.setdefault(id(self), len(numbers))
            unlisted[number] += sum(len(image) for image in images if image is not None)
            most.append(unlisted[number] - sizes[0][number])
        return forward(self, paths, images)

    def slow_add_shard(self: PartialCache, receipt: Any) -> Any:
        time.sleep(0.02)  # for the network to run ahead; that it does is not asserted
        with lock:
            made = add_shard(self, receipt)
            unlisted[self._num_features == 12] -= receipt.num_vectors
            rows.append(receipt.num_vectors)
        return made

    def noting_sizes(lanes: Any) -> list[int]:
        sizes.append(work.most_unlisted(lanes))
        return vectors_per_shard(lanes)

    vectors_per_shard = work.vectors_per_shard
    monkeypatch.setattr(work, "vectors_per_shard", noting_sizes)
    monkeypatch.setattr(pipeline._Forward, "__call__", noting_forward)
    monkeypatch.setattr(PartialCache, "add_shard", slow_add_shard)
    monkeypatch.setattr(work, "SHARD_BYTES", tiny_network.shard_bytes(4, 3))
    narrow = wrap_backbone("narrow", Narrow(), image_size=32)
    backbones = [tiny_network.build(), narrow]
    extract(tree, tmp_path / "many", backbone=backbones, **{"engine": "folded"} | options)
    assert max(most) <= 0
    assert len(rows) > 2
    assert unlisted == [0, 0]


class Narrow(torch.nn.Module):
    """Half of the tiny network's features: more of them fill a shard."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_network.network()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.inner(images)[:, :12]  # type: ignore[no-any-return]


def test_shards_have_room_for_what_is_under_way() -> None:
    """EfficientNet-B0's on CPUs and GPUs: 16 MiB are 3,276 vectors."""

    def size_of(batch_size: int, concurrency: int, num_features: int = 1280) -> tuple[int, int]:
        recipe = SimpleNamespace(
            backbone=SimpleNamespace(num_features=num_features), feature_dtype="float32",
            view_rules=SimpleNamespace(num_views=1),
        )  # fmt: skip
        lane: Any = pipeline.Lane(
            recipe,  # type: ignore[arg-type]
            SimpleNamespace(batch_size=batch_size, concurrency=concurrency),  # type: ignore[arg-type]
        )
        return work.most_unlisted([lane])[0], work.vectors_per_shard([lane])[0]

    assert size_of(1, 2) == (3276, 3272)
    assert size_of(6, 1) == (3276, 3259)
    assert size_of(128, 2) == (3276, 2637)
    assert size_of(512, 2) == (3276, 717)
    assert size_of(512, 2, num_features=2048) == (2560, 1)  # of 2,048 that would be 16 MiB
    assert size_of(1, 2, num_features=3) == (4096, 4092)


# ----------------------------------------------------------------- begun by the version before


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """Images, and the shards of four of them that were made before there was a ledger."""
    sample_partial.write_images(tmp_path / "data")
    shutil.copytree(TESTS / "data" / "partial_v2", tmp_path / "c.h5.partial")
    return tmp_path


@pytest.mark.parametrize("touch", [False, True])
def test_what_an_older_version_began_is_finished(begun: Path, touch: bool) -> None:
    for path in (begun / "data").rglob("*.bmp") if touch else ():
        os.utime(path, ns=(1, 1))  # then they are known by their content
    backbone, said = sample_partial.backbone(), list[str]()
    manifest = json.loads((begun / "c.h5.partial" / "manifest.json").read_bytes())
    shards = [(begun / "c.h5.partial" / f"shard.{n:05d}").read_bytes()[:16] for n in (0, 1, 1, 3)]
    planned = plan(begun / "data", begun / "c.h5", backbone=backbone, engine="eager")
    assert (planned.num_known, planned.num_images) == (4, 6)
    assert json.loads((begun / "c.h5.partial" / "manifest.json").read_bytes()) == manifest
    resumed = extract(begun / "data", begun / "c.h5", backbone=backbone, say=said.append)
    assert "Resuming c.h5: 4 images done." in said
    assert (resumed.num_new, resumed.num_known) == (2, 4)
    assert resumed.engine == "eager"  # as it was begun
    train = open_cache(begun / "c.h5").splits["train"]
    assert train.paths == ["train/a/0.bmp", "train/a/2.bmp", "train/b/1.bmp", "train/b/3.bmp"]
    assert [row.tobytes() for row in train.features] == shards
    extract(begun / "data", begun / "w.h5", backbone=backbone, engine="eager")
    # The shards were made by another version of torch, of which the last bits may be others.
    splits = open_cache(begun / "c.h5").splits
    for name, split in open_cache(begun / "w.h5").splits.items():
        np.testing.assert_allclose(splits[name].features, split.features, rtol=1e-5)
        assert splits[name].paths == split.paths
        assert name == "train" or np.array_equal(splits[name].features, split.features)
    assert sorted(path.name for path in begun.iterdir()) == ["c.h5", "data", "w.h5"]


def test_what_an_older_version_began_with_other_settings_is_refused(begun: Path) -> None:
    backbone = sample_partial.backbone()
    with pytest.raises(CacheError, match=r"made with other settings.*discard it with --rebuild"):
        extract(begun / "data", begun / "c.h5", backbone=backbone, crop_mode="center")
    with pytest.raises(CacheError, match=r"expected fp32 on cpu, found bf16 on cpu.*--rebuild"):
        extract(begun / "data", begun / "c.h5", backbone=backbone, precision="bf16")
    made = extract(
        begun / "data", begun / "c.h5", backbone=backbone, crop_mode="center", rebuild=True
    )
    assert (made.num_new, made.num_images) == (5, 6)
    assert not (begun / "c.h5.partial").exists()
