"""The command that logs a run to a tracker: parse, one call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featcache.cli.options import make_say, print_facts, printing


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
