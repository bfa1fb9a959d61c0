"""Extract: every image once, bad ones named, finished rows kept, the backbone frozen in fact."""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny_network
import torch
from PIL import Image
from sample_images import write_image, write_tree

from featcache.backbones.backbone import Backbone
from featcache.cache.reading import Cache, open_cache
from featcache.errors import CacheError, ConfigError, DataError, FeatcacheWarning
from featcache.extraction.extraction import extract
from featcache.pixels.images import PixelRules
from featcache.pixels.views import ViewRules, render


def truth(root: Path, path: str) -> np.ndarray:
    """The features of one image by a few independent lines: Pillow and the plain network."""
    with Image.open(root / path) as image:
        small = image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float() / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    with torch.inference_mode():
        return tiny_network.network().eval()((pixels - mean) / std)[0].numpy()


def all_rows(cache: Cache) -> dict[str, np.ndarray]:
    return {
        f"{name}/{path}": split.features[i]
        for name, split in cache.splits.items()
        for i, path in enumerate(split.paths)
    }


def test_features_are_those_of_the_plain_network(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    summary = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, group_by=r"^(\w+)_")
    cache = open_cache(tmp_path / "c.h5")
    assert summary.status == "extracted"
    assert summary.num_images == summary.num_new == 46
    assert summary.splits["train"] == {"covid": 12, "normal": 12}
    assert cache.classes == ("covid", "normal")
    assert list(cache.splits) == ["train", "valid", "test"]
    for split in cache.splits.values():
        assert split.paths == sorted(split.paths)
        assert split.groups == [Path(p).name.split("_")[0] for p in split.paths]
        for path, features, target in zip(split.paths, split.features, split.targets, strict=True):
            np.testing.assert_allclose(features, truth(tree, path), rtol=1e-4, atol=1e-6)
            assert cache.classes[target] in path
            assert (tree / path).stat().st_size in split.image_bytes
    assert not (tmp_path / "c.h5.partial").exists()
    assert max(cache.provenance["parity"]) < 1e-5


def test_every_layout_gives_the_same_features(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    extract(tree, tmp_path / "tree.h5", backbone=tiny_backbone)
    wanted = {k.split("/")[-1]: v for k, v in all_rows(open_cache(tmp_path / "tree.h5")).items()}
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for file in sorted(tree.rglob("*.*g")):
            archive.write(file, file.relative_to(tree.parent))
    lines = ["path,target,split"]
    for file in sorted(tree.rglob("*.*g")):
        split, name = file.relative_to(tree).parts[:2]
        lines.append(f"data/{file.relative_to(tree).as_posix()},{name},{split}")
    (tmp_path / "data.csv").write_text("\n".join(lines))
    flat = tmp_path / "flat"
    for source in (tree / "train", tree / "valid", tree / "test"):
        for name in ("covid", "normal"):
            for file in (source / name).iterdir():
                (flat / name).mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, flat / name)
    for data in (tmp_path / "data.zip", tmp_path / "data.csv", flat, flat / "covid"):
        extract(data, tmp_path / f"{data.name}.h5", backbone=tiny_backbone)
        cache = open_cache(tmp_path / f"{data.name}.h5")
        rows = all_rows(cache)
        assert len(rows) == (23 if data.name == "covid" else 46)
        for path, features in rows.items():
            np.testing.assert_array_equal(features, wanted[path.split("/")[-1]])
    unlabelled = open_cache(tmp_path / "covid.h5")
    assert unlabelled.classes == ()
    assert set(unlabelled.splits["all"].targets.tolist()) == {-1}


