"""``extract --ray`` with a real Ray: behind --long, since it takes a minute and CI has no Ray."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import counted_network
import pytest
import slow_network
import tiny_network
from sample_images import write_tree
from sample_ray import Nodes, find_actors, started_nodes

from featcache.extraction import work
from featcache.extraction.extraction import extract
from featcache.extraction.reports import ExtractionSummary
from featcache.extraction.workers import ray_workers
from featcache.extraction.workers.coordinator import Ended, Failed

pytest.importorskip("ray", reason="ray is not installed")

pytestmark = [
    pytest.mark.usefixtures("one_thread", "is_long"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]

NUM_KILLS = 20
OPTIONS: dict[str, Any] = {"batch_size": 1, "engine": "folded"}


@pytest.fixture(scope="module")
def is_long(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--long"):
        pytest.skip("--long starts a Ray")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "SHARD_BYTES", tiny_network.shard_bytes(3, 1))


@pytest.fixture(scope="module")
def images(is_long: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(
        tmp_path_factory.mktemp("images") / "data", {"train": 80, "valid": 20, "test": 40}
    )


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> ExtractionSummary:
    cache = tmp_path_factory.mktemp("whole") / "c.h5"
    return extract(images, cache, backbone=slow_network.build(), **OPTIONS)


@pytest.fixture(scope="module")
def nodes(is_long: None) -> Iterator[Nodes]:
    with started_nodes() as made:
        yield made


def kill_actor(nodes: Nodes, rng: random.Random) -> None:
    with contextlib.suppress(ProcessLookupError, IndexError):  # it has just ended
        os.kill(rng.choice(find_actors(nodes.address)), signal.SIGKILL)


@contextlib.contextmanager
def killing(
    nodes: Nodes, cache: Path, number: int, rng: random.Random, kill: Callable[[], object]
) -> Iterator[list[int]]:
    """Kill so often, each time a few shards later; yield when, in shards."""
    folder, when, is_over = cache.parent / f"{cache.name}.partial", list[int](), threading.Event()

    def run() -> None:
        seen, least = 0, 1
        while len(when) < number and not is_over.wait(0.02):
            shards = len(list(folder.glob("shard.*")))
            if shards >= seen + least and find_actors(nodes.address):
                is_over.wait(rng.uniform(0, 1))
                kill()
                when.append(shards)
                seen, least = shards, rng.randint(1, 4)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield when
    finally:
        is_over.set()
        thread.join()


def run(images: Path, cache: Path, ray: str, **change: Any) -> ExtractionSummary:
    options = OPTIONS | {"backbone": slow_network.build(), "ray": ray} | change
    made = extract(images, cache, **options)
    assert isinstance(made, ExtractionSummary)
    return made


@pytest.mark.parametrize("processes", [1, 3])
def test_a_ray_of_this_machine_makes_the_cache_of_one_process(
    images: Path, whole: ExtractionSummary, tmp_path: Path, processes: int
) -> None:
    said = list[str]()
    made = run(images, tmp_path / "c.h5", "local", processes=processes, say=said.append)
    assert made.content_sha256 == whole.content_sha256
    assert any(line.startswith(f"Ray: {processes} worker") for line in said)
    assert not find_actors("/tmp/featcache-")


def test_two_raylets_make_the_cache_of_one_process(
    images: Path, whole: ExtractionSummary, nodes: Nodes, tmp_path: Path
) -> None:
    said = list[str]()
    made = run(images, tmp_path / "c.h5", nodes.address, say=said.append)
    assert made.content_sha256 == whole.content_sha256
    assert "Ray: 2 workers of 1 cores." in said


def test_killed_actors(
    images: Path, whole: ExtractionSummary, nodes: Nodes, tmp_path: Path, tally: Any
) -> None:
    rng, said = random.Random(5), list[str]()
    with killing(nodes, tmp_path / "c.h5", 5, rng, lambda: kill_actor(nodes, rng)) as when:
        made = run(images, tmp_path / "c.h5", nodes.address, say=said.append)
    assert len(when) == 5
    assert made.content_sha256 == whole.content_sha256
    assert sum("has ended: its process died" in line for line in said) >= 4
    tally("killed Ray actors", "the whole cache", len(when))


def test_killed_raylets(
    images: Path, whole: ExtractionSummary, nodes: Nodes, tmp_path: Path, tally: Any
) -> None:
    rng, left, all_said = random.Random(3), NUM_KILLS, list[str]()
    while left:
        (tmp_path / "c.h5").unlink(missing_ok=True)
        notes = tmp_path / f"notes{left}"
        backbone, said = counted_network.build(notes), list[str]()

        def kill() -> None:
            nodes.replace_raylet(rng.randrange(2))

        with killing(nodes, tmp_path / "c.h5", min(left, 7), rng, kill) as when:
            made = run(images, tmp_path / "c.h5", nodes.address, backbone=backbone, say=said.append)
        assert made.content_sha256 == whole.content_sha256
        num_run, num_spare = counted_network.count_spare(notes)
        assert num_run == 280
        # A shard of three and two batches of one.
        assert num_spare <= 5 * len(when), said
        tally("killed raylets", "the whole cache", len(when))
        tally("forward passes beyond the necessary", "after killed raylets", num_spare)
        left -= len(when)
        all_said += said
    assert sum("its node is gone" in line for line in all_said) >= NUM_KILLS // 2, all_said


def test_an_exit_that_ray_raises_in_a_thread_is_said() -> None:
    import ray

    def make() -> Any:
        raise SystemExit(1)  # as Ray's functions do where it has ended

    events = queue.SimpleQueue[Any]()
    cluster = ray_workers._Cluster(ray, "head:1", ray_workers.Plan((), (), b"", 1.0), print)
    start: Any = (None, None)
    ray_workers.Actor(cluster, 0, make, start, events.put)
    failed, ended = events.get(timeout=60), events.get(timeout=60)
    assert isinstance(failed, Failed)
    assert failed.ends_all
    assert "--ray: expected a cluster that answers, found one that has ended" in str(failed.error)
    assert isinstance(ended, Ended)


def test_the_private_names_of_ray_that_are_used_are_there() -> None:
    import inspect

    from ray._private import worker
    from ray.job_config import JobConfig

    assert JobConfig(_client_job=True)._client_job
    assert "not job_config._client_job" in inspect.getsource(worker.connect)
