"""The blocks' sums of z² + ln σ² that an update writes: the same bits from every backend, and right in float64."""

import math

import pytest
import torch
from helpers import LAYOUTS, assert_same_bits
from update_cases import random_case

import fastdiff
from fastdiff.noise import NoiseKey
from fastdiff.ops import native
from fastdiff.ops.update import bind
from fastdiff.ops.update.checks import split_outputs
from fastdiff.ops.update.deviance import BLOCK, block_sums, blocks, constant, log_probs, tree_sum
from fastdiff.ops.update.operands import Operands

NAN = float("nan")
EPS = torch.finfo(torch.float32).eps
SIZES = ((1,), (3,), (127,), (1023,), (1024,), (1025,), (3, 16, 17), (3, 32, 32), (5, 40, 41))


def sums(case, backend, samples=slice(None)):
    """The deviances [3 rows, B, blocks] that a case's row leaves in memory full of NaN, of some of its samples."""
    o, table = case.options, case.plan.table(case.options.get("guidance", ()))
    x = case.x[samples].contiguous()
    outputs, variance = split_outputs(
        tuple(t[samples] for t in case.outputs), x.shape, case.plan.learned_variance, x.device, "outputs"
    )
    given = {k: v[samples].contiguous() for k, v in o.items() if isinstance(v, torch.Tensor)}
    key = NoiseKey(case.seed, samples.start or 0)
    operands = Operands(x, torch.full_like(x, NAN), table.float(), key, outputs, variance, host_table=table, **given)
    operands.slots = [None if s is None else s[samples].contiguous() for s in o["slots"]]
    operands.slots_out = [torch.full_like(x, NAN) for _ in range(4)]
    operands.anchor_out = torch.full_like(x, NAN)
    operands.deviance = torch.full((3, len(x), blocks(x[0].numel())), NAN)
    bind(operands, backend)(case.row)
    return operands.deviance


def exact(case):
    """z² + ln σ² of each element in float64."""
    row, shape = case.plan[case.row], case.x.shape
    z = case.options.get("noise")
    if z is None:
        z = fastdiff.randn(shape, seed=case.seed, draw=case.row, stream=row.stream, backend="reference")
    result = z.double().square()
    if case.plan.learned_variance:
        fraction = (case.outputs[-1].double().chunk(2, dim=1)[1] + 1) / 2
        low, high = row.log_variance
        result = result + fraction * high + (1 - fraction) * low
    return result.flatten(1)


@pytest.mark.parametrize("number", range(40))
def test_a_random_row(backend, rng, number):
    """Only the row that ran is written, and only where it draws; other samples and threads change nothing."""
    for _ in range(number):
        rng.random()
    torch.manual_seed(rng.getrandbits(32))
    shape, dtype = rng.choice(SIZES), rng.choice((torch.float32, torch.bfloat16, torch.float16))
    case = random_case(rng, rng.choice([1, 2, 5]), shape, dtype, rng.choice(LAYOUTS))
    got, reference = sums(case, backend), sums(case, "reference")
    assert_same_bits(got, reference)
    others = [row for row in range(3) if row != case.row]
    assert bool(got[others].isnan().all())
    if not case.plan[case.row].uses("z"):
        assert bool(got.isnan().all())
        return
    each = exact(case)
    padded = torch.nn.functional.pad(each, (0, got.shape[-1] * BLOCK - each.shape[1]))
    size = padded.view(len(each), -1, BLOCK)
    # Ten additions and, of the largest terms, four roundings and what ln σ's own arithmetic rounds.
    allowed = 16 * EPS * (size.abs() + 16).sum(-1)
    assert bool(((got[case.row].double() - size.sum(-1)).abs() <= allowed).all())
    with native.cpu_threads(2):
        assert_same_bits(sums(case, backend), got)
    alone = slice(len(each) - 1, len(each))
    assert_same_bits(sums(case, backend, alone)[case.row], got[case.row][alone])


def test_many_threads_and_blocks(simd, rng):
    case = random_case(rng, 2, (3, 256, 256), torch.bfloat16, "channels_last", 2)
    with native.cpu_threads(2):
        assert_same_bits(sums(case, "native"), sums(case, "reference"))


def test_the_tree_is_the_same_for_any_width(seed):
    """Zeros beyond the end change nothing: a kernel may begin at the width that it has."""
    for width in (1, 2, 3, 31, 32, 33, 1000, 1024):
        values = torch.randn(3, width)
        got = tree_sum(values)
        assert_same_bits(got, tree_sum(torch.nn.functional.pad(values, (0, 2048 - width))))
        torch.testing.assert_close(got.double(), values.double().sum(-1), rtol=0, atol=1e-5 * width)
    assert tree_sum(torch.zeros(3, 0)).tolist() == [0, 0, 0]
    assert block_sums(torch.zeros(2, 0)).shape == (2, 0)


def test_log_probs_are_normal(seed):
    """Of rows that draw with c, by torch.distributions; 0, not −0, of a row that does not."""
    z, c = torch.randn(2, 4, 3000), (0.7, -0.01)
    expected = torch.stack([
        torch.distributions.Normal(0.0, abs(k)).log_prob(row.double() * k).sum(-1) for row, k in zip(z, c, strict=True)
    ])  # fmt: skip
    parts = torch.stack([block_sums(row.square()) for row in z] + [torch.zeros(4, 3)])
    got = log_probs(parts, (*c, 0.0), 3000)
    torch.testing.assert_close(got[:2].double(), expected, rtol=3e-7, atol=0)
    assert_same_bits(got[2], torch.zeros(4))
    assert constant(1 / math.sqrt(2 * math.pi), 7) == pytest.approx(0, abs=1e-12)
