"""How far does an extraction scale: processes here, the coordinator alone, a million images?

    python benchmarks/scale.py [--images 400 4000] [--million 1000000] [--rounds 3]

- ``processes``: one process as ever, against ``--processes 2`` and ``4``, on so many drawn photos
  and on more: what the further ones take is free of every process's start.
- ``sources``: zip, tar, Parquet and, where moto is installed, a store over HTTP, against a folder.
- ``coordinator``: it alone, with workers that answer at once and compute nothing: how many rows a
  second it lists and settles, and so how many workers it can feed.
- ``million``: small images in tars, a network of no cost: seconds and peak memory, scan to cache.
- Arithmetic from those rates: 1 to 100 workers, 10 million images, and what is the narrowest.

A short try: ``benchmarks/scale.py --images 40 80 --million 5000 --rounds 1 --out /tmp/scale``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlunsplit

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from make_images import write_images
from measuring import (
    HERE,
    as_table,
    call_apart,
    current_load,
    describe_machine,
    frame_report,
    measure_in_turn,
    median,
    number,
    peak_memory,
    run_cold,
    write_report,
)

KIND = "jpeg-500x375"
SIDE, PER_TAR = 16, 10_000
TINY = ("--backbone", "python:tiny_backbone:build", "--device", "cpu")
WAYS: dict[str, int | None] = {"one process": None, "--processes 2": 2, "--processes 4": 4}
NUM_WORKERS, NUM_IMAGES = (1, 2, 4, 8, 16, 32, 64, 100), 10_000_000
GPU_RATE = 2000.0  # images a second: an assumption, as no GPU was measured


def extract_cold(data: Path | str, options: Sequence[str], processes: int | None) -> dict[str, Any]:
    """Extract in a new process; return its seconds, rate, peak and the hash of the content."""
    with tempfile.TemporaryDirectory(prefix="featcache-scale-") as name:
        peak, several = Path(name, "peak"), []
        if processes is not None:
            several = ["--processes", str(processes)]
        done = run_cold(
            HERE / "ways" / "peak_memory.py", peak, "extract", data, Path(name, "c.h5"), *options,
            *several, "--json", "--quiet",
        )  # fmt: skip
        facts = json.loads(done["output"])
        return {
            "seconds": done["seconds"], "images_per_second": facts["images_per_second"],
            "peak_bytes": int(peak.read_text()), "content_sha256": facts["content_sha256"],
            "num_images": facts["num_images"],
        }  # fmt: skip


def measure_processes(args: argparse.Namespace) -> dict[str, Any]:
    """Return the samples of one process and of several, by backbone and number of images."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="featcache-scale-") as name:
        for size in args.images:
            Path(name, str(size)).mkdir()
            write_images(Path(name, str(size)), KIND, size)
        for backbone in args.backbones:
            options = ["--backbone", backbone, "--weights", "random", "--device", "cpu"]
            ways = {
                f"{way}, {size} images": functools.partial(
                    extract_cold, Path(name, str(size)), options, processes
                )
                for way, processes in WAYS.items()
                for size in args.images
            }
            samples = measure_in_turn(ways, args.rounds)
            for size in args.images:
                contents = {
                    one["content_sha256"] for rounds in samples.values() for one in rounds
                    if one["num_images"] == size
                }  # fmt: skip
                if len(contents) > 1:
                    raise SystemExit(f"{backbone}: caches of different content: {contents}")
            found[backbone] = {
                way: {
                    str(size): samples[f"{way}, {size} images"] for size in args.images
                }
                for way in WAYS
            }  # fmt: skip
    return {"kind": KIND, "num_images": args.images, "samples": found}


def further_rate(by_number: dict[str, Any]) -> float:
    """Return images a second of those that the larger size has more than the smaller one."""
    few, many = sorted(by_number, key=int)
    seconds = [median(one["seconds"] for one in by_number[size]) for size in (few, many)]
    return (int(many) - int(few)) / (seconds[1] - seconds[0])


# ------------------------------------------------------------------------------ kinds of sources


