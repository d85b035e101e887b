"""The application that the commands register with, and how their errors are told."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

app = typer.Typer(
    name="fastdiff",
    help="Sample images from diffusion models, fast and exactly reproducible.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would take "[default: …]" in a help text for markup, and drop it
)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors are one line on standard error and exit code 2, and whose Ctrl-C is exit code 130."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None

    return app.command()(run)
