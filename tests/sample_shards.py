"""Tars and Parquet files of images, as other programs write them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from featcache.data.samples import ImageDataset


def write_tar(
    path: Path, contents: Mapping[str, bytes | str], kind: int = tarfile.PAX_FORMAT
) -> Path:
    """Write a tar of files; names that end in ``/`` are folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in contents.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.mtime = 1_700_000_000
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return path


def images_of(tree: Path) -> list[tuple[str, str, str, bytes]]:
    """Return (split, class, name, bytes) of the images of a split tree."""
    paths = sorted(path for path in tree.rglob("*") if path.is_file())
    return [(*path.relative_to(tree).parts, path.read_bytes()) for path in paths]  # type: ignore[misc]


def write_webdataset(tree: Path, folder: Path, *, num_shards: int = 2) -> Path:
    """Write the images of a split tree as WebDataset does: ``valid-00001.tar`` with KEY.cls."""
    shards: dict[str, dict[str, bytes | str]] = {}
    for number, (split, label, name, data) in enumerate(images_of(tree)):
        key, _, ending = name.rpartition(".")
        shard = shards.setdefault(f"{split}-{number % num_shards:05}.tar", {})
        shard |= {f"{key}.{ending}": data, f"{key}.cls": label}
    for name, contents in shards.items():
        write_tar(folder / name, contents)
    return folder


def write_hugging_face(tree: Path, folder: Path, **options: Any) -> Path:
    """Write the images of a split tree as ``datasets`` does: a file for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    images = images_of(tree)
    classes = sorted({label for _, label, _, _ in images})
    for split in sorted({split for split, *_ in images}):
        own = [(label, name, data) for of, label, name, data in images if of == split]
        table = pa.table({
            "image": [{"bytes": data, "path": name} for _, name, data in own],
            "label": [classes.index(label) for label, _, _ in own],
        })  # fmt: skip
        word = {"valid": "validation"}.get(split, split)
        path = folder / f"{word}-00000-of-00001.parquet"
        pq.write_table(with_features(table, classes), path, **options)
    return folder


def with_features(table: pa.Table, classes: Sequence[str], label: str = "label") -> pa.Table:
    """Return a table with what ``datasets`` writes about its columns."""
    features = {
        "image": {"_type": "Image"}, label: {"names": list(classes), "_type": "ClassLabel"}
    }  # fmt: skip
    info = json.dumps({"info": {"features": features}})
    return table.replace_schema_metadata({"huggingface": info})


def contents(dataset: ImageDataset) -> dict[str, tuple[str, str, bytes]]:
    """Return path -> split, class and bytes of every image."""
    return {s.path: (s.split, dataset.class_of(s), dataset.read(s)) for s in dataset.samples}
