"""Deliver a classifier: one ONNX file, or a folder that classifies image files with it.

Reads: a run; images where they are given. Writes: ``FILE.onnx``, or ``FOLDER/``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from featcache import __version__
from featcache.deployment.classifier import Classifier
from featcache.deployment.exporting import predict_script
from featcache.deployment.exporting.export import RULES, describe_backbone
from featcache.deployment.exporting.golden import golden_facts, golden_files
from featcache.deployment.exporting.graph import OUTPUTS, build_graph, input_names
from featcache.deployment.exporting.model_card import write_card
from featcache.deployment.exporting.parity import Parity, check_model
from featcache.errors import RunError
from featcache.files import (
    canonical_json,
    disk_error,
    read_regular,
    readable_json,
    result_as_dict,
    sync_folder,
    write_temporary,
)
from featcache.formatting import brief_repr
from featcache.heads.head import build_head
from featcache.heads.run import WEIGHTS_NAME
from featcache.output_folders import new_folder
from featcache.outputs import Output

MODEL_NAME, CONFIG_NAME, CARD_NAME, SCRIPT_NAME = (
    "model.onnx", "config.json", "README.md", "predict.py"
)  # fmt: skip

_FORMAT_VERSION = 1
_PROBABILITIES = {
    "multiclass": "(B, C) float64: softmax, before any temperature",
    "multilabel": "(B, C) float64: sigmoid of each class, before any temperature",
}
_CALIBRATED = {
    "multiclass": "(B, C) float64: at the temperature, without one equal to probabilities",
    "multilabel": "(B, C) float64: each class at its own temperature, without one equal to its "
    "probability",
}
_DECISIONS = {
    "multiclass": "(B,) int64: the number of the class, -1 for refer",
    "multilabel": "(B, C) int64: 1 for each class that is found, else 0",
}
_WITHOUT_THRESHOLD = {
    "multiclass": "the most probable class",
    "multilabel": "each class if its probability > 0.5",
}


@dataclass(frozen=True)
class DeliverySummary:
    """What was delivered: an ONNX file, or a folder with one.

    Attributes:
        path: The file or folder.
        sha256: Of the ONNX file.
        num_bytes: Of the ONNX file.
        task: ``multiclass`` or ``multilabel``.
        classes: C names, in the order of the outputs.
        inputs: For each backbone ``name`` and ``shape`` of the input, ``backbone``,
            ``preprocessing``, ``fingerprint`` of the cache, ``weights_sha256`` of the backbone.
        outputs: Name -> what it is, in words.
        decision: ``rule``, in words, and ``thresholds``: class -> ``threshold`` and what is known
            of it, None where ``decide`` was not called.
        head_sha256: sha256 of the run's weights.
        parity: How the file was compared with the run: see ``parity.Parity``.
        files: Of a folder, name -> sha256; else empty.
        num_golden: Of a folder, how many examples its self-test has.
        num_answered: Of a folder, items of the model card that the files answer.
        num_items: All items of the card.
    """

    __module__ = "featcache"
    __repr__ = brief_repr

    path: Path
    sha256: str
    num_bytes: int
    task: str
    classes: tuple[str, ...]
    inputs: tuple[dict[str, Any], ...]
    outputs: dict[str, str]
    decision: dict[str, Any]
    head_sha256: str
    parity: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    num_golden: int = 0
    num_answered: int = 0
    num_items: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as JSON values."""
        return result_as_dict(self)


def export_onnx_file(
    classifier: Classifier, output: Output, data: str | Path | None
) -> DeliverySummary:
    """Write a classifier as ONNX; a file that disagrees with the run is removed.

    Args:
        classifier: The run, with its backbones.
        output: The place, checked.
        data: The images of the run's caches, or None.

    Raises:
        RunError: If the file disagrees with the run, or must not be written.
        BackboneError: If a backbone cannot be exported.
        CacheError: If the disk is full or the folder cannot be written.
    """
    facts = _facts(classifier)
    model = build_graph(classifier, _metadata(facts))
    try:
        temporary = write_temporary(output.target, model)
        try:
            written = temporary.read_bytes()
            parity = check_model(classifier, written, output.path, data)
            output.publish(temporary)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(output.target.parent)
    except OSError as error:
        raise disk_error(error, output.path, len(model)) from error
    return _summarise(output.path, written, facts, parity)