def test_another_identity_is_refused_and_rebuilt_on_request(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    cache = tmp_path / "c.h5"
    extract(tree, cache, backbone=tiny_backbone)
    before = cache.read_bytes()
    with pytest.raises(CacheError, match=r"crop_mode center, found crop_mode squash.*--rebuild"):
        extract(tree, cache, backbone=tiny_backbone, crop_mode="center")
    assert cache.read_bytes() == before
    extract(tree, cache, backbone=tiny_backbone, crop_mode="center", rebuild=True)
    assert open_cache(cache).identity["crop_mode"] == "center"


def test_other_peoples_files_are_never_replaced(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    for content in (b"a letter", b""):
        (tmp_path / "c.h5").write_bytes(content)
        for rebuild in (False, True):
            with pytest.raises(CacheError):
                extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, rebuild=rebuild)
        assert (tmp_path / "c.h5").read_bytes() == content
    assert not (tmp_path / "c.h5.partial").exists()


# ------------------------------------------------------------------------------------ bad images


def test_odd_images_get_the_right_rows_and_bad_ones_a_reason(
    tmp_path: Path, tiny_backbone: Backbone
) -> None:
    folder = tmp_path / "odd" / "covid"
    folder.mkdir(parents=True)
    grey = np.random.default_rng(0).integers(0, 256, (40, 44), np.uint8)
    colour = np.stack([grey, grey[::-1], grey[:, ::-1]], axis=-1)
    good: dict[str, np.ndarray] = {}

    def save(name: str, image: Image.Image, pixels: np.ndarray, **options: object) -> None:
        image.save(folder / name, **options)
        good[f"covid/{name}"] = pixels

    grey_truth = np.repeat(grey[..., None], 3, axis=2)
    save("grey.png", Image.fromarray(grey), grey_truth)
    save("deep.png", Image.fromarray(grey.astype(np.uint16) * 257), grey_truth)
    save("colour.tif", Image.fromarray(colour), colour)
    alpha = np.dstack([colour, grey])
    save("alpha.png", Image.fromarray(alpha), colour)
    palette = Image.fromarray(colour).quantize(64)
    save("palette.png", palette, np.asarray(palette.convert("RGB")))
    cmyk = Image.fromarray(colour).convert("CMYK")
    save("cmyk.tif", cmyk, np.asarray(cmyk.convert("RGB")))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn clockwise
    save("turned.png", Image.fromarray(colour), np.rot90(colour, -1), exif=exif)
    whole = (folder / "colour.tif").read_bytes()
    (folder / "cut.tif").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>404</html>")
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_bytes(b"x")
    (tmp_path / "odd" / "__MACOSX").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.png")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")

    with pytest.warns(FeatcacheWarning, match="3 images could not be read"):
        summary = extract(tmp_path / "odd", tmp_path / "c.h5", backbone=tiny_backbone, max_errors=3)
    cache = open_cache(tmp_path / "c.h5")
    assert summary.num_failed == 3
    assert sorted(cache.splits["all"].paths) == sorted(good)
    assert {Path(f.path).name for f in cache.failures} == {"cut.tif", "empty.png", "page.jpg"}
    assert all(f.reason for f in cache.failures)
    for path, features in zip(cache.splits["all"].paths, cache.splits["all"].features, strict=True):
        Image.fromarray(good[path]).save(tmp_path / "truth.png")
        np.testing.assert_allclose(features, truth(tmp_path, "truth.png"), rtol=1e-4, atol=1e-6)


def test_truncated_images_can_be_kept_and_are_counted(
    tmp_path: Path, tiny_backbone: Backbone
) -> None:
    for i in range(3):
        write_image(tmp_path / "data" / f"{i}.jpg", i)
    whole = (tmp_path / "data" / "1.jpg").read_bytes()
    (tmp_path / "data" / "1.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    summary = extract(
        tmp_path / "data", tmp_path / "c.h5", backbone=tiny_backbone, truncated="keep"
    )
    assert (summary.num_images, summary.num_failed, summary.num_truncated) == (3, 0, 1)
    assert open_cache(tmp_path / "c.h5").identity["truncated"] == "keep"


def test_too_many_failures_stop_and_the_same_command_goes_on(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    bad = sorted((tree / "valid" / "normal").iterdir())[:2]
    kept = {file: file.read_bytes() for file in bad}
    for file in bad:
        file.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"at most 5% of 5 failed in valid/normal.*--max-errors"):
        extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    assert not (tmp_path / "c.h5").exists()
    for file, data in kept.items():
        file.write_bytes(data)
    summary = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    assert summary.num_images == 46
    assert summary.num_known > 0  # what the first run had done was not done again


