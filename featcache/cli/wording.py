"""Facts as lines for people: what the command line prints when nobody asked for JSON."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from featcache.cache.provenance import training_data_note
from featcache.errors import escaped, printable
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
from featcache.precision import format_bound

if TYPE_CHECKING:
    from featcache.deployment.exporting.delivery import DeliverySummary
    from featcache.deployment.exporting.export import ExportSummary
    from featcache.deployment.predictions import Predictions
    from featcache.extraction.projection import Projection


_MOST_FAILURES = 5  # of a sample, as of an extraction
_NAME_WIDTH = 30  # of a class beside its probability


def projection_lines(projection: Projection) -> Iterator[str]:
    """Yield what an extraction would take."""
    yield f"{printable(projection.identity['backbone'])}:"
    if projection.num_known == projection.num_images:
        known = count(projection.num_images, "image")
        yield f"expected: nothing to run; known already: {known}"
        return
    for path, reason in projection.failures[:_MOST_FAILURES]:
        yield f"would fail: {printable(path)}: {printable(reason)}"
    if (more := len(projection.failures) - _MOST_FAILURES) > 0:
        yield f"would fail: {more:,} more, listed by --json"
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
    yield f"reads: {count(num_wanted, 'image')}, {in_bytes(projection.read_bytes)}"
    if len(projection.workers) > 1 or projection.workers[0].cost is not None:
        yield "machines like this one (arithmetic: storage and network are taken as fast enough):"
        for of in projection.workers:
            cost = "" if of.cost is None else f", costs {of.cost:,.2f}"
            hours = f"{of.worker_hours:.3g} machine-hours"
            yield f"{of.num_workers:>5}: {in_time(of.seconds)}, {hours}{cost}"


def export_lines(summary: ExportSummary | DeliverySummary) -> Iterator[str]:
    """Yield what ``featcache export`` wrote."""
    name = printable(summary.path)
    if hasattr(summary, "backbone"):
        yield f"{name}: {summary.backbone} with its head, sha256 {summary.sha256[:16]}..."
        thresholds = ", and the threshold" if summary.decision else ""
        yield f"{name}.json: classes and preprocessing{thresholds}"
        return
    backbones = " + ".join(printable(each["backbone"]) for each in summary.inputs)
    model = f"{name}/model.onnx" if summary.files else name
    yield f"{model}: {backbones} with its head, sha256 {summary.sha256[:16]}..."
    parity = summary.parity
    sizes = [str(size) for size in parity["batches"]]
    images = f"{count(parity['num_phantoms'], 'drawn image')} in batches of "
    images += f"{', '.join(sizes[:-1])} and {sizes[-1]}"
    is_decided = summary.decision["thresholds"] is not None
    border = "the threshold" if is_decided else "another decision"
    if parity["num_rows"]:
        images += f", and {count(parity['num_rows'], 'image')} of the cache nearest {border}"
    decisions = "same decisions"
    if parity["num_changed"]:
        decisions = f"same decisions but for {count(parity['num_changed'], 'image')}"
    yield (
        f"checked against the run: {images}: {decisions}, features within "
        f"{parity['largest_error']:.1e} (allowed {format_bound(parity['bound'])})"
    )
    if parity["num_within_bound"]:
        yield (
            f"{count(parity['num_within_bound'], 'image')} so near {border} that features within "
            "what is allowed could change the decision"
        )
    if parity["num_unread"]:
        yield f"{count(parity['num_unread'], 'image')} of these rows not at hand, or not readable"
    if summary.files:
        yield f"{name}/predict.py: self-test passed on {count(summary.num_golden, 'image')}"
        open_items = summary.num_items - summary.num_answered
        yield (
            f"{name}/README.md: {summary.num_answered} of {summary.num_items} items of the CLAIM "
            f"checklist answered from the files, {open_items} TO FILL"
        )


def facts_lines(facts: dict[str, Any]) -> Iterator[str]:
    """Yield the facts of ``featcache info``."""
    kind = f"a featcache {facts['kind']}"
    if "command" in facts:
        kind = f"an unfinished featcache {facts['command']}"
    yield f"{printable(facts['path'])}: {kind}"
    for key, value in facts.items():
        if key not in {"path", "kind", "command", "failures", "verified", "layers", "audit"}:
            yield from _fact_lines(key, value)
    for failure in facts.get("failures", []):
        yield f"failed: {printable(failure['path'])}: {printable(failure['reason'])}"
    identity = facts.get("identity") or facts.get("cache", {}).get("identity") or {}
    if note := training_data_note(str(identity.get("backbone"))):
        yield f"note: {note}"
    if facts["kind"] == "cache":
        yield from _audit_lines(facts["audit"])
        yield "not hashed: featcache verify checks that the file is whole"


def _fact_lines(key: str, value: Any) -> Iterator[str]:
    """Yield one of the facts."""
    if (key, value) in (("num_members", 1), ("ensemble", None)):
        return
    if key == "mean":
        yield from _mean_lines(value)
    elif key == "caches":  # the first has been told as the cache
        for number, of_one in enumerate(value[1:], 2):
            yield f"cache {number}, side by side with it:"
            for name, part in of_one.items():
                yield f"  {name}: {_plain(part)}"
    elif isinstance(value, dict):
        yield f"{key}:"
        for name, part in value.items():
            if name == "workers":
                yield from _worker_lines(part)
            elif name != "row_precisions":  # the splits say it in one number each
                text = _split_text(part) if key == "splits" else _plain(part)
                yield f"  {printable(name)}: {text}"
    else:
        yield f"{key}: {in_bytes(value) if key.endswith('_bytes') else _plain(value)}"


def _worker_lines(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Yield who has made the rows of a cache, and how fast."""
    from featcache.cache.workers import read_workers

    for line in read_workers({"workers": lines}):
        place = f"{printable(line['host'])}, {printable(line['device'])}"
        number = count(line["processes"], "process", "processes")
        if line["parts"]:
            number = f"{count(line['parts'], 'part')}, {number}"
        rate = f"{line['images_per_second']:,} images/s each"
        yield f"  worker: {place}: {number}, {count(line['images'], 'image')}, {rate}"


