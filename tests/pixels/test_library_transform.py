"""The libraries' own transforms: equal pixels, whatever the size of the image."""

import io
import math

import numpy as np
import pytest
import timm
from PIL import Image
from sample_encodings import as_grey, encoded, noise
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg
from torchvision import models

from featcache.backbones.libraries import find_transform
from featcache.errors import BackboneError, ConfigError, DataError
from featcache.pixels.images import PixelRules, decode

SIZES = [(61, 83), (500, 375), (233, 1000), (224, 224), (232, 300), (700, 61), (31, 30)]
IMAGES = [encoded(noise(*size, 3)) for size in SIZES]


def opened(data):
    return Image.open(io.BytesIO(data)).convert("RGB")


def rules_of(name, size):
    found = find_transform(name, size)
    return PixelRules(size, found.crop_mode, found.interpolation, resize_size=found.resize_size)


def weights_of_torchvision():
    """Return networks whose weights differ in how images are resized, and all those weights."""
    seen = {}
    for name in models.list_models(module=models):
        for weights in models.get_model_weights(name):
            preset = weights.transforms()
            key = preset.resize_size[0], preset.crop_size[0], preset.interpolation
            is_taken = weights is models.get_model_weights(name).DEFAULT
            if is_taken or name.startswith("vit_"):
                seen.setdefault(key, (name, weights))
    return sorted(seen.values(), key=lambda pair: pair[0])


@pytest.mark.parametrize(("name", "weights"), weights_of_torchvision(), ids=str)
def test_pixels_equal_torchvisions_own(name, weights):
    preset = weights.transforms()
    rules = rules_of(f"torchvision:{name}", preset.crop_size[0])
    preset.mean, preset.std = [0.0] * 3, [1.0] * 3  # pixels in [0, 1]
    for data in IMAGES:
        truth = (preset(opened(data)).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        np.testing.assert_array_equal(decode(data, rules).pixels, truth)


TIMM = (
    "resnet50.a1_in1k", "resnet50", "mobilenetv3_small_050.lamb_in1k", "efficientnet_b3.ra2_in1k",
    "vit_base_patch16_clip_224.openai", "convnext_tiny.in12k_ft_in1k_384",
    "vit_so400m_patch14_siglip_384.webli", "eva02_tiny_patch14_336.mim_in22k_ft_in1k",
    "volo_d4_448.sail_in1k", "inception_v4.tf_in1k",
)  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_pixels_equal_timms_own(name):
    config = resolve_data_config(pretrained_cfg=get_pretrained_cfg(name).to_dict())
    side = config["input_size"][-1]
    rules = rules_of(f"timm:{name}", side)
    transform = create_transform(**config | {"mean": (0.0,) * 3, "std": (1.0,) * 3})
    for data in IMAGES:
        truth = (transform(opened(data)).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        np.testing.assert_array_equal(decode(data, rules).pixels, truth)


def test_every_configuration_of_timm_is_taken_or_refused_in_one_line():
    refused = []
    for name in timm.list_pretrained():
        side = get_pretrained_cfg(name).to_dict()["input_size"][-1]
        try:
            found = find_transform(f"timm:{name}", side)
        except BackboneError as error:
            refused.append(str(error))
            continue
        crop_pct = get_pretrained_cfg(name).to_dict()["crop_pct"]
        assert found.resize_size == math.floor(side / crop_pct)
    assert len(refused) < 20
    assert not any("\n" in line for line in refused)


def test_grey_images_stay_grey_and_an_image_smaller_than_the_crop_is_padded():
    rules = PixelRules(48, "center", "bicubic", resize_size=40)
    grey = noise(30, 60)
    found = decode(encoded(grey), rules).pixels
    np.testing.assert_array_equal(found, as_grey(found[:, :, 0]))
    assert not found[:4].any()
    assert found[4:44].any(axis=(1, 2)).all()
    squashed = decode(encoded(grey), PixelRules(48, "squash", resize_size=60)).pixels
    whole = Image.fromarray(grey).resize((60, 60), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(squashed, as_grey(np.asarray(whole)[6:54, 6:54]))


def test_the_size_is_in_the_identity_only_where_there_is_one():
    plain, given = PixelRules(224, "center"), PixelRules(224, "center", resize_size=232)
    assert given.as_identity() == plain.as_identity() | {"resize_size": 232}
    for rules in (plain, given):
        assert PixelRules.from_identity(rules.as_identity()) == rules
    with pytest.raises((ConfigError, DataError), match="resize_size"):
        PixelRules.from_identity(plain.as_identity() | {"resize_size": "232"})
    for odd in ({"resize_size": 0}, {"resize_size": True}, {"crop_mode": "border"}):
        with pytest.raises(ConfigError, match="resize_size"):
            PixelRules(**{"image_size": 224, "crop_mode": "center", "resize_size": 232} | odd)


@pytest.mark.parametrize(
    ("name", "size", "found"),
    [
        ("efficientnet-b0", 224, "efficientnet-b0, whose library documents no transform"),
        ("efficientnet-lite0", 224, "documents no transform"),
        ("python:tiny_network:build", 32, "documents no transform"),
        ("my-resnet", 224, "documents no transform"),
        ("torchvision:resnet50", 256, "expected --image-size 224, which it is for, found 256"),
        ("timm:resnet50.a1_in1k", 288, "expected --image-size 224"),
        ("torchvision:no_such", 224, "no_such"),
        ("timm:no_such", 224, "no_such"),
    ],
)
def test_what_no_library_documents_is_refused(name, size, found):
    with pytest.raises(BackboneError, match=found) as caught:
        find_transform(name, size)
    assert "\n" not in str(caught.value)
