"""How often do the intervals of featcache hold the truth, and how wide are they?

    python benchmarks/interval_coverage.py                (about 5 minutes of one core)
    python benchmarks/interval_coverage.py --sets 50 --out try      (a try)

Test sets of 40, 200 and 1,000 images are drawn 2,000 times from a known truth; an interval holds if
the truth lies in it. Without groups only areas are drawn: of all others the binomial distribution
itself gives the coverage. The number of images is that behind the figure: for a recall of 0.95 "40
images" are 40 images of the class. A balanced accuracy, a PPV and an area have half of
the images in each of two classes; both recalls are the true one. PPV is that at a prevalence of
0.05; as both rates are alike, NPV's interval holds as often.

Patients have 1 to 5 images (all as likely; the last one is cut so that the number comes out).
Rates: each patient has a rate of its own, beta distributed, so that two images of a patient are
right together with a correlation of 0.5 or 0.9. Areas: normal scores, of whose variance that share
is the patient's. "Mixed" patients have images of both classes, the others of one.

The functions of featcache.metrics are called as they are. Wishes, declared beforehand: exact
intervals at least 94 % each, Wilson's at least 93 % on average, the others at least 93 % from 200
images on. What is below its wish is marked with * in the table; so is what is below 93 % at 40
images. The exit status is 1 if an exact interval or Wilson's average misses the wish.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from measuring import HERE, as_table, current_load, frame_report, write_report
from scipy import stats

from featcache.metrics.areas import auc_interval
from featcache.metrics.rates import (
    Interval,
    grouped_rate_interval,
    mean_rate_interval,
    rate_interval,
)
from featcache.metrics.thresholds import predictive_value_intervals, predictive_values

SIZES = (40, 200, 1_000)
RATES = (0.8, 0.9, 0.95, 0.98)
AREAS = (0.8, 0.9, 0.97, 0.99)
CORRELATIONS = (0.5, 0.9)
PREVALENCE = 0.05
LARGEST_PATIENT = 5
SEED = 0

Random = np.random.Generator
Cell = dict[str, Any]


# -------------------------------------------------------------------- by the distribution itself


def enumerate_rates(method: str) -> list[Cell]:
    """Return the coverage of a rate's interval without groups; nothing is drawn."""
    cells = []
    for size in SIZES:
        intervals = np.array([rate_interval(hits, size, method=method) for hits in range(size + 1)])
        for rate in RATES:
            chances = stats.binom.pmf(np.arange(size + 1), size, rate)
            cells.append(_weigh(method, size, rate, intervals, chances))
    return cells


def enumerate_means() -> list[Cell]:
    """Return the coverage of the mean of two recalls without groups; nothing is drawn."""
    cells = []
    for size in SIZES:
        half = size // 2
        of_class = [rate_interval(hits, half) for hits in range(half + 1)]
        for rate in RATES:
            chances = stats.binom.pmf(np.arange(half + 1), half, rate)
            likely = np.flatnonzero(chances > 1e-9).tolist()
            pairs = [(i, j) for i in likely for j in likely]
            intervals = np.array([
                mean_rate_interval([i / half, j / half], [of_class[i], of_class[j]])
                for i, j in pairs
            ])  # fmt: skip
            both = np.array([chances[i] * chances[j] for i, j in pairs])
            cells.append(_weigh("balanced accuracy", size, rate, intervals, both))
    return cells


def enumerate_ppv() -> list[Cell]:
    """Return the coverage of PPV without groups; nothing is drawn. Its columns are the rates."""
    cells = []
    for size in SIZES:
        half = size // 2
        of_class = [rate_interval(hits, half) for hits in range(half + 1)]
        for rate in RATES:
            chances = stats.binom.pmf(np.arange(half + 1), half, rate)
            likely = np.flatnonzero(chances > 1e-9).tolist()
            pairs = [(i, j) for i in likely for j in likely if i or j < half]  # else undefined
            intervals = np.array([
                predictive_value_intervals(
                    i / half, j / half, (of_class[i], of_class[j]), PREVALENCE
                )[0]
                for i, j in pairs
            ])  # fmt: skip
            both = np.array([chances[i] * chances[j] for i, j in pairs])
            truth = predictive_values(rate, rate, PREVALENCE)[0] or 0.0
            cells.append(_weigh("ppv at 0.05", size, truth, intervals, both) | {"truth": rate})
    return cells


