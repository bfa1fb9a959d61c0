"""Whole objects of stores: found, fetched into a file, sent from one, removed.

An object gets its name when all of it is there: a put of S3 and its like is whole or absent, other
file systems get a temporary name first. S3 is asked to replace only the version that the sender
knows (If-Match, If-None-Match); elsewhere that is looked at just before.

Reads and writes: objects, through the file systems of ``remote``.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import secrets
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from featcache.data.remote import RemoteFile, file_system, retry
from featcache.data.store_requests import CHANGED, lasting, tag_of
from featcache.errors import DataError
from featcache.files import NO_SPACE, Publish, atomic_writer, disk_error

Moved = Callable[[int], object]
"""Called with a number of bytes that have come or gone."""

ANY = "any"
"""In place of a tag: whatever is there is replaced."""

CHUNK_BYTES = 1 << 23
"""Of a get."""

NUM_AT_ONCE = 8
"""Gets or puts of stretches of an object, or of small objects."""

_PART_BYTES = 1 << 24  # of a put; S3 takes 10,000 parts of 5 MiB to 5 GiB
WHOLE_PUTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf"}
"""Stores in which an object is whole or absent."""

_TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.tmp$")  # of names in other stores


class ObjectChangedError(ValueError):
    """The object is not the one that was known: somebody else has written it."""


@contextlib.contextmanager
def one_line(what: str, url: str) -> Iterator[None]:
    """Turn what a store refuses into one line about a URL.

    Raises:
        DataError: If it cannot be reached, or refuses.
    """
    try:
        yield
    except (ObjectChangedError, DataError):
        raise
    except FileNotFoundError as error:
        raise DataError(
            what, expected="an object or a bucket that is there", found=_reason(error), where=url,
            hint="Check the name",
        ) from error  # fmt: skip
    except (OSError, ValueError) as error:
        if str(error) == CHANGED:
            raise ObjectChangedError(CHANGED) from error
        raise DataError(
            what, expected="a store that answers", found=_reason(error), where=url,
            hint="Check the address and the credentials",
        ) from error  # fmt: skip


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0][:200]


def find_objects(url: str) -> dict[str, RemoteFile]:
    """Return what lies at a URL now: path below it -> object, "" for the object itself.

    What senders that were killed have left under temporary names is left out.

    Raises:
        DataError: If the store cannot be reached, or refuses.
    """

    def find(fs: Any, path: str) -> dict[str, Any]:
        fs.invalidate_cache()
        try:
            info = fs.info(path)
            return {path: info} if info["type"] == "file" else fs.find(path, detail=True)
        except FileNotFoundError:
            return {}

    with one_line("URL", url):
        found = retry(url, find)
        top = file_system(url)[0]._strip_protocol(url)
    files = {}
    for name, info in found.items():
        below = name[len(top) :].strip("/") if name != top else ""
        is_folder = info.get("type") == "directory" or (name[-1:] == "/" and not info.get("size"))
        if not is_folder and not _TEMPORARY.search(name):
            place = f"{url}/{below}" if below else url
            files[below] = RemoteFile(place, int(info.get("size") or 0), tag_of(info))
    return files


def fetch_object(
    file: RemoteFile, target: Path, moved: Moved, publish: Publish | None = None
) -> str:  # fmt: skip
    """Fetch an object into a file, whole or not at all, and return its sha256 (64 hex digits).

    Stretches of 8 MiB are read several at a time, each of the version that was found.

    Args:
        file: The object.
        target: The file.
        moved: Told how much has come.
        publish: Gives the file its name: see ``atomic_writer``.

    Raises:
        ObjectChangedError: If it has changed since it was found.
        DataError: If it cannot be read.
        CacheError: If the disk is full.
    """
    digest = hashlib.sha256()
    starts = iter(range(0, file.num_bytes, CHUNK_BYTES))
    waiting: deque[Future[bytes]] = deque()

    def read(start: int) -> bytes:
        return file.read(start, min(CHUNK_BYTES, file.num_bytes - start))

    try:
        with ThreadPoolExecutor(NUM_AT_ONCE) as threads, atomic_writer(target, publish) as out:
            try:
                while True:
                    while len(waiting) < NUM_AT_ONCE and (start := next(starts, None)) is not None:
                        waiting.append(threads.submit(read, start))
                    if not waiting:
                        break
                    with one_line("URL", file.url):
                        data = waiting.popleft().result()
                    out.write(data)
                    digest.update(data)
                    moved(len(data))
            finally:
                threads.shutdown(wait=True, cancel_futures=True)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise disk_error(error, target, file.num_bytes) from error
        raise
    return digest.hexdigest()


def send_object(source: Path, url: str, was: str | None, moved: Moved) -> RemoteFile:
    """Send a file as an object, whole or not at all, and return the object after checking it.

    Args:
        source: The file.
        url: Its final name.
        was: The tag of the version that is replaced, None if nothing is there, or ``ANY``.
        moved: Told how much has gone.

    Raises:
        ObjectChangedError: If another version is there than was known.
        DataError: If the store refuses, cannot be reached, or has something else than was sent.
    """
    with one_line("URL", url):
        known = find_objects(url).get("")
        _require(known, was)
        sent = retry(url, lambda fs, path: _send(fs, path, source, was, moved))
        there = find_objects(url).get("")
    size = source.stat().st_size
    if there is None or there.num_bytes != size or (sent and there.tag != sent):
        found = "nothing" if there is None else f"{there.num_bytes:,} bytes, {there.tag}"
        raise DataError(
            "URL", expected=f"the {size:,} bytes that were sent {sent}".rstrip(), found=found,
            where=url, hint="Run the same command again",
        )  # fmt: skip
    return there


def remove_object(url: str) -> None:
    """Remove an object, if it is there.

    Raises:
        DataError: If the store refuses or cannot be reached.
    """

    def remove(fs: Any, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(path)
        fs.invalidate_cache()

    with one_line("URL", url):
        retry(url, remove)


def check_writable(url: str) -> None:
    """Refuse, before any work is done, a place that takes no objects; nothing becomes visible.

    Raises:
        DataError: If the store refuses or cannot be reached.
    """

    def try_it(fs: Any, path: str) -> None:
        if hasattr(fs, "call_s3"):
            bucket, key, _ = fs.split_path(path)
            place = {"Bucket": bucket, "Key": key}
            begun = fs.call_s3("create_multipart_upload", **place)
            fs.call_s3("abort_multipart_upload", UploadId=begun["UploadId"], **place)
        else:
            trial = f"{path}.{secrets.token_hex(4)}.tmp"
            fs.makedirs(fs._parent(path), exist_ok=True)
            fs.pipe_file(trial, b"")
            fs.rm_file(trial)

    with one_line("URL", url):
        retry(url, try_it)


def _require(known: RemoteFile | None, was: str | None) -> None:
    tag = None if known is None else known.tag
    if was not in {ANY, tag}:
        raise ObjectChangedError(CHANGED)


def _send(fs: Any, path: str, source: Path, was: str | None, moved: Moved) -> str:
    """Send a file; return the tag that it must have then, "" where that cannot be told."""
    if hasattr(fs, "call_s3"):
        return _send_to_s3(fs, path, source, was, moved)
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else {*fs.protocol}
    status = source.stat()  # the same file, sent again after a kill, gets the same name
    told = f"{source} {status.st_size} {status.st_mtime_ns}".encode()
    token = hashlib.blake2b(told, digest_size=4).hexdigest()
    temporary = path if protocols & WHOLE_PUTS else f"{path}.{token}.tmp"
    try:
        if temporary != path:
            fs.makedirs(fs._parent(path), exist_ok=True)
        fs.put_file(str(source), temporary)
        fs.invalidate_cache()
        if temporary != path:
            size = fs.info(temporary)["size"]
            if size != status.st_size:
                raise ConnectionError(f"{size:,} of {status.st_size:,} bytes arrived")
            known = find_objects(fs.unstrip_protocol(path)).get("")
            _require(known, was)
            fs.mv(temporary, path)
    finally:
        if temporary != path:
            with contextlib.suppress(OSError, ValueError):
                fs.rm_file(temporary)
    moved(status.st_size)
    return ""


def _send_to_s3(fs: Any, path: str, source: Path, was: str | None, moved: Moved) -> str:
    """Put a file in one piece, or of more than 16 MiB in parts, which appear together at the end.

    An ETag of AWS is the MD5 of what was sent, or that of the parts' MD5s and their number; with
    keys of KMS it is neither.
    """
    bucket, key, _ = fs.split_path(path)
    place = {"Bucket": bucket, "Key": key}
    condition: dict[str, str] = {}
    if was is None:
        condition = {"IfNoneMatch": "*"}
    elif was.startswith('"'):
        condition = {"IfMatch": was}
    size = source.stat().st_size
    if size <= _PART_BYTES:
        data = source.read_bytes()
        tag = f'"{_md5(data).hex()}"'
        answer = _put(fs, "put_object", url_tag=tag, Body=data, **place, **condition)
        moved(size)
    else:
        tag, answer = _put_parts(fs, place, condition, source, moved)
    is_hash = answer.get("ServerSideEncryption") in {None, "", "AES256"}
    return tag if is_hash else str(answer.get("ETag", ""))


def _put_parts(
    fs: Any, place: dict[str, str], condition: dict[str, str], source: Path, moved: Moved
) -> tuple[str, dict[str, Any]]:
    size = source.stat().st_size
    part_bytes = max(_PART_BYTES, math.ceil(size / 9000))
    upload = {**place, "UploadId": fs.call_s3("create_multipart_upload", **place)["UploadId"]}

    def put_part(number: int) -> tuple[str, bytes]:
        with source.open("rb") as file:
            file.seek(number * part_bytes)
            data = file.read(part_bytes)
        answer = retry(
            f"s3://{place['Bucket']}/{place['Key']}",
            lambda again, _: again.call_s3(
                "upload_part", PartNumber=number + 1, Body=data, **upload
            ),
        )
        moved(len(data))
        return answer["ETag"], _md5(data)

    try:
        with ThreadPoolExecutor(NUM_AT_ONCE) as threads:
            parts = list(threads.map(put_part, range(math.ceil(size / part_bytes))))
        tag = f'"{_md5(b"".join(digest for _, digest in parts)).hex()}-{len(parts)}"'
        listed = [{"PartNumber": n, "ETag": etag} for n, (etag, _) in enumerate(parts, 1)]
        answer = _put(
            fs, "complete_multipart_upload", url_tag=tag, MultipartUpload={"Parts": listed},
            **upload, **condition,
        )  # fmt: skip
    except BaseException:
        with contextlib.suppress(Exception):
            fs.call_s3("abort_multipart_upload", **upload)
        raise
    return tag, answer


def _put(fs: Any, method: str, *, url_tag: str, **how: Any) -> dict[str, Any]:
    """Call a put of S3; one whose answer was lost, and is refused when tried again, has worked."""
    try:
        return dict(fs.call_s3(method, **how))
    except OSError as error:
        if not isinstance(lasting(error), ValueError):  # If-Match or If-None-Match did not hold
            raise
        fs.invalidate_cache()
        path = f"{how['Bucket']}/{how['Key']}"
        if fs.exists(path) and fs.info(path).get("ETag") == url_tag:
            return {"ETag": url_tag}
        raise ObjectChangedError(CHANGED) from error


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()
