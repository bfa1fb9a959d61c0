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
    from featcache.backbones.backbone import Backbone, build_backbone, wrap_backbone
    from featcache.cache.reading import Cache, CacheSplit, open_cache
    from featcache.cache.selection import select
    from featcache.cache.writing import write_cache
    from featcache.data.dataset import scan
    from featcache.data.splitting import split
    from featcache.deployment.classifier import (
        Classifier,
        Predictions,
        load_classifier,
        predict_cache,
    )
    from featcache.errors import (
        BackboneError,
        CacheError,
        ConfigError,
        DataError,
        FeatcacheError,
        FeatcacheWarning,
        RunError,
    )
    from featcache.evaluation.evaluation import evaluate
    from featcache.evaluation.info import describe
    from featcache.extraction.extraction import extract, plan
    from featcache.extraction.verification import verify
    from featcache.heads.estimator import HeadClassifier
    from featcache.heads.run import load_run
    from featcache.heads.training import train
    from featcache.sweeps.sweeping import sweep

__version__ = "0.1.0"

_MODULES = {
    "Backbone": "backbones.backbone",
    "BackboneError": "errors",
    "Cache": "cache.reading",
    "CacheError": "errors",
    "CacheSplit": "cache.reading",
    "Classifier": "deployment.classifier",
    "ConfigError": "errors",
    "DataError": "errors",
    "FeatcacheError": "errors",
    "FeatcacheWarning": "errors",
    "HeadClassifier": "heads.estimator",
    "Predictions": "deployment.classifier",
    "RunError": "errors",
    "build_backbone": "backbones.backbone",
    "describe": "extraction.verification",
    "evaluate": "evaluation.evaluation",
    "extract": "extraction.extraction",
    "load_classifier": "deployment.classifier",
    "load_run": "heads.run",
    "open_cache": "cache.reading",
    "plan": "extraction.extraction",
    "predict_cache": "deployment.classifier",
    "scan": "data.dataset",
    "select": "cache.selection",
    "split": "data.splitting",
    "sweep": "sweeps.sweeping",
    "train": "heads.training",
    "verify": "extraction.verification",
    "wrap_backbone": "backbones.backbone",
    "write_cache": "cache.writing",
}

__all__ = [
    "Backbone", "BackboneError", "Cache", "CacheError", "CacheSplit", "Classifier", "ConfigError",
    "DataError", "FeatcacheError", "FeatcacheWarning", "HeadClassifier", "Predictions", "RunError",
    "build_backbone", "describe", "evaluate", "extract", "load_classifier",
    "load_run", "open_cache", "plan", "predict_cache", "scan", "select", "split",
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
