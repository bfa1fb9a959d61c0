"""The commands that measure a run and use it: parse, one call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featcache.cli.ending import complain
from featcache.cli.options import (
    AUTO_OR_NUMBER,
    DEVICE,
    LARGEST,
    TRUST_EACH,
    WEIGHTS_EACH,
    listing,
    make_say,
    one_or_all,
    path_column,
    print_facts,
    printing,
)
from featcache.errors import DataError


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--positive", metavar="CLASS", required=True, help="The class to find.")
@click.option("--recall", type=float, help="Share of its patients (images) to find, say 0.95.")
@click.option("--specificity", type=float, help="Or: share of the others to call negative.")
@click.option("--threshold", type=float, help="Or: a threshold of your own.")
@click.option(
    "--on", default="valid", show_default=True, metavar="valid|FOLDER",
    help="Choose it on the rows of valid, or on the out-of-fold rows in a FOLDER of crossval.",
)  # fmt: skip
@click.option(
    "--refer", type=float, metavar="SHARE",
    help="Refer at most this share of the images, those just above the threshold, to a person.",
)  # fmt: skip
@click.option(
    "--prevalence", type=float, metavar="SHARE",
    help="Print PPV and NPV where this share is positive.",
)  # fmt: skip
@click.option(
    "--strict", is_flag=True,
    help="Exit 1 and write nothing if the recall or specificity cannot be promised.",
)  # fmt: skip
@printing
def decide(run: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Choose the threshold for a class, and keep it in RUN with what it promises.

    \b
    Example: featcache decide run --positive covid --recall 0.95
             featcache decide folds/ensemble --on folds --positive covid --recall 0.95

    Give one of --recall, --specificity and --threshold. An image is positive if the probability of
    the class is >= the threshold; else it gets the most probable other class. evaluate and predict
    show this decision beside the most probable class, and export includes it.

    The bound is one-sided, 95 %, and per patient where there are groups. It is a guarantee only if
    the head was neither trained nor chosen on the rows: train --valid-fraction 0.2 leaves valid
    alone.
    """
    from featcache.evaluation.deciding.decision import decide as decide_run

    summary = decide_run(run, say=make_say(as_json, quiet), **options)
    print_facts(summary.as_dict(), [], as_json, quiet)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--cache", type=click.Path(path_type=Path), multiple=True, callback=one_or_all,
    help="Another cache than the run's. Of a run of several caches, once for each.",
)  # fmt: skip
@click.option("--split", default="test", show_default=True, help="Split to measure on.")
@click.option(
    "--positive", metavar="CLASS",
    help="The class to find, against the rest: sensitivity, specificity, its AUC, missed images.",
)  # fmt: skip
@click.option("--csv", type=click.Path(path_type=Path), help="Write a line per image.")
@click.option("--average-views", is_flag=True, help="Mean of a row's views, not view 0 alone.")
@click.option("--unseen", is_flag=True, help="Leave out rows that RUN was trained or chosen on.")
@click.option(
    "--by", metavar="COLUMN",
    help="Measure each subgroup too: by a column of --table, such as sex, or by group.",
)  # fmt: skip
@click.option(
    "--table", type=click.Path(path_type=Path), help="CSV with the columns path and --by."
)
@path_column
@click.option(
    "--against", metavar="RUN2", type=click.Path(path_type=Path),
    help="Compare with a second run on the same rows: is one better by more than chance?",
)  # fmt: skip
@printing
def evaluate(run: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure RUN on a split it was not trained on.

    \b
    Example: featcache evaluate run --positive covid --csv test.csv
             featcache evaluate run --positive covid --by sex --table patients.csv
             featcache evaluate run --positive covid --against run2

    Figures have 95 % intervals. A subgroup's figure is "too few" if it is based on fewer than 10
    groups, or images without a group.
    """
    from featcache.evaluation.evaluation import evaluate as evaluate_run

    evaluation = evaluate_run(run, say=make_say(as_json, quiet), **options)
    print_facts(evaluation.as_dict(), [], as_json, quiet)


@click.command()
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


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path())  # as text: a slash at its end means a folder
@TRUST_EACH
@WEIGHTS_EACH
@click.option(
    "--data", type=click.Path(path_type=Path),
    help="The images of RUN's cache: ONNX is compared on those nearest the threshold too.",
)  # fmt: skip
@click.option(
    "--golden", type=click.Path(path_type=Path), metavar="DIR",
    help="Real images for the self-test of FOLDER/, which then holds them for anyone to see.",
)  # fmt: skip
@printing
def export(run: Path, file: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write backbone and head in RUN as one network to FILE.pt, FILE.onnx or FOLDER/.

    \b
    Example: featcache export run covid.pt       a torch state dict, and covid.pt.json beside it
             featcache export run covid.onnx     uint8 pixels in; probabilities, decision out
             featcache export run deliver/       predict.py, model.onnx, self-test, model card

    ONNX is compared with RUN before it is kept. Of a RUN of several caches FILE.pt has all
    backbones and the head, as backbones.0, backbones.1, head; ONNX an input for each.
    """
    from featcache.cli.wording import export_lines
    from featcache.deployment.exporting.export import export as export_run

    summary = export_run(run, file, **options)
    print_facts(summary.as_dict(), export_lines(summary), as_json, quiet)
