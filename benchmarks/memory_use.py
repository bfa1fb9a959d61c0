"""The part ``memory`` of ``extract.py``: the peak of few and of many small images."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from make_images import write_images
from measuring import HERE, as_table, number, run_cold

KIND = "jpeg-64x64"


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Return the peak memory of extractions of few and of many small images."""
    rows = []
    command = HERE / "ways" / "peak_memory.py"
    with tempfile.TemporaryDirectory(prefix="featcache-benchmark-") as name:
        folder = Path(name)
        for num_images in args.memory_images:
            data, peak = folder / f"images{num_images}", folder / "peak"
            write_images(data, KIND, num_images)
            done = run_cold(
                command, peak, "extract", data, folder / f"{num_images}.h5", "--backbone",
                "python:tiny_backbone:build", "--device", "cpu", "--json", "--quiet",
            )  # fmt: skip
            found = json.loads(done["output"])
            rows.append(
                {
                    "num_images": found["num_images"],
                    "peak_bytes": int(peak.read_text()),
                    "seconds": done["seconds"],
                    "images_per_second": found["images_per_second"],
                }
            )
    return {"kind": KIND, "rows": rows}


def describe_memory(part: dict[str, Any]) -> list[str]:
    """Return the Markdown lines."""
    rows = [
        (f"{r['num_images']:,}", f"{r['peak_bytes'] / 2**20:.0f}", number(r["seconds"]),
         number(r["images_per_second"]))
        for r in part["rows"]
    ]  # fmt: skip
    first, last = part["rows"][0], part["rows"][-1]
    more = last["num_images"] - first["num_images"]
    header = ("images of 64 x 64", "peak MiB", "seconds", "images/s, running")
    lines = ["### Memory of an extraction (a network of no cost)", "", *as_table(header, rows), ""]
    if more:
        growth = (last["peak_bytes"] - first["peak_bytes"]) / more
        lines.append(f"Each further image takes {growth:,.0f} bytes.")
    return lines
