"""Whether the compiled kernels are there, and when they are worth their start-up.

They and Pillow give the same pixels, so a process starts with Pillow and changes over once that has
handled as much as would pay for the start-up: importing Numba and loading the kernels from its
cache takes 0.8 s of CPU, compiling them the first time on a machine 7 s. Whoever predicts a few
images never waits for it, and a long run loses under a second.

Reads: Numba's cache. Writes: Numba's cache, beside the package or in the user's cache folder.
"""

from __future__ import annotations

import threading

BREAK_EVEN_PIXELS = 2**27
"""134 million, a hundred X-rays of 1024 x 1280: the kernels save 6 to 10 ns a pixel."""

_starting = threading.Lock()
_num_pixels = 0
_ready: bool | None = None  # None: not tried yet


def accelerated(num_pixels: int) -> bool:
    """Return whether to use the kernels for so many pixels, starting them if it is time.

    Safe in threads: one starts them, the others go on without.
    """
    global _num_pixels  # noqa: PLW0603
    if _ready is None:
        _num_pixels += num_pixels  # two threads may lose one count, which is as good
        if _num_pixels >= BREAK_EVEN_PIXELS and _starting.acquire(blocking=False):
            try:
                start()
            finally:
                _starting.release()
    return bool(_ready)


def start() -> bool:
    """Start the kernels now; return whether they are there."""
    global _ready  # noqa: PLW0603
    if _ready is None:
        # A Python or NumPy too new for Numba is an ImportError; a compiler that fails in any
        # other way must not stop a run that does not need it either.
        try:
            from featcache import kernels  # noqa: F401
        except Exception:  # noqa: BLE001
            _ready = False
        else:
            _ready = True
    return _ready
