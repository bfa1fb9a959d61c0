"""The recipe of a cache: a backbone, the rules for pixels, and what they make of an image.

``make_recipe`` turns options into one, ``recipe_from_identity`` rebuilds the one a cache was made
by, so that extraction, verification and prediction preprocess alike by construction.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.backbones.backbone import Backbone, build_backbone
from featcache.backbones.libraries import find_transform
from featcache.cache.earlier import refuse_misbuilt
from featcache.data.dataset import ImageDataset, Sample
from featcache.data.folders import training_split
from featcache.errors import BackboneError, ConfigError, DataError
from featcache.files import canonical_json
from featcache.pixels.dicom_rules import DicomRules
from featcache.pixels.images import PixelRules
from featcache.pixels.inspection import check_bit_depth, deep_kind
from featcache.pixels.isolation import DECODE_SECONDS, IsolatedDecoder
from featcache.pixels.views import PLAIN, ViewRules, render
from featcache.threads import Threads
from featcache.untrusted import MAX_PIXELS

NUM_PROBES = 4
"""Real images that go through the plain network and the engine before a run."""
_NUM_DEPTH_SAMPLES = 32
_FEATURE_DTYPES = ("float32", "float16")

_Colour = tuple[float, float, float]
"""A value for each of red, green and blue."""


@dataclass(frozen=True)
class Recipe:
    """What decides the features' values.

    Attributes:
        backbone: The frozen network.
        rules: How bytes become pixels.
        feature_dtype: ``float32`` or ``float16``.
        view_rules: Which views the network sees of images to train on.
        has_dark_colour: Whether the user said that 16-bit colour without high values is meant so.
    """

    backbone: Backbone
    rules: PixelRules
    feature_dtype: str
    view_rules: ViewRules = PLAIN
    has_dark_colour: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """The recipe as JSON values: the cache's ``/identity``."""
        return {
            "backbone": self.backbone.name,
            "weights_sha256": self.backbone.weights_sha256,
            **self.rules.as_identity(),
            "mean": list(self.backbone.mean),
            "std": list(self.backbone.std),
            **self.view_rules.as_identity(),
            "num_features": self.backbone.num_features,
            "feature_dtype": self.feature_dtype,
            # Absent where nothing is to be said, so that other identities stay what they were.
            **({"dark_colour": "as stored"} if self.has_dark_colour else {}),
            **({"built_as": built_as} if (built_as := self.backbone.built_as) else {}),
        }

    @property
    def fingerprint(self) -> str:
        """sha256 of the identity, 64 hex digits."""
        return hashlib.sha256(canonical_json(self.identity).encode()).hexdigest()


def make_recipe(
    backbone: Backbone,
    dataset: ImageDataset,
    *,
    transform: str | None = None,
    crop_mode: str | None = None,
    interpolation: str | None = None,
    bit_depth: int | str = "auto",
    truncated: str = "skip",
    max_pixels: int = MAX_PIXELS,
    window: str | None = None,
    frame: int | None = None,
    feature_dtype: str = "float32",
    views: int = 1,
    augment: str | None = None,
) -> Recipe:
    """Turn options into a recipe.

    Raises:
        BackboneError: If the backbone's library documents no transform that can be used.
        ConfigError: If an option has no such value, contradicts another, or there are views and
            nothing to train on.
        DataError: If ``bit_depth`` is ``auto`` and a sample of deep images does not use its bits.
    """
    if feature_dtype not in _FEATURE_DTYPES:
        expected = " or ".join(_FEATURE_DTYPES)
        raise ConfigError("--feature-dtype", expected=expected, found=feature_dtype)
    view_rules = ViewRules(views, augment)
    if view_rules != PLAIN and training_split(dataset.splits) is None:
        raise ConfigError(
            "--views", expected="images to train on: a split train, or no splits at all",
            found="only " + ", ".join(dataset.splits), where=dataset.root,
            hint="Leave --views and --augment out: other splits get the plain view alone",
        )  # fmt: skip
    has_dark_colour = False
    if bit_depth == "auto":
        for maxima in depths_by_kind(dataset, max_pixels=max_pixels).values():
            check_bit_depth(maxima)
        bit_depth = 16
    elif bit_depth == 16:
        has_dark_colour = is_dark(depths_by_kind(dataset, {"colour"}, max_pixels)["colour"])
    rules = PixelRules(
        backbone.image_size, **_choose_transform(backbone, transform, crop_mode, interpolation),
        bit_depth=bit_depth, truncated=truncated, max_pixels=max_pixels,
        dicom=_choose_dicom(dataset, window, frame),
    )  # fmt: skip
    return Recipe(backbone, rules, feature_dtype, view_rules, has_dark_colour)


