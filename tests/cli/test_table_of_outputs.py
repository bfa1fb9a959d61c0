"""Every output of every verb against what may lie there: the table in ``tests/README.md``."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import TESTS, TINY, assert_one_line_error
from sample_images import write_image
from sample_sweeps import SPACE

import featcache
from featcache.outputs import Output

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links, pipes and flock of POSIX")

README = (TESTS / "README.md").read_text("utf-8")

# Output -> command; OUT is what it writes, IN what it reads and might be told to write over.
VERBS = {
    "tree of split": "split raw OUT",
    "CSV of split": "split raw OUT",
    "cache of extract": f"extract raw OUT {' '.join(TINY)} --rebuild --limit 4",
    "cache of select": "select c.h5 OUT --rebuild",
    "cache of write_cache": "",
    "run of train": "train c.h5 OUT --overwrite --hidden none --epochs 1",
    "run of sweep": "sweep c.h5 OUT --overwrite --trials 2 --repeats 2 --space s.toml",
    "folder of crossval": "crossval c.h5 OUT --overwrite --folds 2 --hidden none --epochs 1",
    "CSV of audit": "audit c.h5 --only same --csv OUT",
    "CSV of evaluate": "evaluate run --csv OUT",
    "CSV of predict": "predict run --cache c.h5 --csv OUT",
    "network of export": f"export run OUT {' '.join(TINY)}",
    "folder of explain": f"explain run raw/covid/0.png --out OUT --overwrite {' '.join(TINY)}",
    "ONNX of export": f"export run OUT {' '.join(TINY)}",
    "folder of export": f"export run OUT/ {' '.join(TINY)}",
    "file of convert": "convert c.h5 OUT",
    "cache of convert": "convert in.npz OUT --rebuild",
    "page of report": "report run OUT",
    "evaluation in a run": "evaluate run",
    "decision in a run": "decide run --positive covid --recall 0.5",
    "folder of demo": "demo OUT",
}
INPUTS = {
    "CSV of split": "raw/in.csv", "cache of extract": "raw/covid/0.png", "tree of split": "raw",
    "network of export": "in.pt", "ONNX of export": "delivered/model.onnx",
    "folder of export": "delivered", "cache of convert": "in.npz", "folder of explain": "raw",
}  # fmt: skip
ENDINGS = {
    "CSV of split": ".csv", "network of export": ".pt", "ONNX of export": ".onnx",
    "file of convert": ".npz",
}  # fmt: skip


def read_table() -> dict[tuple[str, str], str]:
    """Return (output, what lies there) -> what happens, from the table in ``tests/README.md``."""
    part = README[README.index("## Outputs") :].split("\n## ")[0]
    lines = [line.strip("| ").split("|") for line in part.splitlines() if line.startswith("|")]
    (_, *outputs), _, *rows = ([cell.strip() for cell in line] for line in lines)
    return {(o, row[0]): cell for row in rows for o, cell in zip(outputs, row[1:], strict=True)}


TABLE = {cell: outcome for cell, outcome in read_table().items() if outcome != "-"}


def test_the_table_names_every_output() -> None:
    assert {output for output, _ in read_table()} == VERBS.keys()


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images, a cache, a run and files of other kinds."""
    folder = tmp_path_factory.mktemp("things")
    for number in range(12):
        label = ("covid", "normal")[number % 2]
        write_image(folder / "raw" / label / f"{number}.png", number, bright=label == "covid")
    (folder / "raw" / "in.csv").write_text("path,target\n")
    (folder / "s.toml").write_text(SPACE, "utf-8")
    import tiny_network

    featcache.split(folder / "raw", folder / "split.csv")
    featcache.extract(folder / "split.csv", folder / "c.h5", backbone=tiny_network.build())
    featcache.train(folder / "c.h5", folder / "run", hidden=(), epochs=1)
    featcache.decide(folder / "run", positive="covid", threshold=0.4)
    (folder / "run" / "decision.json").rename(folder / "decision.json")
    featcache.evaluate(folder / "run", csv=folder / "evaluated.csv")
    featcache.audit(folder / "c.h5", only="same", csv=folder / "a.csv")
    featcache.report(folder / "run", folder / "page.html")
    featcache.crossval(folder / "c.h5", folder / "folds", folds=2, hidden=(), epochs=1, seed=1)
    image, backbone = folder / "raw" / "covid" / "0.png", tiny_network.build()
    featcache.explain(folder / "run", image, folder / "explained", backbone=backbone)
    with pytest.warns(featcache.FeatcacheWarning, match="trained on"):
        featcache.predict(folder / "run", cache=folder / "c.h5", csv=folder / "p.csv")
    featcache.export(folder / "run", f"{folder}/delivered/", backbone=tiny_network.build())
    os.link(folder / "run" / "head.safetensors", folder / "in.pt")
    featcache.convert(folder / "c.h5", folder / "in.npz")
    return folder


