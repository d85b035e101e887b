"""What a run hands out after a row, and takes to go on from there; in a file, too."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastdiff.files import atomic_write, check_writable, parse_json
from fastdiff.noise import NoiseKey
from fastdiff.pictures import html
from fastdiff.plan.plan import Plan
from fastdiff.plan.row import SLOTS
from fastdiff.schedules.level import Level

FORMAT = "fastdiff.state"
VERSION = 1


@dataclass(frozen=True)
class State:
    """The state of a run before its first row or after a row: what ``resume=`` needs to go on, to the bit.

    ``save`` and ``load`` keep one in a file (``torch.load`` takes no pickled one as ``weights_only``).

    Attributes:
        x: float32 [B, …].
        x0: x̂_0 of the last network call, like x; None before the first one.
        anchor: the saved x, or None where the plan has none.
        slots: the history: four entries, tensors or None.
        row: the number of the plan's next row.
        output, deep: what rows that reuse take (``Plan.reuse``): float32 [B, …] or, under guidance, the outputs of
            every call of a row one after the other; the network's deep features likewise. None where the plan has no
            use for it.
        level: what x is and the next row begins with, x = level.alpha·x_0 + level.sigma·ε, and the timestep level.t;
            None after the last row.
        plan, noise: what the state belongs to, as text: the plan's name and fingerprint, and whose noise it has.
            ``resume=`` refuses a state of another plan or of another seed; None leaves that unchecked.
        log_prob: under ``return_log_prob=True`` log p(x' | x) of each row before ``row``, float32 [row, B]: the sum
            over an image's elements; 0 where the row draws nothing or was not run. Else None.
    """

    x: Tensor
    x0: Tensor | None
    anchor: Tensor | None
    slots: tuple[Tensor | None, ...]
    row: int
    level: Level | None = None
    plan: str | None = None
    noise: str | None = None
    log_prob: Tensor | None = None
    output: Tensor | None = None
    deep: Tensor | None = None

    def __repr__(self) -> str:
        return html.words_of_state(self)

    def _repr_html_(self) -> str:
        return html.of_state(self)

    @property
    def t(self) -> float | None:
        """The timestep of the next row; None after the last one."""
        return None if self.level is None else self.level.t

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the state to a file of safetensors, whole or not at all; returns its path.

        The tensors are named x, x0, anchor, output, deep, slots.0 … slots.3 and log_prob; what is no tensor is JSON in
        the file's metadata.
        Raises ValueError for a name that does not end in .safetensors, OSError where it cannot be written.
        """
        path = check_writable(path, suffix=".safetensors")
        named = {"x": self.x, "x0": self.x0, "anchor": self.anchor, "output": self.output, "deep": self.deep}
        named["log_prob"] = self.log_prob
        named |= {f"slots.{i}": slot for i, slot in enumerate(self.slots)}
        tensors = {name: t.detach().to("cpu").contiguous().clone() for name, t in named.items() if t is not None}
        record = {
            "format": FORMAT, "version": VERSION, "row": self.row, "plan": self.plan, "noise": self.noise,
            "level": None if self.level is None else asdict(self.level), "channels_last": _is_channels_last(self.deep),
        }  # fmt: skip
        with atomic_write(path) as file:
            file.write(safetensors.torch.save(tensors, {FORMAT: json.dumps(record)}))
        return path

    @staticmethod
    def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> State:
        """The state of a file that ``save`` wrote, on a device. Raises OSError, or ValueError naming the file."""
        path = Path(path)
        path.stat()  # an OSError that names it
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
                text = (file.metadata() or {}).get(FORMAT)
        except SafetensorError as error:
            raise ValueError(f"{path} is no file of safetensors: {error}") from None
        if text is None:
            raise ValueError(f"{path} holds no state of fastdiff's: its metadata lack {FORMAT!r}")
        try:
            record = msgspec.convert(parse_json(text), _Record)
        except (ValueError, msgspec.ValidationError) as error:
            raise ValueError(f"{path} holds a damaged state: {error}") from None
        if record.version != VERSION:
            raise ValueError(f"{path} is a state of version {record.version}; this fastdiff reads version {VERSION}")
        if "x" not in tensors:
            raise ValueError(f"{path} holds a damaged state: it has no x")
        if record.channels_last and "deep" in tensors:  # on the layout depends how a network rounds
            tensors["deep"] = tensors["deep"].contiguous(memory_format=torch.channels_last)
        slots = tuple(tensors.get(f"slots.{i}") for i in range(SLOTS))
        return State(
            tensors["x"], tensors.get("x0"), tensors.get("anchor"), slots, record.row, record.level, record.plan,
            record.noise, tensors.get("log_prob"), tensors.get("output"), tensors.get("deep"),
        )  # fmt: skip


class _Record(msgspec.Struct):
    version: int
    row: int
    plan: str | None
    noise: str | None
    level: Level | None
    channels_last: bool = False  # deep's memory format, which the file does not have


def _is_channels_last(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


@lru_cache(maxsize=32)
def plan_identity(plan: Plan) -> str:
    """A plan in a word: its name, its length, and a fingerprint of its numbers."""
    digest = hashlib.sha256(plan.table().numpy().tobytes())
    digest.update(repr((float(plan.init_sigma), plan.learned_variance, plan.integer_timesteps)).encode())
    if any(row.reuse for row in plan):
        digest.update(repr([(row.reuse, row.branch) for row in plan]).encode())
    return f"{plan.name}, {len(plan)} rows, {digest.hexdigest()[:16]}"


def noise_identity(key: NoiseKey, batch: int) -> str:
    """Whose noise a batch has: its seeds and the numbers of its samples. Reads the device, where they are tensors."""
    seeds, samples = key.lists(batch)
    if len(set(seeds)) <= 1 and all(b == a + 1 for a, b in pairwise(samples)):
        return f"seed {seeds[0]}, images {samples[0]} to {samples[-1]}" if seeds else "no images"
    text = ", ".join(map(str, seeds))
    return f"seeds {text}" if not any(samples) else f"seeds {text}, images {', '.join(map(str, samples))}"


def check_belongs(state: State, plan: Plan, noise: str) -> None:
    """ValueError where a state is of another plan, or of other noise."""
    for what, theirs, ours in (("plan", state.plan, plan_identity(plan)), ("noise", state.noise, noise)):
        if theirs is not None and theirs != ours:
            raise ValueError(
                f"resume is a state of another run: its {what} is {_short(theirs)}, this run's is {_short(ours)}"
            )


def _short(text: Any) -> str:
    text = str(text)
    return repr(text if len(text) <= 100 else text[:97] + "…")
