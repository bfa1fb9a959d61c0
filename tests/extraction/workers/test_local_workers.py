"""Workers in processes: signals, kills, devices, and the command line."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import TESTS, TINY, Child, wait_for, warm_parent
from sample_workers import images_and_sha256

from featcache.cache.reading import open_cache
from featcache.errors import ConfigError
from featcache.extraction.extraction import extract
from featcache.extraction.workers.coordinator import CRASHED
from featcache.extraction.workers.local import resolve_devices, share_cores

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes by /proc")

# In the workers: changes modules as they are imported.
_SITE = """
import importlib.abc, os, signal, sys, time
from importlib.machinery import PathFinder

class _Change(importlib.abc.MetaPathFinder):
    changes = {}
    def find_spec(self, name, path, target=None):
        if name not in self.changes:
            return None
        spec = PathFinder.find_spec(name, path)
        inner = spec.loader.exec_module
        def exec_module(module):
            inner(module)
            self.changes[name](module)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, _Change())
"""
_SLOW = """
def _slow(module):
    inner = module.stream_parts
    def slow(*arguments, **options):
        for batch in inner(*arguments, **options):
            time.sleep(0.05)
            yield batch
    module.stream_parts = slow
_Change.changes["featcache.extraction.workers.worker"] = _slow
"""
_FRAGILE = """
def _fragile(module):
    inner = module.ShardWriter.take
    def take(self, outcomes, features):
        if any(outcome.sample.path.endswith("trc002_1.png") for outcome in outcomes):
            os.kill(os.getpid(), signal.SIGSEGV)
        return inner(self, outcomes, features)
    module.ShardWriter.take = take
_Change.changes["featcache.extraction.workers.worker"] = _fragile
"""

COMMAND = ("extract", "data", "c.h5", *TINY, "--batch-size", "2", "--workers", "2", "--quiet")
COMMAND += ("--max-errors", "9")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """46 images, three of them copies; and the sha256 of what one process makes of them."""
    return images_and_sha256(tmp_path_factory.mktemp("images"))


@pytest.fixture
def place(images: tuple[Path, str], tmp_path: Path) -> Path:
    """A folder with the images, and the sha256."""
    (tmp_path / "data").symlink_to(images[0])
    (tmp_path / "sha256").write_text(images[1], "ascii")
    return tmp_path


def start(place: Path, site: str = "", processes: int = 2) -> Child:
    (place / "site").mkdir(exist_ok=True)
    (place / "site" / "sitecustomize.py").write_text(_SITE + site, "utf-8")
    path = os.pathsep.join(map(str, (place / "site", TESTS)))
    before: tuple[Any, ...] = (
        ("environment", "PYTHONPATH", path), ("environment", "OMP_WAIT_POLICY", "PASSIVE"),
        ("set", "featcache.extraction.workers.coordinator", "MIN_IMAGES", 8),
        ("small_shards", 4, 2),
    )  # fmt: skip
    return warm_parent().start(*COMMAND, "--processes", processes, cwd=place, before=before)


def children(child: Child) -> list[int]:
    text = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text("ascii")
    return [int(word) for word in text.split()]


def num_shards(place: Path) -> int:
    return len(list((place / "c.h5.partial").glob("shard.*")))


def is_equal(place: Path) -> bool:
    return open_cache(place / "c.h5").content_sha256 == (place / "sha256").read_text("ascii")


@LINUX
def test_a_worker_that_is_killed_is_replaced(place: Path) -> None:
    """By another process; hundreds of kills, of forks, are in test_worker_kills."""
    child = start(place, _SLOW)
    wait_for(lambda: num_shards(place) > 1, child)
    os.kill(children(child)[0], signal.SIGKILL)
    result = child.wait()
    assert result.code == 0, result
    assert is_equal(place)
    assert not (place / "c.h5.partial").exists()


def test_an_image_that_kills_every_worker_is_one_listed_failure(
    place: Path, rounds: Callable[[int, int], int]
) -> None:
    for _ in range(rounds(0, 1)):  # in CI with threads: see test_coordinator
        result = start(place, _FRAGILE).wait()
        assert result.code == 0, result
        failures = open_cache(place / "c.h5").failures
        assert [failure.path for failure in failures] == ["train/covid/trc002_1.png"]
        assert failures[0].reason == CRASHED


@pytest.mark.parametrize(
    ("names", "processes", "wanted"),
    [("cpu", 1, ["cpu"]), ("cpu", 3, ["cpu"] * 3), ("cpu,cpu", 1, ["cpu", "cpu"])],
)
def test_devices_are_listed(names: str, processes: int, wanted: list[str]) -> None:
    assert resolve_devices(names, processes) == wanted


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from featcache.extraction.workers import local
    from featcache.runtime import Device

    monkeypatch.setattr(local, "_count_gpus", lambda: 0)
    with pytest.raises(ConfigError, match=r"^--device all: expected at least one GPU.* found none"):
        resolve_devices("all")
    with pytest.raises(ConfigError, match=r"^--device: expected one of auto, cpu.* found cuda:77"):
        resolve_devices("cpu,cuda:77")
    monkeypatch.setattr(local, "_count_gpus", lambda: 3)
    assert resolve_devices("all") == ["cuda:0", "cuda:1", "cuda:2"]

    def resolve(name: str) -> Device:
        kind, _, number = name.partition(":")
        return Device(kind, int(number) if number else None)

    monkeypatch.setattr(local, "resolve_device", resolve)
    assert resolve_devices("cuda:0, cuda:1", 2) == ["cuda:0"] * 2 + ["cuda:1"] * 2
    with pytest.raises(ConfigError, match=r"^--device: expected devices of one kind"):
        resolve_devices("cpu,cuda:0")


@LINUX
def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from featcache.extraction.workers import local

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5, 7, 11})
    monkeypatch.setattr(local, "available_cores", lambda: 5)
    assert share_cores(2) == [[2, 3], [5, 7, 11]]
    assert share_cores(7) == [[2], [3], [5], [7], [11], [2], [3]]
    monkeypatch.setattr(local, "available_cores", lambda: 2)  # the container's limit
    assert share_cores(2) == [[], []]


def test_a_backbone_of_a_class_that_is_nowhere_is_refused(place: Path) -> None:
    from torch import nn

    from featcache.backbones.backbone import wrap_backbone

    class Local(nn.Module):
        def forward(self, images: Any) -> Any:
            return images.mean((2, 3))

    backbone = wrap_backbone("local", Local(), image_size=32)
    with pytest.raises(ConfigError, match=r"--processes: expected a backbone that can be sent"):
        extract(place / "data", place / "c.h5", backbone=backbone, processes=2)
