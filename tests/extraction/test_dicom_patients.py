"""Patients of DICOM files are groups, hashed; and nothing that names them is written anywhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import uuid
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_network

pytest.importorskip("pydicom", reason="pydicom, the extra dicom")

from click.testing import CliRunner
from sample_dicom import make_dicom
from sample_stores import upload

import featcache
from featcache.backbones.engine import Engine
from featcache.cache.reading import Cache, open_cache
from featcache.cache.selection import select
from featcache.cli import main
from featcache.data import dicom_groups
from featcache.data.dataset import scan
from featcache.data.dicom_groups import Salt, identify_and_keep
from featcache.data.splitting import split
from featcache.errors import CacheError, ConfigError, DataError, FeatcacheWarning

HOW: dict[str, Any] = {"backbone": tiny_network.build(), "say": lambda _: None}
# Long enough that no digits of a feature and no base64 of a picture are equal to one by chance:
# five digits were, in the heat map of an explanation.
NAME, PATIENT, BORN = "Zebediakarnäh^Quirinius", "PAT-901257734182", "19501224"
SECRETS = ("zebediakarn", "quirinius", "pat-9012", "901257734182", BORN, "acc77123", "2.25.4711")


def values(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 4000, (40, 40)).astype("<u2")


def write(path: Path, number: int, **elements: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"PatientID": f"{PATIENT}{number // 2}", "SOPInstanceUID": f"2.25.4711.{number}"}
    path.write_bytes(make_dicom(values(number), bits=12, **(facts | elements)))


def write_patients(root: Path, **elements: Any) -> Path:
    """Write twelve images of six patients, each with one of either class."""
    for number in range(12):
        name = ("covid", "normal")[number % 2]
        write(root / name / f"{number:02}.dcm", number, **elements)
    return root


def groups_of(cache: Cache) -> dict[str, str]:
    return {
        path: group
        for rows in cache.splits.values()
        for path, group in zip(rows.paths, rows.groups or [], strict=True)
    }


def extract(data: Path, cache: Path, **options: Any) -> Cache:
    featcache.extract(data, cache, **(HOW | options))
    return open_cache(cache)


# ------------------------------------------------------------------------------------------ groups


def test_patients_are_groups_with_a_salt_that_later_commands_reuse(tmp_path: Path) -> None:
    data, said = write_patients(tmp_path / "data"), list[str]()
    first = extract(data, tmp_path / "a.h5", say=said.append)
    groups = groups_of(first)
    assert all(
        groups[f"covid/{n:02}.dcm"] == groups[f"normal/{n + 1:02}.dcm"] for n in range(0, 12, 2)
    )
    assert len(set(groups.values())) == 6
    assert all(re.fullmatch("[0-9a-f]{32}", group) for group in groups.values())
    salt = tmp_path / "a.h5.salt"
    assert "salt: " in "".join(said)
    assert "groups: 6, by patient ID of 12 of 12" in said
    assert stat.S_IMODE(salt.stat().st_mode) == 0o600 or os.name == "nt"
    assert first.provenance["group_salt"] == Salt.of(salt).id
    assert groups_of(extract(data, tmp_path / "b.h5", group_salt=salt)) == groups
    assert not (tmp_path / "b.h5.salt").exists()
    assert not set(groups_of(extract(data, tmp_path / "c.h5")).values()) & set(groups.values())
    assert featcache.extract(data, tmp_path / "a.h5", **HOW).status == "up to date"
    salt.unlink()
    with pytest.raises(CacheError, match=r"that of a\.h5, found no file .*--group-salt"):
        featcache.extract(data, tmp_path / "a.h5", **HOW)
    with pytest.raises(CacheError, match=r"found another"):
        featcache.extract(data, tmp_path / "a.h5", group_salt=tmp_path / "c.h5.salt", **HOW)
    with pytest.warns(FeatcacheWarning, match="different salts"):
        select([tmp_path / "a.h5", tmp_path / "c.h5"], tmp_path / "d.h5", prefix=True,
               say=lambda _: None)  # fmt: skip


def test_an_issuer_makes_another_patient_and_a_blank_id_none(tmp_path: Path) -> None:
    data = write_patients(tmp_path / "data")
    write(data / "covid" / "90.dcm", 0, IssuerOfPatientID="elsewhere", SOPInstanceUID="2.25.1")
    write(data / "covid" / "91.dcm", 0, PatientID="  ", SOPInstanceUID="2.25.2")
    write(data / "covid" / "92.dcm", 0, PatientID=None, SOPInstanceUID="2.25.3")
    groups = groups_of(extract(data, tmp_path / "c.h5"))
    assert len(set(groups.values())) == 9
    assert [groups[f"covid/{n}.dcm"] for n in (91, 92)] == ["covid/91.dcm", "covid/92.dcm"]
    blank = write_patients(tmp_path / "blank", PatientID="")
    assert extract(blank, tmp_path / "d.h5").splits["all"].groups is None
    assert not (tmp_path / "d.h5.salt").exists()  # nothing is hashed


def test_an_id_on_more_than_a_fifth_is_asked_about(tmp_path: Path) -> None:
    data = write_patients(tmp_path / "data")
    for number in range(100, 120):
        write(data / "covid" / f"{number}.dcm", number, PatientID="ANONYMOUS")
    with pytest.raises(DataError, match=r"patient IDs: .*one on 20 of 32 DICOM files.*keep"):
        featcache.extract(data, tmp_path / "c.h5", **HOW)
    kept = groups_of(extract(data, tmp_path / "c.h5", patient_ids="keep"))
    assert len(set(kept.values())) == 7
    ignored = groups_of(extract(data, tmp_path / "d.h5", patient_ids="ignore"))
    assert len(set(ignored.values())) == 26
    by_name = groups_of(extract(data, tmp_path / "e.h5", group_by=r"(\d)\.dcm"))
    assert set(by_name.values()) == set("0123456789")  # what the user says goes before headers
    with pytest.raises(ConfigError, match=r"--patient-ids"):
        featcache.extract(data, tmp_path / "f.h5", patient_ids="other", **HOW)


def test_a_split_keeps_patients_together_whatever_the_salt(tmp_path: Path) -> None:
    data, found = write_patients(tmp_path / "data"), list[dict[str, str]]()
    for name in ("a.csv", "b.csv"):
        split(data, tmp_path / name, say=lambda _: None)
        assert stat.S_IMODE((tmp_path / f"{name}.salt").stat().st_mode) == 0o600 or os.name == "nt"
        rows = [line.split(",") for line in (tmp_path / name).read_text().split()[1:]]
        assert len({row[3] for row in rows}) == 6
        assert all(len({row[2] for row in rows if row[3] == group}) == 1 for *_, group in rows)
        found.append({row[0]: row[2] for row in rows})
    assert found[0] == found[1]
    url = upload(data, f"memory://{uuid.uuid4().hex}")
    split(url, tmp_path / "u.csv", group_salt=tmp_path / "a.csv.salt", say=lambda _: None)
    stored = (tmp_path / "u.csv").read_text().replace(f"{url}/", "data/")
    assert stored == (tmp_path / "a.csv").read_text()
    split(data, tmp_path / "tree", say=lambda _: None)
    assert not (tmp_path / "tree.salt").exists()
    there = {p.name: p.relative_to(tmp_path / "tree").parts[0] for p in tmp_path.glob("tree/*/*/*")}
    assert there == {Path(path).name: split for path, split in found[0].items()}
    cache = extract(tmp_path / "a.csv", tmp_path / "c.h5")  # groups of the CSV
    assert len(set(groups_of(cache).values())) == 6


def test_files_of_one_uid_are_one_group_and_warned_of_if_they_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, num_views, inner = write_patients(tmp_path / "data"), list[int](), Engine.run_here

    def counting(engine: Engine, images: Any) -> Any:
        num_views.append(len(images))
        return inner(engine, images)

    monkeypatch.setattr(Engine, "run_here", counting)
    # the same image, named again and compressed otherwise: no other patient, whatever the ID says
    again = make_dicom(values(0), bits=12, syntax="RLE", SOPInstanceUID="2.25.4711.0", PatientID="")
    (data / "normal" / "again.dcm").write_bytes(again)
    cache = extract(data, tmp_path / "c.h5")  # warnings are errors
    groups = groups_of(cache)
    assert groups["normal/again.dcm"] == groups["covid/00.dcm"]
    rows = cache.splits["all"]
    copy, first = (rows.paths.index(path) for path in ("normal/again.dcm", "covid/00.dcm"))
    np.testing.assert_array_equal(rows.features[copy], rows.features[first])
    assert rows.image_sha256[copy].tobytes() != rows.image_sha256[first].tobytes()
    assert sum(num_views) == 4 + 12  # of 4 probes, and 13 rows
    write(data / "normal" / "other.dcm", 50, SOPInstanceUID="2.25.4711.0", PatientID="")
    with pytest.warns(FeatcacheWarning, match="stand for different pixels: all are kept"):
        groups = groups_of(extract(data, tmp_path / "d.h5"))
    assert groups["normal/other.dcm"] == groups["covid/00.dcm"]
    assert len(groups) == 14


def test_of_two_commands_at_once_the_first_makes_the_salt(tmp_path: Path) -> None:
    data, place = scan(write_patients(tmp_path / "data")), tmp_path / "salt"
    how: dict[str, Any] = {
        "patient_ids": None, "path_names": None, "say": lambda _: None, "writes": True
    }  # fmt: skip
    salts = [Salt.of(place), Salt.of(place)]
    first, second = (identify_and_keep(data, salt, **how) for salt in salts)
    assert first.samples == second.samples
    assert [path.name for path in tmp_path.iterdir()].count("salt") == 1
    assert len(list(tmp_path.iterdir())) == 2  # nothing else is left


def test_damaged_salts_and_headers(tmp_path: Path) -> None:
    data = write_patients(tmp_path / "data")
    (tmp_path / "short").write_text("salt\n")
    with pytest.raises(ConfigError, match=r"--group-salt: expected 16 bytes or more, found 4"):
        featcache.extract(data, tmp_path / "c.h5", group_salt=tmp_path / "short", **HOW)
    with pytest.raises(ConfigError, match=r"--group-salt: expected a file"):
        featcache.extract(data, tmp_path / "c.h5", group_salt=data, **HOW)
    broken = data / "covid" / "broken.dcm"
    broken.write_bytes(bytes(128) + b"DICM" + bytes(2000))
    with pytest.warns(FeatcacheWarning, match="1 image could not be read"):
        assert len(extract(data, tmp_path / "c.h5", max_errors=1).failures) == 1
    planned = featcache.plan(data, tmp_path / "new.h5", **HOW)
    assert planned is not None
    assert not (tmp_path / "new.h5.salt").exists()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_images_in_archives_have_patients_and_hashed_paths(kind: str, tmp_path: Path) -> None:
    data = write_patients(tmp_path / "data")
    packed = Path(shutil.make_archive(str(tmp_path / "packed"), kind, data))
    plain = extract(data, tmp_path / "a.h5").splits["all"]
    cache = extract(packed, tmp_path / "b.h5", path_names="hash")
    rows = cache.splits["all"]
    assert all(re.fullmatch(r"(.*/)?[0-9a-f]{32}\.dcm", path) for path in rows.paths)
    assert len(set(rows.groups or [])) == 6
    order = {sha256.tobytes(): row for row, sha256 in enumerate(plain.image_sha256)}
    same = [order[sha256.tobytes()] for sha256 in rows.image_sha256]
    np.testing.assert_array_equal(rows.features, plain.features[same])
    assert featcache.extract(packed, tmp_path / "b.h5", **HOW).status == "up to date"
    assert featcache.verify(cache.path, data=packed, **HOW).num_compared == 12


# ------------------------------------------------------------------------------------------ privacy


def everything_written(folder: Path, *but: str) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] not in but
    }


def find_secrets(texts: dict[str, bytes]) -> list[str]:
    found = []
    for name, data in texts.items():
        plain = data.decode("latin-1").casefold() + name.casefold()
        wide = data.replace(b"\0", b"").decode("latin-1").casefold()
        found += [f"{name}: {secret}" for secret in SECRETS if secret in plain or secret in wide]
    return found


def test_nothing_that_names_a_patient_is_written_or_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On names in headers, folders and files; one file is in colour, one has no window."""
    data, out = tmp_path / "data", tmp_path / "out"
    out.mkdir()
    for number in range(24):
        place = data / ("train", "valid", "test")[number % 3] / ("covid", "normal")[number // 3 % 2]
        write(
            place / f"{PATIENT}{number // 6}" / f"quirinius_2.25.4711.{number}.dcm", number,
            PatientID=f"{PATIENT}{number // 6}", PatientName=NAME, PatientBirthDate=BORN,
            AccessionNumber="ACC77123", StudyInstanceUID="2.25.4711", Manufacturer="Maker",
            SeriesInstanceUID="2.25.4711.5", SpecificCharacterSet="ISO_IR 100",
            ViewPosition="AP", WindowWidth=0 if number == 20 else 900, WindowCenter=900,
        )  # fmt: skip
    odd = data / "train" / "covid" / "Zebediakarnaeh" / "ZEBEDIAKARNAEH.dcm"
    odd.parent.mkdir()
    odd.write_bytes(
        make_dicom(
            values(1),
            PhotometricInterpretation="RGB",
            PatientName=NAME,
            SpecificCharacterSet="ISO_IR 100",
        )
    )
    tiny = ("--backbone", "python:tiny_network:build")
    monkeypatch.chdir(out)
    said = []

    def run(*arguments: object) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = CliRunner().invoke(main.cli, [str(argument) for argument in arguments])
        said.append(f"{result.output} {[str(w.message) for w in caught]}".replace(str(data), ""))
        assert result.exit_code == 0, said[-1]

    hidden = (*tiny, "--path-names", "hash", "--group-salt", "c.h5.salt", "--log-json")
    run("extract", data, "cut.h5", *hidden, "--max-errors", "5", "--part", "1/2")
    run("extract", data, "c.h5", *tiny, "--path-names", "hash", "--max-errors", "5")
    run("extract", data, "c.h5", *tiny, "--max-errors", "5")  # it remembers
    run("verify", "c.h5", "--data", data, *tiny)
    run("train", "c.h5", "run", "--epochs", "2")
    run("sweep", "c.h5", "best", "--trials", "2")
    run("predict", "run", "--cache", "c.h5", "--csv", "p.csv")
    shutil.copy(
        data / "test/covid" / f"{PATIENT}0" / "quirinius_2.25.4711.2.dcm", tmp_path / "x.dcm"
    )
    run("explain", "run", tmp_path / "x.dcm", "--out", "explained", *tiny)
    run("evaluate", "run", "--by", "group")
    run("audit", "c.h5", "--data", data)
    run("report", "run", "report.html", "--data", data)
    run("info", "c.h5")
    run("convert", "c.h5", "c.csv")
    run("select", "c.h5", "d.h5", "--fractions", "0.5,0.25,0.25")
    written = everything_written(out)
    assert {"c.h5", "c.h5.salt", "c.h5.dicom.csv", "report.html", "c.csv"} <= written.keys()
    assert any(name.startswith("cut.h5.partial/") for name in written)
    assert find_secrets(written | {"said": "".join(said).encode()}) == []
    cache = open_cache(out / "c.h5")
    assert len(cache.failures) == 2
    assert cache.splits["train"].paths[0].startswith("train/covid/")
    # what is not hashed is found by this very search
    unread = pytest.warns(FeatcacheWarning, match="2 images could not be read")
    with unread, pytest.warns(FeatcacheWarning, match="25 of 25 DICOM files have a name, ID or"):
        featcache.extract(data, tmp_path / "open" / "c.h5", max_errors=5, **HOW)
    assert find_secrets(everything_written(tmp_path / "open"))


def test_columns_of_the_headers_are_for_audit_and_by(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for number in range(36):
        place = data / ("train", "valid", "test")[number % 3] / ("covid", "normal")[number // 3 % 2]
        write(
            place / f"{number:02}.dcm", number, ViewPosition=("AP", "PA")[number % 2],
            PatientID=f"P{number}",
            PatientAge=("093Y", "045Y", "011M")[number % 3], PatientSex="F", Manufacturer="A  B\n",
            PresentationIntentType="FOR PROCESSING" if number < 5 else "FOR PRESENTATION",
            BurnedInAnnotation="YES" if number == 7 else "NO",
        )  # fmt: skip
    said = list[str]()
    cache = extract(data, tmp_path / "c.h5", say=said.append)
    wanted = "5 for processing, not for presentation; 1 with annotations burned in (36 DX)"
    assert f"DICOM: 36 DICOM files; {wanted}" in said
    assert cache.provenance["dicom"] == {"files": 36, "for_processing": 5, "burned_in": 1}
    table = tmp_path / "c.h5.dicom.csv"
    assert table.read_text().splitlines()[:2] == [
        "path,modality,view_position,manufacturer,sex,age_decade,intent,burned_in",
        "train/covid/00.dcm,DX,AP,A B,F,90+,FOR PROCESSING,NO",
    ]
    featcache.train(cache.path, tmp_path / "run", hidden=(4,), epochs=2, say=lambda _: None)
    found = featcache.evaluate(
        tmp_path / "run", by="view_position", table=table, say=lambda _: None
    )
    assert {"AP", "PA"} <= set(re.findall("AP|PA", json.dumps(found.as_dict())))
    audit = featcache.audit(
        cache.path, table=table, source="view_position", say=lambda _: None
    ).as_dict()
    assert "AP" in json.dumps(audit)


def test_companions_that_are_kept_do_not_tear_patients_apart(tmp_path: Path) -> None:
    data = write_patients(tmp_path / "data")
    mask = np.zeros((40, 40), "u1")
    mask[10:20, 10:20] = 255
    for number in range(0, 12, 2):
        path = data / "covid" / f"{number:02}_mask.dcm"
        path.write_bytes(make_dicom(mask, PatientID="", SOPInstanceUID=f"2.25.9.{number}"))
    with pytest.raises(DataError, match="6 that look like some"):
        extract(data, tmp_path / "c.h5")
    groups = groups_of(extract(data, tmp_path / "c.h5", companions="keep"))
    for number in range(0, 12, 2):
        names = (f"covid/{number:02}.dcm", f"covid/{number:02}_mask.dcm",
                 f"normal/{number + 1:02}.dcm")  # fmt: skip
        assert len({groups[name] for name in names}) == 1
    assert len(set(groups.values())) == 6


def test_dicom_under_another_format_s_name_has_its_patient(tmp_path: Path) -> None:
    data = write_patients(tmp_path / "data")
    (data / "covid/00.dcm").rename(data / "covid/00.png")
    groups = groups_of(extract(data, tmp_path / "c.h5"))
    assert groups["covid/00.png"] == groups["normal/01.dcm"]


def test_headers_that_cannot_be_read_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_patients(tmp_path / "data")
    monkeypatch.setattr(dicom_groups, "_ask", lambda name, files, *_: [None] * len(files))
    with pytest.warns(FeatcacheWarning, match="headers of 12 DICOM files could not be read"):
        extract(data, tmp_path / "c.h5")
