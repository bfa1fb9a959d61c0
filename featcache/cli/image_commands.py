"""The commands from images to a cache: parse, one call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featcache.cli.options import (
    AUTO_OR_NUMBER,
    LARGEST,
    WEIGHTS,
    Numbers,
    OrWord,
    Renaming,
    Sizes,
    grouping,
    labelling,
    listing,
    make_say,
    patients,
    print_facts,
    printing,
)
from featcache.errors import printable
from featcache.formatting import count


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--classes", metavar="A,B,...", help="Only these class folders. Default: all.")
@click.option(
    "--fractions", type=Numbers(float, "F,F,F"), default="0.7,0.15,0.15", show_default=True,
    help="Shares of train, valid and test.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed, another split.")
@grouping
@patients
@click.option(
    "--mode", type=click.Choice(["copy", "symlink", "hardlink"]), default="copy",
    show_default=True, help="How a tree gets its files.",
)  # fmt: skip
@labelling
@listing
@printing
def split(
    source: Path, destination: Path, classes: str | None, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Split the class folders in SOURCE into train, valid and test.

    DESTINATION ending in .csv becomes a manifest and nothing moves; else it becomes a tree
    DESTINATION/{train,valid,test}/{class}/. SOURCE may be a CSV (path,target,group) too, and
    becomes another. Of a SOURCE by URL, a folder or a CSV, the manifest has URLs.

    \b
    Example: featcache split raw data --classes covid,normal --group-by '^(\\d{8})_'
             featcache split all.csv split.csv --group-by-path '(patient\\d+)/'
             featcache split s3://bucket/raw split.csv
    """
    from featcache.data.splitting import split as split_images

    chosen = None if classes is None else [name.strip() for name in classes.split(",")]
    summary = split_images(
        source, destination, classes=chosen, say=make_say(as_json, quiet), **options
    )
    print_facts(summary.as_dict(), [], as_json, quiet)


def _once_each(
    ctx: click.Context, param: click.Parameter, pairs: tuple[tuple[str, str], ...]
) -> dict[str, str]:  # fmt: skip
    if len(dict(pairs)) < len(pairs):
        raise click.BadParameter("a split is named twice")
    return dict(pairs)


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("cache", type=click.Path(path_type=Path))
@click.option(
    "--backbone", required=True, metavar="NAME", multiple=True,
    help="efficientnet-b0 to -b7, efficientnet-lite0, torchvision:NAME, timm:NAME, xrv:NAME, "
    "python:package.module:function. More than once: CACHE is a folder and gets a cache of each, "
    "every image being decoded once.",
)  # fmt: skip
@WEIGHTS
@click.option(
    "--image-size", type=Sizes(), default="auto", show_default=True,
    help="Side of the input in pixels; auto is the backbone's own. Several: CACHE is a folder and "
    "gets a cache of each, every image being decoded once.",
)  # fmt: skip
@click.option(
    "--transform", type=click.Choice(["library"]),
    help="Resize and crop as torchvision or timm documents it for the backbone's weights.",
)  # fmt: skip
@click.option(
    "--crop-mode", type=click.Choice(["squash", "center", "border"]), show_default="squash",
    help="Squash, centre crop, or pad to a square.",
)  # fmt: skip
@click.option(
    "--interpolation", type=click.Choice(["bilinear", "bicubic"]), show_default="bilinear"
)
@click.option(
    "--normalize", type=click.Choice(["auto", "imagenet", "half"]), default="auto",
    show_default=True, help="Mean and std; auto is the backbone's own, half is the tutorial's.",
)  # fmt: skip
@click.option("--mean", type=Numbers(float, "R,G,B"), help="For pixels in [0, 1]; with --std.")
@click.option("--std", type=Numbers(float, "R,G,B"), help="For pixels in [0, 1]; with --mean.")
@click.option(
    "--bit-depth", type=OrWord(int, "auto", "minmax"), default="auto", show_default=True,
    help="Of greyscale deeper than 8 bits: 12, 14, 16 or minmax; auto looks at a sample.",
)  # fmt: skip
@click.option(
    "--truncated", type=click.Choice(["skip", "keep"]), default="skip", show_default=True,
    help="Cut-off images: fail them, or fill them in.",
)  # fmt: skip
@LARGEST
@click.option(
    "--window", metavar="CENTER,WIDTH|voi|first|none", show_default="voi",
    help="Of DICOM: voi is the VOI LUT, else the first window, else the stored range. CT and MR "
    "need one.",
)  # fmt: skip
@click.option(
    "--frame", type=click.IntRange(min=1), metavar="N", help="Of DICOM files of several frames."
)
@click.option(
    "--views", type=click.IntRange(1, 64), default=1, show_default=True,
    help="Views of every image to train on: the plain one, and others by --augment.",
)  # fmt: skip
@click.option(
    "--augment", type=click.Choice(["flip", "crop", "xray"]),
    help="How they are made; xray turns, shifts and exposes a little, and never flips.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["fp32", "tf32", "fp16", "bf16"]), default="fp32",
    show_default=True, help="Of the forward pass; checked on your images first.",
)  # fmt: skip
@click.option(
    "--feature-dtype", type=click.Choice(["float32", "float16"]), default="float32",
    show_default=True, help="Of the features in the cache.",
)  # fmt: skip
@click.option(
    "--engine", type=click.Choice(["auto", "onnx", "folded", "eager"]), default="auto",
    show_default=True,
    help="How the network is run; auto takes the fastest that agrees with the plain one.",
)  # fmt: skip
@click.option("--batch-size", type=AUTO_OR_NUMBER, default="auto", show_default=True)
@click.option(
    "--workers", type=AUTO_OR_NUMBER, default="auto", show_default=True,
    help="Decoding threads, of each process.",
)  # fmt: skip
@click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:i],...|mps|all",
    help="Where to compute; several GPUs, or all, get a process each.",
)  # fmt: skip
@click.option(
    "--processes", type=click.IntRange(1, 256), default=1, show_default=True,
    help="How many, on each device; the CPU's cores are shared out among them.",
)  # fmt: skip
@click.option(
    "--ray", metavar="HOST:PORT|auto|local",
    help="Work on the GPUs, or the nodes, of a Ray cluster; local starts a Ray here.",
)  # fmt: skip
@click.option(
    "--part", metavar="I/N",
    help="Make part I of N only, for queues: on any hosts that see DATA and CACHE, in any order. "
    "The command without it then merges them, does what is missing and writes CACHE.",
)  # fmt: skip
@grouping
@patients
@click.option(
    "--path-names", type=click.Choice(["keep", "hash"]), show_default="keep",
    help="hash: no names of files and folders below split and class in cache, run and messages.",
)  # fmt: skip
@click.option(
    "--max-errors", default="5%", show_default=True, metavar="N|P%",
    help="Images that may fail, per split and class.",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), help="Only so many images, for a try.")
