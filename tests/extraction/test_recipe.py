"""The identity of features: complete, canonical, and enough to make the same recipe again."""

import dataclasses
import hashlib
import json
import os
import random
import sys

import numpy as np
import pytest
import tiny_network
import torch
from efficientnet_pytorch.utils import url_map
from PIL import Image
from sample_images import write_image

from featcache import child
from featcache.backbones.backbone import Backbone, wrap_backbone
from featcache.data.dataset import Samples, scan
from featcache.errors import BackboneError, ConfigError, DataError
from featcache.extraction.recipe import (
    NUM_PROBES,
    Recipe,
    decode_probes,
    make_recipe,
    recipe_from_identity,
    sample_depths,
)
from featcache.pixels.images import PixelRules, decode
from featcache.pixels.views import PLAIN, ViewRules


@pytest.fixture
def dataset(tree):
    return scan(tree)


def tiny_recipe(**rules):
    return Recipe(tiny_network.build(), PixelRules(**{"image_size": 32, **rules}), "float32")


def write_deep(path, largest, seed=0):
    """Write a 16-bit grey PNG with values from 0 to ``largest``."""
    pixels = np.random.default_rng(seed).integers(0, largest, (40, 50)).astype(np.uint16)
    pixels[3, 4] = largest
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


# --------------------------------------------------------------------------------------- identity


def test_the_identity_names_all_that_decides_the_features():
    """The keys and values of a cache's /identity: changing one makes all caches strangers."""
    backbone = tiny_network.build()
    assert tiny_recipe().identity == {
        "backbone": "python:tiny_network:build",
        "weights_sha256": backbone.weights_sha256,
        "image_size": 32,
        "crop_mode": "squash",
        "interpolation": "bilinear",
        "bit_depth": 16,
        "truncated": "skip",
        "orientation": "exif",
        "alpha": "dropped",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "views": 1,
        "augmentation": None,
        "num_features": 24,
        "feature_dtype": "float32",
    }


