"""The actor of ``--ray`` without a Ray, which only carries what it is given and gives back."""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_network

import featcache
from featcache.errors import ConfigError, DataError
from featcache.extraction import extraction, work
from featcache.extraction.extraction import extract
from featcache.extraction.plan import Job
from featcache.extraction.workers import coordinator, ray_node
from featcache.extraction.workers.coordinator import Coordinator, Ended, Event, Failed
from featcache.extraction.workers.ray_cluster import Room, find_rooms
from featcache.extraction.workers.ray_node import (
    Begun,
    FeatcacheActor,
    Seen,
    SentShard,
    Start,
    what_is_seen,
)
from featcache.extraction.workers.worker import Done, Facts, ShardMade, Task

pytestmark = pytest.mark.usefixtures("one_thread")

ROOM = Room(0, 1, 1.0, 0.0)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "SHARD_BYTES", tiny_network.shard_bytes(4, 2))
    monkeypatch.setattr(ray_node, "_SEEN_SECONDS", 0.0)


class DirectWorker:
    """A ``WorkerHandle`` that runs an actor's task when it is given one."""

    def __init__(
        self, actor: FeatcacheActor, folders: Sequence[Path], tell: Callable[[Event], object]
    ) -> None:
        self._actor, self._folders, self._tell = actor, folders, tell

    def give(self, task: Task) -> None:
        for answer in self._actor.run(task):
            is_sent = isinstance(answer, SentShard)
            self._tell(answer.write(self._folders[answer.made.job]) if is_sent else answer)
            if isinstance(answer, SentShard | ShardMade):
                self._actor.listed()

    def listed(self) -> None:
        pass

    def stop(self) -> None:
        self._tell(Ended("asked to", was_asked=True))

    def kill(self) -> None:
        pass


Begin = Callable[[FeatcacheActor, Facts, Seen], Begun]


@pytest.fixture
def use_actor(monkeypatch: pytest.MonkeyPatch) -> Callable[[Begin], None]:
    """Lets ``extract(processes=2)`` use one actor of this process, begun by a function."""

    def use(begin: Begin) -> None:
        def work_on(devices: Sequence[str], jobs: Sequence[Job], positions: Sequence[int]) -> None:
            def start(number: int, facts: Facts, tell: Callable[[Event], object]) -> DirectWorker:
                manifests = [job.partial.file.absolute() for job in jobs]
                actor = FeatcacheActor()
                tell(begin(actor, facts, what_is_seen(facts, manifests)).ready)
                return DirectWorker(actor, [job.partial.folder for job in jobs], tell)

            Coordinator(jobs, positions, start, 1).run()

        monkeypatch.setattr(extraction, "work_on", work_on)

    return use


def begin(actor: FeatcacheActor, facts: Facts, seen: Seen, **change: Any) -> Begun | Failed:
    start = Start(featcache.__version__, sys.path, "cpu", ROOM, seen)
    return actor.begin(replace(start, **change), pickle.dumps(facts))


def test_where_the_folder_is_not_seen_shards_are_sent(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_actor: Any
) -> None:
    """Into the folder of the command alone; nothing is left where the actor is."""
    node = tmp_path / "node"
    node.mkdir()
    monkeypatch.setattr(ray_node.tempfile, "gettempdir", lambda: str(node))
    sent = list[int]()

    def begin_unseen(actor: FeatcacheActor, facts: Facts, seen: Seen) -> Begun:
        gone = tuple(node / "c.h5.partial" / file.name for file in seen.manifests)
        begun = begin(actor, facts, replace(seen, manifests=gone))
        assert isinstance(begun, Begun)
        assert begun.sent == ("new.h5",)
        inner = actor._send

        def send(message: Any) -> Any:
            answer = inner(message)
            if isinstance(answer, SentShard):
                sent.append(len(answer.data))
            assert len(list(node.glob("*/shard.*"))) == 0
            return answer

        monkeypatch.setattr(actor, "_send", send)
        return begun

    use_actor(begin_unseen)
    new = tmp_path / "new.h5"
    made = extract(
        tree, new, backbone=tiny_network.build(), processes=2, batch_size=2, engine="folded"
    )
    assert len(sent) >= 46 // 4
    assert list(node.iterdir()) == []
    whole = extract(
        tree, tmp_path / "w.h5", backbone=tiny_network.build(), batch_size=2, engine="folded"
    )
    assert made.content_sha256 == whole.content_sha256


def test_where_the_folder_is_seen_they_are_not(tree: Path, tmp_path: Path, use_actor: Any) -> None:
    tasks = list[Task]()

    def begin_seen(actor: FeatcacheActor, facts: Facts, seen: Seen) -> Begun:
        begun = begin(actor, facts, seen)
        assert isinstance(begun, Begun)
        assert begun.sent == ()
        inner = actor.run

        def run(task: Task) -> Any:
            tasks.append(task)
            for answer in inner(task):
                assert type(answer) in {ShardMade, Done}
                yield answer

        actor.run = run  # type: ignore[method-assign]
        return begun

    use_actor(begin_seen)
    made = extract(tree, tmp_path / "new.h5", backbone=tiny_network.build(), processes=2)
    assert made.num_new == 46
    assert tasks


