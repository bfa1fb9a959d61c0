"""Load weights from files and downloads: tensors only, checked against the network."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import traceback
import urllib.error
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featcache.errors import BackboneError
from featcache.files import sha256_file
from featcache.formatting import join_few, shorten
from featcache.untrusted import MAX_DEPTH, why_no_file

_FIRST_KEYS = ("state_dict", "model")
_COUNTER = "num_batches_tracked"
"""Files older than torch 0.4.1, such as torchvision's ResNets, lack it."""


def read_state(file: Path) -> dict[str, Any]:
    """Return what a .pt, .pth, .ckpt or .safetensors file holds; no code in it runs.

    Returns:
        A state dict, or a checkpoint with one or more in it: see ``load_state``.

    Raises:
        BackboneError: If the file is missing, damaged or holds no state dict of tensors alone.
    """
    if found := why_no_file(file):  # opening a pipe would block for ever
        raise _bad_state_file(file, found)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            contents: Any = load_file(file)
        else:
            _refuse_bomb(file)
            # timm's trainer and others store their arguments beside: plain values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                # weights_only is explicit: an environment variable can turn off torch's default.
                contents = torch.load(file, map_location="cpu", weights_only=True)
    except BackboneError:
        raise
    except Exception as error:  # damaged pickles raise a dozen unrelated types
        called = re.search(r"GLOBAL (\S+)", str(error))
        found = f"an unreadable one ({type(error).__name__})"
        raise _bad_state_file(file, f"one that calls {called[1]}" if called else found) from error
    if not isinstance(contents, dict):
        raise _bad_state_file(file, type(contents).__name__)
    if contents and not _find_states(contents):
        raise _bad_state_file(file, f"none under the keys {_list_keys(contents)}")
    return contents


def _bad_state_file(file: Path, found: str) -> BackboneError:
    return BackboneError(
        "weights", expected="a state dict of tensors", found=found, where=file,
        hint="Save it with torch.save(model.state_dict(), file)",
    )  # fmt: skip


def _refuse_bomb(file: Path) -> None:
    """Refuse a compressed zip: torch writes none, and would inflate 1.5 MB to 1.5 GB."""
    with file.open("rb") as opened:
        if opened.read(4) != b"PK\x03\x04":
            return
        num_bytes = sum(info.file_size for info in zipfile.ZipFile(opened).infolist())
    if num_bytes > file.stat().st_size:
        raise _bad_state_file(file, f"{num_bytes:,} bytes packed into {file.stat().st_size:,}")


def load_state(
    network: nn.Module, contents: Mapping[str, Any], classifiers: str | tuple[str, ...] | None,
    source: str,
) -> None:  # fmt: skip
    """Load the state dict in ``contents`` into ``network``; classifiers may be missing or others.

    Trainers keep a state dict under a key, and set a prefix before all names of a network, as
    Lightning does: ``{"state_dict": {"model.conv1.weight": ...}}``. Whatever they are, they are
    taken off if the rest fits exactly. Names without the prefix are of other modules, such as a
    loss. A state dict under the key ``state_dict`` or ``model`` goes before its neighbours.

    Args:
        network: What to load into.
        contents: A state dict, or a checkpoint that holds one at any depth.
        classifiers: Dotted names of the layers whose tensors are not looked at, or None.
        source: Where the weights are from, for messages.

    Raises:
        BackboneError: If a tensor is missing, unknown, of another shape or not finite, or if
            several state dicts fit and differ.
    """
    own = network.state_dict()
    names = (classifiers,) if isinstance(classifiers, str) else classifiers or ()
    ignored = tuple(f"{name}." for name in names)
    wanted = {name: value for name, value in own.items() if not name.startswith(ignored)}
    candidates = [
        _compare(network, wanted, ignored, state, place=place, prefix=prefix)
        for place, state in _find_states(contents) or [((), {})]
        for prefix in _find_prefixes(wanted, state)
    ]
    fitting = [candidate for candidate in candidates if not candidate.problems]
    if not fitting:
        raise _no_fit(candidates, contents, len(wanted), source)
    # in place: own's metadata, which a plain dict lacks, decide how MNASNet loads
    own.update(_choose(fitting, source).tensors)
    network.load_state_dict(own)


