"""Load weights from files and downloads: tensors only, checked against the network."""

from __future__ import annotations

import contextlib
import re
import sys
import traceback
import urllib.error
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featcache.errors import BackboneError
from featcache.files import sha256_file
from featcache.untrusted import why_no_file


def read_state(file: Path) -> dict[str, torch.Tensor]:
    """Read a state dict from a .pt, .pth or .safetensors file without running any code in it.

    Wrappers such as ``{"state_dict": ...}`` and the prefix ``module.`` are removed.

    Raises:
        BackboneError: If the file is missing, damaged or holds anything but tensors.
    """
    if found := why_no_file(file):  # opening a pipe would block for ever
        raise _bad_state_file(file, found)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            _refuse_bomb(file)
            # weights_only is explicit: an environment variable can turn off torch's default.
            state = torch.load(file, map_location="cpu", weights_only=True)
    except BackboneError:
        raise
    except Exception as error:  # damaged pickles raise a dozen unrelated types
        called = re.search(r"GLOBAL (\S+)", str(error))
        found = f"an unreadable one ({type(error).__name__})"
        raise _bad_state_file(file, f"one that calls {called[1]}" if called else found) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise _bad_state_file(file, type(state).__name__)
    return {str(key).removeprefix("module."): value for key, value in state.items()}


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
    network: nn.Module,
    state: Mapping[str, Any],
    classifiers: str | tuple[str, ...] | None,
    source: str,
) -> None:
    """Load ``state`` into ``network``; its classifiers may be missing or have another shape.

    Raises:
        BackboneError: If a tensor is missing, unknown, of another shape or not finite.
    """
    own = network.state_dict()
    names = (classifiers,) if isinstance(classifiers, str) else classifiers or ()
    prefix = tuple(f"{name}." for name in names)
    wanted = {name: value for name, value in own.items() if not name.startswith(prefix)}
    given = {
        name: value for name, value in state.items()
        if not name.startswith(prefix) and not _is_removed(network, name)
    }  # fmt: skip
    # Files older than torch 0.4.1, such as torchvision's ResNets, lack num_batches_tracked.
    problems = [
        f"{name} missing"
        for name in wanted.keys() - given.keys()
        if not name.endswith("num_batches_tracked")
    ]
    problems += [f"{name} unknown" for name in given.keys() - wanted.keys()]
    problems += [
        f"{name} {misfit}"
        for name in wanted.keys() & given.keys()
        if (misfit := _find_misfit(given[name], wanted[name]))
    ]
    if problems:
        shown = ", ".join(sorted(problems)[:3])
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise BackboneError(
            "weights", expected=f"the {len(wanted)} tensors of this backbone",
            found=f"{shown}{more}", where=source,
            hint="Check that the file belongs to this --backbone",
        )  # fmt: skip
    own.update(given)  # in place: its metadata, which a plain dict lacks, decide how MNASNet loads
    network.load_state_dict(own)


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
