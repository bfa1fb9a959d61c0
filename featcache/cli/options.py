"""Option types, options that several commands share, and printing: facts as JSON or as lines."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from featcache import progress
from featcache.cli.ending import ENDING, Command
from featcache.errors import escaped
from featcache.untrusted import MAX_PIXELS

_F = TypeVar("_F", bound=Callable[..., Any])


class OrWord(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A number, or one of some words: ``auto|N``."""

    def __init__(self, kind: type[int], *words: str) -> None:
        self._kind, self._words = kind, words
        self.name = "|".join([*words, "N"])

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        """Return the word or the number, or fail as click wants it."""
        if value in self._words or isinstance(value, int):
            return value  # type: ignore[no-any-return]
        try:
            return self._kind(value)
        except ValueError:
            return self.fail(f"{value!r} is neither a whole number nor {self._words}", param, ctx)


class Sizes(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """``auto``, a number, or several separated by commas."""

    name = "auto|N[,N]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | int | tuple[int, ...]:
        """Return the word, the number or the numbers, or fail as click wants it."""
        if value == "auto" or not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        try:
            numbers = tuple(int(part) for part in value.split(","))
        except ValueError:
            return self.fail(f"{value!r} is not of the form {self.name}", param, ctx)
        return numbers if len(numbers) > 1 else numbers[0]


class Numbers(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Comma-separated numbers: ``0.7,0.15,0.15``."""

    def __init__(self, kind: type[int] | type[float], name: str, *, none: bool = False) -> None:
        self._kind, self.name, self._none = kind, name, none

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int | float, ...]:
        """Return the numbers, or fail as click wants it."""
        if not isinstance(value, str):
            return tuple(value)
        if self._none and value == "none":
            return ()
        try:
            return tuple(self._kind(part) for part in value.split(","))
        except ValueError:
            return self.fail(f"{value!r} is not of the form {self.name}", param, ctx)


class Renaming(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Two names: ``OLD=NEW``."""

    def __init__(self, name: str = "OLD=NEW") -> None:
        self.name = name

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """Return both names, or fail as click wants it."""
        old, sign, new = value.partition("=")
        return (
            (old, new)
            if sign
            else self.fail(f"{value!r} is not of the form {self.name}", param, ctx)
        )


AUTO_OR_NUMBER = OrWord(int, "auto")


def one_or_all(
    ctx: click.Context, param: click.Parameter, values: tuple[Any, ...]
) -> Any:  # fmt: skip
    """Return the values of an option that may be repeated: one alone as it is, none as None."""
    return values if len(values) > 1 else next(iter(values), None)


TRUST_EACH = click.option(
    "--backbone", metavar="NAME", multiple=True, callback=one_or_all,
    help="Only for python:... backbones: naming it says that you trust its code. May be repeated.",
)  # fmt: skip
WEIGHTS_EACH = click.option(
    "--weights", metavar="FILE|random", multiple=True, callback=one_or_all,
    help="Backbone weights; default: the library's pretrained. Of a run of several caches, for all "
    "of them or once for each.",
)  # fmt: skip
TRUST = click.option(
    "--backbone",
    metavar="NAME",
    help="Only for python:... backbones: naming it says that you trust its code.",
)


def _require_caches(
    ctx: click.Context, param: click.Parameter, caches: tuple[Path, ...]
) -> tuple[Path, ...]:
    """Return the caches; of one name alone, it is the argument behind them that is missing."""
    if not caches:
        last = [p.name for p in ctx.command.params if isinstance(p, click.Argument)][-1]
        hint = f"'{str(last).upper()}'"
        raise click.MissingParameter(ctx=ctx, param_hint=hint, param_type="argument")
    return caches


CACHES = click.argument(
    "caches", metavar="CACHE...", nargs=-1, type=click.Path(path_type=Path),
    callback=_require_caches,
)  # fmt: skip
LARGEST = click.option(
    "--max-pixels", type=click.IntRange(min=1), default=MAX_PIXELS, show_default=True, metavar="N",
    help="Refuse larger images, unread.",
)  # fmt: skip
DEVICE = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:i]|mps",
    help="Where to compute.",
)  # fmt: skip
WEIGHTS = click.option(
    "--weights", metavar="FILE|random", help="Backbone weights; default: the library's pretrained."
)


