"""A sampler is a plan, and a plan is a table: what each step does to the state x, in float64 numbers.

One row, in the order in which it is computed (csrc/common/row.h and ops/update/reference.py do the same):

    m       = the network's output, guided: w0·o0 + w1·o1 + w2·o2 where there are several; then gain·m (per sample)
    x̂_0     = scale · clamp(p·x + q·m, ±clip)
    x'      = Σ coefficient · {x, anchor, x0, m, slot0, slot1, slot2, z, g}
    anchor' = the same over its own coefficients, where the row writes it
    slot'   = the same over its own coefficients, written to slot number ``write``
    x'      ← mask·(α_known·known + σ_known·z_known) + (1 − mask)·x', where there is a mask
    the network's next input = c_in of the next row · x'

z is the noise of (stream, draw); under learned variance it is first multiplied by the network's σ. A term whose
coefficient is 0 is neither read nor added.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from fastdiff.files import atomic_write, check_writable

TERMS = ("x", "anchor", "x0", "m", "slot0", "slot1", "slot2", "z", "g")
SLOTS = 4

COLUMNS = (
    "t", "next_c_in", "w0", "w1", "w2", "p", "q", "clip", "scale",
    *(f"x.{term}" for term in TERMS), *(f"anchor.{term}" for term in TERMS), *(f"slot.{term}" for term in TERMS),
    "read0", "read1", "read2", "write", "keeps_anchor", "log_min", "log_max", "known_alpha", "known_sigma",
    "draw", "stream", "calls_model",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One network call, or one change of state without a call (``calls_model=False``).

    Args:
        t: the timestep that the network is given.
        alpha, sigma: the state's level at the row's start, x = alpha·x_0 + sigma·ε.
        x: coefficients of x' by the names in ``TERMS``; a missing name is 0.
        anchor, slot: likewise for anchor' and for the slot ``write``; None where the row does not write it.
        p, q: x̂_0 = p·x + q·m.
        clip, scale: x̂_0 ← scale·clamp(x̂_0, ±clip); a per-sample tensor given at run time takes their place.
        reads: the numbers of the slots that slot0, slot1 and slot2 stand for.
        write: the number of the slot that is written.
        c_in: the network's input is c_in·x.
        log_variance: (log_min, log_max) under learned variance (Nichol & Dhariwal 2021, Equation 15).
        stream: the noise's stream; its draw is the row's number in the plan.
        variance: σ² of the Gaussian that the row draws from, where a classifier's gradient is to move its mean (times
            the network's own variance, where that is learned); None: it moves x̂_0 and ε
            (``sampling.classifier_guidance``).
    """

    t: float
    alpha: float
    sigma: float
    x: Mapping[str, float]
    p: float = 0.0
    q: float = 0.0
    clip: float = math.inf
    scale: float = 1.0
    anchor: Mapping[str, float] | None = None
    slot: Mapping[str, float] | None = None
    reads: tuple[int, ...] = ()
    write: int | None = None
    c_in: float = 1.0
    log_variance: tuple[float, float] | None = None
    stream: int = 1
    calls_model: bool = True
    variance: float | None = None
    reads_terms: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        for name in ("x", "anchor", "slot"):
            for term, value in (getattr(self, name) or {}).items():
                if term not in TERMS:
                    raise ValueError(f"{name} has a coefficient of {term!r}; terms are {', '.join(TERMS)}")
                if not math.isfinite(value):
                    raise ValueError(f"{name}'s coefficient of {term!r} is {value}; it must be finite")
                if term.startswith("slot") and value and int(term[4]) >= len(self.reads):
                    raise ValueError(f"{name} uses {term!r}, but reads names only {len(self.reads)} slots")
        numbers = (self.t, self.alpha, self.sigma, self.p, self.q, self.scale, self.c_in, *(self.log_variance or ()))
        if not all(math.isfinite(value) for value in numbers):
            raise ValueError(f"t, alpha, sigma, p, q, scale, c_in and log_variance must be finite; got {numbers}")
        if self.variance is not None and not 0 <= self.variance < math.inf:
            raise ValueError(f"variance must be finite and not negative; got {self.variance}")
        if math.isnan(self.clip) or self.clip <= 0:
            raise ValueError(f"clip must be positive or infinite; got {self.clip}")
        if len(self.reads) > 3 or any(not 0 <= slot < SLOTS for slot in self.reads):
            raise ValueError(f"reads must name at most three of the slots 0 … {SLOTS - 1}; got {self.reads}")
        if (self.write is None) != (self.slot is None):
            raise ValueError("slot and write go together: give both or neither")
        if self.write is not None and not 0 <= self.write < SLOTS:
            raise ValueError(f"write must be a slot 0 … {SLOTS - 1}; got {self.write}")
        if not 0 <= self.stream < 1 << 24:  # the device's table is float32
            raise ValueError(f"stream must be in [0, 2**24); got {self.stream}")
        if not self.calls_model and (self.q or any((c or {}).get("m") for c in (self.x, self.anchor, self.slot))):
            raise ValueError("a row without a network call has no m: q and the coefficients of m must be 0")
        read = {term for c in (self.x, self.anchor, self.slot) for term, value in (c or {}).items() if value}
        object.__setattr__(self, "reads_terms", frozenset(read))

    def uses(self, term: str) -> bool:
        """Whether any of the row's outputs reads this term."""
        return term in self.reads_terms

    def is_guided(self, interval: tuple[float, float] | None) -> bool:
        """Whether σ/α lies in the interval (low, high] of guidance; None is everywhere."""
        ratio = self.sigma / self.alpha if self.alpha else math.inf
        return interval is None or interval[0] < ratio <= interval[1]