def test_a_class_without_a_readable_image_stops(tmp_path: Path, tiny_backbone: Backbone) -> None:
    tree = write_tree(tmp_path / "data", {"train": 2, "test": 1})
    for file in (tree / "test" / "covid").iterdir():
        file.write_bytes(b"broken")
    named = "test/covid: expected at least one readable image, .*, the first being test/covid/"
    with pytest.raises(DataError, match=named):
        extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, max_errors="100%")
    assert not (tmp_path / "c.h5").exists()


def test_failed_images_are_tried_again(tree: Path, tmp_path: Path, tiny_backbone: Backbone) -> None:
    file = sorted((tree / "train" / "covid").iterdir())[0]
    data = file.read_bytes()
    file.write_bytes(b"broken")
    with pytest.warns(FeatcacheWarning):
        extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    file.write_bytes(data)
    summary = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone)
    assert (summary.num_failed, summary.num_new, summary.num_images) == (0, 1, 46)


def test_rebuild_leaves_json_files_alone(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    (tmp_path / "settings.json").write_text('{"mine": 1}')
    with pytest.raises(CacheError):
        extract(tree, tmp_path / "settings.json", backbone=tiny_backbone, rebuild=True)
    assert (tmp_path / "settings.json").read_text() == '{"mine": 1}'


# ------------------------------------------------------------------------------------------ views


VIEWS = {"views": 3, "augment": "crop"}


def test_images_to_train_on_have_views_and_the_first_is_the_plain_one(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    extract(tree, tmp_path / "plain.h5", backbone=tiny_backbone)
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, **VIEWS)
    plain, cache = open_cache(tmp_path / "plain.h5"), open_cache(tmp_path / "c.h5")
    shapes = {name: split.features.shape for name, split in cache.splits.items()}
    assert shapes == {"train": (24, 3, 24), "valid": (10, 24), "test": (12, 24)}
    assert (cache.identity["views"], cache.identity["augmentation"]) == (3, "crop")
    for name, split in cache.splits.items():
        assert np.array_equal(split.plain_features, plain.splits[name].features)  # bit for bit
    vectors = cache.splits["train"].features.reshape(72, 24)
    assert len(np.unique(vectors, axis=0)) == 72


def test_each_view_is_the_plain_network_s_features_of_what_render_shows(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, views=4, augment="xray")
    split = open_cache(tmp_path / "c.h5").splits["train"]
    for path, views in list(zip(split.paths, split.features, strict=True))[::7]:
        data = (tree / path).read_bytes()
        recipe = PixelRules(32), ViewRules(4, "xray")
        pictures = render(data, [recipe], hashlib.sha256(data).digest()).views[0]
        for picture, features in zip(pictures, views, strict=True):
            Image.fromarray(picture).save(tmp_path / "view.png")
            np.testing.assert_allclose(features, truth(tmp_path, "view.png"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_size", [2, 7])
def test_views_do_not_depend_on_workers_order_or_names(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, batch_size: int
) -> None:
    options = {"backbone": tiny_backbone, "batch_size": batch_size, **VIEWS}
    extract(tree, tmp_path / "c.h5", workers=1, **options)
    again = write_tree(tmp_path / "again")
    for number, file in enumerate(sorted((again / "train").rglob("*.*g"), reverse=True)):
        file.rename(file.with_name(f"{number:03d}{file.suffix}"))
    extract(again, tmp_path / "again.h5", workers=5, **options)
    one, two = (open_cache(tmp_path / f"{n}.h5").splits["train"] for n in ("c", "again"))
    order = [np.lexsort(split.image_sha256.T) for split in (one, two)]
    assert np.array_equal(one.image_sha256[order[0]], two.image_sha256[order[1]])
    assert np.array_equal(one.features[order[0]], two.features[order[1]])


def test_an_interrupted_extraction_of_views_ends_equal(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"backbone": tiny_backbone, "batch_size": 4, **VIEWS}
    whole = extract(tree, tmp_path / "whole.h5", **options)
    broken = tree / "valid" / "covid" / "vac000_0.jpg"
    data, facts = broken.read_bytes(), broken.stat()
    broken.write_bytes(b"broken")
    with pytest.raises(DataError, match="at most 0 of 5 failed in valid/covid"):
        extract(tree, tmp_path / "c.h5", max_errors=0, **options)
    broken.write_bytes(data)
    os.utime(broken, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    resumed = extract(tree, tmp_path / "c.h5", max_errors=0, **options)
    assert resumed.num_known >= 24
    assert resumed.content_sha256 == whole.content_sha256


def manifest(tree: Path, splits: dict[str, str]) -> Path:
    """A CSV of all images of ``tree``, some of them in another split than their folder's."""
    lines = ["path,target,split"]
    for file in sorted(tree.rglob("*.*g")):
        split, name = file.relative_to(tree).parts[:2]
        path = file.relative_to(tree).as_posix()
        lines.append(f"{path},{name},{splits.get(path, split)}")
    (tree / "images.csv").write_text("\n".join(lines))
    return tree / "images.csv"


def test_an_image_that_changes_split_gets_its_views_or_keeps_the_plain_one(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    options = {"backbone": tiny_backbone, "batch_size": 4, **VIEWS}
    extract(manifest(tree, {}), tmp_path / "c.h5", **options)
    moved = {
        "valid/covid/vac000_0.jpg": "train",  # has one view: must be seen again
        "train/normal/trn001_1.png": "test",  # has three: the plain one is kept
    }
    updated = extract(manifest(tree, moved), tmp_path / "c.h5", **options)
    assert (updated.num_new, updated.num_known) == (1, 45)
    afresh = extract(manifest(tree, moved), tmp_path / "afresh.h5", **options)
    assert updated.content_sha256 == afresh.content_sha256


def test_without_a_split_to_train_on_all_has_views_or_none_may(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    extract(tree / "train", tmp_path / "all.h5", backbone=tiny_backbone, **VIEWS)
    assert open_cache(tmp_path / "all.h5").splits["all"].features.shape == (24, 3, 24)
    shutil.rmtree(tree / "train")
    with pytest.raises(ConfigError, match=r"--views: expected images to train on.*valid, test"):
        extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, **VIEWS)


def test_another_number_of_views_is_another_cache(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, **VIEWS)
    with pytest.raises(CacheError, match=r"expected views 4, found views 3.*--rebuild"):
        extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, views=4, augment="crop")
    again = extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, **VIEWS)
    assert again.status == "up to date"
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, views=4, augment="crop", rebuild=True)
    assert open_cache(tmp_path / "c.h5").splits["train"].num_views == 4


def test_more_views_than_a_batch_holds(tree: Path, tmp_path: Path, tiny_backbone: Backbone) -> None:
    options = {"backbone": tiny_backbone, "augment": "crop"}
    extract(tree, tmp_path / "few.h5", views=2, batch_size=3, **options)
    extract(tree, tmp_path / "many.h5", views=11, batch_size=3, **options)
    few, many = (open_cache(tmp_path / f"{n}.h5").splits["train"] for n in ("few", "many"))
    assert many.features.shape == (24, 11, 24)
    assert np.array_equal(few.features, many.features[:, :2])


# ------------------------------------------------------------------------ workers, provenance


@pytest.mark.parametrize("engine", ["onnx", "folded"])
def test_the_number_of_workers_and_the_order_of_their_work_change_nothing(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone, engine: str
) -> None:
    found = {
        extract(
            tree, tmp_path / f"{workers}.h5", backbone=tiny_backbone, workers=workers, engine=engine
        ).content_sha256
        for workers in (1, 2, 4)
    }
    assert len(found) == 1


def test_provenance_says_how_it_was_run_and_what_was_waited_for(
    tree: Path, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    lines: list[str] = []
    extract(tree, tmp_path / "c.h5", backbone=tiny_backbone, engine="onnx", say=lines.append)
    made = open_cache(tmp_path / "c.h5").provenance
    assert (made["engine"], made["engine_reason"], made["batch_size"]) == ("onnx", "asked for", 1)
    assert made["concurrency"] >= 1
    assert len(made["parity"]) == 4
    assert max(made["parity"]) < 1e-4
    assert made["bottleneck"] in {"decode", "forward", "write"}
    stages = {"decode", "forward", "write", "waiting for decode", "waiting for forward"}
    assert made["stage_seconds"].keys() == stages
    assert min(made["stage_seconds"].values()) >= 0
    assert any(line.startswith("Time: decode ") for line in lines)
    assert any("by onnx fp32 on cpu (asked for)" in line for line in lines)
