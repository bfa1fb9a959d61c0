from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from importlib import metadata

import numpy as np
import pytest
import torch
from fork_server import run_code

from featcache import runtime
from featcache.errors import ConfigError
from featcache.runtime import (
    CPU,
    Device,
    Timer,
    available_cores,
    environment_facts,
    exact_fp32,
    held_signals,
    log_line,
    processor_name,
    resolve_device,
)

# --- devices


def pretend(monkeypatch: pytest.MonkeyPatch, *, cuda: int, mps: bool) -> None:
    monkeypatch.setattr(runtime, "_may_have_gpu", lambda: cuda > 0 or mps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "wanted"), [(0, False, "cpu"), (0, True, "mps"), (2, False, "cuda")]
)
def test_auto_takes_the_fastest_device_there_is(
    monkeypatch: pytest.MonkeyPatch, cuda: int, mps: bool, wanted: str
) -> None:
    pretend(monkeypatch, cuda=cuda, mps=mps)
    assert resolve_device() == resolve_device("auto") == Device(wanted)
    assert resolve_device("cpu") == CPU


def test_a_second_gpu_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cuda=2, mps=False)
    assert resolve_device("cuda:1") == Device("cuda", 1)
    with pytest.raises(ConfigError, match=r"cuda:0, cuda:1, cpu, found cuda:2"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "gpu", "", "CPU", "cpu:0"])
def test_a_device_that_is_not_there_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pretend(monkeypatch, cuda=0, mps=False)
    with pytest.raises(ConfigError, match=r"^--device: expected one of auto, cpu, found "):
        resolve_device(name)


# --- exact arithmetic

SETTINGS = """
import os, sys, traceback, warnings
import torch
from featcache.runtime import exact_fp32
warnings.simplefilter("error")
b = torch.backends
getters = {
    "matmul": lambda: b.cuda.matmul.fp32_precision, "conv": lambda: b.cudnn.conv.fp32_precision,
    "rnn": lambda: b.cudnn.rnn.fp32_precision, "all": lambda: b.fp32_precision,
    "cpu matmul": lambda: b.mkldnn.matmul.fp32_precision,
    "cpu conv": lambda: b.mkldnn.conv.fp32_precision,
    "old matmul": lambda: b.cuda.matmul.allow_tf32, "old conv": lambda: b.cudnn.allow_tf32,
    "old cpu": torch.get_float32_matmul_precision,
}

def state():
    found = {}
    for key, get in getters.items():
        try:
            found[key] = get()
        except RuntimeError:  # the caller mixed torch's old and new names: torch refuses to say
            found[key] = "mixed"
    return found

def check():
    exec(sys.argv[1])
    before = state()
    for tf32 in (False, True):
        with exact_fp32(tf32=tf32):
            inside = state()
            with exact_fp32():
                nested = state()
            assert state() == inside, "a nested block must give back the outer one's settings"
        wanted = ["tf32"] if tf32 else ["ieee", "none"]
        assert inside["matmul"] in wanted and inside["conv"] in wanted, (tf32, inside)
        assert nested["matmul"] in ("ieee", "none") and nested["conv"] in ("ieee", "none"), nested
        for key in ("cpu matmul", "cpu conv"):
            assert inside[key] not in ("bf16", "tf32"), (key, inside)
        assert state() == before, (before, state())
    try:
        with exact_fp32():
            raise KeyError
    except KeyError:
        pass
    assert state() == before
check()
"""

CALLERS = {
    "defaults": "pass",
    "old matmul": "b.cuda.matmul.allow_tf32 = True",
    "old conv": "b.cudnn.allow_tf32 = False",
    "old precision high": "torch.set_float32_matmul_precision('high')",
    "old precision medium": "torch.set_float32_matmul_precision('medium')",
    "new everywhere": "b.fp32_precision = 'tf32'",
    "new matmul": "b.cuda.matmul.fp32_precision = 'tf32'",
    "new conv": "b.cudnn.conv.fp32_precision = 'ieee'",
    "new cpu": "b.mkldnn.matmul.fp32_precision = 'bf16'",
}


@pytest.fixture(scope="module")
def caller_results() -> dict[str, str]:
    """One process imports torch and forks a child per caller: the settings are process-wide."""
    script = (
        "import os, sys, json, io, contextlib, traceback, torch, featcache.runtime\n"
        "code, callers = json.loads(sys.argv[1])\n"
        "for name, line in callers.items():\n"
        "    if os.fork() == 0:\n"
        "        sys.argv[1:] = [line]\n"
        "        try: exec(code, {}); result = 'fine'\n"
        "        except BaseException as e: result = f'{type(e).__name__}: {e}'\n"
        "        os.write(1, (json.dumps([name, result]) + '\\n').encode()); os._exit(0)\n"
        "    os.wait()\n"
    )
    done = run_code(script, json.dumps([SETTINGS, CALLERS]))
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("caller", CALLERS)
def test_arithmetic_is_exact_inside_and_the_callers_again_outside(
    caller: str, caller_results: dict[str, str]
) -> None:
    assert caller_results[caller] == "fine"


