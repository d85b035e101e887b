"""A sampler is a plan, and a plan is a table: rows (``plan.row``) of float64 numbers, from noise to image."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

from fastdiff.checks import check_finite_number
from fastdiff.files import atomic_write, check_writable
from fastdiff.pictures import html
from fastdiff.plan.provenance import Provenance
from fastdiff.plan.reuse import check_sources, reused
from fastdiff.plan.row import SLOTS, TERMS, Reuse, Row
from fastdiff.plan.text import from_json, table_text, to_json

__all__ = ["COLUMNS", "SLOTS", "TERMS", "Plan", "Row", "guidance_weights"]

COLUMNS = (
    "t", "next_c_in", "w0", "w1", "w2", "p", "q", "clip", "scale",
    *(f"x.{term}" for term in TERMS), *(f"anchor.{term}" for term in TERMS), *(f"slot.{term}" for term in TERMS),
    "read0", "read1", "read2", "write", "keeps_anchor", "log_min", "log_max", "known_alpha", "known_sigma",
    "draw", "stream", "calls_model",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Plan:
    """The rows of one sampling run, from noise to image, and what the run needs to know beside them.

    Two plans are equal where their rows are, their kind of t, and the other arguments but ``provenance``.

    Args:
        rows: the rows, in order; row i's noise has draw i.
        name: the sampler's name, for messages.
        init_sigma: x_T = init_sigma · z.
        learned_variance: whether the network returns twice the channels, the second half being its variance.
        provenance: of a learned plan, which network it was learned for, and how; ``sample`` warns of another one.

    Attributes:
        timesteps: t of every row.
        reads_variance: whether some row draws with the learned variance; log_variance=(0, 0) leaves it unread.
        reused: what some rows take again, "output" or "deep" or both.
    """

    rows: tuple[Row, ...]
    name: str = "custom"
    init_sigma: float = 1.0
    learned_variance: bool = False
    provenance: Provenance | None = None
    timesteps: tuple[float, ...] = field(init=False)
    reads_variance: bool = field(init=False)
    reused: frozenset[Reuse] = field(init=False)
    _hash: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.rows, Row) or not isinstance(self.rows, Iterable):
            raise TypeError(f"rows must be a sequence of Row; got {type(self.rows).__name__}")
        object.__setattr__(self, "rows", tuple(self.rows))
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a str; got {type(self.name).__name__}")
        check_finite_number("init_sigma", self.init_sigma)
        if not isinstance(self.learned_variance, bool):
            raise TypeError(f"learned_variance must be a bool; got {type(self.learned_variance).__name__}")
        if self.provenance is not None and not isinstance(self.provenance, Provenance):
            raise TypeError(f"provenance must be a Provenance or None; got {type(self.provenance).__name__}")
        if not self.rows:
            raise ValueError("a plan needs at least one row")
        if len(self.rows) >= 1 << 24:
            raise ValueError(f"a plan has at most 2**24 - 1 rows; got {len(self.rows)}")
        for i, row in enumerate(self.rows):
            if not isinstance(row, Row):
                raise TypeError(f"rows must be Row; number {i} is {type(row).__name__}")
            if self.learned_variance and row.calls_model and row.uses("z") and row.log_variance is None:
                raise ValueError(f"row {i} draws noise under learned variance but has no log_variance")
        object.__setattr__(self, "timesteps", tuple(row.t for row in self.rows))
        reads = self.learned_variance and any(any(row.log_variance or ()) for row in self.rows)
        object.__setattr__(self, "reads_variance", reads)
        object.__setattr__(self, "reused", frozenset(row.reuse for row in self.rows if row.reuse))
        if self.reused:
            check_sources(self.rows)
        object.__setattr__(self, "_hash", hash((self.timesteps, self.init_sigma, self.learned_variance)))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Plan):
            return NotImplemented
        mine, others = ((p.name, p.init_sigma, p.learned_variance, p.rows, p.integer_timesteps) for p in (self, other))
        return mine == others

    def __hash__(self) -> int:
        return self._hash

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def __repr__(self) -> str:
        return f"Plan(name={self.name!r}, rows={len(self)})"

    def __str__(self) -> str:
        """An aligned table of the rows; of a long plan the middle is left out."""
        return table_text(self.rows, self.name, self.init_sigma, self.learned_variance)

    def _repr_html_(self) -> str:
        return html.of_plan(self)

    def plot(self) -> Any:
        """A matplotlib figure of the levels, the coefficients and the noise (``plan.plot.figure``)."""
        from fastdiff.plan.plot import figure

        return figure(self)

    # ---- kept as text

    def to_json(self) -> str:
        """The plan as JSON (format "fastdiff.plan"), which ``from_json`` gives back with every float64 to the bit."""
        return to_json(self.rows, self.name, self.init_sigma, self.learned_variance, self.provenance)

    @staticmethod
    def from_json(text: str | bytes) -> Plan:
        """The plan that ``to_json`` wrote. Raises ValueError, saying what is wrong, for any other text."""
        return Plan(**from_json(text))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write ``to_json`` to a file, whole or not at all; returns its path. Raises OSError."""
        path = check_writable(path, suffix=".json")
        with atomic_write(path) as file:
            file.write(self.to_json().encode())
        return path

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """The plan of a file that ``save`` wrote. Raises OSError, or ValueError naming the file and what is wrong."""
        try:
            return Plan.from_json(Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    # ---- what a run needs to know

    @cached_property
    def integer_timesteps(self) -> bool:
        """Whether every t is an int, an index, so that the network is given int64 timesteps.

        It is the rows' kind of number that says so, never its value: a flow's T·σ is a float where it happens to be
        whole, too.
        """
        return all(isinstance(t, Integral) for t in self.timesteps)

    @cached_property
    def slots_used(self) -> tuple[int, ...]:
        """The numbers of the history slots that some row reads or writes."""
        used = {row.write for row in self.rows if row.write is not None}
        return tuple(sorted(used | {slot for row in self.rows for slot in row.reads}))

    @cached_property
    def uses_anchor(self) -> bool:
        return any(row.anchor is not None or row.uses("anchor") for row in self.rows)

    @cached_property
    def shows_x(self) -> bool:
        """Whether every row shows the network the state itself, not scaled by c_in."""
        return all(row.c_in == 1 for row in self.rows)

    @cached_property
    def uses_gradient(self) -> bool:
        return any(row.uses("g") for row in self.rows)

    @cached_property
    def noisy_rows(self) -> tuple[int, ...]:
        """The numbers of the rows whose x' is drawn, noise being a part of it: those that have a log-density."""
        return tuple(i for i, row in enumerate(self.rows) if row.x.get("z"))

    @cached_property
    def needs(self) -> tuple[frozenset[int | str], ...]:
        """What of the rows before it each row and those after it read: numbers of slots, "anchor", "output", "deep"."""
        needs, needed = [], set[int | str]()
        for row in reversed(self.rows):
            needed -= {"anchor"} if row.anchor is not None else set()
            needed -= {row.write} if row.write is not None else set()
            if row.runs_network:
                needed -= {"output"}
            if row.runs_network and row.reuse is None:
                needed -= {"deep"}
            needed |= {slot for k, slot in enumerate(row.reads) if row.uses(f"slot{k}")}
            needed |= {"anchor"} if row.uses("anchor") else set()
            needed |= {row.reuse} if row.reuse is not None else set()
            needs.append(frozenset(needed))
        return tuple(reversed(needs))

    @cached_property
    def entries(self) -> tuple[int, ...]:
        """The rows at which a run can begin: none from there on reads what rows before it made: a slot, the anchor, an
        output, deep features.
        """
        return tuple(i for i, needed in enumerate(self.needs) if not needed)

    @cached_property
    def calls(self) -> int:
        """How many rows call the whole network."""
        return sum(row.calls_model and row.reuse is None for row in self.rows)

    @cached_property
    def branch(self) -> int:
        """The branch of the rows that reuse deep features, which all have the same; 0 where there is none."""
        return max(row.branch for row in self.rows)

    # ---- reused calls

    def reuse(
        self, rows: Sequence[int] | None = None, *, every: int | None = None, kind: Reuse = "output", branch: int = 0
    ) -> Plan:
        """The plan in which some rows take the network's last output, or its last deep features, instead of a call.

            plan = fastdiff.samplers.ddim(schedule, 50).reuse(every=3)               # 17 calls of the network
            plan = fastdiff.samplers.ddim(schedule, 50).reuse(every=3, kind="deep")  # 17 calls and 33 shallow ones

        Every other number of the rows stays as it is. An output is taken as the network returned it, of both calls
        under guidance, whatever it means at the other level: this suits epsilon better than what depends on the level,
        as v_prediction does. Deep features are those of DeepCache (Ma, Fang & Wang 2024, Section 3.2) and need a
        network that offers them (``sampling.reuse``). A run, or an image-to-image one, begins at a row of ``entries``,
        which no reusing row is.

        Args:
            rows: the numbers of rows that reuse; others stay as they are.
            every: instead, of the rows that call the network one in ``every`` calls it, from the first one on, and the
                others reuse (1:N in the paper). 1 takes every reuse away.
            kind: "output" or "deep".
            branch: of deep rows, the paper's skip branch (``Row.branch``).

        Raises:
            TypeError, ValueError: for rows that there are not or that have no call, for a row without an earlier call
                to take from, the first one above all, and for two branches in one plan.
        """
        # What was measured of a learned plan does not hold of this one.
        return replace(self, rows=reused(self.rows, rows, every, kind, branch), provenance=None)

    def table(self, guidance: tuple[Any, ...] = ()) -> torch.Tensor:
        """The rows as a float64 CPU tensor [rows, 48] with the columns ``COLUMNS``; do not write to it.

        ``guidance`` holds the weights of the network's outputs (see ``guidance_weights``), or such a tuple a row.
        """
        return _table(self, guidance)

    def device_table(self, guidance: tuple[Any, ...] = ()) -> torch.Tensor:
        """``table`` rounded once to float32, as kernels read it; ValueError where a number is beyond float32."""
        return _device_table(self, guidance)


@lru_cache(maxsize=64)
def _table(plan: Plan, guidance: tuple[Any, ...]) -> torch.Tensor:
    by_row = guidance if guidance and isinstance(guidance[0], tuple) else (guidance or (1.0,),) * len(plan.rows)
    rows = []
    for i, row in enumerate(plan.rows):
        following = plan.rows[i + 1] if i + 1 < len(plan.rows) else None
        weights = [*by_row[i], 0.0, 0.0][:3]
        rows.append(
            [row.t, following.c_in if following else 1.0, *weights, row.p, row.q, row.clip, row.scale]
            + [(c or {}).get(term, 0.0) for c in (row.x, row.anchor, row.slot) for term in TERMS]
            + [*row.reads, -1.0, -1.0, -1.0][:3]
            + [-1.0 if row.write is None else row.write, float(row.anchor is not None)]
            + [*(row.log_variance or (0.0, 0.0))]
            + ([following.alpha, following.sigma] if following else [1.0, 0.0])
            + [i, row.stream, float(row.calls_model)]
        )
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


@lru_cache(maxsize=64)
def _device_table(plan: Plan, guidance: tuple[Any, ...]) -> torch.Tensor:
    return rounded(plan.table(guidance), f"the plan {plan.name!r}")


def rounded(table: torch.Tensor, whose: str = "the plan") -> torch.Tensor:
    """A plan's table in float32; ValueError where a number is beyond it."""
    result = table.to(torch.float32)
    beyond = result.isinf() & table.isfinite()
    if bool(beyond.any()):
        row, column = (int(number) for number in beyond.nonzero()[0])
        raise ValueError(f"{whose} cannot run in float32: {COLUMNS[column]} of row {row} is {table[row, column]:g}")
    return result


def guidance_weights(scale: float | Sequence[float]) -> tuple[float, ...]:
    """The weights of the network's outputs under classifier-free guidance.

    A number s: outputs (unconditional u, conditional c), u + s·(c − u) (Ho & Salimans 2022, in the convention where 1
    is no guidance). A pair (s_T, s_I): outputs e(∅,∅), e(I,∅), e(I,T) of InstructPix2Pix (Brooks et al. 2023,
    Equation 3). Raises ValueError where a scale is not finite.
    """
    if isinstance(scale, Sequence) and not isinstance(scale, str):
        scales = tuple(map(_scale, scale))
    else:
        scales = (_scale(scale),)
    if len(scales) == 1:
        return (1.0 - scales[0], scales[0])
    if len(scales) == 2:
        text, image = scales
        return (1.0 - image, image - text, text)
    raise ValueError(f"guidance_scale must be a number or a pair; got {len(scales)} numbers")


def _scale(scale: Any) -> float:
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"guidance_scale must be a number or a pair of numbers; got {scale!r}")
    return float(check_finite_number("guidance_scale", scale))