@dataclass(frozen=True)
class _Candidate:
    """Tensors of a file that may be the backbone's.

    Attributes:
        place: The keys of their dict in the file.
        prefix: What their names begin with.
        tensors: By name without the prefix; without the classifier's.
        missing: Names that only the backbone has.
        unknown: Names that only the file has, with the prefix.
        misfits: Of the others, which differ, and how.
    """

    place: tuple[str, ...]
    prefix: str
    tensors: dict[str, torch.Tensor]
    missing: list[str]
    unknown: list[str]
    misfits: list[str]

    @property
    def problems(self) -> list[str]:
        """Why they do not fit."""
        missing = [f"{name} missing" for name in self.missing]
        return missing + [f"{name} unknown" for name in self.unknown] + self.misfits

    def __str__(self) -> str:
        return "/".join([*self.place, *([f"{self.prefix}*"] if self.prefix else [])])


def _find_states(contents: object) -> list[tuple[tuple[str, ...], dict[str, torch.Tensor]]]:
    """Return all dicts of tensors in a file, at any depth, each with its keys, best first."""
    found: list[tuple[tuple[str, ...], dict[str, torch.Tensor]]] = []
    waiting: list[tuple[tuple[str, ...], Any]] = [((), contents)]
    seen: set[int] = set()  # a pickle may contain itself
    while waiting:
        place, value = waiting.pop()
        if id(value) in seen or len(place) > MAX_DEPTH:
            continue
        seen.add(id(value))
        items = value if isinstance(value, dict) else dict(enumerate(value))
        if items and all(isinstance(v, torch.Tensor) for v in items.values()):
            found.append((place, {k: v for k, v in items.items() if isinstance(k, str)}))
            continue
        nested = [
            ((*place, str(key)), inner) for key, inner in items.items()
            if _is_name(key) and isinstance(inner, dict | list | tuple)
        ]  # fmt: skip
        waiting += sorted(nested, key=lambda pair: _rank(pair[0][-1]))[::-1]
    return found


def _is_name(key: object) -> bool:
    """Return whether a key can be shown: a hostile one may be a tuple 100,000 deep."""
    return isinstance(key, str) or (isinstance(key, int) and key in range(2**32))


def _rank(key: str) -> int:
    return _FIRST_KEYS.index(key) if key in _FIRST_KEYS else len(_FIRST_KEYS)


