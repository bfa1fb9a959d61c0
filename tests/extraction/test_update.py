"""Updating a cache: what is known is never run again, and the result is what a rebuild makes."""

from __future__ import annotations

import csv
import hashlib
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_network
from sample_images import write_image, write_tree

from featcache.backbones.backbone import Backbone, wrap_backbone
from featcache.cache.reading import open_cache
from featcache.cache.selection import select
from featcache.data.dataset import ImageDataset, Sample
from featcache.errors import CacheError, FeatcacheWarning
from featcache.extraction import pipeline, plan, view_stream
from featcache.extraction.extraction import extract
from featcache.extraction.ledger import Ledger
from featcache.pixels import views
from featcache.pixels.views import Rendering


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of every forward pass of the pipeline, as they happen."""
    counted: list[int] = []
    inner = pipeline._forward_chunk

    def counting(lanes: Any, outcomes: Any, views: Any, clock: Any) -> Any:
        batch = inner(lanes, outcomes, views, clock)
        counted.extend(len(f) for lane in batch.features for f in lane if f is not None)
        return batch

    monkeypatch.setattr(pipeline, "_forward_chunk", counting)
    return counted


def columns(path: Path) -> dict[str, Any]:
    """Everything of a cache that does not depend on how it came to be."""
    cache = open_cache(path)
    found: dict[str, Any] = {"classes": cache.classes, "fingerprint": cache.fingerprint}
    for name, split in cache.splits.items():
        for key in ("features", "targets", "image_sha256", "image_bytes", "mtime_ns"):
            array = getattr(split, key)
            found[f"{name}/{key}"] = (array.shape, array.tobytes())
        found[f"{name}/paths"], found[f"{name}/groups"] = split.paths, split.groups
    found["failures"] = cache.failures
    found["truncated"] = cache.provenance.get("truncated")
    return found


def equals_a_rebuild(data: Path, cache: Path, backbone: Backbone, **options: Any) -> bool:
    rebuilt = cache.with_name("rebuilt.h5")
    rebuilt.unlink(missing_ok=True)
    extract(data, rebuilt, backbone=backbone, **options)
    return columns(cache) == columns(rebuilt)


def restore_time(path: Path, status: os.stat_result) -> None:
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_an_unchanged_cache_is_up_to_date_and_two_extractions_are_equal(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    first = extract(tree, tmp_path / "a.h5", backbone=tiny_backbone)
    before = (tmp_path / "a.h5").stat().st_mtime_ns
    again = extract(tree, tmp_path / "a.h5", backbone=tiny_backbone)
    assert again.status == "up to date"
    assert again.num_new == 0
    assert (tmp_path / "a.h5").stat().st_mtime_ns == before
    second = extract(tree, tmp_path / "b.h5", backbone=tiny_backbone)
    assert second.content_sha256 == first.content_sha256


def test_an_update_runs_only_new_images_and_equals_a_rebuild(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, limit=20, batch_size=8)
    write_image(tree / "train" / "covid" / "new_0.png", 999, bright=True)
    updated = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    assert updated.num_images == 47
    assert (updated.num_new, updated.num_known) == (27, 20)
    made = open_cache(tmp_path / "c.h5").provenance
    assert made["batch_size"] == 8  # the choices of the first run stand
    assert len(made["parity"]) == 8
    rebuilt = extract(tree, tmp_path / "d.h5", backbone=tiny_backbone, batch_size=8)
    assert updated.content_sha256 == rebuilt.content_sha256
    (tree / "train" / "covid" / "new_0.png").unlink()
    smaller = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    assert (smaller.num_images, smaller.num_new) == (46, 0)


def test_an_update_that_would_lose_rows_by_mistake_is_refused(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    groups = r"^(\w+)_"
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, group_by=groups)
    before = (tmp_path / "c.h5").read_bytes()
    other = write_tree(tmp_path / "other", {"train": 2, "test": 2})
    for number, file in enumerate(sorted(other.rglob("*.*g"))):
        file.unlink()
        write_image(file.with_name("other" + file.name), 900 + number)
    for data, options, said in (
        (tree, {"limit": 10, "group_by": groups}, "--limit"),
        (other, {"group_by": groups}, "none of its 46"),
        (tree, {}, "--group-by"),
    ):
        with pytest.raises(CacheError, match=said):
            extract(data, tmp_path / "c.h5", backbone=tiny_backbone, **options)
    assert (tmp_path / "c.h5").read_bytes() == before
    assert not (tmp_path / "c.h5.partial").exists()


def test_an_image_that_fails_again_changes_nothing(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    sorted((tree / "train" / "covid").iterdir())[0].write_bytes(b"broken")
    with pytest.warns(FeatcacheWarning):
        extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    before = (tmp_path / "c.h5").read_bytes()
    again = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    assert (again.status, again.num_failed) == ("up to date", 1)
    assert (tmp_path / "c.h5").read_bytes() == before
    assert not (tmp_path / "c.h5.partial").exists()


def test_an_update_at_another_precision_says_so(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    first = sorted((tree / "train" / "covid").iterdir())[0]
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) * 3 // 4])
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, truncated="keep", precision="bf16")
    write_image(tree / "train" / "covid" / "new_0.png", 999, bright=True)
    with pytest.warns(FeatcacheWarning, match=r"made at bf16 \(within .* new ones will be at fp32"):
        updated = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, truncated="keep")
    assert (updated.num_new, updated.num_truncated) == (1, 1)
    made = open_cache(tmp_path / "c.h5").provenance
    assert made["precision"] == "bf16, fp32"
    assert len(made["parity"]) == 8


# ----------------------------------------------------------------------- known content, anywhere


def test_renamed_moved_copied_and_removed_images_cost_no_forward_pass(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, passes: list[int]
) -> None:
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    files = sorted((tree / "train" / "covid").iterdir())
    files[0].rename(files[0].with_name("renamed.jpg"))
    files[1].rename(tree / "train" / "normal" / files[1].name)  # relabelled
    files[2].rename(tree / "test" / "covid" / files[2].name)  # another split
    shutil.copy(files[3], tree / "valid" / "normal" / "copy.png")  # contradicted, even
    files[4].unlink()
    write_image(tree / "valid" / "covid" / "new_0.png", 999, bright=True)
    passes.clear()
    updated = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    assert passes == [1]
    counts = (updated.num_kept, updated.num_moved, updated.num_new, updated.num_gone)
    assert counts == (46 - 4, 3, 1, 1)
    assert updated.num_known == 46  # the copy's too
    assert equals_a_rebuild(tree, tmp_path / "c.h5", tiny_backbone)


def test_a_class_under_another_name_costs_no_forward_pass(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, passes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    for split in ("train", "valid", "test"):
        (tree / split / "covid").rename(tree / split / "sars")
        (tree / split / "normal").rename(tree / split / "healthy")
    passes.clear()
    with monkeypatch.context() as no_engine:  # nor those of an engine's check
        no_engine.delattr("featcache.extraction.engine_choice.build_engine")
        updated = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    assert (passes, updated.num_moved, updated.num_gone) == ([], 46, 0)
    assert open_cache(tmp_path / "c.h5").classes == ("healthy", "sars")
    assert equals_a_rebuild(tree, tmp_path / "c.h5", tiny_backbone)


def test_a_csv_with_other_targets_splits_and_groups_costs_no_forward_pass(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, passes: list[int]
) -> None:
    paths = sorted(p.relative_to(tmp_path).as_posix() for p in tree.rglob("*.*g"))
    table = tmp_path / "table.csv"

    def write(targets: str, splits: tuple[str, ...], groups: str) -> None:
        with table.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "target", "split", "group"])
            for i, path in enumerate(paths):
                split = splits[i // 2 % len(splits)]
                writer.writerow([path, targets[i % 2], split, f"{groups}{i // 4}"])

    write("ab", ("train", "valid", "test"), "g")
    extract(table, tmp_path / "c.h5", backbone=tiny_backbone)
    write("ba", ("train", "train", "test"), "h")
    passes.clear()
    updated = extract(table, tmp_path / "c.h5", backbone=tiny_backbone)
    assert (passes, updated.status, updated.num_kept) == ([], "extracted", 46)
    assert equals_a_rebuild(table, tmp_path / "c.h5", tiny_backbone)


def test_identical_images_are_run_once_and_keep_their_rows(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, passes: list[int]
) -> None:
    first = sorted((tree / "train" / "covid").iterdir())[0]
    for number in range(20):
        shutil.copy(first, tree / "train" / "covid" / f"copy{number}.jpg")
        shutil.copy(first, tree / "test" / "normal" / f"copy{number}.jpg")
    made = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, batch_size=4)
    assert (len(passes), made.num_new, made.num_images) == (46, 46, 86)
    cache = open_cache(tmp_path / "c.h5")
    for name, split in cache.splits.items():
        copies = [i for i, path in enumerate(split.paths) if "copy" in path]
        assert len(copies) == {"train": 20, "valid": 0, "test": 20}[name]
        own = cache.splits["train"]
        row = own.features[own.paths.index(f"train/covid/{first.name}")]
        assert all(np.array_equal(split.features[i], row) for i in copies)


def test_a_bad_image_under_several_names_fails_under_each(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    for number in range(4):
        (tree / "train" / "covid" / f"bad{number}.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.warns(FeatcacheWarning, match="4 images"):
        made = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, max_errors=4)
    assert (made.num_images, made.num_failed) == (46, 4)
    reasons = {failure.reason for failure in open_cache(tmp_path / "c.h5").failures}
    assert len(reasons) == 1


def test_an_accident_of_one_image_leaves_its_copies_alone(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out on the first of five identical images: the others have their rows."""
    first = sorted((tree / "train" / "covid").iterdir())[0]
    for number in range(4):
        shutil.copy(first, tree / "train" / "covid" / f"copy{number}.jpg")
    unlucky, tries = hashlib.sha256(first.read_bytes()).digest(), []
    claim, asked = Ledger.claim, threading.Semaphore(0)

    def noting_claim(self: Ledger, position: int, sha256: bytes) -> bool:
        answer = claim(self, position, sha256)
        if sha256 == unlucky:
            asked.release()
        return answer

    def render(data: bytes, recipes: Any, sha256: bytes) -> Rendering:
        if sha256 == unlucky:
            tries.append(sha256)
            if len(tries) == 1:  # when both caches have been told that the others are its copies
                assert all(asked.acquire(timeout=60) for _ in range(10))
                raise MemoryError
        return views.render(data, recipes, sha256)

    monkeypatch.setattr(view_stream, "render", render)
    monkeypatch.setattr(Ledger, "claim", noting_claim)
    backbones = [
        tiny_backbone, wrap_backbone("second", tiny_network.network(), image_size=48),
    ]  # fmt: skip
    with pytest.warns(FeatcacheWarning, match="1 image"):
        made = extract(tree, tmp_path / "many", backbone=backbones, batch_size=1)
    for summary in made.values():
        assert (summary.num_images, summary.num_failed) == (49, 1)
        cache = open_cache(Path(summary.cache))
        (failed,) = cache.failures
        assert failed.reason == "MemoryError"
        names = {first.name, *(f"copy{number}.jpg" for number in range(4))}
        split = cache.splits["train"]
        rows = [
            split.features[split.paths.index(f"train/covid/{name}")]
            for name in names - {Path(failed.path).name}
        ]
        assert all(np.array_equal(row, rows[0]) for row in rows)
    monkeypatch.undo()
    again = extract(tree, tmp_path / "many", backbone=backbones, batch_size=1).values()
    assert [(s.num_images, s.num_failed, s.num_new) for s in again] == [(50, 0, 0)] * 2


