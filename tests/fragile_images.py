"""A child process whose decoder dies of certain images."""

from __future__ import annotations

# Read by every python that starts with it on PYTHONPATH: files that end in these bytes hang or
# crash the decoder of a child.
FRAGILE = """
import os, signal, time
import featcache.pixels.views as views

render = views.render

def fragile(data, recipes, sha256):
    if data.endswith(b"HANG"):
        time.sleep(600)
    if data.endswith(b"CRASH"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if data.endswith(b"BUG"):
        raise MemoryError("too large")
    return render(data, recipes, sha256)

views.render = fragile
"""
