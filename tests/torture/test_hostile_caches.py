"""Caches from strangers: each refused with file and reason; no other file read, no memory, no hang.

Every file is opened, verified and trained on in one child process that may allocate 1 GiB beyond
what its libraries take and compute for 10 s a file. Pipes that nobody writes stand where a file is
named that must not be read: opening one blocks for ever. Python's own opens are watched.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import featcache
from featcache.cache.container import content_sha256, user_block_sha256
from featcache.cache.reading import is_content, open_cache
from featcache.cache.writing import write_cache
from featcache.errors import FeatcacheError, FeatcacheWarning
from featcache.extraction.verification import verify
from featcache.files import canonical_json
from featcache.heads.training import train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and limits on memory")
ROOT = Path(featcache.__file__).parents[1]
SAMPLES = ROOT.parent / "shared" / "research" / "rel" / "samples"
SECRET = b"TOP-SECRET-KEY-0123456789abcdef!"
GIBIBYTE = 1 << 30


# --- what strangers write into HDF5; ``pipe`` and ``secret`` are files that must not be read

Fill = Callable[[h5py.File, Path], None]
FEATURES = "splits/all/features"


def external_link(file: h5py.File, folder: Path) -> None:
    file["splits"] = h5py.ExternalLink(str(folder / "pipe"), "/splits")


def external_link_in_the_middle(file: h5py.File, folder: Path) -> None:
    file.create_group("splits")["all"] = h5py.ExternalLink(str(folder / "pipe"), "/all")


def external_storage(file: h5py.File, folder: Path) -> None:
    where = [(str(folder / "secret"), 0, 5120)]
    file.create_dataset(FEATURES, (1, 1280), "f4", external=where)


def external_storage_in_a_pipe(file: h5py.File, folder: Path) -> None:
    file.create_dataset(FEATURES, (1, 1280), "f4", external=[(str(folder / "pipe"), 0, 5120)])


def virtual(file: h5py.File, folder: Path) -> None:
    layout = h5py.VirtualLayout((4, 8), "f4")
    layout[:] = h5py.VirtualSource(str(folder / "pipe"), "x", (4, 8))
    file.create_virtual_dataset(FEATURES, layout)


def virtual_without_end(file: h5py.File, folder: Path) -> None:
    """Its very shape depends on another file."""
    layout = h5py.VirtualLayout((4, 8), "f4", maxshape=(None, 8))
    source = h5py.VirtualSource(str(folder / "pipe"), "x", (4, 8), maxshape=(None, 8))
    layout[: h5py.h5s.UNLIMITED] = source[: h5py.h5s.UNLIMITED]
    file.create_virtual_dataset(FEATURES, layout)


def soft_link_cycle(file: h5py.File, folder: Path) -> None:
    file["splits"] = h5py.SoftLink("/splits")
    file["b"], file["c"] = h5py.SoftLink("/c"), h5py.SoftLink("/b")


def soft_link(file: h5py.File, folder: Path) -> None:
    file["x"] = np.ones((4, 8), "f4")
    file[FEATURES] = h5py.SoftLink("/x")


def hard_link_cycle(file: h5py.File, folder: Path) -> None:
    file.create_group("splits")["all"] = file["/"]


def huge_shape(file: h5py.File, folder: Path) -> None:
    file.create_dataset(FEATURES, (1 << 40, 1280), "f4", chunks=(1024, 1280))


def huge_and_contiguous(file: h5py.File, folder: Path) -> None:
    file.create_dataset(FEATURES, (1 << 30, 1280), "f4")


def compressed_bomb(file: h5py.File, folder: Path) -> None:
    data = file.create_dataset(
        FEATURES, (4096 * 8, 1280), "f4", chunks=(4096, 1280), compression="gzip"
    )
    for i in range(0, len(data), 4096):
        data[i : i + 4096] = 0


def filters(file: h5py.File, folder: Path) -> None:
    file.create_dataset(
        FEATURES, data=np.ones((8, 8), "f4"), chunks=(8, 8), shuffle=True, fletcher32=True,
        compression="lzf",
    )  # fmt: skip


def many_groups(file: h5py.File, folder: Path) -> None:
    for i in range(1500):
        file.create_group(f"g{i}")


def deep_groups(file: h5py.File, folder: Path) -> None:
    group = file["/"]
    for _ in range(1500):
        group = group.create_group("d")


def not_finite(file: h5py.File, folder: Path) -> None:
    file[FEATURES] = np.full((4, 8), np.nan, "f4")


def objects(file: h5py.File, folder: Path) -> None:
    file.create_dataset(FEATURES, (4,), dtype=h5py.vlen_dtype(np.dtype("f4")))


def texts_of_any_length(file: h5py.File, folder: Path) -> None:
    names = ["covid", "../../etc/passwd", "<script>alert(1)</script>", "=cmd|' /C calc'!A0", "a\nb"]
    file["classes"] = np.array(names, dtype=h5py.string_dtype())


def texts_for_numbers(file: h5py.File, folder: Path) -> None:
    file[FEATURES] = np.array([[b"1.0"] * 8] * 4)


def doubles(file: h5py.File, folder: Path) -> None:
    file[FEATURES] = np.ones((4, 8), ">f8")


def records(file: h5py.File, folder: Path) -> None:
    file.create_dataset(FEATURES, (4,), dtype=[("a", "f4"), ("b", h5py.string_dtype())])


def references(file: h5py.File, folder: Path) -> None:
    file["x"] = np.ones(3)
    file.create_dataset(FEATURES, data=[file["x"].ref], dtype=h5py.ref_dtype)


def named_type(file: h5py.File, folder: Path) -> None:
    file[FEATURES] = np.dtype("f4")


def large_attribute(file: h5py.File, folder: Path) -> None:
    file.attrs["format"] = np.bytes_(b"x" * 60_000)
    file[FEATURES] = np.ones((4, 8), "f4")


def fewer_targets(file: h5py.File, folder: Path) -> None:
    file[FEATURES], file["splits/all/targets"] = np.ones((8, 8), "f4"), np.arange(7)


def names_that_climb(file: h5py.File, folder: Path) -> None:
    for name in ("a\nb", "<script>", "\x1b]0;x\a", "x" * 5000):
        file["splits/" + name] = np.ones(3, "f4")


FILLS: list[Fill] = [
    external_link, external_link_in_the_middle, external_storage, external_storage_in_a_pipe,
    virtual, virtual_without_end, soft_link_cycle, soft_link, hard_link_cycle, huge_shape,
    huge_and_contiguous, compressed_bomb, filters, many_groups, deep_groups, not_finite, objects,
    texts_of_any_length, texts_for_numbers, doubles, records, references, named_type,
    large_attribute, fewer_targets, names_that_climb,
]  # fmt: skip


def make_hdf5(path: Path, fill: Fill, user_block: int = 0) -> bytes:
    with h5py.File(path, "w", userblock_size=user_block, libver="latest") as file:
        fill(file, path.parent)
    return path.read_bytes()[user_block:]


# --- a user block that looks honest, in front of any payload


def honest_arrays(folder: Path) -> dict[str, np.ndarray]:
    """The data sets of a small good cache."""
    rng = np.random.default_rng(0)
    cache = write_cache(
        folder / "honest", {s: rng.normal(size=(8, 4)).astype("f4") for s in ("train", "valid")},
        [0, 1] * 4, {s: [f"{s}/{i}.png" for i in range(8)] for s in ("train", "valid")},
        classes=["covid", "normal"],
    )  # fmt: skip
    return {name: np.array(cache.container.map(name)) for name in cache.container.arrays}


def write_plausible(
    path: Path, head: bytes, arrays: dict[str, np.ndarray],
    change: Callable[[dict[str, Any]], object] = lambda block: None,
) -> None:  # fmt: skip
    """Write a user block with a true table and true hashes, ``head`` as HDF5, and the arrays."""
    payload, lines = bytearray(head), []
    for name, array in arrays.items():
        payload += b"\0" * (-len(payload) % 64)
        lines.append({
            "name": name, "offset": 4096 + len(payload), "shape": list(array.shape),
            "dtype": array.dtype.str,
        })  # fmt: skip
        payload += array.tobytes().ljust(array.nbytes, b"\0")
    content = {name: array for name, array in arrays.items() if is_content(name)}
    block = {
        "format": "featcache", "format_version": 1, "user_block_bytes": 4096,
        "payload_bytes": len(payload), "payload_sha256": hashlib.sha256(payload).hexdigest(),
        "content_sha256": content_sha256({
            n: (a.dtype, a.shape, hashlib.sha256(a.tobytes()).hexdigest())
            for n, a in content.items()
        }),
        "fingerprint": hashlib.sha256(arrays["identity"].item()).hexdigest(), "arrays": lines,
    }  # fmt: skip
    change(block)
    block["user_block_sha256"] = user_block_sha256(block)
    path.write_bytes(canonical_json(block).encode().ljust(4096, b"\0") + payload)


def line_of(block: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(line for line in block["arrays"] if line["name"] == name)
    return found


F, T, P = "splits/train/features", "splits/train/targets", "splits/train/paths"
DEEP = np.array(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")

LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "huge shape": lambda b: line_of(b, F).update(shape=[1 << 40, 4]),
    "huge product": lambda b: line_of(b, F).update(shape=[5000, 5000, 5000]),
    "negative shape": lambda b: line_of(b, F).update(shape=[-8, -4]),
    "shape of floats": lambda b: line_of(b, F).update(shape=[8.0, 4]),
    "beyond the file": lambda b: line_of(b, F).update(offset=1 << 40),
    "half beyond": lambda b: line_of(b, F).update(offset=b["payload_bytes"] + 4096 - 10),
    "negative offset": lambda b: line_of(b, F).update(offset=-8),
    "in the user block": lambda b: line_of(b, F).update(offset=0),
    "overlap": lambda b: line_of(b, F).update(offset=line_of(b, T)["offset"]),
    "objects": lambda b: line_of(b, F).update(dtype="|O"),
    "wide texts": lambda b: line_of(b, P).update(dtype="|S9999999"),
    "no texts": lambda b: line_of(b, P).update(dtype="|S0"),
    "a name that climbs": lambda b: line_of(b, F).update(name="splits/../../etc/passwd"),
    "a name of two lines": lambda b: line_of(b, F).update(name="splits/a\nb"),
    "a name of markup": lambda b: line_of(b, F).update(name="<script>"),
    "fewer targets": lambda b: line_of(b, T).update(shape=[7]),
    "fewer paths": lambda b: line_of(b, P).update(shape=[3]),
    "floats for targets": lambda b: line_of(b, T).update(dtype="<f4", shape=[16]),
    "twice": lambda b: b["arrays"].append(dict(line_of(b, F))),
    "no table": lambda b: b.update(arrays={}),
    "a table of text": lambda b: b.update(arrays="features"),
    "no features": lambda b: [x.update(name="x") for x in b["arrays"] if "/fea" in x["name"]],
    "no identity": lambda b: b["arrays"].remove(line_of(b, "identity")),
    "other length": lambda b: b.update(payload_bytes=b["payload_bytes"] + 1),
    "other payload": lambda b: b.update(payload_sha256="0" * 64),
    "other fingerprint": lambda b: b.update(fingerprint="0" * 64),
    "hash of text": lambda b: b.update(content_sha256="../../etc/passwd"),
    "version of text": lambda b: b.update(format_version="1"),
    "a newer version": lambda b: b.update(format_version=2),
    "block of 1 GiB": lambda b: b.update(user_block_bytes=1 << 30),
}  # fmt: skip

VALUES: dict[str, dict[str, np.ndarray]] = {
    "a target too large": {T: np.full(8, 1 << 40, "<i8")},
    "a target too small": {T: np.full(8, -2, "<i8")},
    "a class twice": {"classes": np.array([b"a", b"a"])},
    "an unknown task": {"task": np.array(b"regression")},
    "identity of no JSON": {"identity": np.array(b"\xff\xfe{")},
    "identity of a list": {"identity": np.array(b"[1]")},
    "identity without bottom": {"identity": DEEP},
    "provenance without bottom": {"provenance": DEEP},
    "a number without end": {"provenance": np.array(b'{"a":' + b"9" * 100_000 + b"}")},
    "failures of several lengths": {"failures/paths": np.array([b"a", b"b"])},
    "numbers for classes": {"classes": np.arange(2, dtype="<i8")},
    "no width": {F: np.empty((8, 0), "<f4")},
    "another width": {F: np.ones((8, 5), "<f4")},
    "rows of rows of rows": {F: np.ones((8, 4), "<i8")},
    "hashes of text": {"splits/train/image_sha256": np.zeros((8, 32), "|S1")},
    "checksums of text": {"splits/train/row_crc32": np.zeros(8, "|S8")},
}  # fmt: skip

SEEN_BY_VERIFY: dict[str, dict[str, np.ndarray]] = {
    "NaN": {F: np.full((8, 4), np.nan, "<f4")},
    "infinity": {F: np.full((8, 4), np.inf, "<f4")},
    "a path twice": {P: np.array([b"same"] * 8)},
    "paths in disorder": {P: np.array([b"%d" % i for i in range(8, 0, -1)])},
    "checksums of other rows": {"splits/train/row_crc32": np.zeros(8, "<i8")},
}  # fmt: skip


# --- the child: open, verify, train


def judge_all(folder: Path) -> None:
    """Print what became of every file of a folder, as JSON."""
    import resource  # Linux

    train(folder / "honest", folder / "runs" / "honest", epochs=1, hidden=(), device="cpu")
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + GIBIBYTE, in_use + GIBIBYTE))
    opened: set[str] = set()
    sys.addaudithook(lambda event, found: opened.add(str(found[0])) if event == "open" else None)
    results = {}
    for path in sorted((folder / "hostile").iterdir()):
        signal.setitimer(signal.ITIMER_VIRTUAL, 10)  # of computing; the signal ends the process
        opened.clear()
        results[path.name] = {
            "open": _refusal(lambda path=path: open_cache(path)),
            "train": _refusal(
                lambda path=path: train(
                    path, folder / "runs" / path.name, epochs=1, hidden=(), device="cpu"
                )
            ),
            "others": sorted(
                p for p in opened if p.startswith(str(folder)) and "/runs/" not in f"{p}/"
            ),
            "verify": _refusal(lambda path=path: verify(path)),
        }
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    sys.stdout.write(json.dumps(results))


def _refusal(use: Callable[[], object]) -> str | None:
    try:
        use()
    except FeatcacheError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of hostile files, a secret and a pipe beside them."""
    folder = tmp_path_factory.mktemp("strangers")
    arrays, caches = honest_arrays(folder), folder / "hostile"
    caches.mkdir()
    (folder / "made").mkdir()
    for place in (caches, folder / "made"):
        os.mkfifo(place / "pipe")
        (place / "secret").write_bytes(SECRET * 160)
    for fill in FILLS:
        name = fill.__name__
        (caches / f"hdf5 {name}").write_bytes(make_hdf5(folder / "made" / "x.h5", fill))
        head = make_hdf5(folder / "made" / "x.h5", fill, user_block=4096)
        write_plausible(caches / f"wrapped {name}", head, arrays)
    (caches / "pipe").unlink()
    (caches / "secret").unlink()
    good = (folder / "honest").read_bytes()
    head = make_hdf5(folder / "made" / "x.h5", lambda file, _: None, user_block=4096)
    for name, lie in LIES.items():
        write_plausible(caches / f"lie {name}", head, arrays, lie)
    for kind, changes in (("value", VALUES), ("seen", SEEN_BY_VERIFY)):
        for name, change in changes.items():
            write_plausible(caches / f"{kind} {name}", head, arrays | change)
    others = {
        "empty": b"", "text": b"not hdf5\n", "brace": b"{", "deep": b"{" * 100_000,
        "magic": b"\x89HDF\r\n\x1a\n", "half": good[: len(good) // 2], "block": good[:4096],
        "json": b'{"format":"featcache"}'.ljust(5000, b"\0"), "zeros": b"\0" * 9000,
        "array": b'["featcache"]'.ljust(5000, b"\0"),
    }  # fmt: skip
    for name, data in others.items():
        (caches / f"other {name}").write_bytes(data)
    for sample in sorted(SAMPLES.glob("*.h5")):
        data = sample.read_bytes()
        (caches / f"hdf5 {sample.name}").write_bytes(data)
        write_plausible(caches / f"wrapped {sample.name}", data, arrays)
    return folder


def test_every_hostile_cache_is_refused(hostile: Path, tally: Callable[..., None]) -> None:
    if not SAMPLES.is_dir():
        tally("hostile caches", "skipped: the samples that hang h5py are not here", 4)
    code = "import sys, pathlib, test_hostile_caches as t; t.judge_all(pathlib.Path(sys.argv[1]))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", code, str(hostile)], capture_output=True, timeout=500, check=False,
        env={**os.environ, "PYTHONPATH": path}, cwd=hostile,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout)
    assert len(results) == len(list((hostile / "hostile").iterdir())) >= 100
    for name, result in results.items():
        file = str(hostile / "hostile" / name)
        for verb in ("open", "train", "verify"):
            said = result[verb]
            if said is None:
                # The table is all that was read, and what it says is in the file.
                assert verb != "verify", name
                assert name.startswith(("wrapped", "seen")), (verb, name)
                assert (verb, name) not in {("train", "seen NaN"), ("train", "seen infinity")}
            else:
                assert "expected" in said, (verb, name, said)
                assert file in said, (verb, name, said)
                assert "\n" not in said
                assert "no answer of libhdf5" not in said, (name, "it opened the pipe")
        assert result["others"] in ([], [file]), name
        tally("hostile caches", "refused" if result["open"] else "read as its table says, not true")
    assert SECRET not in done.stdout + done.stderr
    written = [p.read_bytes() for p in (hostile / "runs").rglob("*") if p.is_file()]
    assert not any(SECRET in data for data in written)
    assert sorted(p.name for p in hostile.iterdir()) == ["honest", "hostile", "made", "runs"]


def test_names_in_a_cache_are_never_opened_or_run(
    tmp_path: Path, tally: Callable[..., None]
) -> None:
    """A cache may have any class, path and group: nothing is opened, written or run by them."""
    names = ["../../etc/passwd", "/etc/passwd", "a\nb", "<script>", "=1+1", "\x1b[31m", "\udcff"]
    cache = write_cache(
        tmp_path / "c.h5", {s: np.eye(7, dtype="f4") for s in ("train", "valid")}, range(7), names,
        classes=[*names[:-1], "covid"], groups={"train": names},
    )  # fmt: skip
    said: list[str] = []
    verify(cache.path, say=said.append)
    train(cache.path, tmp_path / "run", epochs=1, hidden=(), say=said.append)
    with pytest.warns(FeatcacheWarning, match="trained on 7 of the 7 rows of valid"):
        featcache.evaluate(tmp_path / "run", split="valid", csv=tmp_path / "e.csv", say=said.append)
    with pytest.warns(FeatcacheWarning, match="trained on 14 of the 14 rows of c.h5"):
        featcache.predict(tmp_path / "run", cache=cache.path)
    assert all(line.isprintable() for line in said)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.h5", "e.csv", "run"]
    tally("names in caches", "only names", len(names))
