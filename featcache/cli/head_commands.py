"""The commands from a cache to trained heads: parse, one call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featcache.cli.options import (
    CACHES,
    DEVICE,
    head_options,
    head_seeds,
    make_say,
    print_facts,
    printing,
)


@click.command()
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

    Caches and RUN may be URLs (s3://bucket/run). Of several caches of the same images, or a folder
    of them, the features are put side by side. Images, splits, classes, targets and groups must be
    the same in all.
    """
    from featcache.heads.training import train as train_head

    say = make_say(as_json, quiet)
    summary = train_head(caches, run, say=say, progress=not quiet, **options)
    print_facts(summary.as_dict(), [], as_json, quiet)


@click.command()
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


@click.command()
@CACHES
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--folds", type=click.IntRange(min=2), default=5, show_default=True)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=1, show_default=True,
    help="How often, each time with new folds.",
)  # fmt: skip
@click.option(
    "--with-test", is_flag=True, help="Use the rows of test too; none are left to test on."
)
@click.option(
    "--keep-ensemble", is_flag=True,
    help="Keep the mean of the heads' probabilities as a run, FOLDER/ensemble.",
)  # fmt: skip
@head_options
@click.option(
    "--valid-fraction", type=float,
    help="Share of the rows outside a fold that the epoch is chosen on; default: that of valid, "
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
             featcache crossval covid.h5 folds --keep-ensemble

    FOLDER gets predictions.csv and crossval.json. Groups and identical images stay in one fold.
    With --keep-ensemble, FOLDER/ensemble is a run like any other: evaluate, predict, decide and
    export take it. After an interruption, the same command resumes. The features of several
    caches of the same images are put side by side, as by train.
    """
    from featcache.sweeps.crossval import crossval as cross_validate

    say = make_say(as_json, quiet)
    summary = cross_validate(caches, folder, say=say, progress=not quiet, **options)
    print_facts(summary.as_dict(), [], as_json, quiet)
