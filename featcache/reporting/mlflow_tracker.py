"""Runs in MLflow, through its client alone: a database such as SQLite, a folder or a server.

Reads and writes: what the tracking URI names.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from featcache import __version__
from featcache.errors import ConfigError
from featcache.reporting.tracked import Part, Tracked

EXPERIMENT = "featcache"
_DEFAULT_URI = "sqlite:///mlflow.db"
_KEY, _PART = "featcache.key", "featcache.part."
_METRICS, _PARAMS = 1000, 100  # of one call: MLflow's limits
_PAGE = 1000


class MlflowTracker:
    """MLflow as a tracker, in the experiment ``MLFLOW_EXPERIMENT_NAME``, else ``featcache``.

    Args:
        uri: The tracking URI; see ``tracking.log``.

    Raises:
        ConfigError: If it cannot be opened.
        ImportError: If MLflow is not installed.
    """

    def __init__(self, uri: str | None) -> None:
        address = uri or os.environ.get("MLFLOW_TRACKING_URI") or _DEFAULT_URI
        self.place = re.sub(r"//[^/@]*@", "//", address)  # without a password
        is_server = self.place.startswith(("http://", "https://", "databricks"))
        command = f"mlflow ui --backend-store-uri {shlex.quote(self.place)}"
        self.command = "" if is_server else command
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing is sent anywhere else
        self._children: dict[str, dict[str, Any]] = {}
        with self._quietly() as mlflow:
            self._client = mlflow.tracking.MlflowClient(tracking_uri=address)
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
            found = self._client.get_experiment_by_name(name)
            self._experiment = (
                self._client.create_experiment(name) if found is None else found.experiment_id
            )

    @contextlib.contextmanager
    def _quietly(self) -> Iterator[Any]:
        """Keep MLflow's warnings and log lines from our users; an error of its is ours."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import mlflow.tracking  # it sets the levels of its loggers
        loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")]
        levels = [logger.level for logger in loggers]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for logger in loggers:
                    logger.setLevel(logging.ERROR)
                yield mlflow
        except Exception as error:
            from mlflow.exceptions import MlflowException
            from sqlalchemy.exc import SQLAlchemyError

            if not isinstance(error, MlflowException | SQLAlchemyError | OSError):
                raise
            raise ConfigError(
                f"--uri {self.place}", expected="an MLflow database or server that can be written",
                found=" ".join(str(error).split())[:200],
                hint="Check --uri, MLFLOW_TRACKING_URI and the server",
            ) from error  # fmt: skip
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

    def open_run(self, tracked: Tracked, parent: str | None) -> tuple[str, dict[str, str]]:
        """Return the id of a run, made if it is not there, and the sha256 of each of its parts."""
        with self._quietly():
            run = self._find(tracked.key, parent)
            if run is None:
                tags = {_KEY: tracked.key, "featcache.version": __version__}
                if parent is not None:
                    tags["mlflow.parentRunId"] = parent
                run = self._client.create_run(
                    self._experiment, tags=tags, run_name=tracked.name[:200]
                )
            tags = run.data.tags
        start = len(_PART)
        known = {name[start:]: sha for name, sha in tags.items() if name.startswith(_PART)}
        return run.info.run_id, known

    def _find(self, key: str, parent: str | None) -> Any:
        if parent is None:
            runs = self._search(f"tags.`{_KEY}` = '{key}'")
            top = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
            return next(iter(top), None)
        if parent not in self._children:
            runs = self._search(f"tags.`mlflow.parentRunId` = '{parent}'")
            self._children[parent] = {run.data.tags.get(_KEY): run for run in runs}
        return self._children[parent].get(key)

    def _search(self, wanted: str) -> list[Any]:
        runs, token = list[Any](), None
        while True:
            page = self._client.search_runs(
                [self._experiment], wanted, max_results=_PAGE, page_token=token
            )
            runs += page
            token = page.token
            if not token:
                return runs

    def write(self, run: str, part: Part) -> None:
        """Log a part, and last that it is logged: after an interruption it is logged again."""
        with self._quietly():
            from mlflow.entities import Metric, Param, RunTag

            now = int(time.time() * 1000)
            metrics = [Metric(name, value, now, step) for name, step, value in part.metrics]
            params = [Param(name, value) for name, value in part.params.items()]
            for start in range(0, len(params), _PARAMS):
                self._client.log_batch(run, params=params[start : start + _PARAMS])
            for start in range(0, len(metrics), _METRICS):
                self._client.log_batch(run, metrics=metrics[start : start + _METRICS])
            if part.files:
                with tempfile.TemporaryDirectory() as folder:
                    for name, data in part.files.items():
                        path = Path(folder, name)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(data)
                    self._client.log_artifacts(run, folder)
            self._client.log_batch(run, tags=[RunTag(f"{_PART}{part.name}", part.sha256)])

    def finish(self, run: str) -> None:
        """Mark a run as ended, unless it is."""
        with self._quietly():
            if self._client.get_run(run).info.status != "FINISHED":
                self._client.set_terminated(run, "FINISHED")
