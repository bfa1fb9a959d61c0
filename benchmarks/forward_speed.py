"""The part ``forward`` of ``extract.py``: images a second through the network, against its peers.

Everybody runs the same image content. Every way first tries its settings (batch size, memory
layout, hint) for a moment each; the fastest is then measured, in turn with the others. Every way
lives in a process of its own: side by side in one process, the thread pools of torch, ONNX Runtime
and OpenVINO slow each other down several times over.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from decode_speed import RULES
from make_images import KINDS, encode_image
from measuring import NotHere, as_table, measure_in_turn, median, number
from peers import Job, Runner, Way, build, list_ways

from featcache.backbones.engine import eager_features
from featcache.pixels.images import decode
from featcache.precision import relative_errors

BASELINE = "stock eager, batch 32"
FEATCACHE = "featcache"
NUM_PIXELS = 32  # different images in the batches; every one's parity is looked at
# speed.md 1.3: every layer of B0 reads its input and writes its output once, all else fused.
ROOF_BYTES = {"fp32": 55e6, "default": 55e6, "tf32": 55e6, "fp16": 27.5e6, "bf16": 27.5e6}
BANDWIDTHS = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.04e12, "4090": 1.01e12}  # bytes a second


def measure_forward(args: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield a table of rows per backbone and precision, one more every time."""
    tables = []
    processes: dict[str, WayProcess] = {}
    try:
        for stock in args.backbones:
            for precision in args.precision:
                job = make_job(args, device, precision)
                names = [way.name for way in list_ways(stock, job)]
                if args.ways:
                    names = [n for n in names if any(word in n for word in args.ways)]
                rows = _measure(names, processes, stock, job, args)
                roof = None
                if stock == "efficientnet-b0":
                    roof = memory_roof(device, precision, args.bandwidth)
                tables.append(
                    {"backbone": stock, "precision": precision, "memory_roof": roof, "rows": rows}
                )
                yield {"tables": tables}
    finally:
        for process in processes.values():
            process.close()


def make_job(args: argparse.Namespace, device: torch.device, precision: str) -> Job:
    """Return what all ways run: pixels of real files, and the batch sizes that suit the device."""
    kind = KINDS["jpeg-500x375"]
    pixels = np.stack([decode(encode_image(kind, n), RULES).pixels for n in range(NUM_PIXELS)])
    on_gpu = device.type == "cuda"
    sizes = tuple(args.batch_sizes or ((64, 256, 1024) if on_gpu else (1, 4, 8, 32)))
    compiled = tuple(args.compile_batch_sizes or ((256,) if on_gpu else (8, 32)))
    engine_images = args.engine_images or (2048 if on_gpu else 96)
    return Job(pixels, device, precision, sizes, compiled, engine_images)


def memory_roof(device: torch.device, precision: str, bandwidth: float | None) -> float | None:
    """Return the images a second of B0 that memory allows with all layers fused, on CUDA only.

    Args:
        device: Where; its name is looked up.
        precision: Decides the bytes an image.
        bandwidth: Terabytes a second, for devices whose name is not known.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = next((rate for key, rate in BANDWIDTHS.items() if key in name), None)
    rate = bandwidth * 1e12 if bandwidth else known
    return rate / ROOF_BYTES[precision] if rate else None


class WayProcess:
    """One way in a process of its own; it works only while it is asked something."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, question: str, *arguments: Any) -> Any:
        """Have ``prepare`` or ``measure`` called there.

        Raises:
            NotHere: If that fails, with the reason.
        """
        try:
            self._connection.send((question, arguments))
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise NotHere("its process died") from error
        if isinstance(answer, str):
            raise NotHere(answer)
        return answer

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


