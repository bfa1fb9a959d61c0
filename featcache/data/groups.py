"""Name the group of an image (a patient, say) by a regular expression on its path.

Reads: nothing. Writes: nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from featcache.data.folders import SPLIT_OF_FOLDER
from featcache.errors import ConfigError, warn_user
from featcache.formatting import FEW, join_few
from featcache.runtime import Say


@dataclass(frozen=True)
class GroupPattern:
    """A regular expression whose first group is the group of an image.

    Args:
        pattern: The regular expression.
        option: ``--group-by``: it is searched in file names, or, if it matches none of them, in
            the paths below the class. ``--group-by-path``: always in the paths below the class.
    """

    pattern: re.Pattern[str]
    option: str

    @classmethod
    def of(cls, group_by: str | None, group_by_path: str | None) -> GroupPattern | None:
        """Return the pattern of the option that was given; None for neither.

        Raises:
            ConfigError: If both are given, or it is not a regular expression with a group.
        """
        if group_by is not None and group_by_path is not None:
            raise ConfigError(
                "--group-by", expected="it or --group-by-path, not both",
                found=f"{group_by!r} and {group_by_path!r}",
            )  # fmt: skip
        if group_by is None and group_by_path is None:
            return None
        option, text = "--group-by", group_by
        if text is None:
            option, text = "--group-by-path", str(group_by_path)
        try:
            pattern = re.compile(text)
        except re.error as error:
            found = f"{text!r}: {error}"
            raise ConfigError(option, expected="a regular expression", found=found) from error
        if pattern.groups < 1:
            example = r"'^(\d{8})_'" if option == "--group-by" else r"'^(patient\d+)/'"
            raise ConfigError(
                option, expected="a regular expression with a group in parentheses",
                found=repr(text), hint=f"For example {example}",
            )  # fmt: skip
        return cls(pattern, option)

    def find(self, paths: Sequence[str], classes: Sequence[str]) -> list[str | None]:
        """Return the group of each image; None where there is no match, or it is empty.

        Args:
            paths: ``/``-separated.
            classes: Name of each image's class; "" if it has none. The path below the class is
                the path without leading folders of a split or of that name.
        """
        found: list[str | None] = []
        if self.option == "--group-by":
            found = [self._search(path.rpartition("/")[2]) for path in paths]
        if not any(found):
            found = [
                self._search(_below_class(path, name))
                for path, name in zip(paths, classes, strict=True)
            ]
        return found

    def _search(self, text: str) -> str | None:
        match = self.pattern.search(text)
        return (match[1] or None) if match else None

    def count_matches(
        self, found: Iterable[str | None], classes: Sequence[str], num_groups: int, say: Say
    ) -> dict[str, int]:
        """Return class -> number of images with a group; say it, and warn of classes without any.

        Args:
            found: The group of each image, None where there is no match.
            classes: Name of each image's class.
            num_groups: Number of groups, those of one image without a match included.
            say: Called with the line.
        """
        total = Counter(classes)
        matched = dict.fromkeys(sorted(total), 0)
        for group, name in zip(found, classes, strict=True):
            matched[name] += group is not None
        say_matches(matched, total, num_groups, self.option, say)
        return matched


def say_matches(
    matched: Mapping[str, int], total: Mapping[str, int], num_groups: int, option: str, say: Say
) -> None:
    """Say in how many images of each class a group was found; warn of classes without any.

    Args:
        matched: Class -> images with a group.
        total: Class -> images, of the same classes.
        num_groups: Number of groups, those of one image without a match included.
        option: ``--group-by`` or ``--group-by-path``.
        say: Called with the line.
    """
    names = sorted(matched)
    if len(names) > FEW:  # the first few are printed: those where least was found
        names.sort(key=lambda name: matched[name] / total[name])
    listed = join_few(f"{matched[name]:,} of {total[name]:,} {name}" for name in names)
    is_all = sum(matched.values()) == sum(total.values())
    others = "" if is_all else " (each of the others is a group of its own)"
    say(f"groups: {num_groups:,}; named in {listed}{others}")
    without = [name for name in names if matched[name] == 0]
    if without:
        searched = "file name" if option == "--group-by" else "path"
        warn_user(
            f"{option} matches no {searched} of {join_few(without)}: images of one patient may be "
            "in two splits there"
        )


def _below_class(path: str, class_name: str) -> str:
    parts = path.split("/")
    while len(parts) > 1 and (parts[0].casefold() in SPLIT_OF_FOLDER or parts[0] == class_name):
        del parts[0]
    return "/".join(parts)
