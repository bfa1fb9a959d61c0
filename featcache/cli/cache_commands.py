"""The commands on caches: parse, one call, print. Those of a run are in ``run_commands``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featcache.cli.ending import complain
from featcache.cli.options import (
    CACHES,
    DEVICE,
    GROUP_SALT,
    LARGEST,
    TRUST,
    WEIGHTS,
    Numbers,
    OrWord,
    Renaming,
    csv_columns,
    grouping,
    make_say,
    path_column,
    print_facts,
    printing,
    printing_json,
)
from featcache.errors import printable
from featcache.formatting import count


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


@click.command()
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--backbone-name", metavar="NAME", help="What made the features of a file that does not say so."
)
@click.option("--rebuild", is_flag=True, help="Replace a cache OUT if it is there.")
@printing
def convert(source: Path, output: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Convert a cache to .npz, .safetensors, .parquet, .h5ad or .csv, or such a file to a cache.

    \b
    Example: featcache convert covid.h5 covid.parquet
             featcache convert covid.parquet again.h5
             featcache convert features.csv made.h5 --backbone-name dinov2

    A file has the columns path, split, target, group and features, and the identity in its
    metadata. It is read back before it gets its name: what it cannot hold is refused. Of other
    people's files the columns path and features (or f0, f1, ...; of h5ad X) are needed. Parquet
    needs pip install 'featcache[formats]'.
    """
    from featcache.cache.converting.conversion import convert as convert_file

    summary = convert_file(source, output, say=make_say(as_json, quiet), **options)
    print_facts(summary.as_dict(), [], as_json, quiet)


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.argument("image", metavar="IMAGE|PATH")
@click.option("-k", type=click.IntRange(min=1), default=10, show_default=True, help="How many.")
@TRUST
@WEIGHTS
@DEVICE
@LARGEST
@printing
def neighbours(cache: Path, image: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """List the rows of CACHE nearest to an image, by the cosine of their features.

    \b
    Example: featcache neighbours covid.h5 train/covid/17.png -k 5
             featcache neighbours covid.h5 new.png

    A PATH of the cache needs no network; its own row is left out. All rows are compared.
    """
    from featcache.evaluation.neighbours import neighbours as find_neighbours

    found = find_neighbours(cache, image, say=make_say(as_json, quiet), **options)
    print_facts(found.as_dict(), [], as_json, quiet)
