"""Find masks and the like that lie among the images: files that are companions of an image.

Collections keep segmentation masks, outlines and maps beside the images, in a folder of their own
(``COVID/masks/1.png``) or by a longer name (``1_mask.png``). Taken as images they double the rows,
and the mask of a training image gets into the test split.

Two steps, and no list of words. Names raise a suspicion: folders side by side that hold the same
names, and names that are another's with a word more. Pixels of a few seeded pairs decide: a
companion has its partner's shape and few grey values, or is nearly all one colour. Folders of
patients with ``view1.jpg`` in each, ``scan_2.png`` beside ``scan.png``, and left and right views
are ordinary data, and no question is asked.

Reads: a few images, decoded by a child process: this folder knows no pixels, and a file that
crashes or hangs a decoder must not stop the listing. Writes: nothing.
"""

from __future__ import annotations

import itertools
import pickle
import random
import re
import shlex
import struct
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from featcache.data.columns import Sample, Samples
from featcache.data.folders import SPLIT_OF_FOLDER
from featcache.data.listing import compile_glob, escape_glob
from featcache.data.samples import ImageDataset
from featcache.errors import DataError
from featcache.files import child_process

_MAX_ROLES = 12  # suspicions that are looked at: those of the most pairs
_FIRST_PAIRS, _ALL_PAIRS = 3, 9  # pairs looked at of each, and of those that look like companions
_MAX_TOGETHER = 6  # more folders (or words) than this are compared with their neighbours only
_MIN_WORD_PAIRS = 3  # image_1 beside mask_1: two words in the same place, by chance quite often
_MAX_STEM = 255
_SIZE_RATIO = 1.4  # a mask compresses at least so much better than its image; usually 5 to 50 times
_UNCOMPRESSED = {".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
_MAX_LOOK_BYTES = 2**26
_LOOK_SECONDS = 60.0

_BOUNDARY = re.compile(r"[\W_]+|(?<=\d)(?=[^\W\d_])")
_LETTERS = re.compile(r"[^\W\d_]+")
_NO_DIGITS = str.maketrans("", "", "0123456789")
_DIGITS = re.compile(r"\d+")


class Look(NamedTuple):
    """What the pixels of an image are like: see ``pixels.inspection.glance``."""

    width: int
    height: int
    has_few_values: bool
    is_one_colour: bool


@dataclass(frozen=True)
class Companions:
    """Files that are companions of images.

    Args:
        pairs: (path of the image, path of its companion).
        glob: Matches the companions.
        others: Matches the images.
    """

    pairs: tuple[tuple[str, str], ...]
    glob: str
    others: str


_Role = tuple[str, str, str]
"""Kind of suspicion, and a glob for either side."""
_Couples = list[tuple[str, str]]
_Pairs = dict[_Role, _Couples]


def settle_companions(dataset: ImageDataset, *, is_kept: bool) -> ImageDataset:
    """Ask about companions of images, or put each into the group of its image.

    Raises:
        DataError: If there are some and they are not to be kept.
    """
    suspected = suspect(dataset.samples.paths)
    by_path = {sample.path: sample for sample in dataset.samples} if suspected else {}
    found = find_companions(
        suspected, lambda path: by_path[path].image_bytes, lambda path: dataset.read(by_path[path])
    )
    if not found:
        return dataset
    pairs = [pair for companions in found for pair in companions.pairs]
    if not is_kept:
        number = len({companion for _, companion in pairs})
        examples = ", ".join(f"{companion} of {image}" for image, companion in sorted(pairs)[:2])
        wanted = sorted({glob for c in found for glob in _narrow(c, by_path)})
        globs = " ".join(f"--exclude {shlex.quote(glob)}" for glob in wanted)
        raise DataError(
            "images", expected="no masks or other companions of images among them",
            found=f"{number:,} that look like some: {examples}", where=dataset.root,
            hint=f"Leave them out with {globs}, or take them as images with --companions keep",
        )  # fmt: skip
    groups = _join_groups(by_path, pairs)
    samples = Samples(
        s._replace(group=groups.get(s.path, s.group or s.path)) for s in by_path.values()
    )
    is_joined = all(s.group is None for s in by_path.values())
    return replace(dataset, samples=samples, are_groups_joined=is_joined)


def _narrow(companions: Companions, paths: Iterable[str]) -> list[str]:
    """Return globs for companions: one, or one per folder where it would match images too."""
    if companions.glob.endswith("/**"):  # all that lies in folders of masks
        return [companions.glob]
    names = {companion for _, companion in companions.pairs}
    pattern, last = compile_glob(companions.glob), companions.glob.removeprefix("**/")
    if not any(path not in names and pattern.fullmatch(path) for path in paths):
        return [companions.glob]
    folders = {name.rpartition("/")[0] for name in names}
    return [f"{escape_glob(folder)}/{last}" if folder else last for folder in sorted(folders)]


def _join_groups(by_path: Mapping[str, Sample], pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return path -> group, so that both files of a pair, and what hangs on them, have one."""
    top: dict[str, str] = {}

    def find(name: str) -> str:
        while top.setdefault(name, name) != name:
            top[name] = name = top[top[name]]
        return name

    def group_of(path: str) -> str:
        return by_path[path].group or path

    for image, companion in sorted(pairs):
        top[find(group_of(companion))] = find(group_of(image))
    return {path: find(group_of(path)) for path in by_path}


def find_companions(
    suspected: _Pairs, size_of: Callable[[str], int], read: Callable[[str], bytes]
) -> list[Companions]:
    """Return the files that are companions of others, by kind; none for ordinary data.

    Args:
        suspected: What ``suspect`` returns of the paths of all images.
        size_of: Returns the size of an image's file in bytes.
        read: Returns the bytes of an image; a ``DataError`` leaves it out.
    """
    votes: dict[_Role, list[int]] = {}
    chosen = _likeliest(suspected, size_of)
    for count, roles in ((_FIRST_PAIRS, chosen), (_ALL_PAIRS, None)):
        again = roles if roles is not None else [role for role in votes if any(votes[role])]
        samples = {role: _sample(suspected[role], count) for role in again}
        looks = _look({p for pairs in samples.values() for pair in pairs for p in pair}, read)
        for role, pairs in samples.items():
            votes[role] = [_vote(looks.get(a), looks.get(b)) for a, b in pairs]
    found = []
    for (kind, first, second), cast in votes.items():
        pairs = suspected[kind, first, second]
        if cast.count(2) * 2 > len(cast):
            found.append(Companions(tuple(pairs), second, first))
        elif cast.count(1) * 2 > len(cast):
            found.append(Companions(tuple((b, a) for a, b in pairs), first, second))
    return found


def _sample(pairs: Sequence[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    return random.Random(0).sample(sorted(pairs), min(count, len(pairs)))


def _likeliest(suspected: _Pairs, size_of: Callable[[str], int]) -> list[_Role]:
    """Return the suspicions that are worth to be looked at, by what is known of their files."""
    worth = []
    for role, pairs in suspected.items():
        # a seeded part, as there may be hundreds of thousands
        some = pairs if len(pairs) <= 64 else random.Random(0).sample(pairs, 64)
        first, second = (sum(size_of(pair[side]) for pair in some) for side in (0, 1))
        endings = {_ending(path).lower() for pair in some[:8] for path in pair}
        differ = max(first, second) >= _SIZE_RATIO * min(first, second)
        if differ or endings & _UNCOMPRESSED:
            worth.append(role)
    return sorted(worth, key=lambda role: (-len(suspected[role]), role))[:_MAX_ROLES]


def _ending(path: str) -> str:
    return "." + path.rpartition(".")[2]


def _vote(a: Look | None, b: Look | None) -> int:
    """Return 1 or 2, whichever of two looks like a companion of the other; 0 for neither."""
    if a is None or b is None:
        return 0
    same_shape = abs(a.width * b.height - b.width * a.height) <= 0.02 * a.width * b.height
    plain = [look.is_one_colour or (look.has_few_values and same_shape) for look in (a, b)]
    return 0 if plain[0] == plain[1] else 1 + plain[1]


# ------------------------------------------------------------------------------ suspicion, by names


class _Stems(NamedTuple):
    """Of a folder: name without ending -> its first path; and its other paths, which few have."""

    first: dict[str, str]
    others: dict[str, list[str]]


def suspect(paths: Iterable[str]) -> _Pairs:
    """Return pairs of files that may be an image and its companion, by what sets them apart."""
    by_folder: dict[str, _Stems] = defaultdict(lambda: _Stems({}, {}))
    for path in paths:
        folder, _, name = path.rpartition("/")
        stems, stem = by_folder[folder], name.rpartition(".")[0] or name
        if stems.first.setdefault(stem, path) is not path:
            stems.others.setdefault(stem, []).append(path)
    folders = {tuple(filter(None, name.split("/"))): stems for name, stems in by_folder.items()}
    pairs: _Pairs = defaultdict(list)
    for stems in folders.values():
        found = [_same_stems(stems)]
        if len({stem.translate(_NO_DIGITS) for stem in stems.first}) > 1:  # else numbered only
            found += [_longer_stems(stems), _other_words(stems)]
        for role, pair in itertools.chain(*found):
            pairs[role].append(pair)
    for role, both in _sibling_folders(folders):
        pairs[role] += both
    return {
        role: found for role, found in pairs.items()
        if role[0] != "words" or len(found) >= _MIN_WORD_PAIRS
    }  # fmt: skip


def _same_stems(stems: _Stems) -> Iterator[tuple[_Role, tuple[str, str]]]:
    """Yield ``1.jpg`` and ``1.png`` of one folder."""
    for stem, others in stems.others.items():
        for a, b in itertools.combinations(sorted([stems.first[stem], *others]), 2):
            first, second = ("**/*" + escape_glob(_ending(path)) for path in (a, b))
            if first != second:
                yield ("endings", first, second), (a, b)


def _longer_stems(stems: _Stems) -> Iterator[tuple[_Role, tuple[str, str]]]:
    """Yield ``1.png`` and ``1_mask.png``, or ``mask_1.png``, of one folder: a word more."""
    first = stems.first
    for stem, path in first.items():
        if len(stem) > _MAX_STEM:  # in a zip; what follows takes the square of the length
            continue
        partner, glob = "", ""
        for boundary in _BOUNDARY.finditer(stem):
            start, end = boundary.span()
            while start < end - 1 and stem[:start] not in first:  # "1)_": the bracket is its name's
                start += 1
            front, back = stem[:start], stem[end:]
            if front in first and (word := _LETTERS.search(stem, end)):
                partner, glob = front, f"**/*{_number_glob(stem[start : word.end()])}*"
            elif back in first and not partner and _LETTERS.search(stem, 0, start):
                partner, glob = back, f"**/{_number_glob(stem[:end])}*"
        if partner:
            for longer in (path, *stems.others.get(stem, ())):
                yield ("longer", "**", glob), (first[partner], longer)


def _number_glob(text: str) -> str:
    """Return a glob for a name, whatever its numbers."""
    return re.sub(r"\d+", "*", escape_glob(text))


def _other_words(stems: _Stems) -> Iterator[tuple[_Role, tuple[str, str]]]:
    """Yield ``image_1.png`` and ``mask_1.png`` of one folder: one word for another."""
    alone: dict[tuple[str, str], tuple[str, str]] = {}
    alike: dict[tuple[str, str], dict[str, str]] = {}
    for stem, path in stems.first.items():
        words = list(_LETTERS.finditer(stem)) if _DIGITS.search(stem) else []
        if len(words) > 4:  # letters of a hash
            continue
        for word in words:
            rest = stem[: word.start()], stem[word.end() :]
            other = alone.setdefault(rest, (word[0], path))
            if other[0] != word[0]:
                alike.setdefault(rest, dict([other]))[word[0]] = path
    for (front, _), by_word in alike.items():
        for (word_a, a), (word_b, b) in _couples(sorted(by_word.items())):
            start = "**/*" if front else "**/"
            first, second = (f"{start}{escape_glob(word)}*" for word in (word_a, word_b))
            yield ("words", first, second), (a, b)


_T = TypeVar("_T")


def _couples(items: list[_T]) -> Iterator[tuple[_T, _T]]:
    """Yield all pairs of a few items, or of many those of neighbours."""
    few = len(items) <= _MAX_TOGETHER
    yield from itertools.combinations(items, 2) if few else itertools.pairwise(items)


_Folder = tuple[str, ...]


def _sibling_folders(folders: Mapping[_Folder, _Stems]) -> Iterator[tuple[_Role, _Couples]]:
    """Yield files of equal names in folders that differ in one part of their path.

    Also of names that are equal but for the words that all names of a folder have
    (``masks/1_mask.png``). Folders whose names differ by numbers alone are patients, cameras, days.
    """
    alike: dict[tuple[int, _Folder], list[_Folder]] = defaultdict(list)
    for folder in folders:
        for i in range(len(folder)):
            alike[i, (*folder[:i], *folder[i + 1 :])].append(folder)
    cores: dict[_Folder, dict[str, str]] = {}
    for (i, rest), siblings in alike.items():
        beside = [rest] if rest in folders else []  # 1.png beside masks/1.png
        if len(siblings) + len(beside) < 2:
            continue
        siblings.sort()
        upper = [(top, sub) for top in beside for sub in siblings]
        for a, b in itertools.chain(_couples(siblings), upper):
            first, second = ("" if f == rest else f[i] for f in (a, b))
            if _DIGITS.sub("", first) == _DIGITS.sub("", second) or {
                first.casefold(), second.casefold()
            } <= SPLIT_OF_FOLDER.keys():  # fmt: skip
                continue
            names = [folders[a].first, folders[b].first]
            shared = names[0].keys() & names[1].keys()
            if not shared:
                for folder, plain in zip((a, b), names, strict=True):
                    if folder not in cores:
                        cores[folder] = _cores(plain)
                names = [cores[a], cores[b]]
                shared = names[0].keys() & names[1].keys()
            if shared:
                role = ("folders", _folder_glob(i, first), _folder_glob(i, second))
                both = [(names[0][stem], names[1][stem]) for stem in names[0] if stem in shared]
                yield role, both


def _folder_glob(i: int, name: str) -> str:
    if not name:
        return "*/" * i + "*"
    return "*/" * i + _number_glob(name) + "/**"


def _cores(names: dict[str, str]) -> dict[str, str]:
    """Return the names of a folder without the words that all of them begin or end with."""
    if len(names) < 2:
        return names
    front = back = min(names, key=len)
    while not all(name.startswith(front) for name in names):
        front = front[:-1]
    front = re.sub(r"\d.*", "", front)
    while not all(name.endswith(back) for name in names):
        back = back[1:]
    back = re.sub(r".*\d", "", back)
    if not front and not back:
        return names
    return {
        name[len(front) : len(name) - len(back)]: path
        for name, path in names.items()
        if len(front) + len(back) < len(name)
    }


def _look(paths: Iterable[str], read: Callable[[str], bytes]) -> dict[str, Look]:
    """Return what images look like, decoded by a child process; those that fail are left out."""
    asked, frames = [], []
    for path in sorted(paths):
        try:
            data = read(path)
        except DataError:
            continue
        if 0 < len(data) <= _MAX_LOOK_BYTES:
            request = pickle.dumps(("glance", data))
            frames.append(struct.pack("<Q", len(request)) + request)
            asked.append(path)
    if not asked:
        return {}
    command, environment = child_process("featcache.pixels.isolation")
    try:
        answers = subprocess.run(
            command, env=environment, input=b"".join(frames), stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, timeout=_LOOK_SECONDS, check=False,
        ).stdout  # fmt: skip
    except subprocess.TimeoutExpired as late:
        answers = late.stdout or b""
    looks: dict[str, Look] = {}
    for path in asked:  # in their order; a decoder that died leaves the rest out
        size = int.from_bytes(answers[:8], "little")
        if len(answers) < 8 + size or size == 0:
            break
        answer = pickle.loads(answers[8 : 8 + size])
        answers = answers[8 + size :]
        if isinstance(answer, tuple):
            looks[path] = Look(*answer)
    return looks
