"""Labels of images in tars: small files beside them, of the same path up to the first dot.

``0001.jpg`` may have ``0001.cls``, ``0001.json`` or ``0001.txt`` beside it, as WebDataset and
img2dataset write them.

Reads: such files, by the function that it is given. Writes: nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from featcache.data.blobs import ReadAt
from featcache.data.folders import OTHER_ENDING, Ignored
from featcache.data.listing import Listing
from featcache.data.tar import TarEntry
from featcache.errors import DataError, printable
from featcache.untrusted import parse_json_object

_JSON_KEYS = ("cls", "label", "class")  # of a class, the first that any image has
_MAX_LABEL_BYTES = 1 << 20
_MAX_CAPTION = 64  # a longer text is no class
_BAD_JSON = "JSON that cannot be read"
_CAPTION = "\n"  # in place of a text that is no class
_Beside = Mapping[str, Mapping[str, TarEntry]]


class TarLabels:
    """What the files beside images say of them, in all tars of a data set.

    Args:
        root: The tar, or the folder of tars; for messages.
        listing: Which of them are labels: ``columns`` name an ending or a key of the JSON.
        ignored: What is not used; updated.

    Attributes:
        columns: Column -> an ending, or a key of the JSON.
        of_images: Of each image in the order in which they were read, ending or ``json KEY`` ->
            text. Equal ones are one object: a million dicts take a quarter of a gigabyte.
        are_beside: Whether any image has a file beside it.
    """

    def __init__(self, root: Path, listing: Listing, ignored: Ignored) -> None:
        self.columns = dict(listing.columns)
        self.of_images: list[Mapping[str, str]] = []
        self.are_beside = False
        self._root, self._listing, self._ignored = root, listing, ignored
        self._num_beside: Counter[str] = Counter()
        self._known: dict[tuple[tuple[str, str], ...], Mapping[str, str]] = {(): {}}

    def read_tar(
        self, read: ReadAt, images: Sequence[str], others: Sequence[TarEntry], where: str
    ) -> None:
        """Read the labels of the images of one tar.

        Args:
            read: Reads a stretch of it.
            images: Their paths.
            others: Its members that are no images and no folders.
            where: Its name, for messages.
        """
        if not others:
            self.of_images += [self._known[()]] * len(images)
            return
        keys = set(map(_key, images))
        beside: dict[str, dict[str, TarEntry]] = {}
        for entry in others:
            is_small = entry.kind == "file" and entry.num_bytes <= _MAX_LABEL_BYTES
            if is_small and (key := _key(entry.path)) in keys:
                beside.setdefault(key, {})[_ending(entry.path)] = entry
        self.are_beside |= bool(beside)
        wanted = self._wanted_endings(beside)
        for entry in others:
            ending = _ending(entry.path)
            if ending in wanted and _key(entry.path) in keys:
                self._num_beside[ending] += 1  # whether it is used is not known yet
            else:
                self._ignored.add(OTHER_ENDING, entry.path)
        self.of_images += [
            self._read(read, beside.get(_key(path), {}), wanted, where) for path in images
        ]

    def _wanted_endings(self, beside: _Beside) -> set[str]:
        """Return the endings of files beside images that have to be read."""
        endings = {ending for files in beside.values() for ending in files}
        given = {value.removeprefix(".").lower() for value in self.columns.values()}
        wanted = given & endings
        if len(wanted) < len(self.columns):  # keys of the JSON
            wanted |= {"json"} & endings
        if "target" in self.columns or self._listing.no_classes:
            return wanted
        if "cls" in endings:
            return wanted | {"cls"}
        return wanted | ({"json", "txt"} & endings)

    def _read(
        self, read: ReadAt, files: Mapping[str, TarEntry], wanted: set[str], where: str
    ) -> Mapping[str, str]:
        """Return what the files beside an image say: ending, or ``json KEY`` -> text."""
        found: dict[str, str] = {}
        given = self.columns.values()
        for ending in sorted(wanted & files.keys()):
            data = read(files[ending].offset, files[ending].num_bytes)
            if ending == "json":
                try:
                    facts = parse_json_object(data)
                except ValueError:
                    self._ignored[_BAD_JSON] += 1
                    continue
                keys = given if "target" in self.columns else (*_JSON_KEYS, *given)
                for key in keys:
                    inside = f"{where}: {printable(files[ending].path)}"
                    if (text := _label_text(facts.get(key), inside)) is not None:
                        found[f"json {key}"] = text
            else:
                text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff").strip()
                is_caption = ending == "txt" and (len(text) > _MAX_CAPTION or "\n" in text)
                found[ending] = _CAPTION if is_caption and "txt" not in given else text
        return self._known.setdefault(tuple(found.items()), found)

    def find_sources(self) -> dict[str, str]:
        """Return column -> what has it: an ending, or ``json KEY``; ``target`` is the class.

        Raises:
            DataError: If ``--columns`` names what no image has.
        """
        present = {source for labels in self._known.values() for source in labels}
        found = {key: _source(name, present) for key, name in self.columns.items()}
        for key, name in self.columns.items():
            if found[key] not in present:
                raise DataError(
                    f"--columns {key}", found=f"{name!r} beside none", where=self._root,
                    expected="an ending, or a key of the JSON, of files beside images",
                )  # fmt: skip
        if self._listing.no_classes:
            found.pop("target", None)
        elif "target" not in found and (source := self._find_classes(present)):
            found["target"] = source
        used = {source.partition(" ")[0] for source in found.values()}
        for ending in sorted(self._num_beside.keys() - used):
            for _ in range(self._num_beside[ending]):
                self._ignored.add(OTHER_ENDING, f".{ending}" if "." in ending else f"_.{ending}")
        return found

    def _find_classes(self, present: Collection[str]) -> str:
        for source in ("cls", *(f"json {key}" for key in _JSON_KEYS)):
            if source in present:
                return source
        texts = [labels["txt"] for labels in self.of_images if "txt" in labels]
        is_classes = texts and _CAPTION not in texts and 2 * len(set(texts)) <= len(texts)
        return "txt" if is_classes else ""


def _key(path: str) -> str:
    """Return the path of a file up to the first dot of its name: WebDataset's key."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _ending(path: str) -> str:
    """Return what follows the key and its dot, in small letters."""
    return path.rpartition("/")[2].partition(".")[2].lower()


def _label_text(value: object, where: str) -> str | None:
    """Return a label of a JSON as text; None if there is none.

    Raises:
        DataError: If it is no text and no whole number.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise DataError(
        "label in JSON", expected="a text or a whole number", found=f"{value!r:.60}",
        where=where, hint="Say which key has the class: --columns target=KEY",
    )  # fmt: skip


def _source(name: str, present: Collection[str]) -> str:
    ending = name.removeprefix(".").lower()
    return ending if ending in present else f"json {name}"