def _weigh(
    way: str, size: int, truth: float, intervals: npt.NDArray[Any], chances: npt.NDArray[Any]
) -> Cell:
    holds = (intervals[:, 0] <= truth) & (truth <= intervals[:, 1])
    widths = intervals[:, 1] - intervals[:, 0]
    return {
        "way": way, "num_images": size, "truth": truth, "num_sets": None,
        "coverage": float(chances @ holds), "mean_width": float(chances @ widths),
    }  # fmt: skip


# --------------------------------------------------------------------------------------- by drawing


def draw_patients(random: Random, size: int) -> npt.NDArray[np.int64]:
    """Return the number of the patient of each image."""
    counts = random.integers(1, LARGEST_PATIENT + 1, size)
    return np.repeat(np.arange(size), counts)[:size]


def draw_hits(
    random: Random, patients: npt.NDArray[np.int64], rate: float, correlation: float
) -> npt.NDArray[np.bool_]:
    """Return which images are hits, alike within a patient."""
    strength = 1 / correlation - 1
    of_patients = random.beta(rate * strength, (1 - rate) * strength, patients[-1] + 1)
    return random.random(len(patients)) < of_patients[patients]


def grouped_rate(random: Random, size: int, rate: float, correlation: float) -> Interval:
    """Return the interval of a rate of one drawn set."""
    patients = draw_patients(random, size)
    hits = draw_hits(random, patients, rate, correlation)
    return grouped_rate_interval(hits, _names(patients))


