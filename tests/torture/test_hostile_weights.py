"""Weights made to harm: no code runs, the refusal names file and reason, memory stays small."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import signal
import struct
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_network
import torch
from bounded import GIB, Printed, command, run_bounded, run_here
from fork_server import CONTEXT
from PIL import Image
from safetensors.torch import save, save_file

from featcache.backbones.weights import download_state
from featcache.errors import FeatcacheError
from featcache.files import canonical_json
from featcache.heads.head import HeadConfig, build_head
from featcache.heads.run import load_run
from featcache.heads.run_writing import write_run

TINY = ["--backbone", "python:tiny_network:network", "--image-size", "32"]


class Hostile:
    """Unpickled by the book, this makes a file ``ran`` in the working folder."""

    def __reduce__(self) -> Any:
        return os.system, ("echo ran > ran",)


def tiny_state(**changes: Any) -> dict[str, Any]:
    return {**tiny_network.network().state_dict(), **changes}


def claim(folder: Path) -> Path:
    """1.5 kB that claim 4 TiB by a stride of 0, under a right name."""
    torch.save(tiny_state(**{"conv.weight": torch.zeros(1).expand(2**40)}), folder / "w.pt")
    return folder / "w.pt"


def plain(name: str, value: Any) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        torch.save(value, folder / name)
        return folder / name

    return build


def protocol_2(folder: Path) -> Path:
    (folder / "w.pth").write_bytes(pickle.dumps(Hostile(), protocol=2))
    return folder / "w.pth"


def inflating(folder: Path) -> Path:
    """Pack 1.5 GB of zeros into 1.5 MB, as torch never does but reads."""
    torch.save(tiny_state(), folder / "whole.pt")
    with (
        zipfile.ZipFile(folder / "whole.pt") as whole,
        zipfile.ZipFile(folder / "w.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed,
    ):
        for info in whole.infolist():
            if info.filename.endswith("data/0"):
                with packed.open(info.filename, "w") as member:
                    for _ in range(1500):
                        member.write(bytes(2**20))
            else:
                packed.writestr(info.filename, whole.read(info))
    (folder / "whole.pt").unlink()
    return folder / "w.pt"


def truncated(folder: Path) -> Path:
    torch.save(tiny_state(), folder / "w.pt")
    data = (folder / "w.pt").read_bytes()
    (folder / "w.pt").write_bytes(data[: len(data) // 2])
    return folder / "w.pt"


def safetensors_of(header: dict[str, Any] | bytes, length: int | None, size: int) -> Any:
    def build(folder: Path) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        number = len(text) if length is None else length
        (folder / "w.safetensors").write_bytes(struct.pack("<Q", number) + text + bytes(size))
        return folder / "w.safetensors"

    return build


def tensor(begin: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def pipe(name: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        os.mkfifo(folder / name)
        return folder / name

    return build


def device(folder: Path) -> Path:
    (folder / "w.pt").symlink_to("/dev/zero")
    return folder / "w.pt"


WEIGHT = "conv.weight"
SHAPE = tuple(tiny_state()[WEIGHT].shape)
HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "code in a .pt": (plain("w.pt", tiny_state(evil=Hostile())), "one that calls posix.system"),
    "code in a .pth": (protocol_2, "unreadable|posix.system"),
    "code in a .bin": (plain("pytorch_model.bin", {"evil": Hostile()}), "calls posix.system"),
    "claims 4 TiB": (claim, r"conv.weight of shape \(1099511627776,\)"),
    "inflates 1000 times": (inflating, "bytes packed into"),
    "NaN": (plain("w.pt", tiny_state(**{WEIGHT: torch.full(SHAPE, torch.nan)})), "not finite"),
    "infinite in float32": (
        plain("w.pt", tiny_state(**{WEIGHT: torch.full(SHAPE, 1e300, dtype=torch.float64)})),
        "not finite",
    ),
    "integers": (plain("w.pt", tiny_state(**{WEIGHT: torch.ones(SHAPE, dtype=torch.int64)})),
                 "of torch.int64"),
    "complex": (plain("w.pt", tiny_state(**{WEIGHT: torch.ones(SHAPE, dtype=torch.complex64)})),
                "of torch.complex64"),
    "sparse": (plain("w.pt", tiny_state(**{WEIGHT: torch.zeros(SHAPE).to_sparse()})),
               "not a plain tensor"),
    "without values": (plain("w.pt", tiny_state(**{WEIGHT: torch.empty(SHAPE, device="meta")})),
                       "not a plain tensor"),
    "other names": (plain("w.pt", {"a.\x1b[2J\nb": torch.ones(3)}), "unknown|missing"),
    "other shapes": (plain("w.pt", tiny_state(**{WEIGHT: torch.ones(1)})), "of shape"),
    "truncated": (truncated, "unreadable"),
    "overlapping safetensors": (
        safetensors_of({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, None, 12), "unreadable"
    ),
    "safetensors that claim 4 TiB": (
        safetensors_of({"a": tensor(0, 2**42, [2**40])}, None, 64), "unreadable"
    ),
    "safetensors with a header of 2**60": (safetensors_of({}, 2**60, 64), "unreadable"),
    "safetensors nested 100,000 deep": (
        safetensors_of(b"[" * 100_000, None, 0), "unreadable"
    ),
    "a pickle called safetensors": (
        plain("w.safetensors", tiny_state(evil=Hostile())), "unreadable"
    ),
    "a pipe": (pipe("w.pt"), "not a regular file"),
    "a pipe called safetensors": (pipe("w.safetensors"), "not a regular file"),
    "a device without end": (device, "not a regular file"),
}  # fmt: skip


def extract_with(folder: Path, weights: Path, forced: bool) -> Printed:
    """Extract with these weights; ``forced``: where the user has turned torch's caution off."""
    if forced:
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    return run_here(
        folder, ["extract", "data", "c.h5", *TINY, "--weights", weights.name, "--quiet"]
    )


