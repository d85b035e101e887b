"""add_noise: every backend against a float64 oracle and to the bit against one another; gradients; what it refuses."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from helpers import LAYOUTS, SIZES, assert_accurate, assert_same_bits, laid_out
from torch import Tensor

import fastdiff
from fastdiff.noise import TRAINING

SCHEDULE = fastdiff.NoiseSchedule.linear()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Outputs start as NaN, so that an element that is not written shows."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *a, make=make, **k: t.fill_(float("nan")) if (t := make(*a, **k)).is_floating_point()
            else t.fill_(-(1 << 40)) if t.dtype == torch.int64 else t
        )  # fmt: skip


def oracle(x0: Tensor, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x_t in float64, the textbook expression in x0's dtype, Σ|coefficient·term|)."""
    bar = SCHEDULE.alphas_cumprod[t].view(-1, *[1] * (x0.ndim - 1))
    a, b = bar.sqrt() * x0.double(), (1 - bar).sqrt() * z.double()
    bar = bar.to(x0.dtype)
    return a + b, bar.sqrt() * x0 + (1 - bar).sqrt() * z, a.abs() + b.abs()


def images(batch: int, shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    return laid_out(torch.randn(batch, *shape).to(dtype), layout)


CASES = [
    *itertools.product((7,), SIZES, DTYPES, ("contiguous", "offset")),
    *itertools.product((0, 1, 64), [(5,), (3, 32, 32)], DTYPES, ("contiguous",)),
    *itertools.product((3,), [(3, 17, 16), (6, 5, 3), (1, 2, 2)], DTYPES, LAYOUTS),
    (1, (3, 256, 256), torch.float32, "contiguous"),
    (2, (3, 256, 256), torch.bfloat16, "channels_last"),
]


@pytest.mark.parametrize(("batch", "shape", "dtype", "layout"), CASES)
def test_against_the_oracle(backend, seed, batch, shape, dtype, layout):
    if backend == "reference" and math.prod(shape) > 10**5:
        shape = (3, 64, 64)
    x0 = images(batch, shape, dtype, layout)
    t = torch.randint(0, 1000, (batch,))
    t[:2] = torch.tensor([0, 999])[: len(t)]
    x_t, z = fastdiff.add_noise(x0, t, SCHEDULE, seed=seed, draw=3, sample_offset=5, backend=backend)
    assert x_t.stride() == z.stride() == torch.empty_like(x0).stride()
    drawn = fastdiff.randn((batch, *shape), seed=seed, draw=3, stream=TRAINING, sample_offset=5, backend="reference")
    assert_same_bits(z, drawn.to(dtype), "noise")
    exact, textbook, size = oracle(x0, t, drawn)
    assert_accurate(x_t, exact, textbook.to(dtype), size)
    # The same bits as the reference, computed on plain float32 tensors and rounded once.
    wide = fastdiff.add_noise(x0.float().contiguous(), t, SCHEDULE, noise=drawn, backend="reference")[0]
    assert_same_bits(x_t, wide.to(dtype), "x_t")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_given_noise_in_another_layout(backend, seed, dtype, layout):
    x0, noise = images(3, (3, 9, 11), dtype), images(3, (3, 9, 11), dtype, layout)
    t = torch.tensor([999, 0, 500])
    x_t, same = fastdiff.add_noise(x0, t, SCHEDULE, noise=noise, backend=backend)
    assert same is noise
    exact, textbook, size = oracle(x0, t, noise)
    assert_accurate(x_t, exact, textbook, size)
    contiguous = fastdiff.add_noise(x0, t, SCHEDULE, noise=noise.contiguous(), backend="reference")[0]
    assert_same_bits(x_t, contiguous)


def test_one_t_for_all(backend, seed):
    x0 = images(3, (3, 9, 11), torch.float32)
    each = fastdiff.add_noise(x0, torch.full((3,), 321), SCHEDULE, seed=4, backend=backend)
    for a, b in zip(fastdiff.add_noise(x0, 321, "linear", seed=4, backend=backend), each, strict=True):
        assert_same_bits(a, b)
    strided = torch.tensor([[999, 1], [0, 1], [5, 1]])[:, 0]
    for a, b in zip(
        fastdiff.add_noise(x0, strided, SCHEDULE, backend=backend),
        fastdiff.add_noise(x0, strided.clone(), SCHEDULE, backend=backend), strict=True,
    ):  # fmt: skip
        assert_same_bits(a, b)


def test_seeds_offsets_and_batches(backend, seed):
    x0 = images(6, (3, 5), torch.float32)
    whole = fastdiff.add_noise(x0, 500, SCHEDULE, seed=seed, draw=1, backend=backend)[0]
    part = fastdiff.add_noise(x0[2:5], 500, SCHEDULE, seed=seed, draw=1, sample_offset=2, backend=backend)[0]
    assert_same_bits(part, whole[2:5])
    own = fastdiff.add_noise(x0[:2], 500, SCHEDULE, seeds=[seed, 7], draw=1, backend=backend)[0]
    assert_same_bits(own[0], whole[0])
    assert_same_bits(own[1:], fastdiff.add_noise(x0[1:2], 500, SCHEDULE, seed=7, draw=1, backend=backend)[0])


def test_extreme_values(backend):
    """Infinity, NaN, the largest and subnormal numbers go through as IEEE arithmetic has it."""
    values = torch.tensor([float("inf"), -float("inf"), float("nan"), 3e38, -3e38, 1e-40, -0.0, 0.0])
    for dtype, t in itertools.product(DTYPES, (0, 999)):
        x0, noise = values.to(dtype).expand(2, 3, 8), torch.zeros(2, 3, 8, dtype=dtype)
        x_t = fastdiff.add_noise(x0, t, SCHEDULE, noise=noise, backend=backend)[0]
        alpha = SCHEDULE.alphas[t].float()
        assert_same_bits(x_t, (x0.float() * alpha + noise.float() * SCHEDULE.sigmas[t].float()).to(dtype))


def test_first_and_last_noise_level_in_half(seed):
    """diffusers 0.42 adds no noise at all for t <= 1 in float16 and t <= 9 in bfloat16."""
    for dtype in DTYPES:
        x0 = torch.zeros(1, 1000, dtype=dtype)
        for t in (0, 1, 9):
            x_t, z = fastdiff.add_noise(x0, t, SCHEDULE)
            assert float((x_t.double() / z.double()).median()) == pytest.approx(float(SCHEDULE.sigmas[t]), rel=0.01)


# ---- gradients


@pytest.mark.parametrize("given", [False, True])
def test_gradients(backend, seed, given):
    x0 = torch.randn(4, 3, 5, requires_grad=True)
    noise = torch.randn(4, 3, 5, requires_grad=True) if given else None
    t = torch.tensor([0, 10, 500, 999])
    x_t, _ = fastdiff.add_noise(x0, t, SCHEDULE, noise=noise, backend=backend)
    upstream = torch.randn_like(x_t)
    x_t.backward(upstream)
    shape = (-1, 1, 1)
    assert torch.allclose(x0.grad.double(), upstream.double() * SCHEDULE.alphas[t].view(shape), rtol=2e-7, atol=0)
    if given:
        assert torch.allclose(noise.grad.double(), upstream.double() * SCHEDULE.sigmas[t].view(shape), rtol=2e-7)
    with torch.no_grad():
        again = fastdiff.add_noise(x0, t, SCHEDULE, noise=noise, backend=backend)[0]
    assert not again.requires_grad
    assert_same_bits(again, x_t.detach())


def test_the_drawn_noise_has_no_gradient(seed):
    x_t, z = fastdiff.add_noise(torch.randn(2, 3, requires_grad=True), 5, SCHEDULE)
    assert x_t.requires_grad
    assert not z.requires_grad


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_after_a_fork():
    """In a process of its own, whose threads have worked: a child that then uses torch's own would hang."""
    pytest.importorskip("fastdiff._C", reason="the extension is not built")
    code = """
import os, torch, fastdiff
torch.set_num_threads(2)
x0 = fastdiff.randn((4, 100_003))
child = os.fork()
if child == 0:
    x_t, noise = fastdiff.add_noise(x0, 500, fastdiff.NoiseSchedule.linear(), seed=1)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)


# ---- what it refuses


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"x0": [1.0]}, TypeError, "x0"),
        ({"x0": torch.zeros(2, 3, dtype=torch.float64)}, TypeError, "x0"),
        ({"x0": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "x0"),
        ({"x0": torch.tensor(1.0)}, ValueError, "x0"),
        ({"x0": torch.zeros(2, 3).to_sparse()}, TypeError, "x0"),
        ({"x0": torch.zeros(2, 3, device="meta")}, RuntimeError, "meta tensors"),
        ({"t": 1000}, ValueError, "t must"),
        ({"t": -1}, ValueError, "t must"),
        ({"t": 1.0}, TypeError, "t must"),
        ({"t": torch.tensor([0, 1000])}, ValueError, "t must"),
        ({"t": torch.tensor([-1, 5])}, ValueError, "t must"),
        ({"t": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, "t must"),
        ({"t": torch.tensor([0, 1, 2])}, ValueError, "t must"),
        ({"t": torch.tensor(5)}, ValueError, "t must"),
        ({"schedule": "quadratic"}, ValueError, "schedule"),
        ({"schedule": torch.ones(3)}, TypeError, "schedule"),
        ({"noise": torch.zeros(2, 4)}, ValueError, "noise"),
        ({"noise": torch.zeros(2, 3, dtype=torch.float16)}, ValueError, "noise"),
        ({"noise": 1.0}, TypeError, "noise"),
        ({"noise": torch.zeros(2, 3), "seed": 1}, ValueError, "noise"),
        ({"noise": torch.zeros(2, 3), "draw": 1}, ValueError, "noise"),
        ({"draw": -1}, ValueError, "draw"),
        ({"seed": 1 << 64}, ValueError, "seed"),
        ({"seeds": [1, 2, 3]}, ValueError, "seeds"),
        ({"backend": "fast"}, ValueError, "backend"),
    ],
)
def test_refuses(change, error, names):
    arguments = {"x0": torch.zeros(2, 3), "t": 5, "schedule": SCHEDULE, **change}
    with pytest.raises(error, match=names):
        fastdiff.add_noise(arguments.pop("x0"), arguments.pop("t"), arguments.pop("schedule"), **arguments)


def test_the_operator_makes_an_unknown_t_nan(backend):
    """Where t is not read back (on a GPU, under torch.compile), one out of range shows as NaN, and only its sample."""
    t = torch.tensor([5, 1000, -1, 1 << 40])
    coefficients = torch.stack([SCHEDULE.alphas, SCHEDULE.sigmas], dim=1).float()
    numbers = torch.zeros(4, dtype=torch.int64)
    x_t, _ = torch.ops.fastdiff.add_noise(torch.ones(4, 9), t, coefficients, None, numbers, numbers, 0,
                                          backend)  # fmt: skip
    assert x_t.isnan().all(dim=1).tolist() == [False, True, True, True]
    assert not x_t[0].isnan().any()
