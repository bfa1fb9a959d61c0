"""The command ``explain``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featcache.cli.options import (
    DEVICE,
    LARGEST,
    TRUST_EACH,
    WEIGHTS_EACH,
    listing,
    make_say,
    print_facts,
    printing,
)


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

    The map adds up to the log-odds; occlusion stands beside it as a check. Both show what the
    network used, not where disease is. Networks that do not end in average pooling get occlusion
    alone.
    """
    from featcache.deployment.explanation import explain as explain_run

    del options["no_classes"]  # whatever a folder is, its images are explained
    summary = explain_run(run, list(images), out, say=make_say(as_json, quiet), **options)
    print_facts(summary.as_dict(), [], as_json, quiet)