def snapshot(folder: Path) -> dict[str, Any]:
    """Return what every name in a folder is, with its content; a link is what it says."""

    def describe(path: Path) -> Any:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            return os.fspath(path.readlink())
        return path.read_bytes() if stat.S_ISREG(mode) else stat.S_IFMT(mode)

    return {p.relative_to(folder).as_posix(): describe(p) for p in folder.rglob("*")}


def own_kind(output: str, out: Path, things: Path) -> None:
    """Put an earlier result of the same verb there."""
    if output.startswith("run of"):
        shutil.copytree(things / "run", out)
        shutil.rmtree(out / "evaluation")
    elif output == "folder of export":
        shutil.copytree(things / "delivered", out)
    elif output == "folder of crossval":
        shutil.copytree(things / "folds", out)
    elif output == "folder of explain":
        shutil.copytree(things / "explained", out)
    else:
        names = {
            "CSV of split": "split.csv", "CSV of evaluate": "evaluated.csv",
            "CSV of audit": "a.csv",
            "CSV of predict": "p.csv", "network of export": "in.pt",
            "ONNX of export": "delivered/model.onnx", "file of convert": "in.npz",
            "page of report": "page.html",
            "evaluation in a run": "run/evaluation/test.json",
            "decision in a run": "decision.json",
        }  # fmt: skip
        shutil.copyfile(things / names.get(output, "c.h5"), out)


def other_kind(output: str, out: Path, things: Path) -> None:
    """Put another file of featcache there."""
    others = {"CSV of evaluate": "p.csv", "CSV of predict": "evaluated.csv"}
    other = "split.csv" if output.startswith("cache") else "c.h5"
    shutil.copyfile(things / others.get(output, other), out)


def folder(_: str, out: Path, things: Path) -> None:
    out.mkdir()
    (out / "letter").write_text("years of work")


