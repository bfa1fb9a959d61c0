"""How far long work is: a bar on a terminal and in a notebook, elsewhere a log line a minute."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from featcache.formatting import in_time, percent
from featcache.runtime import Say, log_line

LINE_SECONDS = 60.0
"""Between two lines where there is no terminal."""

BAR_AFTER_SECONDS = 1.0
"""Of silence: quick work has no bar, and lines that come fast are not torn by one."""

OF_URLS = False
"""Whether fetches and uploads of caches and runs are for people to see: the command line says."""


class Progress:
    """Counts work that is done, and shows how far it is and how long the rest will take.

    On a terminal and in a notebook that is a bar on standard error, elsewhere a line a minute. With
    ``shown=False`` the line goes to the logger ``featcache``. The bar's text is tqdm's and the
    line's is ``_line``'s; the note stands in both, and comes from whoever does the work.

    Args:
        verb: What is done: ``extract``.
        unit: What is counted, in the singular: ``image``.
        total: How many there are; 0 where that is not known before.
        done: How many of them were done before.
        shown: Whether it is for people to see: ``progress=True``. ``json`` writes the line as a
            JSON object, a last one at the end, and draws no bar.
    """

    def __init__(
        self, verb: str, unit: str, total: int, *, done: float = 0, shown: bool | str
    ) -> None:
        self._verb, self._unit, self._total = verb, unit, total
        self._before = self._done = done
        self._as_json = shown == "json"
        self._note, self._shown = "", bool(shown)
        self._has_bar = shown is True and _can_draw()
        self._bar: Any = None
        self._start = time.monotonic()
        self._next = self._start + (BAR_AFTER_SECONDS if self._has_bar else LINE_SECONDS)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:  # fmt: skip
        self._remove_bar()
        if self._as_json:
            self._write(self._line())

    def move_to(self, done: float, note: str | None = None) -> None:
        """Say how much is done by now.

        Args:
            done: Of the total; parts of one count.
            note: Text that is shown at the end: ``waits for decode``.
        """
        self._done, self._note = (
            min(done, self._total or done),
            self._note if note is None else note,
        )
        if self._bar is not None:
            self._show()
        elif time.monotonic() >= self._next:
            if self._has_bar:
                self._draw_bar()
            else:
                self._next = time.monotonic() + LINE_SECONDS
                self._write(self._line())

    def move_by(self, share: float, note: str | None = None) -> None:
        """Say that so much more is done."""
        self.move_to(self._done + share, note)

    def beside(self, say: Say) -> Say:
        """Return what says a line in place of the bar, which comes back after it."""

        def say_beside(line: str) -> None:
            self._remove_bar()
            say(line)

        return say_beside

    def _rounded(self) -> float:
        """Return what is done with one decimal, without where it is whole."""
        done = round(self._done, 1)
        return int(done) if done == int(done) else done

    def _draw_bar(self) -> None:
        from tqdm import tqdm  # train and evaluate are mostly done before there is a bar

        self._bar = tqdm(
            total=self._total or None, initial=self._before, unit=self._unit, desc=self._verb,
            mininterval=0.3, smoothing=0.1, dynamic_ncols=True, leave=False,
            delay=1e-9,  # not before it knows how far it is
        )  # fmt: skip
        self._bar.start_t = self._bar.last_print_t = time.time() - (time.monotonic() - self._start)
        self._show()
        self._bar.refresh()

    def _show(self) -> None:
        self._bar.set_postfix_str(self._note, refresh=False)
        self._bar.n = self._rounded()
        self._bar.update(0)

    def _remove_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._has_bar:
            self._next = time.monotonic() + BAR_AFTER_SECONDS

    def _line(self) -> str:
        """Return a line for a log: how far, how fast, how long the rest will take."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate, share = (self._done - self._before) / seconds, self._done / max(self._total, 1)
        if self._as_json:
            facts = {
                "time": datetime.now(UTC).isoformat(timespec="seconds"), "verb": self._verb,
                "unit": self._unit, "num_done": self._rounded(),
                "num_total": self._total or None,
                "seconds": round(seconds, 1), f"{self._unit}s_per_second": round(rate, 3),
                "seconds_left": round((self._total - self._done) / rate, 1)
                if rate > 0 and self._total else None,
                "note": self._note,
            }  # fmt: skip
            return json.dumps(facts)
        of_total = f"{self._rounded():,} of {self._total:,} {self._unit}s ({percent(share)})"
        if not self._total:
            of_total = f"{self._rounded():,} {self._unit}s"
        speed = f"{rate:,.1f} {self._unit}s/s"
        if rate < 1:
            speed = f"{60 * rate:,.1f} {self._unit}s/min"
        parts = [f"{self._verb}: {of_total}", speed]
        if rate > 0 and self._total:
            parts.append(f"{in_time((self._total - self._done) / rate)} left")
        return ", ".join([*parts, *filter(None, [self._note])])

    def _write(self, line: str) -> None:
        if not self._shown:
            log_line(line)
            return
        with contextlib.suppress(OSError, ValueError):  # full, or closed
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


def _can_draw() -> bool:
    """Whether a line on standard error can be drawn over: on a terminal, or in a notebook."""
    in_notebook = type(sys.stderr).__module__.startswith("ipykernel")
    return in_notebook or sys.stderr.isatty()
