"""Group DICOM images by patient, and take identifiers out of what is kept.

A group is a PatientID with its issuer, hashed with a salt that lies in a file of its own. Files of
one SOPInstanceUID are one image, and share a group. Headers are read in child processes.

Reads: headers of DICOM files, and the pixels of those that share a UID. Writes: the salt.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from featcache.child import DICOM_READERS
from featcache.data.columns import Sample, Samples, sort_samples
from featcache.data.dicom_files import DicomFacts, HeaderFacts
from featcache.data.folders import SPLIT_OF_FOLDER, has_image_ending
from featcache.data.samples import ImageDataset
from featcache.errors import ConfigError, DataError, printable, warn_user
from featcache.files import read_regular
from featcache.formatting import count
from featcache.runtime import Say
from featcache.threads import Threads

PATIENT_IDS = ("keep", "ignore")
PATH_NAMES = ("keep", "hash")

_BATCH = 32  # files a request
_MANY = 5000  # a thousand take a second of two cores
_LARGE_SHARE, _LARGE_COUNT = 0.2, 20
_MOST_SALT_BYTES, _LEAST_SALT_BYTES = 4096, 16


# -------------------------------------------------------------------------------------------- salt


@dataclass(frozen=True)
class Salt:
    """A salt, and the file that it is in, or would be in.

    Attributes:
        path: The file.
        value: 16 bytes or more.
        is_new: Whether the file is not there yet: ``keep`` makes it.
    """

    path: Path
    value: bytes = field(repr=False)
    is_new: bool

    @classmethod
    def of(cls, path: Path) -> Salt:
        """Return the salt in a file, or a new one.

        Raises:
            ConfigError: If the file cannot be read, or is too short.
        """
        if not os.path.lexists(path):
            return cls(path, secrets.token_hex(32).encode(), is_new=True)
        try:
            value = read_regular(path, max_bytes=_MOST_SALT_BYTES).strip()
        except OSError as error:
            raise _unusable(path, error) from error
        if len(value) < _LEAST_SALT_BYTES:
            raise ConfigError(
                "--group-salt", expected=f"{_LEAST_SALT_BYTES} bytes or more", found=len(value),
                where=path, hint="Remove the file, and a new one is made",
            )  # fmt: skip
        return cls(path, value, is_new=False)

    @property
    def id(self) -> str:
        """What tells salts apart, and tells nothing of them."""
        return hashlib.sha256(b"featcache salt " + self.value).hexdigest()[:16]

    def keep(self, say: Say) -> bool:
        """Make the file if it is not there, readable to its owner alone: whole, or not at all.

        Returns:
            Whether the salt is in it: not if another command has just made it.

        Raises:
            ConfigError: If it cannot be made.
        """
        if not self.is_new:
            return True
        temporary = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(self.value + b"\n")
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, self.path)
            except FileExistsError:
                return False
            except OSError:  # no links on this file system
                temporary.replace(self.path)
        except OSError as error:
            raise _unusable(self.path, error) from error
        finally:
            temporary.unlink(missing_ok=True)
        say(f"salt: {printable(self.path)}, made now. Later commands need it; keep it from others")
        return True


def _unusable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        "--group-salt", expected="a file that can be read or made", where=path,
        found=error.strerror or error, hint="Run the same command again, or name another",
    )  # fmt: skip


# ----------------------------------------------------------------------------------------- dataset


def identify(
    dataset: ImageDataset, salt: Salt, *, patient_ids: str | None, path_names: str | None,
    say: Say,
) -> ImageDataset:  # fmt: skip
    """Return a data set with groups of its DICOM headers, and without identifiers in its paths.

    Groups that there are, of a CSV or a regular expression, stay.

    Args:
        dataset: The images.
        salt: Of the hashes. ``dicom.salt`` of the result says whether any are in it.
        patient_ids: An ID of more than a fifth of the images, and 20, is a question: ``keep`` takes
            it as a patient, ``ignore`` as none.
        path_names: ``hash`` replaces names of files and folders below split and class.
        say: Called with lines of counts.

    Raises:
        DataError: If an ID is that frequent, and nothing is said of it.
    """
    check_choices(patient_ids, path_names)
    samples = [s for s in dataset.samples if dataset.is_dicom(s) or dataset.holds_dicom(s)]
    if len(samples) >= _MANY:
        say(f"Reading the headers of {count(len(samples), 'DICOM file')}.")
    headers = _read_headers(dataset, samples, salt.value)
    if lost := len(samples) - len(headers):
        warn_user(
            f"the headers of {count(lost, 'DICOM file')} could not be read: those that can be "
            "shown are groups of their own, whoever their patient is"
        )
    is_hashed = path_names == "hash"
    _warn_of_names(headers, len(samples), is_hashed=is_hashed)
    copies = _find_copies(dataset, headers)
    if is_hashed:
        dataset, names = hash_paths(dataset, salt.value)
        headers = {names[path]: facts for path, facts in headers.items()}
        copies = [[names[path] for path in paths] for paths in copies]
    shared = frozenset(path for paths in copies for path in paths)
    is_joined = dataset.are_groups_joined
    has_groups = any(s.group is not None for s in dataset.samples) and not is_joined
    if is_joined:
        copies += _together(dataset)
    is_used = is_hashed
    if samples and not has_groups:
        patients = _choose_patients(headers, patient_ids, len(samples))
        dataset = _group(dataset, patients, copies, say)
        is_used = is_used or bool(patients)
    facts = DicomFacts(salt.id if is_used else None, {p: h.columns for p, h in headers.items()})
    if samples:
        say(_describe(facts, len(samples)))
    return replace(dataset, dicom=facts, copies=shared)


def _together(dataset: ImageDataset) -> list[list[str]]:
    """Return the paths of each group of several."""
    paths: dict[str | None, list[str]] = defaultdict(list)
    for sample in dataset.samples:
        paths[sample.group].append(sample.path)
    return [together for together in paths.values() if len(together) > 1]


def identify_and_keep(
    dataset: ImageDataset, salt: Salt, *, patient_ids: str | None, path_names: str | None,
    say: Say, writes: bool,
) -> ImageDataset:  # fmt: skip
    """Do what ``identify`` does, and with ``writes`` make the salt's file where it is used.

    Of several commands at once, parts of one extraction, say, all use the salt of the first.
    """
    found = identify(dataset, salt, patient_ids=patient_ids, path_names=path_names, say=say)
    if not writes or found.dicom is None or found.dicom.salt is None or salt.keep(say):
        return found
    salt = Salt.of(salt.path)
    return identify(dataset, salt, patient_ids=patient_ids, path_names=path_names, say=say)


def check_choices(patient_ids: str | None, path_names: str | None) -> None:
    """Raise ConfigError unless both are among their choices, or None."""
    for option, value, choices in (
        ("--patient-ids", patient_ids, PATIENT_IDS), ("--path-names", path_names, PATH_NAMES),
    ):  # fmt: skip
        if value not in {None, *choices}:
            raise ConfigError(option, expected=" or ".join(choices), found=value)


def _describe(facts: DicomFacts, num_files: int) -> str:
    parts = [f"{count(num_files, 'DICOM file')}"]
    for column, value, words in (
        ("intent", "FOR PROCESSING", "for processing, not for presentation"),
        ("burned_in", "YES", "with annotations burned in"),
    ):
        if number := facts.number_of(column, value):
            parts.append(f"{number:,} {words}")
    modalities = Counter(values[0] or "no modality" for values in facts.columns.values())
    kinds = ", ".join(f"{number:,} {name}" for name, number in sorted(modalities.items()))
    return f"DICOM: {'; '.join(parts)} ({kinds or 'no header could be read'})"


def _warn_of_names(headers: Mapping[str, HeaderFacts], num_files: int, *, is_hashed: bool) -> None:
    number = sum(facts.is_named for facts in headers.values())
    if number and not is_hashed:
        warn_user(
            f"{number:,} of {count(num_files, 'DICOM file')} have a name, ID or UID of theirs in "
            "their path, which goes into caches, runs and reports: --path-names hash replaces paths"
        )


def _choose_patients(
    headers: Mapping[str, HeaderFacts], patient_ids: str | None, num_files: int
) -> dict[str, str]:
    """Return path -> hash of the patient, without IDs that are no patients."""
    patients = {path: facts.patient for path, facts in headers.items() if facts.patient}
    numbers = Counter(patients.values())
    frequent = [
        (number, patient) for patient, number in numbers.items()
        if number >= _LARGE_COUNT and number > _LARGE_SHARE * num_files
    ]  # fmt: skip
    if frequent and patient_ids is None:
        listed = ", ".join(f"{number:,}" for number, _ in sorted(frequent, reverse=True))
        raise DataError(
            "patient IDs", expected="none on more than a fifth of the images",
            found=f"one on {listed} of {count(num_files, 'DICOM file')}",
            hint="Say what they are: --patient-ids keep (patients) or ignore (no patients, such as "
            "ANONYMOUS), or name groups by --group-by",
        )  # fmt: skip
    ignored = {patient for _, patient in frequent} if patient_ids == "ignore" else set()
    return {path: patient for path, patient in patients.items() if patient not in ignored}


def _group(
    dataset: ImageDataset, patients: Mapping[str, str], copies: Sequence[Sequence[str]], say: Say
) -> ImageDataset:
    """Return the data set in groups: patients, joined where they share an image."""
    if not patients and not copies:
        say("groups: none, as no DICOM file has a patient's ID")
        return dataset
    top: dict[str, str] = {}

    def find(name: str) -> str:
        while top.setdefault(name, name) != name:
            top[name] = name = top[top[name]]
        return name

    # a path is no hash: it begins with a slash here
    of_path = {s.path: patients.get(s.path, "/" + s.path) for s in dataset.samples}
    for paths in copies:
        for path in paths[1:]:
            # patients win over paths, and the order of files decides nothing
            low, high = sorted((find(of_path[paths[0]]), find(of_path[path])), reverse=True)
            top[high] = low
    names = {path: find(group).removeprefix("/") for path, group in of_path.items()}
    samples = Samples(s._replace(group=names[s.path]) for s in dataset.samples)
    num_groups, num_named = len(set(names.values())), len(patients)
    others = "" if num_named == len(samples) else " (each of the others is a group of its own)"
    say(f"groups: {num_groups:,}, by patient ID of {num_named:,} of {len(samples):,}{others}")
    return replace(dataset, samples=samples)


# ------------------------------------------------------------------------------------------- paths


def hash_paths(dataset: ImageDataset, salt: bytes) -> tuple[ImageDataset, dict[str, str]]:
    """Return a data set whose paths are hashed below split and class, and path -> new path.

    So are groups, as they may be parts of paths.
    """
    names: dict[str, str] = {}
    samples = []
    for sample in dataset.samples:
        names[sample.path] = name = _hash_path(dataset, sample, salt)
        group = None if sample.group is None else _hash(salt, f"group {sample.group}")
        samples.append(sample._replace(path=name, group=group))
    files = {new: old for old, new in names.items()}
    return replace(dataset, samples=sort_samples(samples), files=files), names


def _hash_path(dataset: ImageDataset, sample: Sample, salt: bytes) -> str:
    *folders, name = sample.path.split("/")
    kept = []
    if dataset.layout != "csv":
        while folders and (
            folders[0].casefold() in SPLIT_OF_FOLDER or folders[0] == dataset.class_of(sample)
        ):
            kept.append(folders.pop(0))
            if kept[-1] == dataset.class_of(sample):
                break
    ending = ".dcm" if dataset.is_dicom(sample) else ""
    if not ending and has_image_ending(name):
        ending = "." + name.rpartition(".")[2].lower()
    return "/".join([*kept, _hash(salt, sample.path) + ending])


def _hash(salt: bytes, text: str) -> str:
    data = text.encode("utf-8", "surrogateescape")
    return hmac.new(salt, data, hashlib.sha256).hexdigest()[:32]


# ----------------------------------------------------------------------------------------- headers


def _read_headers(
    dataset: ImageDataset, samples: Sequence[Sample], salt: bytes
) -> dict[str, HeaderFacts]:
    """Return path -> what the header says; files that cannot be read are left out."""

    def read(batch: Sequence[Sample]) -> dict[str, HeaderFacts]:
        try:
            files = [_file_of(dataset, sample) for sample in batch]
            found = _ask("read_headers", files, [sample.path for sample in batch], salt)
        except DataError:  # a file that hangs or crashes the child, or cannot be read
            if len(batch) == 1:
                return {}
            return {path: facts for sample in batch for path, facts in read([sample]).items()}
        assert isinstance(found, list)
        pairs = zip(batch, found, strict=True)
        return {sample.path: facts for sample, facts in pairs if isinstance(facts, HeaderFacts)}

    has_files = all(dataset.file_of(sample) is not None for sample in samples[:1])
    size = _BATCH if has_files else 1  # of an archive the bytes themselves are sent
    batches = [samples[i : i + size] for i in range(0, len(samples), size)]
    headers: dict[str, HeaderFacts] = {}
    with Threads("header", DICOM_READERS.number) as threads:
        for future in [threads.submit(read, batch) for batch in batches]:
            headers.update(future.result())
    return headers


def _find_copies(dataset: ImageDataset, headers: Mapping[str, HeaderFacts]) -> list[list[str]]:
    """Return the paths of files that share a SOPInstanceUID; warn where their pixels differ."""
    by_instance: dict[str, list[str]] = defaultdict(list)
    for path, facts in headers.items():
        if facts.instance:
            by_instance[facts.instance].append(path)
    copies = [sorted(paths) for paths in by_instance.values() if len(paths) > 1]
    if not copies:
        return []
    by_path = {sample.path: sample for sample in dataset.samples}
    num_other = 0
    for paths in copies:
        hashes = set[object]()
        for path in paths:
            try:
                hashes.add(_ask("hash_pixels", _file_of(dataset, by_path[path])))
            except DataError:
                hashes.add(None)
        num_other += len(hashes) > 1
    if num_other:
        warn_user(
            f"{count(num_other, 'SOP Instance UID')} of {len(copies):,} that several files share "
            "stand for different pixels: all are kept, each UID's in one group"
        )
    return copies


def _file_of(dataset: ImageDataset, sample: Sample) -> tuple[str, bytes | None]:
    """Return where the file of a sample lies; of a member of an archive, its bytes."""
    path = dataset.file_of(sample)
    return ("", dataset.read(sample)) if path is None else (str(path.absolute()), None)


def _ask(*request: object) -> object:
    with DICOM_READERS.borrow() as child:
        return child.ask(*request)
