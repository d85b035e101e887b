"""``fastdiff info``."""

from __future__ import annotations

import typer

from fastdiff.cli.app import command


@command
def info() -> None:
    """Show what was built, and which kernels run here."""
    from fastdiff.info import report

    typer.echo(report())