@click.option(
    "--dry-run", is_flag=True, help="Say what is left to do and would be taken; write nothing."
)
@click.option(
    "--log-json", is_flag=True,
    help="Progress as a JSON object a minute, on standard error, in place of the bar.",
)  # fmt: skip
@click.option(
    "--price", type=float, metavar="P",
    help="Of an hour of a machine like this one: with --dry-run, what it costs on how many.",
)  # fmt: skip
@click.option(
    "--rehash", is_flag=True, help="Recognise unchanged images by content, not by size and time."
)
@click.option("--rebuild", is_flag=True, help="Replace a cache made with other settings.")
@click.option(
    "--split-list", type=Renaming("SPLIT=FILE"), multiple=True, callback=_once_each,
    help="Rows of a CSV that are of a split, a path or file name a line. Rows in no list are of "
    "train if that has no list, else left out. May be repeated.",
)  # fmt: skip
@labelling
@listing
@printing
def extract(
    data: Path, cache: Path, as_json: bool, quiet: bool, dry_run: bool,
    log_json: bool, price: float | None, backbone: tuple[str, ...], **options: Any,
) -> None:  # fmt: skip
    """Run a frozen backbone once over the images in DATA and keep the features in CACHE.

    DATA holds split folders of class folders, or class folders, or images; or it is a CSV
    (path,target,split,group), a zip, a tar, a Parquet file with images, or a folder of tars or of
    Parquet files, or a glob of these in quotes ('shards/*.tar'). Run again, it goes on where it
    stopped, or updates. DATA and CACHE may be URLs (s3://bucket/covid.h5).

    \b
    Example: featcache extract data covid.h5 --backbone efficientnet-b0
             featcache extract data sizes --backbone efficientnet-b0 --image-size 224,448
             featcache extract Data_Entry_2017.csv nih.h5 --backbone efficientnet-b0 --columns \\
               path='Image Index' --columns target='Finding Labels' --columns group='Patient ID' \\
               --target-separator '|' --split-list test=test_list.txt
    """
    from featcache.cli.wording import projection_lines
    from featcache.extraction import extraction

    progress = "json" if log_json else not quiet
    options |= {"say": make_say(as_json, quiet), "progress": progress}
    one_or_all = backbone[0] if len(backbone) == 1 else backbone
    if price is not None and not dry_run:
        raise click.UsageError("--price says what an extraction would cost: it needs --dry-run")
    if dry_run:
        planned = extraction.plan(data, cache, backbone=one_or_all, price=price, **options)
        plans = list(planned.values()) if isinstance(planned, dict) else [planned]
        lines = [line for projection in plans for line in projection_lines(projection)]
        print_facts(_one_or_all([p.as_dict() for p in plans]), lines, as_json, quiet)
        return
    done = extraction.extract(data, cache, backbone=one_or_all, **options)
    summaries = list(done.values()) if isinstance(done, dict) else [done]
    lines = [
        f"{printable(s.cache)}: up to date, {count(s.num_images, 'image')}."
        for s in summaries if s.status == "up to date"
    ]  # fmt: skip
    print_facts(_one_or_all([s.as_dict() for s in summaries]), lines, as_json, quiet)


def _one_or_all(facts: list[dict[str, Any]]) -> dict[str, Any]:
    """One object in any case: of several backbones, their objects under ``caches``."""
    return facts[0] if len(facts) == 1 else {"caches": facts}
