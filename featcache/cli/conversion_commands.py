"""The commands convert and neighbours: parse, one call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from featcache.cli.options import DEVICE, LARGEST, TRUST, WEIGHTS, make_say, print_facts, printing


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
