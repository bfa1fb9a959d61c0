"""The pool of daemon threads: results, errors, replacement, cancelling, and the process's end."""

import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError

import pytest

from featcache.threads import Threads, stop_if_asked

PATIENCE = 300
"""Seconds, on the busiest machine; all of it passes only where something hangs."""


def test_results_and_errors_come_back_to_whoever_asked():
    def divide(a, b):
        return a / b

    with Threads("test", 3) as threads:
        good = [threads.submit(divide, i, 2) for i in range(50)]
        bad = threads.submit(divide, 1, 0)
        assert [future.result(PATIENCE) for future in good] == [i / 2 for i in range(50)]
        with pytest.raises(ZeroDivisionError):
            bad.result(PATIENCE)
        assert threads.submit(divide, 4, 2).result(PATIENCE) == 2  # the thread lived through it


def test_all_threads_run_at_once():
    together = threading.Barrier(3)  # that two threads would never pass
    with Threads("test", 3) as threads:
        for future in [threads.submit(together.wait, PATIENCE) for _ in range(3)]:
            future.result(PATIENCE)


def names_of_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_a_hanging_thread_can_be_replaced_and_ends_when_it_returns():
    released = threading.Event()
    # By name: threads of earlier tests may end, and others begin, while this one runs.
    with Threads("hanging", 1) as threads:
        hanging = threads.submit(released.wait, PATIENCE)
        waiting = threads.submit(int)
        time.sleep(0.05)
        assert not waiting.done()
        threads.replace_one()
        assert waiting.result(PATIENCE) == 0
        released.set()
        assert hanging.result(PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while names_of_threads().count("featcache-hanging") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "featcache-hanging" not in names_of_threads()


def test_leaving_cancels_what_has_not_begun():
    released = threading.Event()
    with Threads("test", 1) as threads:
        first = threads.submit(released.wait, PATIENCE)
        while not first.running():
            time.sleep(0.001)
        later = [threads.submit(int) for _ in range(5)]
    assert all(future.cancelled() for future in later)
    released.set()


def test_leaving_waits_for_what_has_begun_if_asked():
    done = []

    def work():
        time.sleep(0.2)
        done.append(1)

    with Threads("test", 1, wait=True) as threads:
        first = threads.submit(work)
        while not first.running():
            time.sleep(0.001)
        later = threads.submit(work)
    assert done == [1]
    assert later.cancelled()


def test_a_long_task_that_asks_ends_when_its_pool_is_left():
    begun = threading.Event()

    def work_for_ever():
        begun.set()
        while True:
            stop_if_asked()

    with Threads("test", 2, wait=True) as threads:
        long = threads.submit(work_for_ever)
        assert begun.wait(PATIENCE)
    with pytest.raises(CancelledError):
        long.result(PATIENCE)
    stop_if_asked()  # outside a pool nobody asks


def test_a_task_that_is_done_keeps_nothing_alive():
    class Large:
        pass

    def forget(_large):
        return None

    with Threads("test", 1) as threads:
        large = Large()
        watch = weakref.ref(large)
        threads.submit(forget, large).result(PATIENCE)
        del large
        deadline = time.monotonic() + PATIENCE
        while watch() is not None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert watch() is None


def test_a_thread_that_hangs_does_not_keep_the_process_from_ending():
    code = (
        "import time\nfrom featcache.threads import Threads\n"
        "with Threads('test', 1) as threads:\n    threads.submit(time.sleep, 600)\n"
        "    time.sleep(0.1)\nprint('done')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.stdout, done.returncode) == ("done\n", 0)
