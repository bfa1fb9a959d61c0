"""A tracker that keeps what it is told in memory."""

from __future__ import annotations

from typing import Any

from featcache.reporting.tracked import Part, Tracked


class MemoryTracker:
    """Runs by their names, each with its parts; ``folder`` is only shown."""

    def __init__(self, folder: Any = "memory") -> None:
        self.place = str(folder)
        self.command = ""
        self.runs: dict[str, dict[str, Part]] = {}
        self.finished: list[str] = []

    def open_run(self, tracked: Tracked, parent: str | None) -> tuple[str, dict[str, str]]:
        name = tracked.name if parent is None else f"{parent}/{tracked.name}"
        parts = self.runs.setdefault(name, {})
        return name, {key: part.sha256 for key, part in parts.items()}

    def write(self, run: str, part: Part) -> None:
        self.runs[run][part.name] = part

    def finish(self, run: str) -> None:
        self.finished.append(run)
