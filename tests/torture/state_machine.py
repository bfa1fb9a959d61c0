"""The state machine: images change, runs crash, files are damaged, and extract is called again.

After every extraction each row is compared with what a few independent lines (Pillow and the plain
network) make of the image's bytes as they are on the disk now, and the forward passes are counted:
as many as there are new contents.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import numpy as np
import numpy.typing as npt
import tiny_network
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from model_disk import Disk, Files, read_files, write_files
from PIL import Image
from shortcuts import Shortcuts

from featcache.backbones.backbone import Backbone, wrap_backbone
from featcache.cache.reading import Cache, open_cache
from featcache.data.dataset import ImageDataset, Sample, Samples
from featcache.errors import FeatcacheError, FeatcacheWarning
from featcache.extraction import extraction, work
from featcache.extraction.recipe import make_recipe

SPLITS = ("train", "valid")
NAMES = ("p0_0", "p0_1", "p1_0", "p1_1")


# ------------------------------------------------------------------------------ contents, recipes


def make_contents() -> list[bytes]:
    """Return image files: six of one size, as only BMP gives them, two others, two broken."""
    made = []
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels[:, :, 0] if number == 5 else pixels).save(
            file, "BMP" if number < 7 else "PNG"
        )
        made.append(file.getvalue())
    return [*made, b"broken".ljust(len(made[0]), b"."), made[7][:60]]


CONTENTS = make_contents()
BROKEN = set(CONTENTS[-2:])
NUM_GOOD = len(CONTENTS) - 2


@dataclass(frozen=True)
class Settings:
    """What decides the features' values."""

    backbone: int = 0
    feature_dtype: str = "float32"
    views: int = 1
    bit_depth: int = 16

    @cached_property
    def fingerprint(self) -> str:
        """What a cache of these settings is known by."""
        about_pixels = {k: v for k, v in self.options().items() if k != "backbone"}
        dataset = ImageDataset(Path(), "splits", (), Samples([Sample("", 0, "train", None, 0, 0)]))
        return make_recipe(backbones()[self.backbone], dataset, **about_pixels).fingerprint

    def options(self) -> dict[str, Any]:
        """Return them as ``extract`` takes them."""
        augment = None if self.views == 1 else "flip"
        return {
            "backbone": backbones()[self.backbone], "feature_dtype": self.feature_dtype,
            "views": self.views, "augment": augment, "bit_depth": self.bit_depth,
        }  # fmt: skip


RECIPES = (
    Settings(), Settings(backbone=1), Settings(backbone=2), Settings(feature_dtype="float16"),
    Settings(views=2), Settings(bit_depth=12),
)  # fmt: skip


@cache
def backbones() -> list[Backbone]:
    network = tiny_network.network()
    return [
        wrap_backbone("tiny", network, image_size=16),
        wrap_backbone("tiny", network, image_size=16, mean=(0.5,) * 3, std=(0.5,) * 3),
        wrap_backbone("tiny", network, image_size=12),
    ]


@cache
def truth(content: bytes, recipe: Settings, num_views: int) -> npt.NDArray[Any]:
    """Return the features (V, D) of an image file by another way than featcache's."""
    backbone = backbones()[recipe.backbone]
    side = backbone.image_size
    with Image.open(io.BytesIO(content)) as image:
        small = np.array(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))
    views = np.stack([small, small[:, ::-1]][:num_views])
    pixels = torch.from_numpy(views).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbone.mean, backbone.std))
    with torch.inference_mode():
        features = tiny_network.network().eval()((pixels - mean) / std).numpy()
    return features.astype(recipe.feature_dtype)


# ---------------------------------------------------------------------------------------- machine

KINDS = ("put", "change_in_secret", "move", "copy", "remove", "toggle_class")


class Edit(NamedTuple):
    """Something done to the images: to which one, with what content, where to."""

    kind: str
    file: int
    content: int
    split: str
    place: int
    name: str


