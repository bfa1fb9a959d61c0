"""The objects of several URLs as one data set: below one folder, by their names, or as images.

Each URL is listed once.

Reads: objects of stores. Writes: nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from featcache.data import store_requests
from featcache.data.folders import OTHER_ENDING, Ignored, ImageFile, has_image_ending, is_hidden
from featcache.data.remote import RemoteFile, list_files, refusals, retry
from featcache.errors import DataError


def list_all(
    urls: Sequence[str], *, progress: bool | str = False
) -> tuple[str, dict[str, RemoteFile]]:
    """Return the folder of all objects of some URLs, and path below it -> object.

    Raises:
        DataError: As ``list_files``; or if one of several is a CSV or a zip.
    """
    found: dict[str, RemoteFile] = {}
    starts = []
    for url in urls:
        if url.lower().endswith((".csv", ".zip")):
            raise DataError(
                "data", expected="images, tars or Parquet files where several are named",
                found=f"a {url[-4:].lower()} file", where=url, hint="Name it alone",
            )  # fmt: skip
        files = list_files(url, progress=progress)
        is_file = [*files] == [""]
        starts.append(url.rpartition("/")[0] if "*" in url or is_file else url.rstrip("/"))
        if "*" in url:
            starts[-1] = url[: url.index("*")].rpartition("/")[0]
        found |= {file.url: file for file in files.values()}
    top = _common_folder(starts)
    return top, {url[len(top) + 1 :]: found.pop(url) for url in sorted(found)}


def list_each(
    urls: Iterable[str], *, progress: bool | str = False
) -> dict[str, dict[str, RemoteFile]]:
    """Return what ``list_files`` finds at each of some URLs, many of them asked for at once.

    Raises:
        DataError: As ``list_files``.
        ConfigError: Likewise.
    """
    different = list(dict.fromkeys(urls))
    if len(different) < 2:  # here, so that Ctrl-C keeps an unfinished listing
        return {url: list_files(url, progress=progress) for url in different}
    return dict(zip(different, store_requests.ask_all(different, list_files), strict=True))


def walk_objects(
    files: Mapping[str, RemoteFile], ignored: Ignored, folders: set[str]
) -> list[ImageFile]:
    """Return the images among objects: what ``walk_folder`` is for files.

    Args:
        files: Path of each below a URL -> the object.
        ignored: What is not used; updated.
        folders: Paths of all folders that are not ignored; updated.
    """
    images = []
    for path, file in files.items():
        *above, name = path.split("/")
        if any(map(is_hidden, [*above, name])):
            ignored["hidden"] += 1
            continue
        folders.update("/".join(above[:n]) for n in range(1, len(above) + 1))
        if has_image_ending(name):
            images.append(ImageFile(path, file.num_bytes, file.mtime_ns))
        else:
            ignored.add(OTHER_ENDING, path)
    return images


def _common_folder(folders: Sequence[str]) -> str:
    levels = itertools.takewhile(
        lambda names: len(set(names)) == 1,
        zip(*(folder.split("/") for folder in folders), strict=False),
    )
    return "/".join(names[0] for names in levels)


def file_at(url: str) -> RemoteFile:
    """Return the object at a URL.

    Raises:
        DataError: If there is none there, or the store cannot be reached or refuses.
        ConfigError: If a package is not installed.
    """
    files = list_files(url)
    if [*files] != [""]:
        raise DataError("data", expected="an object of a store", found="a folder", where=url)
    return files[""]


def find_files(urls: Sequence[str], *, progress: bool | str = False) -> dict[str, RemoteFile]:
    """Return the objects at some URLs: URL -> object, without those that are not there.

    Of each bucket the folder is listed that all of its objects lie in. A web server is asked for
    each file: it need not list any.

    Raises:
        DataError: If a store cannot be reached, or refuses.
        ConfigError: If a package is not installed.
    """
    by_store: dict[str, list[str]] = {}
    for url in urls:
        by_store.setdefault("/".join(url.split("/", 3)[:3]), []).append(url)
    found: dict[str, RemoteFile] = {}
    for store, of_store in by_store.items():
        with refusals(store):
            if store.startswith("http"):
                infos = store_requests.ask_all(of_store, _file_of_web)
                found |= {file.url: file for file in infos if file is not None}
                continue
        top = _common_folder([url.rpartition("/")[0] for url in of_store])
        listed = list_files(top, progress=progress)
        at = {file.url: file for file in listed.values()}
        found |= {url: at[url] for url in of_store if url in at}
    return found


def _file_of_web(url: str) -> RemoteFile | None:
    try:
        info = retry(url, lambda fs, path: fs.info(path))
    except FileNotFoundError:
        return None
    return RemoteFile(url, int(info.get("size") or 0), store_requests.tag_of(info))


@dataclass(frozen=True)
class RemoteStore:
    """Reads images that are objects of their own: see ``samples.Store``. Picklable.

    Args:
        url: Of the folder; "" where the paths are URLs.
        tags: Path of an image below it -> its size and its tag.
    """

    url: str
    tags: dict[str, tuple[int, str]]

    @classmethod
    def of(cls, url: str, files: Iterable[tuple[str, RemoteFile]]) -> RemoteStore:
        """Return the store of some objects, each with its path below a URL."""
        return cls(url, {path: (file.num_bytes, file.tag) for path, file in files})

    def read(self, path: str) -> bytes:
        """Return the bytes of an image."""
        file = self.file_of(path)
        return file.read(0, file.num_bytes)

    def file_of(self, path: str) -> RemoteFile:
        """Return the object of an image, as it was listed."""
        url = f"{self.url}/{path}" if self.url else path
        return RemoteFile(url, *self.tags[path])

    def place_of(self, path: str) -> tuple[int, int]:
        """Return the same for all: any order is as fast."""
        return 0, 0

    def path_inside(self, path: str) -> str:
        """Return the path itself."""
        return path
