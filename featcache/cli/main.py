"""The command line: parse, one call of the library, print. Nothing is decided here.

The commands are in ``image_commands``, ``cache_commands``, ``head_commands`` and
``run_commands``. Only click and the error tree are imported at the top: ``featcache --help`` must
not wait for torch.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from featcache import __version__
from featcache.cli.cache_commands import audit, convert, info, neighbours, select, verify
from featcache.cli.ending import ENDING, complain, open_closed_streams
from featcache.cli.head_commands import crossval, sweep, train
from featcache.cli.image_commands import extract, split
from featcache.cli.options import DEVICE, make_say, print_facts, printing
from featcache.cli.run_commands import (
    decide,
    evaluate,
    explain,
    export,
    log,
    predict,
    report,
    serve,
)
from featcache.errors import FeatcacheError, FeatcacheWarning, escaped


class _InOrder(click.Group):
    """Lists the commands in the order of the data's way, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_InOrder,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Try it without any data: featcache demo",
)
@click.version_option(__version__, prog_name="featcache")
def cli() -> None:
    """Run a frozen vision backbone once, keep its features, fit small heads in seconds.

    \b
    featcache split raw data --classes covid,normal
    featcache extract data covid.h5 --backbone efficientnet-b0
    featcache train covid.h5 run
    featcache evaluate run --positive covid
    featcache predict run new.png

    Caches and runs may be URLs of a store too: s3://bucket/covid.h5.
    """


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path), default="demo")
@DEVICE
@printing
def demo(folder: Path, device: str, as_json: bool, quiet: bool) -> None:
    """Go the whole way on phantom X-rays, drawn into FOLDER (default: demo).

    \b
    Example: featcache demo
    """
    from featcache.cli.demo import run_demo

    summary = run_demo(folder, device=device, say=make_say(as_json, quiet))
    print_facts(summary.as_dict(), [], as_json, quiet)


for command in (
    split, extract, select, info, verify, audit,
    train, sweep, crossval, decide, evaluate, predict, explain, report,
    export, serve, log, convert, neighbours,
):  # fmt: skip
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 error, 2 wrong usage, 128 + N ended by signal N."""
    # What imports make lives until the end: looking for garbage less often saves 4 % of evaluate.
    gc.set_threshold(50_000, 20, 100)
    given = sys.argv[1:] if arguments is None else arguments
    open_closed_streams()
    if "--json" in given and sys.stdout is sys.__stdout__:
        ENDING.reserve_output()
    ENDING.listen()
    code = _run(given)
    if code > 128:
        # Threads of libraries that are still at work would hold the exit up, or abort it.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _run(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code, whenever a signal comes."""
    ENDING.reset(as_json="--json" in arguments)
    try:
        code = _call_and_finish(arguments)
    except (KeyboardInterrupt, click.Abort) as stop:
        reason = stop.__cause__ or stop  # click makes an Abort of a KeyboardInterrupt
        number = getattr(reason, "signal_number", signal.SIGINT)
        ENDING.say_interrupted(number, str(reason))
        return 128 + number
    return code


def _call_and_finish(arguments: Sequence[str]) -> int:
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", FeatcacheWarning)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    code = _call(arguments)
    if code == 0 and ENDING.lost_output is not None:
        found = ENDING.lost_output.strerror
        error = FeatcacheError(
            "standard output", expected="room for what is printed", found=found,
            hint="The command has done its work; only its lines are lost",
        )  # fmt: skip
        ENDING.say_error(error)
        code = 1
    ENDING.finish()  # from here on a signal changes nothing
    return code


def _call(arguments: Sequence[str]) -> int:
    """Call the command and return the exit code; an error is printed."""
    try:
        code = cli.main(args=arguments, prog_name="featcache", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return int(stop.exit_code)
    except click.ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # not in click < 8.2
            complain(error.format_message())
            return 2
        # A shell's * may name any file. Click breaks lines of its own, which are no such name's.
        text = escaped(error.format_message().replace("\n\t", " "))
        with contextlib.suppress(OSError):
            click.UsageError(text, getattr(error, "ctx", None)).show()
        ENDING.print_error("usage", "a command as --help shows it", text, None, "See --help")
        return 2
    except FeatcacheError as error:
        ENDING.say_error(error)
        return 1
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads us any more: no second complaint at exit
        return 1
    except (MemoryError, RuntimeError, ImportError) as error:
        if not _is_out_of_memory(error):
            raise
        found = (str(error).splitlines() or ["none left"])[0]
        ENDING.say_error(
            FeatcacheError("memory", expected="enough", found=found, hint="Lower --batch-size")
        )
        return 1
    except OSError as error:
        hint = "Run the same command again. If that does not help, check the disk and permissions"
        failed = FeatcacheError(
            "reading or writing", expected="files that can be used",
            found=error.strerror or error, where=error.filename, hint=hint,
        )  # fmt: skip
        ENDING.say_error(failed)
        return 1
    return code if isinstance(code, int) else 0  # click returns the code of an Exit


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, ImportError):  # torch may be what could not be loaded: do not ask it
        return "failed to map segment" in str(error) or "annot allocate memory" in str(error)
    from featcache.memory import is_out_of_memory

    return is_out_of_memory(error)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: Any = None, line: str | None = None,
) -> None:  # fmt: skip
    """Print our own warnings as one line; other libraries' are not for our users."""
    if issubclass(category, FeatcacheWarning):
        complain(f"warning: {escaped(str(message))}")
