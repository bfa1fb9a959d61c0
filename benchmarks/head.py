"""How long does one head take, and how long to the same validation loss? featcache and its peers.

    python benchmarks/head.py                              (about 15 minutes on two quiet cores)
    python benchmarks/head.py --device cuda
    python benchmarks/head.py --rounds 1 --rows 640 --valid-rows 160 --epochs 3 --out try   (a try)

The job: 3,200 x 1280 synthetic features (800 more for validation), two classes, the default head,
batches of 32, 10 epochs, a validation after each. The ways:

    featcache            ``fit_head``
    DataLoader loop      what tutorials show: ``DataLoader(TensorDataset, shuffle=True)``, default
                         Adam, ``loss.item()`` after each step
    tensor-indexed loop  tuned by hand: rows in one tensor, batches by index, fused Adam
    skorch               ``NeuralNetClassifier`` with the same network and Adam
    MLPClassifier        scikit-learn's: the same widths, batches, Adam; no batch norm, no dropout
    LogisticRegression   scikit-learn's, for comparison: no hidden layer, one convex problem

On a CPU the first and the third are also measured on 300, 1,600 and 100,000 rows (these in batches
of 1,024, for two epochs), and cold, as whole processes: the command ``featcache train`` on a cache
of 200 rows, its compiled code on the disk, against twenty lines of torch
(``ways/head_in_torch.py``).

skorch is optional (``pip install skorch``) and reported as not installed where it is missing.

Every sample is a process of its own, warm (a few steps, libraries and compiled code loaded); its
clock covers the whole fit, the validations too. Peers are measured with one thread and with one a
core: the faster counts, both are kept. Round r has seed r: the first three ways begin with the same
weights, and featcache and the tensor-indexed loop see the same batches too.

Same loss: the highest of the final validation losses of the tensor-indexed loop over ten seeds,
the loss that it reaches for certain. Parity, declared beforehand: over the same ten seeds, the
median final loss of featcache lies within the tensor-indexed loop's lowest and highest (of two
equal ways one in thirty would not). Otherwise the exit status is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figure_of_head import draw_head
from measuring import (
    HERE,
    NotHere,
    as_table,
    call_apart,
    current_load,
    describe_machine,
    frame_report,
    import_peer,
    measure_in_turn,
    median,
    number,
    peak_memory,
    write_report,
)
from plain_loops import (
    Curve,
    Rows,
    Task,
    make_rows,
    train_by_index,
    train_with_loader,
    warm_up_rows,
)

from featcache.cache.writing import write_cache
from featcache.heads.compiled import kernels
from featcache.heads.config import HeadJob
from featcache.heads.fit import fit_head
from featcache.heads.head import build_head
from featcache.runtime import Device, available_cores, resolve_device

FEATCACHE, LOADER, INDEXED = "featcache", "DataLoader loop", "tensor-indexed loop"
NUM_SEEDS = 10

Sample = dict[str, Any]


# ---------------------------------------------------------------------------------------- the ways


def train_featcache(
    job: HeadJob, rows: Rows, device: torch.device, data_seed: int, curve: Curve
) -> None:
    """Train by ``fit_head``."""
    fit_head(
        job.head, job.training, *rows.arrays, seed=job.seed, data_seed=data_seed,
        device=Device(device.type, device.index),
        on_epoch=lambda row: curve.note(row["valid_loss"], row["valid_accuracy"]),
    )  # fmt: skip


def train_skorch(
    job: HeadJob, rows: Rows, device: torch.device, data_seed: int, curve: Curve
) -> None:
    """Train by skorch's classifier, whose DataLoader shuffles by torch's generator."""
    skorch = import_peer("skorch")
    helper, callbacks = import_peer("skorch.helper"), import_peer("skorch.callbacks")

    class Note(callbacks.Callback):
        def on_epoch_end(self, net: Any, **_: Any) -> None:
            curve.note(net.history[-1, "valid_loss"], net.history[-1, "valid_acc"])

    torch.manual_seed(job.seed)
    valid = skorch.dataset.Dataset(rows.valid_features, rows.valid_targets)
    skorch.NeuralNetClassifier(
        build_head(job.head), criterion=torch.nn.CrossEntropyLoss, optimizer=torch.optim.Adam,
        lr=job.training.learning_rate, max_epochs=job.training.epochs,
        batch_size=job.training.rows_per_step(len(rows.features)), iterator_train__shuffle=True,
        train_split=helper.predefined_split(valid), callbacks=[Note()], device=str(device),
        verbose=0,
    ).fit(rows.features, rows.targets)  # fmt: skip


def train_perceptron(job: HeadJob, rows: Rows, _: torch.device, __: int, curve: Curve) -> None:
    """Train by scikit-learn's network on the CPU, an epoch a call."""
    from sklearn.neural_network import MLPClassifier

    network = MLPClassifier(
        job.head.hidden, solver="adam", alpha=0, random_state=job.seed,
        learning_rate_init=job.training.learning_rate,
        batch_size=job.training.rows_per_step(len(rows.features)),
    )  # fmt: skip
    for _epoch in range(job.training.epochs):
        network.partial_fit(rows.features, rows.targets, classes=range(job.head.num_classes))
        _note_probs(network, rows, curve)


