"""The command line: parse, one call of the library, print. Nothing is decided here.

The commands that make and check caches are in ``cache_commands``. Only click and the error tree are
imported at the top: ``featcache --help`` must not wait for torch.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from featcache import __version__
from featcache.cli.cache_commands import extract, info, select, split, verify
from featcache.cli.ending import ENDING, complain, open_closed_streams
from featcache.cli.explain_command import explain
from featcache.cli.options import (
    AUTO_OR_NUMBER,
    CACHES,
    DEVICE,
    LARGEST,
    TRUST,
    TRUST_EACH,
    WEIGHTS,
    WEIGHTS_EACH,
    Numbers,
    grouping,
    head_options,
    head_seeds,
    listing,
    make_say,
    one_or_all,
    path_column,
    print_facts,
    printing,
)
from featcache.errors import DataError, FeatcacheError, FeatcacheWarning, escaped, printable


class _InOrder(click.Group):
    """Lists the commands in the order of the data's way, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


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
@DEVICE
@printing
def demo(folder: Path, device: str, as_json: bool, quiet: bool) -> None:
    """Go the whole way on phantom X-rays, drawn into FOLDER (default: demo).

    \b
    Example: featcache demo
    """
    from featcache.cli.demo import run_demo

    summary = run_demo(folder, device=device, say=make_say(as_json, quiet))
    print_facts(summary.as_dict(), [], as_json, quiet)


for made in (split, extract, select, info, verify):
    cli.add_command(made)


@cli.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.option(
    "--only", metavar="A,B,...",
    help="Some of same, near, labels, shortcuts, outliers, sources. Default: all.",
)  # fmt: skip
@grouping
@click.option(
    "--table", type=click.Path(path_type=Path), help="CSV with path and the column of --source."
)
@click.option("--source", metavar="COLUMN", help="The column of --table that names sources.")
@click.option(
    "--csv", type=click.Path(path_type=Path),
    help="Write a table for select --table: copies in one group.",
)  # fmt: skip
@click.option(
    "--copies", type=click.Choice(["group", "drop"]), default="group", show_default=True,
    help="drop: one row of each set in --csv, that of test if there is one; none of two classes.",
)  # fmt: skip
@click.option("--strict", is_flag=True, help="Exit 1 on copies across splits or of two classes.")
@click.option(
    "--data", type=click.Path(path_type=Path),
    help="The images: copies by pixels and pictures, shortcuts by size, colour and borders.",
)  # fmt: skip
@click.option(
    "--blackout", type=Numbers(float, "S,S,..."), metavar="S,S,...",
    help="Judge the head without, and with only, a centre of this share of width and height.",
)  # fmt: skip
@TRUST
@WEIGHTS
@DEVICE
@LARGEST
@printing
def audit(cache: Path, as_json: bool, quiet: bool, strict: bool, **options: Any) -> None:
    """Look in CACHE for copies, wrong labels, shortcuts and outliers, before a head is trained.

    \b
    Example: featcache audit covid.h5 --csv copies.csv
             featcache select covid.h5 sound.h5 --table copies.csv --fractions 0.7,0.15,0.15
             featcache audit covid.h5 --data data --blackout 0.6

    No images are read without --data, nothing is deleted. All but copies is of train and valid (or
    all), never of test. CACHE.audit.json keeps the verdict, for info and train, if same and near
    are looked at.
    """
    from featcache.evaluation.audit import audit as audit_cache
    from featcache.evaluation.audit import leak_error

    found = audit_cache(cache, say=make_say(as_json, quiet), **options)
    print_facts(found.as_dict(), [], as_json, quiet)
    error = leak_error(found) if strict else None
    if error is not None:
        complain(f"error: {error}")
        raise click.exceptions.Exit(1)


@cli.command()
@CACHES
@click.argument("run", type=click.Path(path_type=Path))
@head_options
@click.option(
    "--valid-fraction", type=float,
    help="Hold out part of train, by groups; a split valid is then not touched.",
)  # fmt: skip
@head_seeds
@DEVICE
@click.option("--overwrite", is_flag=True, help="Replace an existing run.")
@printing
def train(
    caches: tuple[Path, ...], run: Path, as_json: bool, quiet: bool, **options: Any
) -> None:  # fmt: skip
    """Train a head on CACHE and write it to the folder RUN.

    \b
    Example: featcache train covid.h5 run --class-weights balanced
             featcache train size224.h5 size448.h5 run

    Of several caches of the same images, or a folder of them, the features are put side by side.
    Images, splits, classes, targets and groups must be the same in all.
    """
    from featcache.heads.training import train as train_head

    say = make_say(as_json, quiet)
    summary = train_head(caches, run, say=say, progress=not quiet, **options)
    print_facts(summary.as_dict(), [], as_json, quiet)


