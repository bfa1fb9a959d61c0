"""Everything is written on file systems that lack what Linux's own have, and by Windows' rules.

Neither is here: calls fail as they do there. What that does not show, README.md of the tests says.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from failing import failing
from sample_images import write_tree
from windows import act_as_windows

import featcache
from featcache import renames
from featcache.backbones.backbone import Backbone

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="plays other systems on Linux")


def lacking(code: int) -> Callable[..., Any]:
    return failing(OSError(code, os.strerror(code)))


@pytest.fixture(params=[errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EBADF])
def poor_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared folder, as CIFS, vboxsf, DrvFs or FUSE may be: folders are not synced, and more."""
    code, sync, opened = request.param, os.fsync, os.open

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        sync(handle)

    def open_file(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        # ``shutil.rmtree`` opens folders too: it gives ``dir_fd``
        if code in {errno.EACCES, errno.EPERM} and not options and Path(path).is_dir():
            raise OSError(code, os.strerror(code), path)
        return opened(path, flags, *rest, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(mmap, "mmap", lacking(errno.ENODEV))
    monkeypatch.setattr(renames, "_rename_by", lacking(errno.EINVAL))
    for name in ("link", "chmod", "fchmod", "fchown", "utime"):
        monkeypatch.setattr(os, name, lacking(errno.EPERM))
    monkeypatch.setattr(os, "posix_fallocate", lacking(errno.ENOTSUP))
    monkeypatch.setattr(os, "posix_fadvise", lacking(errno.EINVAL))


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import matplotlib.backends.backend_agg
    import matplotlib.font_manager  # noqa: F401

    import featcache.deployment.classifier
    import featcache.evaluation.figures
    import featcache.heads.fit  # noqa: F401

    torch.nn.Linear(1, 1)
    with act_as_windows(monkeypatch):
        yield


def go_the_whole_way(place: Path, backbone: Backbone) -> dict[str, str]:
    """Split, extract twice, train twice, evaluate, predict, select, verify; return hashes."""
    raw, data, cache, run = (place / name for name in ("raw", "data", "c.h5", "run"))
    write_tree(raw)
    for split in ("train", "valid", "test"):
        for image in sorted((raw / split).rglob("*.png")):
            image.rename(image.with_name(f"{split}_{image.name}"))
    featcache.split(raw / "train", data)
    quiet: dict[str, Any] = {"backbone": backbone, "progress": False, "say": lambda _: None}
    featcache.extract(data, cache, **quiet)
    sorted(data.rglob("*.png"))[0].unlink()
    featcache.extract(data, cache, **quiet)  # replaces a cache whose rows it reads
    trained: dict[str, Any] = {"hidden": (4,), "epochs": 2, "device": "cpu", "say": quiet["say"]}
    featcache.train(cache, run, **trained, overwrite=False)
    featcache.train(cache, run, **trained, overwrite=True)
    for _ in range(2):
        featcache.evaluate(run, csv=place / "test.csv", say=quiet["say"])
        with pytest.warns(featcache.FeatcacheWarning, match="was trained on"):
            featcache.predict(run, cache=cache, csv=place / "all.csv")
    featcache.select([cache], place / "two.h5", say=quiet["say"])
    featcache.verify(cache, say=quiet["say"])
    features = featcache.open_cache(cache).splits["train"].features
    assert not features.flags.writeable
    assert np.isfinite(features).all()
    written = sorted(path for path in place.iterdir() if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in written}


@pytest.mark.usefixtures("poor_disk")
def test_a_disk_that_can_do_little_is_enough(tmp_path: Path, tiny_backbone: Backbone) -> None:
    written = go_the_whole_way(tmp_path, tiny_backbone)
    assert sorted(written) == ["all.csv", "c.h5", "test.csv", "two.h5"]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["data", "raw", "run"]


@pytest.mark.usefixtures("windows")
def test_by_the_rules_of_windows_nothing_open_is_replaced_or_left(
    tmp_path: Path, tiny_backbone: Backbone
) -> None:
    written = go_the_whole_way(tmp_path, tiny_backbone)
    assert sorted(written) == ["all.csv", "c.h5", "test.csv", "two.h5"]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["data", "raw", "run"]