def _find_prefixes(wanted: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """Return the prefixes under which a state dict has all wanted names; else that of the most."""
    names = {name for name in wanted if not name.endswith(_COUNTER)}
    lengths = {len(name) for name in names}
    numbers = Counter(
        given[:-length] for given in state for length in lengths
        if len(given) >= length and given[-length:] in names
    )  # fmt: skip
    whole = [prefix for prefix, number in numbers.items() if number == len(names)]
    if not whole or "" in whole:  # without a prefix all names are looked at
        return [""] if whole or not numbers else [numbers.most_common(1)[0][0]]
    return whole


def _compare(
    network: nn.Module, wanted: Mapping[str, torch.Tensor], ignored: tuple[str, ...],
    state: Mapping[str, torch.Tensor], *, place: tuple[str, ...], prefix: str,
) -> _Candidate:  # fmt: skip
    """Compare the tensors whose names begin with a prefix with those of the backbone."""
    given = {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }
    given = {
        name: value for name, value in given.items()
        if not name.startswith(ignored) and not _is_removed(network, name)
    }  # fmt: skip
    absent = [name for name in wanted if name not in given and not name.endswith(_COUNTER)]
    unknown = [f"{prefix}{name}" for name in given if name not in wanted]
    misfits = [
        f"{name} {misfit}"
        for name in wanted
        if name in given and (misfit := _find_misfit(given[name], wanted[name]))
    ]
    return _Candidate(place, prefix, given, absent, unknown, misfits)


def _choose(fitting: Sequence[_Candidate], source: str) -> _Candidate:
    """Return the first state dict of those that fit.

    Raises:
        BackboneError: If another one has other values, and its keys rank no lower.
    """
    first = fitting[0]

    def is_rival(other: _Candidate) -> bool:
        parted = ((a, b) for a, b in zip(first.place, other.place, strict=False) if a != b)
        ours, theirs = next(parted, ("", ""))
        return _rank(ours) == _rank(theirs) and _differ(first, other)

    rivals = [first, *filter(is_rival, fitting)]
    if len(rivals) > 1:
        raise BackboneError(
            "weights", expected="one state dict that fits this backbone",
            found=f"{len(rivals)} that differ: {join_few(shorten(str(r), 60) for r in rivals)}",
            where=source, hint="Save the one that is meant in a file of its own",
        )  # fmt: skip
    return first


def _differ(first: _Candidate, other: _Candidate) -> bool:
    """Return whether two state dicts that fit have other values, but for counters of batches."""
    return any(
        not torch.equal(value.double(), other.tensors[name].double())
        for name, value in first.tensors.items()
        if not name.endswith(_COUNTER)
    )


def _no_fit(
    candidates: Sequence[_Candidate], contents: Mapping[str, Any], num_wanted: int, source: str
) -> BackboneError:
    """Return an error about the state dict that comes closest: most names, then most tensors."""
    closest = min(candidates, key=lambda c: (len(c.missing), -len(c.tensors)))
    problems = sorted(closest.problems)
    found = ", ".join(shorten(problem, 70) for problem in problems[:3])
    found += f" and {len(problems) - 3:,} more" if len(problems) > 3 else ""
    if closest.missing and closest.tensors:
        theirs = [*closest.unknown, *(closest.prefix + name for name in closest.tensors)][0]
        found += f"; the file has {shorten(theirs, 70)}"
        found += f", the backbone has {shorten(closest.missing[0], 70)}"
    keys = f"; the file holds: {_list_keys(contents)}" if closest.place else ""
    return BackboneError(
        "weights", expected=f"the {num_wanted:,} tensors of this backbone", found=found,
        where=source, hint=f"Check that the file belongs to this --backbone{keys}",
    )  # fmt: skip


def _list_keys(contents: Mapping[str, Any]) -> str:
    return join_few(shorten(str(key), 30) for key in contents if _is_name(key))


def _is_removed(network: nn.Module, name: str) -> bool:
    """Return whether a tensor is of a module that the library has set to None: a training head.

    The library's own files still hold them.
    """
    place: Any = network
    for part in name.split(".")[:-1]:
        children = getattr(place, "_modules", {})
        if part not in children:
            return False
        place = children[part]
        if place is None:
            return True
    return False


def _find_misfit(given: torch.Tensor, wanted: torch.Tensor) -> str:
    """Return why a tensor cannot replace another one; "" if it can.

    Values are read last: a file of 1.5 kB can hold a tensor that claims 4 TiB.
    """
    plain = given.layout == torch.strided and not given.is_quantized and not given.is_nested
    if not plain or given.is_meta:
        return "not a plain tensor"
    if given.shape != wanted.shape:
        return f"of shape {tuple(given.shape)}"
    if not wanted.is_floating_point():
        return ""
    if not given.is_floating_point():
        return f"of {given.dtype}"
    return "" if torch.isfinite(given.to(wanted.dtype)).all() else "not finite"


def download_state(url: str) -> tuple[Mapping[str, Any], str]:
    """Download a library's weights into torch's cache, once; check the hash in the file's name.

    Returns:
        The state dict and the file's name.

    Raises:
        BackboneError: If the download fails, or the hash differs.
    """
    file_name = url.rsplit("/", 1)[-1]
    file = Path(torch.hub.get_dir()) / "checkpoints" / file_name
    _check_downloaded(file)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch says "Downloading" on stdout
            state = torch.hub.load_state_dict_from_url(
                url, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
    except Exception as error:  # the network, the disk, the hash, the pickle
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        traceback.clear_frames(
            error.__traceback__
        )  # else torch's connection stays open until collected
        raise unreachable(url, f"{file}", error) from error
    return state, file_name


def _check_downloaded(file: Path) -> None:
    """Check the hash in an existing file's name; torch checks it only after a download."""
    if not file.exists():
        return
    named = re.search(r"-([a-f0-9]{8,})\.", file.name)
    sha256 = sha256_file(file) if file.is_file() else ""
    if not sha256 or (named and not sha256.startswith(named[1])):
        raise BackboneError(
            "downloaded weights",
            expected=f"sha256 {named[1][:16]}..." if named else "a regular file",
            found=f"sha256 {sha256[:16]}..." if sha256 else "not a regular file", where=file,
            hint="Remove it, and it will be fetched again",
        )  # fmt: skip


def unreachable(url: str, place: str, error: Exception) -> BackboneError:
    """Return an error that says which file is needed, why it failed, and where to put it."""
    plain = isinstance(error, urllib.error.URLError) and not isinstance(
        error, urllib.error.HTTPError
    )
    reason = str(getattr(error, "reason", error) if plain else error) or type(error).__name__
    return BackboneError(
        "pretrained weights", expected=f"a download from {url}", found=reason.splitlines()[0],
        where=place,
        hint="Fetch that file elsewhere and put it there, or name it with --weights FILE",
    )  # fmt: skip
