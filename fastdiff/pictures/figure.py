"""matplotlib's figure, made without pyplot, whose windows and global state no library should touch."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any


def new_figure(width: float, height: float) -> Any:
    """An empty ``matplotlib.figure.Figure`` of inches, which notebooks display; ImportError names the extra."""
    return _figure_class()(figsize=(width, height), layout="constrained")


@lru_cache(maxsize=1)
def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots are drawn by matplotlib: pip install "fastdiff-torch[plot]"') from error

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=100)
            return file.getvalue()

    return NotebookFigure
