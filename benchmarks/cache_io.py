"""How fast is a cache read and written, against NumPy's own file and plain h5py?

    python benchmarks/cache_io.py                         (about 10 minutes; 3 GB of disk)
    python benchmarks/cache_io.py --rows 10000 --rounds 2 --out try                    (a try)

The same features, (100000, 1280) float32 unless told otherwise, lie in one cache, one .npy and one
HDF5 file as h5py makes it when told nothing. Read whole: into memory, without and with the cache's
hash. Read in part: 32 random rows, sorted, other ones every time, through open handles. Write: from
memory, synced to the disk, as ``write_cache`` does it and so do the others here; the cache is
hashed and whole or absent, theirs are not.

Warm: all files are in the page cache. Cold: their pages are dropped before every reading
(``posix_fadvise``; before that the files are synced). Whether that worked is measured: the report
gives the share of pages that were in memory after dropping, by ``mincore``.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from measuring import (
    HERE,
    as_table,
    current_load,
    describe_machine,
    frame_report,
    measure_in_turn,
    median,
    number,
    seconds_of,
    write_report,
)

from featcache.cache.reading import open_cache
from featcache.cache.writing import write_cache

NUM_RANDOM = 32
BLOCK = 512  # rows of an append, a batch of an extractor
BASES = {"whole": "numpy.load", "rows": "numpy.load, mapped", "write": "numpy.save"}


class Files:
    """The same features in three files."""

    def __init__(self, folder: Path, num_rows: int, num_features: int) -> None:
        rng = np.random.default_rng(0)
        self.features = rng.standard_normal((num_rows, num_features), dtype=np.float32)
        self.targets = rng.integers(0, 2, num_rows)
        self.paths = [f"{i:08d}.png" for i in range(num_rows)]
        self.cache, self.npy, self.hdf5 = (folder / f"features.{e}" for e in ("h5", "npy", "hdf5"))
        self.write_cache()
        self.write_npy()
        self.write_hdf5()

    @property
    def num_bytes(self) -> int:
        """Bytes of the features alone."""
        return self.features.nbytes

    def write_cache(self) -> None:
        """Write the cache; that includes its hash and its sync."""
        write_cache(self.cache, self.features, self.targets, self.paths, classes=["a", "b"])

    def write_npy(self) -> None:
        """Write the .npy."""
        with self.npy.open("wb") as file:
            np.save(file, self.features)
            file.flush()
            os.fsync(file.fileno())

    def write_hdf5(self) -> None:
        """Append batch by batch to a data set whose chunks h5py guesses."""
        with h5py.File(self.hdf5, "w") as file:
            data = file.create_dataset(
                "features", (0, self.features.shape[1]), "f4", maxshape=(None, None), chunks=True
            )
            for start in range(0, len(self.features), BLOCK):
                block = self.features[start : start + BLOCK]
                data.resize(start + len(block), axis=0)
                data[start : start + len(block)] = block
        with self.hdf5.open("rb") as file:
            os.fsync(file.fileno())

    def ways_to_read(self) -> dict[str, Callable[[], np.ndarray]]:
        """Return every way to read all features into memory."""
        return {
            "featcache, without the hash": lambda: (
                open_cache(self.cache, verify=False).split("all").read_features()
            ),
            "featcache, hash checked": lambda: open_cache(self.cache).split("all").read_features(),
            "numpy.load": lambda: np.load(self.npy),
            "h5py [:] of the cache": lambda: _h5py_read(self.cache, "splits/all/features"),
            "h5py [:], chunks guessed": lambda: _h5py_read(self.hdf5, "features"),
        }

    def ways_to_pick(self) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        """Return every way to read some rows through an open handle."""
        split = open_cache(self.cache, verify=False).split("all")
        mapped = np.load(self.npy, mmap_mode="r")
        plain, guessed = h5py.File(self.cache), h5py.File(self.hdf5)
        return {
            "featcache, split.features[rows]": lambda rows: split.features[rows],
            "featcache, as a torch Dataset": split.__getitems__,
            "numpy.load, mapped": lambda rows: mapped[rows],
            "h5py of the cache": lambda rows: plain["splits/all/features"][rows],
            "h5py, chunks guessed": lambda rows: guessed["features"][rows],
        }

    def drop(self) -> None:
        """Drop the files' pages from the system's page cache."""
        for path in (self.cache, self.npy, self.hdf5):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _h5py_read(path: Path, name: str) -> np.ndarray:
    with h5py.File(path) as file:
        return file[name][:]


def share_in_memory(path: Path) -> float | None:
    """Return the share of a file's pages in the page cache, None where it cannot be told."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as view:
            start = np.frombuffer(view, np.uint8).ctypes.data
            pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
            try:
                failed = ctypes.CDLL(None).mincore(
                    ctypes.c_void_p(start), ctypes.c_size_t(size), pages
                )
            except (AttributeError, OSError):
                return None
            return None if failed else float(np.mean(np.frombuffer(pages, np.uint8) & 1))


