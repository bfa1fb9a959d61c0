"""Updates beside other writers, other people's files, odd provenance and other precisions."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_images import write_image

from featcache.backbones.backbone import Backbone
from featcache.cache.reading import open_cache
from featcache.cache.selection import select
from featcache.cache.writing import write_cache
from featcache.errors import CacheError, FeatcacheWarning
from featcache.extraction import finish
from featcache.extraction.extraction import extract
from featcache.locking import writer_lock


def test_an_interrupted_update_at_another_precision_keeps_both(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    write_image(tree / "train" / "covid" / "new_0.png", 999, bright=True)
    with monkeypatch.context() as dying:
        dying.delattr("featcache.extraction.finish.write_rows")
        with (
            pytest.warns(FeatcacheWarning, match="new ones will be at bf16"),
            pytest.raises(NameError),
        ):
            extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, precision="bf16")
    with pytest.warns(FeatcacheWarning, match="the precision of its rows is bf16, fp32"):
        extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, precision="bf16")
    made = open_cache(tmp_path / "c.h5").provenance
    assert (made["precision"], len(made["parity"])) == ("bf16, fp32", 8)


def test_a_selection_is_not_undone_unasked(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    select([tmp_path / "c.h5"], tmp_path / "s.h5", rename={"covid": "sars"})
    before = (tmp_path / "s.h5").read_bytes()
    with pytest.raises(CacheError, match=r"featcache select made.*sars, as selected.*covid"):
        extract(tree, tmp_path / "s.h5", backbone=tiny_backbone)
    assert (tmp_path / "s.h5").read_bytes() == before


def test_the_next_writers_folder_is_left_alone(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that has published cleans up once, not again when the next one is at work."""
    lock = tmp_path / "c.h5.partial" / "lock"
    with contextlib.ExitStack() as next_writer:

        def begin(*_: object) -> None:
            next_writer.enter_context(writer_lock(lock, "cache c.h5"))

        monkeypatch.setattr(finish, "describe_result", begin)
        extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
        assert lock.exists()


def test_other_peoples_files_in_the_folder_of_shards_stay(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    notes = tmp_path / "c.h5.partial" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    with pytest.raises(CacheError):
        select([tmp_path / "none.h5"], tmp_path / "c.h5", rebuild=True)
    assert [p.name for p in notes.parent.iterdir()] == ["notes.txt"]


def test_a_linked_cache_is_updated_where_it_lies(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    (tmp_path / "big").mkdir()
    link, real = tmp_path / "c.h5", tmp_path / "big" / "real.h5"
    extract(tree, real, backbone=tiny_backbone)
    link.symlink_to(real)
    write_image(tree / "train" / "covid" / "new_0.png", 999, bright=True)
    extract(tree, link, backbone=tiny_backbone)
    assert link.is_symlink()
    assert sum(len(split) for split in open_cache(real).splits.values()) == 47


@pytest.mark.parametrize(
    "odd",
    [{"batch_size": "x"}, {"device_type": "cpu", "precision": "fp32"}, {"truncated": [[1]]},
     {"truncated": 3}, {"parity": 5}, {"parity": ["a"]}, {"precision": ["fp32"]}],
)  # fmt: skip
def test_a_cache_of_odd_provenance_is_updated(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, odd: dict[str, Any]
) -> None:
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    cache = open_cache(tmp_path / "c.h5")
    splits = cache.splits.items()
    write_cache(
        tmp_path / "c.h5", {n: np.array(s.features) for n, s in splits},
        {n: np.array(s.targets) for n, s in splits}, {n: s.paths for n, s in splits},
        classes=cache.classes, identity=cache.identity, provenance=odd, overwrite=True,
    )  # fmt: skip
    with warnings.catch_warnings():  # of a precision that is none
        warnings.simplefilter("ignore", FeatcacheWarning)
        assert extract(tree, tmp_path / "c.h5", backbone=tiny_backbone).num_images == 46


def test_rebuild_leaves_files_alone_that_only_name_the_format(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    (tmp_path / "notes.json").write_text('{"note":1,"format":"featcache"}')
    with pytest.raises(CacheError):
        extract(tree, tmp_path / "notes.json", backbone=tiny_backbone, rebuild=True)
    assert (tmp_path / "notes.json").read_text() == '{"note":1,"format":"featcache"}'