def test_copies_in_several_splits_have_the_views_of_their_split(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    """The plain view of ``valid`` is not enough for the same image in ``train``."""
    first = sorted((tree / "valid" / "covid").iterdir())[0]
    shutil.copy(first, tree / "train" / "covid" / "copy.jpg")
    shutil.copy(first, tree / "test" / "covid" / "copy.jpg")
    options: dict[str, Any] = {"views": 3, "augment": "xray", "batch_size": 1}
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, **options)
    cache = open_cache(tmp_path / "c.h5")

    def row(split: str, path: str) -> np.ndarray:
        part = cache.splits[split]
        return np.array(part.features[part.paths.index(path)])

    views = row("train", "train/covid/copy.jpg")
    assert views.shape == (3, 24)
    assert not np.array_equal(views[0], views[1])
    assert np.array_equal(row("valid", f"valid/covid/{first.name}"), views[0])
    assert np.array_equal(row("test", "test/covid/copy.jpg"), views[0])


@pytest.mark.parametrize("engine", ["folded", "onnx"])
def test_an_interrupted_run_with_copies_ends_equal(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, engine: str,
    monkeypatch: pytest.MonkeyPatch, passes: list[int],
) -> None:  # fmt: skip
    first = sorted((tree / "train" / "covid").iterdir())[0]
    for number in range(12):
        shutil.copy(first, tree / ("train", "test")[number % 2] / "covid" / f"a{number:02d}.jpg")
    monkeypatch.setattr("featcache.extraction.work.SHARD_BYTES", tiny_network.shard_bytes(4, 1))
    options: dict[str, Any] = {"batch_size": 1, "engine": engine}
    inner = pipeline.stream_features

    def stopping(*args: Any, **more: Any) -> Any:
        for number, batch in enumerate(inner(*args, **more)):
            if number == 30:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr("featcache.extraction.work.stream_features", stopping)
    with pytest.raises(KeyboardInterrupt):
        extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, **options)
    monkeypatch.setattr("featcache.extraction.work.stream_features", inner)
    passes.clear()
    resumed = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, **options)
    assert resumed.num_known >= 30
    assert len(passes) == resumed.num_new <= 46 - 18
    assert equals_a_rebuild(tree, tmp_path / "c.h5", tiny_backbone, **options)


