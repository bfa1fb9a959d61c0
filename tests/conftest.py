"""Shared fixtures: small real images on the disk, a small real backbone, the real X-rays."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import threadpoolctl
import tiny_network
import torch
from blank_pictures import save_blank
from children_here import decode_here, run_here
from command_line import Result
from matplotlib.figure import Figure
from sample_images import write_tree

from featcache import renames as renames_module
from featcache.backbones.backbone import Backbone
from featcache.cli import main as cli
from featcache.data import remote
from featcache.extraction.extraction import extract

# --- torture: short in CI, long by scripts/torture.sh

_TALLY = pytest.StashKey[dict[str, Counter[str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="repetitions at their full numbers")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # of tests that use ONNX Runtime themselves
    # A job in the background of a shell ignores Ctrl-C, and so would every child of the tests.
    # Under nohup it is so with SIGHUP.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    config.stash[_TALLY] = {}


_LONG_FILES = (
    "test_xrays.py", "test_state_machine.py", "test_faults.py", "test_estimator.py",
    "test_killing_decoders.py", "test_hostile_caches.py", "test_kills.py", "test_engine.py",
    "test_worker_kills.py",
)  # fmt: skip
"""The slowest. They begin first: one that begins last has a core to itself while others idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _LONG_FILES)


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """``rounds(short, long)``: how often to try; the second number with ``--long``."""
    return lambda short, long: long if request.config.getoption("--long") else short


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``tally(kind, outcome, number=1)``: counts what is printed as a table at the end."""

    def count(kind: str, outcome: str, number: int = 1) -> None:
        request.config.stash[_TALLY].setdefault(kind, Counter())[outcome] += number

    return count


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the tally of a worker of pytest-xdist to whoever prints it."""
    if hasattr(session.config, "workeroutput"):
        kinds = session.config.stash[_TALLY].items()
        session.config.workeroutput["tally"] = {kind: dict(counts) for kind, counts in kinds}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for kind, counts in getattr(node, "workeroutput", {}).get("tally", {}).items():
        node.config.stash[_TALLY].setdefault(kind, Counter()).update(counts)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    kinds = terminalreporter.config.stash[_TALLY]
    if not kinds:
        return
    terminalreporter.section("torture")
    width = max(map(len, kinds))
    for kind, outcomes in sorted(kinds.items()):
        listed = ", ".join(f"{number:,} {outcome}" for outcome, number in outcomes.most_common())
        terminalreporter.line(f"{kind:<{width}}  {outcomes.total():>7,}  {listed}")


# --- images, a backbone, the X-rays

XRAYS = Path(__file__).parents[2] / "shared" / "data" / "xray-raw"


@pytest.fixture(scope="session")
def xrays() -> Path:
    """The 404 real chest X-rays, in class folders covid, normal, pneumonia."""
    if not XRAYS.is_dir():
        pytest.skip("the real X-rays of ../shared/data are not here")
    return XRAYS


@pytest.fixture(scope="session")
def tiny_backbone() -> Backbone:
    """A backbone of 24 features for 32 x 32 images that takes a millisecond a batch."""
    return tiny_network.build()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Work this small only waits for other threads, and on a busy machine for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpoolctl.threadpool_limits(1):
        yield
    torch.set_num_threads(before)


_SAVE = Figure.savefig


@pytest.fixture(scope="session", autouse=True)
def _blank_pictures() -> Iterator[None]:
    """Compose figures whole, but save them blank: a tenth of the time of every evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save_blank)
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save figures as they are: for tests of what is in the pictures, or of names that go there."""
    monkeypatch.setattr(Figure, "savefig", _SAVE)


@pytest.fixture
def children_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each extraction would start up to three children, at a quarter of a second each."""
    decode_here(monkeypatch)
    run_here(monkeypatch)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Split folders train, valid, test of class folders covid, normal: 46 small images."""
    return write_tree(tmp_path / "data")


@pytest.fixture(scope="session")
def _extracted(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Backbone) -> Path:
    folder = tmp_path_factory.mktemp("extracted")
    extract(write_tree(folder / "data"), folder / "c.h5", backbone=tiny_backbone)
    return folder / "c.h5"


@pytest.fixture
def cache_of_tree(tree: Path, tmp_path: Path, _extracted: Path) -> Path:
    """The cache of ``tree``, by ``tiny_backbone``: c.h5 beside it, a copy of one made once."""
    return shutil.copyfile(_extracted, tmp_path / "c.h5")


@pytest.fixture(params=["renameat2", "without"])
def renames(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the calls that refuse to replace, and that exchange two names."""
    if request.param == "without":

        def fail(*_: object) -> None:
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr(renames_module, "_rename_by", fail)


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Any]:
    """Call the command line in this process, inside ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    show = warnings.showwarning

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        with warnings.catch_warnings():
            code = cli._run([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return Result(code, out, err)

    yield call
    warnings.showwarning = show


@pytest.fixture
def memory() -> str:
    """A URL of a new folder in memory."""
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is asked of a store again be asked at once."""
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
