"""A row of a plan: what one step does to the state x, in float64 numbers.

In the order in which it is computed (csrc/common/row.h and ops/update/reference.py do the same):

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from fastdiff.checks import check_finite_number, check_int, check_real, is_finite

TERMS = ("x", "anchor", "x0", "m", "slot0", "slot1", "slot2", "z", "g")
SLOTS = 4
Reuse = Literal["output", "deep"]
KINDS: tuple[str, ...] = get_args(Reuse)


_NUMBERS = ("t", "alpha", "sigma", "p", "q", "scale", "c_in", "log_variance[0]", "log_variance[1]")


@dataclass(frozen=True)
class Row:
    """One network call, or one change of state without a call (``calls_model=False``).

    A row that takes an earlier call's output or deep features again (``reuse``) counts as one with a call, since it has
    an m.

    Args:
        t: the timestep that the network is given. Where every row's is an int the network is given int64, else float32.
        alpha, sigma: the state's level at the row's start, x = alpha·x_0 + sigma·ε.
        x: coefficients of x' by the names in ``TERMS``; a missing name is 0.
        anchor, slot: likewise for anchor' and for the slot ``write``; None where the row does not write it.
        p, q: x̂_0 = p·x + q·m.
        clip, scale: x̂_0 ← scale·clamp(x̂_0, ±clip); a per-sample tensor given at run time takes their place.
        reads: the numbers of the slots that slot0, slot1 and slot2 stand for.
        write: the number of the slot that is written.
        c_in: the network's input is c_in·x.
        log_variance: (log_min, log_max) under learned variance (Nichol & Dhariwal 2021, Equation 15); (0, 0) leaves z
            as it is, whatever the network says.
        stream: the noise's stream; its draw is the row's number in the plan.
        reuse: where the network's output comes from: None, a call of the whole network; "output", the call before,
            whose output is taken again as it was, before guidance; "deep", a call of the shallow layers alone, which
            takes the deep features of the last whole call (DeepCache, Ma et al. 2024).
        branch: of a deep row, how many skip connections beside the first are computed anew: DeepCache's branch, of
            which 0 is the cheapest.
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
    reuse: Reuse | None = None
    branch: int = 0
    reads_terms: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        if self.log_variance is not None:
            if not isinstance(self.log_variance, (tuple, list)) or len(self.log_variance) != 2:
                raise ValueError(f"log_variance must be a pair (log_min, log_max) or None; got {self.log_variance!r}")
            object.__setattr__(self, "log_variance", tuple(self.log_variance))
        numbers = (self.t, self.alpha, self.sigma, self.p, self.q, self.scale, self.c_in, *(self.log_variance or ()))
        for name, value in zip(_NUMBERS, numbers, strict=False):
            check_real(name, value)
        if not all(map(is_finite, numbers)):
            raise ValueError(f"t, alpha, sigma, p, q, scale, c_in and log_variance must be finite; got {numbers}")
        if self.x is None:
            raise TypeError("x must be a mapping of coefficients; got NoneType")
        if isinstance(self.reads, str) or not isinstance(self.reads, Sequence):
            raise TypeError(f"reads must be a tuple of slots' numbers; got {type(self.reads).__name__}")
        slots = [check_int(f"reads[{i}]", slot, -(1 << 63), 1 << 63) for i, slot in enumerate(self.reads)]
        if len(slots) > 3 or not all(0 <= slot < SLOTS for slot in slots):
            raise ValueError(f"reads must name at most three of the slots 0 … {SLOTS - 1}; got {self.reads}")
        if (self.write is None) != (self.slot is None):
            raise ValueError("slot and write go together: give both or neither")
        if self.write is not None:
            check_int("write", self.write, 0, SLOTS - 1)
        check_int("stream", self.stream, 0, (1 << 24) - 1)  # the device's table is float32
        if not isinstance(self.calls_model, bool):
            raise TypeError(f"calls_model must be a bool; got {type(self.calls_model).__name__}")
        if self.variance is not None and check_finite_number("variance", self.variance) < 0:
            raise ValueError(f"variance must be finite and not negative; got {self.variance}")
        check_real("clip", self.clip)
        if not self.clip > 0 or not (self.clip == math.inf or is_finite(self.clip)):
            raise ValueError(f"clip must be positive or infinite; got {self.clip}")
        if self.reuse is not None or self.branch != 0 or type(self.branch) is not int:
            self._check_reuse()
        read = set[str]()
        for name, coefficients in (("x", self.x), ("anchor", self.anchor), ("slot", self.slot)):
            if coefficients is not None:
                read |= self._read_by(name, coefficients)
        object.__setattr__(self, "reads", tuple(slots))
        object.__setattr__(self, "reads_terms", frozenset(read))
        if not self.calls_model and (self.q or "m" in read):
            raise ValueError("a row without a network call has no m: q and the coefficients of m must be 0")

    def _check_reuse(self) -> None:
        if self.reuse is not None and self.reuse not in KINDS:
            raise ValueError(f"reuse must be one of {', '.join(KINDS)}, or None; got {self.reuse!r}")
        if self.reuse is not None and not self.calls_model:
            raise ValueError("a row without a network call has no output to take again: reuse must be None")
        check_int("branch", self.branch, 0, (1 << 24) - 1)
        if self.branch and self.reuse != "deep":
            raise ValueError(f"branch is {self.branch}, but it goes with reuse='deep'; got reuse={self.reuse!r}")

    def _read_by(self, name: str, coefficients: Mapping[str, float]) -> set[str]:
        """The terms that an output's checked coefficients read."""
        if not isinstance(coefficients, Mapping):
            raise TypeError(f"{name} must be a mapping of coefficients; got {type(coefficients).__name__}")
        for term, value in coefficients.items():
            if term not in TERMS:
                raise ValueError(f"{name} has a coefficient of {term!r}; terms are {', '.join(TERMS)}")
            check_finite_number(f"{name}'s coefficient of {term!r}", value)
            if term.startswith("slot") and value and int(term[4]) >= len(self.reads):
                raise ValueError(f"{name} uses {term!r}, but reads names only {len(self.reads)} slots")
        return {term for term, value in coefficients.items() if value}

    def uses(self, term: str) -> bool:
        """Whether any of the row's outputs reads this term."""
        return term in self.reads_terms

    @property
    def runs_network(self) -> bool:
        """Whether the network is called, in whole or its shallow layers."""
        return self.calls_model and self.reuse != "output"

    def is_guided(self, interval: tuple[float, float] | None) -> bool:
        """Whether σ/α lies in the interval (low, high] of guidance; None is everywhere."""
        ratio = self.sigma / self.alpha if self.alpha else math.inf
        return interval is None or interval[0] < ratio <= interval[1]
