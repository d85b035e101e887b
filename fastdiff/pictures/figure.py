"""matplotlib's figure, made without pyplot, whose windows and global state no library should touch."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastdiff.files import atomic_write, check_writable


def new_figure(width: float, height: float, extra: str = "plot") -> Any:
    """An empty ``matplotlib.figure.Figure`` of inches, which notebooks display; ImportError names the extra."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'plots are drawn by matplotlib: pip install "fastdiff-torch[{extra}]"') from error
    return _displayed(Figure)(figsize=(width, height), layout="constrained")


def save_figure(draw: Callable[[], Any], path: str | os.PathLike[str]) -> Path:
    """Write a figure as a PNG, whole or not at all, once the path is known to do; returns it."""
    path = check_writable(path, suffix=".png")
    drawing = draw()
    with atomic_write(path) as file:
        drawing.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return path


@lru_cache(maxsize=1)
def _displayed(figure: Any) -> Any:
    class NotebookFigure(figure):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=100)
            return file.getvalue()

    return NotebookFigure
