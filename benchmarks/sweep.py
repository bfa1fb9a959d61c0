"""How many heads a minute? Heads of different learning rate, dropout, weight decay and seed.

    python benchmarks/sweep.py                               (about an hour on two quiet cores)
    python benchmarks/sweep.py --device cuda
    python benchmarks/sweep.py --heads 64 --rounds 5 --ways featcache,after
    python benchmarks/sweep.py --rounds 1 --heads 1,4,16 --rows 320 --valid-rows 80 --epochs 2
           --head-steps 200 --bound-seconds 0.2 --out try                                (a try)

The job: 3,200 x 1280 synthetic features (800 more for validation), two classes, heads of the
default shape, batches of 32, Adam, a validation of every head after each epoch. The ways:

    featcache            ``fit_heads``
    one after another    a loop over a tensor on the device, batches by index, fused Adam; with one
                         thread and with one a core: the faster counts, both are kept
    summed losses        as DINOv2's linear evaluation: a ModuleDict, a Python loop over it, one sum
                         of losses, one optimizer (fused Adam) with a group of parameters per head
    joblib processes     loky, one process a core of one thread, each running the loop above; their
                         start is not counted
    vmap                 ``torch.func.stack_module_state`` and ``vmap``, on heads without batch
                         norm, which it cannot do: three normalisations less than the others

Of many heads fewer epochs are trained: as many as ``--head-steps`` allow, at least one, the same
for all ways. Seconds are those of the whole job: building, steps, validations. featcache does all
of it. Heads trained one by one: ``--peer-heads`` of them are, the others taken to last as long.
Heads trained in step: as many steps as ``--head-steps`` allow, the others taken to last as long.
JSON and table say what was measured. Heads a minute are of ``--epochs`` epochs, at that rate.

The machine's bound (``machine_bound.py``) is measured in every round, in turn with the ways, and
the best round counts; of the ways it is the median. Each sample is a process of its own, warmed up
with a few steps.

Parity, declared beforehand: eight heads for ``--epochs`` epochs by the tensor-indexed loop, by
featcache, and by the loop again with other seeds. The mean of ln(featcache's final validation loss
/ the loop's) is within three standard errors, by the scatter between the loop's two seeds.
Otherwise the exit status is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from figure_of_sweep import draw_sweep
from machine_bound import measure_bound, summarise_bounds
from measuring import (
    HERE,
    NotHere,
    as_table,
    call_apart,
    current_load,
    describe_machine,
    frame_report,
    measure_in_turn,
    median,
    number,
    write_report,
)
from plain_loops import Task
from sweep_ways import (
    FEATCACHE,
    IN_TURN,
    WAYS,
    compare_losses,
    count_params,
    measure_way,
)

from featcache.runtime import resolve_device

BOUND = "bound"
NUM_PARITY_HEADS = 8


def measure_heads(
    num_heads: int, names: list[str], task: Task, args: argparse.Namespace
) -> dict[str, Any]:
    """Measure all ways and the bound of so many heads, in turn."""
    epochs = max(1, min(args.epochs, args.head_steps // (num_heads * task.num_steps)))
    short = dataclasses.replace(task, epochs=epochs)
    limits = args.peer_heads, max(3, args.head_steps // num_heads)
    job = task.job(0)
    widths = (job.head.num_features, *job.head.hidden, job.head.num_classes)

    def sample(name: str) -> Any:
        try:
            if name == BOUND:
                return call_apart(
                    measure_bound, short, widths, count_params(job), num_heads, args.bound_seconds
                )
            found = call_apart(measure_way, name, short, num_heads, *limits)
        except NotHere as error:
            return str(error)
        print(f"{num_heads} heads, {name}: {found['seconds']:.1f} s", flush=True)
        return found

    ways = {name: functools.partial(sample, name) for name in (*names, BOUND)}
    samples = measure_in_turn(ways, args.rounds)
    bound = summarise_bounds(samples.pop(BOUND))
    per_head = task.num_steps * args.epochs
    bound["heads_per_minute"] = {
        name: 60 * rate / per_head for name, rate in bound["head_steps_per_second"].items()
    }
    rows = [_summarise(name, found, num_heads, short, bound) for name, found in samples.items()]
    for row in rows:
        if "reason" not in row:
            row["heads_per_minute"] = 60 * row["head_steps_per_second"] / per_head
    return {"num_heads": num_heads, "epochs": epochs, "bound": bound, "rows": rows}


def _summarise(
    name: str, samples: list[Any], num_heads: int, task: Task, bound: dict[str, Any]
) -> dict[str, Any]:
    """Return the row of a way.

    Args:
        name: Of the way.
        samples: A result a round; a text is the reason why there is none.
        num_heads: K.
        task: With the epochs that were trained.
        bound: Of the machine.
    """
    reasons = [text for text in samples if isinstance(text, str)]
    if reasons:
        return {"way": name, "reason": reasons[0]}
    num_steps = task.num_steps * task.epochs
    rates = [num_heads * num_steps / found["seconds"] for found in samples]
    first, rate = samples[0], median(rates)
    peaks = [s["peak_bytes"] + s.get("processes_peak_bytes", 0) for s in samples
             if s["peak_bytes"] is not None]  # fmt: skip
    return {
        "way": name,
        "measured_heads": first["measured_heads"],
        "measured_steps": first["measured_steps"],
        "extrapolated": (first["measured_heads"], first["measured_steps"])
        != (num_heads, num_steps),
        "head_steps_per_second": rate,
        "fraction_of_bound": {
            kind: rate / limit for kind, limit in bound["head_steps_per_second"].items()
        },
        "peak_bytes": max(peaks) if peaks else None,
        "device_peak_bytes": max(s.get("device_peak_bytes", 0) for s in samples) or None,
        "samples_head_steps_per_second": rates,
        "samples": samples,
    }


def check_parity(task: Task) -> dict[str, Any]:
    """Train some heads in three ways and return their losses, how they differ and the verdict."""
    found = call_apart(compare_losses, task, NUM_PARITY_HEADS)
    loop, again, ours = (np.log(found[name]) for name in ("loop", "loop, other seeds", FEATCACHE))
    scatter = float(np.sqrt(np.mean((again - loop) ** 2)))
    error = scatter / math.sqrt(len(loop))
    mean = float(np.mean(ours - loop))
    return {
        "final_valid_losses": found,
        "mean_log_ratio": mean,
        "standard_error": error,
        "within": abs(mean) <= 3 * error,
    }


# --------------------------------------------------------------------------------------- reporting


def keep_faster(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows without the slower of the two that differ in threads alone."""
    pair = [row for row in rows if row["way"].startswith(IN_TURN) and "reason" not in row]
    rates = [row["head_steps_per_second"] for row in pair]
    return [row for row in rows if row not in pair or row["head_steps_per_second"] == max(rates)]