def grouped_mean(random: Random, size: int, rate: float, correlation: float) -> Interval:
    """Return the interval of a balanced accuracy of one drawn set; a patient has one class."""
    rates, intervals = [], []
    for _ in range(2):
        patients = draw_patients(random, size // 2)
        hits = draw_hits(random, patients, rate, correlation)
        rates.append(float(hits.mean()))
        intervals.append(grouped_rate_interval(hits, _names(patients)))
    return mean_rate_interval(rates, intervals)


def grouped_ppv(random: Random, size: int, rate: float, correlation: float) -> Interval:
    """Return the interval of PPV of one drawn set, moved so that the truth is the rate."""
    rates, intervals = [], list[Interval]()
    for _ in range(2):
        patients = draw_patients(random, size // 2)
        hits = draw_hits(random, patients, rate, correlation)
        rates.append(float(hits.mean()))
        intervals.append(grouped_rate_interval(hits, _names(patients)))
    pair = intervals[0], intervals[1]
    low, high = predictive_value_intervals(rates[0], rates[1], pair, PREVALENCE)[0] or (0.0, 1.0)
    moved = rate - (predictive_values(rate, rate, PREVALENCE)[0] or 0.0)
    return low + moved, high + moved


def area(random: Random, size: int, truth: float) -> Interval:
    """Return the interval of an area of one drawn set without groups."""
    is_yes = np.arange(size) < size // 2
    return auc_interval(is_yes, random.normal(size=size) + _shift(truth) * is_yes)


def grouped_area(
    random: Random, size: int, truth: float, correlation: float, *, mixed: bool
) -> Interval:
    """Return the interval of an area of one drawn set of patients."""
    if mixed:
        patients = draw_patients(random, size)
        is_yes = random.permutation(np.arange(size) < size // 2)
    else:
        yes, no = draw_patients(random, size // 2), draw_patients(random, size - size // 2)
        patients = np.concatenate([yes, no + yes[-1] + 1])
        is_yes = np.arange(size) < size // 2
    shared = random.normal(size=patients[-1] + 1)[patients]
    noise = math.sqrt(correlation) * shared
    noise += math.sqrt(1 - correlation) * random.normal(size=size)
    scores = noise + _shift(truth) * is_yes
    return auc_interval(is_yes, scores, groups=_names(patients))


def _names(patients: npt.NDArray[np.int64]) -> list[str]:
    return [f"p{number}" for number in patients.tolist()]


def _shift(truth: float) -> float:
    """Return how far apart the means of two normal distributions with such an area are."""
    return math.sqrt(2) * NormalDist().inv_cdf(truth)


def draw(
    way: str, truths: Sequence[float], sets: int, interval: Callable[[Random, int, float], Interval]
) -> list[Cell]:
    """Return the coverage in drawn sets, for each size and truth."""
    cells = []
    for size in SIZES:
        for truth in truths:
            random = np.random.default_rng([SEED, size, round(truth * 100)])
            found = np.array([interval(random, size, truth) for _ in range(sets)])
            cell = _weigh(way, size, truth, found, np.full(sets, 1 / sets))
            cells.append(cell | {"num_sets": sets})
    return cells


# -------------------------------------------------------------------------------------- the report


def measure(sets: int) -> list[Cell]:
    """Return all cells of the table, one way after the other."""
    cells = [*enumerate_rates("wilson"), *enumerate_rates("exact")]
    for c in CORRELATIONS:
        cells += draw(
            f"rate, patients {c}", RATES, sets,
            lambda random, size, truth, c=c: grouped_rate(random, size, truth, c),
        )  # fmt: skip
    cells += enumerate_means()
    for c in CORRELATIONS:
        cells += draw(
            f"balanced accuracy, patients {c}", RATES, sets,
            lambda random, size, truth, c=c: grouped_mean(random, size, truth, c),
        )  # fmt: skip
    cells += enumerate_ppv()
    for c in CORRELATIONS:
        cells += draw(
            f"ppv at 0.05, patients {c}", RATES, sets,
            lambda random, size, truth, c=c: grouped_ppv(random, size, truth, c),
        )  # fmt: skip
    cells += draw("roc auc", AREAS, sets, area)
    for c in CORRELATIONS:
        for mixed in (False, True):
            cells += draw(
                f"roc auc, {'mixed ' * mixed}patients {c}", AREAS, sets,
                lambda random, size, truth, c=c, mixed=mixed:
                    grouped_area(random, size, truth, c, mixed=mixed),
            )  # fmt: skip
    for cell in cells:
        cell["below_wish"] = cell["coverage"] < (0.94 if cell["way"] == "exact" else 0.93)
    return cells


def table_of(cells: Sequence[Cell], truths: Sequence[float]) -> list[str]:
    """Return the lines of the table of some ways, whose truths are the columns."""
    rows = []
    for way in dict.fromkeys(cell["way"] for cell in cells):
        for size in SIZES:
            found = {
                cell["truth"]: cell for cell in cells
                if (cell["way"], cell["num_images"]) == (way, size)
            }  # fmt: skip
            rows.append([way, f"{size:,}", *(_shown(found[truth]) for truth in truths)])
    return as_table(["interval", "images", *map(str, truths)], rows)


def _shown(cell: Cell) -> str:
    return f"{cell['coverage']:.3f}{'*' * cell['below_wish']} ({cell['mean_width']:.3f})"


def main() -> None:
    """Measure, write the report, and say whether the wishes are met."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", type=int, default=2_000)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    if hasattr(os, "nice"):
        os.nice(19)
    torch.set_num_threads(1)
    load, start = current_load(), time.perf_counter()
    cells = measure(arguments.sets)
    of_wilson = [cell["coverage"] for cell in cells if cell["way"] == "wilson"]
    mean_of_wilson = sum(of_wilson) / len(of_wilson)
    lowest_exact = min(cell["coverage"] for cell in cells if cell["way"] == "exact")
    report = frame_report(
        "coverage", torch.device("cpu"), load, 1, seed=SEED, num_sets=arguments.sets,
        seconds=time.perf_counter() - start, mean_of_wilson=mean_of_wilson,
        lowest_exact=lowest_exact, cells=cells,
    )  # fmt: skip
    rates = [cell for cell in cells if cell["truth"] in RATES and "auc" not in cell["way"]]
    areas = [cell for cell in cells if "auc" in cell["way"]]
    drawn = f"{arguments.sets:,} sets a cell; without patients, rates and balanced accuracies by "
    lines = [
        "Coverage of 95 % intervals, and their mean width in brackets.",
        f"{drawn}the binomial distribution itself.",
        "", *table_of(rates, RATES), "", *table_of(areas, AREAS), "",
        f"Wilson's on average {mean_of_wilson:.3f}; exact at least {lowest_exact:.3f}.",
    ]  # fmt: skip
    write_report(arguments.out, "coverage", report, "\n".join(lines) + "\n")
    if lowest_exact < 0.94 or mean_of_wilson < 0.93:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