@pytest.mark.parametrize("kind", HOSTILE)
def test_weights_are_refused_and_nothing_in_them_runs(
    kind: str, tmp_path: Path, tally: Any
) -> None:
    build, reason = HOSTILE[kind]
    (tmp_path / "data").mkdir()
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "data" / "1.png")
    weights = build(tmp_path)
    ended = run_bounded(extract_with, tmp_path, weights, "code" in kind)
    done = ended.value
    assert not (tmp_path / "ran").exists()
    assert (done.code, done.out) == (1, ""), done
    assert len(done.err.splitlines()) == 1
    assert done.err.rstrip("\n").isprintable()
    assert weights.name in done.err
    assert re.search(reason, done.err), done.err
    assert ended.peak_bytes < GIB
    assert not list(tmp_path.glob("c.h5*"))
    tally("hostile weights", "refused with file and reason")


def read_carelessly(folder: Path) -> None:
    os.chdir(folder)
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    torch.load("w.pt")


def test_a_hostile_file_does_run_code_in_plain_torch(tmp_path: Path) -> None:
    """Read as so many tools read it, the file does run its code."""
    torch.save(tiny_state(evil=Hostile()), tmp_path / "w.pt")
    run_bounded(read_carelessly, tmp_path)
    assert (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------- the run's weights


def small_run(folder: Path) -> Path:
    head = HeadConfig(24, 2, (4,), 0.0)
    folder.mkdir()
    write_run(
        folder, head=head, state=build_head(head, seed=0).state_dict(), training={}, seed=0,
        data_seed=0, classes=("a", "b"),
        cache={"path": "c.h5", "fingerprint": "f", "identity": {}, "payload_sha256": "p"},
        history=[{"epoch": 1}], environment={},
    )  # fmt: skip
    assert load_run(folder).classes == ("a", "b")
    return folder


def overwrite(data: bytes | None, *, pipe_name: str = "") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / (pipe_name or "head.safetensors")
        file.unlink()
        if data is None:
            os.mkfifo(file)
        else:
            file.write_bytes(data)

    return change


def with_its_hash(data: bytes) -> Callable[[Path], None]:
    """Change the weights and the hash beside them: whoever writes the one can write the other."""

    def change(folder: Path) -> None:
        facts = json.loads((folder / "run.json").read_text("utf-8"))
        facts["weights_sha256"] = hashlib.sha256(data).hexdigest()
        del facts["sha256"]  # the attacker signs again
        facts["sha256"] = hashlib.sha256(canonical_json(facts).encode()).hexdigest()
        (folder / "run.json").write_text(json.dumps(facts), "utf-8")
        (folder / "head.safetensors").write_bytes(data)

    return change


def grow(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        os.truncate(folder / name, 2**40)  # takes no room

    return change


def hostile_pickle() -> bytes:
    buffer = io.BytesIO()
    torch.save({"evil": Hostile()}, buffer)
    return buffer.getvalue()


RUNS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pickle": (overwrite(hostile_pickle()), "sha256"),
    "a pickle with its hash": (with_its_hash(hostile_pickle()), "a safetensors file"),
    "NaN with its hash": (with_its_hash(save({"a": torch.full((3,), torch.nan)})), "head"),
    "a header of 2**60": (with_its_hash(struct.pack("<Q", 2**60) + b"{}"), "a safetensors file"),
    "a pipe": (overwrite(None), "not a regular file"),
    "run.json a pipe": (overwrite(None, pipe_name="run.json"), "not a regular file"),
    "1 TiB": (grow("head.safetensors"), "more than"),
    "run.json of 1 TiB": (grow("run.json"), "more than"),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_runs_weights_are_refused_likewise(kind: str, tmp_path: Path, tally: Any) -> None:
    change, reason = RUNS[kind]
    change(small_run(tmp_path / "run"))
    done = command(tmp_path, "info", "run")
    assert not (tmp_path / "ran").exists()
    assert (done.code, done.out) == (1, "")
    assert re.search(reason, done.err), done.err
    assert "(run)" in done.err
    tally("hostile weights of a run", "refused with file and reason")


@pytest.mark.parametrize("name", ["head.safetensors"])
def test_every_flipped_bit_of_a_runs_weights_is_seen(
    name: str, tmp_path: Path, rounds: Any, tally: Any
) -> None:
    folder = small_run(tmp_path / "run")
    data = (folder / name).read_bytes()
    dice = np.random.default_rng(0)
    for place in dice.integers(0, 8 * len(data), rounds(100, 1000)).tolist():
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        (folder / name).write_bytes(damaged)
        with pytest.raises(FeatcacheError, match="sha256"):
            load_run(folder)
        tally("bit flips of a run's weights", "refused")


# --------------------------------------------------------------------------------------- downloads


class Halting(http.server.SimpleHTTPRequestHandler):
    """Serves files; of one that is named so, half, and then nothing until it may go on."""

    timeout = 300
    go_on = threading.Event()

    def log_message(self, *_: Any) -> None:
        pass

    def copyfile(self, source: Any, outputfile: Any) -> None:
        data = source.read()
        if self.path.startswith("/halt"):
            outputfile.write(data[: len(data) // 2])
            outputfile.flush()
            self.go_on.wait(300)
            return
        outputfile.write(data)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Serve the folder ``www`` on a free port of this machine."""
    (tmp_path / "www").mkdir()
    handler = functools.partial(Halting, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        Halting.go_on.clear()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            Halting.go_on.set()
            server.shutdown()
            thread.join()


def publish(folder: Path, stem: str, *, wrong: bool = False) -> str:
    torch.save(tiny_state(), folder / "file")
    digest = hashlib.sha256((folder / "file").read_bytes()).hexdigest()
    name = f"{stem}-{'0' * 8 if wrong else digest[:8]}.pth"
    (folder / "file").rename(folder / name)
    return name


def fetch(hub: Path, url: str) -> list[str]:
    os.environ["no_proxy"] = "*"
    torch.hub.set_dir(str(hub))
    return sorted(download_state(url)[0])


def test_a_download_is_whole_or_absent(address: str, tmp_path: Path, tally: Any) -> None:
    hub, www = tmp_path / "hub", tmp_path / "www"
    name = publish(www, "tiny")
    ended = run_bounded(fetch, hub, f"{address}/{name}")
    assert ended.value == sorted(tiny_state())
    file = hub / "checkpoints" / name
    assert [p.name for p in file.parent.iterdir()] == [name]

    data = bytearray(file.read_bytes())  # damaged after it was fetched: torch would not look
    data[-200] ^= 1
    file.write_bytes(data)
    ended = run_bounded(fetch, hub, f"{address}/{name}")
    assert re.search(f"downloaded weights.*{re.escape(str(file))}.*Remove it", str(ended.error))
    file.unlink()
    os.mkfifo(file)
    ended = run_bounded(fetch, hub, f"{address}/{name}")
    assert "not a regular file" in str(ended.error)
    file.unlink()

    wrong = publish(www, "other", wrong=True)
    ended = run_bounded(fetch, hub, f"{address}/{wrong}")
    assert "hash" in str(ended.error)
    assert wrong in str(ended.error)
    assert list(file.parent.iterdir()) == []
    tally("hostile downloads", "refused with file and reason", 3)


def test_a_download_killed_half_way_leaves_no_file_of_its_name(
    address: str, tmp_path: Path, tally: Any
) -> None:
    hub = tmp_path / "hub"
    name = publish(tmp_path / "www", "halt")
    child = CONTEXT.Process(target=fetch, args=(hub, f"{address}/{name}"))
    child.start()
    end = time.monotonic() + 300
    while not any((hub / "checkpoints").glob("*")):
        assert child.is_alive()
        assert time.monotonic() < end
        time.sleep(0.01)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not (hub / "checkpoints" / name).exists()
    (tmp_path / "www" / name).rename(tmp_path / "www" / name.replace("halt", "tiny"))
    ended = run_bounded(fetch, hub, f"{address}/{name.replace('halt', 'tiny')}")
    assert ended.value == sorted(tiny_state())
    tally("hostile downloads", "killed, nothing under its name")


def test_a_good_file_is_taken(tmp_path: Path) -> None:
    """So that the refusals above are of what is wrong with the files."""
    (tmp_path / "data").mkdir()
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "data" / "1.png")
    torch.save(tiny_state(), tmp_path / "w.pt")
    save_file(tiny_state(), tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        done = command(tmp_path, "extract", "data", f"{name}.h5", *TINY, "--weights", name)
        assert done.code == 0, done.err
