"""Golden examples: images with the pixels and the outputs that the run has for them.

Drawn images, one of each kind that ``predict.py`` reads, and real ones where they are given.

Reads: real images. Writes: nothing.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from featcache.backbones.engine import eager_features
from featcache.data.image_lists import list_images
from featcache.deployment.classifier import Classifier
from featcache.deployment.exporting.graph import input_names
from featcache.deployment.exporting.parity import (
    calibrated_probs,
    decision_names,
    distance_to_threshold,
    draw_phantoms,
    probability_reach,
)
from featcache.deployment.exporting.predict_script import RefusedError, read_pixels
from featcache.errors import ConfigError
from featcache.heads.prediction import predict_probs
from featcache.pixels.images import PixelRules, decode

GOLDEN = "golden"
_DRAWN_PIXELS, _MAX_REAL = 300, 64
_UPRIGHT_TAG, _QUARTER_TURN = 0x0112, 6  # EXIF 2.3


def golden_files(
    rules: PixelRules, max_pixels: int, real: str | Path | None
) -> dict[str, bytes]:  # fmt: skip
    """Return the examples by their names in the folder; real images get numbers for names.

    Args:
        rules: Of an input; the values of the image of 16 bits fit into its bit depth.
        max_pixels: Larger real images are refused.
        real: A folder of real images, or None.

    Raises:
        ConfigError: If a real image is one that ``predict.py`` refuses, or they are more than 64.
        DataError: If there are none, or one cannot be read.
    """
    files = _drawn_files(rules)
    if real is None:
        return files
    dataset = list_images([real])
    if len(dataset.samples) > _MAX_REAL:
        raise ConfigError(
            "--golden", expected=f"at most {_MAX_REAL} images", found=len(dataset.samples),
            where=real, hint="Copy a few of them into a folder of their own",
        )  # fmt: skip
    for number, sample in enumerate(dataset.samples):
        data = dataset.read(sample)
        try:
            read_pixels(data, rules.as_identity(), max_pixels)
        except RefusedError as error:
            raise ConfigError(
                "--golden", expected="images that predict.py reads exactly", found=error,
                where=sample.path, hint="Leave it out",
            ) from error  # fmt: skip
        ending = Path(sample.path).suffix.lower()
        files[f"{GOLDEN}/real_{number:03d}{ending if ending[1:].isalnum() else ''}"] = data
    return files


def _drawn_files(rules: PixelRules) -> dict[str, bytes]:
    grey, other, dark, tinted, *_ = draw_phantoms(_DRAWN_PIXELS, 8)[:, 20:, :]
    bits = 16 if rules.bit_depth == "minmax" else int(rules.bit_depth)
    deep = dark[:, :, 0].astype(np.float64) * (2**bits - 1) / 255
    deep_image = Image.fromarray(deep.round().astype(np.uint16))
    turned = Image.Exif()
    turned[_UPRIGHT_TAG] = _QUARTER_TURN
    # Versions of Pillow differ in which axis of such an image they resize first.
    side = max(rules.image_size, rules.resize_size or 0)
    tall = draw_phantoms(6 * side, 1)[0, :, : 3 * side // 2, 0]
    clear = np.concatenate([tinted, other[:, :, :1]], axis=2)
    return {
        f"{GOLDEN}/{name}": _encoded(image, name, **options)
        for name, image, options in (
            ("grey.png", Image.fromarray(grey[:, :, 0]), {}),
            ("grey.jpg", Image.fromarray(other[:, :, 0]), {"quality": 90}),
            ("colour_turned.jpg", Image.fromarray(tinted), {"quality": 90, "exif": turned}),
            ("alpha.png", Image.fromarray(clear), {}),
            ("16_bits.png", deep_image, {}),
            ("tall.jpg", Image.fromarray(tall), {"quality": 90}),
        )
    }


def _encoded(image: Image.Image, name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if name.endswith(".png") else "JPEG", **options)
    return buffer.getvalue()


def golden_facts(
    classifier: Classifier, files: dict[str, bytes], bound: float
) -> list[dict[str, Any]]:  # fmt: skip
    """Return for each example what pixels and outputs the run has for it.

    ``decision`` is None where features within the bound could change it.

    Args:
        classifier: The run, with its backbones.
        files: Examples by name.
        bound: Largest relative error of features that is allowed.

    Raises:
        DataError: If featcache cannot read one.
    """
    run, recipes = classifier.run, classifier.recipes
    names, facts = input_names(len(recipes)), []
    for file, data in files.items():
        pixels = [decode(data, recipe.rules).pixels for recipe in recipes]
        parts = [
            eager_features(recipe.backbone, image[None])
            for recipe, image in zip(recipes, pixels, strict=True)
        ]
        features: npt.NDArray[np.float32] = np.concatenate(parts, axis=1)
        probs = predict_probs(run.head, run.state, features, run.task)
        reach = float(probability_reach(classifier, features, bound)[0])
        distance = distance_to_threshold(classifier.decisions, run.task, probs)[0]
        (decision,) = decision_names(classifier.decisions, run.classes, run.task, probs)
        facts.append({
            "file": file,
            "pixels_sha256": {
                name: hashlib.sha256(image.tobytes()).hexdigest()
                for name, image in zip(names, pixels, strict=True)
            },
            "probs": probs[0].tolist(),
            "calibrated": calibrated_probs(classifier.decisions, probs)[0].tolist(),
            "decision": None if distance <= reach else decision,
            "tolerance": reach,
        })  # fmt: skip
    return facts
