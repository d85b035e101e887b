"""conv2d by Winograd's kernel: its numbers against the definition in float64, and its bits."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, assert_same_bits, laid_out, ulp
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.conv2d import bind
from fastdiff.ops.conv2d.winograd import pack

MODULE = sys.modules[pack.__module__]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# batch, channels, features, height, width
SHAPES = (
    (2, 32, 32, 8, 8), (1, 64, 48, 7, 5), (3, 32, 16, 1, 1), (1, 32, 16, 1, 9), (2, 96, 80, 13, 2), (5, 32, 64, 6, 7),
)  # fmt: skip


@pytest.fixture
def kernel(simd, monkeypatch):
    """Of each instruction set; outputs start as NaN, so that an element that is not written shows.

    bfloat16 is multiplied in pairs, as it is where the CPU has the instruction for that; elsewhere by two products.
    """
    make = torch.empty_strided
    monkeypatch.setattr(MODULE, "_pairs", lambda dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(torch, "empty_strided", lambda *a, **k: make(*a, **k).fill_(float("nan")))
    return simd


def textbook(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, upsample: bool) -> Tensor:
    x = F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x
    y = F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), padding=1)
    return y if residual is None else y + residual


def operands(shape: tuple[int, ...], dtype: torch.dtype, upsample: bool = False) -> dict[str, Tensor]:
    batch, channels, features, height, width = shape
    side = 2 if upsample else 1
    return {
        "x": torch.randn(batch, channels, height, width).to(dtype),
        "weight": (torch.randn(features, channels, 3, 3) / (9 * channels) ** 0.5).to(dtype),
        "bias": torch.randn(features).to(dtype if torch.rand(()) < 0.5 else torch.float32),
        "residual": torch.randn(batch, features, side * height, side * width).to(dtype),
    }


def by_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, upsample: bool = False
) -> Tensor:
    call = bind(x, weight, bias, padding=1, upsample=upsample, residual=residual, backend="native")
    return call(x, residual)


def computed(given: dict[str, Tensor | None], upsample: bool = False) -> Tensor:
    return by_kernel(given["x"], given["weight"], given.get("bias"), given.get("residual"), upsample)


def derived_rms(channels: int, added: int) -> float:
    """The root-mean-square error that float32 arithmetic may leave in the kernel's results, for ``operands``.

    Rounding to nearest leaves an error of at most u = 2⁻²⁴ of the number, and of a mean square of at most u²/3 of its
    square (uniform within half a spacing). The errors of different roundings are taken as uncorrelated, as the numbers
    are random, so their mean squares add up (Higham & Mary 2019, doi:10.1137/18M1226312):

    - A product of a transformed number and a transformed weight. Images have variance 1, weights v = 1/9C. A tile's
      number sums 2 by 2 of the image, variance 4 (doubled images: 2, 4 or 2 in each dimension); weights at a point have
      variance v, 3v/4 or 9v/16 (the rows of WEIGHT have squares that sum to 1, 3/4, 3/4, 1). A result sums, in each
      dimension, points 0, 1, 2 (doubled: 0, 1): 2·1 + 2·¾ + 2·¾ = 5 (doubled: 2·1 + 4·¾ = 5). So the products behind a
      result have variances that sum to A = 25/9 = 2.78 where the result's is 1: the transform's amplification.
    - The sum over channels. A running sum of s equal variances passes through 1, 2, … s of them: its roundings add up
      to s²/2 of a term's variance. C channels in K = C/s blocks: K s²/2 within them and s K²/2 among them, which is
      (s + K)/2 times the whole sum's variance. Where there is no fused multiply-add each product is rounded, 1 more.
    - Transforms: two additions a dimension at most, 4 roundings for the image, 4 for the weights (halving is exact) and
      4 on the way back: 12. The bias and the residual, of variance 1, leave 2 and 3.
    """
    block = channels if channels <= 128 else 64
    blocks = -(-channels // block)
    return 2**-24 * ((25 / 9 * ((block + blocks) / 2 + 1 + 12) + (0, 2, 5)[added]) / 3) ** 0.5


def check(y: Tensor, given: dict[str, Tensor | None], upsample: bool = False) -> None:
    """Of many numbers a root-mean-square error at most what float32 arithmetic explains, and in half precision at most
    twice PyTorch's own; in bfloat16 2.7 times, since images and weights are rounded again when they are transformed,
    and PyTorch's only error is the result's rounding (each of the two comes to 1.9 times that, whatever the number of
    channels). Of each number at most 4 ulp of the sum of its terms' sizes.
    """
    terms = [given["x"], given["weight"], given.get("bias"), given.get("residual")]
    wide = [None if t is None else t.double() for t in terms]
    exact = textbook(*wide, upsample)
    error, theirs = y.double() - exact, textbook(*terms, upsample).double() - exact
    size = textbook(*[None if t is None else t.abs() for t in wide], upsample)
    assert bool((error.abs() <= 4 * ulp(size, y.dtype)).all()), f"{float((error.abs() / ulp(size, y.dtype)).max())} ulp"
    if y.numel() >= 5000:
        rms, library = float(error.square().mean().sqrt()), float(theirs.square().mean().sqrt())
        times = 2.7 if y.dtype == torch.bfloat16 else 2
        bound = times * library
        if y.dtype == torch.float32:
            bound = derived_rms(given["x"].shape[1], sum(t is not None for t in terms[2:]))
        assert rms <= bound, f"{rms:.3g} of {bound:.3g} allowed; the library's is {library:.3g}"


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(kernel, seed, shape, dtype, upsample):
    given = operands(shape, dtype, upsample)
    y = computed(given, upsample)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    check(y, given, upsample)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [(), ("bias",), ("residual",)])
def test_what_is_added(kernel, seed, parts, dtype):
    given = operands((2, 32, 48, 16, 16), dtype)
    given = {name: given[name] for name in ("x", "weight", *parts)}
    check(computed(given), given)


@pytest.mark.parametrize("upsample", [False, True])
def test_images_of_a_network(kernel, seed, upsample):
    """As many numbers as a step has: more than a block, a panel and a thread's share; the largest error in any."""
    for dtype, shape in zip(DTYPES, ((2, 128, 256, 16, 16), (1, 128, 96, 16, 15), (1, 160, 96, 15, 17)), strict=True):
        given = operands(shape, dtype, upsample)
        check(computed(given, upsample), given, upsample)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_weights_that_no_cache_holds(kernel, seed, dtype):
    """Blocks of pairs have more tiles then, some of which are left over."""
    given = operands((2, 512, 544, 9, 8), dtype)
    assert pack(given["weight"], dtype=dtype).nbytes > 8 << 20
    check(computed(given), given)


