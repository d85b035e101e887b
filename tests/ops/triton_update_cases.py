"""update by Triton against the float32 reference, to the bit. Run by test_triton.py."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, DTYPES, KINDS, NAN, SHAPES, drawn, filled, key_of, poisoned, same, seeded

import fastdiff
from fastdiff.noise import NoiseKey
from fastdiff.ops.update.deviance import blocks
from fastdiff.ops.update.operands import Operands
from fastdiff.ops.update.reference import Update as ReferenceUpdate
from fastdiff.ops.update.triton_impl import Update
from fastdiff.plan.plan import Plan, Row, guidance_weights

UNSEEN = (1 << 63) - 1


def random_row(rng: random.Random, i: int, calls_model: bool, has: set[str]) -> Row:
    """A row of the features in ``has``, each of them used three times out of four."""
    reads = tuple(rng.sample(range(4), rng.randrange(4))) if "slots" in has else ()
    names = ["x", "x0", "z", *(["m"] if calls_model else []), *sorted(has & {"anchor", "g"})]
    names += [f"slot{k}" for k in range(len(reads))]

    def coefficients() -> dict[str, float]:
        return {name: rng.gauss(0, 1) for name in names if rng.random() < 0.75}

    writes = "slots" in has and rng.random() < 0.7
    return Row(
        t=i, alpha=rng.random(), sigma=rng.choice([0.0, rng.random()]), x=coefficients(), p=rng.gauss(0, 1),
        q=rng.gauss(0, 1) if calls_model else 0.0, clip=rng.choice([1.0, 0.3, math.inf]), scale=rng.choice([1.0, 1.7]),
        anchor=coefficients() if "anchor" in has and rng.random() < 0.7 else None,
        slot=coefficients() if writes else None, write=rng.randrange(4) if writes else None, reads=reads,
        c_in=rng.choice([1.0, 0.37]), log_variance=(-rng.random() * 9, -rng.random()), stream=rng.choice([1, 7]),
        calls_model=calls_model,
    )  # fmt: skip


def network_outputs(rng: random.Random, count: int, shape: tuple[int, ...], learned: bool, odd: bool):
    dtype, kind = rng.choice(DTYPES), rng.choice(KINDS)
    outputs = [filled(kind, shape, dtype) for _ in range(count)]
    variance = None
    if learned and count:
        b, c, h, w = shape
        both = filled(rng.choice(KINDS[:2]), (b, 2 * c, h, w), dtype)
        outputs[-1], variance = both[:, :c], both[:, c:]
        variance *= rng.choice([1, 40])
    if odd and count:
        rng.choice(outputs)[-1, 0, 0, 0] = rng.choice([NAN, math.inf, -math.inf])
    return tuple(outputs), variance


def operands(rng: random.Random, has: set[str], shape: tuple[int, ...], table: Tensor) -> Operands:
    """Random inputs and poisoned outputs."""

    b, some = shape[0], partial(torch.randn, shape, device=DEVICE)
    poison = partial(torch.full, shape, NAN, device=DEVICE)
    o = Operands(some(), poison(), table.float().to(DEVICE), key_of(rng, b), host_table=table)
    o.x.view(-1)[0] = rng.choice([0.0, 1e-41, math.inf, NAN, -1e30])
    o.x.view(-1).view(torch.int32)[-1] = 0x7FFFFFFF  # a NaN that integers would round to −0
    o.nonfinite = torch.full((1,), UNSEEN, device=DEVICE)
    if "in place" in has:
        o.x_out = o.x
    if "anchor" in has:
        o.anchor = some()
        o.anchor_out = o.anchor if "in place" in has else poison()
    if "slots" in has:
        o.slots = [some() for _ in range(4)]
        o.slots_out = o.slots if "in place" in has else [poison() for _ in range(4)]
    o.noise = some() if "noise" in has else None
    o.gradient = some() if "g" in has else None
    o.gain = torch.rand(b, device=DEVICE) if "gain" in has else None
    o.clip = torch.rand(b, 2, device=DEVICE) if "clip" in has else None
    if "mask" in has:
        o.mask, o.known = torch.rand(shape, device=DEVICE), some()
        o.known_noise = some() if rng.random() < 0.5 else None
    o.x0_out = poison() if "x0" in has else None
    if "deviance" in has:
        o.deviance = torch.full((4, b, blocks(o.x[0].numel())), NAN, device=DEVICE)
    o.model_input = poisoned(rng.choice(KINDS), shape, rng.choice(DTYPES))[0] if "input" in has else None
    return o


def cloned(o: Operands) -> Operands:
    """The same in other memory; strides and what is in place are kept."""
    copies: dict[int, Tensor] = {}

    def copy(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return copies.setdefault(id(tensor), tensor.clone())

    fields = {name: copy(value) for name, value in vars(o).items() if value is None or isinstance(value, Tensor)}
    slots = {name: [copy(slot) for slot in getattr(o, name)] for name in ("slots", "slots_out")}
    return Operands(**{**vars(o), **fields, **slots})


def results(o: Operands) -> list[Tensor | None]:
    return [o.x, o.x_out, o.anchor, o.anchor_out, *o.slots, *o.slots_out, o.x0_out, o.model_input, o.deviance]


FEATURES = ("anchor", "slots", "noise", "g", "gain", "clip", "mask", "x0", "input", "in place", "learned", "odd",
            "deviance")  # fmt: skip


@pytest.mark.parametrize("case", range(48))
def test_update(seed, case):
    """Three random rows of a random plan, one after the other, by number or by a counter on the device."""
    rng = seeded(seed, case)
    has = {name for name in FEATURES if rng.random() < (0.25, 0.5, 0.9)[case % 3]}
    shape, count = rng.choice(SHAPES) if case else (2, 1, 1, 270_001), case % 4
    plan = Plan([random_row(rng, i, count > 0, has) for i in range(4)])
    guidance = {2: guidance_weights(3.5), 3: guidance_weights((7.5, 1.5))}.get(count, ())
    mine = operands(rng, has, shape, plan.table(guidance))
    theirs = cloned(mine)
    kernel, reference = Update(mine), ReferenceUpdate(theirs)
    counter = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    print(shape, count, sorted(has))
    for row in rng.sample(range(4), 3):
        outputs, variance = network_outputs(rng, count, shape, "learned" in has, "odd" in has)
        kernel.set_outputs(outputs, variance)
        reference.set_outputs(outputs, variance)
        reference(row)
        kernel(row if case % 2 else counter.fill_(row))
        for a, b in zip(results(mine), results(theirs), strict=True):
            assert (a is None and b is None) or same(a, b), (row, plan[row])
        assert torch.equal(mine.nonfinite, theirs.nonfinite)
        assert (int(mine.nonfinite) != UNSEEN) == ("odd" in has and count > 0)


def test_noise_given_and_taken_back(seed):
    rng = seeded(seed)
    shape = (2, 3, 5, 7)
    plan = Plan([Row(0.0, 1.0, 1.0, {"x": 0.5, "z": 0.25})])
    o = operands(rng, set(), shape, plan.table())
    kernel, z = Update(o), torch.randn(shape, device=DEVICE)
    kernel.set_noise(z)
    kernel(0)
    assert same(o.x_out, 0.0 + o.x * 0.5 + z * 0.25)
    kernel.set_noise(None)
    kernel(0)
    assert same(o.x_out, 0.0 + o.x * 0.5 + drawn(shape, o.key, 0, 1) * 0.25)


def test_an_empty_batch():
    x = torch.empty(0, 3, device=DEVICE)
    Update(Operands(x, x, torch.zeros(1, 48, device=DEVICE), NoiseKey(1)))(0)


@pytest.mark.parametrize("steps", [3, 8])
def test_a_learned_plan(seed, steps):
    """A packaged one, of coefficients in every row and slots of three rows before, through the sampling loop."""
    plan = replace(fastdiff.Plan.load(fastdiff.models.digits().plans[steps]), provenance=None)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return x * 0.7 - (t * 0.001)[:, None, None, None] * x.abs()

    ends = [
        fastdiff.sample(network, (3, 1, 8, 8), sampler=plan, seed=seed, device=DEVICE, backend=backend)
        for backend in ("triton", "reference")
    ]
    assert same(*ends)
    assert ends[0].std() > 0
