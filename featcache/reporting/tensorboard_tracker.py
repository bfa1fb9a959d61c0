"""Runs as TensorBoard's event files, written without TensorFlow and without torch.

A part of a run is one file, whose name ends in the hash of its content. No file is ever changed:
TensorBoard may be reading it.

Reads and writes: the folder of the event files.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import time
from pathlib import Path
from typing import Any

from featcache.errors import ConfigError
from featcache.files import local_path, make_folder, write_bytes
from featcache.reporting.tracked import Part, Tracked, safe_name

_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\.(.+)\.([0-9a-f]{64})\.featcache")
_MAX_TEXT_BYTES = 1 << 18


class TensorboardTracker:
    """A folder of event files as a tracker.

    Args:
        out: The folder that ``tensorboard --logdir`` is given.

    Raises:
        ConfigError: If there is a file in its place, or it cannot be made.
        ImportError: If TensorBoard is not installed.
    """

    def __init__(self, out: str | Path) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._writer = event_pb2.Event, RecordWriter
        self._out = local_path(out, "--out")
        self.place = str(out)
        self.command = f"tensorboard --logdir {shlex.quote(self.place)}"
        self._make(self._out)

    def _make(self, folder: Path) -> None:
        try:
            make_folder(folder)
        except OSError as error:
            raise ConfigError(
                "--out", expected="a folder for event files", found=error.strerror, where=folder,
                hint="Choose another folder",
            ) from error  # fmt: skip

    def open_run(self, tracked: Tracked, parent: str | None) -> tuple[str, dict[str, str]]:
        """Return the folder of a run in the tracker's, and the sha256 of each part in it."""
        name = f"{safe_name(tracked.name)}-{tracked.key[:12]}"
        run = name if parent is None else f"{parent}/{safe_name(tracked.name)}"
        self._make(self._out / run)
        files = sorted(path.name for path in (self._out / run).iterdir())
        found = [match for match in map(_NAME.fullmatch, files) if match]
        return run, {match[2].replace("~", "/"): match[3] for match in found}

    def write(self, run: str, part: Part) -> None:
        """Write a part as the last event file of its run, whole or not at all."""
        folder = self._out / run
        numbers = [int(m[1]) for m in map(_NAME.fullmatch, (p.name for p in folder.iterdir())) if m]
        number = max(numbers, default=0) + 1
        buffer = io.BytesIO()
        writer, now = self._writer(buffer), time.time()
        writer.write(self._event(wall_time=now, file_version="brain.Event:2").SerializeToString())
        for step, summary in _summaries(part):
            event = self._event(wall_time=now, step=step, summary=summary)
            writer.write(event.SerializeToString())
        name = f"{number:010}.{part.name.replace('/', '~')}.{part.sha256}.featcache"
        write_bytes(folder / f"events.out.tfevents.{name}", buffer.getvalue())

    def finish(self, run: str) -> None:
        """Do nothing: event files have no end."""


def _summaries(part: Part) -> list[tuple[int, Any]]:
    """Return steps and summaries: scalars, pictures, texts, and parameters as a table."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    found: list[tuple[int, Any]] = []
    if part.params:
        found.append((0, _hparams(part)))
        rows = "".join(f"| {_cell(key)} | {_cell(text)} |\n" for key, text in part.params.items())
        found.append((0, _text(f"{part.name}/parameters", f"| name | value |\n|---|---|\n{rows}")))
    for name, step, value in part.metrics:
        found.append((step, Summary(value=[Summary.Value(tag=name, simple_value=value)])))
    for name, data in part.files.items():
        if name.endswith(".png") and data.startswith(b"\x89PNG"):
            width, height = (int.from_bytes(data[at : at + 4]) for at in (16, 20))
            image = Summary.Image(
                height=height, width=width, colorspace=4, encoded_image_string=data
            )
            found.append((0, Summary(value=[Summary.Value(tag=name[:-4], image=image)])))
        elif name.endswith((".json", ".md")) and len(data) <= _MAX_TEXT_BYTES:
            text = data.decode("utf-8", "replace")
            text = text if name.endswith(".md") else f"```json\n{text}\n```"
            found.append((0, _text(name, text)))
    return found


def _cell(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1].replace("|", "\\|")


def _text(tag: str, text: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    tensor = TensorProto(
        dtype=DT_STRING, string_val=[text.encode()],
        tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
    )  # fmt: skip
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])


def _hparams(part: Part) -> Any:
    """Return the parameters for TensorBoard's table of them."""
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb

    return hparams_pb(dict(part.params), trial_id=part.sha256[:16])
