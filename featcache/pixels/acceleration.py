"""Whether the compiled kernels are there, and which jobs are worth their start-up.

They and Pillow give the same pixels, so a job begins with Pillow at once and changes over when the
kernels are ready. Importing Numba and loading the kernels from its cache takes 0.8 s of CPU;
compiling them, once on a machine, 5 to 7 s. They save 6 ms on a PNG of a megapixel, 1 ms on a small
JPEG, some 10 s on a gigabyte of files: whoever predicts a few images does without.

Reads: Numba's cache. Writes: Numba's cache, beside the package or in the user's cache folder.
"""

from __future__ import annotations

import threading

WORTH_BYTES = 100 * 10**6
"""Image files from which the kernels pay for being loaded from Numba's cache, and then some."""

_starting = threading.Lock()
_ready: bool | None = None  # None: not tried yet


def is_ready() -> bool:
    """Return whether the kernels can be used."""
    return bool(_ready)


def start() -> bool:
    """Start the kernels now; return whether they are there. Threads that come second wait."""
    global _ready  # noqa: PLW0603
    with _starting:
        if _ready is None:
            # A Python or NumPy too new for Numba is an ImportError; a compiler that fails in any
            # other way must not stop a run that does not need it either.
            try:
                from featcache.pixels import kernels  # noqa: F401
            except Exception:  # noqa: BLE001
                _ready = False
            else:
                _ready = True
    return _ready


def start_for(num_bytes: int) -> None:
    """Start the kernels in the background if image files of so many bytes are worth it."""
    if _ready is None and num_bytes >= WORTH_BYTES:
        threading.Thread(target=start, name="featcache-acceleration", daemon=True).start()
