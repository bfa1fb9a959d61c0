"""Every file-system call fails once, the process is killed or the power cut between any two.

The real code writes a real folder through ``model_disk``. Whatever is left of it, the same command
again must end with exactly what an uninterrupted run gives, and nothing may lie in the meantime.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from featcache import files, locking, output_folders
from featcache.backbones.backbone import Backbone
from featcache.cache import hdf5
from featcache.cache.reading import open_cache
from featcache.errors import FeatcacheError
from featcache.extraction import manifest, partial_cache, shards
from featcache.extraction.extraction import extract
from featcache.extraction.manifest import Receipt
from featcache.extraction.partial_cache import PartialCache
from featcache.files import write_json
from featcache.heads.run_writing import run_output
from featcache.output_folders import new_folder
from featcache.outputs import Output

fcntl = pytest.importorskip("fcntl", reason="flock and posix_fallocate: Linux")

from model_disk import FAULTS, Disk, Files, read_files, suits, write_files  # noqa: E402
from shortcuts import take_shortcuts  # noqa: E402

NUM_IMAGES = 8


@pytest.fixture(scope="module", autouse=True)
def fast() -> Iterator[None]:
    with take_shortcuts(rows_per_shard=3):
        yield


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is room: a disk takes a third of the time to forget 20,000 files."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < 32 << 20:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="featcache-faults-") as folder:
        yield Path(folder)


# ------------------------------------------------------------------------------------ scenarios

Content = dict[str, bytes]


@dataclass(frozen=True)
class Scenario:
    """Something that writes: what is there before, what it does, what must come out."""

    name: str
    start: Files
    run: Callable[[Path], int]  # returns how much work it did
    read: Callable[[Path], Content | None]  # what stands under the final name
    old: Content | None
    new: Content
    work: int
    is_refused: Callable[[FeatcacheError], bool] = lambda _: False
    may_be_away: bool = False  # between the two renames that replace a folder


def read_cache(root: Path) -> Content | None:
    path = root / "c.h5"
    if not path.exists():
        return None
    cache = open_cache(path)
    arrays = cache.container.arrays
    return {name: cache.container.read(name).tobytes() for name in arrays if name != "provenance"}


def read_run(root: Path) -> Content | None:
    folder = root / "run"
    return {k: v or b"" for k, v in read_files(folder).items()} if folder.exists() else None


def save_image(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 24), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    import tiny_network

    return tiny_network.build()


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory, backbone: Backbone) -> dict[str, Scenario]:
    base = tmp_path_factory.mktemp("faults")
    data = base / "data"
    for i in range(NUM_IMAGES):
        save_image(data / ("train" if i < 5 else "valid") / "ab"[i % 2] / f"{i}.png", i)
    less = base / "less"
    shutil.copytree(data, less)
    for other in ("train/a/0", "train/b/1", "train/a/2", "valid/b/5"):
        save_image(less / f"{other}.png", 99 + len(other) + int(other[-1]))
    (less / "valid" / "a" / "6.png").rename(less / "train" / "b" / "moved.png")
    save_image(less / "valid" / "a" / "gone.png", 111)

    def extract_to(root: Path, source: Path = data) -> int:
        summary = extract(
            source, root / "c.h5", backbone=backbone, engine="folded", batch_size=1, workers=1
        )
        return summary.num_new

    def start_of(name: str, run: Callable[[Path], object]) -> Files:
        root = write_files(base / name, {})
        run(root)
        return read_files(root)

    def killed_after_two_shards() -> Files:
        with Disk(write_files(base / "killed", {})) as disk, promises(disk):
            extract_to(disk.root)
        return disk.after_kill(disk.marks[1][0])

    def write_run(root: Path, text: str, *, overwrite: bool) -> int:
        with new_folder(run_output(root / "run", overwrite=overwrite, inputs=[])) as folder:
            (folder / "head.safetensors").write_bytes(text.encode() * 3000)
            (folder / "evaluation").mkdir()
            write_json(folder / "evaluation" / "test.json", {"is": text})
            write_json(folder / "run.json", {"is": text, "format": "featcache-run"})
        return 0

    def cached(name: str, start: Files) -> Scenario:
        root = write_files(base / f"{name} old", start)
        old = read_cache(root)
        work = extract_to(root)
        new = read_cache(root)
        assert new is not None
        return Scenario(name, start, extract_to, read_cache, old, new, work)

    def trained(name: str, start: Files, *, overwrite: bool) -> Scenario:
        def run(root: Path) -> int:
            return write_run(root, "new", overwrite=overwrite)

        root = write_files(base / f"{name} old", start)
        old = read_run(root)
        run(root)
        new = read_run(root)
        assert new is not None
        return Scenario(
            name, start, run, read_run, old, new, 0, may_be_away=True,
            is_refused=lambda error: not overwrite and "--overwrite" in str(error),
        )  # fmt: skip

    older = start_of("an older run", lambda root: write_run(root, "old", overwrite=False))
    made = [
        cached("first run", {}),
        cached("resumed run", killed_after_two_shards()),
        cached("update", start_of("an older cache", lambda root: extract_to(root, less))),
        trained("run folder", {}, overwrite=False),
        trained("run overwritten", older, overwrite=True),
    ]
    assert [scenario.work for scenario in made] == [8, 2, 4, 0, 0]
    return {scenario.name: scenario for scenario in made}


@contextlib.contextmanager
def promises(disk: Disk) -> Iterator[None]:
    """Note on the disk how many rows a shard that was acknowledged has."""
    add_shard = PartialCache.add_shard

    def add(self: PartialCache, receipt: Receipt) -> Any:
        result = add_shard(self, receipt)
        disk.mark(receipt.num_rows)
        return result

    with mock.patch.object(PartialCache, "add_shard", add):
        yield


# ---------------------------------------------------------------------------------------- sweep


class CaughtError(Exception):
    """The violation that a sweep was to find."""


class Sweep:
    """Runs a scenario to every end it can come to, and on from there; collects what is wrong."""

    def __init__(
        self, scenario: Scenario, folder: Path, count: Callable[..., None], until: str | None = None
    ) -> None:
        self.scenario, self.folder, self.count, self.until = scenario, folder, count, until
        self.violations: Counter[str] = Counter()
        self._examples: dict[str, str] = {}
        self._number = 0
        self._known: dict[str, list[str]] = {}

    def _fresh(self, state: Files) -> Path:
        self._number += 1
        return write_files(self.folder / str(self._number), state)

    def watch(self, fail_at: int | None = None, fault: str = "") -> tuple[Disk, str, Files]:
        """Run the scenario once; return the log, how it ended, and what lies there then."""
        root = self._fresh(self.scenario.start)
        end = "done"
        with Disk(root, fail_at, fault) as disk, promises(disk):
            try:
                self.scenario.run(root)
            except KeyboardInterrupt:
                end = "interrupted"
            except (FeatcacheError, OSError) as error:  # the command line makes one line of both
                end = type(error).__name__
            except Exception as error:  # noqa: BLE001 (whatever it is, people would see it)
                end = f"a traceback of {type(error).__name__}"
        left = read_files(root)
        assert disk.complete() == left, "the model disk missed a call"
        shutil.rmtree(root)
        return disk, end, left

    def crash_everywhere(self, seeds: range) -> None:
        """Kill, and cut the power, before every call and after the last."""
        disk, end, _ = self.watch()
        assert end == "done"
        for call in range(len(disk.calls) + 1):
            self.check("killed", disk, call, disk.after_kill(call))
            if disk.calls[call : call + 1] == ["write"]:
                self.check("killed", disk, call, disk.after_kill(call, half=True))
            is_end = call == len(disk.calls)  # one position, where everything has been promised
            for seed in range(max(8, len(seeds))) if is_end else seeds:
                rng = random.Random(f"{seed} {call}")
                self.check("power cut", disk, call, disk.after_power_cut(call, rng))

    def fail_everywhere(
        self, seeds: range, *, all_faults: bool, among: Sequence[str] = FAULTS
    ) -> None:
        """Let every call fail; then end there, or be killed or lose power on the way out.

        Without ``all_faults`` every fourth call fails, by one fault.
        """
        calls = self.watch()[0].calls
        for call, kind in list(enumerate(calls))[:: 1 if all_faults else 4]:
            faults = [fault for fault in among if suits(fault, kind)]
            if not all_faults:
                faults = faults[call // 4 % len(faults) :][:1] if faults else []
            for seed in seeds:
                for fault in faults:
                    self.fail(call, fault, random.Random(f"{seed} {call} {fault}"))

    def fail(self, call: int, fault: str, rng: random.Random) -> None:
        disk, end, left = self.watch(call, fault)
        if not disk.has_failed:
            return
        if end == "done" and fault.startswith("Ctrl-C"):
            self._note(f"{fault}: not heard", disk, call + 1)
        if end.startswith("a traceback"):
            self._note(f"{fault}: {end}", disk, call + 1)
        last = len(disk.calls)
        is_done = end == "done"
        self.check(fault, disk, last, left, is_done=is_done)
        on_the_way = rng.randint(call + 1, last)
        self.check(fault, disk, on_the_way, disk.after_kill(on_the_way))
        cut = rng.choice([last, on_the_way])
        state = disk.after_power_cut(cut, rng)
        self.check(fault, disk, cut, state, is_done=is_done and cut == last)

    def check(
        self, how: str, disk: Disk, call: int, state: Files, *, is_done: bool | None = None
    ) -> None:
        """Check what is left after some calls of a run, and what the same command makes of it."""
        if is_done is None:  # only a run without faults is sure to be done at its last call
            is_done = call == len(disk.calls) and not disk.has_failed
        promised = sum(rows for number, rows in disk.marks if number <= call)
        removing = any(
            name.startswith(("shard.", "manifest.")) and inode is None and len(change.names) == 1
            for change in disk.changes
            if change.call < call
            for _, name, inode in change.names
        )
        key = hashlib.sha256(
            repr((sorted(state.items()), is_done, promised, removing)).encode()
        ).hexdigest()
        if key not in self._known:
            self._known[key] = list(self._wrong(state, promised, is_done, removing))
        for wrong in self._known[key]:
            self._note(f"{how}: {wrong}", disk, call)
        outcome = "violations" if self._known[key] else "right afterwards"
        self.count(f"fault: {how}", outcome)

    def _note(self, what: str, disk: Disk, call: int) -> None:
        self.violations[what] += 1
        fault = "" if disk.fail_at is None else f"{disk.fault} at call {disk.fail_at}, "
        last = " ".join(disk.calls[max(0, call - 3) : call])
        self._examples.setdefault(what, f"{fault}then after call {call}: {last}")
        if self.until is not None and self.until in what:
            raise CaughtError

    def describe(self) -> str:
        """Return a line per kind of violation, with the first place it was seen at."""
        found = self.violations.most_common()
        return "\n".join(f"{n} x {what} ({self._examples[what]})" for what, n in found)

    def _wrong(self, state: Files, promised: int, is_done: bool, removing: bool) -> Iterator[str]:
        scenario = self.scenario
        root = self._fresh(state)
        try:
            found = scenario.read(root)
        except FeatcacheError as error:
            yield f"a final name that is refused: {error.what}"
            found = None
        if found is None and scenario.old is not None and not scenario.may_be_away:
            yield "what was there is gone"
        if found not in (None, scenario.old, scenario.new):
            yield "neither what was there nor what was made"
        if is_done and found != scenario.new:
            yield "a false done"
        if not removing:
            yield from _broken_promises(state)
        try:
            with mock.patch.object(os, "fsync"), mock.patch.object(os, "getpid", return_value=2000):
                work = scenario.run(root)
        except FeatcacheError as error:
            if not scenario.is_refused(error) or found != scenario.new:
                yield f"the same command again is refused: {error}"
            return
        except Exception as error:  # noqa: BLE001 (so it is here)
            yield f"the same command again ends with a traceback of {type(error).__name__}"
            return
        if scenario.read(root) != scenario.new:
            yield "the same command again ends otherwise"
        if work > scenario.work - promised:
            yield "promised work was lost"
        left = {name for name in read_files(root) if "/" not in name}
        if left - {"c.h5", "run"}:
            yield f"left behind: {sorted(name.split('.')[-1] for name in left - {'c.h5', 'run'})}"
        shutil.rmtree(root)


def _broken_promises(state: Files) -> Iterator[str]:
    """Whatever a manifest lists is there, whole."""
    text = state.get("c.h5.partial/manifest.json")
    if text is None:
        return
    try:
        listed = json.loads(text)["shards"]
    except ValueError:
        yield "a manifest that cannot be read"
        return
    for shard in listed:
        data = state.get(f"c.h5.partial/{shard['file']}")
        if data is None or hashlib.sha256(data).hexdigest() != shard["sha256"]:
            yield "the manifest lists a shard that is not whole"


NAMES = ["first run", "resumed run", "update", "run folder", "run overwritten"]


@pytest.mark.parametrize("name", NAMES)
def test_whatever_fails_the_same_command_again_ends_right(
    name: str,
    scenarios: dict[str, Scenario],
    tmp_path: Path,
    tally: Callable[..., None],
    rounds: Callable[[int, int], int],
) -> None:
    sweep = Sweep(scenarios[name], tmp_path, tally)
    seeds = range(rounds(1, 4))
    sweep.crash_everywhere(seeds)
    sweep.fail_everywhere(seeds, all_faults=len(seeds) > 1)
    if sweep.violations:
        pytest.fail(sweep.describe(), pytrace=False)


# ------------------------------------------------------------------- careless code must be caught


def careless_writer(
    *, sync: bool = True, sync_folder: bool = True, rename: bool = True, buffering: int = -1
) -> Callable[[Path], Any]:
    """Return an ``atomic_writer`` that forgets something."""

    @contextlib.contextmanager
    def writer(path: Path, publish: Callable[[Path], object] | None = None) -> Iterator[Any]:
        temporary = path.with_name(f".{path.name}.{os.getpid():016}.tmp") if rename else path
        try:
            with temporary.open("wb", buffering) as file:
                yield file
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            if rename:
                temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if sync_folder:
            files.sync_folder(path.parent)

    return writer


class LateShards:
    """Writes a shard only when the manifest that lists it is there."""

    def __init__(self) -> None:
        self._late: dict[Path, bytes] = {}

    def write_bytes(self, path: Path, data: bytes) -> None:
        if path.name.startswith("shard."):
            self._late[path] = data
            return
        files.write_bytes(path, data)
        while self._late:
            files.write_bytes(*self._late.popitem())

    def is_whole(self, folder: Path, receipt: Receipt) -> bool:
        late = self._late.get(folder / receipt.file)
        if late is None:
            return IS_WHOLE(folder, receipt)
        return hashlib.sha256(late).hexdigest() == receipt.sha256


def writer_is(writer: Callable[[Path], Any]) -> list[tuple[Any, str, Any]]:
    return [(files, "atomic_writer", writer), (hdf5, "atomic_writer", writer)]


def forget_the_old(
    self: Output, temporary: Path, *, publish: Callable[..., Any] = Output.publish
) -> None:
    """Stand for ``Output.publish``, and do not say where the old run lies now."""
    publish(self, temporary)


IS_WHOLE = shards.is_whole
LATE = LateShards()
MUTANTS: dict[str, tuple[str, list[tuple[Any, str, Any]], str]] = {
    "no fsync of a file": (
        "first run", writer_is(careless_writer(sync=False)),
        "power cut: a final name that is refused",
    ),
    "no fsync of a folder": (
        "first run", writer_is(careless_writer(sync_folder=False)), "power cut: a false done"
    ),
    "no fsync of the folder that a folder is made in": (
        "first run", [(files, "sync_folder", lambda _: None)], "power cut: promised work was lost"
    ),
    "a shard that is listed before it is there": (
        "first run",
        [
            (shards, "write_bytes", LATE.write_bytes), (manifest, "write_bytes", LATE.write_bytes),
            (partial_cache, "is_whole", LATE.is_whole),
        ],
        "killed: the manifest lists a shard that is not whole",
    ),
    "a short write that is believed": (
        "first run", writer_is(careless_writer(buffering=0)), "short: "
    ),
    "a file written under its final name": (
        "first run", writer_is(careless_writer(rename=False)),
        "killed: a final name that is refused",
    ),
    "work thrown away when resuming fails": (
        "resumed run", [(PartialCache, "is_worthless", True)], "EIO: promised work was lost"
    ),
    "a run's folder without fsync": (
        "run folder",
        [(module, "sync_folder", lambda _: None) for module in (output_folders, locking)],
        "power cut: a false done"
    ),
    "an old run that stays": (
        "run overwritten", [(Output, "publish", forget_the_old)], "killed: left behind"
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_careless_code_is_caught(
    mutant: str, scenarios: dict[str, Scenario], tmp_path: Path, tally: Callable[..., None]
) -> None:
    name, patches, expected = MUTANTS[mutant]
    sweep = Sweep(scenarios[name], tmp_path, lambda *_: None, until=expected)
    found = False
    with contextlib.ExitStack() as stack:
        for owner, attribute, value in patches:
            stack.enter_context(mock.patch.object(owner, attribute, value))
        try:
            fault = expected.partition(":")[0]
            if fault in FAULTS:
                sweep.fail_everywhere(range(1), all_faults=True, among=[fault])
            else:
                sweep.crash_everywhere(range(1))
        except CaughtError:
            found = True
    tally("fault: careless code", "caught" if found else "missed")
    assert found, f"expected {expected}, found {sweep.describe() or 'nothing'}"
