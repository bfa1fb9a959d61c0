"""Start the compiled kernels, where enough images make it worth it.

Kernels and Pillow give the same pixels, so a job starts with Pillow and switches over when the
kernels are ready. Importing Numba and loading the kernels from its cache takes 0.8 s of CPU;
compiling them, once on a machine, 5 to 7 s. They save 6 ms on a PNG of a megapixel, 1 ms on a small
JPEG, some 10 s on a gigabyte of files. Predicting a few images does not use them.

Reads: Numba's cache. Writes: Numba's cache, beside the package or in the user's cache folder.
"""

from __future__ import annotations

import threading

WORTH_BYTES = 100 * 10**6
"""Bytes of image files from which the kernels save more time than loading them takes."""

_starting = threading.Lock()
_ready: bool | None = None  # None: not tried yet


def is_ready() -> bool:
    """Return whether the kernels can be used."""
    return bool(_ready)


def start() -> bool:
    """Start the kernels now and return whether they can be used. Other threads wait."""
    global _ready  # noqa: PLW0603
    with _starting:
        if _ready is None:
            # ImportError: Python or NumPy is too new for Numba. Any other failure of the compiler
            # must not stop a run either, as it can do without.
            try:
                from featcache.pixels import kernels  # noqa: F401
            except Exception:  # noqa: BLE001
                _ready = False
            else:
                _ready = True
    return _ready


def start_for(num_bytes: int) -> None:
    """Start the kernels in the background if there are enough bytes of image files."""
    if _ready is None and num_bytes >= WORTH_BYTES:
        threading.Thread(target=start, name="featcache-acceleration", daemon=True).start()