def export_folder(
    classifier: Classifier, output: Output, data: str | Path | None, golden: str | Path | None
) -> DeliverySummary:
    """Write a folder that classifies image files without featcache: whole, tested, or not at all.

    Args:
        classifier: The run, with its backbones.
        output: The place, checked.
        data: The images of the run's caches, or None.
        golden: A folder of real images to be among the examples, or None.

    Raises:
        RunError: If model or script disagree with the run, or the folder must not be written.
        BackboneError: If a backbone cannot be exported.
        CacheError: If the disk is full or the folder cannot be written.
        ConfigError: If a real image is one that ``predict.py`` refuses.
    """
    facts = _facts(classifier)
    model = build_graph(classifier, _metadata(facts))
    rules = classifier.recipes[0].rules
    examples = golden_files(rules, rules.max_pixels, golden)
    with new_folder(output) as folder:
        (folder / MODEL_NAME).write_bytes(model)
        written = (folder / MODEL_NAME).read_bytes()
        parity = check_model(classifier, written, output.path / MODEL_NAME, data)
        config = facts | {"golden": golden_facts(classifier, examples, parity.bound)}
        card = write_card(classifier, config)
        files = examples | {
            CONFIG_NAME: readable_json(config).encode(),
            CARD_NAME: card.text.encode(),
            SCRIPT_NAME: Path(predict_script.__file__).read_bytes(),
            WEIGHTS_NAME: read_regular(classifier.run.path / WEIGHTS_NAME, max_bytes=2**31),
        }
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        sums = predict_script.sums_of(folder)
        (folder / predict_script.SUMS).write_bytes(sums)
        _test_folder(folder, output.path)
    hashes = {name: sha256.decode() for name, sha256 in predict_script.by_name(sums).items()}
    return _summarise(
        output.path, written, facts, parity, files=hashes, num_golden=len(examples),
        num_answered=card.num_answered, num_items=card.num_items,
    )  # fmt: skip


def _test_folder(folder: Path, where: Path) -> None:
    """Run the folder's self-test in this process; the script is the same file."""
    try:
        predict_script.self_test(folder)
    except (predict_script.SelfTestError, predict_script.RefusedError) as error:
        raise RunError(
            "exported folder", expected="a self-test that passes", found=error, where=where,
            hint="It was not kept. Please report this",
        ) from error  # fmt: skip


def _facts(classifier: Classifier) -> dict[str, Any]:
    """Return what ``config.json`` says, but for the examples."""
    run, decisions = classifier.run, classifier.decisions
    names, inputs = input_names(len(classifier.recipes)), []
    for name, recipe, cache in zip(names, classifier.recipes, run.caches, strict=True):
        said, side = describe_backbone(recipe, cache), recipe.backbone.image_size
        inputs.append({
            "name": name,
            "shape": ["B", side, side, 3],
            "backbone": said["backbone"],
            "preprocessing": said["preprocessing"] | {
                "input": "RGB, (B, S, S, 3) uint8; mean and std are applied inside"
            },
            "fingerprint": said["fingerprint"],
            "weights_sha256": recipe.backbone.weights_sha256,
        })  # fmt: skip
    outputs = (_PROBABILITIES[run.task], _CALIBRATED[run.task], _DECISIONS[run.task])
    return {
        "format": "featcache-delivery",
        "format_version": _FORMAT_VERSION,
        "task": run.task,
        "classes": list(run.classes),
        "inputs": inputs,
        "outputs": dict(zip(OUTPUTS, outputs, strict=True)),
        "decision": {
            "rule": _WITHOUT_THRESHOLD[run.task] if decisions is None else RULES[run.task],
            "thresholds": None if decisions is None else decisions.brief(),
        },
        "head": {
            **run.head.as_json(),
            "layers": [str(layer) for layer in build_head(run.head, seed=0)],
            "num_members": run.num_members,
        },
        "head_sha256": run.weights_sha256,
        "max_pixels": classifier.recipe.rules.max_pixels,
        "versions": {
            "featcache": __version__,
            **{
                name: importlib.metadata.version(name)
                for name in ("torch", "onnx", "onnxruntime", "numpy", "pillow")
            },
        },
    }


def _metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return what the ONNX file says of itself: texts, of which lists and objects are JSON."""
    kept = {key: facts[key] for key in facts if key != "max_pixels"}
    first = facts["inputs"][0]
    kept |= {"fingerprint": first["fingerprint"], "weights_sha256": first["weights_sha256"]}
    return {
        key: value if isinstance(value, str) else canonical_json(value)
        for key, value in kept.items()
    }


def _summarise(
    path: Path, model: bytes, facts: Mapping[str, Any], parity: Parity, **of_folder: Any
) -> DeliverySummary:
    return DeliverySummary(
        path=path, sha256=hashlib.sha256(model).hexdigest(), num_bytes=len(model),
        task=facts["task"], classes=tuple(facts["classes"]), inputs=tuple(facts["inputs"]),
        outputs=facts["outputs"], decision=facts["decision"], head_sha256=facts["head_sha256"],
        parity=asdict(parity), **of_folder,
    )  # fmt: skip
