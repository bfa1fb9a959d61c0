"""Extract: run a frozen backbone once over every image and keep the features.

Reads: images, and the cache that is there already. Writes: ``CACHE`` (module ``production``).
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featcache.backbone import Backbone, build_backbone
from featcache.cache import Cache, open_cache
from featcache.container import MAX_USER_BLOCK_BYTES
from featcache.dataset import ImageDataset, scan
from featcache.errors import CacheError, ConfigError, FeatcacheWarning, printable
from featcache.files import writer_lock
from featcache.production import Production
from featcache.projection import Projection, project
from featcache.recipe import Recipe, make_recipe
from featcache.runtime import Say, resolve_device, silent
from featcache.shards import image_key, partial_folder

_NUM_SHOWN_FAILURES = 5


@dataclass(frozen=True)
class ExtractionSummary:
    """What an extraction did.

    Attributes:
        cache: The cache file.
        status: ``extracted``, or ``up to date`` when there was nothing to do.
        num_images: Rows in the cache.
        num_new: Images that went through the network.
        num_known: Images whose features were known, from an earlier run or an older cache.
        num_failed: Images that could not be read; they are listed in the cache.
        num_truncated: Cut-off images that were filled in (``--truncated keep``).
        splits: Per split, rows per class (or ``unlabelled``).
        engine: ``folded`` or ``eager``.
        parity: Largest relative L2 error of a probed image against the eager fp32 forward.
        seconds: Wall time of the whole call.
        images_per_second: New images over the time of decoding and forward together.
        fingerprint: Of the recipe.
        content_sha256: Of the cache's content.
    """

    cache: str
    status: str
    num_images: int
    num_new: int
    num_known: int
    num_failed: int
    num_truncated: int
    splits: dict[str, dict[str, int]]
    engine: str
    parity: float | None
    seconds: float
    images_per_second: float | None
    fingerprint: str
    content_sha256: str

    def as_json(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return asdict(self)


def extract(
    data: str | Path,
    cache: str | Path,
    *,
    backbone: str | Backbone,
    weights: str | Path | None = None,
    image_size: int | str = "auto",
    crop_mode: str = "squash",
    interpolation: str = "bilinear",
    normalize: str = "auto",
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    bit_depth: int | str = "auto",
    truncated: str = "skip",
    views: int = 1,
    augment: str | None = None,
    precision: str = "fp32",
    feature_dtype: str = "float32",
    engine: str = "auto",
    batch_size: int | str = "auto",
    workers: int | str = "auto",
    device: str = "auto",
    group_by: str | None = None,
    max_errors: int | str = "5%",
    limit: int | None = None,
    rebuild: bool = False,
    say: Say = silent,
    progress: bool = False,
) -> ExtractionSummary:
    """Run a frozen backbone over every image of ``data`` and write the features to ``cache``.

    Killed at any instant, the same call goes on where the last whole shard ended. A cache that is
    there already is brought up to date: only images it does not know go through the network.

    Args:
        data: Split folders of class folders, class folders, a folder of images, a CSV or a zip.
        cache: The HDF5 file to make.
        backbone: A name (see ``build_backbone``) or a ready ``Backbone``.
        weights: See ``build_backbone``; so are ``image_size``, ``normalize``, ``mean``, ``std``.
        image_size: Side of the network's input in pixels, or ``auto``.
        crop_mode: ``squash``, ``center`` or ``border``.
        interpolation: ``bilinear`` or ``bicubic``.
        normalize: ``auto``, ``imagenet`` or ``half``.
        mean: Per channel, for pixels in [0, 1].
        std: Per channel, for pixels in [0, 1].
        bit_depth: ``auto``, 12, 14, 16 or ``minmax``, for images of more than 8 bits.
        truncated: ``skip`` counts cut-off images as failed, ``keep`` fills them in.
        views: Views of every image to train on (split ``train``, or ``all`` where there is none),
            the plain one among them; other splits get the plain view.
        augment: How the others are made: ``flip``, ``crop`` or ``xray`` (see module ``views``).
        precision: ``fp32``, ``tf32``, ``fp16`` or ``bf16``.
        feature_dtype: ``float32`` or ``float16``.
        engine: ``auto``, ``folded`` or ``eager``.
        batch_size: Images a batch, or ``auto``.
        workers: Decoding threads, or ``auto``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        group_by: Regular expression on the file name; its first group is the group.
        max_errors: Failed images allowed per split and class: a count, or a share such as ``5%``.
        limit: Take only that many images, for a try.
        rebuild: Replace a cache, or discard an unfinished one, that was made with other settings.
        say: Where lines for people go.
        progress: Show a progress bar on standard error when that is a terminal.

    Raises:
        FeatcacheError: One of its kinds, in one line; nothing is left half-written.
    """
    start = time.perf_counter()
    path = Path(cache)
    allowed = parse_max_errors(max_errors)
    _refuse_inside(path, Path(data))
    dataset, recipe = _prepare(
        data, backbone, group_by, limit, say, weights=weights, image_size=image_size,
        normalize=normalize, mean=mean, std=std, crop_mode=crop_mode, interpolation=interpolation,
        bit_depth=bit_depth, truncated=truncated, feature_dtype=feature_dtype, views=views,
        augment=augment,
    )  # fmt: skip
    old = _open_existing(path, recipe, rebuild=rebuild)
    if old is not None:
        _check_update(old, dataset, limit, say)
    if old is not None and not old.failures and _holds(old, dataset, frozenset()):
        return _summary(old, "up to date", start, num_known=len(dataset.samples))
    path.parent.mkdir(parents=True, exist_ok=True)
    with writer_lock(partial_folder(path) / "lock", f"cache {path.name}"):
        work = Production(path, dataset, recipe, allowed=allowed, say=say)
        try:
            place = resolve_device(device)
            work.find_known(old, place, precision=precision, rebuild=rebuild)
            if work.pending:
                work.choose_engine(place, precision=precision, batch_size=batch_size, name=engine)
                work.run(workers, progress=progress)
            if old is not None and _is_unchanged(old, work):
                work.abandon()
                return _summary(old, "up to date", start, num_known=len(dataset.samples))
            done = work.finish()
        except BaseException:
            work.abandon()
            raise
    summary = _summary(
        done, "extracted", start, num_new=work.num_new,
        num_known=sum(len(s) for s in done.splits.values()) - work.num_new,
        images_per_second=work.images_per_second,
    )  # fmt: skip
    _describe_result(done, summary, say)
    return summary


def plan(
    data: str | Path,
    *,
    backbone: str | Backbone,
    precision: str = "fp32",
    engine: str = "auto",
    batch_size: int | str = "auto",
    workers: int | str = "auto",
    device: str = "auto",
    group_by: str | None = None,
    limit: int | None = None,
    say: Say = silent,
    **recipe_options: Any,
) -> Projection:
    """Say what ``extract`` would do and take, without writing anything.

    Args:
        data: As for ``extract``, and so are all options.
        backbone: A name or a ready ``Backbone``.
        precision: Of the forward pass.
        engine: Of the forward pass.
        batch_size: Of the forward pass.
        workers: Decoding threads, or ``auto``.
        device: Where the forward pass runs.
        group_by: Regular expression on the file name.
        limit: Take only that many images.
        say: Where lines for people go.
        **recipe_options: ``weights``, ``image_size``, ``crop_mode`` and so on.

    Raises:
        FeatcacheError: As ``extract`` would at its start.
    """
    dataset, recipe = _prepare(data, backbone, group_by, limit, say, **recipe_options)
    return project(
        dataset, recipe, resolve_device(device), precision=precision, engine=engine,
        batch_size=batch_size, workers=workers,
    )  # fmt: skip


def _prepare(
    data: str | Path, backbone: str | Backbone, group_by: str | None, limit: int | None, say: Say,
    **options: Any,
) -> tuple[ImageDataset, Recipe]:  # fmt: skip
    """Scan the images and settle what makes features of them."""
    dataset = scan(data, group_by=group_by, limit=limit)
    _describe(dataset, say)
    about_backbone = ("weights", "image_size", "normalize", "mean", "std")
    if isinstance(backbone, str):
        backbone = build_backbone(
            backbone, **{key: options[key] for key in about_backbone if key in options}
        )
    recipe = make_recipe(
        backbone, dataset, **{k: v for k, v in options.items() if k not in about_backbone}
    )
    _describe_recipe(recipe, say)
    return dataset, recipe


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


def _open_existing(path: Path, recipe: Recipe, *, rebuild: bool) -> Cache | None:
    """Open the cache that is there already, or return None where there is none to keep.

    Raises:
        CacheError: If the file is no cache, or one of another identity and ``rebuild`` is not set.
    """
    if not path.exists():
        return None
    try:
        old = open_cache(path)
    except CacheError:
        if rebuild and _is_ours(path):
            return None  # damaged, or of a newer version; other people's files stay
        raise
    if rebuild:
        return None
    if old.fingerprint != recipe.fingerprint:
        raise CacheError(
            "cache identity", expected=_differences(recipe.identity, old.identity, 0),
            found=_differences(recipe.identity, old.identity, 1), where=path,
            hint="Choose another file name, or replace it with --rebuild",
        )  # fmt: skip
    return old


def _differences(wanted: dict[str, Any], found: dict[str, Any], side: int) -> str:
    keys = [k for k in sorted(wanted | found) if wanted.get(k) != found.get(k)]
    return ", ".join(f"{k} {(wanted, found)[side].get(k)!r:.40}" for k in keys)


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b'"format":"featcache"' in file.read(MAX_USER_BLOCK_BYTES)


def _refuse_inside(path: Path, data: Path) -> None:
    """Refuse a cache among the images: its folder of shards would look like a class."""
    if data.is_dir() and path.resolve().is_relative_to(data.resolve()):
        raise ConfigError(
            "CACHE", expected="a file outside the folder of images", found=path, where=data,
            hint="Name one beside it",
        )  # fmt: skip


def _check_update(old: Cache, dataset: ImageDataset, limit: int | None, say: Say) -> None:
    """Refuse an update that would throw away what the cache holds by mistake.

    Raises:
        CacheError: If no image of it is in ``dataset``, if a ``limit`` leaves images out, or if it
            has groups and ``dataset`` has none.
    """

    def wrong(what: str, expected: str, found: str, hint: str) -> CacheError:
        hint = f"{hint}, or replace it with --rebuild"
        return CacheError(what, expected=expected, found=found, where=old.path, hint=hint)

    known = {path for split in old.splits.values() for path in split.paths}
    gone = known - {sample.path for sample in dataset.samples}
    if gone and len(gone) == len(known):
        found = f"none of its {len(known):,}"
        raise wrong("update of the cache", "images it knows", found, "Check DATA")
    if gone and limit is not None:
        found = f"{len(known):,} images, not all among the first {limit:,}"
        raise wrong("--limit", "a new cache", found, "Choose another file name for a try")
    has_groups = any(split.groups is not None for split in old.splits.values())
    if has_groups and all(sample.group is None for sample in dataset.samples):
        raise wrong("update of the cache", "groups, as it has", "none", "Repeat --group-by")
    if gone:
        say(f"gone: {len(gone):,} images of the cache are no longer in DATA")


def _is_unchanged(old: Cache, work: Production) -> bool:
    """Whether a run gained nothing: it tried the failed images again, and they failed again."""
    failed = frozenset(failure.path for failure in work.failures)
    same = set(old.failures) == set(work.failures) and not work.num_new
    return same and _holds(old, work.dataset, failed)


def _holds(old: Cache, dataset: ImageDataset, failed: frozenset[str]) -> bool:
    """Whether the cache holds exactly these images, but the failed, with targets and groups."""
    if tuple(old.splits) != dataset.splits or old.classes != dataset.classes:
        return False
    for name, split in old.splits.items():
        samples = [sample for sample in dataset.split(name) if sample.path not in failed]
        sizes, times = split.image_bytes.tolist(), split.mtime_ns.tolist()
        if list(map(image_key, samples)) != list(zip(split.paths, sizes, times, strict=True)):
            return False
        if [s.target for s in samples] != split.targets.tolist():
            return False
        groups = split.groups if split.groups is not None else [None] * len(samples)
        if any(sample.group != group for sample, group in zip(samples, groups, strict=True)):
            return False
    return True


# ------------------------------------------------------------------------------ lines for people


def _describe(dataset: ImageDataset, say: Say) -> None:
    for split, counts in dataset.count().items():
        listed = ", ".join(f"{count:,} {printable(name)}" for name, count in counts.items())
        say(f"{split:>6}: {listed}")
    for reason, number in sorted(dataset.num_ignored.items()):
        say(f"ignored: {number:,} ({reason})")
    if dataset.num_grouped is not None:
        groups = len({s.group for s in dataset.samples})
        say(
            f"groups: {groups:,}; {dataset.num_grouped:,} of {len(dataset.samples):,} names matched"
        )


def _describe_recipe(recipe: Recipe, say: Say) -> None:
    backbone, rules = recipe.backbone, recipe.rules
    say(f"Backbone: {backbone.name}, weights {backbone.weights_source}, {backbone.num_features}-d.")
    mean, std = (" ".join(f"{v:g}" for v in values) for values in (backbone.mean, backbone.std))
    say(
        f"Pixels: {rules.image_size} x {rules.image_size} {rules.crop_mode}, "
        f"{rules.interpolation}, mean {mean}, std {std}."
    )
    views = recipe.view_rules
    if views.augmentation is not None:
        say(f"Views: {views.num_views} of every image to train on, {views.augmentation}.")


def _describe_result(cache: Cache, summary: ExtractionSummary, say: Say) -> None:
    for failure in cache.failures[:_NUM_SHOWN_FAILURES]:
        say(f"failed: {printable(failure.path)}: {printable(failure.reason)}")
    if len(cache.failures) > _NUM_SHOWN_FAILURES:
        more = len(cache.failures) - _NUM_SHOWN_FAILURES
        say(f"failed: {more} more, listed by featcache info {printable(cache.path)}")
    if cache.failures:
        warnings.warn(
            f"{len(cache.failures)} images could not be read and are not in the cache",
            FeatcacheWarning, stacklevel=3,
        )  # fmt: skip
    rate = "" if summary.images_per_second is None else f", {summary.images_per_second:,} images/s"
    say(
        f"{cache.path}: {summary.num_images:,} images ({summary.num_new:,} new, "
        f"{summary.num_known:,} known) in {summary.seconds:.1f} s{rate}."
    )
    stages = cache.provenance.get("stage_seconds")
    if summary.num_new and isinstance(stages, dict):
        say("Time: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in stages.items()))


def _summary(
    cache: Cache, status: str, start: float, *, num_new: int = 0, num_known: int,
    images_per_second: float | None = None,
) -> ExtractionSummary:  # fmt: skip
    splits: dict[str, dict[str, int]] = {}
    for name, split in cache.splits.items():
        counts = Counter(split.targets.tolist())
        labels = {-1: "unlabelled", **dict(enumerate(cache.classes))}
        splits[name] = {labels[t]: n for t, n in sorted(counts.items())}
    parity = cache.provenance.get("parity")
    return ExtractionSummary(
        cache=cache.path.as_posix(), status=status,
        num_images=sum(len(s) for s in cache.splits.values()), num_new=num_new,
        num_known=num_known, num_failed=len(cache.failures),
        num_truncated=len(cache.provenance.get("truncated", [])), splits=splits,
        engine=str(cache.provenance.get("engine", "none")),
        parity=max(parity) if parity else None,
        seconds=round(time.perf_counter() - start, 3), images_per_second=images_per_second,
        fingerprint=cache.fingerprint, content_sha256=cache.content_sha256,
    )  # fmt: skip