@dataclass(frozen=True, eq=False)
class Plan:
    """The rows of one sampling run, from noise to image, and what the run needs to know beside them.

    Args:
        rows: the rows, in order; row i's noise has draw i.
        name: the sampler's name, for messages.
        init_sigma: x_T = init_sigma · z.
        learned_variance: whether the network returns twice the channels, the second half being its variance.
    """

    rows: tuple[Row, ...]
    name: str = "custom"
    init_sigma: float = 1.0
    learned_variance: bool = False
    timesteps: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
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
        from fastdiff.plan.text import table_text

        return table_text(self)

    # ---- kept as text

    def to_json(self) -> str:
        """The plan as JSON (format "fastdiff.plan"), which ``from_json`` gives back with every float64 to the bit."""
        from fastdiff.plan.text import to_json

        return to_json(self)

    @staticmethod
    def from_json(text: str | bytes) -> Plan:
        """The plan that ``to_json`` wrote. Raises ValueError, saying what is wrong, for any other text."""
        from fastdiff.plan.text import from_json

        return from_json(text)

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

    @property
    def integer_timesteps(self) -> bool:
        """Whether every t is an integer index, so that the network is given int64 timesteps."""
        return all(float(t).is_integer() for t in self.timesteps)

    @property
    def slots_used(self) -> tuple[int, ...]:
        """The numbers of the history slots that some row reads or writes."""
        used = {row.write for row in self.rows if row.write is not None}
        return tuple(sorted(used | {slot for row in self.rows for slot in row.reads}))

    @property
    def uses_anchor(self) -> bool:
        return any(row.anchor is not None or row.uses("anchor") for row in self.rows)

    @cached_property
    def uses_gradient(self) -> bool:
        return any(row.uses("g") for row in self.rows)

    @cached_property
    def entries(self) -> tuple[int, ...]:
        """The rows at which a run can begin: none from there on reads a slot or an anchor that was written before."""
        entries, needed = [], set[int]()  # −1 stands for the anchor
        for i, row in reversed(list(enumerate(self.rows))):
            needed -= {-1} if row.anchor is not None else set()
            needed -= {row.write}
            needed |= {slot for k, slot in enumerate(row.reads) if row.uses(f"slot{k}")}
            needed |= {-1} if row.uses("anchor") else set()
            if not needed:
                entries.append(i)
        return tuple(reversed(entries))

    def table(self, guidance: tuple[float, ...] = (), interval: tuple[float, float] | None = None) -> torch.Tensor:
        """The rows as a float64 CPU tensor [rows, 48] with the columns ``COLUMNS``; do not write to it.

        ``guidance`` holds the weights of the network's outputs (see ``guidance_weights``); in rows outside of
        ``interval`` (``Row.is_guided``) the last output counts alone.
        """
        return _table(self, guidance, interval)


@lru_cache(maxsize=64)
def _table(plan: Plan, guidance: tuple[float, ...], interval: tuple[float, float] | None) -> torch.Tensor:
    guided = [*guidance, 0.0, 0.0, 0.0][:3] if guidance else [1.0, 0.0, 0.0]
    plain = [*(0.0 for _ in guidance[1:]), 1.0, 0.0, 0.0][:3]
    rows = []
    for i, row in enumerate(plan.rows):
        following = plan.rows[i + 1] if i + 1 < len(plan.rows) else None
        weights = guided if row.is_guided(interval) else plain
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


def guidance_weights(scale: float | Sequence[float]) -> tuple[float, ...]:
    """The weights of the network's outputs under classifier-free guidance.

    A number s: outputs (unconditional u, conditional c), u + s·(c − u) (Ho & Salimans 2022, in the convention where 1
    is no guidance). A pair (s_T, s_I): outputs e(∅,∅), e(I,∅), e(I,T) of InstructPix2Pix (Brooks et al. 2023,
    Equation 3). Raises ValueError where a scale is not finite.
    """
    scales = tuple(float(s) for s in scale) if isinstance(scale, Sequence) else (float(scale),)
    if not all(math.isfinite(s) for s in scales):
        raise ValueError(f"guidance_scale must be finite; got {scale}")
    if len(scales) == 1:
        return (1.0 - scales[0], scales[0])
    if len(scales) == 2:
        text, image = scales
        return (1.0 - image, image - text, text)
    raise ValueError(f"guidance_scale must be a number or a pair; got {len(scales)} numbers")