def device(_: str, out: Path, things: Path) -> None:
    if os.geteuid() != 0:
        out.symlink_to("/dev/null")
        return
    try:
        os.mknod(out, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("no device can be made here")


def link(_: str, out: Path, things: Path) -> None:
    (out.parent / "letter").write_text("years of work")
    out.symlink_to("letter")


PLACES: dict[str, Callable[[str, Path, Path], object]] = {
    "nothing": lambda *_: None,
    "its own kind": own_kind,
    "another featcache file": other_kind,
    "a stranger's file": lambda _, out, __: out.write_text("years of work"),
    "a folder": folder,
    "a link to a stranger's file": link,
    "a dangling link": lambda _, out, __: out.symlink_to("target" + out.suffix),
    "a FIFO": lambda _, out, __: os.mkfifo(out),
    "a device": device,
}


def place_of(output: str, there: str, folder: Path) -> Path:
    ending = ENDINGS.get(output, "")
    if output == "evaluation in a run":
        return folder / "run" / "evaluation" / "test.json"
    if output == "decision in a run":
        return folder / "run" / "decision.json"
    if there == "its own input":
        return folder / INPUTS.get(output, "c.h5")
    if there == "a read-only place":
        if os.geteuid() == 0:  # may write anywhere but there
            return Path("/proc") / f"out{ending}"
        (folder / "locked").mkdir(mode=0o555)
        return folder / "locked" / f"out{ending}"
    long = "n" * (255 - len(ending) - 5 * (output == "network of export"))  # and its .json
    return folder / ((long if there == "a name of 255 bytes" else "out") + ending)


def write_a_cache(out: Path) -> None:
    targets = np.array([0, 1])
    featcache.write_cache(
        out, np.ones((2, 3), np.float32), targets, ["a", "b"], classes=["x", "y"], overwrite=True
    )


@pytest.mark.parametrize(("output", "there"), TABLE)
def test_nothing_is_lost(
    output: str, there: str, things: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    shutil.copytree(things, tmp_path, dirs_exist_ok=True, symlinks=True)
    out, outcome = place_of(output, there, tmp_path), TABLE[output, there]
    if output == "evaluation in a run":
        shutil.rmtree(out.parent)
        out.parent.mkdir()
    if there in PLACES:
        PLACES[there](output, out, things)
    if there == "something made while it worked":
        publish = Output.publish

        def late(self: Output, temporary: Path) -> Any:
            if self.path.absolute() == out:
                out.write_text("years of work")
            return publish(self, temporary)

        monkeypatch.setattr(Output, "publish", late)
    before, read = snapshot(tmp_path), list[bytes]()
    reader = threading.Thread(target=lambda: read.append(out.read_bytes()))
    if outcome == "written into" and there == "a FIFO":
        reader.start()

    if VERBS[output]:
        places = {"OUT": str(out), "OUT/": f"{out}/"}
        arguments = [places.get(word, word) for word in VERBS[output].split()]
        result = run(*arguments, "--quiet")
        code, said = result.code, result.err
    else:
        try:
            write_a_cache(out)
            code, said = 0, ""
        except featcache.FeatcacheError as error:
            code, said = 1, str(error)

    after = snapshot(tmp_path)
    left = {n.split("/")[0] for n in after if re.search(r"\.(partial|sweep|[0-9a-f]{16}\.tmp)", n)}
    if there == "something made while it worked":  # the work is kept for another name
        in_partial = output in {"cache of extract", "folder of crossval"}
        left -= {"out.partial" if in_partial else "out.sweep"}
    assert not left, "something was left behind"
    if outcome == "refused":
        assert code == 1, said
        if VERBS[output]:
            assert_one_line_error(result)
        assert out.name in said or str(out.parent) in said
        made = {"out", "locked"} | {
            n for n in after if n.startswith(("run/evaluation", "run/loss"))
        }
        if there == "something made while it worked":
            assert out.read_bytes() == b"years of work"
            assert after.items() >= before.items()
        else:
            assert {n: v for n, v in after.items() if n not in made or n in before} == before
        return
    assert code == 0, said
    assert outcome in {"written", "replaced", "written into", "followed"}
    target = out.parent / out.readlink() if outcome == "followed" else out
    name = target.relative_to(tmp_path).as_posix()
    kept = {n: v for n, v in before.items() if n != name and not n.startswith(f"{name}/")}
    kept = {n: v for n, v in kept.items() if not n.startswith("run/evaluation/")}
    assert after.items() >= kept.items(), "something else was changed"
    if outcome == "written into":
        assert after[name] == before[name], "it is still what it was"
        if there == "a FIFO":
            reader.join()
            assert read[0].startswith(b"path,")
    else:
        assert name in after
        assert after[name] != before.get(name) or output.startswith(
            (
                "CSV",
                "run",
                "folder of crossval",
                "folder of explain",
                "page",
                "evaluation",
                "decision",
            )
        )
