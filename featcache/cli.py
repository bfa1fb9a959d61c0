"""The command line: parse, one call of the library, print. Nothing is decided here.

Only click and the error tree are imported at the top: ``featcache --help`` must not wait for torch.
"""

from __future__ import annotations

import json
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from featcache import __version__
from featcache.errors import FeatcacheError, FeatcacheWarning, printable

_F = TypeVar("_F", bound=Callable[..., Any])


class _InOrder(click.Group):
    """Lists the commands in the order of the data's way, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class _OrWord(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A number, or one of some words: ``auto|N``."""

    def __init__(self, kind: type[int], *words: str) -> None:
        self._kind, self._words = kind, words
        self.name = "|".join([*words, "N"])

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        if value in self._words or isinstance(value, int):
            return value  # type: ignore[no-any-return]
        try:
            return self._kind(value)
        except ValueError:
            return self.fail(f"{value!r} is neither a whole number nor {self._words}", param, ctx)


class _Numbers(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Comma-separated numbers: ``0.7,0.15,0.15``."""

    def __init__(self, kind: type[int] | type[float], name: str, *, none: bool = False) -> None:
        self._kind, self.name, self._none = kind, name, none

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int | float, ...]:
        if not isinstance(value, str):
            return tuple(value)
        if self._none and value == "none":
            return ()
        try:
            return tuple(self._kind(part) for part in value.split(","))
        except ValueError:
            return self.fail(f"{value!r} is not of the form {self.name}", param, ctx)


class _Renaming(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Two names: ``OLD=NEW``."""

    name = "OLD=NEW"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        old, sign, new = value.partition("=")
        return (
            (old, new) if sign else self.fail(f"{value!r} is not of the form OLD=NEW", param, ctx)
        )


_AUTO_OR_NUMBER = _OrWord(int, "auto")
_TRUST = click.option(
    "--backbone", metavar="NAME", help="Needed for python: backbones only: says you trust the code."
)
_DEVICE = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:i]|mps",
    help="Where to compute.",
)  # fmt: skip
_WEIGHTS = click.option(
    "--weights", metavar="FILE|random", help="Backbone weights; default: the library's pretrained."
)


def _printing(command: _F) -> _F:
    """Add --json and --quiet: facts as one JSON object, or no lines at all."""
    command = click.option("--quiet", is_flag=True, help="No progress, no lines.")(command)
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)


@click.group(
    cls=_InOrder,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Try it without any data: featcache demo",
)
@click.version_option(__version__, prog_name="featcache")
def cli() -> None:
    """Run a frozen vision backbone once, keep its features, fit small heads in seconds.

    \b
    featcache split raw data --classes covid,normal
    featcache extract data covid.h5 --backbone efficientnet-b0
    featcache train covid.h5 run
    featcache evaluate run --positive covid
    featcache predict run new.png
    """


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path), default="demo")
@_DEVICE
@_printing
def demo(folder: Path, device: str, as_json: bool, quiet: bool) -> None:
    """Go the whole way on phantom X-rays, drawn into FOLDER (default: demo).

    \b
    Example: featcache demo
    """
    from featcache.demo import run_demo

    summary = run_demo(folder, device=device, say=_say(as_json, quiet))
    _print(summary.as_json(), [], as_json, quiet)


@cli.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--classes", metavar="A,B,...", help="Only these class folders. Default: all.")
@click.option(
    "--fractions", type=_Numbers(float, "F,F,F"), default="0.7,0.15,0.15", show_default=True,
    help="Shares of train, valid and test.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed, another split.")
