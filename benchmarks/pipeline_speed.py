"""The part ``pipeline`` of ``extract.py``: a folder of files becomes a cache.

featcache does the whole folder. The stock way and the published extractor are slow: they do the
first ``--stock-images``. Their rate is that of everything after the first batch, so starting
workers is not held against them; their whole job is the process' wall time plus the images left
over at that rate, so a start is paid once, as it would be.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode_speed import RULES
from forward_speed import FEATCACHE, WayProcess, make_job, memory_roof
from make_images import write_images
from measuring import HERE, as_table, measure_in_turn, median, number, run_cold, seconds_of
from peers import build

from featcache.backbones.engine import eager_features
from featcache.cache.reading import open_cache
from featcache.pixels import acceleration
from featcache.pixels.images import decode
from featcache.precision import relative_errors
from featcache.runtime import available_cores

BACKBONE, WEIGHTS = "efficientnet-b0", "b0_random.pth"
STOCK, PEER = "stock: DataLoader, eager fp32, np.save", "thingsvision"
NUM_COMPARED = 16  # images whose features are compared with the eager network
NUM_DECODED = 200  # files for the decode bound


def measure_pipeline(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield whole jobs and bounds, per kind of file and precision, one more every time."""
    jobs = []
    with tempfile.TemporaryDirectory(prefix="featcache-benchmark-") as name:
        folder = Path(name)
        state = build(BACKBONE).network.state_dict()  # its classifier is cut off: any will do
        state |= {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}
        torch.save(state, folder / WEIGHTS)
        for kind, num_images in (("jpeg-500x375", args.jpegs), ("png-grey-1024", args.pngs)):
            if not num_images:
                continue
            data = folder / kind
            files = write_images(data, kind, num_images)
            for precision in (p for p in args.precision if p != "default"):
                job = Folder(
                    kind, sorted(files), scratch=folder, device=device, precision=precision,
                    args=args,
                )  # fmt: skip
                jobs.append(job.measure())
                yield {"jobs": jobs}
            shutil.rmtree(data)


class Folder:
    """One folder of files, one precision: the ways, the bounds, the parity."""

    def __init__(
        self, kind: str, files: list[Path], *, scratch: Path, device: torch.device,
        precision: str, args: argparse.Namespace,
    ) -> None:  # fmt: skip
        self.kind, self.files, self.scratch = kind, files, scratch
        self.data, self.weights = scratch / kind, scratch / WEIGHTS
        self.device, self.precision, self.args = device, precision, args
        self.facts: dict[str, list[dict[str, Any]]] = {}
        self.num_stock = min(args.stock_images, len(files))

    def measure(self) -> dict[str, Any]:
        """Run all ways and bounds in turn, and return what came out."""
        forward = WayProcess()
        forward.ask(
            "prepare", FEATCACHE, BACKBONE, make_job(self.args, self.device, self.precision),
            self.args.compile_mode, 0.0,
        )  # fmt: skip
        contents = [path.read_bytes() for path in self.files[:NUM_DECODED]]
        acceleration.start()  # the bound is that of the fast decoder
        timers: dict[str, Callable[[], float]] = {
            FEATCACHE: self._run_featcache,
            STOCK: self._run_stock,
            "decode alone, 1 thread": lambda: _decode_rate(contents, 1),
            "decode alone, all cores": lambda: _decode_rate(contents, max(2, available_cores())),
            "forward alone": lambda: forward.ask("measure", self.args.seconds),
        }
        missing = self._find_peer()
        if missing is None:
            timers[PEER] = self._run_peer
        samples = measure_in_turn(timers, self.args.rounds)
        forward.close()
        rates = {name: median(v) for name, v in samples.items() if name not in self.facts}
        decoding = max(v for k, v in rates.items() if k.startswith("decode"))
        bound = combine(decoding, rates["forward alone"], self.device)
        rows = [self._row(name, samples[name], bound) for name in (FEATCACHE, STOCK)]
        rows.append(
            {"way": PEER, "reason": missing} if missing else self._row(PEER, samples[PEER], bound)
        )
        return {
            "kind": self.kind, "num_images": len(self.files), "precision": self.precision,
            "alone": rates, "alone_samples": {name: samples[name] for name in rates},
            "bound": bound, "memory_roof": memory_roof(
                self.device, self.precision, self.args.bandwidth
            ), "rows": rows,
        }  # fmt: skip

    def _row(self, way: str, seconds: list[float], bound: float) -> dict[str, Any]:
        facts = self.facts[way]
        rate = median(fact["images_per_second"] for fact in facts)
        return {
            "way": way,
            "num_images": facts[0]["num_images"],
            "whole_seconds": median(seconds),
            "cold_images_per_second": len(self.files) / median(seconds),
            "images_per_second": rate,
            "share_of_bound": rate / bound,
            "parity": max(fact["parity"] for fact in facts),
            "version": facts[0].get("version"),
            "samples_seconds": seconds,
            "samples_images_per_second": [fact["images_per_second"] for fact in facts],
        }

    def _run_featcache(self) -> float:
        cache = self.scratch / "features.h5"
        cache.unlink(missing_ok=True)
        done = run_cold(
            "-m", "featcache", "extract", self.data, cache, "--backbone", BACKBONE, "--weights",
            self.weights, "--precision", self.precision, "--device", str(self.device), "--json",
            "--quiet",
        )  # fmt: skip
        found = json.loads(done["output"])
        rows = open_cache(cache, verify=False).split("all").features
        self._note(FEATCACHE, found, np.asarray(rows[:NUM_COMPARED]))
        return done["seconds"]

    def _run_stock(self) -> float:
        out = self.scratch / "stock.npy"
        done = run_cold(
            HERE / "ways" / "stock_extract.py", "--data", self.data, "--weights", self.weights,
            "--num", str(self.num_stock), "--device", str(self.device), "--out", out,
        )  # fmt: skip
        return self._whole(STOCK, done, np.load(out)[:NUM_COMPARED])

    def _run_peer(self) -> float:
        some = self.scratch / "some"
        shutil.rmtree(some, ignore_errors=True)
        some.mkdir()
        for number_, path in enumerate(self.files[: self.num_stock]):
            os.link(path, some / f"{number_:06d}{path.suffix}")
        done = run_cold(
            HERE / "ways" / "thingsvision_extract.py", "--data", some, "--device",
            str(self.device), "--out", self.scratch / "peer" / "features.npy",
            python=_python_of(self.args.peer_venv),
        )  # fmt: skip
        return self._whole(PEER, done, None)

    def _whole(self, way: str, done: dict[str, Any], rows: np.ndarray | None) -> float:
        """Note the facts of a way that did a part; return the seconds of the whole folder."""
        found = json.loads(done["output"].splitlines()[-1])
        found["images_per_second"] = found["num_after_first"] / found["rest_seconds"]
        self._note(way, found, rows)
        left = len(self.files) - found["num_images"]
        return done["seconds"] + left / found["images_per_second"]

    def _note(self, way: str, found: dict[str, Any], rows: np.ndarray | None) -> None:
        if rows is not None:
            truth = self._truth[: len(rows)]
            found["parity"] = max(relative_errors(rows.astype(np.float32), truth))
        kept = ("images_per_second", "num_images", "parity", "version")
        self.facts.setdefault(way, []).append({k: found[k] for k in kept if k in found})

    @cached_property
    def _truth(self) -> np.ndarray:
        """Pillow's pixels (``decode`` gives those) through the eager network."""
        some = [path.read_bytes() for path in self.files[:NUM_COMPARED]]
        pixels = np.stack([decode(data, RULES).pixels for data in some])
        return eager_features(build(BACKBONE), pixels)

    def _find_peer(self) -> str | None:
        """Return why the published extractor cannot run, None if it can."""
        if self.args.peer_venv is None:
            return "not asked for (--peer-venv)"
        try:
            (self.scratch / "peer").mkdir(exist_ok=True)
            run_cold("-c", "import thingsvision", python=_python_of(self.args.peer_venv))
        except (SystemExit, OSError):
            return "not installed"
        return None


