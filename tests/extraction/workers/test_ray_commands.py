"""``extract --ray`` as a command that is interrupted, killed, or loses its cluster: ``--long``."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import slow_network
from children import Child, wait_for, warm_parent
from sample_images import write_tree
from sample_ray import Nodes, find_actors, started_nodes

from featcache.cache.reading import open_cache
from featcache.errors import ConfigError
from featcache.extraction.extraction import extract
from featcache.extraction.workers.ray_actors import check_ray

pytest.importorskip("ray", reason="ray is not installed")

pytestmark = [
    pytest.mark.usefixtures("one_thread", "is_long"),
    pytest.mark.filterwarnings("ignore"),  # Ray's own
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes by /proc"),
]

COMMAND = ("extract", "data", "c.h5", "--backbone", "python:slow_network:build", "--engine")
COMMAND += ("folded", "--batch-size", "2", "--quiet", "--ray")
ACTORS = "featcache.extraction.workers.ray_actors"


@pytest.fixture(scope="module")
def is_long(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--long"):
        pytest.skip("--long starts a Ray")


@pytest.fixture(scope="module")
def images(is_long: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """280 images, and the sha256 of what one process makes of them."""
    root = write_tree(
        tmp_path_factory.mktemp("images") / "data", {"train": 80, "valid": 20, "test": 40}
    )
    whole = extract(
        root, root.parent / "w.h5", backbone=slow_network.build(), batch_size=2, engine="folded"
    )
    return root, whole.content_sha256


@pytest.fixture
def place(images: tuple[Path, str], tmp_path: Path) -> Path:
    (tmp_path / "data").symlink_to(images[0])
    (tmp_path / "sha256").write_text(images[1], "ascii")
    return tmp_path


@pytest.fixture(scope="module")
def nodes(is_long: None) -> Iterator[Nodes]:
    with started_nodes() as made:
        yield made


def start(place: Path, ray: str, *before: tuple[Any, ...]) -> Child:
    return warm_parent().start(*COMMAND, ray, cwd=place, before=(("small_shards", 4, 2), *before))


def num_shards(place: Path) -> int:
    return len(list((place / "c.h5.partial").glob("shard.*")))


def num_listed(place: Path) -> int:
    manifest = json.loads((place / "c.h5.partial" / "manifest.json").read_bytes())
    return sum(shard["num_rows"] for shard in manifest["shards"])


def check_resumed(place: Path, ray: str, num_kept: int) -> None:
    """Check that the same command goes on with the shards that were listed."""
    result = warm_parent().run(
        *COMMAND, ray, "--json", cwd=place, before=(("small_shards", 4, 2),)
    )  # fmt: skip
    assert result.code == 0, result
    assert result.facts["num_known"] >= num_kept
    cache = open_cache(place / "c.h5")
    assert cache.content_sha256 == (place / "sha256").read_text("ascii")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_actors_hand_back_their_batch(
    place: Path, nodes: Nodes, number: signal.Signals, tally: Any
) -> None:
    child = start(place, nodes.address)
    wait_for(lambda: num_shards(place) > 2, child)
    begin = time.monotonic()
    child.kill(number)
    result = child.wait()
    tally(
        f"tenths of a second from {number.name}", "to the end", int(10 * (time.monotonic() - begin))
    )
    assert result.code == 128 + number, result
    lines = list(filter(None, result.err.splitlines()))
    assert "of 280 images kept in" in lines[-1]
    assert len(lines) == 1, result
    wait_for(lambda: not find_actors(nodes.address), None)
    shards = {path.name for path in (place / "c.h5.partial").glob("shard.*")}
    manifest = json.loads((place / "c.h5.partial" / "manifest.json").read_bytes())
    assert shards == {shard["file"] for shard in manifest["shards"]}
    check_resumed(place, nodes.address, num_listed(place))
    assert not find_actors(nodes.address)


def test_actors_stop_soon_after_the_command_was_killed(
    place: Path, nodes: Nodes, tally: Any
) -> None:
    child = start(place, nodes.address)
    wait_for(lambda: num_shards(place) > 2, child)
    assert find_actors(nodes.address)
    child.kill(signal.SIGKILL)
    begin = time.monotonic()
    child.wait()
    wait_for(lambda: not find_actors(nodes.address), None)
    seconds = time.monotonic() - begin
    tally("tenths of a second until actors notice a kill -9", "stopped", int(10 * seconds))
    assert seconds < 10
    check_resumed(place, nodes.address, num_listed(place))


def find_own_rays() -> set[Path]:
    """Return the folders of all Rays that were started for a command, of others' commands too."""
    return {path for path in Path("/tmp").glob("featcache-*") if (path / "session_latest").exists()}


def find_processes(folder: Path) -> list[str]:
    """Return the command lines of the processes of a Ray."""
    found = list[str]()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().decode("utf-8", "replace")
            if f"{folder}/" in line:
                found.append(line)
    return found


