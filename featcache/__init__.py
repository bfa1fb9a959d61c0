"""featcache: run a frozen vision backbone once, keep its features, fit small heads in seconds.

The verbs, in the order of the data's way::

    featcache.split(source, destination, classes=["covid", "normal"])
    featcache.extract(destination, "covid.h5", backbone="efficientnet-b0")
    featcache.train("covid.h5", "run")
    featcache.evaluate("run", positive="covid")
    featcache.load_classifier("run").predict(["new.png"])

Importing this package imports neither torch nor anything else that is slow; a name's module is
imported when the name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featcache.backbone import Backbone, build_backbone, wrap_backbone
    from featcache.cache import Cache, CacheSplit, open_cache
    from featcache.cache_writer import write_cache
    from featcache.classifier import Classifier, Predictions, load_classifier, predict_cache
    from featcache.dataset import scan
    from featcache.errors import (
        BackboneError,
        CacheError,
        ConfigError,
        DataError,
        FeatcacheError,
        FeatcacheWarning,
        RunError,
    )
    from featcache.estimator import HeadClassifier
    from featcache.evaluation import evaluate
    from featcache.extraction import extract, extract_caches, plan, plan_caches
    from featcache.run import load_run
    from featcache.selection import select
    from featcache.splitting import split
    from featcache.sweeping import sweep
    from featcache.training import train
    from featcache.verification import describe, verify

__version__ = "0.1.0"

_MODULES = {
    "Backbone": "backbone",
    "BackboneError": "errors",
    "Cache": "cache",
    "CacheError": "errors",
    "CacheSplit": "cache",
    "Classifier": "classifier",
    "ConfigError": "errors",
    "DataError": "errors",
    "FeatcacheError": "errors",
    "FeatcacheWarning": "errors",
    "HeadClassifier": "estimator",
    "Predictions": "classifier",
    "RunError": "errors",
    "build_backbone": "backbone",
    "describe": "verification",
    "evaluate": "evaluation",
    "extract": "extraction",
    "extract_caches": "extraction",
    "load_classifier": "classifier",
    "load_run": "run",
    "open_cache": "cache",
    "plan": "extraction",
    "plan_caches": "extraction",
    "predict_cache": "classifier",
    "scan": "dataset",
    "select": "selection",
    "split": "splitting",
    "sweep": "sweeping",
    "train": "training",
    "verify": "verification",
    "wrap_backbone": "backbone",
    "write_cache": "cache_writer",
}

__all__ = [
    "Backbone", "BackboneError", "Cache", "CacheError", "CacheSplit", "Classifier", "ConfigError",
    "DataError", "FeatcacheError", "FeatcacheWarning", "HeadClassifier", "Predictions", "RunError",
    "build_backbone", "describe", "evaluate", "extract", "extract_caches", "load_classifier",
    "load_run", "open_cache", "plan", "plan_caches", "predict_cache", "scan", "select", "split",
    "sweep", "train", "verify", "wrap_backbone", "write_cache",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'featcache' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"featcache.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
