"""Who has made the rows of a cache, where several processes have: lines of its provenance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_WORKER_KINDS = {
    "host": str, "device": str, "parts": int, "processes": int, "images": int, "seconds": float,
    "images_per_second": float,
}  # fmt: skip


def read_workers(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return who has made the rows, where several processes have: a dict by host and device.

    Each has ``host``, ``device``, ``parts`` (of ``--part``, 0 elsewhere), ``processes``,
    ``images``, ``seconds`` (of all processes together) and ``images_per_second`` (of each). What is
    none of these is left out.
    """
    lines = provenance.get("workers")
    return [
        dict(line)
        for line in (lines if isinstance(lines, list) else [])
        if isinstance(line, dict)
        and line.keys() == _WORKER_KINDS.keys()
        and all(type(line[key]) is kind for key, kind in _WORKER_KINDS.items())
    ]


def told_workers(lines: Iterable[Mapping[str, Any]], *devices: str) -> dict[str, Any]:
    """Return what a provenance says of workers: their lines, and the names of all devices.

    Args:
        lines: As ``read_workers`` returns them; those of one host and device become one. The parts
            of an extraction stay apart from the command that merged them.
        *devices: That have made rows besides.
    """
    joined: dict[tuple[str, str, bool], dict[str, Any]] = {}
    for line in lines:
        there = joined.setdefault((line["host"], line["device"], line["parts"] > 0), {})
        for key in ("parts", "processes", "images", "seconds"):
            there[key] = there.get(key, 0) + line[key]
    told = [
        {
            "host": host, "device": device, **sums, "seconds": round(sums["seconds"], 1),
            "images_per_second": round(sums["images"] / max(sums["seconds"], 0.1), 1),
        }
        for (host, device, _), sums in joined.items()
    ]  # fmt: skip
    names = {*devices, *(line["device"] for line in told)}
    return {"workers": told, "device": ", ".join(sorted(names))}


def with_worker(
    provenance: Mapping[str, Any], host: str, device: str, *, is_part: bool, processes: int,
    images: int, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """Return the provenance with what some processes of a host and device have made besides.

    So many processes of an earlier run of the same command are taken for the same ones.
    """
    lines = read_workers(provenance)
    for line in lines:
        if (line["host"], line["device"], line["parts"] > 0) == (host, device, is_part):
            line["processes"] = max(line["processes"], processes)
            line["images"] += images
            line["seconds"] += seconds
            break
    else:
        lines.append(
            {
                "host": host, "device": device, "parts": int(is_part), "processes": processes,
                "images": images, "seconds": seconds,
            }
        )  # fmt: skip
    told = provenance.get("device")
    return {**provenance, **told_workers(lines, *(told.split(", ") if told else ()))}
