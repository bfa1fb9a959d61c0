"""How fast does ``featcache serve`` answer, beside the FastAPI loop that people write?

2,000 requests of one image from 16 connections, 5 % of them bad: garbage, a decompression bomb, an
empty file, a huge one without Content-Length, a slow client. Every way serves the same run and gets
the same requests in the same order; way by way, rounds in turn. A short try:
``python benchmarks/serving.py --requests 100 --data ../shared/data/xray-raw --out /tmp``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.client
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from make_images import write_images
from measuring import (
    HERE,
    as_table,
    current_load,
    describe_machine,
    frame_report,
    measure_in_turn,
    median,
    number,
    write_report,
)

import featcache

BOUNDARY = "boundary-of-the-benchmark"
BAD = ("garbage", "bomb", "empty", "huge", "slow")
HUGE_BYTES, BLOCK = 48 << 20, 1 << 16
SETTLE_SECONDS = 3
MEMORY_AT = (0, 0.5, 1)  # of the time
SLOW_PIECES, SLOW_SECONDS = 10, 0.2
WAYS = {
    "featcache serve": None,
    "FastAPI, eager torch, async": "async",
    "FastAPI, eager torch, threads": "threads",
}


class Request(NamedTuple):
    """What is sent.

    Attributes:
        kind: ``good``, or one of ``BAD``.
        image: Number of the image.
        body: A whole form, unless it is huge.
    """

    kind: str
    image: int
    body: bytes


class Outcome(NamedTuple):
    """What came back: status 0 where nothing did."""

    request: Request
    status: int
    seconds: float
    probs: list[float] | None


def form(data: bytes) -> bytes:
    """Return a file as the body of a form."""
    head = 'Content-Disposition: form-data; name="file"; filename="image"\r\n\r\n'
    return f"--{BOUNDARY}\r\n{head}".encode() + data + f"\r\n--{BOUNDARY}--\r\n".encode()


def make_bomb() -> bytes:
    """Return a PNG of 60,000 x 60,000 pixels, in 3.5 MB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    side = 60_000
    header = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    squeezer = zlib.compressobj(9)
    rows = b"".join(squeezer.compress(bytes(side + 1)) for _ in range(side)) + squeezer.flush()
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def make_requests(images: Sequence[bytes], count: int, share_bad: float) -> list[Request]:
    """Return requests in a seeded order."""
    rng = np.random.default_rng(0)
    forms = [form(image) for image in images]
    kinds = {"garbage": form(rng.bytes(50_000)), "bomb": form(make_bomb()), "empty": form(b"")}
    bad = itertools.cycle(BAD)
    requests = []
    for position, is_bad in enumerate(rng.permutation(count) < round(share_bad * count)):
        kind, place = next(bad) if is_bad else "good", position % len(images)
        requests.append(Request(kind, place, kinds.get(kind, forms[place])))
    return requests