@click.option(
    "--group-by", metavar="REGEX",
    help="What its first group matches in a file name (a patient, say) is kept together.",
)  # fmt: skip
@click.option(
    "--mode", type=click.Choice(["copy", "symlink", "hardlink"]), default="copy",
    show_default=True, help="How a tree gets its files.",
)  # fmt: skip
@_printing
def split(
    source: Path, destination: Path, classes: str | None, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Split the class folders in SOURCE into train, valid and test.

    DESTINATION ending in .csv becomes a manifest and nothing moves; else it becomes a tree
    DESTINATION/{train,valid,test}/{class}/.

    \b
    Example: featcache split raw data --classes covid,normal --group-by '^(\\d{8})_'
    """
    from featcache.splitting import split as split_images

    chosen = None if classes is None else [name.strip() for name in classes.split(",")]
    summary = split_images(source, destination, classes=chosen, say=_say(as_json, quiet), **options)
    _print(summary.as_json(), [], as_json, quiet)


@cli.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("cache", type=click.Path(path_type=Path))
@click.option(
    "--backbone", required=True, metavar="NAME", multiple=True,
    help="efficientnet-b0 to -b7, efficientnet-lite0, torchvision:NAME, timm:NAME, "
    "python:package.module:function. More than once: CACHE is a folder and gets a cache of each, "
    "every image being decoded once.",
)  # fmt: skip
@_WEIGHTS
@click.option(
    "--image-size", type=_AUTO_OR_NUMBER, default="auto", show_default=True,
    help="Side of the input in pixels; auto is the backbone's own.",
)  # fmt: skip
@click.option(
    "--crop-mode", type=click.Choice(["squash", "center", "border"]), default="squash",
    show_default=True, help="Squash, centre crop, or pad to a square.",
)  # fmt: skip
@click.option(
    "--interpolation", type=click.Choice(["bilinear", "bicubic"]), default="bilinear",
    show_default=True,
)  # fmt: skip
@click.option(
    "--normalize", type=click.Choice(["auto", "imagenet", "half"]), default="auto",
    show_default=True, help="Mean and std; auto is the backbone's own, half is the tutorial's.",
)  # fmt: skip
@click.option("--mean", type=_Numbers(float, "R,G,B"), help="For pixels in [0, 1]; with --std.")
@click.option("--std", type=_Numbers(float, "R,G,B"), help="For pixels in [0, 1]; with --mean.")
@click.option(
    "--bit-depth", type=_OrWord(int, "auto", "minmax"), default="auto", show_default=True,
    help="Of greyscale deeper than 8 bits: 12, 14, 16 or minmax; auto looks at a sample.",
)  # fmt: skip
@click.option(
    "--truncated", type=click.Choice(["skip", "keep"]), default="skip", show_default=True,
    help="Cut-off images: fail them, or fill them in.",
)  # fmt: skip
@click.option(
    "--views", type=click.IntRange(1, 64), default=1, show_default=True,
    help="Views of every image to train on: the plain one, and others by --augment.",
)  # fmt: skip
@click.option(
    "--augment", type=click.Choice(["flip", "crop", "xray"]),
    help="How they are made; xray turns, shifts and exposes a little, and never flips.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["fp32", "tf32", "fp16", "bf16"]), default="fp32",
    show_default=True, help="Of the forward pass; checked on your images first.",
)  # fmt: skip
@click.option(
    "--feature-dtype", type=click.Choice(["float32", "float16"]), default="float32",
    show_default=True, help="Of the features in the cache.",
)  # fmt: skip
@click.option(
    "--engine", type=click.Choice(["auto", "onnx", "folded", "eager"]), default="auto",
    show_default=True,
    help="How the network is run; auto takes the fastest that agrees with the plain one.",
)  # fmt: skip
@click.option("--batch-size", type=_AUTO_OR_NUMBER, default="auto", show_default=True)
@click.option(
    "--workers", type=_AUTO_OR_NUMBER, default="auto", show_default=True, help="Decoding threads."
)
@_DEVICE
@click.option("--group-by", metavar="REGEX", help="First group in the file name, a patient, say.")
@click.option(
    "--max-errors", default="5%", show_default=True, metavar="N|P%",
    help="Images that may fail, per split and class.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), help="Only so many images, for a try.")
@click.option("--dry-run", is_flag=True, help="Say what would be done and taken; write nothing.")
@click.option(
    "--rehash", is_flag=True, help="Recognise unchanged images by content, not by size and time."
)
@click.option("--rebuild", is_flag=True, help="Replace a cache made with other settings.")
@_printing
def extract(
    data: Path, cache: Path, as_json: bool, quiet: bool, dry_run: bool, max_errors: str,
    rehash: bool, rebuild: bool, backbone: tuple[str, ...], **options: Any,
) -> None:  # fmt: skip
    """Run a frozen backbone once over the images in DATA and keep the features in CACHE.

    DATA holds split folders of class folders, or class folders, or images; or it is a CSV
    (path,target,split,group) or a zip. Run again, it goes on where it stopped, or updates.

    \b
    Example: featcache extract data covid.h5 --backbone efficientnet-b0
    """
    from featcache.extraction import extract_caches, plan_caches
    from featcache.wording import projection_lines

    say = _say(as_json, quiet)
    if dry_run:
        plans = plan_caches(data, cache, backbones=backbone, say=say, **options)
        lines = [line for projection in plans for line in projection_lines(projection)]
        _print(_one_or_all([p.as_json() for p in plans]), lines, as_json, quiet)
        return
    summaries = extract_caches(
        data, cache, backbones=backbone, max_errors=max_errors, rehash=rehash, rebuild=rebuild,
        say=say, progress=not quiet, **options,
    )  # fmt: skip
    lines = [
        f"{printable(s.cache)}: up to date, {s.num_images:,} images."
        for s in summaries if s.status == "up to date"
    ]  # fmt: skip
    _print(_one_or_all([s.as_json() for s in summaries]), lines, as_json, quiet)


def _one_or_all(facts: list[dict[str, Any]]) -> dict[str, Any]:
    """One object in any case: of several backbones, their objects under ``caches``."""
    return facts[0] if len(facts) == 1 else {"caches": facts}


@cli.command()
@click.argument(
    "caches", metavar="CACHE...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.argument("new", type=click.Path(path_type=Path))
@click.option(
    "--table", type=click.Path(path_type=Path),
    help="CSV of path and, as wanted, target, split, group. Rows it does not name are left out.",
)  # fmt: skip
@click.option("--classes", metavar="A,B,...", help="Only these classes, and what is unlabelled.")
@click.option(
    "--rename", type=_Renaming(), multiple=True,
    help="A class; may be given more than once. Classes of one new name become one.",
)  # fmt: skip
@click.option("--prefix", is_flag=True, help="Set each cache's name before its paths and groups.")
@click.option("--rebuild", is_flag=True, help="Replace NEW if it is there.")
@_printing
def select(
    caches: tuple[Path, ...], new: Path, classes: str | None, rename: tuple[tuple[str, str], ...],
    as_json: bool, quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Make a cache NEW of rows of other caches: join, re-split, relabel, leave out. No images.

    \b
    Example: featcache select covid.h5 resplit.h5 --table split2.csv
             featcache select a.h5 b.h5 both.h5 --prefix --rename viral=pneumonia
    """
    from featcache.selection import select as select_rows

    chosen = None if classes is None else [name.strip() for name in classes.split(",")]
    if len(dict(rename)) < len(rename):
        raise click.BadParameter("a class is renamed twice", param_hint="--rename")
    summary = select_rows(
        caches, new, classes=chosen, rename=dict(rename), say=_say(as_json, quiet), **options
    )
    _print(summary.as_json(), [], as_json, quiet)


@cli.command()
@click.argument("cache_or_run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(cache_or_run: Path, as_json: bool) -> None:
    """Show what a cache or a run holds. Reads no features and hashes nothing.

    \b
    Example: featcache info covid.h5
    """
    from featcache.verification import describe
    from featcache.wording import facts_lines

    facts = describe(cache_or_run)
    _print(facts, facts_lines(facts), as_json, False)


@cli.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="Recompute features from these.")
@click.option(
    "--samples", type=_OrWord(int, "all"), default=32, show_default=True,
    help="Rows to recompute.",
)  # fmt: skip
@click.option("--repair", is_flag=True, help="Write CACHE again without its bad rows.")
@_TRUST
@_WEIGHTS
@_DEVICE
@_printing
def verify(cache: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Check that CACHE is whole, and with --data that its features are true.

    \b
    Example: featcache verify covid.h5 --data data --samples all
    """
    from featcache.verification import verify as verify_cache

    result = verify_cache(cache, say=_say(as_json, quiet), **options)
    judged = "good"
    if result.vanished or result.relabelled:
        judged = "whole, but no longer what its images are: extract again"
    if result.repaired:
        judged = (
            f"repaired, {len(result.dropped):,} rows dropped, {result.num_rows:,} left. "
            "Repeat the extract command: it makes what is missing"
        )
    _print(result.as_json(), [f"{printable(result.cache)}: {judged}"], as_json, quiet)


@cli.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--hidden", type=_Numbers(int, "N,N|none", none=True), default="512,128", show_default=True,
    help="Widths of the hidden layers, or none.",
)  # fmt: skip
@click.option("--dropout", type=float, default=0.4, show_default=True)
@click.option("--learning-rate", type=float, default=5e-4, show_default=True)
@click.option("--weight-decay", type=float, default=0.0, show_default=True)
@click.option(
    "--optimizer", type=click.Choice(["adam", "adamw", "sgd"]), default="adam", show_default=True
)
@click.option(
    "--schedule", type=click.Choice(["constant", "cosine"]), default="constant", show_default=True
)
@click.option("--batch-size", type=_AUTO_OR_NUMBER, default="auto", show_default=True)
@click.option("--epochs", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--patience", type=click.IntRange(min=1), help="Stop after so many without gain.")
@click.option(
    "--class-weights", type=click.Choice(["none", "balanced"]), default="none", show_default=True
)
@click.option("--label-smoothing", type=float, default=0.0, show_default=True)
@click.option("--valid-fraction", type=float, help="Hold out part of train, by groups.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of initialisation and dropout."
)
@click.option("--data-seed", type=int, help="Of the order of the rows; default: --seed.")
@_DEVICE
@click.option("--overwrite", is_flag=True, help="Replace an existing run.")
@_printing
def train(cache: Path, run: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Train a head on CACHE and write it, with all that is needed to trust it, to RUN.

    \b
    Example: featcache train covid.h5 run --class-weights balanced
    """
    from featcache.training import train as train_head

    summary = train_head(cache, run, say=_say(as_json, quiet), **options)
    _print(summary.as_json(), [], as_json, quiet)


@cli.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--trials", type=click.IntRange(min=2), required=True, help="The default head is one of them."
)
@click.option(
    "--sampler", type=click.Choice(["random", "grid", "tpe"]), default="random", show_default=True,
    help="tpe learns from earlier trials (pip install 'featcache[sweep]').",
)  # fmt: skip
@click.option(
    "--space", type=click.Path(path_type=Path), metavar="FILE.toml",
    help="What to search, instead of the default space: see below.",
)  # fmt: skip
@click.option(
    "--metric", default="loss", show_default=True,
    type=click.Choice(
        ["loss", "accuracy", "balanced_accuracy", "roc_auc", "average_precision", "f1"]
    ),
    help="Of valid, to choose by; the last three are means over the classes, or of --positive.",
)  # fmt: skip
@click.option("--positive", metavar="CLASS", help="The class that --metric looks for.")
@click.option(
    "--folds", type=click.IntRange(min=2), help="Cross-validate over train and valid, by groups."
)
@click.option(
    "--repeats", type=click.IntRange(min=2), default=5, show_default=True,
    help="New hold-outs and seeds on which the best few and the default are compared.",
)  # fmt: skip
@click.option(
    "--select", type=click.Choice(["safe", "best"]), default="safe", show_default=True,
    help="Keep the default unless the best is better beyond doubt, or the best anyway.",
)  # fmt: skip
@click.option(
    "--prune/--no-prune", default=True, show_default=True, help="Give up hopeless trials early."
)
@click.option("--valid-fraction", type=float, help="Hold out part of train, by groups.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of all that is drawn.")
@_DEVICE
@click.option("--overwrite", is_flag=True, help="Replace an existing run.")
@_printing
def sweep(cache: Path, run: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Try many heads on CACHE and write the best to RUN, if it is better than the default.

    \b
    Example: featcache sweep covid.h5 best --trials 200 --metric roc_auc --positive covid

    FILE.toml has a line per option of train that is to vary; the others stay as they are there:

    \b
      hidden = [[512, 128], [256], []]
      learning_rate = { low = 1e-5, high = 1e-2, log = true }
      dropout = { low = 0.0, high = 0.6, num = 4 }      # num: values in a grid
      epochs = 20

    Killed, the same command goes on where it stopped.
    """
    from featcache.sweeping import sweep as sweep_heads

    say = _say(as_json, quiet)
    summary = sweep_heads(cache, run, say=say, progress=not quiet, **options)
    _print(summary.as_json(), [], as_json, quiet)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--cache", type=click.Path(path_type=Path), help="Another cache than the run's.")
@click.option("--split", default="test", show_default=True)
@click.option("--positive", metavar="CLASS", help="Of two classes, the one not to be missed.")
@click.option("--csv", type=click.Path(path_type=Path), help="Write a line per image.")
@_printing
def evaluate(run: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure RUN on a split it was not trained on.

    \b
    Example: featcache evaluate run --positive covid --csv test.csv
    """
    from featcache.evaluation import evaluate as evaluate_run

    _print(evaluate_run(run, say=_say(as_json, quiet), **options), [], as_json, quiet)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, type=click.Path(path_type=Path))
@click.option("--cache", type=click.Path(path_type=Path), help="Classify a cache's rows instead.")
@_TRUST
@_WEIGHTS
@click.option("--batch-size", type=_AUTO_OR_NUMBER, default="auto", show_default=True)
@_DEVICE
@click.option("--csv", type=click.Path(path_type=Path), help="Write a line per image.")
@_printing
def predict(
    run: Path, images: tuple[Path, ...], cache: Path | None, csv: Path | None, as_json: bool,
    quiet: bool, device: str, **options: Any,
) -> None:  # fmt: skip
    """Classify IMAGES, files or folders, with the head in RUN.

    \b
    Example: featcache predict run new.png --csv predictions.csv
    """
    from featcache.classifier import load_classifier, predict_cache, write_predictions
    from featcache.files import require_folder
    from featcache.wording import prediction_lines

    if (cache is None) == (not images):
        raise click.UsageError("Name images or folders, or a --cache, and not both.")
    if csv is not None:
        require_folder(csv, "--csv")
    if cache is not None:
        predictions = predict_cache(run, cache, device=device)
    else:
        predictions = load_classifier(run, device=device, **options).predict(images)
    if csv is not None:
        write_predictions(csv, predictions)
    _print(predictions.as_json(), prediction_lines(predictions), as_json, quiet)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@_TRUST
@_WEIGHTS
@_printing
def export(run: Path, file: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write backbone and head in RUN as one state dict to FILE (.pt), and FILE.json beside it.

    \b
    Example: featcache export run covid.pt
    """
    from featcache.classifier import check_export_path, load_classifier

    check_export_path(file)
    facts = load_classifier(run, device="cpu", **options).export(file)
    lines = [
        f"{printable(file)}: {facts['backbone']} with its head, sha256 {facts['sha256'][:16]}...",
        f"{printable(file)}.json: classes and preprocessing",
    ]
    _print(facts, lines, as_json, quiet)


# ------------------------------------------------------------------------------------- printing


def _say(as_json: bool, quiet: bool) -> Callable[[str], None]:
    return (lambda line: None) if as_json or quiet else _echo_line


def _echo_line(line: str) -> None:
    """Print a line that holds names of strangers: no terminal command, no second line."""
    click.echo(printable(line))


def _print(facts: dict[str, Any], lines: Iterable[str], as_json: bool, quiet: bool) -> None:
    """Print facts as one JSON object, or as lines for people."""
    if as_json:
        click.echo(json.dumps(facts, allow_nan=False, default=_as_text))
    elif not quiet:
        for line in lines:
            _echo_line(line)


def _as_text(value: Any) -> str:
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(type(value).__name__)


# ----------------------------------------------------------------------------------------- the door


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 error, 2 wrong usage, 130 or 143 interrupted."""
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", FeatcacheWarning)
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        cli.main(args=arguments, prog_name="featcache", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return int(stop.exit_code)
    except click.ClickException as error:
        text = printable(error.format_message())  # as a shell's * may name any file
        click.UsageError(text, getattr(error, "ctx", None)).show()
        return 2
    except (KeyboardInterrupt, click.Abort) as stop:
        reason = stop.__cause__ or stop  # click makes an Abort of a KeyboardInterrupt
        told = "interrupted; what is whole is kept, the same command goes on"
        click.echo(str(reason) or told, err=True)
        return 128 + getattr(reason, "signal_number", signal.SIGINT)
    except FeatcacheError as error:
        click.echo(f"error: {error}", err=True)
        return 1
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads us any more: no second complaint at exit
        return 1
    except (MemoryError, RuntimeError, ImportError) as error:
        if not _is_out_of_memory(error):
            raise
        found = (str(error).splitlines() or ["none left"])[0]
        click.echo(f"error: memory: expected enough, found {found}. Lower --batch-size.", err=True)
        return 1
    except OSError as error:
        place = f" ({printable(error.filename)})" if error.filename else ""
        click.echo(f"error: {printable(error.strerror or error)}{place}", err=True)
        return 1
    return 0


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, ImportError):  # torch may be what could not be loaded: do not ask it
        return "failed to map segment" in str(error) or "annot allocate memory" in str(error)
    from featcache.runtime import is_out_of_memory

    return is_out_of_memory(error)


def _terminate(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: Any = None, line: str | None = None,
) -> None:  # fmt: skip
    """Print our own warnings as one line; other libraries' are not for our users."""
    if issubclass(category, FeatcacheWarning):
        click.echo(f"warning: {printable(message)}", err=True)
