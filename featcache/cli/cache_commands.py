"""The commands from images to a cache, and between caches: parse, one call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featcache.cli.ending import complain
from featcache.cli.options import (
    AUTO_OR_NUMBER,
    CACHES,
    DEVICE,
    GROUP_SALT,
    LARGEST,
    TRUST,
    WEIGHTS,
    Numbers,
    OrWord,
    Renaming,
    Sizes,
    csv_columns,
    grouping,
    labelling,
    listing,
    make_say,
    path_column,
    patients,
    print_facts,
    printing,
    printing_json,
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
    becomes another.

    \b
    Example: featcache split raw data --classes covid,normal --group-by '^(\\d{8})_'
             featcache split all.csv split.csv --group-by-path '(patient\\d+)/'
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


@click.command()
@CACHES
@click.argument("new", type=click.Path(path_type=Path))
@click.option(
    "--table", type=click.Path(path_type=Path),
    help="CSV of path and, as wanted, target, split, group. Rows it does not name are left out.",
)  # fmt: skip
@click.option(
    "--fractions", type=Numbers(float, "F,F,F"),
    help="Split anew: shares of train, valid and test. Groups and copies stay together.",
)  # fmt: skip
@click.option("--seed", type=int, help="Another seed, another split by --fractions. Default: 0.")
@grouping
@click.option("--classes", metavar="A,B,...", help="Only these classes, and what is unlabelled.")
@click.option(
    "--rename", type=Renaming(), multiple=True,
    help="A class; may be given more than once. Classes of one new name become one.",
)  # fmt: skip
@click.option("--prefix", is_flag=True, help="Set each cache's name before its paths and groups.")
@csv_columns
@click.option("--rebuild", is_flag=True, help="Replace NEW if it is there.")
@printing
def select(
    caches: tuple[Path, ...], new: Path, classes: str | None, rename: tuple[tuple[str, str], ...],
    as_json: bool, quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Make a cache NEW of rows of other caches: join, re-split, relabel, leave out. No images.

    \b
    Example: featcache select covid.h5 resplit.h5 --table split2.csv
             featcache select covid.h5 other.h5 --fractions 0.7,0.15,0.15 --seed 1
             featcache select a.h5 b.h5 both.h5 --prefix --rename viral=pneumonia
    """
    from featcache.cache.selection import select as select_rows

    chosen = None if classes is None else [name.strip() for name in classes.split(",")]
    if len(dict(rename)) < len(rename):
        raise click.BadParameter("a class is renamed twice", param_hint="--rename")
    summary = select_rows(
        caches, new, classes=chosen, rename=dict(rename), say=make_say(as_json, quiet), **options
    )
    print_facts(summary.as_dict(), [], as_json, quiet)


@click.command()
@click.argument("cache_or_run", type=click.Path(path_type=Path))
@click.option("--layers", is_flag=True, help="Of a run: the layers, and what is trained.")
@printing_json
def info(cache_or_run: Path, as_json: bool, layers: bool) -> None:
    """Show what a cache, a run or the folder of crossval holds.

    Or what an interrupted command has kept. Reads no features and hashes no cache.

    \b
    Example: featcache info covid.h5
             featcache info run --layers
             featcache info folds
             featcache info covid.h5.partial
    """
    from featcache.cli.wording import facts_lines, layer_lines
    from featcache.evaluation.info import info as read_info

    facts = read_info(cache_or_run).as_dict()
    if layers and "layers" not in facts:
        raise click.UsageError(f"--layers is of a run; this is a {facts['kind']}.")
    lines = layer_lines(facts) if layers else facts_lines(facts)
    print_facts(facts, lines, as_json, False)


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="Recompute features from these.")
@click.option(
    "--samples", type=OrWord(int, "all"), default=32, show_default=True,
    help="Rows to recompute.",
)  # fmt: skip
@click.option("--repair", is_flag=True, help="Write CACHE again without its bad rows.")
@TRUST
@WEIGHTS
@DEVICE
@LARGEST
@GROUP_SALT
@printing
def verify(cache: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Check that CACHE is whole, and with --data that its features are true.

    \b
    Example: featcache verify covid.h5 --data data --samples all
    """
    from featcache.extraction.verification import verify as verify_cache

    result = verify_cache(cache, say=make_say(as_json, quiet), **options)
    verdict = "good"
    if result.vanished or result.relabelled:
        verdict = "whole, but no longer what its images are: extract again"
    if result.repaired:
        verdict = (
            f"repaired, {count(len(result.dropped), 'row')} dropped, {result.num_rows:,} left. "
            "Repeat the extract command: it makes what is missing"
        )
    print_facts(result.as_dict(), [f"{printable(result.cache)}: {verdict}"], as_json, quiet)


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.option(
    "--only", metavar="A,B,...",
    help="Some of same and near (copies), labels, shortcuts, outliers, sources. Default: all.",
)  # fmt: skip
@grouping
@click.option(
    "--table", type=click.Path(path_type=Path), help="CSV with the columns path and --source."
)
@path_column
@click.option(
    "--source", metavar="COLUMN", help="Column of --table with the source (hospital, say)."
)
@click.option(
    "--csv", type=click.Path(path_type=Path),
    help="Write a table for select --table that puts copies in one group.",
)  # fmt: skip
@click.option(
    "--copies", type=click.Choice(["group", "drop"]), default="group", show_default=True,
    help="drop: --csv keeps one row of each set of copies, that of test if there is one, and none "
    "if their classes differ.",
)  # fmt: skip
@click.option(
    "--strict", is_flag=True, help="Exit 1 if there are copies across splits or of two classes."
)
@click.option(
    "--data", type=click.Path(path_type=Path),
    help="The images that extract read: finds altered copies, and shortcuts by size, colour and "
    "borders.",
)  # fmt: skip
@click.option(
    "--blackout", type=Numbers(float, "S,S,..."), metavar="S,S,...",
    help="Test the head on images without their centre, and on the centre alone; S is its share of "
    "width and height.",
)  # fmt: skip
@click.option(
    "--evidence", is_flag=True,
    help="Measure which share of the evidence for and against a class lies outside the middle of "
    "its images. Needs --data.",
)  # fmt: skip
@TRUST
@WEIGHTS
@DEVICE
@LARGEST
@printing
def audit(cache: Path, as_json: bool, quiet: bool, strict: bool, **options: Any) -> None:
    """Check CACHE for copies, wrong labels, shortcuts and outliers before a head is trained.

    \b
    Example: featcache audit covid.h5 --csv copies.csv
             featcache select covid.h5 sound.h5 --table copies.csv --fractions 0.7,0.15,0.15
             featcache audit covid.h5 --data data --blackout 0.6 --evidence

    Nothing is deleted, and images are read only with --data. Copies are looked for in all splits;
    everything else uses train and valid (or all), never test. If same and near are checked,
    CACHE.audit.json keeps the verdict for info and train.
    """
    from featcache.evaluation.auditing.audit import audit as audit_cache
    from featcache.evaluation.auditing.audit import leak_error

    found = audit_cache(cache, say=make_say(as_json, quiet), **options)
    print_facts(found.as_dict(), [], as_json, quiet)
    error = leak_error(found) if strict else None
    if error is not None:
        complain(f"error: {error}")
        raise click.exceptions.Exit(1)
