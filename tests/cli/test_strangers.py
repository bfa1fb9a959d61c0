"""Bad values sent through every door by every verb: one line, exit 1, and nothing else happens.

A stranger's cache, run, unfinished extraction or sweep is signed as featcache signs it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import TINY, assert_one_line_error
from sample_containers import block_size, container_of, read_block
from sample_images import write_tree
from sample_rows import make_cache
from sample_values import BAD_VALUES

from featcache.cache.writing import write_cache
from featcache.errors import DataError
from featcache.extraction.extraction import extract
from featcache.files import canonical_json
from featcache.heads.training import train

MARK = "@@"
SHORT = [name for name, (text, _) in BAD_VALUES.items() if len(text) < 2000]


def filled(value: Any, text: str) -> str:
    """Return a value as JSON with ``text`` in place of the mark."""
    return json.dumps(value).replace(f'"{MARK}"', text)


def signed(facts: dict[str, Any], key: str, text: str) -> str:
    """Return an object with its own hash, and ``text`` in place of the mark."""
    rest = {k: v for k, v in facts.items() if k != key}
    whole = rest | {key: hashlib.sha256(canonical_json(rest).encode()).hexdigest()}
    return filled(whole, text)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a cache and a run on it."""
    folder = tmp_path_factory.mktemp("made")
    make_cache(folder / "c.h5")
    train(folder / "c.h5", folder / "run", epochs=1, hidden=(4,), device="cpu")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)


# --- a run: what is bad stands in one of its keys

RUN_PLACES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a key of its own": lambda f: f.update(note=MARK),
    "training": lambda f: f["training"].update(loss=MARK),
    "head": lambda f: f["head"].update(dropout=MARK),
    "seed": lambda f: f.update(seed=MARK),
    "classes": lambda f: f["classes"].__setitem__(0, MARK),
    "cache path": lambda f: f["cache"].update(path=MARK),
    "cache identity": lambda f: f["cache"]["identity"].update(mean=MARK),
}
RUN_VERBS = [
    ["info", "run"], ["info", "run", "--json"], ["evaluate", "run"],
    ["evaluate", "run", "--cache", "c.h5"], ["predict", "run", "--cache", "c.h5"],
    ["predict", "run", "c.h5"], ["export", "run", "x.pt"],
]  # fmt: skip


@pytest.mark.parametrize("where", RUN_PLACES)
def test_a_value_in_run_json(where: str, place: Path, run: Any) -> None:
    file = place / "run" / "run.json"
    facts = json.loads(file.read_text())
    RUN_PLACES[where](facts)
    for name in SHORT:
        file.write_text(signed(facts, "sha256", BAD_VALUES[name][0]))
        for verb in RUN_VERBS[:1] if name != "NaN" else RUN_VERBS:
            assert_one_line_error(run(*verb), "run, run.json", BAD_VALUES[name][1])
    assert not (place / "x.pt").exists()


@pytest.mark.parametrize(("change", "message"), [
    (lambda f: f.update(seed=True), "run, seed: expected a whole number from 0"),
    (lambda f: f.update(data_seed=-1), "run, data_seed: expected a whole number from 0"),
    (lambda f: f.update(seed=1 << 63), "run, seed: expected a whole number from 0 to below 2**63"),
    (lambda f: f["cache"].update(num_failed=-1), "run, cache.num_failed"),
    (lambda f: f["cache"].update(num_failed="1"), "run, cache.num_failed"),
    (lambda f: f.update(classes=["covid", "caf\udce9"]), "run, classes: expected names in UTF-8"),
])  # fmt: skip
def test_a_value_out_of_its_range_in_run_json(
    change: Callable[[dict[str, Any]], object], message: str, place: Path, run: Any
) -> None:
    file = place / "run" / "run.json"
    facts = json.loads(file.read_text())
    change(facts)
    file.write_text(signed(facts, "sha256", "0"))
    for verb in RUN_VERBS:
        assert_one_line_error(run(*verb), message)


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes and links")
@pytest.mark.parametrize("path", ["../pipe", "../loop", "/dev/zero", "../run", "x" * 5000, "a\nb"])
def test_a_cache_path_of_a_run_that_leads_to_no_file(path: str, place: Path, run: Any) -> None:
    os.mkfifo(place / "pipe")
    (place / "loop").symlink_to("loop")
    file = place / "run" / "run.json"
    facts = json.loads(file.read_text())
    facts["cache"]["path"] = path
    file.write_text(signed(facts, "sha256", "0"))
    assert_one_line_error(run("evaluate", "run"))
    assert run("info", "run").code == 0