def check(files: Files) -> None:
    """Stop unless all ways give the same values."""
    rows = np.sort(np.random.default_rng(1).choice(len(files.features), NUM_RANDOM, replace=False))
    for way, read in files.ways_to_read().items():
        if not np.array_equal(read(), files.features):
            raise SystemExit(f"{way} gives other values")
    for way, pick in files.ways_to_pick().items():
        found = pick(rows.tolist())
        if isinstance(found, list):
            found = torch.stack([row for row, _ in found]).numpy()
        if not np.array_equal(found, files.features[rows]):
            raise SystemExit(f"{way} gives other rows")


def measure(files: Files, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row per way and state."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    reading = files.ways_to_read()
    warm = {way: lambda r=read: seconds_of(r) for way, read in reading.items()}
    found["whole", "warm"] = measure_in_turn(warm, args.rounds)
    rng = np.random.default_rng(2)
    picks = {
        way: _picker(pick, files, rng, args.picks) for way, pick in files.ways_to_pick().items()
    }
    found["rows", "warm"] = measure_in_turn(picks, args.rounds)
    if args.cold:
        cold = {way: _cold(files, read) for way, read in reading.items()}
        found["whole", "cold"] = measure_in_turn(cold, args.rounds)
        # One pick only: the next one would find the neighbours read ahead.
        picks = {way: _cold_picker(way, files, rng) for way in files.ways_to_pick()}
        found["rows", "cold"] = measure_in_turn(picks, args.rounds)
    writing = {
        "featcache write_cache": lambda: seconds_of(files.write_cache),
        "numpy.save": lambda: seconds_of(files.write_npy),
        "h5py, append by 512": lambda: seconds_of(files.write_hdf5),
        "sha256 alone": lambda: seconds_of(lambda: hashlib.sha256(files.features.data)),
    }
    found["write", "synced"] = measure_in_turn(writing, args.rounds)
    rows = []
    for (what, state), samples in found.items():
        base = median(samples[BASES[what]])
        size = files.num_bytes if what != "rows" else NUM_RANDOM * files.features[0].nbytes
        for way, values in samples.items():
            rows.append(
                {
                    "what": what, "state": state, "way": way, "seconds": median(values),
                    "gigabytes_per_second": size / median(values) / 1e9,
                    "speed_to_base": base / median(values), "base": BASES[what],
                    "samples_seconds": values,
                }
            )  # fmt: skip
    return rows


def _rows_of(files: Files, rng: np.random.Generator) -> list[int]:
    return np.sort(rng.choice(len(files.features), NUM_RANDOM, replace=False)).tolist()


def _picker(
    pick: Callable[..., object], files: Files, rng: np.random.Generator, num_picks: int
) -> Callable[[], float]:
    def work() -> float:
        wanted = [_rows_of(files, rng) for _ in range(num_picks)]
        start = time.perf_counter()
        for rows in wanted:
            pick(rows)
        return (time.perf_counter() - start) / num_picks

    return work


def _cold(files: Files, read: Callable[[], object]) -> Callable[[], float]:
    def work() -> float:
        files.drop()
        return seconds_of(read)

    return work


def _cold_picker(way: str, files: Files, rng: np.random.Generator) -> Callable[[], float]:
    def work() -> float:
        files.drop()
        pick = files.ways_to_pick()[way]  # open handles, nothing read through them yet
        rows = _rows_of(files, rng)
        return seconds_of(lambda: pick(rows))

    return work


def describe(report: dict[str, Any]) -> str:
    """Return the Markdown table."""
    names = {"whole": "read whole", "rows": f"{NUM_RANDOM} random rows", "write": "write"}
    rows = [
        (
            f"{names[row['what']]}, {row['state']}", row["way"], number(1000 * row["seconds"]),
            number(row["gigabytes_per_second"]), number(row["speed_to_base"]) + " x",
        )
        for row in report["rows"]
    ]  # fmt: skip
    header = ("what", "way", "ms", "GB/s", "speed, of NumPy's")
    lines = [
        f"### Cache of {tuple(report['shape'])} float32", "", describe_machine(report), "",
        *as_table(header, rows, 2), "",
        "NumPy's: " + ", ".join(f"{names[k]}: {v}" for k, v in BASES.items()) + ".",
    ]  # fmt: skip
    if report["share_in_memory_after_dropping"] is not None:
        share = 100 * report["share_in_memory_after_dropping"]
        lines.append(f"Cold: posix_fadvise left {share:.1f} % of the pages in memory.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure; write JSON and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--features", type=int, default=1280)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--picks", type=int, default=200, help="of 32 rows, in one measurement")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: temporary")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    args.cold = hasattr(os, "posix_fadvise")
    load = current_load()
    with tempfile.TemporaryDirectory(prefix="featcache-benchmark-", dir=args.folder) as folder:
        files = Files(Path(folder), args.rows, args.features)
        check(files)
        rows = measure(files, args)
        share = None
        if args.cold:
            files.drop()
            share = share_in_memory(files.cache)
    report = frame_report(
        "cache_io", torch.device("cpu"), load, args.rounds, shape=[args.rows, args.features],
        share_in_memory_after_dropping=share, rows=rows,
    )  # fmt: skip
    write_report(args.out, "cache_io", report, describe(report))


if __name__ == "__main__":
    main()