def _serve(connection: Any) -> None:
    """Answer ``WayProcess.ask`` until the other end closes."""
    runner: Runner | None = None

    def prepare(name: str, stock: str, job: Job, compile_mode: str, seconds: float) -> Any:
        nonlocal runner
        runner = None
        ways = list_ways(stock, job, compile_mode=compile_mode)
        way = next(way for way in ways if way.name == name)
        runner, choice, reference = choose(way, job, seconds)
        errors = relative_errors(runner.features(), reference)
        return {"setting": choice, "parity": max(errors), "num_pixels": len(errors)}

    def measure(seconds: float) -> float:
        if runner is None:
            raise NotHere("not prepared")
        return _rate(runner, seconds)

    answers: dict[str, Callable[..., Any]] = {"prepare": prepare, "measure": measure}
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            question, arguments = connection.recv()
            try:
                connection.send(answers[question](*arguments))
            except Exception as error:  # noqa: BLE001 (a peer's faults are of any kind: one row)
                text = str(error).splitlines() or [""]
                connection.send(text[0][:200] or type(error).__name__)


def choose(way: Way, job: Job, seconds: float) -> tuple[Runner, dict[str, Any], np.ndarray]:
    """Return the runner of the fastest setting, the setting, and the true features.

    Raises:
        NotHere: If this way cannot be measured here.
    """
    backbone = build(way.backbone)
    reference = eager_features(backbone, job.pixels)
    if len(way.choices) == 1:
        runner = way.make(backbone, job, way.choices[0])
        runner.run()  # allocates, plans, compiles
        return runner, way.choices[0], reference
    rates = []
    for choice in way.choices:
        runner = way.make(backbone, job, choice)
        runner.run()
        rates.append(_rate(runner, seconds))
    best = way.choices[int(np.argmax(rates))]
    runner = way.make(backbone, job, best)
    runner.run()
    return runner, best, reference


def _rate(runner: Runner, seconds: float) -> float:
    """Return images a second over at least so many seconds, and at least one run."""
    start, count = time.perf_counter(), 0
    while True:
        runner.run()
        count += runner.num_images
        spent = time.perf_counter() - start
        if spent >= seconds:
            return count / spent


def _measure(
    names: list[str], processes: dict[str, WayProcess], stock: str, job: Job,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:  # fmt: skip
    """Prepare the ways one after the other, then measure them in turn."""
    rows: list[dict[str, Any]] = []
    for name in names:
        if name not in processes:
            processes[name] = WayProcess()
        start = time.perf_counter()
        try:
            facts = processes[name].ask(
                "prepare", name, stock, job, args.compile_mode, args.seconds / 2
            )
            facts["prepare_seconds"] = time.perf_counter() - start
        except NotHere as error:
            facts = {"reason": str(error)}
        rows.append({"way": name, **facts})
        print(f"{stock}, {job.precision}, {name}: {facts}", flush=True)
    timers = {
        row["way"]: lambda p=processes[row["way"]]: p.ask("measure", args.seconds)
        for row in rows
        if "reason" not in row
    }
    samples = measure_in_turn(timers, args.rounds)
    for row in rows:
        if row["way"] in samples:
            row["images_per_second"] = median(samples[row["way"]])
            row["samples"] = samples[row["way"]]
    return rows


def describe_forward(part: dict[str, Any]) -> list[str]:
    """Return the Markdown lines."""
    lines: list[str] = []
    for table in part["tables"]:
        rates = {row["way"]: row.get("images_per_second") for row in table["rows"]}
        base, ours, roof = rates.get(BASELINE), rates.get(FEATCACHE), table["memory_roof"]
        rows = []
        for row in table["rows"]:
            rate = row.get("images_per_second")
            if rate is None:
                rows.append((row["way"], row["reason"], "", "", "", "", ""))
                continue
            setting = ", ".join(f"{k} {v}" for k, v in row["setting"].items() if v is not False)
            rows.append((
                row["way"], setting.replace("_", " "), number(rate),
                number(rate / base if base else None), number(ours / rate if ours else None),
                f"{row['parity']:.1e}", f"{100 * rate / roof:.1f} %" if roof else "",
            ))  # fmt: skip
        header = ("way", "setting or reason", "images/s", f"times {BASELINE}", "featcache / this",
                  "parity", "of the memory roof")  # fmt: skip
        lines += [
            f"### Forward, {table['backbone']}, {table['precision']}", "",
            *as_table(header, rows, 2), "",
        ]  # fmt: skip
    lines.append(
        "Parity: the worst image's relative L2 difference from the same network's eager IEEE fp32 "
        "on the CPU. timm's rows are another implementation of the network, with its own weights."
    )
    return lines
