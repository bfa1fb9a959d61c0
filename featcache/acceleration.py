"""Whether the compiled kernels are there, and when they are worth their start-up.

They and Pillow give the same pixels, so a process begins with Pillow and changes over when it has
seen enough pixels to be at work on a data set. Importing Numba and loading the kernels from its
cache takes 0.8 s of CPU; compiling them, once on a machine, 5 to 7 s. They save 2 to 8 ms on a PNG
of a megapixel, 1 ms on a JPEG: 300 X-rays in PNG pay for the loading twice over; whoever predicts
a few images never waits for it.

Reads: Numba's cache. Writes: Numba's cache, beside the package or in the user's cache folder.
"""

from __future__ import annotations

import threading

START_PIXELS = 2**26
"""67 million: 32 X-rays of 1024 x 1024, counted once to decode and once to resize."""

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
        if _num_pixels >= START_PIXELS and _starting.acquire(blocking=False):
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