def test_an_actor_waits_until_its_shard_is_listed(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_actor: Any
) -> None:
    """Meanwhile it hands back nothing: its node, or the command, may be lost with one shard."""
    waiting = list[int]()

    def begin_waiting(actor: FeatcacheActor, facts: Facts, seen: Seen) -> Begun:
        begun = begin(actor, facts, seen)
        assert isinstance(begun, Begun)
        inner, made = actor.run, list[object]()
        send = actor._send
        actor._send = lambda m: made.append(m) or send(m)  # type: ignore[func-returns-value, method-assign]

        def run(task: Task) -> Any:
            made.clear()
            for number, answer in enumerate(inner(task), 1):
                if number == 1:
                    time.sleep(0.3)  # without waiting, it would be done by then
                waiting.append(len(made) - number)
                yield answer

        actor.run = run  # type: ignore[method-assign]
        return begun

    use_actor(begin_waiting)
    monkeypatch.setattr(coordinator, "MIN_IMAGES", 46)
    more = {"batch_size": 2, "workers": 1}
    extract(tree, tmp_path / "new.h5", backbone=tiny_network.build(), processes=2, **more)
    assert len(waiting) > 46 // 4
    assert set(waiting) == {0}


def test_what_an_actor_cannot_do_is_said(tree: Path, tmp_path: Path, use_actor: Any) -> None:
    def refuse(actor: FeatcacheActor, facts: Facts, seen: Seen) -> Begun:
        other = begin(actor, facts, seen, version="0.0")
        assert isinstance(other, Failed)
        assert isinstance(other.error, ConfigError)
        assert f"expected featcache 0.0, found {featcache.__version__}" in str(other.error)
        start = Start(featcache.__version__, [], "cpu", ROOM, seen)
        broken = actor.begin(start, b"cnowhere\nNetwork\n.")
        assert isinstance(broken, Failed)
        assert "--ray: expected a backbone that another process can import" in str(broken.error)
        blind = begin(actor, facts, replace(seen, images={0: 1}))
        assert isinstance(blind, Failed)
        raise blind.error

    use_actor(refuse)
    with pytest.raises(DataError, match=r"^worker on .*: expected the images that the command has"):
        extract(tree, tmp_path / "c.h5", backbone=tiny_network.build(), processes=2)


def test_an_actor_that_is_told_to_stop_hands_back_what_it_has(
    tree: Path, tmp_path: Path, use_actor: Any
) -> None:
    answers = list[object]()

    def begin_stopping(actor: FeatcacheActor, facts: Facts, seen: Seen) -> Begun:
        begun = begin(actor, facts, seen)
        assert isinstance(begun, Begun)
        inner = actor.run

        def run(task: Task) -> Any:
            actor.stop()
            for answer in inner(task):
                answers.append(answer)
                yield answer
            raise KeyboardInterrupt  # else the rest is asked for again and again

        actor.run = run  # type: ignore[method-assign]
        return begun

    use_actor(begin_stopping)
    with pytest.raises(KeyboardInterrupt):
        extract(tree, tmp_path / "c.h5", backbone=tiny_network.build(), processes=2, batch_size=2)
    made, done = answers
    assert isinstance(made, ShardMade)
    assert isinstance(done, Done)
    assert made.receipt.num_rows == 2


def node(cpus: float, gpus: int = 0, *, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus} if alive else {}}


def test_what_each_actor_takes_of_a_node() -> None:
    nodes = [node(0), node(8, 2), node(3), node(64, 8, alive=False)]
    assert find_rooms(nodes, "cpu", 1) == [Room(0, 1, 8, 0), Room(0, 1, 3, 0)]
    # The first of each node come first.
    assert find_rooms(nodes, "cpu", 2) == [
        Room(0, 2, 4, 0), Room(0, 2, 1, 0), Room(1, 2, 4, 0), Room(1, 2, 1, 0),
    ]  # fmt: skip
    assert find_rooms(nodes, "cuda", 1) == [Room(0, 2, 4, 1), Room(1, 2, 4, 1)]
    assert {room.gpus for room in find_rooms(nodes, "cuda", 3)} == {0.3333}  # four digits at most
    assert find_rooms([node(0), node(0.5)], "cpu", 1) == []
    assert [room.cores for room in find_rooms([node(1)], "cpu", 3)] == [0.3333] * 3


def test_which_node_is_large_enough() -> None:
    room = Room(0, 2, 4, 1)
    assert room.fits(node(8, 2))
    assert room.fits(node(4, 1))
    assert not room.fits(node(3, 2))
    assert not room.fits(node(8, 0))
    assert not room.fits(node(8, 2, alive=False))
