"""Weights from files and downloads: tensors only, checked against the network they go into."""

from __future__ import annotations

import contextlib
import sys
import urllib.error
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featcache.errors import BackboneError


def read_state(file: Path) -> dict[str, torch.Tensor]:
    """Read a state dict from a .pt, .pth or .safetensors file without running any code in it.

    Wrappings such as ``{"state_dict": ...}`` and the prefix ``module.`` are taken off.

    Raises:
        BackboneError: If the file is missing, damaged or holds anything but tensors.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            # weights_only explicitly: an environment variable turns torch's default off.
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise a dozen unrelated kinds
        missing = isinstance(error, FileNotFoundError)
        found = "no such file" if missing else f"an unreadable one ({type(error).__name__})"
        raise BackboneError(
            "weights", expected="a state dict of tensors", found=found, where=file,
            hint="Save it with torch.save(model.state_dict(), file)",
        ) from error  # fmt: skip
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise BackboneError(
            "weights", expected="a state dict of tensors", found=type(state).__name__, where=file,
            hint="Save it with torch.save(model.state_dict(), file)",
        )  # fmt: skip
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def load_state(
    network: nn.Module, state: Mapping[str, Any], classifier_name: str | None, source: str
) -> None:
    """Load ``state`` into ``network``; its classifier may be missing or of any shape.

    Raises:
        BackboneError: If tensors are missing, unknown, of another shape or not finite.
    """
    own = network.state_dict()
    prefix = f"{classifier_name}." if classifier_name else "\0"
    wanted = {name: value for name, value in own.items() if not name.startswith(prefix)}
    given = {name: value for name, value in state.items() if not name.startswith(prefix)}
    # Files older than torch 0.4.1, such as torchvision's ResNets, lack the counters.
    problems = [
        f"{name} missing"
        for name in wanted.keys() - given.keys()
        if not name.endswith("num_batches_tracked")
    ]
    problems += [f"{name} unknown" for name in given.keys() - wanted.keys()]
    problems += [
        f"{name} of shape {tuple(given[name].shape)}"
        for name in wanted.keys() & given.keys()
        if given[name].shape != wanted[name].shape
    ]
    problems += [
        f"{name} not finite"
        for name in wanted.keys() & given.keys()
        if given[name].is_floating_point() and not torch.isfinite(given[name]).all()
    ]
    if problems:
        shown = ", ".join(sorted(problems)[:3])
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise BackboneError(
            "weights", expected=f"the {len(wanted)} tensors of this backbone",
            found=f"{shown}{more}", where=source,
            hint="Check that the file belongs to this --backbone",
        )  # fmt: skip
    network.load_state_dict({**own, **given})


def download_state(url: str) -> tuple[Mapping[str, Any], str]:
    """Fetch a library's weights once into torch's cache, checking the hash in the file's name.

    Returns:
        The state dict and the file's name.

    Raises:
        BackboneError: If it cannot be had, or the hash differs.
    """
    file_name = url.rsplit("/", 1)[-1]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch says "Downloading" on stdout
            state = torch.hub.load_state_dict_from_url(
                url, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
    except Exception as error:  # the network, the disk, the hash, the pickle
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise unreachable(url, f"{folder / file_name}", error) from error
    return state, file_name


def unreachable(url: str, place: str, error: Exception) -> BackboneError:
    """Say which file is wanted, why it could not be had, and where to put it by hand."""
    plain = isinstance(error, urllib.error.URLError) and not isinstance(
        error, urllib.error.HTTPError
    )
    reason = str(getattr(error, "reason", error) if plain else error) or type(error).__name__
    return BackboneError(
        "pretrained weights", expected=f"a download from {url}", found=reason.splitlines()[0],
        where=place,
        hint="Fetch that file elsewhere and put it there, or name it with --weights FILE",
    )  # fmt: skip