contents_ = st.integers(0, len(CONTENTS) - 1)
edits_ = st.builds(
    Edit, st.sampled_from(KINDS), st.integers(0, 11), contents_, st.sampled_from(SPLITS),
    st.integers(0, 2), st.sampled_from(NAMES),
)  # fmt: skip
seldom_ = st.sampled_from([False, False, False, True])


class Machine(RuleBasedStateMachine):
    """Two splits of two classes, sometimes three, in a folder; beside it a cache."""

    counts: ClassVar[Counter[str]] = Counter()
    shortcuts: ClassVar[Shortcuts]
    base: ClassVar[Path]

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=self.base))
        self.data, self.out = self.root / "data", self.root / "out"
        self.path = self.out / "c.h5"
        self.clock = 1_700_000_000_000_000_000
        self.recipe = RECIPES[0]
        # Contents that a file was seen with by some run, by what an unchanged file is known by.
        self.seen: dict[tuple[str, int, int], set[bytes]] = {}
        self.damaged = False
        self.pid = 1000
        self.out.mkdir()
        self.counts["machines"] += 1

    def teardown(self) -> None:
        try:
            self._extract_and_check(rehash=True, rebuild=False)
        finally:
            shutil.rmtree(self.root)

    # ------------------------------------------------------------------------------ images

    @initialize(contents=st.lists(contents_, min_size=6, max_size=6))
    def begin(self, contents: list[int]) -> None:
        for i, content in enumerate(contents):
            first = i < 4  # of its class and split: readable
            path = self.data / SPLITS[i % 2] / "bc"[i // 2 % 2] / f"{NAMES[i // 4]}.bmp"
            self._write(path, content % NUM_GOOD if first else content)

    @property
    def images(self) -> list[Path]:
        return sorted(self.data.rglob("*.bmp"))

    @property
    def class_names(self) -> list[str]:
        return sorted(folder.name for folder in (self.data / "train").iterdir())

    def _place(self, split: str, number: int, name: str) -> Path:
        names = self.class_names
        return self.data / split / names[number % len(names)] / f"{name}.bmp"

    def _write(self, path: Path, content: int, time: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENTS[content])
        self.clock += 1_000_000_000
        os.utime(path, ns=(time or self.clock, time or self.clock))

    def _pick(self, number: int) -> Path:
        images = self.images
        return images[number % len(images)]

    def _is_needed(self, path: Path) -> bool:
        return len(list(path.parent.iterdir())) == 1  # an empty class folder is refused

    @rule(edits=st.lists(edits_, min_size=2, max_size=6))
    def edit(self, edits: list[Edit]) -> None:
        for edit in edits:
            path, target = self._pick(edit.file), self._place(edit.split, edit.place, edit.name)
            getattr(self, f"_{edit.kind}")(path, target, edit.content)

    def _put(self, _: Path, target: Path, content: int) -> None:
        """Add an image, or change one."""
        self._write(target, content)

    def _change_in_secret(self, path: Path, _: Path, content: int) -> None:
        """Change an image to one of the same size, and set its time back."""
        if len(CONTENTS[content]) == path.stat().st_size:
            self._write(path, content, path.stat().st_mtime_ns)

    def _move(self, path: Path, target: Path, _: int) -> None:
        """Rename an image, or move it to another class or split, with its time."""
        if not self._is_needed(path):
            path.rename(target)

    def _copy(self, path: Path, target: Path, content: int) -> None:
        if path != target:
            time = path.stat().st_mtime_ns if content % 2 else None
            self._write(target, CONTENTS.index(path.read_bytes()), time)

    def _remove(self, path: Path, _: Path, __: int) -> None:
        if not self._is_needed(path):
            path.unlink()

    def _toggle_class(self, _: Path, __: Path, content: int) -> None:
        """Add or remove a class that sorts first: every target is another."""
        for split in SPLITS:
            folder = self.data / split / "a"
            if folder.exists():
                shutil.rmtree(folder)
            else:
                self._write(folder / f"{NAMES[0]}.bmp", content % NUM_GOOD)

    @rule(recipe=st.sampled_from(RECIPES))
    def configure(self, recipe: Settings) -> None:
        self.recipe = recipe

    # ------------------------------------------------------------------------------ caches

    @rule(insist=st.booleans())
    def update(self, insist: bool) -> None:
        """Extract; some do as the refusal says."""
        if not self._extract_and_check(rehash=False, rebuild=False) and insist:
            self._extract_and_check(rehash=False, rebuild=True)

    @rule(rehash=seldom_, rebuild=seldom_)
    def extract(self, rehash: bool, rebuild: bool) -> None:
        self._extract_and_check(rehash=rehash, rebuild=rebuild)

    def _extract_and_check(self, *, rehash: bool, rebuild: bool) -> bool:
        """Extract and compare every row, or be refused for a reason, with nothing changed."""
        before, old = read_files(self.out), self._open()
        excuse, has_partial = self._excuse(before, rebuild=rebuild), MANIFEST in before
        known = {} if rebuild or old is None else views_of(old)
        rows = set() if rebuild or old is None else keys_of(old)
        self._note_seen()
        self.shortcuts.num_forwards = 0
        try:
            summary = self._extract(rehash=rehash, rebuild=rebuild)
        except FeatcacheError as error:
            self._accept(error, before, excuse)
            return False
        self.counts[summary.status] += 1
        is_exact = rehash or (rebuild and not has_partial)  # an unfinished run is gone on with
        made = self._check(is_exact=is_exact)
        new = {content: v for content, v in views_of(made).items() if known.get(content, 0) < v}
        run, kept = self.shortcuts.num_forwards, len(rows & keys_of(made))
        assert run <= sum(new.values()), f"{run} forward passes for {sum(new.values())} new views"
        if not has_partial:
            assert run == sum(new.values()), f"{sum(new.values())} new views, {run} forward passes"
            assert (summary.num_new, summary.num_kept) == (len(new), kept)
        if not self.damaged and self._is_of_this_recipe(before):
            left = sorted(read_files(self.out))
            assert left == ["c.h5"], f"left behind: {left} {summary}"
        self.damaged = self.damaged and MANIFEST in read_files(self.out)
        if is_exact and MANIFEST not in read_files(self.out):
            self.seen.clear()
            self._note_seen()
        return True

    @rule(how=st.sampled_from(["Ctrl-C before", "Ctrl-C after", "kill", "power cut", "batch"]),
          call=st.integers(0, 130), rehash=seldom_, rebuild=seldom_,
          then=st.sampled_from([None] * 8 + list(RECIPES)))  # fmt: skip
    def crash(
        self, how: str, call: int, rehash: bool, rebuild: bool, then: Settings | None
    ) -> None:  # fmt: skip
        """Extract, and be stopped at any call or batch: the cache is as it was, or right.

        People may then go on with other settings.
        """
        before = read_files(self.out)
        excuse = self._excuse(before, rebuild=rebuild)
        self._note_seen()
        fault = how if how.startswith("Ctrl-C") else ""
        self.pid += 1  # as names of temporary files, which have it, never come twice
        disk = Disk(self.out, call if fault else None, fault, pid=self.pid)
        try:
            with disk, self._dying(how, call):
                self._extract(rehash=rehash, rebuild=rebuild)
        except FeatcacheError as error:
            self._accept(error, before, excuse)
            return
        except (KeyboardInterrupt, SystemExit):
            self.counts["crashed"] += 1
        if how in {"kill", "power cut"}:
            self.counts["crashed"] += 1
            call %= len(disk.calls) + 1
            cut = how == "power cut"
            left = disk.after_power_cut(call, random.Random(call)) if cut else disk.after_kill(call)
            shutil.rmtree(self.out)
            write_files(self.out, left)
        if self.path.exists() and self.path.read_bytes() != before.get("c.h5"):
            self._check(is_exact=rehash)
        self.recipe = then or self.recipe

    @contextlib.contextmanager
    def _dying(self, how: str, call: int) -> Iterator[None]:
        """Die before some batch comes out of the network."""
        stream = work.stream_features

        def dying(*arguments: Any, **options: Any) -> Iterator[Any]:
            for number, batch in enumerate(stream(*arguments, **options)):
                if number == call % 8:
                    raise SystemExit
                yield batch

        with contextlib.ExitStack() as stack:
            if how == "batch":
                stack.enter_context(mock.patch.object(work, "stream_features", dying))
            yield

    @property
    def _damageable(self) -> list[Path]:
        files = (path for path in self.out.rglob("*") if path.is_file() and path.stat().st_size)
        return sorted(path for path in files if path.name != "lock")

    @precondition(lambda self: not self.damaged and self._damageable)
    @rule(file=st.integers(0, 5), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def damage(self, file: int, place: float, bit: int) -> None:
        """Flip a bit of the cache, of a shard or of the manifest."""
        paths = self._damageable
        path = paths[file % len(paths)]
        data = bytearray(path.read_bytes())
        data[int(place * len(data))] ^= 1 << bit
        path.write_bytes(data)
        self.damaged = True
        self.counts["damaged"] += 1

    @rule(what=st.sampled_from(["cache", "all"]))
    def lose(self, what: str) -> None:
        """Somebody removes the cache, or what was begun of one as well."""
        self.path.unlink(missing_ok=True)
        if what == "all":
            shutil.rmtree(self.out)
            self.out.mkdir()
            self.damaged = False

    # ------------------------------------------------------------------------------ what is right

    def _extract(self, *, rehash: bool, rebuild: bool) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FeatcacheWarning)  # failed images: compared below
            try:
                return extraction.extract(
                    self.data, self.path, **self.recipe.options(), engine="folded", batch_size=1,
                    workers=1, group_by=r"^(p\d)_", max_errors="100%", rehash=rehash,
                    rebuild=rebuild,
                )  # fmt: skip
            except FeatcacheError:
                raise
            except Exception as error:
                raise AssertionError(f"a traceback: {error!r}") from error

    def _name(self, path: Path) -> str:
        return path.relative_to(self.data).as_posix()

    def _key(self, path: Path) -> tuple[str, int, int]:
        return (self._name(path), path.stat().st_size, path.stat().st_mtime_ns)

    def _note_seen(self) -> None:
        for path in self.images:
            self.seen.setdefault(self._key(path), set()).add(path.read_bytes())

    def _open(self) -> Cache | None:
        with contextlib.suppress(FeatcacheError):
            return open_cache(self.path)
        return None

    def _is_of_this_recipe(self, before: Files) -> bool:
        """Return whether an unfinished run, if there is one, is of the recipe of now."""
        try:
            made = json.loads(before.get(MANIFEST) or b"{}")
            return made.get("fingerprint", self.recipe.fingerprint) == self.recipe.fingerprint
        except ValueError:
            return False

    def _excuse(self, before: Files, *, rebuild: bool) -> str:
        """Return why an extraction may be refused, or ""."""
        for folder in (self.data / split / name for split in SPLITS for name in self.class_names):
            if all(path.read_bytes() in BROKEN for path in folder.iterdir()):
                return "a class without a readable image"
        if self.damaged:
            return "damaged files"
        old = self._open()
        if not rebuild and old is not None:
            paths = {path for path, _ in keys_of(old)}
            if old.fingerprint != self.recipe.fingerprint:
                return "a cache made with other settings"
            if not paths & {self._name(path) for path in self.images}:
                return "none of its images"
        if not rebuild and not self._is_of_this_recipe(before):
            return "a run begun with other settings"
        return ""

    def _accept(self, error: FeatcacheError, before: Files, excuse: str) -> None:
        self.counts["refused"] += 1
        assert excuse, f"refused without a reason: {error}"
        assert read_files(self.out).get("c.h5") == before.get("c.h5"), "a refusal changed the cache"

    def _check(self, *, is_exact: bool) -> Cache:
        """Compare every row with the image as it is now, and return the cache.

        A file that was changed to one of its size, its time set back, may be taken for what it was:
        only ``rehash`` looks at the bytes.
        """
        cache = open_cache(self.path)
        assert cache.classes == tuple(self.class_names)
        failed = {failure.path for failure in cache.failures}
        assert list(cache.splits) == list(SPLITS)
        for name, split in cache.splits.items():
            images = {self._name(p): p for p in self.images if p.is_relative_to(self.data / name)}
            assert split.paths == sorted(split.paths), "rows out of order"
            assert set(split.paths) == images.keys() - failed, "rows missing, or too many"
            assert failed & images.keys() <= {
                path for path, image in images.items() if image.read_bytes() in BROKEN
            }
            for row, path in enumerate(split.paths):
                current = images[path].read_bytes()
                may_be = {current} if is_exact else self.seen[self._key(images[path])]
                self._check_row(cache, name, row, may_be)
                facts = (path, int(split.image_bytes[row]), int(split.mtime_ns[row]))
                assert facts == self._key(images[path])
        return cache

    def _check_row(self, cache: Cache, name: str, row: int, may_be: set[bytes]) -> None:
        split = cache.splits[name]
        path, sha256 = split.paths[row], split.image_sha256[row].tobytes()
        found = [c for c in may_be if hashlib.sha256(c).digest() == sha256]
        assert found, f"{path}: the sha256 of other bytes"
        assert cache.classes[split.targets[row]] == path.split("/")[1], f"{path}: another target"
        assert split.groups is not None
        assert split.groups[row] == path.split("/")[2][:2], f"{path}: another group"
        views = self.recipe.views if name == "train" else 1
        features = split.features[row].reshape(-1, cache.num_features)
        assert features.dtype == self.recipe.feature_dtype
        assert found[0] not in BROKEN, f"{path}: a broken image with features"
        # float32 sums in another order; float16 rounds them to 11 bits
        tolerance = 1e-3 if self.recipe.feature_dtype == "float16" else 1e-5
        assert features.shape == (views, tiny_network.NUM_FEATURES)
        wanted = truth(found[0], self.recipe, views)
        assert np.allclose(features, wanted, rtol=tolerance, atol=1e-5), f"{path}: other features"
        exact = BITS.setdefault((sha256, self.recipe, views), features.tobytes())
        assert features.tobytes() == exact, f"{path}: other bits than in another run"


MANIFEST = "c.h5.partial/manifest.json"
BITS: dict[tuple[bytes, Settings, int], bytes] = {}


def views_of(cache: Cache) -> dict[bytes, int]:
    """Return sha256 -> the most views there are of that content."""
    views: dict[bytes, int] = {}
    for split in cache.splits.values():
        for row in split.image_sha256:
            views[row.tobytes()] = max(views.get(row.tobytes(), 0), split.num_views)
    return views


def keys_of(cache: Cache) -> set[tuple[str, bytes]]:
    """Return path and sha256 of every row."""
    return {
        (path, row.tobytes())
        for split in cache.splits.values()
        for path, row in zip(split.paths, split.image_sha256, strict=True)
    }


def run_machines(
    number: int, steps: int, counts: Counter[str], folder: Path, shortcuts: Shortcuts
) -> None:
    """Run so many machines; raises what the first that finds something raises."""

    class Counted(Machine):
        pass

    Counted.counts, Counted.base, Counted.shortcuts = counts, folder, shortcuts
    run_state_machine_as_test(
        Counted,
        settings=settings(
            max_examples=number, stateful_step_count=steps, deadline=None, database=None,
            derandomize=True, print_blob=False, report_multiple_bugs=False,
            phases=[Phase.generate],  # shrinking would take minutes: the steps are few
            # every step runs the real thing on a real disk, so no example is fast
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )  # fmt: skip
