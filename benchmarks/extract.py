"""How fast are decoding, the forward pass and a whole extraction, and how near to the possible?

    python benchmarks/extract.py                          (about 75 minutes on two quiet cores)
    python benchmarks/extract.py --parts decode,forward --rounds 3
    python benchmarks/extract.py --rounds 1 --seconds 0.3 --kinds jpeg-500x375 --batch-sizes 8
           --compile-batch-sizes 8 --jpegs 60 --pngs 0 --stock-images 40
           --memory-images 100,1000 --out try                              (a try of 10 minutes)

The peers are optional and are reported as not installed where they are missing:

    pip install openvino onnx onnxruntime timm zlib-ng            (beside featcache)
    python -m venv peer && peer/bin/pip install thingsvision      (--peer-venv peer)

thingsvision pins an old torch, hence an environment of its own (7 GB).

Parts, each written to ``OUT/extract_PART_DEVICE.json`` and ``.md``:

    decode    bytes to 224 x 224 pixels on one thread and on several: featcache, Pillow, torchvision
              (not exact; its differences are given) and the time of inflating alone for PNG. Every
              pixel of 500 files of 27 kinds is compared with Pillow's.
    forward   images/s of featcache's engine, the stock library, timm, torch.compile, ONNX Runtime,
              OpenVINO, each at the batch size that suits it best and in a process of its own, with
              its parity against its own eager IEEE fp32 network.
    pipeline  a folder of files to a cache: ``featcache extract`` as a process, the stock way and a
              published extractor, against the bound of decoding and forward measured alone.
    memory    peak memory of extracting 1,000 and 100,000 small images.

Image files are made by ``make_images.py``. Ways take turns within a round; medians are reported,
raw samples kept. The parts forward and pipeline write what they have after every precision.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from decode_speed import describe_decode, measure_decode
from figure_of_bounds import draw_bounds
from forward_speed import describe_forward, measure_forward
from make_images import KINDS
from measuring import HERE, current_load, describe_machine, frame_report, write_report
from memory_use import describe_memory, measure_memory
from peers import PRECISIONS
from pipeline_speed import describe_pipeline, measure_pipeline

from featcache.runtime import resolve_device

PARTS = {
    "decode": (lambda args, _: iter([measure_decode(args)]), describe_decode),
    "forward": (measure_forward, describe_forward),
    "pipeline": (measure_pipeline, describe_pipeline),
    "memory": (lambda args, _: iter([measure_memory(args)]), describe_memory),
}


def parse_args() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name: str, default: object, about: str) -> None:
        """Add an option of the type of its default; a tuple is a list with commas."""
        if isinstance(default, tuple):
            kind = type(default[0]) if default else str
            parser.add_argument(
                name, default=default, help=about,
                type=lambda text: tuple(kind(word) for word in text.split(",")),
            )  # fmt: skip
        else:
            parser.add_argument(name, default=default, type=type(default), help=about)

    add("--parts", tuple(PARTS), "which of them")
    add("--rounds", 5, "of every measurement")
    add("--seconds", 2.0, "of one measurement in a loop, at least")
    add("--device", "auto", "auto, cpu or cuda")
    add("--precision", ("fp32",), "of " + ", ".join(PRECISIONS))
    add("--backbones", ("efficientnet-b0", "efficientnet-lite0"), "for the part forward")
    add("--ways", (), "forward: only ways with one of these words in their name")
    for name in ("--batch-sizes", "--compile-batch-sizes"):
        parser.add_argument(
            name, type=lambda text: tuple(map(int, text.split(","))), help="forward: to choose from"
        )
    parser.add_argument("--engine-images", type=int, help="forward: at a time for featcache")
    add("--compile-mode", "default", "forward: of torch.compile")
    parser.add_argument("--bandwidth", type=float, help="of the device's memory, terabytes/s")
    add("--kinds", (), "decode: only these kinds of file")
    parser.add_argument("--workers", type=int, help="decode: threads of the case with several")
    add("--pixel-images", 500, "decode: files whose pixels are compared")
    add("--jpegs", 2000, "pipeline: files of 500 x 375")
    add("--pngs", 500, "pipeline: files of 1024 x 1024")
    add("--stock-images", 200, "pipeline: files that the slow ways do")
    parser.add_argument("--peer-venv", type=Path, help="pipeline: environment with thingsvision")
    add("--memory-images", (1000, 100_000), "memory: files")
    add("--out", HERE / "results", "folder for the results")
    args = parser.parse_args()
    args.out = Path(args.out)
    for given, allowed in ((args.parts, PARTS), (args.precision, PRECISIONS), (args.kinds, KINDS)):
        if unknown := set(given) - set(allowed):
            parser.error(f"{', '.join(unknown)}: not among {', '.join(allowed)}")
    if "pipeline" in args.parts and any(0 < n <= 32 for n in (args.jpegs, args.pngs)):
        parser.error("--jpegs and --pngs: more than 32, the first batch of the stock way")
    if args.stock_images <= 32:
        parser.error("--stock-images: more than 32, the first batch of the stock way")
    return args


def main() -> None:
    """Measure the parts; write JSON and a table each, and the plot of the pipeline."""
    args = parse_args()
    warnings.simplefilter("ignore")
    device, load = resolve_device(args.device).torch(), current_load()
    for name in args.parts:
        measure, describe = PARTS[name]
        for part in measure(args, device):  # more of it every time
            report = frame_report(f"extract, {name}", device, load, args.rounds, **part)
            stem = f"extract_{name}_{device.type}"
            table = "\n".join([describe_machine(report), "", *describe(part)]) + "\n"
            write_report(args.out, stem, report, table)
            if name == "pipeline":
                draw_bounds(args.out / f"{stem}.png", part, describe_machine(report))


if __name__ == "__main__":
    main()
