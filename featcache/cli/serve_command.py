"""The command that answers requests with a run: parse, one call, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from featcache.cli.ending import ENDING
from featcache.cli.options import (
    AUTO_OR_NUMBER,
    DEVICE,
    TRUST_EACH,
    WEIGHTS_EACH,
    make_say,
    printing,
)

_MAX_PIXELS = 1 << 26  # that of serving.py, which --help does not import


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
