"""The phantoms: the same bytes for a seed, and drawn alike for both classes."""

import dataclasses
import re

import numpy as np
import pytest
from PIL import Image

from featcache.cli import phantoms as drawing


def read_tree(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    assert drawing.make_phantoms(folder, num_per_class=30) == 60
    return folder


def test_phantoms_are_the_same_bytes_for_a_seed(tmp_path):
    for name, seed in (("one", 5), ("two", 5), ("other", 6)):
        drawing.make_phantoms(tmp_path / name, num_per_class=3, seed=seed)
    assert read_tree(tmp_path / "one") == read_tree(tmp_path / "two")
    assert not set(read_tree(tmp_path / "one").values()) & set(
        read_tree(tmp_path / "other").values()
    )


def test_phantoms_come_in_the_kinds_and_sizes_of_real_collections(phantoms):
    kinds, sizes = {name: set() for name in drawing.CLASSES}, set()
    for path in phantoms.rglob("*.*"):
        with Image.open(path) as image:
            kinds[path.parent.name].add((image.format, image.mode))
            sizes.add(image.size)
            assert min(image.size) >= 250
            assert max(image.size) <= 520
    every = {("PNG", "L"), ("JPEG", "L"), ("JPEG", "RGB"), ("PNG", "I;16"), ("PNG", "RGBA")}
    # The kind must not give the class away, as it does in real collections.
    assert kinds == dict.fromkeys(drawing.CLASSES, every)
    assert len(sizes) > 50


def test_patients_have_several_pictures_and_one_class(phantoms):
    patients = {name: [] for name in drawing.CLASSES}
    for path in phantoms.rglob("*.*"):
        patients[path.parent.name].append(re.match(drawing.GROUP_BY, path.name).group(1))
    assert {len(names) for names in patients.values()} == {30}
    assert not set(patients["covid"]) & set(patients["normal"])
    for names in patients.values():
        assert 10 <= len(set(names)) <= 25


def test_disease_whitens_lungs_and_nothing_else():
    patient = drawing.draw_patient(np.random.default_rng(3), sick=True)
    grid = np.linspace(-1, 1, 128, dtype=np.float32)
    x, y = np.meshgrid(grid, grid)
    healthy = drawing._draw_density(dataclasses.replace(patient, spots=()), x, y)
    changed = drawing._draw_density(patient, x, y) - healthy
    lungs = drawing._draw_lungs(patient, x, y)
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
