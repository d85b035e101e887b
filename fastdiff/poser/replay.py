"""A run again, offline, from its run.jsonl: as text, as a page, and as transitions to learn from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.files import atomic_write
from fastdiff.poser.ledger import IMAGES, RUN, Begin, End, Line, load_picture, read_lines
from fastdiff.poser.poser import Episode, Poser
from fastdiff.poser.records import Picture, Step

PAGE = Path(__file__).with_name("page.html")


def told(line: Line) -> str:
    """A line of a run in words; "" for one that only keeps a reply."""
    if isinstance(line, Begin):
        return f"{line.request}\n  commands: {'; '.join(line.commands)}"
    if isinstance(line, Step):
        about = "; ".join(line.critique.issues) or "as asked"
        price = "cached" if line.cached else f"{line.cost:g}"
        head = f"  {line.number + 1}. {line.expert}: {line.text or line.command!r}"
        return f"{head}\n     {line.outcome}, score {line.critique.score:.2f} ({about}), cost {price}"
    if isinstance(line, End):
        shown = sum(line.satisfied)
        verdict = f", {shown} of {len(line.satisfied)} commands in the final picture" if line.satisfied else ""
        return f"  {line.ends}{verdict}; cost {line.cost:g}, {line.calls} calls, {line.seconds:.1f} s"
    return ""


def lines_of(run: str | os.PathLike[str]) -> Iterator[Line]:
    """Of a run.jsonl, or of the folder that holds one. FileNotFoundError, ValueError: no such run, or a broken one."""
    path = Path(run) / RUN if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise FileNotFoundError(f"there is no run {path}")
    return read_lines(path)


def replay(run: str | os.PathLike[str]) -> str:
    """What ``fastdiff poser run`` printed, of every run in the file, whose pictures are compared with their hashes."""
    lines = list(lines_of(run))
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    for sha in sorted({line.after for line in lines if isinstance(line, Step) and line.after}):
        load_picture(folder, sha)
    return "\n".join(filter(None, map(told, lines)))


def write_page(run: str | os.PathLike[str]) -> Path:
    """index.html beside a run.jsonl: each run as a strip of pictures with critiques and costs. Returns its path."""
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    parts: list[str] = []
    for line in lines_of(run):
        if isinstance(line, Begin):
            parts.append(f"<h2>{escape(line.request)}</h2>\n<p>{escape('; '.join(line.commands))}</p>\n<section>")
        elif isinstance(line, Step):
            parts.append(figure(line, f"{IMAGES}/{line.after}.png" if line.after else ""))
        elif isinstance(line, End):
            parts.append(f"</section>\n<p>{escape(told(line).strip())}</p>")
    page = PAGE.read_text(encoding="utf-8").replace("<!-- runs -->", "\n".join(parts))
    with atomic_write(folder / "index.html") as file:
        file.write(page.encode())
    return folder / "index.html"


def figure(step: Step, source: str) -> str:
    """A step as HTML. source: of its picture."""
    image = f'<img src="{source}" alt="{escape(step.command)}">' if source else "<p>no picture</p>"
    values = ", ".join(f"{value:.2f}" for value in step.q)
    about = [
        f"<b>{escape(step.expert)}</b> {escape(step.text)}",
        f"{step.outcome}, {step.critique.score:.2f}",
        *map(escape, step.critique.issues),
        f"cost {step.cost:g}{', cached' if step.cached else ''}",
        *([f"q {values}"] if values else []),
    ]
    return f'<figure class="{step.outcome}">{image}<figcaption>{"<br>".join(about)}</figcaption></figure>'


def transitions(lines: Iterable[Line], poser: Poser) -> Iterator[tuple[Tensor, int, float, Tensor, bool, bool]]:
    """(observation, action, reward, next observation, terminated, truncated) of each step, episode after episode.

    Raises ValueError for a step of an expert that the poser lacks.
    """
    episodes: dict[tuple[str, int, int], list[Step]] = {}
    count: dict[tuple[str, int], int] = {}
    for line in lines:
        if isinstance(line, Step):
            which = line.request, line.seed
            count[which] = count.get(which, 0) + (line.number == 0)
            episodes.setdefault((*which, count[which]), []).append(line)
    for steps in episodes.values():
        for i, step in enumerate(steps):
            if step.expert not in poser.names:
                raise ValueError(f"the log's expert {step.expert!r} is none of {', '.join(poser.names)}")
            # Where the log ends in the middle of an episode, that is no end of the task: as if it were truncated.
            cut = i == len(steps) - 1 and step.ends != "done"
            before = _state(poser, (step.command, *step.remaining), step.attempts, step.score, bool(step.before))
            yield before, poser.names.index(step.expert), step.reward, _after(poser, step), step.ends == "done", cut


def _after(poser: Poser, step: Step) -> Tensor:
    if step.outcome != "failed":
        return _state(poser, step.remaining, 0, 0.0, bool(step.after))
    score = step.critique.score if step.after != step.before else step.score
    return _state(poser, (step.command, *step.remaining), step.attempts + 1, score, bool(step.after))


def _state(poser: Poser, todo: Sequence[str], attempts: int, score: float, has_image: bool) -> Tensor:
    picture = Picture(torch.zeros(3, 1, 1), "") if has_image else None
    return poser.observe([Episode("", (), 0, list(todo), picture, attempts=attempts, score=score)])[0]
