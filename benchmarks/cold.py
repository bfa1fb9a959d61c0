"""How long does each verb take as a whole process, imports included, against ``import torch``?

    python benchmarks/cold.py                                            (about 6 minutes)
    python benchmarks/cold.py --rounds 1 --out try                       (a try)
    python benchmarks/cold.py --before ../other/.venv/bin/python         (another installation too)

Phantom X-rays, 284 of them, are drawn and their features extracted once, by EfficientNet-Lite0
(its weights come with a package). Then every round runs each command once as a process of its own,
and ``python -c "import torch"`` before and after all of them, in turn. A ratio is the seconds of a
command over those of ``import torch`` in the same round; the table has the medians.

Files are in the page cache, compiled kernels on the disk: one round before the first is not
counted.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

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
    run_cold,
    write_report,
)

import featcache
from featcache.cli.demo import BACKBONE
from featcache.cli.phantoms import GROUP_BY, make_phantoms

NUM_PER_CLASS = 142  # of which 200 in all are trained on
NUM_TRIALS = 4
TORCH = "import torch"
GOALS = {"info": 0.2, "split": 0.2, "select": 0.2, "evaluate": 0.95, "train": 0.5}
"""Seconds that a verb may take, in those of ``import torch`` (issue E)."""


def prepare(folder: Path) -> None:
    """Make what the commands read: images, a cache and a run."""
    make_phantoms(folder / "raw", num_per_class=NUM_PER_CLASS)
    make_phantoms(folder / "few", num_per_class=12)
    featcache.split(folder / "raw", folder / "data", group_by=GROUP_BY, mode="symlink")
    featcache.extract(folder / "data", folder / "c.h5", backbone=BACKBONE, group_by=GROUP_BY)
    featcache.train(folder / "c.h5", folder / "run")


def commands(folder: Path) -> dict[str, list[str]]:
    """Return a command line per verb; each may be repeated."""
    image = next((folder / "data" / "test" / "covid").iterdir()).relative_to(folder)
    return {
        "info": ["info", "c.h5"],
        "split": ["split", "few", "few.csv"],
        "select": ["select", "c.h5", "selected.h5", "--rebuild"],
        "verify": ["verify", "c.h5"],
        "evaluate": ["evaluate", "run", "--positive", "covid"],
        "predict --cache": ["predict", "run", "--cache", "c.h5"],
        "predict IMAGE": ["predict", "run", str(image)],
        "train": ["train", "c.h5", "trained", "--overwrite"],
        "sweep": ["sweep", "c.h5", "swept", "--overwrite", "--trials", str(NUM_TRIALS)],
        "extract, up to date": ["extract", "data", "c.h5", "--backbone", BACKBONE,
                                "--group-by", GROUP_BY],
    }  # fmt: skip


def measure(folder: Path, pythons: Mapping[str, str | None], rounds: int) -> list[dict[str, Any]]:
    """Return a row per installation and verb, with all its seconds."""

    def run(python: str | None, *arguments: str) -> float:
        (folder / "few.csv").unlink(missing_ok=True)
        return float(run_cold(*arguments, cwd=folder, python=python)["seconds"])

    ways: dict[tuple[str, str], Callable[[], float]] = {}
    for name, python in pythons.items():
        for verb, arguments in commands(folder).items():
            ways[name, verb] = partial(run, python, "-m", "featcache", *arguments, "--json")
        ways[name, TORCH] = partial(run, python, "-c", TORCH)
    measure_in_turn(ways, 1)
    samples = measure_in_turn(ways, rounds)
    rows = []
    for (name, verb), seconds in samples.items():
        ratios = [s / t for s, t in zip(seconds, samples[name, TORCH], strict=True)]
        rows.append(
            {
                "installation": name, "verb": verb, "samples": seconds, "seconds": median(seconds),
                "ratios": ratios, "ratio": median(ratios), "goal": GOALS.get(verb),
            }
        )  # fmt: skip
    return rows


def describe(report: Mapping[str, Any]) -> str:
    """Return the Markdown table."""
    rows = [
        (
            row["verb"], row["installation"], number(row["seconds"]), number(row["ratio"]),
            "" if row["goal"] is None else row["goal"],
        )
        for row in report["rows"]
    ]  # fmt: skip
    lines = [
        "### Verbs as whole processes", "", describe_machine(report), "",
        *as_table(("verb", "installation", "s", "of import torch", "goal"), rows, 2),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure; write JSON and a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", help="the Python of another installation of featcache")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    load = current_load()
    pythons: dict[str, str | None] = {"this": None}
    if args.before:
        pythons["before"] = str(Path(args.before).absolute())
    with tempfile.TemporaryDirectory(prefix="featcache-benchmark-") as folder:
        prepare(Path(folder))
        rows = measure(Path(folder), pythons, args.rounds)
    report = frame_report("cold", torch.device("cpu"), load, args.rounds, rows=rows)
    write_report(args.out, "cold_cpu", report, describe(report))


if __name__ == "__main__":
    main()