def train_regression(job: HeadJob, rows: Rows, _: torch.device, __: int, curve: Curve) -> None:
    """Solve scikit-learn's logistic regression on the CPU, standardised, with its defaults."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    _note_probs(model.fit(rows.features, rows.targets), rows, curve)


def _note_probs(model: Any, rows: Rows, curve: Curve) -> None:
    from sklearn.metrics import log_loss

    probs, targets = model.predict_proba(rows.valid_features), rows.valid_targets
    curve.note(
        float(log_loss(targets, probs.astype(np.float64), labels=range(probs.shape[1]))),
        float((probs.argmax(1) == targets).mean()),
    )


WAYS: dict[str, Callable[[HeadJob, Rows, torch.device, int, Curve], None]] = {
    FEATCACHE: train_featcache,
    LOADER: train_with_loader,
    INDEXED: train_by_index,
    "skorch": train_skorch,
    "MLPClassifier": train_perceptron,
    "LogisticRegression": train_regression,
}
ON_CPU_ALONE = ("MLPClassifier", "LogisticRegression")
WITHOUT_STEPS = ("LogisticRegression",)


# --------------------------------------------------------------------------------------- measuring


def measure_sample(name: str, num_threads: int | None, task: Task, seed: int) -> Sample:
    """Warm one way up and time one fit; runs in a process of its own.

    Args:
        name: Of the way.
        num_threads: Of torch and BLAS; None leaves them alone.
        task: What is trained on.
        seed: Of weights and order.
    """
    from threadpoolctl import threadpool_limits

    warnings.simplefilter("ignore")
    rows, device = make_rows(task), resolve_device(task.device).torch()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    with threadpool_limits(num_threads):
        few, short = warm_up_rows(rows, task)
        WAYS[name](short.job(seed), few, device, seed, Curve())
        kernels.load("float32")  # the warm-up is too short to: 0.5 s, as torch.optim is loaded
        start = time.perf_counter()
        curve = Curve()
        WAYS[name](task.job(seed), rows, device, seed, curve)
        seconds = time.perf_counter() - start
    return {"seed": seed, "seconds": seconds, "curve": curve.points, "peak_bytes": peak_memory()}


def measure_ways(names: list[str], task: Task, rounds: int) -> list[dict[str, Any]]:
    """Measure all ways in turn; return a row for each way and number of threads."""
    cores = available_cores()
    counts = (1, cores) if task.device == "cpu" and cores > 1 else (cores,)
    rows: list[dict[str, Any]] = [
        {"way": name, "num_threads": num_threads}
        for name in names
        for num_threads in ((None,) if name == FEATCACHE else counts)
    ]
    numbers = {str(i): 0 for i in range(len(rows))}  # the round that each is in: its seed

    def sample(key: str) -> Sample | str:
        row, seed = rows[int(key)], numbers[key]
        numbers[key] += 1
        try:
            found = call_apart(measure_sample, row["way"], row["num_threads"], task, seed)
        except NotHere as error:
            return str(error)
        loss = found["curve"][-1]["valid_loss"]
        text = f"round {seed + 1}, {row['way']}, threads {row['num_threads']}"
        print(f"{text}: {found['seconds']:.2f} s, loss {loss:.4f}", flush=True)
        return found

    samples = measure_in_turn({key: functools.partial(sample, key) for key in numbers}, rounds)
    for row, found in zip(rows, samples.values(), strict=True):
        reasons = [text for text in found if isinstance(text, str)]
        row.update({"reason": reasons[0]} if reasons else _summarise(found, row["way"], task))
    return rows


def _summarise(samples: list[Any], name: str, task: Task) -> dict[str, Any]:
    seconds = median(sample["seconds"] for sample in samples)
    losses = [[point["valid_loss"] for point in sample["curve"]] for sample in samples]
    peaks = [sample["peak_bytes"] for sample in samples if sample["peak_bytes"] is not None]
    num_steps = task.num_steps * task.epochs
    return {
        "seconds": seconds,
        "ms_per_step": None if name in WITHOUT_STEPS else 1000 * seconds / num_steps,
        "final_valid_loss": median(curve[-1] for curve in losses),
        "best_valid_loss": median(min(curve) for curve in losses),
        "final_valid_accuracy": median(s["curve"][-1]["valid_accuracy"] for s in samples),
        "peak_bytes": max(peaks) if peaks else None,
        "samples": samples,
    }


def check_parity(best: dict[str, dict[str, Any]], task: Task) -> dict[str, Any]:
    """Return final losses over ten seeds, those beyond the rounds trained now, and the verdict."""
    losses: dict[str, list[float]] = {}
    for name in (INDEXED, LOADER, FEATCACHE):
        if name not in best:
            continue
        samples = best[name]["samples"][:NUM_SEEDS]
        more = [
            call_apart(measure_sample, name, best[name]["num_threads"], task, seed)
            for seed in range(len(samples), NUM_SEEDS)
        ]
        losses[name] = [s["curve"][-1]["valid_loss"] for s in samples + more]
    if INDEXED not in losses:
        return {"final_valid_losses": losses}
    low, high = min(losses[INDEXED]), max(losses[INDEXED])
    medians = {name: median(values) for name, values in losses.items()}
    return {
        "final_valid_losses": losses,
        "spread": [low, high],
        "medians": medians,
        "within_spread": {name: low <= value <= high for name, value in medians.items()},
    }


def choose_threads(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the row of each way's faster number of threads, by its name."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        other = best.get(row["way"])
        if "reason" not in row and (other is None or row["seconds"] < other["seconds"]):
            best[row["way"]] = row
    return best


def time_to_loss(samples: list[Sample], loss: float) -> float | None:
    """Return the median of the seconds to a validation loss, None if it is mostly not reached."""
    seconds = [
        next((p["seconds"] for p in sample["curve"] if p["valid_loss"] <= loss), math.inf)
        for sample in samples
    ]
    found = median(seconds)
    return found if math.isfinite(found) else None


def measure_sizes(task: Task, rounds: int) -> list[dict[str, Any]]:
    """Return the seconds of featcache and the tensor-indexed loop for other numbers of rows."""
    found = []
    for num_rows, batch_size, epochs in ((300, 32, 10), (1600, 32, 10), (100_000, 1024, 2)):
        sized = dataclasses.replace(
            task, num_rows=num_rows, num_valid=num_rows // 4, batch_size=batch_size, epochs=epochs
        )
        best = choose_threads(measure_ways([FEATCACHE, INDEXED], sized, rounds))
        found.append({"task": vars(sized), **best})
    return found


def measure_cold(rounds: int) -> dict[str, list[float]]:
    """Return the seconds of whole processes: both trainings of 200 rows, and importing torch."""
    rows = make_rows(Task(200, 50, 1280, 32, 10, "cpu"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "rows.npz", *rows.arrays)
        write_cache(
            folder / "rows.h5",
            {"train": rows.features, "valid": rows.valid_features},
            {"train": rows.targets, "valid": rows.valid_targets},
            {
                name: [f"{name}/{i}" for i in range(n)]
                for name, n in (("train", 200), ("valid", 50))
            },
            classes=["no", "yes"],
        )
        python = sys.executable
        train = ["-m", "featcache", "train", "rows.h5", "run", "--overwrite"]
        script = str(HERE / "ways" / "head_in_torch.py")
        commands = {
            "featcache train": [python, *train],
            "torch script": [python, script, "rows.npz", "head.pt"],
            "import torch": [python, "-c", "import torch"],
        }

        def run(command: list[str]) -> float:
            start = time.perf_counter()
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
            return time.perf_counter() - start

        run(commands["featcache train"])  # compiles, and reads files from the disk
        ways = {key: functools.partial(run, command) for key, command in commands.items()}
        return measure_in_turn(ways, rounds)


# --------------------------------------------------------------------------------------- reporting


def describe_head(report: dict[str, Any]) -> list[str]:
    """Return the Markdown lines."""
    task, parity = report["task"], report["parity"]
    best = choose_threads(report["ways"])
    ours = best.get(FEATCACHE, {}).get("seconds")
    header = ("way", "threads", "seconds", "ms a step", "its time / featcache's", "final loss",
              "best loss", "accuracy", "s to the same loss", "peak MiB")  # fmt: skip
    cells: list[tuple[object, ...]] = []
    for name in dict.fromkeys(row["way"] for row in report["ways"]):
        if name not in best:
            reason = next(row["reason"] for row in report["ways"] if row["way"] == name)
            cells.append((name, reason, *[""] * (len(header) - 2)))
            continue
        row = best[name]
        reached = row.get("seconds_to_same_loss")
        peak = row["peak_bytes"]
        cells.append((
            name + (" (CPU)" if name in ON_CPU_ALONE and task["device"] != "cpu" else ""),
            row["num_threads"] or "its own", number(row["seconds"]), number(row["ms_per_step"]),
            number(row["seconds"] / ours if ours else None), number(row["final_valid_loss"]),
            number(row["best_valid_loss"]), f"{row['final_valid_accuracy']:.3f}",
            "not reached" if reached is None else number(reached),
            "" if peak is None else f"{peak / 2**20:,.0f}",
        ))  # fmt: skip
    title = f"### One head: {task['num_rows']:,} x {task['num_features']:,} features, "
    title += f"{task['epochs']} epochs, batches of {task['batch_size']}"
    lines = [title, "", *as_table(header, cells, 2), ""]
    if report["same_loss"] is not None:
        lines.append(
            f"The same loss: {report['same_loss']:.4f}, the highest that the {INDEXED} ends with "
            f"over {NUM_SEEDS} seeds ({parity['spread'][0]:.4f} to {parity['spread'][1]:.4f})."
        )
        for name, value in parity["medians"].items():
            if name != INDEXED:
                verdict = "within" if parity["within_spread"][name] else "**NOT within**"
                lines.append(f"Median final loss of {name} there: {value:.4f}, {verdict} it.")
    return lines


def describe_sizes(report: dict[str, Any]) -> list[str]:
    """Return the Markdown lines of the other numbers of rows, and of whole processes."""
    header = ("rows", "batch", "epochs", FEATCACHE, INDEXED, "its time / featcache's")
    cells: list[tuple[object, ...]] = []
    for row in report["sizes"]:
        task, ours, others = row["task"], row[FEATCACHE]["seconds"], row[INDEXED]["seconds"]
        cells.append((
            f"{task['num_rows']:,}", f"{task['batch_size']:,}", task["epochs"], number(ours),
            number(others), number(others / ours),
        ))  # fmt: skip
    lines = ["", "### Other numbers of rows, warm", "", *as_table(header, cells, 0)]
    lines += ["", "### 200 rows, whole processes", ""]
    seconds = {key: median(found) for key, found in report["cold"].items()}
    header = ("process", "seconds", "of `import torch`")
    cells = [(k, number(v), number(v / seconds["import torch"])) for k, v in seconds.items()]
    return lines + as_table(header, cells, 1)


def parse_args() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--ways", help="only those with one of these words in their name: a,b")
    parser.add_argument("--rows", type=int, default=3200, help="training rows")
    parser.add_argument("--valid-rows", type=int, default=800)
    parser.add_argument("--features", type=int, default=1280)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    if min(args.rounds, args.epochs) < 1:
        parser.error("--rounds and --epochs: 1 or more")
    if args.rows < 3 * args.batch_size:
        parser.error("--rows: three batches or more, for the warm-up")
    return args


def main() -> None:
    """Measure all ways; write JSON, a table and a plot."""
    args = parse_args()
    device, load = resolve_device(args.device).torch(), current_load()
    task = Task(
        args.rows, args.valid_rows, args.features, args.batch_size, args.epochs, device.type
    )
    words = args.ways.split(",") if args.ways else [""]
    names = [name for name in WAYS if any(word in name for word in words)]
    rows = measure_ways(names, task, args.rounds)
    best = choose_threads(rows)
    parity = check_parity(best, task)
    same_loss = parity["spread"][1] if "spread" in parity else None
    for row in rows:
        if "samples" in row and same_loss is not None:
            row["seconds_to_same_loss"] = time_to_loss(row["samples"], same_loss)
    report = frame_report(
        "head", device, load, args.rounds, task=vars(task), same_loss=same_loss, parity=parity,
        ways=rows,
    )  # fmt: skip
    if device.type == "cpu" and not args.ways:
        report |= {"sizes": measure_sizes(task, args.rounds), "cold": measure_cold(args.rounds)}
    stem = f"head_{device.type}"
    lines = [describe_machine(report), "", *describe_head(report)]
    if "sizes" in report:
        lines += describe_sizes(report)
    write_report(args.out, stem, report, "\n".join(lines) + "\n")
    draw_head(args.out / f"{stem}.png", report, list(best.values()))
    if not parity.get("within_spread", {}).get(FEATCACHE, True):
        sys.exit("featcache's final losses are not those of the tensor-indexed loop: see the table")


if __name__ == "__main__":
    main()