def combine(decoding: float, forward: float, device: torch.device) -> float:
    """Return the images a second that the two allow together.

    On a CPU they share the cores, so their times add up; on a GPU the slower one decides.
    """
    if device.type == "cuda":
        return min(decoding, forward)
    return 1 / (1 / decoding + 1 / forward)


def _decode_rate(contents: list[bytes], num_threads: int) -> float:
    with ThreadPoolExecutor(num_threads) as pool:
        seconds = seconds_of(lambda: list(pool.map(lambda d: decode(d, RULES), contents)))
    return len(contents) / seconds


def _python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def describe_pipeline(part: dict[str, Any]) -> list[str]:
    """Return the Markdown lines."""
    lines = []
    for job in part["jobs"]:
        stock = next(row for row in job["rows"] if row["way"] == STOCK)
        rows = []
        for row in job["rows"]:
            if "reason" in row:
                rows.append((row["way"], row["reason"], *[""] * 6))
                continue
            rows.append((
                row["way"], row["num_images"], number(row["whole_seconds"]),
                number(row["cold_images_per_second"]), number(row["images_per_second"]),
                number(row["images_per_second"] / stock["images_per_second"]),
                f"{100 * row['share_of_bound']:.0f} %", f"{row['parity']:.1e}",
            ))  # fmt: skip
        header = ("way", "images run", "whole job, s", "cold images/s", "images/s, running",
                  "times stock", "of the bound", "parity")  # fmt: skip
        alone = ", ".join(f"{name} {number(rate)}" for name, rate in job["alone"].items())
        lines += [
            f"### Folder to cache: {job['num_images']} x {job['kind']}, {job['precision']}", "",
            *as_table(header, rows), "",
            f"Images/s: {alone}; bound of the whole {number(job['bound'])}.", "",
        ]  # fmt: skip
        if job["memory_roof"]:
            share = 100 * job["rows"][0]["images_per_second"] / job["memory_roof"]
            lines += [
                f"Memory roof {number(job['memory_roof'])} images/s: {share:.1f} % of it.",
                "",
            ]
    return lines
