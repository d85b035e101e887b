"""The application that the commands register with, and how their errors and warnings are told."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, TextIO

import typer

from fastdiff.version import __version__

app = typer.Typer(
    name="fastdiff",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would take "[default: …]" in a help text for markup, and drop it
)

FAILED, ASKED_WRONGLY = 1, 2
# What names a file or folder that is not what it must be was asked wrongly; a full disk, say, is a failure.
WRONG = (ValueError, TypeError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fastdiff {__version__}")
        raise typer.Exit


@app.callback()
def fastdiff(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Sample images from diffusion models, fast and exactly reproducible."""


def command(target: Any) -> Callable[..., Any]:
    """A command whose errors and warnings are told in words on standard error. target: the function; or the group to
    which the command belongs, as in ``@command(group)``.

    Exit codes: 1, it failed; 2, it was asked wrongly; 128 and the signal's number where one ended it (Ctrl-C: 130).
    """

    if isinstance(target, typer.Typer):
        return lambda function: target.command()(_told(function))
    return app.command()(_told(target))


def _told(function: Callable[..., None]) -> Callable[..., None]:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                function(*args, **kwargs)
            except KeyboardInterrupt as interrupt:
                typer.echo(str(interrupt) or "interrupted", err=True)
                raise typer.Exit(128 + getattr(interrupt, "signal", signal.SIGINT)) from None
            except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
                typer.echo(f"error: {error}", err=True)
                raise typer.Exit(ASKED_WRONGLY if isinstance(error, WRONG) else FAILED) from None

    return run


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str = "",
    lineno: int = 0,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning without the line of code that it came from; on a line of its own if a progress bar is being drawn."""
    kind = "warning" if category is UserWarning else f"warning ({category.__name__})"
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    (typer.echo if tqdm is None else tqdm.write)(f"{kind}: {message}", file=sys.stderr)
