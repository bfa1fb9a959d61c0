"""The commands that measure a run and use it: parse, one call, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from featcache.cli.ending import ENDING, complain
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

_MAX_PIXELS = 1 << 26  # that of serving.py, which --help does not import


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

    RUN may be a URL (s3://bucket/run), as for all commands that take one; what is written is sent
    there. Figures have 95 % intervals. A subgroup's figure is "too few" if it is based on fewer
    than 10 groups, or images without a group.
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
    """Classify IMAGES with the head in RUN: files, folders, CSVs; or tars, Parquet files, a zip.

    \b
    Example: featcache predict run new.png --csv predictions.csv
             featcache predict run s3://bucket/images --csv predictions.csv

    IMAGES may be globs in quotes ('shards/*.tar'), and URLs.
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
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, metavar="FOLDER",
    help="A new folder: a picture for each image, and explanations.json.",
)  # fmt: skip
@click.option(
    "--positive", metavar="CLASS", help="The class to explain; default: the most probable."
)
@click.option(
    "--against", metavar="CLASS",
    help="Of three classes or more, hold it against this one; default: the runner-up.",
)  # fmt: skip
@TRUST_EACH
@WEIGHTS_EACH
@DEVICE
@LARGEST
@listing
@click.option("--overwrite", is_flag=True, help="Replace an existing FOLDER.")
@printing
def explain(
    run: Path, images: tuple[Path, ...], out: Path, as_json: bool, quiet: bool, **options: Any
) -> None:  # fmt: skip
    """Show what in IMAGES spoke for and against a class, and the nearest training images.

    \b
    Example: featcache explain run new.png --out explained

    IMAGES are what predict takes: files, folders, CSVs, tars, Parquet files, a zip, globs and URLs.
    The map adds up to the log-odds; occlusion stands beside it as a check. Both show what the
    network used, not where disease is. Networks that do not end in average pooling get occlusion
    alone.
    """
    from featcache.deployment.explanation import explain as explain_run

    del options["no_classes"]  # whatever a folder is, its images are explained
    summary = explain_run(run, list(images), out, say=make_say(as_json, quiet), **options)
    print_facts(summary.as_dict(), [], as_json, quiet)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("file", required=False, metavar="[FILE.html]", type=click.Path(path_type=Path))
@click.option(
    "--positive", metavar="CLASS", help="The class to find; default: that of featcache decide."
)
@click.option(
    "--data", type=click.Path(path_type=Path),
    help="The images: shows where the evidence lies in those of each class, and for --images.",
)  # fmt: skip
@click.option(
    "--images", type=click.Choice(["none", "mistakes", "all"]), default="none", show_default=True,
    help="Small pictures of these images of valid and test.",
)  # fmt: skip
@click.option("--no-paths", is_flag=True, help="Call images by numbers, not by their files.")
@TRUST_EACH
@WEIGHTS_EACH
@DEVICE
@printing
def report(run: Path, file: Path | None, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write one page about RUN: how good it is, where to put the threshold, how it was made.

    \b
    Example: featcache report run covid.html
             featcache report run covid.html --data data --images mistakes --no-paths

    One file without any request to a network: it opens from a disk, prints, and is readable without
    JavaScript. The slider moves the threshold on valid; test is folded away. It shows the audit's
    verdict and the decision where there are any: audit and decide first. Without FILE.html it is
    RUN/report.html. Of an ensemble, FOLDER/ensemble, the figures are the out-of-fold ones of
    FOLDER, slider included; FOLDER itself will do as RUN.
    """
    from featcache.reporting.report import report as write_report

    summary = write_report(run, file, say=make_say(as_json, quiet), **options)
    print_facts(summary.as_dict(), [], as_json, quiet)


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


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True,
    help="0 takes any that is free.",
)  # fmt: skip
@click.option(
    "--allow-host", "allow_hosts", metavar="NAME", multiple=True,
    help="Another name of this server in requests, say behind a proxy. May be repeated.",
)  # fmt: skip
@TRUST_EACH
@WEIGHTS_EACH
@click.option("--batch-size", type=AUTO_OR_NUMBER, default="auto", show_default=True)
@DEVICE
@click.option(
    "--max-pixels", type=click.IntRange(min=1), default=_MAX_PIXELS, show_default=True,
    metavar="N", help="Refuse larger images, unread.",
)  # fmt: skip
@printing
def serve(run: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Classify images over HTTP with RUN: a page at / and JSON at /predict.

    \b
    Example: featcache serve run
             curl -F file=@new.png http://127.0.0.1:8000/predict

    Needs pip install 'featcache[serve]'. Not for diagnosis. What is sent is neither stored nor
    logged. There is no password and no encryption: on another --host than a loopback address,
    whoever reaches this machine can use it. Ctrl-C or SIGTERM answers the requests in hand, then
    ends it. /health says whether it works, /card what RUN is.
    """
    from featcache.deployment.server.serving import serve as serve_run

    def print_ready(facts: dict[str, Any]) -> None:
        if as_json:
            ENDING.print(json.dumps(facts, allow_nan=False))
            ENDING.as_json = False  # one object: how it ends is said on standard error alone

    serve_run(run, say=make_say(as_json, quiet), ready=print_ready, **options)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--to", required=True, type=click.Choice(["mlflow", "tensorboard"]), help="The tracker."
)
@click.option("--uri", help="Of MLflow; default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db.")
@click.option(
    "--out", metavar="DIR", type=click.Path(path_type=Path),
    help="Of TensorBoard's event files; default: tensorboard.",
)  # fmt: skip
@click.option(
    "--model", metavar="FILE.onnx|FOLDER", type=click.Path(path_type=Path),
    help="Log what featcache export made of RUN too.",
)  # fmt: skip
@click.option("--paths", is_flag=True, help="Log paths of images too.")
@printing
def log(run: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Log RUN, a finished run, sweep or cross-validation, to MLflow or TensorBoard.

    \b
    Example: featcache log run --to mlflow
             featcache log run --to tensorboard --out tb
             featcache log run --to mlflow --uri http://localhost:5000 --model covid.onnx

    Parameters, curves, figures of each evaluation with intervals, pictures, decision, audit, and
    the files of the run. Trials and folds are runs below it. Logged again, only what is new is
    added. Needs pip install "featcache[tracking]".
    """
    from featcache.reporting.tracking import log as log_run

    summary = log_run(run, say=make_say(as_json, quiet), **options)
    print_facts(summary.as_dict(), [], as_json, quiet)
