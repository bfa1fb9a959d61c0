"""``--ray`` without a Ray: what is refused before one is asked for."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from featcache.errors import ConfigError
from featcache.extraction.extraction import extract
from featcache.extraction.workers import ray_actors, ray_cluster


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
    monkeypatch.setattr(ray_actors, "_INIT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"{address}, found nothing that answers as Ray does"):
            ray_actors.check_ray(address)