@cli.command()
@CACHES
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
    help="Search space, in place of the default one: see below.",
)  # fmt: skip
@click.option(
    "--metric", default="loss", show_default=True,
    type=click.Choice(
        ["loss", "accuracy", "balanced_accuracy", "roc_auc", "average_precision", "f1"]
    ),
    help="Rank trials by this figure on valid. The last three are means over the classes, or "
    "those of --positive. balanced_accuracy needs one label an image.",
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
    "--prune/--no-prune", default=True, show_default=True, help="Stop trials early that cannot win."
)
@click.option(
    "--valid-fraction", type=float,
    help="Hold out part of train, by groups; a split valid is then not touched.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
@DEVICE
@click.option("--overwrite", is_flag=True, help="Replace an existing run.")
@printing
def sweep(
    caches: tuple[Path, ...], run: Path, as_json: bool, quiet: bool, **options: Any
) -> None:  # fmt: skip
    """Try many heads on CACHE and write the best to RUN, if it is better than the default.

    \b
    Example: featcache sweep covid.h5 best --trials 200 --metric roc_auc --positive covid

    Several caches of the same images: features side by side, as train has it.

    FILE.toml has a line per option of train that is to vary; the others stay as they are there:

    \b
      hidden = [[512, 128], [256], []]
      learning_rate = { low = 1e-5, high = 1e-2, log = true }
      dropout = { low = 0.0, high = 0.6, num = 4 }      # num: values in a grid
      epochs = 20

    After an interruption, the same command resumes the sweep.
    """
    from featcache.sweeps.sweeping import sweep as sweep_heads

    say = make_say(as_json, quiet)
    summary = sweep_heads(caches, run, say=say, progress=not quiet, **options)
    print_facts(summary.as_dict(), [], as_json, quiet)


@cli.command()
@CACHES
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--folds", type=click.IntRange(min=2), default=5, show_default=True)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=1, show_default=True,
    help="Part the rows so often, each time anew.",
)  # fmt: skip
@click.option("--with-test", is_flag=True, help="Use the rows of test too: no test is left then.")
@click.option(
    "--keep-ensemble", is_flag=True,
    help="Keep the mean of the heads' probabilities as a run, FOLDER/ensemble.",
)  # fmt: skip
@head_options
@click.option(
    "--valid-fraction", type=float,
    help="Of the rows outside a fold, the share to choose the epoch by; default: that of valid, "
    "else 0.2.",
)  # fmt: skip
@head_seeds
@DEVICE
@click.option("--overwrite", is_flag=True, help="Replace an existing FOLDER.")
@printing
def crossval(
    caches: tuple[Path, ...], folder: Path, as_json: bool, quiet: bool, **options: Any
) -> None:  # fmt: skip
    """Predict each row of train and valid in CACHE by a head trained without it.

    \b
    Example: featcache crossval covid.h5 folds --repeats 3

    FOLDER gets predictions.csv and crossval.json. Groups and identical images stay in one fold.
    FOLDER/ensemble is a run like any other: evaluate, predict, decide and export take it.
    After an interruption, the same command goes on. Several caches of the same images: features
    side by side, as train has it.
    """
    from featcache.sweeps.crossval import crossval as cross_validate

    say = make_say(as_json, quiet)
    summary = cross_validate(caches, folder, say=say, progress=not quiet, **options)
    print_facts(summary.as_dict(), [], as_json, quiet)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--positive", metavar="CLASS", required=True, help="The class to find.")
