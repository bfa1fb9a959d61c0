"""A projection promises sizes and times of what is left to do, and writes nothing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_network
from sample_images import write_image

from featcache.backbones.backbone import Backbone, wrap_backbone
from featcache.cli.wording import projection_lines
from featcache.errors import CacheError, ConfigError, FeatcacheWarning
from featcache.extraction.extraction import extract, plan
from featcache.extraction.projection import project_workers


def test_a_plan_writes_nothing_and_projects_sizes(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    (sorted((tree / "train" / "covid").iterdir())[0]).write_bytes(b"broken")
    before = sorted(tmp_path.rglob("*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        projection = plan(tree, tmp_path / "c.h5", backbone=tiny_backbone, group_by=r"^(\w+)_")
    assert sorted(tmp_path.rglob("*")) == before
    assert projection.num_images == 46
    assert projection.splits["valid"] == {"covid": 5, "normal": 5}
    assert projection.num_groups == 24
    assert [path for path, _ in projection.failures] == ["train/covid/trc000_0.jpg"]
    assert projection.seconds >= 0
    with pytest.warns(FeatcacheWarning):
        extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, group_by=r"^(\w+)_")
    actual = (tmp_path / "c.h5").stat().st_size
    features = 46 * tiny_network.NUM_FEATURES * 4
    assert projection.working_bytes == projection.cache_bytes + features
    assert projection.cache_bytes <= actual + features


def test_more_machines_take_less_time_and_cost_their_starts() -> None:
    hours = [*project_workers(10 * 3600, 36, price=2.5)]
    assert [of.num_workers for of in hours] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    for of in hours:
        assert of.seconds == pytest.approx(36 + 36000 / of.num_workers, abs=0.1)
        assert of.worker_hours == pytest.approx(10 + of.num_workers / 100, abs=1e-3)
        assert of.cost == pytest.approx(2.5 * of.worker_hours, abs=0.01)
    (short,) = project_workers(90, 3, price=None)  # two would have 45 s of work
    assert (short.num_workers, short.cost) == (1, None)


def test_what_has_to_be_read_is_counted_and_a_price_gives_costs(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    planned = plan(tree, tmp_path / "c.h5", backbone=tiny_backbone, price=3600)
    assert planned.read_bytes == sum(p.stat().st_size for p in tree.rglob("*.*") if p.is_file())
    (alone,) = planned.workers
    assert alone.cost == pytest.approx(planned.seconds + planned.start_seconds, abs=1)
    assert any("costs" in line for line in projection_lines(planned))
    with pytest.raises(ConfigError, match="--price: expected a number that is not negative"):
        plan(tree, tmp_path / "c.h5", backbone=tiny_backbone, price=-1)


def test_of_many_images_that_would_fail_five_are_named(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    for image in sorted((tree / "train" / "covid").iterdir())[:7]:
        image.write_bytes(b"broken")
    planned = plan(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    assert len(planned.failures) == 7
    lines = [line for line in projection_lines(planned) if "would fail" in line]
    assert len(lines) == 6
    assert lines[-1] == "would fail: 2 more, listed by --json"


def test_views_of_images_to_train_on_are_counted(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    plain = plan(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    projection = plan(tree, tmp_path / "c.h5", backbone=tiny_backbone, views=5, augment="xray")
    assert projection.identity["views"] == 5
    more = 24 * 4 * tiny_network.NUM_FEATURES * 4
    assert projection.cache_bytes == plain.cache_bytes + more


def test_of_an_up_to_date_cache_nothing_is_left_to_do(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    with monkeypatch.context() as no_engine:
        no_engine.delattr("featcache.extraction.projection.build_engine")
        planned = plan(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    assert (planned.num_images, planned.num_known, planned.seconds) == (46, 46, 0)
    assert planned.images_per_second is None
    assert list(projection_lines(planned)) == [
        f"{tiny_backbone.name}:", "expected: nothing to run; known already: 46 images"
    ]  # fmt: skip


def test_a_plan_of_an_update_counts_what_extract_then_runs(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    """A new image, one that moved, and one that failed before."""
    bad, moved, *_ = sorted((tree / "train" / "covid").iterdir())
    bad.write_bytes(b"broken")
    with pytest.warns(FeatcacheWarning):
        extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, batch_size=3)
    bad.unlink()
    write_image(bad, 77)
    write_image(tree / "valid" / "covid" / "new.png", 78)
    moved.rename(tree / "test" / "covid" / moved.name)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    planned = plan(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert (planned.num_images, planned.num_known, planned.num_decoded) == (47, 45, 2)
    assert any(
        "2 images at" in line and "45 are known" in line for line in projection_lines(planned)
    )
    assert planned.engine.endswith(" (as for the rows that are there)")
    assert planned.working_bytes == planned.cache_bytes + 2 * tiny_network.NUM_FEATURES * 4
    updated = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    assert (updated.num_new, updated.num_known) == (2, 45)


def test_a_plan_is_refused_as_the_extraction_would_be_and_may_plan_a_rebuild(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    before = (tmp_path / "c.h5").read_bytes()
    other: dict[str, Any] = {"backbone": tiny_backbone, "crop_mode": "center"}
    with pytest.raises(CacheError, match="--rebuild"):
        plan(tree, tmp_path / "c.h5", **other)
    assert plan(tree, tmp_path / "c.h5", rebuild=True, **other).num_known == 0
    assert (tmp_path / "c.h5").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.h5", "data"]


def test_several_backbones_are_planned_by_name(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    other = wrap_backbone("other", tiny_network.network(), image_size=16)
    extract(tree, tmp_path / "many" / "other.h5", backbone=other)
    planned = plan(tree, tmp_path / "many", backbone=[tiny_backbone, other])
    assert {name: p.num_known for name, p in planned.items()} == {
        tiny_backbone.name: 0,
        "other": 46,
    }