def pack(folder: Path, out: Path) -> dict[str, str]:
    """Write the images of class folders as zip, tar and Parquet; return kind -> data."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with zipfile.ZipFile(out / "images.zip", "w", zipfile.ZIP_STORED) as packed:
        for file in files:
            packed.write(file, file.relative_to(folder))
    with tarfile.open(out / "images.tar", "w") as tar:
        for file in files:
            tar.add(file, file.relative_to(folder).as_posix())
    images = [
        {"bytes": file.read_bytes(), "path": file.relative_to(folder).as_posix()} for file in files
    ]
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {
        "image": pyarrow.array(images, image), "label": [file.parent.name for file in files]
    }  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table(columns), out / "images.parquet")
    kinds = {kind: str(out / f"images.{kind}") for kind in ("zip", "tar", "parquet")}
    return {"folder": str(folder), **kinds}


@contextlib.contextmanager
def s3_store(folder: Path, tar: Path) -> Iterator[dict[str, str]]:
    """Yield kind -> URL of the images in moto's store, over HTTP on this machine."""
    try:
        import boto3
        import s3fs  # noqa: F401  (fsspec finds it)
        from moto.server import ThreadedMotoServer
    except ImportError:
        yield {}
        return
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": urlunsplit(("http", f"{host}:{port}", "", "", "")),
        "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    client = boto3.client("s3")
    client.create_bucket(Bucket="images")
    for file in (path for path in folder.rglob("*") if path.is_file()):
        key = f"folder/{file.relative_to(folder).as_posix()}"
        client.put_object(Bucket="images", Key=key, Body=file.read_bytes())
    client.put_object(Bucket="images", Key="tar/images.tar", Body=tar.read_bytes())
    try:
        yield {
            "folder by s3://": "s3://images/folder",
            "tar by s3://": "s3://images/tar/images.tar",
        }
    finally:
        server.stop()


def measure_sources(num_images: int, rounds: int, *, by_url: bool) -> dict[str, Any]:
    """Return the samples of each kind of source, with a network of no cost: reading shows most.

    Args:
        num_images: How many images.
        rounds: How often.
        by_url: A folder against a store, in place of against files that are packed. moto reads all
            of an object for each stretch of it, so of a large tar that is all that is measured.
    """
    with tempfile.TemporaryDirectory(prefix="featcache-scale-") as name:
        folder, out = Path(name, "images"), Path(name, "packed")
        folder.mkdir()
        out.mkdir()
        write_images(folder, KIND, num_images)
        kinds = pack(folder, out)
        with contextlib.ExitStack() as stack:
            if by_url:
                urls = stack.enter_context(s3_store(folder, out / "images.tar"))
                kinds = {"folder": kinds["folder"], **urls}
            ways = {
                kind: functools.partial(extract_cold, data, TINY, None)
                for kind, data in kinds.items()
            }
            samples = measure_in_turn(ways, rounds)
    if len({one["content_sha256"] for rounds in samples.values() for one in rounds}) > 1:
        raise SystemExit("caches of different content")
    return {"kind": KIND, "num_images": num_images, "samples": samples}


# --------------------------------------------------------------------------- the coordinator alone


