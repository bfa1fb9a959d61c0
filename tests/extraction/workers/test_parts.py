"""Parts of an extraction: in any order, at once, killed, without locks, they make one cache."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_network
from sample_images import write_image, write_tree
from sample_shards import write_hugging_face, write_webdataset
from sample_workers import use_threads

from featcache import heartbeat, runtime
from featcache.cache.reading import Cache, open_cache
from featcache.cli.wording import facts_lines
from featcache.errors import CacheError, ConfigError, FeatcacheWarning
from featcache.evaluation.info import info
from featcache.extraction import work
from featcache.extraction.extraction import extract
from featcache.extraction.workers import plans
from featcache.extraction.workers.plans import Part, read_plan
from featcache.heartbeat import alive, refuse_alive

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*could not be read:featcache.FeatcacheWarning"),
]
OPTIONS: dict[str, Any] = {"batch_size": 2, "engine": "folded", "max_errors": 9}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """46 images, of which three are copies and one is bad."""
    root = write_tree(tmp_path / "data")
    files = sorted(path for path in root.rglob("*") if path.is_file())
    for source, target in ((0, 45), (1, 2), (20, 3)):
        shutil.copy(files[source], files[target])
    files[25].write_bytes(b"bad")
    return root


@pytest.fixture
def whole(images: Path, tmp_path: Path) -> Cache:
    """What one run makes of them."""
    with pytest.warns(FeatcacheWarning, match="1 image could not be read"):
        extract(images, tmp_path / "w.h5", backbone=tiny_network.build(), **OPTIONS)
    return open_cache(tmp_path / "w.h5")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of four rows; processes are taken for dead within half a second."""
    monkeypatch.setattr(work, "SHARD_BYTES", tiny_network.shard_bytes(4, 2))
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(heartbeat, "STALE_SECONDS", 0.5)


def run(images: Path, cache: Path, part: str | None = None, **change: Any) -> Any:
    options = OPTIONS | {"backbone": tiny_network.build()} | change
    return extract(images, cache, part=part, **options)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_parts_in_any_order_make_the_cache_of_one_run(
    images: Path, whole: Cache, tmp_path: Path
) -> None:
    cache, partial = tmp_path / "c.h5", tmp_path / "c.h5.partial"
    made = [run(images, cache, f"{number}/4") for number in (3, 1, 4, 2)]
    assert [summary.status for summary in made] == ["part 3/4", "part 1/4", "part 4/4", "part 2/4"]
    assert sorted(summary.num_images for summary in made) == [11, 11, 12, 12]
    assert sum(summary.num_failed for summary in made) == 1
    assert {f"part.{number}.json" for number in range(1, 5)} < names(partial)
    assert not cache.exists()
    assert run(images, cache, "2/4").num_new == 0  # again: nothing is left to do
    said = list[str]()
    summary = run(images, cache, say=said.append)
    assert "Parts of c.h5: 4 of 4, 45 images." in said
    assert not [line for line in said if "is done here" in line]
    assert (summary.num_new, summary.num_images) == (0, 45)
    assert summary.content_sha256 == whole.content_sha256
    assert open_cache(cache).failures == whole.failures
    assert not partial.exists()
    told = [line for line in facts_lines(info(cache).as_dict()) if "worker:" in line]
    assert len(told) == 1
    assert ", cpu: 4 parts, 4 processes, 47 images, " in told[0]  # the bad one was tried again