# --------------------------------------------------------------------------------------- rehash


def test_a_change_that_size_and_time_hide_is_found_by_rehash(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, passes: list[int]
) -> None:
    file = sorted((tree / "train" / "covid").iterdir())[1]
    other = tmp_path / "other.png"
    write_image(other, 999, bright=True)
    length = max(file.stat().st_size, other.stat().st_size)
    for image in (file, other):  # PNG ends before what follows
        image.write_bytes(image.read_bytes().ljust(length, b"\0"))
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    status = file.stat()
    shutil.copyfile(other, file)
    restore_time(file, status)
    assert extract(tree, tmp_path / "c.h5", backbone=tiny_backbone).status == "up to date"
    passes.clear()
    found = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, rehash=True)
    assert (found.status, found.num_new, found.num_kept, passes) == ("extracted", 1, 45, [1])
    assert equals_a_rebuild(tree, tmp_path / "c.h5", tiny_backbone)
    again = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, rehash=True)
    assert again.status == "up to date"


def test_two_images_that_changed_places_are_found_by_rehash(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, passes: list[int]
) -> None:
    one, two = sorted((tree / "train" / "covid").glob("*.png"))[:2]
    length = max(one.stat().st_size, two.stat().st_size)
    for image in (one, two):
        image.write_bytes(image.read_bytes().ljust(length, b"\0"))
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    before, after = one.stat(), two.stat()
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    restore_time(one, before)
    restore_time(two, after)
    passes.clear()
    found = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, rehash=True)
    assert (found.status, found.num_known, found.num_gone, passes) == ("extracted", 46, 0, [])
    assert equals_a_rebuild(tree, tmp_path / "c.h5", tiny_backbone)