def _choose_dicom(
    dataset: ImageDataset, window: str | None, frame: int | None
) -> DicomRules | None:
    """Return what is chosen of DICOM files; None where there are none."""
    rules = DicomRules(window, frame)
    if dataset.has_dicom:
        return rules
    if rules != DicomRules():
        raise ConfigError(
            "--window" if frame is None else "--frame", expected="DICOM files", found="none",
            where=dataset.root, hint="Leave it out",
        )  # fmt: skip
    return None


def _choose_transform(
    backbone: Backbone, transform: str | None, crop_mode: str | None, interpolation: str | None
) -> dict[str, Any]:
    """Return the rules of resizing: those of the backbone's library, or the given ones."""
    if transform is None:
        return {
            "crop_mode": crop_mode or "squash", "interpolation": interpolation or "bilinear"
        }  # fmt: skip
    if transform != "library":
        raise ConfigError("--transform", expected="library, or none", found=transform)
    found = asdict(find_transform(backbone.name, backbone.image_size))
    for option, given in (("crop_mode", crop_mode), ("interpolation", interpolation)):
        if given not in {None, found[option]}:
            raise ConfigError(
                f"--{option.replace('_', '-')} with --transform library",
                expected=f"none, or {found[option]}, as {backbone.name}'s library has it",
                found=given, hint="Leave one of the two out",
            )  # fmt: skip
    return found


def sample_depths(dataset: ImageDataset) -> list[int]:
    """Return the largest value of each image of more than 8 bits in a seeded sample of 32."""
    return [maximum for maxima in depths_by_kind(dataset).values() for maximum in maxima]


def depths_by_kind(
    dataset: ImageDataset, kinds: Collection[str] = ("grey", "colour"), max_pixels: int = MAX_PIXELS
) -> dict[str, list[int]]:
    """Return what ``sample_depths`` returns, of grey and of colour images.

    They are decoded in a child process: nothing is known yet of who they may hang or crash.
    """
    chosen = random.Random(0).sample(dataset.samples, min(_NUM_DEPTH_SAMPLES, len(dataset.samples)))
    maxima: dict[str, list[int]] = {kind: [] for kind in kinds}
    with IsolatedDecoder() as child:  # no process until it is asked
        for sample in chosen:
            try:
                data = dataset.read(sample)
                kind = deep_kind(data)
                maximum = child.deep_maximum(data, max_pixels) if kind in maxima else None
            except DataError:
                continue  # it will fail, with its reason, when its turn comes
            if kind is not None and maximum is not None:
                maxima[kind].append(maximum)
    return maxima


def is_dark(maxima: Sequence[int]) -> bool:
    """Return whether images of 16 bits are nearly black: there are some, and all fit into 14."""
    return bool(maxima) and max(maxima) < 2**14