def test_threads_that_overlap_share_the_arithmetic_and_the_last_one_out_restores_it() -> None:
    """The first thread leaves while the second is still inside: that one stays exact."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = "tf32"
    try:
        second_is_in, first_is_out = threading.Event(), threading.Event()
        found = []

        def second() -> None:
            with exact_fp32():
                second_is_in.set()
                assert first_is_out.wait(300)
                found.append(conv.fp32_precision)

        thread = threading.Thread(target=second)
        with exact_fp32():
            thread.start()
            assert second_is_in.wait(300)
        first_is_out.set()
        thread.join(300)
        assert found == ["ieee"]
        assert conv.fp32_precision == "tf32"
    finally:
        conv.fp32_precision = before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_exact_fp32_is_exact_on_a_gpu() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 64, 32, 32, generator=generator).cuda()
    kernel = torch.randn(64, 64, 3, 3, generator=generator).cuda()
    a, b = images.reshape(-1, 512), kernel.reshape(-1, 512).T
    functions = (torch.nn.functional.conv2d, torch.matmul)
    for function, left, right in zip(functions, (images, a), (kernel, b), strict=True):
        truth = function(left.double(), right.double())
        errors = {}
        for tf32 in (False, True):
            with exact_fp32(tf32=tf32):
                found = function(left, right).double()
            errors[tf32] = float((found - truth).norm() / truth.norm())
        assert errors[False] < 2e-6 < 1e-4 < errors[True]


# --- facts and clocks


def test_the_facts_are_true_and_fit_into_json() -> None:
    facts = environment_facts(torch.device("cpu"))
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["versions"]["torch"] == metadata.version("torch")
    assert facts["versions"]["numpy"] == np.__version__
    assert facts["versions"]["featcache"] == metadata.version("featcache")
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["num_threads"] == torch.get_num_threads()
    assert facts["num_cores"] == available_cores()
    assert facts["device"] == "cpu"
    assert facts["processor"] == processor_name() != ""
    age = datetime.now(UTC) - datetime.fromisoformat(facts["date"])
    assert timedelta(seconds=-2) < age < timedelta(hours=1)
    assert "device" not in environment_facts()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_only_the_cores_this_process_may_use_are_counted() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert available_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert available_cores() == len(allowed)


def test_a_timer_adds_up_by_name_also_when_the_work_fails() -> None:
    timer = Timer()
    for _ in range(2):
        with timer("sleep"):
            time.sleep(0.02)
    with pytest.raises(ValueError, match="x"), timer("failed"):
        raise ValueError("x")
    with timer("outer"), timer("inner"):
        time.sleep(0.01)
    assert timer.seconds["sleep"] >= 0.04
    assert set(timer.seconds) == {"sleep", "failed", "outer", "inner"}
    assert timer.seconds["outer"] >= timer.seconds["inner"] >= 0.01


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    log_line("a line")
    assert capsys.readouterr() == ("", "")


# --- signals

_HELD = """
import signal, sys, time
from featcache.runtime import Interrupted, held_signals
number = signal.{name}
for other in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(other, lambda number, frame: sys.exit(128 + number))
try:
    with held_signals() as check:
        check()
        signal.raise_signal(number)
        print("went on")
        {then}
        print("checked")
except Interrupted as stop:
    print("interrupted by", int(stop.signal_number))
except KeyboardInterrupt:
    print("at once")
except SystemExit as stop:
    print("exit", stop.code)
try:
    signal.raise_signal(number)
except BaseException as stop:
    print("as before:", type(stop).__name__)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize(
    ("name", "then", "lines"),
    [
        ("SIGINT", "check()", ["went on", "interrupted by 2", "as before: KeyboardInterrupt"]),
        ("SIGTERM", "check()", ["went on", "interrupted by 15", "as before: SystemExit"]),
        ("SIGHUP", "check()", ["went on", "interrupted by 1", "as before: SystemExit"]),
        ("SIGINT", "pass", ["went on", "checked", "interrupted by 2", "as before: Keyb"]),
        ("SIGINT", "signal.raise_signal(number)", ["went on", "at once", "as before: Keyb"]),
        ("SIGTERM", "signal.raise_signal(number)", ["went on", "exit 143", "as before: Syst"]),
    ],
)
def test_a_signal_waits_until_it_is_asked_for_and_a_second_one_does_not(
    name: str, then: str, lines: list[str]
) -> None:
    code = _HELD.format(name=name, then=then)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    found = done.stdout.splitlines()
    assert len(found) == len(lines)
    assert all(line.startswith(start) for line, start in zip(found, lines, strict=True))


def test_outside_the_main_thread_nothing_is_held() -> None:
    failed: list[BaseException] = []

    def enter() -> None:
        try:
            with held_signals() as check:
                check()
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert failed == []


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As under nohup: then Ctrl-C is not ours to hear."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held_signals() as check:
            signal.raise_signal(signal.SIGINT)
            check()
    finally:
        signal.signal(signal.SIGINT, before)