def test_a_touched_image_is_recognised_by_its_content(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, passes: list[int]
) -> None:
    """As after a copy of the whole data set that keeps no times."""
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    for file in tree.rglob("*.*g"):
        os.utime(file, ns=(1, 1))
    passes.clear()
    updated = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    assert (updated.num_kept, updated.num_new, passes) == (46, 0, [])
    assert equals_a_rebuild(tree, tmp_path / "c.h5", tiny_backbone)


def test_several_caches_are_updated_with_one_hashing(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch,
    passes: list[int],
) -> None:  # fmt: skip
    half = (0.5, 0.5, 0.5)
    second = wrap_backbone(
        "python:second:build", tiny_network.network(), image_size=48, mean=half, std=half
    )
    backbones = [tiny_backbone, second]
    extract(tree, tmp_path / "many", backbone=backbones)
    for file in sorted((tree / "train" / "covid").iterdir())[:5]:
        file.rename(file.with_name("x" + file.name))
    write_image(tree / "train" / "covid" / "new_0.png", 999, bright=True)
    hashed: list[str] = []
    inner = plan.hash_images

    def hashing(dataset: ImageDataset, samples: Sequence[Sample], workers: int | str) -> Any:
        hashed.extend(sample.path for sample in samples)
        return inner(dataset, samples, workers)

    monkeypatch.setattr(plan, "hash_images", hashing)
    passes.clear()
    both = extract(tree, tmp_path / "many", backbone=backbones).values()
    assert [(s.num_moved, s.num_new) for s in both] == [(5, 1), (5, 1)]
    assert passes == [1, 1]
    assert [hashed.count(path) for path in set(hashed) if "/x" in path] == [1] * 5


def test_an_update_of_a_selection_still_says_where_its_rows_came_from(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    select([tmp_path / "c.h5"], tmp_path / "s.h5")
    write_image(tree / "train" / "covid" / "new_0.png", 999, bright=True)
    updated = extract(tree, tmp_path / "s.h5", backbone=tiny_backbone)
    assert (updated.num_kept, updated.num_new) == (46, 1)
    made = open_cache(tmp_path / "s.h5").provenance
    assert made["selected_from"][0]["num_taken"] == 46
    assert len(made["origins"]) == 1