def describe_sweep(report: dict[str, Any]) -> list[str]:
    """Return the Markdown lines."""
    task = report["task"]
    title = f"### Heads over {task['num_rows']:,} x {task['num_features']:,} features, batches of "
    lines = [title + f"{task['batch_size']}; a head is {task['epochs']} epochs"]
    header = ("heads", "way", "measured", "head-steps/s", "heads a minute", "featcache / this",
              "of the bound, a head in cache", "of the bound, from memory", "peak MiB")  # fmt: skip
    cells: list[tuple[object, ...]] = []
    for table in report["tables"]:
        rows = keep_faster(table["rows"])
        ours = next((r.get("head_steps_per_second") for r in rows if r["way"] == FEATCACHE), None)
        for row in rows:
            if "reason" in row:
                cells.append((f"{table['num_heads']:,}", row["way"], row["reason"], *[""] * 6))
                continue
            rate, peak = row["head_steps_per_second"], row["peak_bytes"]
            what = "all" if not row["extrapolated"] else (
                f"heads: {row['measured_heads']:,}, steps: {row['measured_steps']:,}"
            )  # fmt: skip
            cells.append((
                f"{table['num_heads']:,}", row["way"], what, number(rate),
                number(row["heads_per_minute"]), number(ours / rate if ours else None),
                *(f"{100 * row['fraction_of_bound'][k]:.0f} %" for k in ("one head", "memory")),
                "" if peak is None else f"{peak / 2**20:,.0f}",
            ))  # fmt: skip
    lines += ["", *as_table(header, cells, 3), ""]
    bounds = []
    for table in report["tables"]:
        bound = table["bound"]
        bounds.append((
            f"{table['num_heads']:,}", table["epochs"], bound["num_threads"],
            number(bound["flops_per_second"] / 1e9), number(1000 * bound["product_seconds"]),
            *(number(bound["bytes_per_second"][k] / 1e9) for k in ("one head", "memory")),
            *(number(bound["head_steps_per_second"][k]) for k in ("one head", "memory")),
        ))  # fmt: skip
    header = ("heads", "epochs trained", "threads", "GFLOP/s", "ms of products a head-step",
              "GB/s, a head", "GB/s, memory", "bound head-steps/s, a head in cache",
              "from memory")  # fmt: skip
    megabytes = report["tables"][0]["bound"]["adam_bytes"] / 1e6
    text = "The machine, measured in the same rounds (Adam moves "
    text += f"{megabytes:.1f} MB a head-step, at the bandwidth shown):"
    lines += [text, "", *as_table(header, bounds), ""]
    if (parity := report["parity"]) is not None:
        verdict = "within" if parity["within"] else "**NOT within**"
        ratio, error = math.exp(parity["mean_log_ratio"]), 100 * parity["standard_error"]
        lines.append(
            f"Parity: featcache's final validation losses are {ratio:.3f} times those of the loop "
            f"(geometric mean of {NUM_PARITY_HEADS} heads), {verdict} three standard errors of "
            f"{error:.1f} %."
        )
    return lines


