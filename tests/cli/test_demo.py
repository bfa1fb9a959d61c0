"""The phantoms are drawn alike every time, and the whole path runs on them."""

import dataclasses
import hashlib
import json
import re
import shlex

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from featcache.cli import demo
from featcache.cli.main import cli
from featcache.errors import ConfigError, RunError


def hash_tree(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    assert demo.make_phantoms(folder, num_per_class=30) == 60
    return folder


def test_phantoms_are_the_same_bytes_for_a_seed(tmp_path):
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        demo.make_phantoms(tmp_path / name, num_per_class=3, seed=seed)
    assert hash_tree(tmp_path / "one") == hash_tree(tmp_path / "two")
    assert not set(hash_tree(tmp_path / "one").values()) & set(
        hash_tree(tmp_path / "other").values()
    )


def test_phantoms_come_in_the_kinds_and_sizes_of_real_collections(phantoms):
    kinds, sizes = {name: set() for name in demo.CLASSES}, set()
    for path in phantoms.rglob("*.*"):
        with Image.open(path) as image:
            kinds[path.parent.name].add((image.format, image.mode))
            sizes.add(image.size)
            assert min(image.size) >= 250
            assert max(image.size) <= 520
    every = {("PNG", "L"), ("JPEG", "L"), ("JPEG", "RGB"), ("PNG", "I;16"), ("PNG", "RGBA")}
    # The kind must not give the class away, as it does in real collections.
    assert kinds == dict.fromkeys(demo.CLASSES, every)
    assert len(sizes) > 50


def test_patients_have_several_pictures_and_one_class(phantoms):
    patients = {name: [] for name in demo.CLASSES}
    for path in phantoms.rglob("*.*"):
        patients[path.parent.name].append(re.match(demo.GROUP_BY, path.name).group(1))
    assert {len(names) for names in patients.values()} == {30}
    assert not set(patients["covid"]) & set(patients["normal"])
    for names in patients.values():
        assert 10 <= len(set(names)) <= 25


def test_disease_whitens_lungs_and_nothing_else():
    patient = demo._draw_patient(np.random.default_rng(3), sick=True)
    grid = np.linspace(-1, 1, 128, dtype=np.float32)
    x, y = np.meshgrid(grid, grid)
    healthy = demo._draw_density(dataclasses.replace(patient, spots=()), x, y)
    changed = demo._draw_density(patient, x, y) - healthy
    lungs = demo._draw_lungs(patient, x, y)
    assert changed.max() > 0.1
    assert changed.min() > -0.01
    assert np.abs(changed[lungs < 1e-3]).max() < 1e-3
    for side in (x < 0, x > 0):  # both lungs
        assert changed[side].max() > 0.05


def test_16_bit_phantoms_use_their_top_bits(phantoms):
    num_deep = 0
    for path in phantoms.rglob("*.png"):
        with Image.open(path) as image:
            if image.mode == "I;16":
                num_deep += 1
                assert np.asarray(image).max() > 2**15
    assert num_deep


def test_the_whole_path_runs_and_its_advice_works(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "NUM_PER_CLASS", 10)
    folder, lines = tmp_path / "a demo", []
    summary = demo.run_demo(folder, device="cpu", say=lines.append)
    facts = json.loads((folder / "run/evaluation/test.json").read_text())
    assert (summary.num_images, summary.num_test) == (20, facts["num_samples"])
    assert summary.accuracy == facts["accuracy"]
    assert (summary.sensitivity, summary.specificity) == (
        facts["sensitivity"],
        facts["specificity"],
    )
    json.dumps(summary.as_dict(), allow_nan=False)

    places = {}
    for path in (folder / "split").rglob("P*"):
        places.setdefault(path.name.split("_")[0], set()).add(path.relative_to(folder).parts[1])
    assert {len(splits) for splits in places.values()} == {1}

    assert not [line for line in lines if "\n" in line]  # the command line would print it as \\n
    assert any(f"accuracy {summary.accuracy:.3f}" in line for line in lines)
    commands = [line for line in lines if line.startswith("  featcache ")]
    assert len(commands) == 2
    for command in commands:
        result = CliRunner().invoke(cli, shlex.split(command)[1:])
        assert result.exit_code == 0, result.output

    # Once more into the same folder: made anew, unless something in it is not the demo's.
    (folder / "raw/covid/stray.png").write_bytes(b"")
    before = hash_tree(folder)
    with pytest.raises(RunError, match=r"found raw/covid/stray\.png"):
        demo.run_demo(folder, device="cpu")
    assert hash_tree(folder) == before
    (folder / "raw/covid/stray.png").unlink()
    again = demo.run_demo(folder, device="cpu")
    assert again.accuracy == summary.accuracy
    assert (folder / "run-linear/run.json").is_file()


@pytest.mark.parametrize("name", ["notes.txt", "demo.json"])
def test_other_peoples_folders_are_refused(tmp_path, name):
    raw = tmp_path / "raw"
    raw.mkdir()
    (tmp_path / name).write_text("{}")
    with pytest.raises(RunError, match="Choose another name"):
        demo.run_demo(tmp_path)
    assert raw.is_dir()
    with pytest.raises(RunError, match="Choose another name"):
        demo.run_demo(tmp_path / name)
    assert (tmp_path / name).read_text() == "{}"


def test_an_unknown_device_costs_nothing(tmp_path):
    with pytest.raises(ConfigError):
        demo.run_demo(tmp_path / "new", device="abacus")
    assert not (tmp_path / "new").exists()
