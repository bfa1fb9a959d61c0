"""Makers of caches and runs by URL, and stores that break off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

HEAD: dict[str, Any] = {"hidden": (4,), "epochs": 1}


def put(file: Path, url: str) -> str:
    fs, path = fsspec.url_to_fs(url)
    fs.pipe_file(path, file.read_bytes())
    return url


def read(url: str) -> bytes:
    fs, path = fsspec.url_to_fs(url)
    return bytes(fs.cat_file(path))


def names(url: str) -> list[str]:
    fs, path = fsspec.url_to_fs(url)
    return sorted(name[len(path) + 1 :] for name in fs.find(path))


def works(copies: Path) -> list[Path]:
    return list((copies / "work").glob("*/*"))


def another_computer(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("FEATCACHE_COPIES", str(folder))


def keys(client: Any) -> list[str]:
    return [one["Key"] for one in client.list_objects_v2(Bucket="caches").get("Contents", [])]


def break_after(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Let a store take so many files, half of one more, and then nothing; return what it took."""
    plain, taken = MemoryFileSystem.put_file, list[str]()

    def put_file(self: Any, source: str, target: str, **how: Any) -> None:
        if len(taken) >= number:
            self.pipe_file(target, Path(source).read_bytes()[:100])
            raise ConnectionError("cut")
        taken.append(target)
        plain(self, source, target, **how)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    return taken


def die_before(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """End the process, as far as it can tell, before its so-manieth request that writes."""
    done = [0]

    def wrap(name: str) -> None:
        plain = getattr(MemoryFileSystem, name)

        def ask(*args: Any, **how: Any) -> Any:
            done[0] += 1
            if done[0] >= number:
                raise KeyboardInterrupt
            return plain(*args, **how)

        monkeypatch.setattr(MemoryFileSystem, name, ask)

    for name in ("put_file", "pipe_file", "mv", "rm_file"):
        wrap(name)
