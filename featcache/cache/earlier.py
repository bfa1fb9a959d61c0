"""Refuse features of networks that earlier versions built unlike their library.

Reads: identities. Writes: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featcache.errors import CacheError

_NETWORKS = {
    "torchvision:inception_v3": "one that does not transform its input (transform_input)",
    "torchvision:googlenet": "one that does not transform its input (transform_input)",
    "timm:fbnetc_100": "one with another epsilon in its batch norms",
    "timm:caformer_": "features behind the first layer of its head",
    "timm:convformer_": "features behind the first layer of its head",
}
"""Start of the backbone's name -> what earlier versions made of it."""


def refuse_misbuilt(identity: Mapping[str, Any], where: Path | None = None) -> None:
    """Refuse an identity of features that come from another network than its library's.

    Caches of those networks have the key ``built_as`` since they are built right.

    Args:
        identity: Of a cache, or of the cache that a run was trained on.
        where: The cache or run.

    Raises:
        CacheError: If it is such a one.
    """
    name = str(identity.get("backbone"))
    found = next((text for start, text in _NETWORKS.items() if name.startswith(start)), None)
    if found is not None and "built_as" not in identity:
        raise CacheError(
            f"features of {name}", expected="the network that its library builds for its weights",
            found=found, where=where,
            hint="An earlier version built it so. Extract again with --rebuild, and train again",
        )  # fmt: skip
