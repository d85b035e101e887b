"""The prompt of each image of a job of words."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Prompts:
    """Prompt i is image i's.

    prompts: a file with a prompt a line, UTF-8, spaces at the ends left out; or the prompts, as a list. An empty one is
        refused. num: how many are used; None: all. There must be so many.
    """

    def __init__(self, prompts: str | os.PathLike[str] | Sequence[str], num: int | None) -> None:
        named = isinstance(prompts, (str, os.PathLike))
        listed = _lines(Path(prompts)) if named else _checked(prompts)  # type: ignore[arg-type]
        name = os.fspath(prompts) if named else "prompts"  # type: ignore[arg-type]
        if not listed:
            raise ValueError(f"{name} has no prompts")
        if num is not None and len(listed) < num:
            raise ValueError(f"{name} has {len(listed)} prompts, and num is {num}")
        self._listed = listed[:num]
        digest = hashlib.sha256(json.dumps(self._listed).encode())
        self.told = f"{len(self._listed)}, sha256 {digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self._listed)

    def of(self, numbers: range) -> list[str]:
        """The prompts of these images."""
        return self._listed[numbers.start : numbers.stop]


def _lines(path: Path) -> list[str]:
    found = []
    try:
        with open(path, encoding="utf-8-sig") as file:
            for i, line in enumerate(file, 1):
                if not (prompt := line.strip()):
                    raise ValueError(f"{path}, line {i} is empty: a prompt for each image")
                found.append(prompt)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from None
    return found


def _checked(prompts: Any) -> list[str]:
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise TypeError(f"prompts must be a file, or a list of str; got {type(prompts).__name__}")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts[{i}] must be a str; got {type(prompt).__name__}")
        if not prompt.strip():
            raise ValueError(f"prompts[{i}] is empty: a prompt for each image")
        if any("\ud800" <= sign <= "\udfff" for sign in prompt):
            raise ValueError(f"prompts[{i}] is no Unicode text: {prompt!r}")
    return list(prompts)
