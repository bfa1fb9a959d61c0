"""The same images as folders, zip, tar, folder of tars and Parquet: equal features by image hash.

Whatever a command does with a zip, it does with tars and Parquet.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sample_images import write_image, write_tree
from sample_shards import images_of, write_hugging_face, write_tar, write_webdataset

from featcache.backbones.backbone import Backbone
from featcache.cache.reading import Cache, open_cache
from featcache.data.dataset import scan
from featcache.data.splitting import split
from featcache.errors import CacheError, ConfigError, DataError, FeatcacheWarning
from featcache.evaluation.auditing.audit import audit
from featcache.extraction.extraction import extract, plan
from featcache.extraction.verification import verify

pytestmark = pytest.mark.usefixtures("children_here")
Rows = dict[bytes, tuple[str, str, npt.NDArray[np.float32]]]


def rows_of(cache: Cache) -> Rows:
    """Image hash -> split, class, features."""
    return {
        sha.tobytes(): (name, cache.classes[target], features)
        for name, part in cache.splits.items()
        for sha, target, features in zip(
            part.image_sha256, part.targets, part.features, strict=True
        )
    }  # fmt: skip


def assert_equal_rows(found: Rows, wanted: Rows) -> None:
    assert found.keys() == wanted.keys()
    for sha, (split_name, label, features) in wanted.items():
        assert found[sha][:2] == (split_name, label)
        assert found[sha][2].tobytes() == features.tobytes()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(
        tmp_path_factory.mktemp("sources") / "tree", {"train": 9, "valid": 3, "test": 3}
    )


def sources(tree: Path, folder: Path) -> dict[str, Path]:
    """The images of a tree in every kind of file."""
    folder.mkdir()
    names = {f"{s}/{label}/{name}": data for s, label, name, data in images_of(tree)}
    with zipfile.ZipFile(folder / "z.zip", "w") as archive:
        for path, data in names.items():
            archive.writestr(path, data)
    write_tar(folder / "t.tar", names)
    images = images_of(tree)
    table = pa.table({
        "image": [data for *_, data in images], "label": [label for _, label, _, _ in images],
        "split": [name for name, *_ in images],
    })  # fmt: skip
    pq.write_table(table, folder / "binary.parquet", row_group_size=11)
    return {
        "zip": folder / "z.zip", "tar": folder / "t.tar",
        "tars": write_webdataset(tree, folder / "tars"),
        "hf": write_hugging_face(tree, folder / "hf", compression="none"),
        "binary": folder / "binary.parquet",
    }  # fmt: skip


def test_features_are_equal_by_image_hash(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    extract(tree, tmp_path / "tree.h5", backbone=tiny_backbone)
    wanted = rows_of(open_cache(tmp_path / "tree.h5"))
    assert len(wanted) == 30
    for kind, data in sources(tree, tmp_path / "of").items():
        cache = tmp_path / f"{kind}.h5"
        assert plan(data, cache, backbone=tiny_backbone).num_images == 30
        extract(data, cache, backbone=tiny_backbone)
        assert_equal_rows(rows_of(open_cache(cache)), wanted)
        before = cache.read_bytes()
        assert extract(data, cache, backbone=tiny_backbone).status == "up to date"
        assert cache.read_bytes() == before
        checked = verify(cache, data=data, backbone=tiny_backbone, samples=7)
        assert (checked.num_compared, checked.changed, checked.vanished) == (7, (), ())
        with pytest.raises(DataError, match="not yet split"):
            split(data, tmp_path / "made", fractions=(0.5, 0.5, 0))
        # From any kind to another: nothing runs again.
        other = tmp_path / "moved.h5"
        other.write_bytes((tmp_path / "tree.h5").read_bytes())
        moved = extract(data, other, backbone=tiny_backbone)
        assert (moved.num_new, moved.num_kept + moved.num_moved) == (0, 30)


def test_tars_that_change_are_updated(tree: Path, tmp_path: Path, tiny_backbone: Backbone) -> None:
    data, cache = write_webdataset(tree, tmp_path / "tars"), tmp_path / "c.h5"
    extract(data, cache, backbone=tiny_backbone)
    before = rows_of(open_cache(cache))
    write_webdataset(tree, data)  # anew, with the same content
    again = extract(data, cache, backbone=tiny_backbone)
    assert (again.num_new, again.num_kept) == (0, 30)
    write_image(tmp_path / "new.png", 999)
    added = {"x.png": (tmp_path / "new.png").read_bytes(), "x.cls": "covid"}
    write_tar(data / "train-00002.tar", added)
    (data / "valid-00000.tar").rename(data / "val-9.tar")
    changed = extract(data, cache, backbone=tiny_backbone)
    assert changed.num_new == 1
    assert changed.num_moved > 0
    after = rows_of(open_cache(cache))
    assert_equal_rows({sha: after[sha] for sha in before}, before)
    other = write_tar(tmp_path / "other.tar", {"a/1.png": b"1", "b/2.png": b"2"})
    with pytest.raises(CacheError, match="images it knows"):
        extract(other, cache, backbone=tiny_backbone)


def test_what_cannot_be_decoded_is_a_listed_failure(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    images = [data for *_, data in images_of(tree)]
    table = pa.table({"image": [None, b"no image", *images], "label": ["a", "a", *"ab" * 15]})
    pq.write_table(table, tmp_path / "a.parquet")
    cache = tmp_path / "p.h5"
    with pytest.warns(FeatcacheWarning, match="2 images could not be read"):
        done = extract(tmp_path / "a.parquet", cache, backbone=tiny_backbone, max_errors=2)
    assert done.num_failed == 2
    reasons = {f.path: f.reason for f in open_cache(cache).failures}
    assert set(reasons) == {"0", "1"}
    assert "no bytes, a null" in reasons["0"]


def test_options_are_remembered(tree: Path, tmp_path: Path, tiny_backbone: Backbone) -> None:
    images = images_of(tree)
    table = pa.table({
        "image": [data for *_, data in images], "dx": [label for _, label, _, _ in images],
        "who": [name[:6] for _, _, name, _ in images],
    })  # fmt: skip
    (tmp_path / "d").mkdir()
    pq.write_table(table, tmp_path / "d/a.parquet")
    columns = {"target": "dx", "group": "who"}
    for data in (tmp_path / "d/a.parquet", tmp_path / "d"):
        cache = tmp_path / f"{data.name}.h5"
        extract(data, cache, backbone=tiny_backbone, columns=columns, exclude="**/7")
        assert extract(data, cache, backbone=tiny_backbone).status == "up to date"
        made = open_cache(cache)
        assert made.classes == ("covid", "normal")
        assert len(set(made.splits["all"].groups or [])) < 29


def test_hashed_names(tree: Path, tmp_path: Path, tiny_backbone: Backbone) -> None:
    data, cache = write_webdataset(tree, tmp_path / "tars"), tmp_path / "c.h5"
    extract(data, cache, backbone=tiny_backbone, path_names="hash")
    paths = [path for part in open_cache(cache).splits.values() for path in part.paths]
    assert len(set(paths)) == 30
    assert not {path.rpartition("/")[2] for path in paths} & {
        name for _, _, name, _ in images_of(tree)
    }  # fmt: skip
    checked = verify(cache, data=data, backbone=tiny_backbone, samples=3)
    assert (checked.num_compared, checked.vanished) == (3, ())


def test_audit_reads_them(tree: Path, tmp_path: Path, tiny_backbone: Backbone) -> None:
    data, cache = write_hugging_face(tree, tmp_path / "hf"), tmp_path / "c.h5"
    extract(data, cache, backbone=tiny_backbone)
    found = audit(cache, data=data, only=["same"])
    assert found is not None


def test_a_tar_that_is_cut_off_loses_nothing(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    data, cache = write_webdataset(tree, tmp_path / "tars"), tmp_path / "c.h5"
    extract(data, cache, backbone=tiny_backbone)
    before = cache.read_bytes()
    shard = data / "train-00001.tar"
    shard.write_bytes(shard.read_bytes()[:-11_000])
    with pytest.raises(DataError, match=r"cut off.*train-00001\.tar"):
        extract(data, cache, backbone=tiny_backbone)
    assert cache.read_bytes() == before


def test_a_data_set_goes_to_other_processes(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for data in sources(tree, tmp_path / "of").values():
        monkeypatch.chdir(tmp_path)
        dataset = scan(data.relative_to(tmp_path))
        monkeypatch.chdir("/")  # as a process of another folder
        sent = pickle.loads(pickle.dumps(dataset))
        for one, other in zip(dataset.samples, sent.samples, strict=True):
            Image.open(io.BytesIO(sent.read(other))).load()
            assert dataset.read(one) == sent.read(other)


def test_globs_and_lists_are_data_of_all_commands(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    folder, cache = write_webdataset(tree, tmp_path / "tars"), tmp_path / "c.h5"
    extract(folder, cache, backbone=tiny_backbone)
    for data in (f"{folder}/*.tar", sorted(folder.iterdir())):
        assert extract(data, cache, backbone=tiny_backbone).status == "up to date"
        assert verify(cache, data=data, backbone=tiny_backbone, samples=3).num_compared == 3
    with pytest.raises(ConfigError, match="a file outside the folder of images"):
        extract([folder], folder / "c.h5", backbone=tiny_backbone)
