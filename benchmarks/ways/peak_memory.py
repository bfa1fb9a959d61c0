"""Run the featcache command with its arguments, then write the process' peak memory to a file.

    python benchmarks/ways/peak_memory.py FILE extract DATA CACHE ...

The peak is the kernel's high-water mark of this very process (VmHWM). ``ru_maxrss`` would not do:
a child inherits its parent's.
"""

import atexit
import sys
from pathlib import Path


def write_peak() -> None:
    """Write the bytes of the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            Path(sys.argv[1]).write_text(str(int(line.split()[1]) * 1024))


atexit.register(write_peak)

from featcache.cli.main import main  # noqa: E402

main(sys.argv[2:])
