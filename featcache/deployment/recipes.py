"""The recipes of a run: a backbone and its preprocessing for each of its caches.

Reads: backbone weights. Writes: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from featcache.backbones.backbone import Backbone
from featcache.errors import ConfigError
from featcache.extraction.recipe import Recipe, recipe_from_identity

if TYPE_CHECKING:
    from featcache.heads.run import Run

Weights: TypeAlias = str | Path | Sequence[str | Path] | None
"""A weights file for all of a run's caches, or one for each."""
Backbones: TypeAlias = Backbone | str | Sequence[Backbone | str] | None
"""A backbone, or several of which each cache finds its own."""


def rebuild_recipes(
    run: Run, weights: Weights, backbone: Backbones, max_pixels: int
) -> list[Recipe]:
    """Return the recipe of each of a run's caches: see ``classifier.load_classifier``.

    Raises:
        BackboneError: If a backbone's weights are not at hand; names the wanted sha256.
        ConfigError: If there are several weights files, and not one for each cache.
    """
    files = _weights_of_each(run, weights)
    return [
        recipe_from_identity(
            cache["identity"], weights=file, backbone=_find_backbone(cache["identity"], backbone),
            max_pixels=max_pixels, source=cache.get("weights_source"),
        )
        for cache, file in zip(run.caches, files, strict=True)
    ]  # fmt: skip


def _weights_of_each(run: Run, weights: Weights) -> list[str | Path | None]:
    """Return the weights file of each of a run's caches."""
    if weights is None or isinstance(weights, str | Path):
        return [weights] * len(run.caches)
    if len(weights) not in {1, len(run.caches)}:
        wanted = f"one, or {len(run.caches)} in the order of the run's caches"
        raise ConfigError("--weights", expected=wanted, found=len(weights))
    return [*weights] * (len(run.caches) // len(weights))


def _find_backbone(identity: Mapping[str, Any], given: Backbones) -> Backbone | str | None:
    """Return which of the given backbones made features of an identity: one alone in any case."""
    if given is None or isinstance(given, str | Backbone):
        return given
    for choice in given:
        facts: dict[str, Any] = {"backbone": choice}
        if isinstance(choice, Backbone):
            facts = {
                "backbone": choice.name, "weights_sha256": choice.weights_sha256,
                "image_size": choice.image_size,
            }  # fmt: skip
        if all(identity.get(key) == value for key, value in facts.items()):
            return choice
    return given[0] if len(given) == 1 else None
