"""The start of the kernels: for large jobs, once, beside the work, and without Numba not at all."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from featcache.pixels import acceleration

WITHOUT = """
import importlib.abc, io, sys
import numpy as np
from PIL import Image
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in sys.argv[1:]:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
from featcache.pixels import acceleration
from featcache.pixels.images import PixelRules, decode
acceleration.start()
for seed, kind in enumerate(['PNG', 'JPEG', 'BMP']):
    pixels = np.random.default_rng(seed).integers(0, 256, (70, 90, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    with Image.open(buffer) as image:
        truth = np.asarray(image.convert('RGB').resize((48, 48), Image.Resampling.BILINEAR))
    assert np.array_equal(decode(buffer.getvalue(), PixelRules(48)).pixels, truth)
print(acceleration.start(), *sorted({'numba', 'isal', 'simplejpeg'} & set(sys.modules)))
"""


@pytest.fixture
def unstarted(monkeypatch):
    monkeypatch.setattr(acceleration, "_ready", None)


def acceleration_threads():
    return [t for t in threading.enumerate() if t.name == "featcache-acceleration"]


def test_kernels_start_beside_the_work_if_there_is_enough_of_it(unstarted, monkeypatch):
    begun, finish = threading.Event(), threading.Event()

    def start():
        begun.set()
        assert finish.wait(300)
        acceleration._ready = True

    monkeypatch.setattr(acceleration, "start", start)
    acceleration.start_for(acceleration.WORTH_BYTES - 1)
    assert acceleration_threads() == []
    acceleration.start_for(acceleration.WORTH_BYTES)
    assert begun.wait(300)
    assert not acceleration.is_ready()  # whoever decodes meanwhile goes on without
    (thread,) = acceleration_threads()
    finish.set()
    thread.join(300)
    assert acceleration.is_ready()
    acceleration.start_for(acceleration.WORTH_BYTES)
    assert acceleration_threads() == []  # once is enough


def test_threads_that_start_them_together_all_find_them_ready(unstarted):
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: acceleration.start() and acceleration.is_ready(), range(4)))


def test_a_compiler_that_fails_is_asked_once_and_does_without(unstarted, monkeypatch):
    monkeypatch.setitem(sys.modules, "featcache.pixels.kernels", None)
    monkeypatch.delattr("featcache.pixels.kernels", raising=False)
    assert not acceleration.start()
    assert not acceleration.is_ready()
    assert acceleration._ready is False


@pytest.mark.parametrize("missing", [["numba"], ["isal", "simplejpeg"], ["numba", "isal"]])
def test_without_a_library_the_pixels_are_the_same(missing):
    command = [sys.executable, "-W", "error", "-c", WITHOUT, *missing]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    present = [name for name in ("isal", "numba", "simplejpeg") if name not in missing]
    assert done.stdout.split() == [str("numba" in present), *present]