def measure_coordinator(num_images: int, num_workers: int, folder: str) -> dict[str, Any]:
    """Let a coordinator settle the shards of workers that compute nothing.

    The rows are those of EfficientNet-B0, 1,280 float32: a shard has 3,276 at most. None is
    written: the coordinator reads none. A worker goes on when its shard is listed, as real ones do.
    """
    import featcache
    from featcache.data.dataset import ImageDataset, Sample, Samples
    from featcache.extraction.engine_choice import choose_engine
    from featcache.extraction.manifest import Receipt, read_manifest
    from featcache.extraction.options import ExtractionOptions
    from featcache.extraction.plan import Job, find_known
    from featcache.extraction.recipe import make_recipe
    from featcache.extraction.work import lanes_of, vectors_per_shard
    from featcache.extraction.workers.coordinator import Coordinator
    from featcache.extraction.workers.worker import Done, Ready, ShardMade

    class Idle:
        """A worker that answers at once."""

        def __init__(self, tell: Callable[[Any], object]) -> None:
            self._rows, self._tell = rows, tell
            self._left: Iterator[Any] = iter(())
            tell(Ready("nowhere", "cpu", 0, self._rows))

        def give(self, task: Any) -> None:
            self._left = self._messages(task)
            self.listed()

        def listed(self) -> None:
            for message in self._left:
                self._tell(message)
                if isinstance(message, ShardMade):
                    return

        def _messages(self, task: Any) -> Iterator[Any]:
            for begin in range(0, len(task.positions), self._rows):
                part = task.positions[begin : begin + self._rows]
                rows = tuple((p, hashlib.sha256(b"%d" % p).digest(), False, 1) for p in part)
                name = f"shard.{task.first_shards[0] + begin // self._rows:05d}"
                receipt = Receipt(name, len(rows), len(rows), "0" * 64)
                yield ShardMade(task.number, 0, receipt, rows)
            yield Done(task.number, (), len(task.positions), 1e-3, {})

        def stop(self) -> None:
            pass

        def kill(self) -> None:
            pass

    begin = time.perf_counter()
    samples = Samples(
        Sample(f"first/{i:08}.jpg", 0, "all", None, 100_000, i) for i in range(num_images)
    )
    dataset = ImageDataset(Path(folder, "images"), "classes", ("first",), samples)
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    wide = torch.nn.Sequential(network, torch.nn.Linear(3, 1280))
    backbone = featcache.wrap_backbone("wide", wide, image_size=32, mean=(0.5,) * 3, std=(0.5,) * 3)
    options = ExtractionOptions(say=lambda _: None, device="cpu", engine="eager", batch_size=16)
    recipe = make_recipe(backbone, dataset, bit_depth=16)
    job = Job(Path(folder, "c.h5"), dataset, recipe, options)
    start = time.perf_counter()
    with job.locked():
        positions = find_known([job], torch.device("cpu"))
        choose_engine(job, torch.device("cpu"))
        (rows,) = vectors_per_shard(lanes_of([job]))
        work = time.perf_counter()
        Coordinator([job], positions, lambda _, __, tell: Idle(tell), num_workers).run()
        seconds = time.perf_counter() - work
        manifest = job.partial.folder / "manifest.json"
        num_shards, size = len(read_manifest(manifest).shards), manifest.stat().st_size
    return {
        "num_images": num_images, "num_workers": num_workers, "num_shards": num_shards,
        "samples_seconds": start - begin, "plan_seconds": work - start, "seconds": seconds,
        "manifest_bytes": size, "peak_bytes": peak_memory(),
    }  # fmt: skip


# ------------------------------------------------------------------------------- a million images


def write_tars(folder: Path, num_images: int) -> None:
    """Write grey images of 16 x 16, each another one, in tars of class folders."""
    pixels = np.random.default_rng(0).integers(0, 256, SIDE * SIDE, np.uint8)
    for first in range(0, num_images, PER_TAR):
        with tarfile.open(folder / f"train-{first // PER_TAR:05d}.tar", "w") as tar:
            for i in range(first, min(first + PER_TAR, num_images)):
                pixels[:8] = np.frombuffer(i.to_bytes(8, "little"), np.uint8)
                data = b"P5 %d %d 255\n" % (SIDE, SIDE) + pixels.tobytes()
                info = tarfile.TarInfo(f"{'first' if i % 2 else 'second'}/{i:08}.pgm")
                info.size, info.mtime = len(data), 1_700_000_000
                tar.addfile(info, io.BytesIO(data))


def measure_million(args: argparse.Namespace) -> dict[str, Any]:
    """Return seconds and peak memory of an extraction of so many images in tars."""
    with tempfile.TemporaryDirectory(prefix="featcache-scale-", dir=args.scratch) as name:
        write_tars(Path(name), args.million)
        tars = sum(path.stat().st_size for path in Path(name).iterdir())
        rows = {"one process": extract_cold(Path(name), TINY, None)}
    return {"num_images": args.million, "tar_bytes": tars, "rows": rows}


# ------------------------------------------------------------------------------------- arithmetic


def work_out(report: dict[str, Any], rate: float) -> list[dict[str, Any]]:
    """Return what 10 million images would take with workers of so many images a second each.

    A worker dies once in an hour and loses half a shard. Scan and finish are the coordinator's, as
    long per image as they were for the million.
    """
    lists = report["coordinator"][-1]
    most = lists["num_images"] / lists["seconds"]
    alone = report["million"]["rows"]["one process"]
    around = alone["seconds"] - alone["num_images"] / alone["images_per_second"]
    around *= NUM_IMAGES / alone["num_images"]
    rows = []
    for workers in NUM_WORKERS:
        seconds = NUM_IMAGES / min(workers * rate, most)
        lost = workers * seconds / 3600 * 3276 / 2
        seconds += lost / (workers * rate)
        rows.append({
            "num_workers": workers, "work_seconds": seconds, "around_seconds": around,
            "again_images": lost,
            "narrowest": "the workers" if workers * rate < most else "the coordinator",
        })  # fmt: skip
    return rows


