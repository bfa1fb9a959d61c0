"""A decoder that crashes, is killed or hangs on an image costs that image, and nothing else.

Decoders of real libraries do so for some bytes and versions; here they do for files that end in
certain bytes, in the extraction's own process and in those that it starts.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounded import run_bounded
from fork_server import CONTEXT
from PIL import Image

from featcache.cache.reading import open_cache
from featcache.extraction.extraction import extract
from featcache.extraction.recipe import NUM_PROBES

FRAGILE = """
import os, signal, time
import featcache.pixels.images as images

read = images.read

def fragile(data, **options):
    if data.endswith(b"KILL"):
        os.kill(os.getpid(), signal.SIGKILL)
    if data.endswith(b"CRASH"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if data.endswith(b"HANG"):
        time.sleep(600)
    return read(data, **options)

images.read = fragile
"""
NUM_IMAGES = 60


def plant(root: Path, endings: dict[int, bytes]) -> None:
    """Make images, some of which harm the decoder."""
    (root / "data").mkdir()
    (root / "site").mkdir()
    (root / "site" / "sitecustomize.py").write_text(FRAGILE, "utf-8")
    for number in range(NUM_IMAGES):
        path = root / "data" / f"{number:02}.png"
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40), np.uint8)
        Image.fromarray(pixels).save(path)
        with path.open("ab") as file:
            file.write(endings.get(number, b""))


def run_fragile(root: Path, seconds: float = 60) -> None:
    """Extract with the fragile decoder, here and in the processes that are started."""
    import tiny_network

    from featcache.extraction import recipe, view_stream
    from featcache.pixels import isolation

    exec(FRAGILE, {})
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root / "site"), before]))
    view_stream.DECODE_SECONDS = recipe.DECODE_SECONDS = seconds
    isolation.IsolatedDecoder.__init__.__defaults__ = (seconds,)
    extract(
        root / "data", root / "c.h5", backbone=tiny_network.build(), max_errors=3, batch_size=4,
        device="cpu",
    )  # fmt: skip


def die(root: Path) -> int | None:
    """Return the exit code of an extraction that is killed."""
    child = CONTEXT.Process(target=run_fragile, args=(root,))
    child.start()
    child.join(300)
    code = child.exitcode
    child.kill()
    child.join()
    return code


def assert_only_these_failed(root: Path, wanted: dict[int, str]) -> None:
    """Compare with an extraction of the other images, by a decoder that is well."""
    cache = open_cache(root / "c.h5")
    failures = {failure.path: failure.reason for failure in cache.failures}
    assert failures == {f"{number:02}.png": reason for number, reason in wanted.items()}
    for number in wanted:
        (root / "data" / f"{number:02}.png").unlink()
    for path in (root / "data").iterdir():
        assert path.read_bytes()[-4:] not in {b"KILL", b"HANG"}
    ended = run_bounded(run_well, root)
    assert ended.error is None
    mine, truth = (open_cache(root / name).splits["all"] for name in ("c.h5", "well.h5"))
    assert mine.paths == truth.paths
    assert np.array_equal(mine.features, truth.features)


def run_well(root: Path) -> None:
    import tiny_network

    extract(
        root / "data", root / "well.h5", backbone=tiny_network.build(), batch_size=4, device="cpu"
    )


def test_the_same_command_again_ends_without_those_images(tmp_path: Path, tally: Any) -> None:
    # beside the probes of the engine, which are every fifteenth from the first on
    assert all(i % (NUM_IMAGES // NUM_PROBES) for i in (31, 40))
    plant(tmp_path, {31: b"KILL", 40: b"CRASH"})
    assert die(tmp_path) in {-signal.SIGKILL, -signal.SIGSEGV}
    assert not (tmp_path / "c.h5").exists()
    ended = run_bounded(run_fragile, tmp_path)
    assert ended.error is None, ended.error
    assert_only_these_failed(tmp_path, {31: "it crashed", 40: "it crashed"})
    tally("killing decoders", "lost their images only", 2)


def test_a_decoder_that_hangs_loses_those_images(tmp_path: Path, tally: Any) -> None:
    """Also where an image is the first of all, which the engine is checked with."""
    plant(tmp_path, {0: b"HANG", 31: b"HANG"})
    ended = run_bounded(run_fragile, tmp_path, 3.0)
    assert ended.error is None, ended.error
    assert_only_these_failed(tmp_path, {0: "it hung for 3 s", 31: "it hung for 3 s"})
    tally("killing decoders", "lost their images only", 2)


@pytest.mark.parametrize("place", [0, 15])
def test_a_killing_image_among_the_probes_of_the_engine_is_lost_alone(
    place: int, tmp_path: Path, tally: Any
) -> None:
    plant(tmp_path, {place: b"KILL"})
    assert die(tmp_path) == -signal.SIGKILL
    ended = run_bounded(run_fragile, tmp_path)
    assert ended.error is None, ended.error
    assert_only_these_failed(tmp_path, {place: "it crashed"})
    tally("killing decoders", "lost their images only")
