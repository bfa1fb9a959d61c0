"""``--ray`` without a Ray: what is refused before one is asked for, and a bridge that ends."""

from __future__ import annotations

import queue
import socket
import sys
from pathlib import Path

import pytest

from featcache.errors import ConfigError
from featcache.extraction.extraction import extract
from featcache.extraction.workers import ray_actors, ray_cluster
from featcache.extraction.workers.coordinator import Ended, Event, Failed
from featcache.extraction.workers.ray_actors import Bridge, RayWorker
from featcache.extraction.workers.ray_workers import Plan
from featcache.extraction.workers.worker import Facts
from featcache.files import child_process


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda name: name)


def test_without_the_package_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tree: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"--ray: expected the package ray.*featcache\[ray\]"):
        extract(tree, tmp_path / "c.h5", backbone="python:tiny_network:build", ray="local")
    assert not (tmp_path / "c.h5.partial").exists()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("address", ["", "head", "ray://head:10001", "head:port", "head:70000"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="--ray: expected local, auto or HOST:PORT"):
        ray_actors.check_ray(address)


@pytest.mark.usefixtures("installed")
def test_where_nothing_listens_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"expected a Ray cluster at {address}, found .*refused"):
        ray_actors.check_ray(address)


@pytest.mark.usefixtures("installed")
def test_a_service_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", exc_type=ImportError)
    monkeypatch.setattr(ray_actors, "_INIT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"{address}, found nothing that answers as Ray does"):
            ray_actors.check_ray(address)


@pytest.mark.usefixtures("installed")
def test_a_ray_that_cannot_be_imported_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError('its half\\nis missing')", "ascii")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ConfigError, match="a Ray cluster at auto, found its half is missing"):
        ray_actors.check_ray("auto")


# What ``ray_bridge`` says, and then it is killed, as Ray ends it where its node ends.
_DYING = """
import os, struct, sys
from featcache.child import receive, send
answers = os.fdopen(1, "wb")
send(answers, ([{"Alive": True}],))
sys.stdin.buffer.read(*struct.unpack("<Q", sys.stdin.buffer.read(8)))  # unpickled, it imports torch
send(answers, (None, "a line"))
order = receive(sys.stdin.buffer)
assert order == ("start", 0, 3), order
os.kill(os.getpid(), 9)
"""


# It says that it lives, and is stopped before it reads an order.
_STOPPED = """
import os, signal, sys
from featcache.child import send
answers = os.fdopen(1, "wb")
send(answers, ([{"Alive": True}],))
send(answers, (None, ""))
os.kill(os.getpid(), signal.SIGSTOP)
"""


def use_bridge(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(
        ray_actors, "child_process",
        lambda module: ([sys.executable, "-P", "-c", code], child_process(module)[1]),
    )  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="no process is stopped there")
def test_a_bridge_that_is_stopped_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    use_bridge(monkeypatch, _STOPPED)
    monkeypatch.setattr(ray_actors, "_SILENT_SECONDS", 0.6)
    said, events = list[str](), queue.SimpleQueue[Event]()
    with ray_actors._bridge("head:1") as bridge:
        bridge.say = said.append
        facts: Facts = Facts(None, (), 1, 0)  # type: ignore[arg-type]
        bridge.plan(Plan((), (), bytes(1 << 22), 1.0), facts)  # more than a pipe holds
        worker = RayWorker(bridge, 0, events.put)
        failed, ended = events.get(timeout=60), events.get(timeout=60)
        assert isinstance(failed, Failed)
        assert failed.ends_all
        assert "found a process of Ray's on this machine that said nothing for " in str(
            failed.error
        )
        assert isinstance(ended, Ended)
        worker.give(None)  # type: ignore[arg-type]
    assert said == []


def test_a_bridge_that_ends_is_an_error_of_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    use_bridge(monkeypatch, _DYING)
    said, events = list[str](), queue.SimpleQueue[Event]()
    with ray_actors._bridge("head:1") as bridge:
        assert isinstance(bridge, Bridge)
        assert bridge.nodes == [{"Alive": True}]
        bridge.say = said.append
        bridge.plan(Plan((), (), b"", 1.0), Facts(None, (), 1, 0))  # type: ignore[arg-type]
        RayWorker(bridge, 3, events.put)
        for _ in range(2):  # one that was there, and one that is started when all is over
            failed, ended = events.get(timeout=60), events.get(timeout=60)
            assert isinstance(failed, Failed)
            assert failed.ends_all
            assert "expected a cluster that answers, found one that has ended" in str(failed.error)
            assert isinstance(ended, Ended)
            last = RayWorker(bridge, 4, events.put)
        last.stop()
        last.kill()
    assert said == ["a line"]
