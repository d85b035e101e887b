"""Run a gallery's calls and write its folder: index.html and the pictures that it names, nothing from elsewhere."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import torch

import fastdiff
from fastdiff.files import atomic_write, check_writable, remove_leftovers
from fastdiff.gallery.sections import SECTIONS, Section
from fastdiff.images import save_gif, save_grid
from fastdiff.text.pipeline import Pipeline

KIND = "StableDiffusionPipeline"
INDEX, NAMES = "index.html", r"index\.html|picture-\d+-\d+-\d+\.(?:png|gif)"
MARK = '<meta name="generator" content="fastdiff gallery">'
WIDTH = 112  # pixels that smaller pictures are enlarged to, by a whole factor
LEFT_OUT = "Left out: no model that edits by instruction was given (--edit-model)."
HEAD = Path(__file__).with_name("head.html")


def write_gallery(
    pipe: Pipeline, out: str | os.PathLike[str], *, editor: Pipeline | None = None, quick: bool = False,
    loading: str = "", told: Callable[[str], object] = lambda title: None,
) -> Path:  # fmt: skip
    """Draw a gallery of a model into a folder; returns its page.

    The page is written again after each section, once the section's pictures are there: it can be looked at while it
    grows, and is whole whenever the run ends.

    Args:
        pipe: what ``fastdiff.load`` returned of a model that draws from prompts.
        out: the folder: a new one, an empty one, or an earlier gallery, whose pictures are replaced.
        editor: a model that edits by instruction; None leaves that section out, and says so.
        quick: two of everything, in four steps.
        loading: the Python that made ``pipe`` and ``editor``, to be shown first.
        told: is given each section's title before it is drawn.

    Raises:
        ValueError: the models draw in another way. FileExistsError: the folder holds something else. OSError: it
            cannot be written.
    """
    check_pipelines(pipe, editor)
    out = prepare(Path(out))
    given = {"pipe": pipe, "editor": editor, "fastdiff": fastdiff, "torch": torch}
    parts: list[str] = []
    _write(out, pipe, loading, parts)
    for number, section in enumerate(SECTIONS):
        told(section.title)
        parts.append(f'<h2 id="{number}">{section.title}</h2>')
        if "editor(" in section.code and editor is None:
            parts.append(f"<p>{LEFT_OUT}</p>")
        else:
            parts += [f"<p>{section.text}</p>", *_rows(section, number, out, given, quick)]
        _write(out, pipe, loading, parts)
    return out / INDEX


def check_pipelines(pipe: Any, editor: Any) -> None:
    """ValueError for models that the gallery's calls are not meant for."""
    if not isinstance(pipe, Pipeline) or type(pipe.pipe).__name__ != KIND or pipe.edits or pipe.fills:
        raise ValueError(f"model must draw from prompts, as a {KIND} does; got {pipe!r}")
    if pipe.size is None:
        raise ValueError("model must say how large its pictures are: its unet's config has no sample_size")
    if editor is not None and (not isinstance(editor, Pipeline) or not editor.edits or editor.size != pipe.size):
        raise ValueError(f"edit_model must edit by instruction, pictures of {pipe.size} pixels; got {editor!r}")


def prepare(out: Path) -> Path:
    """Make the folder, or clear an earlier gallery's, once it is known that nothing else is in it."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out must be a folder; {out} is a file")
    found = sorted(path.name for path in out.iterdir()) if out.exists() else []
    own = INDEX in found and MARK in (out / INDEX).read_text(encoding="utf-8", errors="replace")
    ours = re.compile(rf"{NAMES}|\.(?:{NAMES})\.[0-9a-f]{{16}}\.tmp")
    if foreign := [name for name in found if not own or not ours.fullmatch(name)]:
        raise FileExistsError(f"{out} holds {foreign[0]}, which is no gallery's: give a new or an empty folder")
    out.mkdir(exist_ok=True)
    check_writable(out / INDEX)
    remove_leftovers(out, NAMES)
    for name in found:
        if name != INDEX:  # by which the folder is known, until the new page takes its place
            (out / name).unlink(missing_ok=True)
    return out


def _rows(section: Section, number: int, out: Path, given: dict[str, Any], quick: bool) -> list[str]:
    """Run a section's calls and write its pictures; its rows as HTML."""
    rows = []
    for place, (label, names, code) in enumerate(section.rows(given["pipe"].size, quick=quick)):
        made = dict(given)
        exec(compile(code, section.title, "exec"), made)  # what the page shows is what ran
        film, figures = made.get("film"), []
        for i, name in enumerate(names):
            path = out / f"picture-{number}-{place}-{i}.{'png' if film is None else 'gif'}"
            if film is None:
                save_grid(path, made["images"][i : i + 1], scale=1)
            else:
                save_gif(path, [frame[i : i + 1] for frame in film], scale=1)
            about = escape(f"{name}: {f'images[{i}]' if film is None else f'[{i}] of each frame of film'} below")
            width = given["pipe"].size * max(1, round(WIDTH / given["pipe"].size))
            image = f'<img src="{path.name}" width="{width}" alt="{about}" title="{about}">'
            figures.append(f"<figure>{image}<figcaption>{escape(name)}</figcaption></figure>")
        drawn = "\n".join(figures)
        rows.append(
            f"<article>\n<h3>{escape(label)}</h3>\n<div>\n{drawn}\n</div>\n<pre>{escape(code)}</pre>\n</article>"
        )
    return rows


def _write(out: Path, pipe: Pipeline, loading: str, parts: list[str]) -> None:
    """The page of the sections that there are."""
    links = " ".join(f'<a href="#{i}">{section.title}</a>' for i, section in enumerate(SECTIONS))
    about = f"{escape(repr(pipe))}, fastdiff {fastdiff.__version__}."
    how = "Under each row is the Python that drew it, which goes after the lines here; one click selects it."
    top = f"<h1>fastdiff gallery</h1>\n<p>{about} {how}</p>\n<pre>{escape(loading)}</pre>\n<nav>{links}</nav>"
    with atomic_write(out / INDEX) as file:
        file.write("\n".join([HEAD.read_text(encoding="utf-8") + top, *parts, "</body>\n</html>\n"]).encode())
