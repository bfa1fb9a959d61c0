"""The options of an extraction, checked once and handed on as one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypedDict

from featcache.backbones.backbone import Backbone
from featcache.data.dicom_groups import check_choices
from featcache.data.listing import Listing
from featcache.errors import ConfigError
from featcache.extraction.view_stream import resolve_workers
from featcache.extraction.workers.plans import Part
from featcache.pixels.dicom_rules import DicomRules
from featcache.runtime import Say, log_line
from featcache.untrusted import MAX_PIXELS


class ExtractKeywords(TypedDict, total=False):
    """The options of ``extract`` that all of its overloads have, for type checkers."""

    weights: str | Path | None
    transform: str | None
    crop_mode: str | None
    interpolation: str | None
    normalize: str
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    bit_depth: int | str
    truncated: str
    max_pixels: int
    window: str | None
    frame: int | None
    views: int
    augment: str | None
    precision: str
    feature_dtype: str
    engine: str
    batch_size: int | str
    workers: int | str
    device: str
    processes: int
    ray: str | None
    part: str | None
    group_by: str | None
    group_by_path: str | None
    group_salt: str | Path | None
    patient_ids: str | None
    path_names: str | None
    max_errors: int | str
    limit: int | None
    include: str | Iterable[str]
    exclude: str | Iterable[str]
    companions: str | None
    no_classes: bool
    columns: Mapping[str, str] | None
    ignore_columns: str | Iterable[str]
    target_columns: str | Iterable[str]
    target_separator: str | None
    uncertain: str | None
    blank: str | None
    split_list: Mapping[str, str | Path] | None
    rehash: bool
    rebuild: bool
    say: Say
    progress: bool | str


@dataclass(frozen=True, kw_only=True)
class ExtractionOptions:
    """The keywords of ``extract`` but its backbone; documented there.

    Raises:
        ConfigError: If ``workers``, ``processes``, ``max_errors``, an option of DICOM or of the
            listing has no such value.
    """

    weights: str | Path | None = None
    image_size: int | str | Sequence[int] = "auto"
    transform: str | None = None
    crop_mode: str | None = None
    interpolation: str | None = None
    normalize: str = "auto"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    bit_depth: int | str = "auto"
    truncated: str = "skip"
    max_pixels: int = MAX_PIXELS
    window: str | None = None
    frame: int | None = None
    views: int = 1
    augment: str | None = None
    precision: str = "fp32"
    feature_dtype: str = "float32"
    engine: str = "auto"
    batch_size: int | str = "auto"
    workers: int | str = "auto"
    device: str = "auto"
    processes: int = 1
    ray: str | None = None
    part: str | None = None
    group_by: str | None = None
    group_by_path: str | None = None
    group_salt: str | Path | None = None
    patient_ids: str | None = None
    path_names: str | None = None
    max_errors: int | str = "5%"
    limit: int | None = None
    include: str | Iterable[str] = ()
    exclude: str | Iterable[str] = ()
    companions: str | None = None
    no_classes: bool = False
    columns: Mapping[str, str] | None = None
    ignore_columns: str | Iterable[str] = ()
    target_columns: str | Iterable[str] = ()
    target_separator: str | None = None
    uncertain: str | None = None
    blank: str | None = None
    split_list: Mapping[str, str | Path] | None = None
    rehash: bool = False
    rebuild: bool = False
    say: Say = log_line
    progress: bool | str = False

    def __post_init__(self) -> None:
        resolve_workers(self.workers)
        parse_max_errors(self.max_errors)
        DicomRules(self.window, self.frame)
        check_choices(self.patient_ids, self.path_names)
        if type(self.processes) is not int or not 1 <= self.processes <= 256:
            raise ConfigError("--processes", expected="1 to 256", found=self.processes)
        if self.ray is not None and (self.device == "all" or "," in self.device):
            raise ConfigError(
                "--ray", expected="one kind of device, such as --device cuda", found=self.device,
                hint="Ray gives each worker a GPU of its own",
            )  # fmt: skip
        if self.part is not None:
            Part.parse(self.part)
            if self.rebuild:  # each part would discard the others'
                raise ConfigError(
                    "--rebuild", expected="no --part beside it", found="both",
                    hint="Choose another name for the cache, or remove the old one first",
                )  # fmt: skip
        assert self.listing is not None

    @cached_property
    def listing(self) -> Listing:
        """The options of the listing of images."""
        return Listing.of(
            include=self.include, exclude=self.exclude, companions=self.companions,
            no_classes=self.no_classes, columns=self.columns, ignore_columns=self.ignore_columns,
            target_columns=self.target_columns, target_separator=self.target_separator,
            uncertain=self.uncertain, blank=self.blank, split_list=self.split_list,
        )  # fmt: skip


def parse_max_errors(value: int | str) -> int | float:
    """Return a count (int) or a share (float in [0, 1]) from ``12`` or ``5%``.

    Raises:
        ConfigError: If it is neither.
    """
    text = str(value).strip()
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else int(text)
    except ValueError:
        number = -1
    if number < 0 or (isinstance(number, float) and number > 1):
        raise ConfigError("--max-errors", expected="a count or a share such as 5%", found=value)
    return number


class Target(NamedTuple):
    """A cache to make.

    Attributes:
        path: The file.
        backbone: What makes its features.
        image_size: Side of its input, or ``auto``.
    """

    path: Path
    backbone: str | Backbone
    image_size: int | str


def name_caches(
    folder: Path, backbone: str | Backbone | Sequence[str | Backbone], options: ExtractionOptions
) -> dict[str, Target]:
    """Return name -> cache to make in a folder, of several backbones, several sizes or both.

    Raises:
        ConfigError: If a backbone or a size is named twice, a ready backbone has one size only,
            weights are given that are those of one, or ``folder`` is a file.
    """
    backbones = [backbone] if isinstance(backbone, str | Backbone) else backbone
    size = options.image_size
    sizes: Sequence[int | str] = [size] if isinstance(size, int | str) else size
    names = [b if isinstance(b, str) else b.name for b in backbones]
    for what, named, wanted in (
        ("--backbone", names, "different backbones"),
        ("--image-size", [str(size) for size in sizes], "different sizes"),
    ):
        if not named or len(set(map(_file_stem, named))) < len(named):
            raise ConfigError(what, expected=wanted, found=", ".join(named) or "none")
    if len(backbones) > 1 and options.weights not in {None, "random"}:
        raise ConfigError(
            "--weights", expected="random, or none with several backbones", found=options.weights,
            hint="Extract with one backbone at a time",
        )  # fmt: skip
    ready = [b.name for b in backbones if isinstance(b, Backbone)]
    if len(sizes) > 1 and ready:
        raise ConfigError(
            "--image-size", expected=f"one, that of the ready backbone {ready[0]}",
            found=", ".join(map(str, sizes)), hint="Give a list of backbones, one of each size",
        )  # fmt: skip
    if folder.exists() and not folder.is_dir():
        raise ConfigError(
            "CACHE", expected="a folder, for the caches of several backbones", found="a file",
            where=folder,
        )  # fmt: skip
    targets = dict[str, Target]()
    for name, each in zip(names, backbones, strict=True):
        for size in sizes:
            full_name = f"{name}-{size}" if len(sizes) > 1 else name
            targets[full_name] = Target(folder / f"{_file_stem(full_name)}.h5", each, size)
    return targets


def _file_stem(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)
