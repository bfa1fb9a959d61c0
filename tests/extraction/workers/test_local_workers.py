"""Workers in processes: signals, kills, devices, and the command line."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_network
from command_line import TESTS, TINY
from sample_images import write_tree

from featcache.cache.reading import open_cache
from featcache.errors import ConfigError
from featcache.extraction.extraction import extract
from featcache.extraction.workers.coordinator import CRASHED
from featcache.extraction.workers.local import resolve_devices, share_cores

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes by /proc")

# In every process of the command: small shards and tasks, and whatever a test adds.
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

def _small(module):
    module.SHARD_BYTES = 4 * 24 * 4

def _tasks(module):
    module.MIN_IMAGES = 8

_Change.changes["featcache.extraction.work"] = _small
_Change.changes["featcache.extraction.workers.coordinator"] = _tasks
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

OPTIONS = ["--batch-size", "2", "--engine", "folded", "--workers", "2", "--json", "--quiet"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with 46 images, and the sha256 of what one process makes of them."""
    write_tree(tmp_path / "data")
    whole = extract(
        tmp_path / "data", tmp_path / "w.h5", backbone=tiny_network.build(), batch_size=2,
        engine="folded",
    )  # fmt: skip
    (tmp_path / "sha256").write_text(whole.content_sha256, "ascii")
    return tmp_path


def start(place: Path, site: str = "", processes: int = 2) -> subprocess.Popen[str]:
    (place / "site").mkdir(exist_ok=True)
    (place / "site" / "sitecustomize.py").write_text(_SITE + site, "utf-8")
    path = os.pathsep.join(map(str, (place / "site", TESTS)))
    environment = os.environ | {
        "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"
    }  # fmt: skip
    arguments = ["extract", "data", "c.h5", *TINY, *OPTIONS, "--processes", str(processes)]
    return subprocess.Popen(
        [sys.executable, "-m", "featcache", *arguments], cwd=place, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def end(child: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = child.communicate(timeout=60)
    return child.returncode, err


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii")
    return [int(word) for word in text.split()]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def num_shards(place: Path) -> int:
    return len(list((place / "c.h5.partial").glob("shard.*")))


def is_equal(place: Path) -> bool:
    return open_cache(place / "c.h5").content_sha256 == (place / "sha256").read_text("ascii")


@LINUX
def test_a_killed_worker_is_replaced(place: Path) -> None:
    with start(place, _SLOW) as child:
        wait_for(lambda: num_shards(place) > 1)
        victims = children(child.pid)
        assert len(victims) == 2
        os.kill(victims[0], signal.SIGKILL)
        os.kill(victims[1], signal.SIGTERM)  # hands back what it has
        code, err = end(child)
    assert code == 0, err
    assert is_equal(place)
    assert not (place / "c.h5.partial").exists()


@LINUX
def test_a_signal_to_the_coordinator_keeps_the_shards_and_leaves_no_process(place: Path) -> None:
    with start(place, _SLOW) as child:
        wait_for(lambda: num_shards(place) > 1)
        workers = children(child.pid)
        child.send_signal(signal.SIGTERM)
        code, err = end(child)
    assert code == 143, err
    assert "of 46 images kept in" in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    summary = extract(place / "data", place / "c.h5", backbone=tiny_network.build(), batch_size=2)
    assert summary.num_known >= 8
    assert is_equal(place)


@LINUX
def test_workers_of_a_killed_coordinator_stop_and_it_is_resumed(
    place: Path, rounds: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    rng = random.Random(5)
    for _ in range(rounds(1, 50)):
        (place / "c.h5").unlink(missing_ok=True)
        listed = rng.randint(1, 6)
        with start(place, _SLOW) as child:
            wait_for(lambda n=listed: num_shards(place) >= n or child.poll() is not None)
            time.sleep(rng.uniform(0, 0.1))
            workers = children(child.pid)
            child.kill()
            child.communicate(timeout=60)
        wait_for(lambda pids=workers: not any(_is_running(pid) for pid in pids))
        summary = extract(
            place / "data", place / "c.h5", backbone=tiny_network.build(), batch_size=2
        )
        assert summary.num_known >= 4 * (listed - 2)
        assert is_equal(place)
        tally("SIGKILL of coordinators", "ended equal")


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").split()[2] != "Z"
    except OSError:
        return False


@LINUX
def test_workers_killed_at_random_moments(
    place: Path, rounds: Callable[[int, int], int], tally: Callable[..., None]
) -> None:
    rng, wanted, total = random.Random(6), rounds(0, 200), 0
    while total < wanted:
        (place / "c.h5").unlink(missing_ok=True)
        with start(place, _SLOW, 3) as child:
            for _ in range(4):
                time.sleep(rng.uniform(0, 2))
                victims = children(child.pid) if child.poll() is None else []
                if victims:
                    os.kill(rng.choice(victims), signal.SIGKILL)
                    total += 1
            code, err = end(child)
        assert code == 0, err
        assert is_equal(place)
        tally("SIGKILL of workers", "ended equal")


def test_an_image_that_kills_every_worker_is_one_listed_failure(place: Path) -> None:
    with start(place, _FRAGILE) as child:
        code, err = end(child)
    assert code == 0, err
    failures = open_cache(place / "c.h5").failures
    assert len(failures) == 1
    assert failures[0].path.endswith("trc002_1.png")
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
