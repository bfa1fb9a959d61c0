"""Which files of a data set are listed, and what the columns of a CSV mean: options, kept together.

A cache keeps those that were given in its provenance, so that a later ``extract`` of it and
``verify --data`` list the same images.

Reads: nothing. Writes: nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from featcache.errors import ConfigError, printable, warn_user

COLUMNS = ("path", "target", "split", "group")
"""The columns of a CSV of images."""
_KEYS = (*COLUMNS, "image")  # of Parquet, the bytes


@dataclass(frozen=True)
class Listing:
    """Options of everything that lists images.

    Args:
        include: Globs; if there are any, only files that match one are taken.
        exclude: Globs; files that match one are left out.
        companions: ``keep`` takes masks and the like as images, in the group of their image;
            ``ignore`` does not look for them; None asks (see ``companions``).
        no_classes: Folders are no classes; images are unlabelled.
        columns: Column (of ``COLUMNS``) -> header of a CSV.
        ignore_columns: Headers of a CSV that are not used.
        target_columns: Headers of a CSV that are a label each (see ``labels``).
        target_separator: What stands between the labels in the cells of the column target.
        uncertain: What -1 means in them: ``unknown`` (so does None), ``yes`` or ``no``.
        blank: What an empty cell means in them: ``unknown`` or ``no``; None asks.
        split_list: (split, file with the names of its rows, one a line) of a CSV.

    Raises:
        ConfigError: If a value is invalid, or two contradict each other.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    companions: str | None = None
    no_classes: bool = False
    columns: tuple[tuple[str, str], ...] = ()
    ignore_columns: tuple[str, ...] = ()
    target_columns: tuple[str, ...] = ()
    target_separator: str | None = None
    uncertain: str | None = None
    blank: str | None = None
    split_list: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(
        cls, *, include: str | Iterable[str] = (), exclude: str | Iterable[str] = (),
        companions: str | None = None, no_classes: bool = False,
        columns: Mapping[str, str] | Iterable[tuple[str, str]] | None = None,
        ignore_columns: str | Iterable[str] = (), target_columns: str | Iterable[str] = (),
        target_separator: str | None = None, uncertain: str | None = None, blank: str | None = None,
        split_list: Mapping[str, str | Path] | None = None,
    ) -> Listing:  # fmt: skip
        """Return the options, from what a caller may give for them."""
        if companions not in {None, "keep", "ignore"}:
            raise ConfigError("--companions", expected="keep", found=companions)
        pairs = tuple(sorted(dict(columns or {}).items()))
        unknown = [key for key, _ in pairs if key not in _KEYS]
        if unknown or len({header for _, header in pairs}) < len(pairs):
            raise ConfigError(
                "--columns",
                expected="KEY=HEADER, KEY being path, target, split, group or image",
                found=", ".join("=".join(pair) for pair in pairs),
            )  # fmt: skip
        lists = tuple(sorted((key, str(file)) for key, file in (split_list or {}).items()))
        listing = cls(
            _as_tuple(include), _as_tuple(exclude), companions, bool(no_classes), pairs,
            _as_tuple(ignore_columns), _as_tuple(target_columns), target_separator or None,
            uncertain, blank, lists,
        )  # fmt: skip
        listing._check_labels()
        return listing

    @property
    def has_labels(self) -> bool:
        """Whether images have several labels each."""
        return bool(self.target_columns or self.target_separator)

    def _check_labels(self) -> None:
        for option, value, words in (
            ("--uncertain", self.uncertain, ("unknown", "yes", "no")),
            ("--blank", self.blank, ("unknown", "no")),
        ):
            if value is not None and value not in words:
                raise ConfigError(option, expected=" or ".join(words), found=value)
        named = dict(self.columns)
        clash = {*self.target_columns} & {*named.values(), *self.ignore_columns}
        if len(set(self.target_columns)) < len(self.target_columns) or clash:
            raise ConfigError(
                "--target-columns", expected="headers, once each and not used otherwise",
                found=", ".join(sorted(clash)) or ", ".join(self.target_columns),
            )  # fmt: skip
        for option, is_given, other in (
            ("--target-separator", self.target_separator and self.target_columns,
             "--target-columns"),
            ("--target-columns", self.target_columns and "target" in named, "--columns target="),
            ("--no-classes", self.has_labels and self.no_classes, "columns of labels"),
        ):  # fmt: skip
            if is_given:
                raise ConfigError(option, expected=f"it, or {other}", found="both")
        if not {key for key, _ in self.split_list} <= {"train", "valid", "test"}:
            raise ConfigError(
                "--split-list", expected="SPLIT=FILE, SPLIT being train, valid or test",
                found=", ".join("=".join(pair) for pair in self.split_list),
            )  # fmt: skip

    def check_labels_named(self) -> None:
        """Refuse options of labels where none are named: also none that a cache remembers.

        Raises:
            ConfigError: If that is so.
        """
        if self.uncertain and not self.target_columns:
            raise ConfigError("--uncertain", expected="--target-columns", found="none")
        if self.blank and not self.has_labels:
            expected = "--target-columns or --target-separator"
            raise ConfigError("--blank", expected=expected, found="neither")

    @classmethod
    def from_json(cls, stored: Any, where: Path) -> Listing:
        """Return what ``as_json`` made; ``stored`` comes from a file and is not trusted.

        Raises:
            ConfigError: If it is something else.
        """
        kinds: dict[str, Any] = {
            "companions": str, "no_classes": bool, "columns": dict, "target_separator": str,
            "uncertain": str, "blank": str, "split_list": dict,
        }  # fmt: skip
        try:
            if not all(
                isinstance(value, kinds.get(key, list))
                and all(isinstance(v, str) for v in (value if isinstance(value, list) else []))
                for key, value in stored.items()
            ):
                raise TypeError
            return cls.of(**stored)
        except (AttributeError, TypeError, ConfigError) as error:
            raise ConfigError(
                "listing options in the cache", expected="those of this version",
                found=f"{stored!r:.80}", where=where, hint="Extract it again with --rebuild",
            ) from error  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Return the options that were given, as JSON values; they are also keywords of ``scan``.

        ``companions`` is left out where it is ``ignore``: that is no answer of a user's.
        """
        given: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value and value != "ignore":
                given[entry.name] = list(value) if isinstance(value, tuple) else value
        pairs = {"columns": dict(self.columns), "split_list": dict(self.split_list)}
        return given | {name: value for name, value in pairs.items() if value}

    def over(self, stored: Listing) -> Listing:
        """Return these options, and where one is not given the stored one.

        Of classes and labels, what is given now stands for what was read in another way.
        """
        names_class = "target" in dict(self.columns) and not self.target_separator
        if self.no_classes or (names_class and stored.target_columns):
            stored = replace(
                stored, target_columns=(), target_separator=None, uncertain=None, blank=None
            )
        elif self.target_columns:
            columns = tuple(pair for pair in stored.columns if pair[0] != "target")
            ignored = tuple(n for n in stored.ignore_columns if n not in self.target_columns)
            stored = replace(
                stored, columns=columns, ignore_columns=ignored, target_separator=None,
                no_classes=False,
            )  # fmt: skip
        elif self.target_separator:
            stored = replace(stored, target_columns=(), uncertain=None, no_classes=False)
        return Listing.of(**(stored.as_json() | self.as_json()))

    def for_endings(self, endings: Collection[str]) -> Listing:
        """Return these options without those that the data has no use for.

        A CSV has use for all, tars and Parquet files for ``columns`` and ``ignore_columns``.

        Args:
            endings: Of the data: see ``sources.endings_of``.
        """
        if ".csv" in endings:
            return self
        left = replace(
            self, target_columns=(), target_separator=None, uncertain=None, blank=None,
            split_list=(),
        )  # fmt: skip
        if not _WITH_COLUMNS.isdisjoint(endings):
            return left
        return replace(left, columns=(), ignore_columns=())

    def choose(self, paths: Sequence[str], root: object) -> list[str]:
        """Return why each path is left out: ``--include``, ``--exclude``, or "" for one taken.

        Warns of a glob that matches none of the paths.
        """
        if not (self.include or self.exclude):
            return [""] * len(paths)
        left_out = [""] * len(paths)
        if self.include:
            taken = _match_any("--include", self.include, paths, root)
            left_out = ["" if is_taken else "--include" for is_taken in taken]
        excluded = _match_any("--exclude", self.exclude, paths, root)
        return [
            reason or ("--exclude" if is_excluded else "")
            for reason, is_excluded in zip(left_out, excluded, strict=True)
        ]


_WITH_COLUMNS = {".tar", ".parquet", ".pq"}


def _as_tuple(texts: str | Iterable[str]) -> tuple[str, ...]:
    return (texts,) if isinstance(texts, str) else tuple(texts)


def _match_any(option: str, globs: Sequence[str], paths: Sequence[str], root: object) -> list[bool]:
    matched = [False] * len(paths)
    for glob in globs:
        pattern, any_match = compile_glob(glob, option), False
        for position, path in enumerate(paths):
            if pattern.fullmatch(path):
                matched[position] = any_match = True
        if paths and not any_match:
            advice = "" if glob.startswith("**/") else f"; '**/{glob}' matches in every folder"
            warn_user(printable(f"{option} '{glob}' matches nothing in {printable(root)}{advice}"))
    return matched


def compile_glob(glob: str, option: str = "--exclude") -> re.Pattern[str]:
    """Return a pattern for ``fullmatch`` with a path below DATA, ``/``-separated.

    ``*`` and ``?`` do not cross ``/``, ``**`` does, and ``**/`` also stands for no folder at all. A
    glob that matches a folder matches everything in it. ``[ab]`` and ``[!ab]`` are one character.

    Raises:
        ConfigError: If the glob is empty, or begins with ``/`` or leads up.
    """
    parts = [part for part in glob.replace(os.sep, "/").split("/") if part != "."]
    while parts and not parts[-1]:
        parts.pop()
    if not parts or not parts[0] or ".." in parts:
        raise ConfigError(option, expected="a glob on the path below DATA", found=repr(glob))
    try:
        return re.compile(f"{_translate(parts)}(?:/.*)?", re.DOTALL)
    except re.error as error:  # [z-a]
        raise ConfigError(option, expected="a glob", found=f"{glob!r}: {error}") from error


# Atomic groups, (?>...), as in fnmatch.translate: the first place where the next fixed part fits
# is as good as any other. Without them "*a*a*a*a*" takes hours, and a stranger's cache may name it.


def _translate(parts: Sequence[str]) -> str:
    """Return the parts of a glob as a regular expression."""
    runs: list[list[str]] = [[]]
    for part in parts:
        if part == "**":
            runs.append([])
        else:
            runs[-1].append(_translate_part(part))
    first, *others = runs
    if not others:
        return "/".join(first)
    text = "".join(f"{part}/" for part in first)
    for run in others[:-1]:
        if run:
            text += f"(?>(?:[^/]+/)*?{''.join(f'{part}/' for part in run)})"
    return text + (f"(?:[^/]+/)*{'/'.join(others[-1])}" if others[-1] else ".+")


def _translate_part(part: str) -> str:
    """Return a part without ``/`` as a regular expression."""
    fixed = [""]
    for piece in re.findall(r"\*+|\[!?\]?[^\]]*\]|.", part, re.DOTALL):
        if piece.startswith("*"):
            fixed.append("")
        elif piece == "?":
            fixed[-1] += "[^/]"
        elif len(piece) > 2 and piece.startswith("["):
            inside = re.sub(r"([\\\[\]^])", r"\\\1", piece[1:-1].removeprefix("!"))
            fixed[-1] += f"(?!/)[{'^' if piece[1] == '!' else ''}{inside}]"
        else:
            fixed[-1] += re.escape(piece)
    first, *others = fixed
    if not others:
        return first
    *middle, last = others
    return first + "".join(f"(?>[^/]*?{text})" for text in middle) + f"[^/]*{last}"


def escape_glob(name: str) -> str:
    """Return a glob that matches this name alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)
