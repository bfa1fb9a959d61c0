"""Tars are listed as Python's tarfile lists them; what is cut off or damaged is refused."""

import io
import random
import subprocess
import tarfile
from functools import partial

import pytest
from sample_shards import write_tar

from featcache.data.blobs import read_at
from featcache.data.tar import list_tar
from featcache.errors import DataError
from featcache.untrusted import open_regular

KINDS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
NAMES = {
    "a.png": b"", "folder/": b"", "folder/b.png": b"x", "c.png": bytes(512), "./d.png": b"d" * 513,
    "é/ü.png": b"1", "l/" * 60 + "long.png": b"12", "o" * 90 + "/" + "p" * 95 + ".png": b"123",
}  # fmt: skip


def listed(path):
    with open_regular(path) as file:
        return list(list_tar(partial(read_at, file), path.stat().st_size, str(path)))


def members(path):
    """What tarfile says: path, bytes' place, size, whether it is a folder."""
    with tarfile.open(path) as tar:
        return [
            ("/".join(p for p in m.name.split("/") if p not in {"", "."}), m.offset_data, m.size,
             m.isdir())
            for m in tar
        ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_members_are_those_that_tarfile_lists(tmp_path, kind):
    path = write_tar(tmp_path / "a.tar", NAMES, kind)
    found = listed(path)
    assert [(e.path, e.offset, e.num_bytes, e.kind == "folder") for e in found] == members(path)
    assert {entry.mtime_ns for entry in found} == {1_700_000_000 * 10**9}


def test_a_tar_of_a_whole_folder_by_the_command(tmp_path):
    for name in ("covid/a.png", "covid/deep/b.png", "x" * 90 + ".png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(name)
    for option in ("--format=gnu", "--format=posix", "--format=ustar"):
        path = tmp_path / "t.tar"
        made = subprocess.run(["tar", option, "-cf", path, "-C", tmp_path, "data"], check=False)
        if made.returncode:
            pytest.skip("no GNU tar")
        found = [(e.path, e.offset, e.num_bytes, e.kind == "folder") for e in listed(path)]
        assert found == members(path)
        assert found[0][0] == "data"


def test_links_devices_and_sparse_files_are_told_apart(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.png")
            info.type, info.linkname = kind, "./a.png"
            tar.addfile(info)
        info = tarfile.TarInfo("pax.png")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "real.png"}
        tar.addfile(info)
    assert [(e.path, e.kind, e.target) for e in listed(path)] == [
        ("a.png", "file", ""), ("1.png", "hard link", "a.png"), ("2.png", "link", ""),
        ("6.png", "other", ""), ("3.png", "other", ""), ("real.png", "sparse", ""),
    ]  # fmt: skip


def test_a_gnu_sparse_file_does_not_shift_what_follows(tmp_path):
    with (tmp_path / "hole.png").open("wb") as file:
        for place in range(0, 40 << 16, 1 << 16):  # a map of more than one block
            file.seek(place)
            file.write(b"x")
    (tmp_path / "after.png").write_bytes(b"after")
    path = tmp_path / "a.tar"
    names = ["hole.png", "after.png"]
    made = subprocess.run(
        ["tar", "--format=gnu", "-S", "-cf", path, "-C", tmp_path, *names], check=False
    )
    if made.returncode:
        pytest.skip("no GNU tar")
    found = listed(path)
    assert [entry.path for entry in found] == names
    assert found[0].kind in {"sparse", "file"}  # file: where the disk has no holes
    data = path.read_bytes()
    assert data[found[1].offset : found[1].offset + 5] == b"after"


def test_large_sizes_in_base_256(tmp_path):
    info = tarfile.TarInfo("a.png")
    info.size = 9 << 33
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(DataError, match=r"cut off in 'a\.png', after 0 whole members"):
        listed(path)


def test_a_tar_cut_off_anywhere_is_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{n}.png": bytes(700) for n in range(4)})
    whole = path.read_bytes()
    end = 4 * (512 + 1024)
    for length in (*range(1, end, 100), end):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError) as caught:
            listed(path)
        text = str(caught.value)
        assert len(text.splitlines()) == 1
        assert "cut off" in text or "another kind of file" in text
    assert "after 4 members, the last of them '3.png'" in text
    assert f"truncate -s +1024 {path}" in text
    path.write_bytes(whole[:end] + bytes(1024))  # what the advice does
    assert len(listed(path)) == 4


def test_an_empty_tar_has_no_members_and_an_empty_file_is_none(tmp_path):
    assert listed(write_tar(tmp_path / "a.tar", {})) == []
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(DataError, match="0 bytes, none of them a member"):
        listed(tmp_path / "b.tar")


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_tars_are_refused_with_advice(tmp_path, mode):
    with tarfile.open(tmp_path / "a.tar", f"w:{mode}") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(DataError, match=r"found one compressed by .*Unpack the tar from it once"):
        listed(tmp_path / "a.tar")


def test_two_tars_in_one_file_are_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.png": b"a"})
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(DataError, match="another behind its end, at byte 10,240"):
        listed(path)


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "a/../../b.png"])
def test_names_that_lead_outside_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="a name inside the tar"):
        listed(write_tar(tmp_path / "a.tar", {name: b"a"}))


def test_damaged_tars_give_members_or_one_error(tmp_path, rounds):
    path = write_tar(tmp_path / "a.tar", {f"{'n' * 40 * n}{n}.png": bytes(300) for n in range(6)})
    whole, generator = path.read_bytes(), random.Random(0)
    refused = []
    for _ in range(rounds(400, 20_000)):
        data = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            place = generator.randrange(len(data) // 512) * 512 + generator.choice(
                [0, 124, 148, 156, 257]
            )
            data[place + generator.randrange(12)] = generator.randrange(256)
        read = partial(read_at, io.BytesIO(data))
        try:
            for entry in list_tar(read, len(data), "t"):
                assert 0 <= entry.offset <= entry.offset + entry.num_bytes <= len(data)
        except DataError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert all(len(text.splitlines()) == 1 for text in refused)
