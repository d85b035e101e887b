"""Random rows of a plan with every feature, and the plan's formula written out once more, independently."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from helpers import laid_out
from rounded import Rounded
from torch import Tensor

import fastdiff
from fastdiff.plan.plan import TERMS, Plan, Row


@dataclass
class Case:
    """One call of ``ops.update``: its tensors and keywords, and the plan and row that it runs."""

    x: Tensor
    outputs: tuple[Tensor, ...]
    plan: Plan
    row: int
    seed: int
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, backend: str, dtype: torch.dtype = torch.float32, **more: Any) -> fastdiff.ops.update:
        options = {"return_x0": True, "model_dtype": torch.float32, **self.options, **more}
        for name, value in options.items():
            if isinstance(value, Tensor):
                options[name] = value.to(dtype)
        if "slots" in options:
            options["slots"] = [s if s is None else s.to(dtype) for s in options["slots"]]
        return fastdiff.ops.update(
            self.x.to(dtype), self.outputs, self.plan, self.row, seed=self.seed, backend=backend, **options
        )


def random_row(rng: random.Random, outputs: int, t: int, **fields: Any) -> Row:
    reads = tuple(rng.sample(range(4), rng.randint(0, 3)))
    terms = [t for t in TERMS if not t.startswith("slot") or int(t[4]) < len(reads)]
    if not outputs:
        terms.remove("m")

    def coefficients() -> dict[str, float]:
        return {term: rng.uniform(-2, 2) for term in terms if rng.random() < 0.7}

    return Row(
        t=t, alpha=rng.uniform(0.1, 1), sigma=rng.uniform(0.1, 1), x=coefficients(), p=rng.uniform(-2, 2),
        q=rng.uniform(-2, 2) if outputs else 0.0, clip=rng.choice([math.inf, 1.0, 0.3]),
        scale=rng.choice([1.0, rng.uniform(0.5, 2)]), anchor=coefficients() if rng.random() < 0.5 else None,
        slot=(slot := coefficients() if rng.random() < 0.6 else None), reads=reads,
        write=None if slot is None else rng.randrange(4), c_in=rng.choice([1.0, rng.uniform(0.2, 2)]),
        stream=rng.choice([1, 5]), calls_model=bool(outputs), **fields,
    )  # fmt: skip


def random_case(
    rng: random.Random, batch: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32,
    layout: str = "contiguous", outputs: int | None = None,
) -> Case:  # fmt: skip
    """A plan of three random rows, and the tensors that its chosen row reads, with others that it does not."""
    outputs = rng.choice([0, 1, 1, 2, 3]) if outputs is None else outputs
    learned = outputs > 0 and rng.random() < 0.4
    logs = {"log_variance": (rng.uniform(-12, -6), rng.uniform(-6, 0))} if learned else {}
    plan = Plan(tuple(random_row(rng, outputs, t, **logs) for t in (20, 10, 0)), learned_variance=learned)
    row = rng.randrange(3)

    def some(*size: int) -> Tensor:
        return torch.randn(batch, *(size or shape))

    networks = tuple(laid_out(some().to(dtype), layout) for _ in range(outputs))
    if learned:
        doubled = torch.randn(batch, 2 * shape[0], *shape[1:]).to(dtype)
        networks = (*networks[:-1], laid_out(doubled, layout))
    used, options = plan[row], {}
    for name, term in (("anchor", "anchor"), ("gradient", "g")):
        if used.uses(term) or rng.random() < 0.3:
            options[name] = some()
    options["slots"] = [some() if s in used.reads or rng.random() < 0.3 else None for s in range(4)]
    if outputs > 1:
        options["guidance"] = tuple(rng.uniform(-3, 3) for _ in range(outputs))
    for name, chance in (("noise", 0.4), ("gain", 0.4), ("clip", 0.4)):
        if rng.random() < chance:
            size = {"gain": torch.rand(batch) + 0.5, "clip": torch.rand(batch, 2) + 0.3}
            options[name] = some() if name == "noise" else size[name]
    if rng.random() < 0.4:
        options |= {"mask": torch.rand(batch, *shape).round(decimals=1), "known": some()}
        if rng.random() < 0.5:
            options["known_noise"] = some()
    return Case(some(), networks, plan, row, rng.getrandbits(64), options)


EXP = 2e-7  # the exponential's relative error; test_the_exponential_of_learned_variance measures it


def textbook(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The formula of fastdiff/plan/row.py from the Row's own names, as one would write it in PyTorch.

    In float64 it is the oracle.
    """
    return _formula(case, lambda value: value, lambda value: value.to(dtype), torch.exp, _clamped)


