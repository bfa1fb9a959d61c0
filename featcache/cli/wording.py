"""Facts as lines for people: what the command line prints when nobody asked for JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from featcache.errors import printable
from featcache.formatting import (
    FEW,
    count,
    in_bytes,
    in_time,
    join_few,
    list_counts,
    percent,
    shorten,
)

if TYPE_CHECKING:
    from featcache.deployment.predictions import Predictions
    from featcache.extraction.reports import Projection


_NAME_WIDTH = 30  # of a class beside its probability


def projection_lines(projection: Projection) -> Iterator[str]:
    """Yield what an extraction would take."""
    yield f"{printable(projection.identity['backbone'])}:"
    if projection.num_known == projection.num_images:
        known = count(projection.num_images, "image")
        yield f"expected: nothing to run; known already: {known}"
        return
    for path, reason in projection.failures:
        yield f"would fail: {printable(path)}: {printable(reason)}"
    yield f"sample: {len(projection.failures)} of {count(projection.num_decoded, 'image')} failed"
    if projection.deepest is not None:
        yield f"deep greyscale: values up to {projection.deepest:,} in the sample"
    decode, forward = (1000 * s for s in (projection.decode_seconds, projection.forward_seconds))
    yield f"engine: {projection.engine}"
    yield f"an image: {decode:.1f} ms to decode, {forward:.1f} ms in the network"
    num_wanted = projection.num_images - projection.num_known
    known = f", {projection.num_known:,} are known" if projection.num_known else ""
    yield (
        f"expected: {count(num_wanted, 'image')} at {projection.images_per_second:,} images/s "
        f"in {in_time(projection.seconds)}{known}"
    )
    size, working = in_bytes(projection.cache_bytes), in_bytes(projection.working_bytes)
    yield f"disk: {size} for the cache, {working} while working"


def facts_lines(facts: dict[str, Any]) -> Iterator[str]:
    """Yield the facts of ``featcache info``."""
    kind = f"a featcache {facts['kind']}"
    if "command" in facts:
        kind = f"an unfinished featcache {facts['command']}"
    yield f"{printable(facts['path'])}: {kind}"
    for key, value in facts.items():
        if key in {"path", "kind", "command", "failures", "verified", "layers"}:
            continue
        if key == "caches":  # the first has been told as the cache
            for number, of_one in enumerate(value[1:], 2):
                yield f"cache {number}, side by side with it:"
                for name, part in of_one.items():
                    yield f"  {name}: {_plain(part)}"
        elif isinstance(value, dict):
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


def layer_lines(facts: dict[str, Any]) -> Iterator[str]:
    """Yield the layers of a run's network: backbone and head."""
    caches = facts.get("caches") or [
        facts["cache"] | {"num_features": facts["head"]["num_features"]}
    ]
    sides = [cache["identity"].get("image_size", "S") for cache in caches]
    rows = [("layer", "output", "parameters", "trained")]
    for cache in caches:
        name, number = printable(cache["identity"].get("backbone")), cache["num_features"]
        rows.append((name, f"(N, {number:,})", "", "no, frozen"))
    for layer in facts["layers"]:
        parameters = layer["num_parameters"]
        rows.append((
            f"  {layer['name']} {layer['kind']}", f"(N, {layer['num_outputs']:,})",
            f"{parameters:,}", "yes" if parameters else "",
        ))  # fmt: skip
    rows.append(("head", "", f"{facts['num_parameters']:,}", "yes"))
    for side in sides:
        yield f"input: (N, 3, {side}, {side})"
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, output, parameters, trained in rows:
        yield (
            f"{name:<{widths[0]}}  {output:<{widths[1]}}  {parameters:>{widths[2]}}  {trained}"
        ).rstrip()


def prediction_lines(predictions: Predictions) -> Iterator[str]:
    """Yield a line per image, then the counts."""
    width = min(max((len(printable(name)) for name in predictions.classes), default=0), _NAME_WIDTH)
    has_labels, counted = predictions.task == "multilabel", Counter[str]()
    rows = zip(predictions.paths, predictions.preds, predictions.probs, strict=True)
    for path, pred, probs in rows:
        counted.update(pred if has_labels else [pred])
        if has_labels:
            sure = dict(zip(predictions.classes, probs, strict=True))
            listed = ", ".join(f"{printable(name)} {percent(sure[name], 1)}" for name in pred)
            yield f"{printable(path)}: {listed or 'none'}"
        else:
            name = shorten(printable(pred), _NAME_WIDTH)
            yield f"{name:<{width}}  {percent(probs.max(), 1):>6}  {printable(path)}"
    for path, reason in predictions.failures:
        yield f"failed: {printable(path)}: {printable(reason)}"
    found = {name: counted[name] for name in predictions.classes}
    if len(found) > FEW:
        found = dict(counted.most_common())
    listed = join_few(f"{n:,} {name}" for name, n in found.items()) or "none"
    failed = f", {len(predictions.failures):,} failed" if predictions.failures else ""
    views = ", by the mean of their views" if predictions.average_views else ""
    yield f"{count(len(predictions.paths), 'image')}{views}: {listed}{failed}"


def _split_text(split: dict[str, Any]) -> str:
    *shape, dtype = split["features"]
    known = split.get("num_known_per_class", {})
    if known:
        parts = (
            f"{n:,} of {known[name]:,} known {name}" for name, n in split["num_per_class"].items()
        )
        counts = join_few(parts)
    else:
        counts = list_counts(split["num_per_class"])
    groups = "" if split["num_groups"] is None else f"; {count(split['num_groups'], 'group')}"
    views = "" if split["num_views"] == 1 else f", {split['num_views']} views"
    made = split["num_per_precision"]
    precisions = "; made at " + ", ".join(f"{p} {n:,}" for p, n in made.items())
    size = " x ".join(f"{n:,}" for n in shape)
    return f"{size} {dtype}{views}; {counts}{groups}" + precisions * (len(made) > 1)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{printable(k)} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        if len(value) > FEW:
            return f"{len(value):,}: {join_few(map(_plain, value))}"
        return " ".join(_plain(v) for v in value) or "none"
    return "none" if value is None else printable(value)
