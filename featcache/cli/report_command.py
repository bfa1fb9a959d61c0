"""The command that writes a page about a run: parse, one call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featcache.cli.options import (
    DEVICE,
    TRUST_EACH,
    WEIGHTS_EACH,
    make_say,
    print_facts,
    printing,
)


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
    RUN/report.html.
    """
    from featcache.reporting.report import report as write_report

    summary = write_report(run, file, say=make_say(as_json, quiet), **options)
    print_facts(summary.as_dict(), [], as_json, quiet)