def decode_probes(
    dataset: ImageDataset, samples: Sequence[Sample], rules: PixelRules, *, isolate: bool = False
) -> list[npt.NDArray[np.uint8]]:
    """Decode the first good images, evenly spread over ``samples``, to check an engine with.

    One that a decoder hangs on is no good one.

    Args:
        dataset: Where they are read from.
        samples: What to choose from.
        rules: How bytes become pixels.
        isolate: Decode in a child process: an earlier run was killed, perhaps by an image.

    Returns:
        At most ``NUM_PROBES`` plain views, each (S, S) if the image is grey, else (S, S, 3), uint8.
    """
    probes: list[npt.NDArray[np.uint8]] = []
    step = max(1, len(samples) // NUM_PROBES)
    with IsolatedDecoder() as child, Threads("probe", 1) as threads:
        renderer = child.render if isolate else render
        for sample in itertools.chain(samples[::step], samples):
            if len(probes) == NUM_PROBES:
                break
            try:
                data = dataset.read(sample)
                rendering = threads.submit(renderer, data, [(rules, PLAIN)], b"")
                # an isolated decoder keeps the time itself
                probes.append(rendering.result(None if isolate else DECODE_SECONDS).views[0][0])
            except DataError:
                continue
            except FutureTimeoutError:
                threads.replace_one()
    return probes


def recipe_from_identity(
    identity: Mapping[str, Any],
    *,
    weights: str | Path | None = None,
    backbone: Backbone | str | None = None,
    max_pixels: int = MAX_PIXELS,
    source: object = None,
) -> Recipe:
    """Rebuild the recipe a cache or a run was made by.

    A stranger's file may name any ``python:`` function, and building the backbone calls it: such a
    name is followed only when the caller gives the same one.

    Args:
        identity: A cache's identity.
        weights: The backbone's weights file, where neither the library's own nor ``random`` were
            used: those two are found by the identity's sha256.
        backbone: The backbone itself, if it was made in Python, or its name.
        max_pixels: Images of more pixels will be refused.
        source: Where the cache's weights came from, if that is recorded (``weights_source`` of its
            provenance): after ``random`` nothing is downloaded.

    Raises:
        BackboneError: If the backbone cannot be built, or has other weights than the identity's.
        DataError: If the identity has no pixel rules: features made elsewhere.
        ConfigError: If this version has no such pixel rule or augmentation.
        CacheError: If an earlier version built the backbone unlike its library.
    """
    wanted = str(identity.get("weights_sha256"))
    try:
        mean, std = (_three(identity[key]) for key in ("mean", "std"))
        str(identity["backbone"])
        rules = PixelRules.from_identity(dict(identity))
        view_rules = ViewRules.from_identity(identity)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            "identity of the cache", expected="a backbone and its preprocessing",
            found="features made elsewhere", hint="This needs a cache made by featcache extract",
        ) from error  # fmt: skip
    if not isinstance(backbone, Backbone):
        refuse_misbuilt(identity)
        backbone = _rebuild_backbone(
            _trusted_name(identity, backbone), weights, wanted,
            is_random=str(source).startswith("random"), image_size=rules.image_size, mean=mean,
            std=std,
        )  # fmt: skip
    if backbone.weights_sha256 != wanted:
        raise BackboneError(
            f"weights of {backbone.name}", expected=f"sha256 {wanted} (of the state)",
            found=backbone.weights_sha256, where=backbone.weights_source,
            hint="Name the file the cache was made with by --weights FILE",
        )  # fmt: skip
    if (backbone.mean, backbone.std, backbone.image_size) != (mean, std, rules.image_size):
        raise BackboneError(
            f"preprocessing of {backbone.name}", expected=[mean, std, rules.image_size],
            found=[backbone.mean, backbone.std, backbone.image_size],
            hint="Use the backbone the cache was made with",
        )  # fmt: skip
    recipe = Recipe(
        backbone, replace(rules, max_pixels=max_pixels), str(identity.get("feature_dtype")),
        view_rules, has_dark_colour="dark_colour" in identity,
    )  # fmt: skip
    for key in sorted(recipe.identity.keys() | identity.keys()):
        if recipe.identity.get(key) != identity.get(key):
            raise DataError(
                f"identity, {key}",
                expected=identity.get(key),
                found=recipe.identity.get(key),
                hint="This version of featcache cannot make such features",
            )
    return recipe


def _rebuild_backbone(
    name: str, weights: str | Path | None, sha256: str, *, is_random: bool, **options: Any
) -> Backbone:
    """Build a backbone by its name; if its weights are not at hand, say which are wanted.

    Without ``weights`` both the library's own and the seeded random ones are tried, those first
    that ``is_random`` says they were: an identity has their sha256 alone.
    """

    def build(source: str | Path | None) -> Backbone:
        return build_backbone(name, weights=source, **options)

    def build_random() -> Backbone | None:
        with contextlib.suppress(BackboneError, ConfigError):
            made = build("random")
            return made if made.weights_sha256 == sha256 else None
        return None

    if weights is None and is_random and (made := build_random()):
        return made
    try:
        backbone = build(weights)
    except BackboneError as error:
        if weights is not None or isinstance(error.__cause__, ModuleNotFoundError):
            raise
        if not is_random and (made := build_random()):
            return made
        raise BackboneError(
            f"backbone {name}", expected=f"weights with sha256 {sha256} (of the state)",
            found=error.found, where=error.where,
            hint="Name the file the cache was made with by --weights FILE",
        ) from error  # fmt: skip
    if weights is None and backbone.weights_sha256 != sha256 and not is_random:
        return build_random() or backbone
    return backbone


def _trusted_name(identity: Mapping[str, Any], given: str | None) -> str:
    name = str(identity["backbone"])
    if given is not None and given != name:
        raise BackboneError("backbone", expected=name, found=given, hint="Name the same one")
    if name.startswith("python:") and given is None:
        raise BackboneError(
            "backbone", expected="your word that its code may run", found=name,
            hint=f"Pass --backbone {name}, in Python backbone=, if you trust it",
        )  # fmt: skip
    return name


def _three(values: Any) -> _Colour:
    red, green, blue = (float(v) for v in values)
    return red, green, blue
