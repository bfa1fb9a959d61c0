"""A child process that hangs, crashes or is killed costs one image: with real children."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fragile_images import FRAGILE
from PIL import Image

from featcache.errors import ConfigError, DataError, TransientError
from featcache.pixels.images import DecodedImage, PixelRules, decode
from featcache.pixels.isolation import IsolatedDecoder
from featcache.pixels.views import PLAIN

RULES = PixelRules(32)
TIMEOUT = 300  # of anything that must not hang: a child takes most of a second to start


@pytest.fixture
def fragile_children(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(FRAGILE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


def encoded(seed=0, side=40, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 3, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def through(child, data, rules):
    """Return what ``decode`` returns, by way of the child."""
    rendering = child.render(data, [(rules, PLAIN)], bytes(32))
    pixels = rendering.views[0][0]
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    return DecodedImage(pixels, rendering.truncated)


def assert_decodes(child, seed):
    data = encoded(seed)
    assert np.array_equal(through(child, data, RULES).pixels, decode(data, RULES).pixels)


def process(child):
    return child._child


def test_pixels_are_those_of_decode():
    with IsolatedDecoder() as child:
        for data, rules in (
            (encoded(1), RULES),
            (encoded(2, kind="JPEG"), PixelRules(48, "center", "bicubic")),
            (encoded(3, side=3000, kind="BMP"), RULES),  # 27 MB through the pipe
        ):
            found, truth = through(child, data, rules), decode(data, rules)
            assert np.array_equal(found.pixels, truth.pixels)
            assert found.truncated is truth.truncated is False
        first = process(child)
        assert first.poll() is None
        cut_off = encoded(4, kind="JPEG")[:-300]
        kept = PixelRules(32, truncated="keep")
        assert through(child, cut_off, kept).truncated
        assert process(child) is first  # one child for all


def test_large_pixels_come_back():
    with IsolatedDecoder() as child:
        rules = PixelRules(4096)  # 50 MB
        found = through(child, encoded(5), rules)
        assert np.array_equal(found.pixels, decode(encoded(5), rules).pixels)


@pytest.mark.parametrize("data", [b"", b"GIF89a", encoded(kind="JPEG")[:-300], bytes(1000)])
def test_a_bad_image_fails_with_decodes_own_error_and_the_child_goes_on(data):
    with pytest.raises(DataError) as here:
        decode(data, RULES)
    with IsolatedDecoder() as child:
        assert_decodes(child, 1)
        before = process(child)
        with pytest.raises(DataError) as there:
            through(child, data, RULES)
        assert str(there.value) == str(here.value)
        assert there.value.found == here.value.found
        assert_decodes(child, 2)
        assert process(child) is before


def decode_meanwhile(child, data, action):
    """Decode while ``action(process)`` happens to the child that does it."""
    timer = threading.Timer(0.3, lambda: action(process(child)))
    timer.start()
    try:
        return through(child, data, RULES)
    finally:
        timer.join()


needs_signals = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGSTOP")


@needs_signals
def test_a_child_killed_at_work_costs_one_image(fragile_children):
    with IsolatedDecoder() as child:
        assert_decodes(child, 1)
        first = process(child)
        with pytest.raises(DataError, match="crashed"):
            decode_meanwhile(child, encoded() + b"HANG", lambda p: p.kill())
        assert first.poll() == -signal.SIGKILL  # reaped: no zombie
        assert_decodes(child, 2)
        assert process(child).pid != first.pid


@needs_signals
def test_a_child_that_stands_still_costs_one_image():
    with IsolatedDecoder() as child:
        assert_decodes(child, 1)  # however long the child takes to start
        child._seconds = 1
        first = process(child)
        os.kill(first.pid, signal.SIGSTOP)
        rescue = threading.Timer(TIMEOUT, first.kill)  # then it "crashed": no test that hangs
        rescue.start()
        with pytest.raises(DataError, match="hung for"):
            through(child, encoded(2), RULES)
        rescue.cancel()
        assert first.poll() == -signal.SIGKILL
    with IsolatedDecoder() as child:
        assert_decodes(child, 3)


@needs_signals
def test_each_way_to_fail_is_told_apart(fragile_children):
    with IsolatedDecoder() as child:
        assert_decodes(child, 1)
        with pytest.raises(DataError) as crashed:
            through(child, encoded() + b"CRASH", RULES)
        assert_decodes(child, 2)
        with pytest.raises(DataError) as out_of_memory:
            through(child, encoded() + b"BUG", RULES)
        assert_decodes(child, 3)
    # The time it takes to start is counted, but does not matter to one that never answers.
    with IsolatedDecoder(seconds=1) as child, pytest.raises(DataError) as hung:
        through(child, encoded() + b"HANG", RULES)
    assert crashed.value.found == out_of_memory.value.found == "it crashed"
    assert hung.value.found == "it hung for 1 s"
    # the system may have killed it for want of memory; who hangs once hangs again
    kinds = [type(failed.value) for failed in (crashed, out_of_memory, hung)]
    assert kinds == [TransientError, TransientError, DataError]


def test_threads_that_share_a_decoder_get_their_own_pixels():
    wrong = []

    def work(seeds):
        for seed in seeds:
            data = encoded(seed)
            if not np.array_equal(through(child, data, RULES).pixels, decode(data, RULES).pixels):
                wrong.append(seed)
        wrong.append("done")

    with IsolatedDecoder() as child:
        threads = [threading.Thread(target=work, args=(range(i, 150, 3),)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT)
    assert wrong == ["done"] * 3


def test_a_wrong_request_is_not_taken_for_a_wrong_image():
    with pytest.raises(ConfigError):
        PixelRules(32, "fold")  # rules are checked where they are made, not in the child
    with IsolatedDecoder() as child, pytest.raises(DataError):
        through(child, b"", PixelRules(32))


def test_the_child_ends_with_the_block_even_when_it_raises():
    def fail_inside():
        with IsolatedDecoder() as child:
            assert_decodes(child, 1)
            ended.append(process(child))
            raise ZeroDivisionError

    ended = []
    with pytest.raises(ZeroDivisionError):
        fail_inside()
    (last,) = ended
    assert last.returncode is not None
    assert last.stdin.closed
    assert last.stdout.closed


def test_a_thread_that_asks_after_the_end_starts_nothing_that_stays():
    with IsolatedDecoder() as child:
        assert_decodes(child, 1)
    with pytest.raises(DataError, match="crashed"):
        through(child, encoded(2), RULES)
    assert process(child) is None


def test_leaving_while_a_thread_waits_ends_both(fragile_children):
    """The thread holds the decoder's lock and its pipes; neither is pulled from under it."""
    errors = []

    def wait_for_ever(child):
        try:
            through(child, encoded() + b"HANG", RULES)
        except DataError as error:
            errors.append(error.found)

    with IsolatedDecoder() as child:
        assert_decodes(child, 1)
        thread = threading.Thread(target=wait_for_ever, args=(child,))
        thread.start()
        time.sleep(0.3)
        last = process(child)
    thread.join(TIMEOUT)
    assert errors == ["it crashed"]
    assert last.poll() is not None
    assert process(child) is None


def test_nothing_starts_unless_it_is_needed():
    with IsolatedDecoder() as child:
        assert process(child) is None


def test_the_child_ends_when_the_parent_is_killed():
    """A parent that dies without a word leaves no decoder behind."""
    code = """
import sys, time
from featcache.pixels.isolation import IsolatedDecoder
from featcache.pixels.images import PixelRules
from featcache.pixels.views import PLAIN
child = IsolatedDecoder()
try:
    child.render(b"", [(PixelRules(32), PLAIN)], bytes(32))
except Exception:
    print(child._child.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        try:
            pid = int(parent.stdout.readline())
        finally:
            parent.kill()
    deadline = time.monotonic() + TIMEOUT
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] == "Z")


def test_files_in_the_working_folder_are_not_imported(tmp_path, monkeypatch):
    """A folder of images that holds a file ``numpy.py`` is no reason to run it."""
    for name in ("numpy.py", "pickle.py", "PIL.py"):
        (tmp_path / name).write_text("open('ran', 'w').close(); raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    with IsolatedDecoder() as child:
        assert_decodes(child, 1)
    assert not (tmp_path / "ran").exists()
