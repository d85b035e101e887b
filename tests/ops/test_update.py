"""update on random rows with every feature: backends to the bit, all against a float64 oracle; buffers in place."""

import dataclasses
import itertools
import math
import random

import pytest
import torch
from helpers import LAYOUTS, SIZES, assert_same_bits, laid_out
from update_cases import random_case, rounded, textbook

import fastdiff
from fastdiff.noise import NoiseKey
from fastdiff.ops.update import bind
from fastdiff.ops.update.checks import split_outputs
from fastdiff.ops.update.operands import Operands
from fastdiff.plan.plan import Plan, Row

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN = float("nan")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Outputs start as NaN, so that an element that is not written shows."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *a, make=make, **k: t.fill_(NAN) if (t := make(*a, **k)).is_floating_point() else t
        )


def check(case, backend):
    exact, bounds = textbook(case, torch.float64), rounded(case)
    wide = case.run("reference", torch.float64)
    reference, got = case.run("reference"), case.run(backend)
    written = {name for name, value in got._asdict().items() if value is not None}
    assert written == set(exact), f"{written} were written"
    for name in sorted(written):
        if name != "model_input":
            torch.testing.assert_close(getattr(wide, name), exact[name], rtol=1e-11, atol=1e-11, msg=name)
        assert_same_bits(getattr(got, name), getattr(reference, name), name)
        error, allowed = (getattr(got, name).double() - exact[name]).abs(), bounds[name].error
        assert bool((error <= allowed).all()), f"{name}: {float((error / allowed).max())} times float32's bound"


# ---- random rows


@pytest.mark.parametrize("number", range(60))
def test_a_random_row(backend, rng, number):
    rng = random.Random(rng.random() + number)
    torch.manual_seed(rng.getrandbits(32))
    shape = rng.choice([*SIZES, (3, 16, 17), (2, 8, 8)])
    case = random_case(rng, rng.choice([1, 2, 7]), shape, rng.choice(DTYPES), rng.choice(LAYOUTS))
    check(case, backend)


@pytest.mark.parametrize("batch", [0, 1, 64])
def test_batches(backend, rng, batch):
    for shape in ((5,), (3, 32, 32)):
        case = random_case(rng, batch, shape)
        if batch:
            check(case, backend)
        else:
            assert all(t is None or t.shape[0] == 0 for t in case.run(backend))


@pytest.mark.parametrize(("layout", "dtype", "outputs"), [*itertools.product(LAYOUTS, DTYPES, (1, 2, 3))])
def test_outputs_of_any_layout(backend, rng, layout, dtype, outputs):
    check(random_case(rng, 3, (2, 9, 8), dtype, layout, outputs), backend)


