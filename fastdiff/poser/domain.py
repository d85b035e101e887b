"""The emoji's commands: what each asks for, how it is worded, and how a request falls into commands.

A goal is a dict from factor to value: {"tone": "dark"}. The tone "" is yellow, as in the data.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from fastdiff.poser.records import Critique, Spec
from fastdiff.training.captioned import wordings
from fastdiff.training.edits import instructions

Goal = dict[str, str]
TONES, STYLES = ("", "light", "medium-light", "medium", "medium-dark", "dark"), ("flat", "fluent", "noto", "twemoji")
SUBJECTS = ("cook", "detective", "elf", "farmer", "firefighter", "guard", "judge", "mermaid", "ninja", "pilot",
            "singer", "teacher")  # fmt: skip
_SPLIT = re.compile(r"\s*[;\n]\s*|\.\s+|,?\s+(?:and\s+)?then\s+|,\s+and\s+", re.IGNORECASE)
_FINER = re.compile(r"\s*,\s*|\s+and\s+", re.IGNORECASE)
_LEADING = re.compile(r"^(?:\W*\b(?:and|then)\b)+[\s,]*", re.IGNORECASE)
_QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|«[^»]*»")
BY_INSTRUCTION = ("edit", "edits", "diffusers-edit", "simulated-edit")  # kinds of experts; others are told captions
HELD_OUT = 5  # one cell in so many is kept from training


class Domain:
    """Subjects, tones and styles, and the grammar of commands about them.

    values: by factor ("subject", "tone", "style"), all of its values.
    """

    def __init__(self, values: Mapping[str, Sequence[str]] | None = None) -> None:
        self.values = dict(values or {"subject": SUBJECTS, "tone": TONES, "style": STYLES})
        tones = _any(tone or "yellow" for tone in self.values["tone"])
        styles = _any(self.values["style"])
        self._tone = re.compile(rf"\b({tones})\s+skin(?:\s+tone)?\b|\bskin(?:\s+tone)?(?:\s+to)?\s+({tones})\b", re.I)
        self._style = re.compile(rf"\b({styles})\s+style\b|\bstyle\s+to\s+({styles})\b", re.I)
        self._subject = re.compile(rf"(?<![\w-])({_any(self.values['subject'])})(?![\w-])", re.I)
        self._goals = lru_cache(1 << 14)(self._goal)  # commands come again and again

    @classmethod
    def of_rows(cls, rows: Iterable[Mapping[str, str]]) -> Domain:
        """The values that rows of the data set have."""
        rows = list(rows)
        return cls({name: tuple(sorted({row[name] for row in rows})) for name in ("subject", "tone", "style")})

    def goal(self, command: str) -> Goal:
        """What a command asks for; empty where the grammar does not know it."""
        return dict(self._goals(command))

    def _goal(self, command: str) -> Goal:
        found, rest = {}, _QUOTED.sub(" ", command)
        for name, pattern in (("tone", self._tone), ("style", self._style), ("subject", self._subject)):
            if match := pattern.search(rest):
                value = next(filter(None, match.groups())).lower()
                found[name] = "" if (name, value) == ("tone", "yellow") else value
                rest = rest[: match.start()] + " , " + rest[match.end() :]
        return found

    def goals(self, commands: Iterable[str]) -> Goal:
        """What several commands ask for together; a later one prevails."""
        return {name: value for command in commands for name, value in self.goal(command).items()}

    def split(self, request: str) -> list[str]:
        """The commands of a request, in order: "draw a pilot, then make the skin dark, and draw it in noto style".

        What is in quotation marks, and subjects' own names, are not taken apart. Raises TypeError for what is no str,
        ValueError for a request without a word.
        """
        if not isinstance(request, str):
            raise TypeError(f"request must be a str; got {type(request).__name__}")
        kept: list[str] = []

        def hide(match: re.Match[str]) -> str:
            kept.append(match.group())
            return f"\0{len(kept) - 1}\0"

        hidden = self._subject.sub(hide, _QUOTED.sub(hide, request.replace("\0", " ")))
        parts = [part for piece in _SPLIT.split(hidden) for part in self._finer(piece, kept)]
        commands = [_LEADING.sub("", _shown(part, kept)).strip(" ,.;") for part in parts]
        commands = [command for command in commands if re.search(r"\w", command)]
        if not commands:
            raise ValueError(f"request is empty: it must say what to draw; got {request!r}")
        return commands

    def _finer(self, piece: str, kept: Sequence[str]) -> list[str]:
        """A piece taken apart at commas and "and" too, where the grammar knows every part."""
        parts = [part for part in _FINER.split(piece) if part.strip()]
        return parts if len(parts) > 1 and all(self.goal(_shown(part, kept)) for part in parts) else [piece]

    def kind(self, command: str) -> str:
        """The factors that a command changes, "text" where it has quotation marks, joined by "+"; "other" for none."""
        return "+".join([*self.goal(command), *(["text"] if quoted(command) else [])]) or "other"

    def caption(self, goal: Mapping[str, str], attempt: int = 0) -> str:
        """A goal as what a model of captions was trained on; another wording an attempt."""
        if len(goal) == len(self.values):
            ways: Sequence[str] = wordings(dict(goal))
        else:
            # Yellow goes without saying beside a subject, as in the data: models of its captions lack the word.
            said = "tone" in goal and (goal["tone"] or "subject" not in goal)
            tone = f"{goal['tone'] or 'yellow'} skin" if said else ""
            style = f"{goal['style']} style" if "style" in goal else ""
            subject = f"a {goal['subject']}" if "subject" in goal else ""
            ways = [", ".join(filter(None, parts)) for parts in ((subject, tone, style), (style, subject, tone))]
        return ways[attempt % len(ways)]

    def instruction(self, goal: Mapping[str, str], attempt: int = 0) -> str:
        """A goal as an instruction to an editor; another wording an attempt."""
        ways = [instructions(dict(goal), [name]) for name in goal]
        return " and ".join(each[attempt % len(each)] for each in ways)

    def word(self, command: str, expert: Spec, done: Sequence[str], attempt: int, critique: Critique | None) -> str:
        """What to tell an expert; what the grammar does not know goes on as it stands, with the critic's suggestion.

        done: the commands that came before, for an expert that is given them merged. attempt: failures of this
        command so far, of which the last one's critique says what was wrong.
        """
        goal = self.goal(command)
        if not goal or '"' in command:
            asked = ", then ".join([*done, command]) if expert.given == "merged" else command
            return f"{asked}. {critique.suggestion}" if critique and critique.suggestion else asked
        if expert.kind in BY_INSTRUCTION and expert.given == "command":
            wrong = {issue.partition(":")[0] for issue in critique.issues} if critique else set()
            left = {name: value for name, value in goal.items() if name in wrong}  # what was right is not asked again
            return self.instruction(left or goal, attempt)
        merged = {**self.goals(done), **goal} if expert.given == "merged" else goal
        return self.caption(merged, attempt)

    def requests(self, number: int, seed: int, *, held_out: bool = False, commands: int | None = None) -> list[str]:
        """Compound requests of one to three commands (or as many as asked), the first of which draws.

        held_out: about cells (subject, tone, style) that are kept from training, one in five; else about the others.
        """
        rng = random.Random(f"{seed} {held_out}")
        found: list[str] = []
        while len(found) < number:
            cell = {name: rng.choice(values) for name, values in self.values.items()}
            if (zlib.crc32(" ".join(cell.values()).encode()) % HELD_OUT == 0) != held_out:
                continue
            edits = rng.sample(("tone", "style"), (commands or rng.randint(1, 3)) - 1)
            parts = [f"draw a {cell['subject']}", *(rng.choice(instructions(cell, [name])) for name in edits)]
            found.append(", then ".join(parts))
        return found


def quoted(command: str) -> list[str]:
    """What stands in quotation marks."""
    return [match[1:-1] for match in _QUOTED.findall(command) if match[1:-1].strip()]


def _any(values: Iterable[str]) -> str:
    return "|".join(re.escape(value) for value in sorted(values, key=len, reverse=True))


def _shown(text: str, kept: Sequence[str]) -> str:
    """Hidden parts put back, of which one may hold another."""
    while "\0" in text:
        text = re.sub("\0(\\d+)\0", lambda match: kept[int(match.group(1))], text)
    return text
