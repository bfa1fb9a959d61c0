"""Which columns of a Parquet file are what, and what stands in those of texts.

The names of columns, their types and what Hugging Face's ``datasets`` says of them decide. What is
unclear is a question.

Reads: an open Parquet file. Writes: nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from featcache.data.tables import resembled_column
from featcache.untrusted import parse_json_object

_TARGETS = ("target", "label", "cls", "class")
_BATCH_ROWS = 256  # few, as a text may have a million characters
_MAX_TEXT_BYTES = 1 << 32  # of all names and labels of a file
_MAX_RATIO, _RATIO_FREE_BYTES = 250, 1 << 26  # of texts to the file: a dictionary repeats them


class Refusal(Exception):  # noqa: N818 (no error of the child's own)
    """What is wrong with a file: the parts of a ``DataError``."""

    def __init__(self, what: str, expected: str, found: object, hint: str = "") -> None:
        super().__init__(what)
        self.parts = [what, expected, f"{found}"[:300], hint]


def choose_columns(schema: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return key -> column, of image, path, target, split and group; and what else is known."""
    given, ignore = request["columns"], set(request["ignore_columns"])
    names = list(schema.names)
    if len(set(names)) < len(names):
        raise Refusal("Parquet", "columns with different names", ", ".join(names[:8]))
    listed = ", ".join(names[:20]) or "none"
    for option, wanted in (("--columns", [*given.values()]), ("--ignore-columns", ignore)):
        if missing := [name for name in wanted if name not in names]:
            raise Refusal(option, f"columns of the file: {listed}", ", ".join(map(repr, missing)))
    free = [n for n in names if n not in {*given.values(), *ignore} and n[:8] != "__index_"]
    features = _hugging_face(schema)
    found: dict[str, Any] = dict.fromkeys(("image", "path", "target", "split", "group")) | given
    image = found["image"] = found["image"] or _find_image(schema, free, features, listed)
    if image in free:
        free.remove(image)
    kind = schema.field(image).type
    found["path_in"] = None
    inside = [kind.field(i).name for i in range(kind.num_fields)] if _is_struct(kind) else []
    if "bytes" not in inside if _is_struct(kind) else not _is_bytes(kind):
        raise Refusal("images", "a column of bytes", f"{image}: {kind}"[:200])
    if inside:
        found["path_in"] = "path" in inside
    labels = {n: f["names"] for n, f in features.items() if f.get("_type") == "ClassLabel"}
    if not found["target"] and not request["no_classes"]:
        found["target"] = _find_target(free, labels)
    for key in ("path", "split", "group"):
        if not found[key] and key in free:
            found[key] = key
    texts = {name for name in free if _is_text(schema.field(name).type)}
    asked = _resembling(found, free, set() if found["path_in"] else texts)
    if request["no_classes"]:
        found["target"] = None
        asked = {name: key for name, key in asked.items() if key != "target"}
    if asked:
        answers = " ".join(f"--columns {key}={name}" for name, key in asked.items())
        raise Refusal(
            "columns", "path, target, split, group, and others that resemble none of them",
            ", ".join(f"{name!r} ({key}?)" for name, key in asked.items()),
            f"Say what they are with {answers}, or that they are something else with "
            f"--ignore-columns '{','.join(asked)}'",
        )  # fmt: skip
    used = {found[key] for key in ("path", "target", "split", "group")}
    found["unused"] = [name for name in free if name not in used]
    found["names"] = labels.get(found["target"])
    return found


def _resembling(
    found: Mapping[str, Any], free: Sequence[str], may_be_paths: set[str]
) -> dict[str, str]:
    """Return column -> which of those that are missing it resembles."""
    missing = {key for key in ("path", "target", "split", "group") if not found[key]}
    alike = {name: resembled_column(name) for name in free}
    return {
        name: key for name, key in alike.items()
        if key in missing and key is not None and (key != "path" or name in may_be_paths)
    }  # fmt: skip


def _hugging_face(schema: Any) -> dict[str, Any]:
    """Return column -> what ``datasets`` says of it."""
    try:
        text = (schema.metadata or {}).get(b"huggingface", b"{}")
        features = parse_json_object(text)["info"]["features"]
        return {str(name): value for name, value in features.items() if isinstance(value, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


_TEXTS = {"string", "large_string", "string_view"}


def _is_struct(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_struct(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return str(kind) in _TEXTS


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    kinds = pa.types
    if kinds.is_dictionary(kind):
        kind = kind.value_type
    if kinds.is_struct(kind):
        return any(
            kind.field(i).name == "bytes" and _is_bytes(kind.field(i).type)
            for i in range(kind.num_fields)
        )
    tests = [kinds.is_binary, kinds.is_large_binary]
    if hasattr(kinds, "is_binary_view"):
        tests.append(kinds.is_binary_view)
    return any(test(kind) for test in tests)


def _find_image(
    schema: Any, free: Sequence[str], features: Mapping[str, Any], listed: str
) -> str:  # fmt: skip
    images = [n for n in free if features.get(n, {}).get("_type") == "Image"]
    images = images or [n for n in free if _is_bytes(schema.field(n).type)]
    if len(images) == 1:
        return images[0]
    raise Refusal(
        "images", "one column with the bytes of images",
        f"several: {', '.join(images)}" if images else f"none among {listed}",
        f"Name it: --columns image={images[0] if images else 'COLUMN'}",
    )  # fmt: skip


def _find_target(free: Sequence[str], labels: Mapping[str, Any]) -> str | None:
    for candidates in ([n for n in free if n in labels], [n for n in free if n in _TARGETS]):
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise Refusal(
                "classes", "one column with them", f"several: {', '.join(candidates)}",
                f"Say which: --columns target={candidates[0]}",
            )  # fmt: skip
    return None


def read_texts(parquet: Any, name: str, num_rows: int, file_bytes: int) -> list[Any]:
    """Return a column of texts or whole numbers of a file of so many bytes as a list."""
    import pyarrow as pa

    cells: list[Any] = []
    most = min(_MAX_TEXT_BYTES, max(_RATIO_FREE_BYTES, _MAX_RATIO * file_bytes))
    num_bytes = 0
    for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=[name], use_threads=False):
        column = batch.column(0)
        if pa.types.is_struct(column.type) and name.endswith(".path"):
            column = column.field("path")
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        kind = column.type
        if not (
            pa.types.is_integer(kind) or pa.types.is_null(kind) or str(kind) in _TEXTS
        ):  # fmt: skip
            hint = "Cast it, or name another column: --columns KEY=HEADER"
            raise Refusal(f"column {name!r}", "texts or whole numbers", kind, hint)
        num_bytes += column.nbytes
        if num_bytes > most:
            raise Refusal(f"column {name!r}", f"at most {most:,} bytes of texts", "more")
        cells += column.to_pylist()
    if len(cells) != num_rows:
        raise Refusal(f"column {name!r}", f"{num_rows:,} rows", f"{len(cells):,}")
    return cells


def name_classes(values: Sequence[Any], names: Any, column: str) -> list[str]:
    """Return the names of classes; "" for an image without one."""
    if not isinstance(names, list):
        return ["" if value is None else str(value).strip() for value in values]
    made = []
    for value in values:
        if value is None or value == -1:
            made.append("")
        elif isinstance(value, int) and 0 <= value < len(names):
            made.append(str(names[value]).strip())
        else:
            raise Refusal(f"column {column!r}", f"numbers of {len(names)} classes", value)
    return made