def stream(request: Request) -> Iterator[bytes]:
    """Yield the body of a huge or a slow request."""
    body = request.body
    if request.kind == "huge":
        yield body[: -len(BOUNDARY) - 8]
        yield from itertools.repeat(bytes(BLOCK), HUGE_BYTES // BLOCK)
        return
    size = len(body) // SLOW_PIECES + 1
    for start in range(0, len(body), size):
        time.sleep(SLOW_SECONDS)
        yield body[start : start + size]


def send(connection: http.client.HTTPConnection, request: Request) -> Outcome:
    """Send one request and wait for its answer."""
    is_streamed = request.kind in {"huge", "slow"}
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    start = time.perf_counter()
    try:
        connection.request(
            "POST", "/predict", stream(request) if is_streamed else request.body, headers
        )
        response = connection.getresponse()
        text, status = response.read(), response.status
    except (OSError, http.client.HTTPException):
        connection.close()
        return Outcome(request, 0, time.perf_counter() - start, None)
    seconds = time.perf_counter() - start
    facts = json.loads(text) if status == 200 else {}
    return Outcome(request, status, seconds, facts.get("predictions", [facts])[0].get("probs"))


def send_all(port: int, requests: Sequence[Request], num_connections: int) -> list[Outcome]:
    """Send all requests, each connection the next one when it has its answer."""
    queue, outcomes = iter(requests), list[Outcome]()
    lock = threading.Lock()

    def work() -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=300)) as mine:
            while True:
                with lock:
                    request = next(queue, None)
                if request is None:
                    return
                outcomes.append(send(mine, request))

    threads = [threading.Thread(target=work) for _ in range(num_connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


@contextlib.contextmanager
def start(way: str, run: Path) -> Iterator[tuple[int, int]]:
    """Start a server; yield its process id and its port."""
    kind = WAYS[way]
    command = ["-m", "featcache", "serve", str(run), "--port", "0", "--device", "cpu", "--json"]
    if kind is not None:
        command = [str(HERE / "ways" / "plain_server.py"), str(run), kind]
    server = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line:
        raise SystemExit(f"{way} did not start: {' '.join(command)}")
    port = line if kind is not None else json.loads(line)["url"].strip("/").rsplit(":", 1)[1]
    try:
        yield server.pid, int(port)
    finally:
        server.terminate()
        server.communicate()


def usage_of(pid: int) -> tuple[list[int], float]:
    """Return resident bytes of a process and of its children, and processor seconds of all."""
    pids, memory, seconds = [pid], [0, 0], 0.0
    for one in pids:  # grows
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
            for line in Path(f"/proc/{one}/status").read_text().splitlines():
                if line.startswith("VmRSS"):
                    memory[one != pid] += int(line.split()[1]) * 1024
            ticks = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[11:15]
            seconds += sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return memory, seconds


@contextlib.contextmanager
def memory_watched(pid: int) -> Iterator[list[list[int]]]:
    """Yield a list that grows by ``usage_of``'s memory every second, and once after the end."""
    samples, has_ended = [usage_of(pid)[0]], threading.Event()

    def watch() -> None:
        while not has_ended.wait(1):
            samples.append(usage_of(pid)[0])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield samples
    finally:
        has_ended.set()
        watcher.join()
        time.sleep(SETTLE_SECONDS)
        samples.append(usage_of(pid)[0])


def measure(
    way: str, run: Path, requests: Sequence[Request], num_connections: int
) -> dict[str, Any]:  # fmt: skip
    """Start a server, warm it, send all, and return the figures."""
    with start(way, run) as (pid, port):
        warm = [request for request in requests if request.kind == "good"][:num_connections]
        send_all(port, warm, num_connections)
        with memory_watched(pid) as memory:
            (_, used), begun = usage_of(pid), time.perf_counter()
            outcomes = send_all(port, requests, num_connections)
            seconds = time.perf_counter() - begun
            _, used_after = usage_of(pid)
    good = [o for o in outcomes if o.request.kind == "good"]
    statuses: dict[str, Counter[int]] = {kind: Counter() for kind in ("good", *BAD)}
    for outcome in outcomes:
        statuses[outcome.request.kind][outcome.status] += 1
    probs = {o.request.image: o.probs for o in good if o.probs is not None}
    times = sorted(o.seconds for o in good)
    return {
        "seconds": seconds,
        "requests_per_second": len(outcomes) / seconds,
        "cpu_seconds_per_request": (used_after - used) / len(outcomes),
        "p50_seconds": float(np.quantile(times, 0.5)),
        "p99_seconds": float(np.quantile(times, 0.99)),
        "num_lost": sum(o.status == 0 for o in outcomes),
        "num_of_500": sum(o.status == 500 for o in outcomes),
        "statuses": {kind: dict(sorted(counted.items())) for kind, counted in statuses.items()},
        "memory_bytes": memory,
        "probs": [probs.get(i) for i in range(max(probs, default=-1) + 1)],
    }


def prepare(options: argparse.Namespace, folder: Path) -> tuple[Path, list[bytes]]:
    """Train a run; return it and the images to send."""
    data = options.data
    if data is None:
        data = folder / "images"
        write_images(data, "jpeg-500x375", 120)
    featcache.extract(
        data, folder / "c.h5", backbone=options.backbone, weights=options.weights, device="cpu"
    )
    featcache.train(folder / "c.h5", folder / "run", valid_fraction=0.2, device="cpu")
    endings = {".png", ".jpg", ".jpeg"}
    files = sorted(p for p in data.rglob("*") if p.suffix.lower() in endings)
    step = max(1, len(files) // options.images)
    return folder / "run", [file.read_bytes() for file in files[::step][: options.images]]


def largest_difference(samples: dict[str, list[dict[str, Any]]]) -> dict[str, float | None]:
    """Return by how much the probabilities of each way differ from the first way's, at most."""
    first, found = next(iter(samples.values()))[0]["probs"], {}
    for way, rounds in samples.items():
        pairs = [
            (a, b) for one in rounds for a, b in zip(first, one["probs"], strict=False)
            if a is not None and b is not None
        ]  # fmt: skip
        found[way] = max((float(np.abs(np.subtract(*pair)).max()) for pair in pairs), default=None)
    return found


def memory_at(rounds: Sequence[dict[str, Any]], share: float) -> str:
    """Return megabytes of the server and of its children after this share of the time."""
    samples = [one["memory_bytes"] for one in rounds]
    at = [of_one[round(share * (len(of_one) - 1))] for of_one in samples]
    server, children = (median(one[i] for one in at) / 1e6 for i in (0, 1))
    return f"{server:,.0f} + {children:,.0f}" if children else f"{server:,.0f}"


def make_table(report: dict[str, Any]) -> str:
    """Return the table of a report."""
    rows = []
    samples = report["samples"]
    base = median(one["requests_per_second"] for one in samples[next(iter(WAYS))])
    for way, rounds in samples.items():
        middle = {
            key: median(one[key] for one in rounds)
            for key in (
                "requests_per_second",
                "p50_seconds",
                "p99_seconds",
                "cpu_seconds_per_request",
            )
        }
        memory = [memory_at(rounds, share) for share in MEMORY_AT]
        rows.append([
            way, number(middle["requests_per_second"]),
            number(base / middle["requests_per_second"]), number(1e3 * middle["p50_seconds"]),
            number(1e3 * middle["p99_seconds"]),
            number(1e3 * middle["cpu_seconds_per_request"]), sum(one["num_lost"] for one in rounds),
            sum(one["num_of_500"] for one in rounds), *memory,
            number(report["largest_difference"][way], 2),
        ])  # fmt: skip
    header = [
        "way", "requests/s", "times slower", "p50 ms", "p99 ms", "CPU ms a request", "lost",
        "status 500", *(f"MB at {share:.0%}" for share in MEMORY_AT), "probabilities off by",
    ]  # fmt: skip
    sent = f"{report['num_requests']:,} requests, {report['num_connections']} connections, "
    sent += f"{report['share_bad']:.0%} bad; {report['backbone']}. p50 and p99 of the good ones. "
    sent += "MB: resident, of the server and of its child processes."
    lines = [
        describe_machine(report), "", sent, "",
        *as_table(header, rows), "", "Statuses by kind of request (0: no answer):", "",
    ]  # fmt: skip
    kinds = ("good", *BAD)
    cells = [
        [way, *(json.dumps(rounds[0]["statuses"][kind]).replace('"', "") for kind in kinds)]
        for way, rounds in samples.items()
    ]
    return "\n".join([*lines, *as_table(["way", *kinds], cells, num_text=7)]) + "\n"


def main() -> None:
    """Print a table and write ``serving.json`` and ``serving.md``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--bad", type=float, default=0.05, help="share of bad requests")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--backbone", default="efficientnet-b0")
    parser.add_argument("--weights", default="random", help="a file, or random")
    parser.add_argument("--data", type=Path, help="class folders; default: drawn JPEGs")
    parser.add_argument("--images", type=int, default=50, help="different images that are sent")
    parser.add_argument("--ways", type=int, default=len(WAYS), help="only the first so many")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    load = current_load()
    with tempfile.TemporaryDirectory() as name:
        run, images = prepare(options, Path(name))
        requests = make_requests(images, options.requests, options.bad)
        ways = {
            way: functools.partial(measure, way, run, requests, options.connections)
            for way in list(WAYS)[: options.ways]
        }
        samples = measure_in_turn(ways, options.rounds)
    differences = largest_difference(samples)
    for one in itertools.chain(*samples.values()):
        del one["probs"]
    report = frame_report(
        "serving", torch.device("cpu"), load, options.rounds, backbone=options.backbone,
        num_requests=options.requests, num_connections=options.connections, share_bad=options.bad,
        num_images=len(images), largest_difference=differences, samples=samples,
    )  # fmt: skip
    write_report(options.out, "serving", report, make_table(report))


if __name__ == "__main__":
    main()