def points_of(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the points of the plot by way, featcache first."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for table in report["tables"]:
        for row in keep_faster(table["rows"]):
            if "reason" in row:
                continue
            name = IN_TURN if row["way"].startswith(IN_TURN) else row["way"]
            scale = row["heads_per_minute"] / row["head_steps_per_second"]
            lines.setdefault(name, []).append(
                {
                    "num_heads": table["num_heads"],
                    "heads_per_minute": row["heads_per_minute"],
                    "samples": [scale * rate for rate in row["samples_head_steps_per_second"]],
                    "extrapolated": row["extrapolated"],
                }
            )
    return lines


def parse_args() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    counts = (1, 8, 64, 512, 1000)
    parser.add_argument(
        "--heads", type=lambda text: tuple(map(int, text.split(","))), default=counts,
        help="numbers of heads: K,K",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--ways", help="only those with one of these words in their name: a,b")
    parser.add_argument("--rows", type=int, default=3200, help="training rows")
    parser.add_argument("--valid-rows", type=int, default=800)
    parser.add_argument("--features", type=int, default=1280)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10, help="of a head, and at the most trained")
    parser.add_argument("--head-steps", type=int, default=20_000, help="that a job may have")
    parser.add_argument("--peer-heads", type=int, default=8, help="that loops train one by one")
    parser.add_argument("--bound-seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--no-parity", action="store_true", help="leave the parity out")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    if min(args.rounds, args.epochs, args.peer_heads, *args.heads) < 1:
        parser.error("--rounds, --epochs, --peer-heads and --heads: 1 or more")
    if args.rows < 3 * args.batch_size:
        parser.error("--rows: three batches or more, for the warm-up")
    args.heads = tuple(sorted(set(args.heads)))
    return args


def main() -> None:
    """Measure every number of heads; write JSON, a table and a plot after each."""
    args = parse_args()
    device, load = resolve_device(args.device).torch(), current_load()
    task = Task(
        args.rows, args.valid_rows, args.features, args.batch_size, args.epochs, device.type
    )
    words = args.ways.split(",") if args.ways else [""]
    names = [name for name in WAYS if any(word in name for word in words)]
    parity = None if args.no_parity else check_parity(task)
    tables: list[dict[str, Any]] = []
    stem = f"sweep_{device.type}"
    for num_heads in args.heads:
        tables.append(measure_heads(num_heads, names, task, args))
        report = frame_report(
            "sweep", device, load, args.rounds, task=vars(task), parity=parity, tables=tables
        )
        lines = [describe_machine(report), "", *describe_sweep(report)]
        write_report(args.out, stem, report, "\n".join(lines) + "\n")
        draw_sweep(args.out / f"{stem}.png", report, points_of(report))
    if parity is not None and not parity["within"]:
        sys.exit("featcache's final losses are not those of the loop: see the table")


if __name__ == "__main__":
    main()