def test_many_channels(simd, seed):
    """The error does not grow with them: at most that of PyTorch's convolution of channels_last images."""
    for channels in (144, 1280):
        given = operands((1, channels, 64, 12, 10), torch.float32)
        given = {name: given[name] for name in ("x", "weight")}
        y, exact = computed(given), textbook(given["x"].double(), given["weight"].double(), None, None, False)
        check(y, given)
        last = (t.contiguous(memory_format=torch.channels_last) for t in given.values())
        theirs = textbook(*last, None, None, False)
        rms = [float((t.double() - exact).square().mean().sqrt()) for t in (y, theirs)]
        assert rms[0] <= rms[1] or channels < 1280, f"{rms[0]:.3g}; PyTorch's is {rms[1]:.3g}"
        assert rms[0] <= 4e-7


def test_blocks_of_many_tiles(kernel, seed):
    """More tiles than a block has, and rows of a block that are left over; the weights are transformed for each."""
    given = operands((3, 48, 48, 32, 26), torch.float32)
    check(computed(given), given)


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("channels", [160, 256, 320])
def test_few_tiles_of_many_channels(simd, seed, channels, upsample):
    """Counts of tiles that are no multiple of what is multiplied at a time, in memory that a larger call has filled."""
    computed(operands((1, channels, 64, 32, 32), torch.float32))
    for tiles in range(1, 26):
        given = operands((1, channels, 48, 2, 2 * tiles), torch.float32, upsample)
        check(computed(given, upsample), given, upsample)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_layouts(kernel, seed, layout, dtype):
    given = operands((4, 32, 48, 5, 7), dtype)
    expected = computed(given)
    names = ("x", "weight", "residual")
    moved = {**given, **{name: laid_out(given[name], layout) for name in names}, "bias": given["bias"].repeat(2)[48:]}
    assert_same_bits(computed(moved), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upsample", [False, True])
def test_equal_in_exact_arithmetic(kernel, rng, dtype, upsample):
    """Small integers have no rounding: weights of multiples of 4 are integers when transformed, too."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    side = 2 if upsample else 1
    shapes = {"x": (2, 64, 5, 6), "weight": (48, 64, 3, 3), "bias": (48,), "residual": (2, 48, side * 5, side * 6)}
    given = {name: torch.randint(-2, 3, shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    given["weight"] = given["weight"] * 4
    expected = textbook(*[given[name].double() for name in shapes], upsample)
    assert torch.equal(computed(given, upsample), expected.to(dtype))


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_bits_depend_on_the_window_alone(kernel, seed, dtype, upsample):
    """Not on the threads, the batch, the other images or the place in it."""
    given = operands((7, 64, 80, 9, 8), dtype, upsample)
    x, weight, bias, residual = given.values()
    y = by_kernel(x, weight, bias, residual, upsample)
    order = torch.randperm(7)
    assert_same_bits(by_kernel(x[order], weight, bias, residual[order], upsample), y[order])
    assert_same_bits(by_kernel(x[4:5], weight, bias, residual[4:5], upsample), y[4:5])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert_same_bits(by_kernel(x, weight, bias, residual, upsample), y)
    finally:
        torch.set_num_threads(before)
    # Two further tiles to the right: what is left of them has the bits that it had.
    wider = by_kernel(F.pad(x, (0, 4)), weight, bias, None, upsample)
    plain = by_kernel(x, weight, bias, None, upsample)
    kept = 2 * (8 - 1) if upsample else 6
    assert_same_bits(wider[..., :kept], plain[..., :kept])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite(kernel, seed, dtype, bad):
    """It reaches every result of its window and none beyond its tile's."""
    given = operands((2, 32, 32, 12, 12), dtype)
    before = computed(given)
    row, column = 5, 6
    given["x"][1, 17, row, column] = bad
    y = computed(given)
    assert not y[1, :, row - 1 : row + 2, column - 1 : column + 2].isfinite().any()
    far = torch.ones(12, 12, dtype=torch.bool)
    far[row - 3 : row + 4, column - 3 : column + 4] = False
    assert_same_bits(y[0], before[0])
    assert_same_bits(y[1][:, far], before[1][:, far])


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values(kernel, seed, dtype):
    """The largest numbers overflow where their sum does; the smallest are lost, not blown up."""
    largest = torch.finfo(dtype).max
    weight = torch.zeros(16, 32, 3, 3)
    weight[:, 0, 1, 1] = 1
    weight, x = weight.to(dtype), torch.zeros(1, 32, 4, 4).to(dtype)
    x[0, 0, 1, 1] = largest / 8
    y = by_kernel(x, weight)
    torch.testing.assert_close(y[0, 0, 1, 1], x[0, 0, 1, 1], rtol=0.02, atol=0)
    x[0, 0, 1, 1] = torch.finfo(dtype).tiny
    assert float(by_kernel(x, weight).abs().max()) <= 4 * torch.finfo(dtype).tiny


def test_products_of_bfloat16(kernel, seed, monkeypatch):
    """By the instruction, or by two products of floats: the same numbers, but for the order of two additions; of floats
    that were not rounded they are more exact, and any 16 channels will do.
    """
    given = operands((2, 64, 32, 16, 16), torch.bfloat16)
    x, weight = given["x"], given["weight"]
    assert pack(weight, dtype=torch.bfloat16).dtype == torch.bfloat16
    y = by_kernel(x, weight).double()
    module = native.extension()
    assert module.set_cpu_simd("portable")
    theirs = by_kernel(x, weight).double()
    assert module.set_cpu_simd(kernel)
    one = torch.finfo(torch.bfloat16).eps * float(y.abs().max())
    assert float((y - theirs).abs().max()) <= 2 * one
    assert float((y - theirs).square().mean().sqrt()) <= 0.1 * one
    monkeypatch.undo()
    monkeypatch.setattr(MODULE, "_pairs", lambda dtype: False)
    exact = textbook(x.double(), weight.double(), None, None, False)
    wide = by_kernel(x, weight).double()
    assert float((wide - exact).square().mean()) < float((y - exact).square().mean())
    for upsample in (False, True):
        given = operands((2, 48, 32, 7, 6), torch.bfloat16, upsample)
        check(computed(given, upsample), given, upsample)


def test_weights_of_another_dtype(kernel, seed):
    """float32 weights for bfloat16 images are rounded once, after they are transformed, as PyTorch's are before."""
    given = operands((2, 64, 64, 16, 16), torch.float32)
    x = given["x"].bfloat16()
    y = by_kernel(x, given["weight"], given["bias"])
    exact = textbook(x.double(), given["weight"].double(), given["bias"].double(), None, False)
    theirs = textbook(x, given["weight"].bfloat16(), given["bias"], None, False)
    rms = [float((t.double() - exact).square().mean().sqrt()) for t in (y, theirs)]
    assert rms[0] <= 2 * rms[1]


def test_an_empty_batch(kernel, seed):
    given = operands((0, 32, 16, 3, 5), torch.float32, True)
    assert computed(given, True).shape == (0, 16, 6, 10)


def test_two_threads(kernel, seed):
    """Each has its own memory for what it transforms, whatever sizes it computes in turn."""
    cases = [operands(shape, torch.float32) for shape in (*SHAPES[:3], (2, 64, 64, 16, 16))]
    expected, wrong = [computed(given) for given in cases], []

    def work(start: int) -> None:
        for i in range(40):
            which = (start + i) % len(cases)
            if not torch.equal(computed(cases[which]), expected[which]):
                wrong.append(which)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))  # raises what they raise
    assert not wrong