def describe(report: dict[str, Any]) -> str:
    """Return the tables."""
    lines = [describe_machine(report), ""]
    part = report["processes"]
    few, many = part["num_images"]
    cells = []
    for backbone, samples in part["samples"].items():
        base = further_rate(samples["one process"])
        for way, by_number in samples.items():
            rate = further_rate(by_number)
            whole = [
                number(median(one["seconds"] for one in by_number[str(n)])) for n in (few, many)
            ]
            cells.append([backbone, way, *whole, number(rate), number(rate / base)])
    head = ["backbone", "way", f"{few:,} images, seconds", f"{many:,} images, seconds",
            "further images/s", "times one process"]  # fmt: skip
    lines += [
        "### Processes on this machine",
        "",
        f"Images {KIND}, whole commands. Caches are equal.",
    ]
    lines += ["", *as_table(head, cells, num_text=2), ""]
    head = ["source", "images/s, running", "times the folder", "whole seconds"]
    lines += ["### Kinds of sources, a network of no cost", ""]
    for part in (report["sources"], report["stores"]):
        cells = []
        base = median(one["images_per_second"] for one in part["samples"]["folder"])
        for kind, rounds in part["samples"].items():
            rate = median(one["images_per_second"] for one in rounds)
            seconds = median(one["seconds"] for one in rounds)
            cells.append([kind, number(rate), number(rate / base), number(seconds)])
        lines += [f"{part['num_images']:,} images {part['kind']}.", "", *as_table(head, cells), ""]
    head = ["images", "workers", "shards", "rows/s", "shards/s", "manifest KB", "peak MiB"]
    cells = [
        [f"{r['num_images']:,}", r["num_workers"], f"{r['num_shards']:,}",
         number(r["num_images"] / r["seconds"]), number(r["num_shards"] / r["seconds"]),
         number(r["manifest_bytes"] / 1e3), number(r["peak_bytes"] / 2**20)]
        for r in report["coordinator"]
    ]  # fmt: skip
    lines += ["### The coordinator alone (1,280 features, 3,276 rows a shard)", ""]
    lines += [*as_table(head, cells, num_text=0), ""]
    part = report["million"]
    head = ["way", "seconds", "images/s, running", "peak MiB of the command's process"]
    cells = [
        [way, number(r["seconds"]), number(r["images_per_second"]), number(r["peak_bytes"] / 2**20)]
        for way, r in part["rows"].items()
    ]
    lines += [f"### {part['num_images']:,} images of 16 x 16 in tars, a network of no cost", ""]
    lines += [*as_table(head, cells), ""]
    for name, rows in report["arithmetic"].items():
        head = ["workers", "hours of work", "hours of scan and finish", "run again", "narrowest"]
        cells = [
            [r["num_workers"], number(r["work_seconds"] / 3600), number(r["around_seconds"] / 3600),
             f"{r['again_images']:,.0f}", r["narrowest"]]
            for r in rows
        ]  # fmt: skip
        lines += [f"### Arithmetic: {NUM_IMAGES:,} images, {name}", ""]
        lines += [*as_table(head, cells, num_text=0), ""]
    return "\n".join(lines)


def main() -> None:
    """Print tables and write ``scale.json`` and ``scale.md``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs=2, default=[400, 4000])
    parser.add_argument("--backbones", nargs="+", default=["efficientnet-b0", "efficientnet-lite0"])
    parser.add_argument("--million", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", help="a folder for 1.5 GB of tars")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(HERE / "ways"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    load = current_load()
    report = frame_report("scale", torch.device("cpu"), load, args.rounds)
    report["processes"] = measure_processes(args)
    few, many = args.images
    report["sources"] = measure_sources(many, args.rounds, by_url=False)
    report["stores"] = measure_sources(few, args.rounds, by_url=True)
    report["coordinator"] = []
    for num_images, num_workers in ((args.million, 8), (args.million, 100)):
        with tempfile.TemporaryDirectory(prefix="featcache-scale-") as name:
            report["coordinator"].append(
                call_apart(measure_coordinator, num_images, num_workers, name)
            )
    report["million"] = measure_million(args)
    samples = report["processes"]["samples"]
    first = next(iter(samples))
    here = further_rate(samples[first]["one process"])
    report["arithmetic"] = {
        f"{first} on machines like this one": work_out(report, here),
        f"GPUs of {GPU_RATE:,.0f} images/s (an assumption: none was measured)": work_out(
            report, GPU_RATE
        ),
    }  # fmt: skip
    write_report(args.out, "scale", report, describe(report))


if __name__ == "__main__":
    main()
