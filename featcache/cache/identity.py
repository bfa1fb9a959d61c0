"""Identities: in what two of them differ, for messages.

An identity is a JSON object of what decides the features' values: backbone, weights, preprocessing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the keys whose values differ, sorted; a missing one counts as None."""
    return [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]


def describe_values(identity: Mapping[str, Any], keys: Iterable[str]) -> str:
    """Return some keys with their values, long ones cut.

    Example:
        >>> describe_values({"image_size": 224, "crop_mode": "squash"}, ["crop_mode", "views"])
        'crop_mode squash, views null'
    """
    return ", ".join(f"{key} {_brief(identity.get(key))}" for key in keys)


def name_differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, str]:
    """Return in which values two identities differ, the wanted and the found ones.

    Example:
        >>> name_differences({"image_size": 224, "views": 1}, {"image_size": 240, "views": 1})
        ('image_size 224', 'image_size 240')
    """
    keys = differing_keys(wanted, found)
    return describe_values(wanted, keys), describe_values(found, keys)


def _brief(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:16]}..."
