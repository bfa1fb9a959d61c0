"""What the benchmarks share: rounds in turn, cold processes, the commit, facts and tables."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from featcache.runtime import environment_facts

HERE = Path(__file__).resolve().parent
QUIET_LOAD = 0.5  # a busier machine is reported as such

_T = TypeVar("_T")


class NotHere(Exception):  # noqa: N818 (a state, not a fault)
    """Why a way cannot be measured on this machine."""


def import_peer(name: str) -> Any:
    """Return an optional module.

    Raises:
        NotHere: If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotHere("not installed") from error


def run_cold(
    *command: str | Path, cwd: Path | None = None, python: str | Path | None = None
) -> dict[str, Any]:
    """Run one Python process; return its wall seconds and its output.

    With ``python``, that of another environment, PYTHONPATH is not handed on.
    """
    environment = {k: v for k, v in os.environ.items() if not (python and k == "PYTHONPATH")}
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(python or sys.executable), *map(str, command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment,
    )  # fmt: skip
    output, errors = process.communicate()
    seconds = time.perf_counter() - start
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\nfailed:\n{output}\n{errors}")
    return {"seconds": seconds, "output": output}


def call_apart(function: Callable[..., _T], *arguments: Any) -> _T:
    """Call a function in a new process, so that thread pools, memory and its peak are its own.

    Raises:
        NotHere: If that process dies: killed for its memory, as a rule.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise NotHere("its process died") from error


def peak_memory() -> int | None:
    """Return the most memory in bytes that this process had so far, None where it is not known.

    The kernel's high-water mark of this very process: ``ru_maxrss`` may be its parent's.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return None


def read_commit() -> str:
    """Return the commit measured, ``+changes`` if the tree differs from it."""

    def git(*command: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-C", HERE, *command], capture_output=True, text=True, check=False
            )
        except OSError:  # no git there
            return ""
        return done.stdout.strip()

    return (git("rev-parse", "HEAD") or "none") + (
        "+changes" if git("status", "--porcelain") else ""
    )


def current_load() -> float:
    """Return the load average of the last minute, 0 where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def measure_in_turn(ways: Mapping[str, Callable[[], _T]], rounds: int) -> dict[str, list[_T]]:
    """Call every way once a round and keep what it returns; who begins changes from round to round.

    What disturbs the machine for a while thereby disturbs all ways alike.
    """
    samples: dict[str, list[_T]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds):
        shift = number % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            samples[name].append(ways[name]())
    return samples


def seconds_of(work: Callable[[], object]) -> float:
    """Return the wall seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def median(values: Iterable[float]) -> float:
    """Return the median."""
    return float(statistics.median(values))


def frame_report(
    name: str, device: torch.device, load_before: float, rounds: int, **facts: Any
) -> dict[str, Any]:
    """Return a report: what was measured, on what machine, and the facts."""
    return {
        "benchmark": name,
        "rounds": rounds,
        **facts,
        "load_before": load_before,
        "commit": read_commit(),
        "environment": environment_facts(device),
    }


def describe_machine(report: Mapping[str, Any]) -> str:
    """Return the line that goes above every table."""
    facts = report["environment"]
    line = f"{facts['processor']}, {facts['num_cores']} cores, device {facts['device']}, torch "
    line += f"{facts['versions']['torch']}; rounds: {report['rounds']}, ways in turn, medians."
    if report["load_before"] > QUIET_LOAD:
        line += f" The machine was not quiet: load {report['load_before']:.1f} at the start."
    return line


def write_report(out: Path, stem: str, report: Mapping[str, Any], table: str) -> None:
    """Write ``out/stem.json`` and ``out/stem.md``, and print the table."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    (out / f"{stem}.json").write_text(text, encoding="utf-8")
    (out / f"{stem}.md").write_text(table, encoding="utf-8")
    print("\n" + table)


def as_table(
    header: Sequence[str], rows: Iterable[Sequence[object]], num_text: int = 1
) -> list[str]:
    """Return the lines of a Markdown table; the first ``num_text`` columns are not numbers."""
    marks = ["---"] * num_text + ["---:"] * (len(header) - num_text)
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join(marks) + " |"]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def number(value: float | None, digits: int = 3) -> str:
    """Return a number for a table to so many significant digits, empty for None."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 0.01:
        return f"{value:.1e}"
    decimals = max(0, digits - 1 - int(f"{size:e}".split("e")[1]))
    return f"{value:,.{decimals}f}"
