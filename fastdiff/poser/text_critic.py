"""A critic of text in pictures, read by rapidocr, whose wheel brings its networks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import Any

import msgspec
from torch import Tensor

from fastdiff.poser.critics import Critic, Previous
from fastdiff.poser.domain import Domain, quoted
from fastdiff.poser.records import Critique
from fastdiff.poser.remote import png

Read = Callable[[Tensor], Sequence[str]]  # the lines of text in a picture [3, H, W]


class TextCritic:
    """What a command has in quotation marks must be read in the picture, and so must what the request has in others, if
    it was there before. All else is rated by another critic; a command of both kinds by both.

    Letters are compared without regard to case and spaces, which readers of text confuse. The score is the share of a
    text's letters that were read in their order, the worst of several texts.
    other: of commands without quotation marks. read: rapidocr where None; ImportError with the command that helps.
    """

    def __init__(self, other: Critic, domain: Domain, read: Read | None = None) -> None:
        self.other, self.domain, self.read, self.price = other, domain, read or rapidocr(), other.price

    def rate(
        self, images: Tensor, commands: Sequence[str], requests: Sequence[str], previous: Previous
    ) -> list[Critique]:
        texts = [self._texts(*each) for each in zip(images, commands, requests, previous, strict=True)]
        # A command of text alone is none that the other critic knows.
        by_other = [i for i, c in enumerate(commands) if not quoted(c) or self.domain.goal(c)]
        rated: dict[int, Critique] = {}
        if by_other:
            told = [commands[i] for i in by_other], [requests[i] for i in by_other], [previous[i] for i in by_other]
            rated = dict(zip(by_other, self.other.rate(images[by_other], *told), strict=True))
        return [_both(rated.get(i), text) for i, text in enumerate(texts)]

    def _texts(self, image: Tensor, command: str, request: str, before: Tensor | None) -> Critique | None:
        """Of texts alone; None where there is none to look for."""
        asked = quoted(command)
        others = [text for text in quoted(request) if text not in asked]
        there = self.read(before) if others and before is not None else ()
        kept = [text for text in others if _share(text, there) == 1]
        if not asked and not kept:
            return None
        lines = self.read(image)
        shares = {text: _share(text, lines) for text in (*asked, *kept)}
        wrong = [text for text, share in shares.items() if share < 1]
        issues = tuple(f"text: {text!r} is not there; what is read is {' '.join(lines)!r}" for text in wrong)
        mend = " and ".join(f'write "{text}"' for text in wrong)
        return Critique(min(shares.values()), not wrong, issues, mend)


def _both(one: Critique | None, other: Critique | None) -> Critique:
    found = [critique for critique in (one, other) if critique is not None]
    issues = tuple(issue for critique in found for issue in critique.issues)
    mend = " and ".join(filter(None, (critique.suggestion for critique in found)))
    return msgspec.structs.replace(min(found, key=lambda c: (c.satisfied, c.score)), issues=issues, suggestion=mend)


def _letters(text: str) -> str:
    return re.sub(r"\s", "", text).casefold()


def _share(text: str, lines: Sequence[str]) -> float:
    """Of a text's letters, those that stand in one line, or in all of them together, in their order."""
    wanted, rows = _letters(text), [_letters(line) for line in lines]
    if not wanted:
        return 1.0
    if any(wanted in row for row in (*rows, "".join(rows))):
        return 1.0
    blocks = [SequenceMatcher(None, wanted, row, autojunk=False).get_matching_blocks() for row in rows]
    return min(max((sum(b.size for b in each) for each in blocks), default=0) / len(wanted), 0.99)


def rapidocr() -> Read:
    """rapidocr's reader. ImportError with the command that helps."""
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError('text in pictures needs rapidocr: pip install "fastdiff-torch[poser,ocr]"') from error
    engine: Any = RapidOCR(params={"Global.log_level": "error"})

    def read(image: Tensor) -> Sequence[str]:
        return tuple(engine(png(image)).txts or ())

    return read