def test_the_fingerprint_is_the_hash_of_the_canonical_identity():
    recipe = tiny_recipe()
    text = json.dumps(recipe.identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    assert recipe.fingerprint == hashlib.sha256(text.encode()).hexdigest()
    assert json.loads(text) == recipe.identity  # lists, no tuples: the same after a round trip


def changed(recipe, **changes):
    """Change fields of the recipe, its rules or its backbone, whichever has them."""
    parts = {"rules": recipe.rules, "backbone": recipe.backbone}
    for key, value in changes.items():
        for name, part in parts.items():
            if key in {field.name for field in dataclasses.fields(part)}:
                parts[name] = dataclasses.replace(part, **{key: value})
    own = {key: value for key, value in changes.items() if key in {"feature_dtype", "view_rules"}}
    return dataclasses.replace(recipe, **parts, **own)


CHANGES = [
    {"name": "other"},
    {"weights_sha256": "0" * 64},
    {"image_size": 33},
    {"crop_mode": "center"},
    {"crop_mode": "border"},
    {"interpolation": "bicubic"},
    {"bit_depth": 12},
    {"bit_depth": 14},
    {"bit_depth": "minmax"},
    {"truncated": "keep"},
    {"mean": (0.485, 0.456, 0.407)},
    {"std": (0.229, 0.224, 0.2251)},
    {"num_features": 25},
    {"feature_dtype": "float16"},
    {"view_rules": ViewRules(2, "crop")},
    {"view_rules": ViewRules(3, "crop")},
    {"view_rules": ViewRules(2, "xray")},
]


def test_the_fingerprint_changes_with_each_of_them():
    fingerprints = [changed(tiny_recipe(), **change).fingerprint for change in [{}, *CHANGES]]
    assert len(set(fingerprints)) == len(fingerprints) == 18


def test_the_fingerprint_does_not_change_with_what_does_not_matter():
    for change in ({"weights_source": "elsewhere.pt"}, {"classifier_name": "fc"}):
        assert changed(tiny_recipe(), **change).fingerprint == tiny_recipe().fingerprint


def test_the_fingerprint_changes_with_a_weight_but_not_with_a_classifier():
    def recipe(network, classifier_name=None):
        backbone = wrap_backbone("mine", network, image_size=32, classifier_name=classifier_name)
        return Recipe(backbone, PixelRules(32), "float32")

    def classified(num_classes):
        return torch.nn.Sequential(tiny_network.network(), torch.nn.Linear(24, num_classes))

    two, seven = recipe(classified(2), "1"), recipe(classified(7), "1")
    assert two.fingerprint == seven.fingerprint
    network = classified(2)
    with torch.no_grad():
        network[0].norm.running_mean[0] += 1e-6
    assert recipe(network, "1").fingerprint != two.fingerprint


# ------------------------------------------------------------------------------- options to recipe


def test_options_become_rules(dataset):
    recipe = make_recipe(
        tiny_network.build(), dataset, crop_mode="border", interpolation="bicubic",
        bit_depth=12, truncated="keep", feature_dtype="float16",
    )  # fmt: skip
    assert recipe.rules == PixelRules(32, "border", "bicubic", 12, "keep")
    assert recipe.feature_dtype == "float16"
    assert make_recipe(tiny_network.build(), dataset).rules == PixelRules(32)


@pytest.mark.parametrize(
    "options",
    [
        {"feature_dtype": "float64"},
        {"crop_mode": "fit"},
        {"interpolation": "nearest"},
        {"bit_depth": 10},
        {"truncated": "drop"},
    ],
)
def test_options_that_do_not_exist_are_refused(dataset, options):
    (name,) = options
    with pytest.raises(ConfigError, match=name.replace("_", "-")):
        make_recipe(tiny_network.build(), dataset, **options)


def test_auto_bit_depth_asks_about_12_bits_in_16(tmp_path):
    for i in range(6):
        write_deep(tmp_path / "data" / "covid" / f"{i}.png", 4095, seed=i)
        write_image(tmp_path / "data" / "normal" / f"{i}.png", i)
    dataset = scan(tmp_path / "data")
    with pytest.raises(DataError, match="none above 4095") as caught:
        make_recipe(tiny_network.build(), dataset)
    assert "--bit-depth 12" in str(caught.value)
    for bit_depth in (12, 14, 16, "minmax"):  # whoever answers is believed
        recipe = make_recipe(tiny_network.build(), dataset, bit_depth=bit_depth)
        assert recipe.rules.bit_depth == bit_depth


def test_auto_bit_depth_takes_images_that_use_their_bits_and_8_bit_images(tmp_path, dataset):
    assert make_recipe(tiny_network.build(), dataset).rules.bit_depth == 16
    assert sample_depths(dataset) == []
    for i, largest in enumerate((4095, 65535, 900)):
        write_deep(tmp_path / "deep" / f"{i}.png", largest)
    (tmp_path / "deep" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    deep = scan(tmp_path / "deep")
    assert sorted(sample_depths(deep)) == [900, 4095, 65535]
    assert make_recipe(tiny_network.build(), deep).rules.bit_depth == 16


def test_the_sample_of_depths_is_taken_in_another_process(tmp_path, monkeypatch):
    """An image that takes a decoder down is left out; without deep ones no process is started."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import os, signal\nimport featcache.pixels.inspection as module\n"
        "real = module.deep_maximum\n"
        "def fragile(data, max_pixels):\n"
        "    if data.endswith(b'CRASH'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(data, max_pixels)\n"
        "module.deep_maximum = fragile\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    for i in range(3):
        write_deep(tmp_path / "deep" / f"{i}.png", 900 + i)
    with (tmp_path / "deep" / "1.png").open("ab") as file:
        file.write(b"CRASH")
    assert sorted(sample_depths(scan(tmp_path / "deep"))) == [900, 902]
    write_image(tmp_path / "plain" / "a.png", 1)

    def fail(*_, **__):
        raise AssertionError("a process")

    monkeypatch.setattr(child.subprocess, "Popen", fail)
    assert sample_depths(scan(tmp_path / "plain")) == []


def test_the_sample_of_depths_is_bounded_spread_and_the_same_every_time(tmp_path):
    for i in range(50):
        write_deep(tmp_path / "deep" / f"{i:02d}.png", 4000 + i)
    deep = scan(tmp_path / "deep")
    state = random.getstate()
    depths = sample_depths(deep)
    assert random.getstate() == state
    assert depths == sample_depths(deep)
    assert len(set(depths)) == 32
    assert max(depths) > 4040  # not just the first 32


def test_probes_are_good_images_spread_over_the_samples(tree, dataset):
    samples = dataset.split("train")
    rules = PixelRules(32)
    probes = decode_probes(dataset, samples, rules)
    step = len(samples) // NUM_PROBES
    truth = [decode(dataset.read(s), rules).pixels[:, :, 0] for s in samples[::step][:NUM_PROBES]]
    assert np.array_equal(np.stack(probes), np.stack(truth))  # these are grey
    for sample in samples[1:]:
        (tree / sample.path).write_bytes(b"broken")
    probes = decode_probes(dataset, samples, rules)
    assert 1 <= len(probes) <= NUM_PROBES
    assert all(np.array_equal(probe, truth[0]) for probe in probes)
    (tree / samples[0].path).unlink()
    assert decode_probes(dataset, samples, rules) == []
    assert decode_probes(dataset, [], rules) == []


# ------------------------------------------------------------------------------ identity to recipe


def round_trip(identity):
    return json.loads(json.dumps(identity))


@pytest.mark.parametrize("change", CHANGES[2:10] + CHANGES[-1:], ids=str)
def test_a_recipe_is_rebuilt_from_its_identity(change):
    recipe = changed(tiny_recipe(), **change)
    backbone = wrap_backbone("mine", tiny_network.network(), image_size=recipe.rules.image_size)
    recipe = dataclasses.replace(recipe, backbone=backbone)
    again = recipe_from_identity(round_trip(recipe.identity), backbone=backbone)
    assert again == recipe
    assert again.fingerprint == recipe.fingerprint


def test_a_named_backbone_is_rebuilt_with_its_weights_file(tmp_path):
    state = {name: value + 1 for name, value in tiny_network.network().state_dict().items()}
    torch.save(state, tmp_path / "mine.pt")
    network = tiny_network.network()
    network.load_state_dict(state)
    name = "python:tiny_network:network"
    backbone = wrap_backbone(name, network, image_size=48, mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    recipe = Recipe(backbone, PixelRules(48, "center", bit_depth=14), "float16")
    again = recipe_from_identity(
        round_trip(recipe.identity), weights=tmp_path / "mine.pt", backbone=name
    )
    assert isinstance(again.backbone, Backbone)
    assert again.identity == recipe.identity
    assert again.fingerprint == recipe.fingerprint
    assert again.rules == recipe.rules


def test_views_are_rebuilt_from_the_identity():
    recipe = dataclasses.replace(tiny_recipe(), view_rules=ViewRules(8, "xray"))
    assert recipe.identity == tiny_recipe().identity | {"views": 8, "augmentation": "xray"}
    again = recipe_from_identity(round_trip(recipe.identity), backbone=tiny_network.build())
    assert again.view_rules == recipe.view_rules


@pytest.mark.parametrize("change", [{"augmentation": "blur", "views": 2}, {"views": 0}], ids=str)
def test_views_of_another_version_are_refused(change):
    with pytest.raises(ConfigError, match=r"--augment|--views"):
        recipe_from_identity(tiny_recipe().identity | change, backbone=tiny_network.build())


def test_views_need_images_to_train_on(dataset):
    recipe = make_recipe(tiny_network.build(), dataset, views=3, augment="crop")
    assert recipe.view_rules == ViewRules(3, "crop")
    others = Samples(s for s in dataset.samples if s.split != "train")
    rest = dataclasses.replace(dataset, samples=others)
    with pytest.raises(ConfigError, match=r"a split train.*found only valid, test"):
        make_recipe(tiny_network.build(), rest, views=3, augment="crop")
    assert make_recipe(tiny_network.build(), rest).view_rules == PLAIN


def test_a_recipe_of_the_real_lite0_is_rebuilt_from_its_name():
    identity = {
        "backbone": "efficientnet-lite0",
        "weights_sha256": "9c28af10b3b7dc930f8381ec691e4fdc3439ed6845b5c6d94d3cbe705c457ade",
        **PixelRules(64).as_identity(),
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "views": 1,
        "augmentation": None,
        "num_features": 1280,
        "feature_dtype": "float32",
    }
    assert recipe_from_identity(identity).identity == identity


@pytest.mark.parametrize("given", [False, True])
def test_other_weights_are_refused_with_the_hash_that_is_wanted(tmp_path, given):
    wanted = "ab" * 32
    identity = tiny_recipe().identity | {
        "weights_sha256": wanted, "backbone": "python:tiny_network:network"
    }  # fmt: skip
    torch.save(tiny_network.network().state_dict(), tmp_path / "mine.pt")
    weights = tmp_path / "mine.pt" if given else None
    with pytest.raises(BackboneError, match=wanted) as caught:
        recipe_from_identity(identity, weights=weights, backbone=identity["backbone"])
    assert tiny_network.build().weights_sha256 in str(caught.value)
    assert "--weights FILE" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_had_are_named_by_their_hash(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setitem(url_map, "efficientnet-b0", "http://127.0.0.1:9/efficientnet-b0-0.pth")
    identity = tiny_recipe().identity | {"backbone": "efficientnet-b0", "weights_sha256": "cd" * 32}
    with pytest.raises(BackboneError, match="cd" * 32) as caught:
        recipe_from_identity(identity)
    assert "--weights FILE" in str(caught.value)


def test_a_library_that_is_missing_is_still_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    identity = tiny_recipe().identity | {"backbone": "timm:resnet18"}
    with pytest.raises(BackboneError, match=r"pip install 'featcache\[timm\]'"):
        recipe_from_identity(identity)


@pytest.mark.parametrize(
    "change", [{"image_size": 48}, {"mean": [0.5, 0.5, 0.5]}, {"std": [1.0, 1.0, 1.0]}], ids=str
)
def test_a_backbone_that_is_fed_otherwise_is_refused(change):
    identity = tiny_recipe().identity | change
    with pytest.raises(BackboneError, match="preprocessing"):
        recipe_from_identity(identity, backbone=tiny_network.build())


FOREIGN = [
    {},
    {"backbone": "made elsewhere"},
    {"backbone": None, "mean": None},
    {"mean": [0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    {"mean": ["a", "b", "c"], "std": [0.5, 0.5, 0.5]},
]


@pytest.mark.parametrize("identity", FOREIGN, ids=str)
def test_features_made_elsewhere_have_no_recipe(identity):
    with pytest.raises(DataError, match="made elsewhere") as caught:
        recipe_from_identity(identity)
    assert "featcache extract" in str(caught.value)


@pytest.mark.parametrize("key", ["crop_mode", "bit_depth", "orientation", "alpha", "image_size"])
def test_an_identity_without_one_of_its_rules_is_refused(key):
    identity = tiny_recipe().identity
    del identity[key]
    with pytest.raises(DataError):
        recipe_from_identity(identity, backbone=tiny_network.build())


@pytest.mark.parametrize("key", ["backbone", "weights_sha256"])
def test_an_identity_without_its_backbone_is_refused(key):
    identity = tiny_recipe().identity
    del identity[key]
    with pytest.raises((DataError, BackboneError)):
        recipe_from_identity(identity)


@pytest.mark.parametrize(
    "change",
    [{"orientation": "stored"}, {"alpha": "white"}, {"crop_mode": "round"}, {"bit_depth": 9}],
    ids=str,
)
def test_rules_of_another_version_are_refused(change):
    with pytest.raises((DataError, ConfigError)):
        recipe_from_identity(tiny_recipe().identity | change, backbone=tiny_network.build())


@pytest.mark.parametrize(
    "change",
    [{"feature_dtype": "float64"}, {"views": 5}, {"num_features": 25}, {"augmentation": "flip"}],
    ids=str,
)
def test_what_this_version_cannot_make_is_refused_or_kept_in_the_identity(change):
    """Never a recipe that claims to be the cache's and is another."""
    identity = tiny_recipe().identity | change
    try:
        recipe = recipe_from_identity(identity, backbone=tiny_network.build())
    except (DataError, ConfigError, BackboneError):
        return
    assert recipe.identity == identity
