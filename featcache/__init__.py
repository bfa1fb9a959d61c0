"""featcache: run a frozen vision backbone once, keep its features, fit small heads in seconds.

The verbs, as on the command line, in the order of the work::

    featcache.split("raw", "data", classes=["covid", "normal"])
    featcache.extract("data", "covid.h5", backbone="efficientnet-b0")
    featcache.info("covid.h5")
    featcache.train("covid.h5", "run")
    featcache.decide("run", positive="covid", recall=0.95)
    featcache.evaluate("run", positive="covid")
    featcache.predict("run", "new.png")
    featcache.explain("run", "new.png", "explained")
    featcache.report("run", "covid.html")
    featcache.export("run", "covid.pt")
    featcache.serve("run")

Also ``plan``, ``verify``, ``select``, ``audit``, ``sweep``, ``crossval``, ``log``, ``convert``
and ``neighbours``.
``load_classifier`` keeps a network for many predictions, ``load_head`` returns the trained
``nn.Module``, ``open_cache`` gives the arrays, and ``HeadClassifier`` is a scikit-learn estimator.
Results are dataclasses with ``as_dict()``.

Importing this package imports neither torch nor anything else that is slow; a name's module is
imported when the name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featcache.backbones.backbone import Backbone, build_backbone, wrap_backbone
    from featcache.cache.cache_split import CacheSplit
    from featcache.cache.converting.conversion import ConversionSummary, convert
    from featcache.cache.reading import Cache, Failure, open_cache
    from featcache.cache.selection import SelectionSummary, select
    from featcache.cache.writing import write_cache
    from featcache.data.dataset import scan
    from featcache.data.splitting import SplitSummary, split
    from featcache.deployment.classifier import Classifier, load_classifier
    from featcache.deployment.explainer import Explanation
    from featcache.deployment.explanation import ExplainSummary, explain
    from featcache.deployment.exporting.delivery import DeliverySummary
    from featcache.deployment.exporting.export import ExportSummary, export
    from featcache.deployment.predictions import Predictions, predict
    from featcache.deployment.server.serving import serve
    from featcache.errors import (
        BackboneError,
        CacheError,
        ConfigError,
        DataError,
        FeatcacheError,
        FeatcacheWarning,
        RunError,
    )
    from featcache.evaluation.auditing.audit import Audit, audit
    from featcache.evaluation.deciding.decision import DecideSummary, decide
    from featcache.evaluation.evaluation import Evaluation, evaluate
    from featcache.evaluation.info import CacheInfo, CrossvalInfo, RunInfo, info
    from featcache.evaluation.neighbours import Neighbours, neighbours
    from featcache.evaluation.unfinished import UnfinishedInfo
    from featcache.extraction.extraction import extract, plan
    from featcache.extraction.projection import Projection, WorkersProjection
    from featcache.extraction.reports import ExtractionSummary
    from featcache.extraction.verification import Verification, verify
    from featcache.heads.estimator import HeadClassifier
    from featcache.heads.head import HeadConfig
    from featcache.heads.run import Run, load_head, load_run
    from featcache.heads.training import TrainSummary, train
    from featcache.reporting.report import ReportSummary, report
    from featcache.reporting.tracking import LogSummary, log
    from featcache.sweeps.crossval import CrossvalSummary, crossval
    from featcache.sweeps.ranking import Decision
    from featcache.sweeps.sweeping import SweepSummary, sweep

__version__ = "0.1.0"

_MODULES = {
    # verbs: as on the command line (which has demo besides), and plan for extract --dry-run
    "split": "data.splitting",
    "extract": "extraction.extraction",
    "plan": "extraction.extraction",
    "info": "evaluation.info",
    "verify": "extraction.verification",
    "select": "cache.selection",
    "audit": "evaluation.auditing.audit",
    "train": "heads.training",
    "sweep": "sweeps.sweeping",
    "crossval": "sweeps.crossval",
    "decide": "evaluation.deciding.decision",
    "evaluate": "evaluation.evaluation",
    "predict": "deployment.predictions",
    "explain": "deployment.explanation",
    "report": "reporting.report",
    "export": "deployment.exporting.export",
    "serve": "deployment.server.serving",
    "log": "reporting.tracking",
    "convert": "cache.converting.conversion",
    "neighbours": "evaluation.neighbours",
    # open, load, build
    "scan": "data.dataset",
    "open_cache": "cache.reading",
    "write_cache": "cache.writing",
    "load_run": "heads.run",
    "load_head": "heads.run",
    "load_classifier": "deployment.classifier",
    "build_backbone": "backbones.backbone",
    "wrap_backbone": "backbones.backbone",
    # classes of data, networks and heads
    "HeadClassifier": "heads.estimator",
    "Backbone": "backbones.backbone",
    "Cache": "cache.reading",
    "CacheSplit": "cache.cache_split",
    "Classifier": "deployment.classifier",
    "Decision": "sweeps.ranking",
    "Failure": "cache.reading",
    "HeadConfig": "heads.head",
    "Run": "heads.run",
    # the verbs' results
    "SplitSummary": "data.splitting",
    "ExtractionSummary": "extraction.reports",
    "Projection": "extraction.projection",
    "WorkersProjection": "extraction.projection",
    "CacheInfo": "evaluation.info",
    "RunInfo": "evaluation.info",
    "CrossvalInfo": "evaluation.info",
    "UnfinishedInfo": "evaluation.unfinished",
    "Verification": "extraction.verification",
    "SelectionSummary": "cache.selection",
    "Audit": "evaluation.auditing.audit",
    "TrainSummary": "heads.training",
    "SweepSummary": "sweeps.sweeping",
    "CrossvalSummary": "sweeps.crossval",
    "DecideSummary": "evaluation.deciding.decision",
    "Evaluation": "evaluation.evaluation",
    "Predictions": "deployment.predictions",
    "ExplainSummary": "deployment.explanation",
    "Explanation": "deployment.explainer",
    "ReportSummary": "reporting.report",
    "ExportSummary": "deployment.exporting.export",
    "LogSummary": "reporting.tracking",
    "ConversionSummary": "cache.converting.conversion",
    "Neighbours": "evaluation.neighbours",
    "DeliverySummary": "deployment.exporting.delivery",
    # errors
    "FeatcacheError": "errors",
    "DataError": "errors",
    "BackboneError": "errors",
    "CacheError": "errors",
    "RunError": "errors",
    "ConfigError": "errors",
    "FeatcacheWarning": "errors",
}

__all__ = [  # noqa: RUF022 (verbs first: the order they are read in)
    # verbs: as on the command line (which has demo besides), and plan for extract --dry-run
    "split", "extract", "plan", "info", "verify", "select", "audit", "train", "sweep",
    "crossval", "decide", "evaluate", "predict", "explain", "report", "export", "serve", "log",
    "convert", "neighbours",
    # open, load, build
    "scan", "open_cache", "write_cache", "load_run", "load_head", "load_classifier",
    "build_backbone", "wrap_backbone",
    # classes of data, networks and heads
    "HeadClassifier", "Backbone", "Cache", "CacheSplit", "Classifier", "Decision", "Failure",
    "HeadConfig", "Run",
    # the verbs' results
    "SplitSummary", "ExtractionSummary", "Projection", "WorkersProjection", "CacheInfo", "RunInfo",
    "CrossvalInfo",
    "UnfinishedInfo", "Verification", "SelectionSummary", "Audit", "TrainSummary", "SweepSummary",
    "CrossvalSummary", "DecideSummary", "Evaluation", "Predictions", "ExplainSummary",
    "Explanation", "ReportSummary", "ExportSummary", "DeliverySummary", "LogSummary",
    "ConversionSummary", "Neighbours",
    # errors
    "FeatcacheError", "DataError", "BackboneError", "CacheError", "RunError", "ConfigError",
    "FeatcacheWarning",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'featcache' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"featcache.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