@click.option("--recall", type=float, help="Wished share of its patients (images) that is found.")
@click.option("--specificity", type=float, help="Or of the others that is left alone.")
@click.option("--threshold", type=float, help="Or the threshold itself, chosen by you.")
@click.option(
    "--on", default="valid", show_default=True, metavar="valid|FOLDER",
    help="Choose it by the rows of valid, or by a FOLDER of crossval.",
)  # fmt: skip
@click.option("--refer", type=float, metavar="SHARE", help="Refer so many images to a person.")
@click.option("--prevalence", type=float, help="PPV and NPV where so many are positive.")
@click.option("--strict", is_flag=True, help="Exit 1 if the wish cannot be promised.")
@printing
def decide(run: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Choose the threshold of a class, and say what it promises; RUN keeps it.

    \b
    Example: featcache decide run --positive covid --recall 0.95

    Positive is a probability >= the threshold, else the most probable other class. evaluate and
    predict show this decision beside the most probable class, export hands it on. The bound is
    one-sided, 95 %, per patient where there are groups. It is a guarantee only of rows that
    neither fitted nor chose anything: train --valid-fraction 0.2 keeps valid fresh.
    """
    from featcache.evaluation.decision import decide as decide_run

    summary = decide_run(run, say=make_say(as_json, quiet), **options)
    print_facts(summary.as_dict(), [], as_json, quiet)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--cache", type=click.Path(path_type=Path), multiple=True, callback=one_or_all,
    help="Another cache than the run's. Of a run of several caches, once for each.",
)  # fmt: skip
@click.option("--split", default="test", show_default=True)
@click.option(
    "--positive", metavar="CLASS",
    help="The class to find, against the rest: sensitivity, specificity, its AUC, missed images.",
)  # fmt: skip
@click.option("--csv", type=click.Path(path_type=Path), help="Write a line per image.")
@click.option("--average-views", is_flag=True, help="Mean of a row's views, not view 0 alone.")
@click.option("--unseen", is_flag=True, help="Leave out rows that RUN was trained on or chosen by.")
@click.option(
    "--by", metavar="COLUMN",
    help="Measure each subgroup too: by a column of --table, such as sex or view, or by group.",
)  # fmt: skip
@click.option(
    "--table", type=click.Path(path_type=Path), help="CSV with the columns path and --by."
)
@path_column
@click.option(
    "--against", metavar="RUN2", type=click.Path(path_type=Path),
    help="Compare with a second run on the same rows: which is better, beyond chance?",
)  # fmt: skip
@printing
def evaluate(run: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure RUN on a split it was not trained on.

    \b
    Example: featcache evaluate run --positive covid --csv test.csv
             featcache evaluate run --positive covid --by sex --table patients.csv
             featcache evaluate run --positive covid --against run2

    Figures have 95 % intervals. A subgroup's figure is "too few" where fewer than 10 groups, or
    images without a group, stand behind it.
    """
    from featcache.evaluation.evaluation import evaluate as evaluate_run

    evaluation = evaluate_run(run, say=make_say(as_json, quiet), **options)
    print_facts(evaluation.as_dict(), [], as_json, quiet)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--cache", type=click.Path(path_type=Path), multiple=True, callback=one_or_all,
    help="Classify a cache's rows instead. Of a run of several caches, once for each.",
)  # fmt: skip
@TRUST_EACH
@WEIGHTS_EACH
@click.option("--batch-size", type=AUTO_OR_NUMBER, default="auto", show_default=True)
@DEVICE
@LARGEST
@click.option("--csv", type=click.Path(path_type=Path), help="Write a line per image.")
@click.option("--average-views", is_flag=True, help="With --cache: mean of a row's views.")
@listing
@printing
def predict(
    run: Path, images: tuple[Path, ...], cache: Path | tuple[Path, ...] | None, as_json: bool,
    quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Classify IMAGES, files, folders or CSVs of paths, with the head in RUN.

    \b
    Example: featcache predict run new.png --csv predictions.csv

    Images that cannot be read are listed; if none can be, the exit code is 1. Images unlike any
    training image are marked, where the cache that RUN was trained on is at hand.
    """
    from featcache.cli.wording import prediction_lines
    from featcache.deployment.predictions import predict as predict_images

    if (cache is None) == (not images):
        raise click.UsageError("Name images or folders, or a --cache, and not both.")
    if options["average_views"] and cache is None:
        raise click.UsageError("--average-views goes with --cache: images have no views.")
    del options["no_classes"]  # whatever a folder is, its images are classified
    predictions = predict_images(run, images or None, cache=cache, **options)
    print_facts(predictions.as_dict(), prediction_lines(predictions), as_json, quiet)
    if predictions.failures and not predictions.paths:
        path, reason = predictions.failures[0]
        error = DataError(
            "images", expected="one or more that can be read", where=path,
            found=f"none of {len(predictions.failures):,}, the first being {reason}",
        )  # fmt: skip
        complain(f"error: {error}")
        raise click.exceptions.Exit(1)


cli.add_command(explain)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@TRUST_EACH
@WEIGHTS_EACH
@printing
def export(run: Path, file: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write backbone and head in RUN as one state dict to FILE (.pt), and FILE.json beside it.

    \b
    Example: featcache export run covid.pt

    Of a RUN of several caches: all backbones and the head, as backbones.0, backbones.1, head.
    """
    from featcache.deployment.export import export as export_run

    summary = export_run(run, file, **options)
    lines = [
        f"{printable(file)}: {summary.backbone} with its head, sha256 {summary.sha256[:16]}...",
        f"{printable(file)}.json: classes and preprocessing"
        + (", and the threshold" if summary.decision else ""),
    ]
    print_facts(summary.as_dict(), lines, as_json, quiet)


# ----------------------------------------------------------------------------- errors, exit codes


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 error, 2 wrong usage, 128 + N ended by signal N."""
    # What imports make lives until the end: looking for garbage less often saves 4 % of evaluate.
    gc.set_threshold(50_000, 20, 100)
    given = sys.argv[1:] if arguments is None else arguments
    open_closed_streams()
    if "--json" in given and sys.stdout is sys.__stdout__:
        ENDING.reserve_output()
    ENDING.listen()
    code = _run(given)
    if code > 128:
        # Threads of libraries that are still at work would hold the exit up, or abort it.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _run(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code, whenever a signal comes."""
    ENDING.reset(as_json="--json" in arguments)
    try:
        code = _call_and_finish(arguments)
    except (KeyboardInterrupt, click.Abort) as stop:
        reason = stop.__cause__ or stop  # click makes an Abort of a KeyboardInterrupt
        number = getattr(reason, "signal_number", signal.SIGINT)
        ENDING.say_interrupted(number, str(reason))
        return 128 + number
    return code


def _call_and_finish(arguments: Sequence[str]) -> int:
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", FeatcacheWarning)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    code = _call(arguments)
    if code == 0 and ENDING.lost_output is not None:
        found = ENDING.lost_output.strerror
        error = FeatcacheError(
            "standard output", expected="room for what is printed", found=found,
            hint="The command has done its work; only its lines are lost",
        )  # fmt: skip
        ENDING.say_error(error)
        code = 1
    ENDING.finish()  # from here on a signal changes nothing
    return code


def _call(arguments: Sequence[str]) -> int:
    """Call the command and return the exit code; an error is printed."""
    try:
        code = cli.main(args=arguments, prog_name="featcache", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return int(stop.exit_code)
    except click.ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # not in click < 8.2
            complain(error.format_message())
            return 2
        text = escaped(error.format_message())  # as a shell's * may name any file
        with contextlib.suppress(OSError):
            click.UsageError(text, getattr(error, "ctx", None)).show()
        ENDING.print_error("usage", "a command as --help shows it", text, None, "See --help")
        return 2
    except FeatcacheError as error:
        ENDING.say_error(error)
        return 1
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads us any more: no second complaint at exit
        return 1
    except (MemoryError, RuntimeError, ImportError) as error:
        if not _is_out_of_memory(error):
            raise
        found = (str(error).splitlines() or ["none left"])[0]
        ENDING.say_error(
            FeatcacheError("memory", expected="enough", found=found, hint="Lower --batch-size")
        )
        return 1
    except OSError as error:
        hint = "Run the same command again. If that does not help, check the disk and permissions"
        failed = FeatcacheError(
            "reading or writing", expected="files that can be used",
            found=error.strerror or error, where=error.filename, hint=hint,
        )  # fmt: skip
        ENDING.say_error(failed)
        return 1
    return code if isinstance(code, int) else 0  # click returns the code of an Exit


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, ImportError):  # torch may be what could not be loaded: do not ask it
        return "failed to map segment" in str(error) or "annot allocate memory" in str(error)
    from featcache.runtime import is_out_of_memory

    return is_out_of_memory(error)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: Any = None, line: str | None = None,
) -> None:  # fmt: skip
    """Print our own warnings as one line; other libraries' are not for our users."""
    if issubclass(category, FeatcacheWarning):
        complain(f"warning: {escaped(str(message))}")