def rounded(case: Case) -> dict[str, Rounded]:
    """The same, in the order of csrc/common/row.h: the oracle, and what float32 may be off by, for each element."""
    return _formula(case, Rounded.number, Rounded.exactly, lambda y: y.exp(EXP), Rounded.clamp)


def _clamped(x: Tensor, bound: Tensor | float) -> Tensor:
    bound = torch.as_tensor(bound, dtype=x.dtype)
    return torch.minimum(torch.maximum(x, -bound), bound)


def _formula(case: Case, number: Callable, tensor: Callable, exp: Callable, clamp: Callable) -> dict[str, Any]:
    """In any arithmetic: what becomes of a coefficient and of a tensor, and its exponential and clamp."""
    r, o, batch = case.plan[case.row], case.options, len(case.x)
    following = case.plan[case.row + 1] if case.row + 1 < len(case.plan) else None

    def sample(value: Tensor) -> Any:
        return tensor(value).view(batch, *[1] * (case.x.ndim - 1))

    def normal(draw: int, stream: int) -> Any:
        return tensor(fastdiff.randn(case.x.shape, seed=case.seed, draw=draw, stream=stream, backend="reference"))

    x, outputs, variance = tensor(case.x), list(case.outputs), None
    if case.plan.learned_variance:
        outputs[-1], variance = outputs[-1].chunk(2, dim=1)
    m = None
    if outputs:
        weights = o.get("guidance", (1.0,))
        m = sum(number(w) * tensor(output) for w, output in zip(weights, outputs, strict=True))
        if "gain" in o:
            m = m * sample(o["gain"])
    x0 = number(r.p) * x + (0 if m is None else number(r.q) * m)
    given = "clip" in o
    bound, scale = (sample(o["clip"][:, k]) if given else number((r.clip, r.scale)[k]) for k in range(2))
    x0 = clamp(x0, bound) * scale
    z = tensor(o["noise"]) if "noise" in o else normal(case.row, r.stream)
    if variance is not None:
        low, high = map(number, r.log_variance)
        fraction = (tensor(variance) + 1) / 2
        z = z * exp((fraction * high + (1 - fraction) * low) / 2)
    terms = {"x": x, "x0": x0, "m": m, "z": z}
    terms |= {name: tensor(o[key]) for name, key in (("anchor", "anchor"), ("g", "gradient")) if key in o}
    terms |= {f"slot{k}": tensor(o["slots"][s]) for k, s in enumerate(r.reads) if o["slots"][s] is not None}

    def combine(coefficients: dict[str, float]) -> Any:
        return sum((number(c) * terms[name] for name, c in coefficients.items()), 0 * x)

    result = {"x": combine(r.x), "x0": x0}
    if r.anchor is not None:
        result["anchor"] = combine(r.anchor)
    if r.slot is not None:
        result["slot"] = combine(r.slot)
    if "mask" in o:
        z_known = tensor(o["known_noise"]) if "known_noise" in o else normal(case.row, 3)
        alpha, sigma = map(number, (following.alpha, following.sigma) if following else (1.0, 0.0))
        mask = tensor(o["mask"])
        result["x"] = mask * (alpha * tensor(o["known"]) + sigma * z_known) + (1 - mask) * result["x"]
    result["model_input"] = result["x"] * number(following.c_in if following else 1.0)
    return result
