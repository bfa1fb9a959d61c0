"""Facts as lines for people: what the command line prints when nobody asked for JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from featcache.errors import printable

if TYPE_CHECKING:
    from featcache.deployment.predictions import Predictions
    from featcache.extraction.reports import Projection


def projection_lines(projection: Projection) -> Iterator[str]:
    """Yield what an extraction would take."""
    yield f"{printable(projection.identity['backbone'])}:"
    if projection.num_known == projection.num_images:
        yield f"expected: nothing to run, all {projection.num_images:,} images are known"
        return
    for path, reason in projection.failures:
        yield f"would fail: {printable(path)}: {printable(reason)}"
    yield f"sample: {len(projection.failures)} of {projection.num_decoded} images failed"
    if projection.deepest is not None:
        yield f"deep greyscale: values up to {projection.deepest:,} in the sample"
    decode, forward = (1000 * s for s in (projection.decode_seconds, projection.forward_seconds))
    yield f"engine: {projection.engine}"
    yield f"an image: {decode:.1f} ms to decode, {forward:.1f} ms in the network"
    num_wanted = projection.num_images - projection.num_known
    known = f", {projection.num_known:,} are known" if projection.num_known else ""
    yield (
        f"expected: {num_wanted:,} images at {projection.images_per_second:,} images/s "
        f"in {projection.seconds:,.0f} s{known}"
    )
    size, working = in_bytes(projection.cache_bytes), in_bytes(projection.working_bytes)
    yield f"disk: {size} for the cache, {working} while working"


def facts_lines(facts: dict[str, Any]) -> Iterator[str]:
    """Yield the facts of ``featcache info``."""
    yield f"{printable(facts['path'])}: a featcache {facts['kind']}"
    for key, value in facts.items():
        if key in {"path", "kind", "failures", "verified"}:
            continue
        if isinstance(value, dict):
            yield f"{key}:"
            for name, part in value.items():
                if name == "row_precisions":  # the splits say it in one number each
                    continue
                text = _split_text(part) if key == "splits" else _plain(part)
                yield f"  {printable(name)}: {text}"
        else:
            yield f"{key}: {in_bytes(value) if key.endswith('_bytes') else _plain(value)}"
    for failure in facts.get("failures", []):
        yield f"failed: {printable(failure['path'])}: {printable(failure['reason'])}"
    if facts["kind"] == "cache":
        yield "not hashed: featcache verify checks that the file is whole"


def prediction_lines(predictions: Predictions) -> Iterator[str]:
    """Yield a line per image, then the counts."""
    width = max((len(printable(name)) for name in predictions.classes), default=0)
    has_labels, counted = predictions.task == "multilabel", Counter[str]()
    rows = zip(predictions.paths, predictions.preds, predictions.probs, strict=True)
    for path, pred, probs in rows:
        counted.update(pred if has_labels else [pred])
        if has_labels:
            sure = dict(zip(predictions.classes, probs, strict=True))
            listed = ", ".join(f"{printable(name)} {sure[name]:.1%}" for name in pred)
            yield f"{printable(path)}: {listed or 'none'}"
        else:
            yield f"{printable(pred):<{width}}  {probs.max():6.1%}  {printable(path)}"
    for path, reason in predictions.failures:
        yield f"failed: {printable(path)}: {printable(reason)}"
    counts = [f"{counted[c]:,} {printable(c)}" for c in predictions.classes]
    failed = f", {len(predictions.failures):,} failed" if predictions.failures else ""
    views = ", by the mean of their views" if predictions.average_views else ""
    yield f"{len(predictions.paths):,} images{views}: {', '.join(counts)}{failed}"


def in_bytes(number: float) -> str:
    """Return a size in the unit that suits it: ``1.9 MB``."""
    unit = "bytes"
    for larger in ("kB", "MB", "GB"):
        if number < 1000:
            break
        number, unit = number / 1000, larger
    return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"


def _split_text(split: dict[str, Any]) -> str:
    *shape, dtype = split["features"]
    known = {n: f" of {k:,} known" for n, k in split.get("num_known_per_class", {}).items()}
    counts = ", ".join(
        f"{n:,}{known.get(name, '')} {printable(name)}"
        for name, n in split["num_per_class"].items()
    )
    groups = "" if split["num_groups"] is None else f"; {split['num_groups']:,} groups"
    views = "" if split["num_views"] == 1 else f", {split['num_views']} views"
    made = split["num_per_precision"]
    precisions = "; made at " + ", ".join(f"{p} {n:,}" for p, n in made.items())
    return f"{' x '.join(map(str, shape))} {dtype}{views}; {counts}{groups}" + precisions * (
        len(made) > 1
    )


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{printable(k)} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        return " ".join(_plain(v) for v in value) or "none"
    return "none" if value is None else printable(value)
