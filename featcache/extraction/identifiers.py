"""Patients of DICOM images as groups, and paths without names, for the caches of one extraction.

Reads: headers of DICOM files, the provenance of caches that are there. Writes: the salt, and
``CACHE.dicom.csv``, whose columns ``evaluate --by`` and ``audit --source`` take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featcache.cache.container import is_container
from featcache.cache.reading import Cache, open_cache
from featcache.cache.remote_copies import url_of_copy
from featcache.csv_files import csv_text
from featcache.data.dataset import ImageDataset
from featcache.data.dicom_files import COLUMNS
from featcache.data.dicom_groups import Salt, hash_paths, identify_and_keep
from featcache.errors import CacheError, ConfigError
from featcache.extraction.options import ExtractionOptions
from featcache.files import write_bytes
from featcache.renames import beside

_KEYS = ("group_salt", "path_names", "dicom")
"""What the provenance says of identifiers."""


def settle_identifiers(
    dataset: ImageDataset, caches: Sequence[Path], options: ExtractionOptions, *, writes: bool
) -> ImageDataset:
    """Return the data set with groups by patient, and with hashed paths where they are asked for.

    Args:
        dataset: As it was scanned.
        caches: To be made or updated.
        options: What the user asked for.
        writes: Make the salt if it is not there.

    Raises:
        CacheError: If a cache that is there was made with another salt.
        ConfigError: If the salt cannot be read or made.
        DataError: If an ID is on more than a fifth of the images, and nothing is said of it.
    """
    stored = {} if options.rebuild else {path: _stored(path) for path in caches}
    path_names = options.path_names
    if path_names is None and any("path_names" in facts for facts in stored.values()):
        path_names = "hash"
    if not dataset.has_dicom and path_names != "hash":
        if options.path_names is None and options.patient_ids is None:
            return dataset
        return _refuse_unused(dataset, options)
    if options.group_salt is None and (url := url_of_copy(caches[0])):
        raise ConfigError(
            "--group-salt", expected="a FILE for a cache in a store", found="none", where=url,
            hint="Name one here: it is a secret, made if it is not there, and is not sent",
        )  # fmt: skip
    default = beside(caches[0] if len(caches) == 1 else caches[0].parent, ".salt")
    place = default if options.group_salt is None else Path(options.group_salt)
    ids = {path: facts["group_salt"] for path, facts in stored.items() if "group_salt" in facts}
    is_kept = path_names == "hash" or dataset.samples[0].group is None
    salt = Salt.of(place)
    for path, wanted in ids.items():
        if is_kept and salt.id != wanted:
            raise CacheError(
                "salt of the groups", expected=f"that of {path.name}", where=place,
                found="no file" if salt.is_new else "another",
                hint="Name it with --group-salt, or replace the cache with --rebuild",
            )  # fmt: skip
    return identify_and_keep(
        dataset, salt, patient_ids=options.patient_ids, path_names=path_names, say=options.say,
        writes=writes,
    )  # fmt: skip


def _refuse_unused(dataset: ImageDataset, options: ExtractionOptions) -> ImageDataset:
    """Refuse --patient-ids without DICOM files; --path-names keep says what is done anyway."""
    if options.patient_ids is not None:
        raise ConfigError(
            "--patient-ids", expected="DICOM files", found="none", where=dataset.root,
            hint="Leave it out",
        )  # fmt: skip
    return dataset


def _stored(path: Path) -> Mapping[str, Any]:
    if not path.is_file() or not is_container(path):
        return {}
    try:
        return open_cache(path, verify=False).provenance
    except CacheError:
        return {}  # said by whoever opens it to go on with it


def identifier_facts(dataset: ImageDataset) -> dict[str, Any]:
    """Return what a provenance says of the identifiers of a data set."""
    facts = dataset.dicom
    if facts is None:
        return {}
    said: dict[str, Any] = {}
    if facts.salt is not None:
        said["group_salt"] = facts.salt
    if dataset.files:
        said["path_names"] = "hash"
    if facts.columns:
        said["dicom"] = {
            "files": len(facts.columns),
            "for_processing": facts.number_of("intent", "FOR PROCESSING"),
            "burned_in": facts.number_of("burned_in", "YES"),
        }
    return said


def without_identifier_facts(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return a provenance without what an earlier extraction said of identifiers."""
    return {key: value for key, value in provenance.items() if key not in _KEYS}


def columns_file(cache: Path) -> Path:
    """Return the CSV of what the headers say, which lies beside a cache."""
    return beside(cache, ".dicom.csv")


def write_columns(dataset: ImageDataset, cache: Path) -> None:
    """Write what the headers of DICOM files say, a row for each, if there are any."""
    if dataset.dicom is None or not dataset.dicom.columns:
        return
    found = dataset.dicom.columns
    rows = [[s.path, *found[s.path]] for s in dataset.samples if s.path in found]
    write_bytes(columns_file(cache), csv_text(["path", *COLUMNS], rows).encode())


def as_listed(dataset: ImageDataset, cache: Cache, group_salt: str | Path | None) -> ImageDataset:
    """Return a data set with its paths hashed, if those of a cache are.

    Args:
        dataset: As it was scanned.
        cache: The cache.
        group_salt: The salt's file, if it does not lie beside the cache.

    Raises:
        CacheError: If there is no such file, or another salt in it.
    """
    if cache.provenance.get("path_names") != "hash":
        return dataset
    places = [beside(cache.path, ".salt"), beside(cache.path.absolute().parent, ".salt")]
    if group_salt is not None:
        places = [Path(group_salt)]
    place = next((place for place in places if place.is_file()), None)
    salt = None if place is None else Salt.of(place)
    if salt is None or salt.id != cache.provenance.get("group_salt"):
        raise CacheError(
            "salt of the paths", expected=f"that of {cache.path.name}", where=place or places[0],
            found="no file" if salt is None else "another",
            hint="Copy the salt there that lies beside the cache of the extraction",
        )  # fmt: skip
    return hash_paths(dataset, salt.value)[0]