def test_a_header_of_weights(place: Path, run: Any) -> None:
    """Its library reads more than we do: a key twice, say. The hash in run.json is right."""
    file, weights = place / "run" / "run.json", place / "run" / "head.safetensors"
    data = weights.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    for text in ('"a\\u0000b"', '"' + "x" * (1 << 21) + '"', '"a","__metadata__":{"featcache":"b"'):
        odd = json.dumps(header | {"__metadata__": {"featcache": MARK}}).replace(f'"{MARK}"', text)
        if text.endswith('"b"'):
            odd = odd.replace(
                '"__metadata__": {"featcache": "a",', '"__metadata__": {"featcache": "a"},'
            )
        weights.write_bytes(struct.pack("<Q", len(odd)) + odd.encode() + data[8 + size :])
        facts = json.loads(file.read_text())
        facts["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
        file.write_text(signed(facts, "sha256", "0"))
        assert_one_line_error(run("info", "run"), "head.safetensors")
        assert_one_line_error(run("predict", "run", "--cache", "c.h5"), "head.safetensors")


def test_a_variance_below_zero(place: Path, run: Any) -> None:
    from safetensors.numpy import load_file, save_file

    file, weights = place / "run" / "run.json", place / "run" / "head.safetensors"
    facts = json.loads(file.read_text())
    with weights.open("rb") as opened:
        size = struct.unpack("<Q", opened.read(8))[0]
        metadata = json.loads(opened.read(size))["__metadata__"]
    state = load_file(weights)
    state["0.running_var"][:] = -1
    save_file(state, weights, metadata)
    facts["weights_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    file.write_text(signed(facts, "sha256", "0"))
    for verb in RUN_VERBS:
        assert_one_line_error(run(*verb), "variances from 0, found -1.0 in 0.running_var")


# --- a cache: identity, provenance, user block, names

CACHE_VERBS = [
    ["info", "odd.h5"], ["info", "odd.h5", "--json"], ["verify", "odd.h5"],
    ["train", "odd.h5", "r2"], ["sweep", "odd.h5", "r2", "--trials", 2],
    ["select", "odd.h5", "n.h5"], ["evaluate", "run", "--cache", "odd.h5"],
    ["predict", "run", "--cache", "odd.h5"],
]  # fmt: skip


def refuse_by_all(run: Any, place: Path, *parts: str) -> None:
    for verb in CACHE_VERBS:
        assert_one_line_error(run(*verb), *parts)
    assert sorted(p.name for p in place.iterdir()) == ["c.h5", "odd.h5", "run"]


@pytest.mark.parametrize("name", BAD_VALUES)
@pytest.mark.parametrize("part", ["identity", "provenance"])
def test_a_value_in_a_cache(part: str, name: str, place: Path, run: Any) -> None:
    text, message = BAD_VALUES[name]
    container_of(place / "odd.h5", **{part: np.array(f'{{"a":{text}}}'.encode())})
    if name in {"NaN", "lists as deep as a parser goes"}:
        refuse_by_all(run, place, f"cache, {part}: expected a JSON object", message)
    assert_one_line_error(run("info", "odd.h5"), f"cache, {part}: expected a JSON object", message)


@pytest.mark.parametrize("name", SHORT)
def test_a_value_in_a_user_block(name: str, place: Path, run: Any) -> None:
    text, message = BAD_VALUES[name]
    raw = (place / "c.h5").read_bytes()
    block = signed(read_block(place / "c.h5") | {"a": MARK}, "user_block_sha256", text)
    (place / "odd.h5").write_bytes(block.encode().ljust(4096, b"\0") + raw[block_size(raw) :])
    if len(block) < 4096:
        assert_one_line_error(run("info", "odd.h5"), "an unreadable user block", message)


NAMES: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "a class that is not UTF-8": ({"classes": np.array([b"x", b"caf\xe9"])}, "names in UTF-8"),
    "a class with NUL": ({"classes": np.array([b"x", b"a\0b"])}, "texts without NUL"),
    "half a character": ({"classes": np.array([b"x", b"\xed\xa0\x80"])}, "names in UTF-8"),
    "a failure with NUL": ({"failures/reasons": np.array([b"a\0b"])}, "texts without NUL"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_a_cache(name: str, place: Path, run: Any) -> None:
    arrays, message = NAMES[name]
    container_of(place / "odd.h5", **arrays)
    refuse_by_all(run, place, message)


@pytest.mark.parametrize("column", ["paths", "groups"])
def test_a_path_with_nul(column: str, place: Path, run: Any) -> None:
    names = {f"splits/train/{column}": np.array([b"a", b"b\0c", b"d"])}
    container_of(place / "odd.h5", **names)
    for verb in (["select", "odd.h5", "n.h5"], ["train", "odd.h5", "r2"]):
        assert_one_line_error(run(*verb))
    assert_one_line_error(run("select", "odd.h5", "n.h5"), "texts without NUL, found one with")


# --- an unfinished extraction, an unfinished sweep


@pytest.fixture
def unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an extraction that was stopped; its images beside it."""
    from featcache.extraction import finish

    write_tree(tmp_path / "data", {"train": 2, "valid": 2})

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finish, "write_rows", stop)
        with pytest.raises(KeyboardInterrupt):
            extract(tmp_path / "data", tmp_path / "n.h5", backbone=TINY[1], device="cpu")
    return tmp_path / "n.h5.partial"


EXTRACT = ["extract", "data", "n.h5", *TINY, "--device", "cpu"]


def test_a_value_in_a_manifest(unfinished: Path, run: Any) -> None:
    file = unfinished / "manifest.json"
    facts = json.loads(file.read_text())
    facts["provenance"]["a"] = MARK
    for name in SHORT:
        file.write_text(signed(facts, "sha256", BAD_VALUES[name][0]))
        assert_one_line_error(run(*EXTRACT), "a readable manifest", BAD_VALUES[name][1])
    assert_one_line_error(run("verify", "n.h5"), "whose manifest cannot be read")


@pytest.mark.parametrize("change", [
    lambda f: f["engine"].update(batch_size=10**18), lambda f: f["engine"].update(num_threads=0),
    lambda f: f["engine"].update(batch_size="4"), lambda f: f["engine"].update(other=1),
    lambda f: f.update(engine=None), lambda f: f.update(provenance=[]),
    lambda f: f.update(fingerprint=1), lambda f: f.update(shards=[1]), lambda f: f.pop("shards"),
    lambda f: f["shards"][0].update(num_vectors=10**18),
    lambda f: f["shards"][0].update(file="shard." + "9" * 30),
    lambda f: f["shards"][0].update(file=["shard.00000"]),
])  # fmt: skip
def test_a_manifest_of_other_values(
    change: Callable[[dict[str, Any]], object], unfinished: Path, run: Any
) -> None:
    file = unfinished / "manifest.json"
    facts = json.loads(file.read_text())
    change(facts)
    file.write_text(signed(facts, "sha256", "0"))
    assert_one_line_error(run(*EXTRACT), "unfinished extraction: expected a readable manifest")


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes")
@pytest.mark.parametrize("name", ["manifest.json", "shard.00000"])
def test_a_pipe_in_an_unfinished_extraction(name: str, unfinished: Path, run: Any) -> None:
    (unfinished / name).unlink()
    os.mkfifo(unfinished / name)
    done = run(*EXTRACT)
    if name == "manifest.json":
        assert_one_line_error(done, "not a regular file")
    else:
        assert done.code == 0, done.err


@pytest.mark.parametrize("change", [
    lambda rows: rows[0].update(views=MARK), lambda rows: rows[0].update(path=MARK),
    lambda rows: rows[0].update(image_sha256="zz"), lambda rows: rows[0].update(views=10**9),
    lambda rows: rows[0].pop("truncated"), lambda rows: rows.pop(), lambda rows: rows.append(1),
])  # fmt: skip
def test_a_table_of_a_shard_that_was_not_written_so_is_made_again(
    change: Callable[[list[dict[str, Any]]], object], unfinished: Path, run: Any
) -> None:
    file, shard = unfinished / "manifest.json", unfinished / "shard.00000"
    facts, data = json.loads(file.read_text()), shard.read_bytes()
    start = data.index(b'[{"image_bytes"')
    rows = json.loads(data[start:])
    change(rows)
    odd = data[:start] + filled(rows, "NaN").encode()
    shard.write_bytes(odd)
    facts["shards"][0]["sha256"] = hashlib.sha256(odd).hexdigest()
    file.write_text(signed(facts, "sha256", "0"))
    done = run(*EXTRACT)
    assert done.code == 0, done.err
    assert run("verify", "n.h5").code == 0


SWEEP = ["sweep", "c.h5", "best", "--trials", 2, "--device", "cpu"]
TRIAL = {"number": 0, "params": {}, "state": "done", "score": 0.5, "losses": [], "best_epochs": []}


@pytest.mark.parametrize("entry", [
    {"trials": [TRIAL | {"score": MARK}]}, {"trials": [TRIAL | {"state": MARK}]},
    {"trials": [TRIAL | {"state": "great"}]}, {"trials": [TRIAL | {"number": -1}]},
    {"trials": [TRIAL | {"number": 10**12}]}, {"trials": [TRIAL | {"losses": [["a"]]}]},
    {"trials": [1]}, {"trials": 1}, {"trials": [{"number": 0}]}, {"repeat": 1}, {"repeat": {}},
    {"repeat": {"0": ["a"], "prior": [1]}}, {"repeat": {"0": 1, "prior": [1]}},
])  # fmt: skip
def test_an_entry_of_a_journal(
    entry: dict[str, Any], place: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featcache.sweeps.search import Search

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Search, "search", stop)
        assert run(*SWEEP).code == 130
    journal = place / "best.sweep" / "journal.jsonl"
    with journal.open("a") as file:
        file.write(filled(entry, "NaN") + "\n")
    assert_one_line_error(run(*SWEEP), "an unfinished sweep: expected its journal", "best.sweep")


# --- names are checked where they come in


@pytest.mark.parametrize(("change", "what"), [
    ({"classes": ["a", "caf\udce9"]}, "classes"), ({"classes": ["a", "b\0"]}, "classes"),
    ({"classes": ["a", "\ud800"]}, "classes"), ({"classes": ["a", "b" * (1 << 21)]}, "classes"),
    ({"paths": ["a\0", "b"]}, "paths"), ({"paths": ["\ud800", "b"]}, "paths"),
    ({"groups": ["a\0", "b"]}, "groups"), ({"groups": ["\udfff", "b"]}, "groups"),
    ({"identity": {"a": float("nan")}}, "identity"), ({"identity": {"a": 1 << 64}}, "identity"),
    ({"identity": {1: 2, "1": 3}}, "identity"), ({"identity": {"a": "\ud800"}}, "identity"),
    ({"provenance": {"a": "b\0"}}, "provenance"), ({"provenance": {"a": {1}}}, "provenance"),
    ({"provenance": {"a": json.loads("[" * 500 + "]" * 500)}}, "provenance"),
])  # fmt: skip
def test_write_cache_takes_nothing_that_cannot_be_read(
    change: dict[str, Any], what: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"paths": ["a", "b"], "classes": ["a", "b"]} | change
    with pytest.raises(DataError, match=what):
        write_cache(tmp_path / "n.h5", np.ones((2, 3), "f4"), [0, 1], **given)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", [r"caf\udce9", "\\ud800", "a\0b"])
def test_names_of_a_csv(name: str, place: Path, run: Any) -> None:
    write_tree(place / "data", {"train": 1})
    images = sorted(p.relative_to(place).as_posix() for p in place.glob("data/*/*/*.*"))
    rows = [f"{image},{label}" for image, label in zip(images, ["x", name], strict=True)]
    (place / "d.csv").write_text("path,target\n" + "\n".join(rows))
    done = run("extract", "d.csv", "n.h5", *TINY)
    if name == "\\ud800":  # these are six letters
        assert done.code == 0, done.err
    else:
        assert_one_line_error(done)
        assert not (place / "n.h5").exists()


@pytest.mark.parametrize("name", ["caf\udce9", "\udc80"])
def test_select_renames_to_no_such_class(name: str, place: Path, run: Any) -> None:
    done = run("select", "c.h5", "n.h5", "--rename", f"covid={name}")
    assert_one_line_error(done, "classes: expected names in UTF-8")
    assert not (place / "n.h5").exists()


def test_a_class_of_200000_letters_is_shortened_in_text(place: Path, run: Any) -> None:
    rng = np.random.default_rng(0)
    write_cache(
        place / "long.h5", {s: rng.normal(size=(40, 4)).astype("f4") for s in ("train", "valid")},
        [0, 1] * 20, {s: [f"{s}/{i}" for i in range(40)] for s in ("train", "valid")},
        classes=["a" * 200_000, "b" * 200_000],
    )  # fmt: skip
    for verb in (
        ["info", "long.h5"], ["verify", "long.h5"], ["train", "long.h5", "r2", "--epochs", 1],
        ["info", "r2"], ["evaluate", "r2", "--split", "valid", "--positive", "a" * 200_000],
        ["predict", "r2", "--cache", "long.h5", "--csv", "p.csv"],
        ["select", "long.h5", "n.h5", "--classes", "a" * 200_000 + "," + "b" * 200_000],
        ["evaluate", "r2", "--cache", "c.h5"], ["predict", "r2", "--cache", "c.h5"],
    ):  # fmt: skip
        done = run(*verb)
        assert len(done.out) + len(done.err) < 200_000, verb
        assert "Traceback" not in done.err
        if "c.h5" not in verb:
            assert done.code == 0, done.err
    assert len((place / "p.csv").read_text().splitlines()[0]) > 400_000  # data are whole


# --- no regular file, by every argument of every verb


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes and links")
@pytest.mark.parametrize("kind", ["pipe", "loop", "device"])
def test_no_regular_file_is_said_at_once(kind: str, place: Path, run: Any) -> None:
    for odd in ("x.h5", "x.csv", "x.zip", "x.pt", "x.toml", "x.safetensors", "x.png"):
        if kind == "pipe":
            os.mkfifo(place / odd)
        else:
            (place / odd).symlink_to(odd if kind == "loop" else "/dev/zero")
    write_tree(place / "data", {"train": 1})
    for verb in (
        ["info", "x.h5"], ["verify", "x.h5"], ["train", "x.h5", "r2"], ["select", "x.h5", "n.h5"],
        ["sweep", "x.h5", "r2", "--trials", 2], ["evaluate", "run", "--cache", "x.h5"],
        ["predict", "run", "--cache", "x.h5"], ["predict", "run", "x.png"],
        ["select", "c.h5", "n.h5", "--table", "x.csv"], ["split", "x.csv", "out"],
        ["split", "x.zip", "out"], ["extract", "x.csv", "n.h5", *TINY],
        ["extract", "x.zip", "n.h5", *TINY], ["extract", "x.png", "n.h5", *TINY],
        ["extract", "data", "n.h5", "--backbone", "torchvision:resnet18", "--weights", "x.pt"],
        ["extract", "data", "n.h5", "--backbone", "torchvision:resnet18", "--weights",
         "x.safetensors"],
        ["sweep", "c.h5", "r2", "--trials", 2, "--space", "x.toml"], ["info", "x.csv"],
        ["evaluate", "x.h5"], ["predict", "x.h5", "data"], ["export", "x.h5", "n.pt"],
        ["evaluate", "run", "--against", "x.h5"],
        ["evaluate", "run", "--by", "sex", "--table", "x.csv"],
    ):  # fmt: skip
        done = run(*verb)
        assert_one_line_error(done)
        if verb[:2] not in (["predict", "run"],) or "x.png" not in verb:
            assert "regular file" in done.err or "directory" in done.err, (verb, done.err)
    for name in ("run.json", "head.safetensors"):
        (place / "run" / name).unlink()
        (place / "run" / name).symlink_to(place / "x.h5")
        assert_one_line_error(run("info", "run"), "not a regular file")
    if kind != "loop":  # a destination: tests of outputs
        assert_one_line_error(run("extract", "data", "x.h5", *TINY), "not a regular file")