def listing(command: _F) -> _F:
    """Add the options of commands that list images, --include to --ignore-columns."""
    command = csv_columns(command)
    for option in (
        click.option(
            "--no-classes", is_flag=True, help="Folders are no classes: images are unlabelled."
        ),
        click.option(
            "--companions", type=click.Choice(["keep"]),
            help="Take masks and the like among the images as images, each with its image.",
        ),
        click.option(
            "--include", metavar="GLOB", multiple=True,
            help="Use only files that match it, or another --include.",
        ),
        click.option(
            "--exclude", metavar="GLOB", multiple=True,
            help="Leave files out, by their path in the folder: '*/masks/**', '**/*_mask*'. "
            "* does not cross /, ** does. May be repeated.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def labelling(command: _F) -> _F:
    """Add the options of several labels per image, --target-columns to --blank."""
    for option in (
        click.option(
            "--blank", type=click.Choice(["unknown", "no"]),
            help="What an empty cell of a label means. Asked for where there are some.",
        ),
        click.option(
            "--uncertain", type=click.Choice(["unknown", "yes", "no"]), show_default="unknown",
            help="What a -1 in --target-columns means.",
        ),
        click.option(
            "--target-separator", metavar="MARK",
            help="What stands between several labels in the cells of target: '|'.",
        ),
        click.option(
            "--target-columns", metavar="A,B,...", callback=_split_names,
            help="Columns of a CSV that are a label each, of 1, 0, -1 and empty cells. Where No "
            "Finding is 1, empty cells mean no; it is no class.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def csv_columns(command: _F) -> _F:
    """Add --columns and --ignore-columns, for commands that read tables of images."""
    command = click.option(
        "--ignore-columns",
        metavar="A,B",
        callback=_split_names,
        help="Headers of a CSV or Parquet file that are not used.",
    )(command)
    text = (
        "Which header of a CSV is path, target, split or group; in Parquet also image; in tars a "
        "key of the JSON, or an ending as txt, beside images. May be repeated."
    )
    return _columns(text)(command)


def path_column(command: _F) -> _F:
    """Add --columns for a command that reads the path and one column more."""
    return _columns("path=HEADER where the table's paths have another header.")(command)


def _columns(text: str) -> Callable[[_F], _F]:
    return click.option(
        "--columns", type=Renaming("KEY=HEADER"), multiple=True,
        callback=lambda _, __, pairs: dict(pairs), help=text,
    )  # fmt: skip


def _split_names(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[str, ...]:  # fmt: skip
    return tuple(name.strip() for name in value.split(",")) if value else ()


def grouping(command: _F) -> _F:
    """Add --group-by and --group-by-path."""
    for option in (
        click.option(
            "--group-by-path", metavar="REGEX",
            help="The same for the path below the class, where patients are folders.",
        ),
        click.option(
            "--group-by", metavar="REGEX",
            help="What its first group matches in a file name (say, the patient) is kept together.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


GROUP_SALT = click.option(
    "--group-salt", metavar="FILE", type=click.Path(path_type=Path),
    help="Salt of hashed IDs and paths; made if it is not there. Default: beside the cache.",
)  # fmt: skip


def patients(command: _F) -> _F:
    """Add --group-salt and --patient-ids, of commands that group DICOM files by patient."""
    command = click.option(
        "--patient-ids", type=click.Choice(["keep", "ignore"]),
        help="DICOM: what an ID on more than a fifth of the images is, a patient or no ID.",
    )(command)  # fmt: skip
    return GROUP_SALT(command)


def head_options(command: _F) -> _F:
    """Add the options that decide a head and its training, --hidden to --label-smoothing."""
    for option in (
        click.option("--label-smoothing", type=float, default=0.0, show_default=True),
        click.option(
            "--class-weights", type=click.Choice(["none", "balanced"]), default="none",
            show_default=True,
            help="balanced: rare classes (with several labels an image, rare labels) count more.",
        ),
        click.option(
            "--patience", type=click.IntRange(min=1),
            help="Stop after N epochs without a lower validation loss.",
        ),
        click.option("--epochs", type=click.IntRange(min=1), default=10, show_default=True),
        click.option("--batch-size", type=AUTO_OR_NUMBER, default="auto", show_default=True),
        click.option(
            "--warmup", type=click.IntRange(min=0), default=0, show_default=True,
            help="Epochs in which the learning rate rises from 0.",
        ),
        click.option(
            "--schedule", type=click.Choice(["constant", "cosine"]), default="constant",
            show_default=True,
        ),
        # heads.config has this list too, but to import it would import NumPy before every --help.
        click.option(
            "--optimizer", type=click.Choice(["adam", "adamw", "sgd", "lbfgs"]), default="adam",
            show_default=True,
            help="lbfgs, with --hidden none, solves for a path of regularisation strengths.",
        ),
        click.option(
            "--weight-decay", type=float, default=0.0, show_default=True,
            help="With lbfgs: this one strength of regularisation.",
        ),
        click.option("--learning-rate", type=float, default=5e-4, show_default=True),
        click.option("--dropout", type=float, default=0.4, show_default=True),
        click.option(
            "--hidden", type=Numbers(int, "N,N|none", none=True), default="512,128",
            show_default=True, help="Widths of the hidden layers, or none.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def head_seeds(command: _F) -> _F:
    """Add --seed and --data-seed."""
    for option in (
        click.option(
            "--data-seed", type=int, help="Seed of the order of the rows; default: --seed."
        ),
        click.option(
            "--seed", type=int, default=0, show_default=True,
            help="Seed of initial weights and dropout.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def printing(command: _F) -> _F:
    """Add --json and --quiet: facts as one JSON object, or no lines at all."""
    command = click.option("--quiet", is_flag=True, help="No progress, no lines.")(command)
    return printing_json(command)


def printing_json(command: _F) -> _F:
    """Add --json, and note the command and its options: an interruption says what is kept."""

    @functools.wraps(command)
    def noted(**options: Any) -> Any:
        progress.OF_URLS = not options.get("quiet") and not options.get("as_json")
        ENDING.command = Command(str(click.get_current_context().info_name), options)
        return command(**options)

    option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
    return option(noted)  # type: ignore[return-value]  # it takes what the command takes


def make_say(as_json: bool, quiet: bool) -> Callable[[str], None]:
    """Return what prints a line while a command works, or nothing if facts or nothing are asked."""
    return (lambda line: None) if as_json or quiet else _echo_line


def _echo_line(line: str) -> None:
    """Print a line that holds names of strangers: no terminal command, no second line."""
    ENDING.print_line(escaped(line))


def print_facts(facts: dict[str, Any], lines: Iterable[str], as_json: bool, quiet: bool) -> None:
    """Print facts as one JSON object, or as lines for people."""
    if as_json:
        ENDING.print(json.dumps(facts, allow_nan=False, default=_as_text))
        ENDING.finish()  # one document: a signal that comes now prints no other
    elif not quiet:
        for line in lines:
            _echo_line(line)


def _as_text(value: Any) -> str:
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(type(value).__name__)
