"""conv2d of doubled images: four 2×2 convolutions against the two plain steps in float64; gradients; refusals."""

import pytest
import torch
from helpers import LAYOUTS, assert_same_bits, laid_out
from torch import Tensor
from torch.nn.functional import conv2d, interpolate

from fastdiff import ops
from fastdiff.ops.conv2d import library
from fastdiff.ops.conv2d.geometry import Geometry
from fastdiff.ops.conv2d.phases import presum

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (2, 3, 5, 4, 4),
    (3, 8, 16, 5, 7),
    (1, 1, 1, 1, 1),
    (2, 33, 17, 1, 6),
    (2, 64, 64, 8, 8),
)  # the last for root-mean-squares
CHANNELS_LAST = torch.channels_last


def textbook(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return conv2d(interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)


def doubled(x: Tensor, weight: Tensor, bias: Tensor | None, exact: bool = False) -> Tensor:
    return ops.conv2d(x, weight, bias, padding=1, upsample=True, exact=exact)


def phases(x: Tensor, weight: Tensor, bias: Tensor | None, packed: dict | None = None) -> Tensor:
    """By summed weights, whichever kernel suits."""
    geometry = Geometry(padding=((1, 1), (1, 1)), upsample=True)
    return library.bind(x, weight, bias, geometry, None, {} if packed is None else packed, "phases")(x)


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    batch, c_in, c_out, height, width = shape
    weight = torch.randn(c_out, c_in, 3, 3) / (9 * c_in) ** 0.5
    return torch.randn(batch, c_in, height, width).to(dtype), weight.to(dtype), torch.randn(c_out).to(dtype)


def assert_close(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """float32: 1e-5 of the largest value. Otherwise each number within what the roundings explain, and of many numbers
    a root-mean-square error at most 1.5 times the two steps' own, or half an ulp of the largest value.

    A presummed weight adds up to four and is rounded once (u of it), the sum is float32's, whose error is small beside
    that, and the result is rounded once: |error| ≤ 1.01 u (Σ|terms| + |result|), with u half the dtype's spacing at 1
    and Σ|terms| of the presummed weights at most that of the weights. Some libraries round the sum before they add
    the bias, which is another u |result − bias|. Where oneDNN has no float16, torch rounds the products of each of a
    window's four pixels, and their running sum three times: another 4 u Σ|terms|. float16's presummed weights may be
    subnormal, of spacing 2⁻²⁴: half of that for each of four pixels and every channel.
    """
    exact = textbook(x.double(), weight.double(), None if bias is None else bias.double())
    error, largest = got.double() - exact, float(exact.abs().max())
    if got.dtype == torch.float32:
        assert float(error.abs().max()) <= 1e-5 * largest
        return
    u = torch.finfo(got.dtype).eps / 2
    size = textbook(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    subnormal = torch.finfo(got.dtype).smallest_normal * u * 4 * x.shape[1] * float(x.double().abs().max())
    offset = 0 if bias is None else bias.double().view(-1, 1, 1)
    scattered = got.dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    before_bias = 0 if bias is None else (exact - offset).abs()
    allowed = 1.01 * u * ((5 if scattered else 1) * size + exact.abs() + before_bias) + subnormal
    assert bool((error.abs() <= allowed).all()), f"{float((error.abs() / allowed).max())} times what is allowed"
    if got.numel() < 5000:
        return
    theirs = (textbook(x, weight, bias).double() - exact).square().mean().sqrt()
    half_ulp = u * largest
    assert float(error.square().mean().sqrt()) <= max(1.5 * float(theirs), half_ulp)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_two_steps(seed, shape, dtype, with_bias):
    x, weight, bias = operands(shape, dtype)
    bias = bias if with_bias else None
    assert_close(doubled(x, weight, bias), x, weight, bias)
    assert_close(phases(x, weight, bias), x, weight, bias)
    last = [t.contiguous(memory_format=CHANNELS_LAST) for t in (x, weight)]
    assert_same_bits(doubled(x, weight, bias, exact=True), textbook(*last, bias))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(seed, layout):
    x, weight, bias = operands((3, 8, 16, 5, 7))
    view = laid_out(x, layout)
    y = doubled(view, laid_out(weight, layout), bias)
    assert_close(y, x, weight, bias)
    assert y.is_contiguous(memory_format=CHANNELS_LAST)
    assert_close(phases(view, laid_out(weight, layout), bias), x, weight, bias)


def test_equal_in_exact_arithmetic(rng):
    """Small integers have no rounding, in any order of the sums."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    x, weight, bias = (torch.randint(-4, 5, s, generator=generator).float() for s in ((2, 6, 9, 5), (7, 6, 3, 3), (7,)))
    for dtype in DTYPES[:2]:
        expected = textbook(x, weight, bias).to(dtype)
        given = x.to(dtype), weight.to(dtype), bias.to(dtype)
        assert torch.equal(doubled(*given), expected)
        assert torch.equal(phases(*given), expected)


def test_presum_against_single_pixels(seed):
    """The columns of T are what one pixel leaves on the doubled grid.

    Both are sums of at most four weights, in some order: three roundings each, of at most u Σ|weights|.
    """
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    pixel = torch.nn.functional.pad(torch.eye(3, dtype=torch.float64).view(3, 3, 1, 1), (1, 1, 1, 1))
    drawn, size = (textbook(pixel, w, None)[:, :, 1:5, 1:5] for w in (weight, weight.abs()))
    assert bool(((presum(weight) - drawn).abs() <= 6 * 2.0**-53 * size).all())


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_presum_rounds_once(seed, dtype):
    weight = torch.randn(9, 7, 3, 3).to(dtype)
    assert_same_bits(presum(weight), presum(weight.float()).to(dtype))
    assert presum(weight).shape == (7, 9, 4, 4)


def test_packed_weights_serve_other_sizes(seed):
    x, weight, bias = operands((4, 16, 24, 8, 8))
    packed = {}
    phases(x, weight, bias, packed)
    for shape in ((1, 16, 8, 8), (4, 16, 3, 5), (7, 16, 16, 2)):
        x = torch.randn(shape)
        assert_close(phases(x, weight, bias, packed), x, weight, bias)


def test_an_empty_batch(seed):
    _, weight, bias = operands((1, 4, 6, 3, 5))
    x = torch.zeros(0, 4, 3, 5)
    for exact in (False, True):
        assert doubled(x, weight, bias, exact).shape == (0, 6, 6, 10)


def test_gradients(seed):
    leaves = [t.double().requires_grad_() for t in operands((2, 3, 4, 3, 5))]
    upstream = torch.randn(2, 4, 6, 10, dtype=torch.float64)
    expected = torch.autograd.grad((textbook(*leaves) * upstream).sum(), leaves)
    for got, grad in zip(torch.autograd.grad((doubled(*leaves) * upstream).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-12, atol=1e-12)
    narrow = [t.detach().float().requires_grad_() for t in leaves]
    for got, grad in zip(
        torch.autograd.grad((doubled(*narrow) * upstream.float()).sum(), narrow), expected, strict=True
    ):
        assert float((got - grad).abs().max()) <= 1e-5 * float(grad.abs().max())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiled(seed):
    x, weight, bias = operands((2, 8, 16, 5, 7))

    def both(x):
        return doubled(x * 2, weight, bias), doubled(x * 2, weight, bias, exact=True)

    for engine in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        with torch.no_grad():
            for y in torch.compile(both, fullgraph=True, backend=engine)(x):
                assert_close(y, x * 2, weight, bias)


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"x": [1.0]}, TypeError, "x must"),
        ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, TypeError, "x must"),
        ({"x": torch.zeros(3, 4, 4)}, ValueError, "x must"),
        ({"x": torch.zeros(2, 3, 0, 4)}, ValueError, "x must"),
        ({"x": torch.zeros(2, 5, 4, 4)}, ValueError, "weight must"),
        ({"weight": None}, TypeError, "weight must"),
        ({"weight": torch.zeros(4, 3, 3)}, ValueError, "weight must"),
        ({"weight": torch.zeros(4, 3, 3, 3, dtype=torch.float16)}, TypeError, "weight must"),
        ({"weight": torch.zeros(4, 3, 3, 3, device="meta")}, ValueError, "weight must"),
        ({"bias": torch.zeros(3)}, ValueError, "bias must"),
        ({"bias": 1.0}, TypeError, "bias must"),
        ({"bias": torch.zeros(4, dtype=torch.float16)}, TypeError, "bias must"),
    ],
)
@pytest.mark.parametrize("exact", [False, True])
def test_refuses(change, error, names, exact):
    given = {"x": torch.zeros(2, 3, 4, 4), "weight": torch.zeros(4, 3, 3, 3), "bias": torch.zeros(4), **change}
    with pytest.raises(error, match=names):
        doubled(**given, exact=exact)
