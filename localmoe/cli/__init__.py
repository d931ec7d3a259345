"""The command line: flags to function calls, and the ONE place where an error becomes a message and an exit status.

Imports nothing heavy at the top: `localmoe --help` and a mistyped flag should answer at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from typing import Annotated, NoReturn

import typer

from localmoe.cli import conversation, conversion, experts, inspection, measurement, models, verification
from localmoe.cli.command import app
from localmoe.errors import LocalMoeError
from localmoe.interrupt import pressed_again

__all__ = [
    "app",
    "conversation",
    "conversion",
    "experts",
    "inspection",
    "main",
    "measurement",
    "models",
    "verification",
]  # the modules add their commands to the app


def print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print("localmoe", version("localmoe"))
        except PackageNotFoundError:
            print("localmoe, run from its source without being installed")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where a bug happened (also LOCALMOE_DEBUG=1).")] = False,
) -> None:
    """Flags before the command; `main` looks for --debug itself."""


def give_up(message: str) -> NoReturn:
    """One line on standard error, exit status 2."""
    from localmoe.repl.render import visible

    print(f"localmoe: {visible(message).replace(chr(10), ' ')}", file=sys.stderr)
    with suppress(OSError, AttributeError, ValueError):  # what could not be written must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(2)


def main(arguments: list[str] | None = None) -> None:
    """The command `localmoe`; ends by SystemExit: 0, 2 for what the user can mend, 1 for a bug, 130 after Ctrl+C."""
    words = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # absent, or replaced by something that is no text file
            stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")  # type: ignore[union-attr]
    try:
        with pressed_again():
            app(words, prog_name="localmoe")
        sys.stdout.flush()
    except LocalMoeError as error:
        give_up(str(error))
    except OSError as error:  # a full disk, a device that went away: not ours to mend, and no bug
        give_up(f"{error.filename or 'the output'}: {error.strerror or error}")
    except MemoryError:
        give_up("memory ran out; a smaller --context needs less")
    except Exception as error:
        debug = "--debug" in words or os.environ.get("LOCALMOE_DEBUG", "0") != "0"
        if debug:
            traceback.print_exc()
        hint = "" if debug else " (localmoe --debug … shows where)"
        print(f"localmoe: sorry, this is a bug: {error!r}{hint}", file=sys.stderr)
        sys.exit(1)