def test_the_plain_command_does_the_parts_that_are_missing(
    images: Path, whole: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "c.h5"
    run(images, cache, "2/3")
    inner, calls = work.ShardWriter.flush, list[int]()

    def stopping(self: Any, *arguments: Any, **options: Any) -> None:
        inner(self, *arguments, **options)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(work.ShardWriter, "flush", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(images, cache, "3/3")
    monkeypatch.setattr(work.ShardWriter, "flush", inner)
    said = list[str]()
    summary = run(images, cache, say=said.append)
    assert "Part 1/3 was never begun: it is done here." in said
    assert "Part 3/3 is not finished: the rest of it is done here." in said
    assert not [line for line in said if line.startswith("Part 2/3")]
    made = open_cache(cache).provenance
    counts = [(line["parts"], line["processes"]) for line in made["workers"]]
    assert counts == [(2, 2), (0, 1)]  # those that made parts, and the one that merged them
    assert sum(line["images"] for line in made["workers"]) >= 43
    assert made["device"] == "cpu"
    assert summary.content_sha256 == whole.content_sha256
    assert 46 - 15 > summary.num_new >= 15
    assert names(tmp_path) == {"data", "w.h5", "c.h5"}


@pytest.mark.parametrize("write", [write_webdataset, write_hugging_face])
def test_parts_of_packed_images_in_the_order_of_their_files(
    images: Path, tmp_path: Path, write: Callable[[Path, Path], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    packed, folder = tmp_path / "packed", tmp_path / "c"
    write(images, packed)
    folder.mkdir()
    whole = run(packed, folder / "w.h5")
    run(packed, folder / "c.h5", "2/2")
    use_threads(monkeypatch)
    run(packed, folder / "c.h5", "1/2", processes=2)
    merged = run(packed, folder / "c.h5")
    assert merged.num_new == 0
    assert merged.content_sha256 == whole.content_sha256


def test_info_tells_which_parts_there_are(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "c.h5", "2/3")
    facts = info(tmp_path / "c.h5").as_dict()
    assert facts["kind"] == "unfinished extract"
    kept = facts["kept"]
    assert (kept["num_parts"], kept["parts_done"], kept["parts_begun"]) == (3, "2", "none")
    assert kept["engine"] == "folded"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_for_slurm_runs_one_part_in_srun(tmp_path: Path) -> None:
    """Without SLURM: its variables are set, and srun is a script that shows its arguments."""
    script = Path(__file__).parents[3] / "scripts" / "slurm_array.sh"
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$$ $*"\n', "ascii")
    srun.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "1",
    }  # fmt: skip
    with subprocess.Popen(
        ["bash", script, "a b", "c.h5"], env=environment, stdout=subprocess.PIPE, text=True
    ) as child:
        out, _ = child.communicate()
    # exec: signals to the batch script reach srun
    assert out == f"{child.pid} featcache extract a b c.h5 --part 3/16\n"
    text = script.read_text("utf-8")
    assert "#SBATCH --array=1-16\n" in text
    for option in ("--requeue", "--signal=TERM@"):
        assert f"\n#SBATCH {option}" in text


def test_the_devices_of_all_parts_are_told(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merge has another one, and does a part that is missing."""
    for number, name in ((1, "GPU A"), (2, "GPU B"), (0, "GPU C")):
        monkeypatch.setattr(work, "device_name", lambda device, name=name: name)
        monkeypatch.setattr(runtime, "device_name", lambda device, name=name: name)
        run(images, tmp_path / "c.h5", f"{number}/3" if number else None)
    provenance = open_cache(tmp_path / "c.h5").provenance
    assert provenance["device"] == "GPU A, GPU B, GPU C"
    lines = [(line["device"], line["parts"]) for line in provenance["workers"]]
    assert lines == [("GPU A", 1), ("GPU B", 1), ("GPU C", 0)]


def test_other_parts_other_images_and_other_settings_are_refused(
    images: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "c.h5"
    run(images, cache, "1/3")
    with pytest.raises(CacheError, match=r"^--part 2/4: expected parts of 3, .*found parts of 4"):
        run(images, cache, "2/4")
    with pytest.raises(CacheError, match=r"made with other settings"):
        run(images, cache, "2/3", crop_mode="center")
    with pytest.raises(CacheError, match=r"expected fp32 on cpu, found bf16 on cpu"):
        run(images, cache, "2/3", precision="bf16")
    write_image(images / "train" / "covid" / "new.png", 99)
    with pytest.raises(CacheError, match=r"^data: expected the images that the parts were planned"):
        run(images, cache, "2/3")
    assert read_plan(cache.with_name("c.h5.partial")) is not None
    assert run(images, cache).num_images == 46  # the plain command takes them all


@pytest.mark.parametrize("text", ["5/4", "0/4", "4", "1/1000", "-1/4", "a/b", "1/4/4", ""])
def test_a_part_that_is_none_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--part: expected I/N: 1/N to N/N, N at most 999, fou"):
        Part.parse(text)


def test_parts_and_whole_extractions_do_not_mix(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"^--rebuild: expected no --part beside it"):
        run(images, tmp_path / "c.h5", "1/2", rebuild=True)
    with pytest.raises(Exception, match="at most 0"):
        run(images, tmp_path / "c.h5", max_errors=0)
    with pytest.raises(CacheError, match=r"found an unfinished extraction in one piece"):
        run(images, tmp_path / "c.h5", "1/2")
    run(images, tmp_path / "d.h5", "1/2")
    made = run(images, tmp_path / "d.h5", crop_mode="center", rebuild=True)
    assert (made.num_new, made.num_images) == (42, 45)
    assert "d.h5.partial" not in names(tmp_path)


def test_a_part_at_work_is_left_alone(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, partial = tmp_path / "c.h5", tmp_path / "c.h5.partial"
    run(images, cache, "1/2")
    with alive(partial / "alive.2", "part", lambda line: None):
        with pytest.raises(CacheError, match=r"part 2 of c.h5: expected no other process at it"):
            run(images, cache)
        with pytest.raises(CacheError, match=r"found one at work: process \d+ on .* since"):
            run(images, cache, "2/2")
    with (
        alive(partial / "alive.0", "cache", lambda line: None),
        pytest.raises(CacheError, match=r"^cache c.h5: expected no other process"),
    ):
        run(images, cache, "2/2")
    (partial / "alive.2").write_text("process 1 on elsewhere since 2026-01-01 00:00:00 x\nab\n3\n")
    said = list[str]()
    run(images, cache, "2/2", say=said.append)  # it does not change: it is of a dead process
    assert [line for line in said if line.startswith("Waiting for a sign of life")]
    assert run(images, cache).num_new == 0


def call_until_it_raises(function: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        function()


def test_who_was_taken_for_dead_writes_no_manifest(images: Path, tmp_path: Path) -> None:
    sign = tmp_path / "alive.1"
    with alive(sign, "part 1/2", lambda line: None) as check:
        check()
        sign.write_text("process 1 on elsewhere since 2026-01-01 00:00:00 x\nab\n3\n")
        with pytest.raises(CacheError, match=r"^part 1/2: expected the sign of life of this pro"):
            call_until_it_raises(check)
    assert sign.exists()  # it is another's
    assert refuse_alive({tmp_path / "alive.7": "nobody"}, lambda line: None) == {}


@pytest.mark.parametrize("links", [True, False])
def test_one_plan_counts_though_many_publish(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    run(images, tmp_path / "c.h5", "1/2")
    plan = read_plan(tmp_path / "c.h5.partial")
    assert plan is not None

    def fail(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(plans.os, "link", fail)
    (tmp_path / "p").mkdir()
    assert plans.publish_plan(tmp_path / "p", plan)
    assert not plans.publish_plan(tmp_path / "p", plan)
    assert read_plan(tmp_path / "p") == plan
    assert names(tmp_path / "p") == {"plan.json"}
    text = json.loads((tmp_path / "p" / "plan.json").read_bytes())
    (tmp_path / "p" / "plan.json").write_text(json.dumps(text | {"num_parts": 7}))
    with pytest.raises(CacheError, match=r"expected a readable plan, found one whose sha256"):
        read_plan(tmp_path / "p", patience=0)


def fail_to_lock(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, "no locks here")


def test_a_plain_run_needs_no_lock_where_there_is_a_plan(
    images: Path, whole: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", fail_to_lock)
    backbones = [tiny_network.build()]
    options = OPTIONS | {"backbone": backbones, "processes": 1}
    for part in ("1/2", "2/2"):
        extract(images, tmp_path / "many", part=part, **options)
    made = extract(images, tmp_path / "many", **options)
    assert [summary.content_sha256 for summary in made.values()] == [whole.content_sha256]
    assert names(tmp_path / "many") == {"python-tiny_network-build.h5"}


@pytest.mark.parametrize("first", ["part.2.json", "shard.1000000", "plan.json"])
def test_what_a_merge_left_that_was_killed_at_its_end_goes_without_locks(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    for bad in [path for path in images.rglob("*") if path.is_file() and path.stat().st_size < 9]:
        bad.unlink()
    monkeypatch.setattr(fcntl, "flock", fail_to_lock)
    for part in ("1/2", "2/2"):
        run(images, tmp_path / "c.h5", part)
    unlink, is_killed = Path.unlink, [False]

    def unlink_some(path: Path, missing_ok: bool = False) -> None:
        is_killed[0] |= path.name == first
        if is_killed[0] and path.parent.name == "c.h5.partial" and "alive" not in path.name:
            raise OSError(errno.EIO, "killed here")
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink_some)
        run(images, tmp_path / "c.h5")
    assert first in names(tmp_path / "c.h5.partial")
    assert run(images, tmp_path / "c.h5").status == "up to date"
    assert names(tmp_path) == {"c.h5", "data"}


def test_full_disk_leaves_no_sign_of_life(tmp_path: Path) -> None:
    """An empty sign would be waited for, a minute, by the same command with room on the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, hard))
    try:
        with pytest.raises(CacheError, match="file size") as error:
            alive(tmp_path / "alive.1", "part 1/2 of c.h5", print).__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / "alive.1") in str(error.value)
    assert not list(tmp_path.iterdir())