def test_large_images(simd, rng):
    check(random_case(rng, 2, (3, 256, 256), torch.bfloat16, "channels_last", 2), "native")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_next_network_input(backend, rng, dtype, channels_last):
    for shape in ((3, 9, 11), (16, 4, 4)):
        case = random_case(rng, 3, shape)
        got = case.run(backend, model_dtype=dtype, channels_last=channels_last).model_input
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert got.is_contiguous(memory_format=layout)
        following = case.plan[case.row + 1].c_in if case.row < 2 else 1.0
        x = case.run(backend).x
        assert_same_bits(got, (x * torch.tensor(following, dtype=torch.float32)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_rounding_to_half(backend, dtype):
    """All 65536 halves, the midpoints between them and the floats beside those, in vectors and in the tail."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = halves[halves.isfinite()].float().sort().values
    middles = (finite[1:].double() + finite[:-1].double()).div(2).float()
    values = torch.cat([halves.float(), middles, *(middles.nextafter(torch.tensor(s * math.inf)) for s in (-1, 1))])
    edge = torch.tensor([65519.996, 65520.0, 65536.0, 3.39e38, 3.4e38, 1e-45, 2**-25, 2**-24 * 1.5, math.inf, NAN])
    values = torch.cat([values, edge, -edge])
    plan = Plan((Row(t=0, alpha=1, sigma=0, x={"x": 1.0}, calls_model=False),))
    for x in (values[None], values.view(-1)[:, None].expand(-1, 3).reshape(1, -1, 3), values[:, None]):
        x = x.contiguous()
        got = fastdiff.ops.update(x, (), plan, 0, model_dtype=dtype, backend=backend)
        assert_same_bits(got.model_input, (x + 0.0).to(dtype))  # a sum has no -0
        assert_same_bits(got.x, x + 0.0)
    # And back: a network's output of every half is read exactly.
    reads = Plan((Row(t=0, alpha=1, sigma=0, x={"m": 1.0}),))
    for out in (halves[None], halves[:, None]):
        got = fastdiff.ops.update(torch.zeros(out.shape), out, reads, 0, backend=backend)
        assert_same_bits(got.x, out.float() + 0.0)


def test_the_exponential_of_learned_variance(backend):
    """σ over the clamped range of exponents, to 2e-7; from far beyond it, the ends; NaN stays NaN."""
    row = Row(t=0, alpha=1, sigma=0, x={"z": 1.0}, log_variance=(-100.0, 100.0))
    plan = Plan((row,), learned_variance=True)
    v = torch.cat([torch.linspace(-1.7, 1.7, 100_003), torch.tensor([3.0, -3.0, 1e30, -1e30, NAN])])[None]
    ones = torch.ones_like(v)
    out = torch.stack([torch.zeros_like(v), v], dim=1)
    x = torch.zeros(1, 1, v.numel())
    got = fastdiff.ops.update(x, out, plan, 0, noise=ones[None], backend=backend).x[0]
    f = (v + 1) * 0.5  # float32: the exponent's own rounding is no fault of exp
    y = ((f * 100.0 + (1 - f) * -100.0) * 0.5).double().clamp(-87, 87)
    finite = ~v.isnan()
    error = (got.double() / y.exp() - 1).abs()[finite]
    assert float(error.max()) < 2e-7
    assert bool(got[~finite].isnan().all())


def test_clipping_keeps_nan_and_infinity_apart(backend):
    row = Row(t=0, alpha=1, sigma=0, x={"x0": 1.0}, p=1.0, clip=0.5, scale=2.0, calls_model=False)
    x = torch.tensor([[NAN, math.inf, -math.inf, 0.5, -0.5, 0.50001, 0.25, -0.0]])
    got = fastdiff.ops.update(x, (), Plan((row,)), 0, backend=backend).x
    assert_same_bits(got, torch.tensor([[NAN, 1.0, -1.0, 1.0, -1.0, 1.0, 0.5, 0.0]]))


def test_known_noise_of_weight_0_is_not_read(backend):
    """The last row leaves the known image as it is, whatever its noise would be."""
    plan = Plan((Row(t=0, alpha=1, sigma=1, x={"x": 1.0}, calls_model=False),))
    x, mask, known = torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[0.5, 9.0, -2.0]])
    noise = torch.tensor([[NAN, NAN, math.inf]])
    got = fastdiff.ops.update(x, (), plan, 0, mask=mask, known=known, known_noise=noise, backend=backend).x
    assert_same_bits(got, torch.tensor([[0.5, 0.0, -2.0]]))


def test_noise_addresses(backend, rng):
    """The row's number is its draw; seeds, sample_offset and batch move noise as randn has it."""
    rows = [
        Row(t=t, alpha=1, sigma=0, x={"z": 1.0}, stream=stream, calls_model=False) for t, stream in ((5, 1), (0, 9))
    ]
    plan, x, seed = Plan(tuple(rows)), torch.zeros(4, 3, 7), rng.getrandbits(64)
    for row, stream in ((0, 1), (1, 9)):
        for options in ({"seed": seed, "sample_offset": 2**32 - 4}, {"seeds": [seed, 0, 2**64 - 1, seed]}):
            got = fastdiff.ops.update(x, (), plan, row, backend=backend, **options).x
            expected = fastdiff.randn(x.shape, draw=row, stream=stream, backend="reference", **options)
            assert_same_bits(got, expected + 0.0)


# ---- the bound form, which the loop uses


def bound(case, backend, poisoned=True):
    """The case's operands in one place: every output is the input of the same name, but for x where ``poisoned``."""
    shape, o, r = case.x.shape, case.options, case.plan[case.row]
    outputs, variance = split_outputs(case.outputs, shape, case.plan.learned_variance, case.x.device, "outputs")
    table = case.plan.table(o.get("guidance", ()))
    given = {k: v.clone() for k, v in o.items() if isinstance(v, torch.Tensor)}
    operands = Operands(
        case.x.clone(), None, table.float(), NoiseKey(case.seed), outputs, variance, host_table=table, **given
    )
    operands.x_out = torch.full(shape, NAN) if poisoned else operands.x
    operands.slots = [None if s is None else s.clone() for s in o["slots"]]
    operands.slots_out = list(operands.slots)
    if r.write is not None and operands.slots[r.write] is None:
        operands.slots[r.write] = operands.slots_out[r.write] = torch.full(shape, NAN)
    if r.anchor is not None:
        operands.anchor = operands.anchor_out = given.get("anchor", torch.full(shape, NAN))
    operands.x0_out, operands.nonfinite = torch.full(shape, NAN), torch.full((1,), 99)
    operands.model_input = torch.full(shape, NAN)
    return bind(operands, backend)


@pytest.mark.parametrize("number", range(30))
def test_in_place(backend, rng, number):
    """x, the anchor and the slots written where they were read, by a row's number or a counter in memory."""
    rng = random.Random(rng.random() + number)
    torch.manual_seed(rng.getrandbits(32))
    case = random_case(rng, rng.choice([1, 3]), rng.choice([(3, 16, 17), (129,), (2, 3)]))
    row, expected = case.plan[case.row], case.run("reference")
    for index in (case.row, torch.tensor([case.row])):
        update = bound(case, backend, poisoned=number % 2 == 0)
        update(index)
        o = update.operands
        got = {"x": o.x_out, "x0": o.x0_out, "model_input": o.model_input}
        if row.anchor is not None:
            got["anchor"] = o.anchor_out
        for name, value in got.items():
            assert_same_bits(value, getattr(expected, name), name)
        for slot, before in enumerate(case.options["slots"]):
            if slot == row.write:
                assert_same_bits(o.slots_out[slot], expected.slot, "slot")
            elif before is not None:
                assert_same_bits(o.slots[slot], before, f"slot {slot}, which is not written")
        assert int(o.nonfinite) == 99


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [1, 3])
def test_the_first_row_of_a_nonfinite_output(backend, rng, dtype, outputs):
    for value, at, layout in itertools.product((math.inf, -math.inf, NAN), (0, 77, -1), ("contiguous", "permuted")):
        case = random_case(rng, 3, (3, 9, 11), outputs=outputs)
        output = torch.zeros(3, 3, 9, 11, dtype=dtype)
        case.plan = Plan(tuple(dataclasses.replace(r, log_variance=None) for r in case.plan))
        output.view(-1)[at] = value
        zeros = torch.zeros_like(output)
        case.outputs = tuple(laid_out(t, layout) for t in [zeros] * (outputs - 1) + [output])
        update = bound(case, backend)
        update(case.row)
        assert int(update.operands.nonfinite) == case.row
        update.operands.nonfinite.fill_(0)  # an earlier row stays
        update(case.row)
        assert int(update.operands.nonfinite) == 0


def test_large_outputs_are_finite(backend):
    plan = Plan((Row(t=0, alpha=1, sigma=0, x={"x": 1.0}, q=1.0),))
    table = plan.table()
    for value, bad in ((3.4e38, False), (torch.finfo(torch.float32).tiny / 2, False), (math.inf, True)):
        o = Operands(torch.zeros(2, 40), torch.empty(2, 40), table.float(), NoiseKey(), (torch.full((2, 40), value),),
                     host_table=table, nonfinite=torch.full((1,), 5))  # fmt: skip
        bind(o, backend)(0)
        assert int(o.nonfinite) == (0 if bad else 5)