def _mean_lines(mean: dict[str, Any]) -> Iterator[str]:
    """Yield the figures of a cross-validation."""
    from featcache.sweeps.crossval_figures import interval_text

    yield "mean of the folds (in brackets the 95 % interval of Nadeau and Bengio):"
    figures = {name.replace("_", " "): mean[name] for name in mean if name != "per_class"}
    of_classes = list(mean["per_class"].items())
    figures |= {f"recall of {printable(name)}": row["recall"] for name, row in of_classes[:FEW]}
    for name, figure in figures.items():
        if figure["mean"] is not None:
            yield f"  {name}: {interval_text(figure)}"


def _audit_lines(verdict: dict[str, Any] | None) -> Iterator[str]:
    if verdict is None:
        yield "audit: never audited"
        return
    leaks = f"leaks in {count(verdict['num_leaks'], 'set')} of copies"
    parts = ", ".join(map(printable, verdict["parts"]))
    images = verdict["num_images"]
    read = f" (and {count(images, 'image')})" if images else ""
    yield f"audit of {parts}{read}: {leaks if verdict['num_leaks'] else 'no leaks'}"
    yield from textwrap.wrap(
        escaped(verdict["verdict"][:2000]), 80, initial_indent="  ", subsequent_indent="  "
    )


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
    number = facts["num_members"]
    name = "head" if number == 1 else f"mean of {number} such heads"
    rows.append((name, "", f"{facts['num_parameters']:,}", "yes"))
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
    unlike = predictions.unlike_training or [False] * len(predictions.paths)
    decision = predictions.decision or predictions.preds
    rows = zip(
        predictions.paths, predictions.preds, predictions.probs, decision, unlike, strict=True
    )
    for path, pred, probs, chosen, is_unlike in rows:
        mark = "" if chosen == pred else f"  decision: {_decided(chosen)}"
        mark += "  (unlike any training image)" * is_unlike
        counted.update(pred if has_labels else [pred])
        if has_labels:
            sure = dict(zip(predictions.classes, probs, strict=True))
            listed = ", ".join(f"{printable(name)} {percent(sure[name], 1)}" for name in pred)
            yield f"{printable(path)}: {listed or 'none'}{mark}"
        else:
            name = shorten(printable(pred), _NAME_WIDTH)
            yield f"{name:<{width}}  {percent(probs.max(), 1):>6}  {printable(path)}{mark}"
    for path, reason in predictions.failures:
        yield f"failed: {printable(path)}: {printable(reason)}"
    found = {name: counted[name] for name in predictions.classes}
    if len(found) > FEW:
        found = dict(counted.most_common())
    listed = join_few(f"{n:,} {name}" for name, n in found.items()) or "none"
    failed = f", {len(predictions.failures):,} failed" if predictions.failures else ""
    views = ", by the mean of their views" if predictions.average_views else ""
    yield f"{count(len(predictions.paths), 'image')}{views}: {listed}{failed}"
    if predictions.decision is not None:
        yield from _decision_lines(predictions)
    if any(unlike) and predictions.novelty is not None:
        yield _unlike_line(sum(unlike), predictions.novelty)


def _unlike_line(number: int, novelty: dict[str, Any]) -> str:
    rows, compared = novelty["num_rows"], novelty["num_compared_with"]
    sample = "" if compared == rows else f", of which {compared:,} were compared"
    return (
        f"unlike any of {rows:,} training images{sample}: {number:,}, farther from each than "
        "99.9% of those are from their nearest"
    )


def _decided(chosen: Any) -> str:
    names = chosen if isinstance(chosen, tuple) else (chosen,)
    return ", ".join(shorten(printable(name), _NAME_WIDTH) for name in names) or "none"


def _decision_lines(predictions: Predictions) -> Iterator[str]:
    """Yield the thresholds, and how many images are decided as what."""
    decision, thresholds = predictions.decision or (), predictions.thresholds or {}
    counted = Counter[str]()
    for chosen in decision:
        counted.update(chosen if isinstance(chosen, tuple) else [chosen])
    known = [*predictions.classes, *(name for name in counted if name not in predictions.classes)]
    listed = join_few(f"{counted[name]:,} {name}" for name in known if counted[name]) or "none"
    limits = join_few(f"{name} if >= {rule['threshold']:.6g}" for name, rule in thresholds.items())
    yield f"by the decision ({limits}): {listed}"


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
        # nothing of None: --window none is something
        said = [f"{printable(k)} {_plain(v)}" for k, v in value.items() if v is not None]
        return ", ".join(said) or "none"
    if isinstance(value, list):
        if len(value) > FEW:
            return f"{len(value):,}: {join_few(map(_plain, value))}"
        return " ".join(_plain(v) for v in value) or "none"
    return "none" if value is None else printable(value)