def test_a_ray_of_our_own_ends_with_the_killed_command(place: Path) -> None:
    before = find_own_rays()
    child = start(place, "local")
    wait_for(lambda: num_shards(place) > 2, child)
    (folder,) = find_own_rays() - before
    assert find_processes(folder)
    child.kill(signal.SIGKILL)
    child.wait()
    # The folder goes last.
    wait_for(lambda: not folder.exists() and not find_processes(folder), None)
    check_resumed(place, "local", num_listed(place))
    assert find_own_rays() <= before


def test_modules_beside_the_images_do_not_run(place: Path, nodes: Nodes) -> None:
    """Ray puts the current folder first on its workers' path."""
    (place / "data").unlink()
    write_tree(place / "data")
    for name in ("numpy", "h5py", "torch", "fractions"):
        (place / f"{name}.py").write_text(f"open({str(place / 'ran')!r}, 'w')\nraise OSError\n")
    result = start(place, nodes.address).wait()
    assert result.code == 0, result
    assert not (place / "ran").exists()


def test_a_cluster_without_nodes_is_given_up_and_the_same_command_goes_on(
    place: Path, nodes: Nodes
) -> None:
    child = start(place, nodes.address, ("set", ACTORS, "LOST_SECONDS", 8.0))
    wait_for(lambda: num_shards(place) > 4, child)
    for number in range(2):
        nodes.kill_raylet(number)
    result = child.wait()
    assert result.code == 1, result
    *told, line = result.err.splitlines()
    wanted = "--ray: expected a node with 1 cores, found none for 8 s"
    assert line.startswith(f"error: {wanted} ({nodes.address}). Start nodes"), result
    assert not told, result
    kept = num_listed(place)
    assert kept >= 8
    for number in range(2):
        nodes.nodes[number] = nodes.add()
    check_resumed(place, nodes.address, kept)


def test_a_cluster_that_ends_is_one_line(place: Path) -> None:
    """Its head is killed: node, tables and all."""
    with started_nodes() as nodes:
        child = start(place, nodes.address)
        wait_for(lambda: num_shards(place) > 4, child)
        nodes.cluster.shutdown()
        begin = time.monotonic()
        result = child.wait()
        assert time.monotonic() - begin < 120
    assert result.code == 1, result
    assert result.error().startswith("error: --ray: expected a cluster that answers"), result
    assert num_listed(place) >= 8
    with started_nodes() as nodes:
        check_resumed(place, nodes.address, num_listed(place))


def test_a_bridge_that_is_stopped_is_one_line(place: Path, nodes: Nodes) -> None:
    child = start(place, nodes.address, ("set", ACTORS, "_SILENT_SECONDS", 10.0))
    wait_for(lambda: num_shards(place) > 4, child)
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text("ascii").split()
    (bridge,) = [
        int(number) for number in children
        if b"ray_bridge" in Path(f"/proc/{number}/cmdline").read_bytes()
    ]  # fmt: skip
    os.kill(bridge, signal.SIGSTOP)
    result = child.wait()
    assert result.code == 1, result
    assert result.error().startswith("error: --ray: expected a cluster that answers"), result
    assert "said nothing for 10 s" in result.error(), result
    wait_for(lambda: not find_actors(nodes.address), None)
    assert num_listed(place) >= 8
    check_resumed(place, nodes.address, num_listed(place))


def test_shards_of_a_node_without_the_folder_are_sent(
    images: tuple[Path, str], place: Path, tally: Any
) -> None:
    """A cluster with one such node: the folder is another one there, in a name space of its own."""
    with started_nodes(0) as nodes:
        try:
            nodes.add_without(place)
        except OSError as error:
            pytest.skip(str(error))
        (place / "data").unlink()
        before = (("small_shards", 4, 2),)
        command = ("extract", images[0], *COMMAND[2:-1], "--processes", "2", "--ray")
        command = tuple(word for word in command if word != "--quiet")
        result = warm_parent().run(*command, nodes.address, cwd=place, before=before)
    assert result.code == 0, result
    told = [line for line in result.out.splitlines() if "does not see the folder of c.h5" in line]
    assert len(told) == 2, result
    assert told[0].endswith("it sends its shards.")
    assert open_cache(place / "c.h5").content_sha256 == images[1]


def test_a_cluster_of_another_version_is_one_line() -> None:
    from ray._raylet import GcsClient

    with started_nodes(0) as nodes:
        check_ray(nodes.address)
        client = GcsClient(address=nodes.address)
        facts = json.loads(client.internal_kv_get(b"CLUSTER_METADATA", b"cluster"))
        facts |= {"ray_version": "9.9.9", "python_version": "3.99.1"}
        value = json.dumps(facts).encode()
        client.internal_kv_put(b"CLUSTER_METADATA", value, True, b"cluster")
        with pytest.raises(ConfigError, match=r"Version mismatch.*Ray: 9\.9\.9.*Python: 3\.99\.1"):
            check_ray(nodes.address)


def test_another_service_at_the_address_is_one_line(place: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        begin = time.monotonic()
        result = start(place, f"127.0.0.1:{server.server_port}").wait()
    finally:
        server.shutdown()
        server.server_close()
    assert time.monotonic() - begin < 30
    assert "expected a Ray cluster at 127.0.0.1" in result.error()
    assert not (place / "c.h5.partial").exists()
