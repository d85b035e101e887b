"""group_norm_silu: every CPU backend against float64; gradients; opcheck and torch.compile; what it refuses."""

import itertools

import pytest
import torch
from group_norm_terms import assert_right, textbook
from helpers import LAYOUTS, assert_same_bits, laid_out
from torch import Tensor

from fastdiff.ops.group_norm_silu import group_norm_silu

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Outputs start as NaN, so that an element that is not written shows."""
    make = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: t.fill_(float("nan")) if (t := make(*a, **k)).is_floating_point() else t
    )


def numbers(channels: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(channels).to(dtype)


# channels, channels of x2, groups: of one channel, odd, straddling the border, wider than a tile, the usual 32
CHANNELS = ((5, 0, 5), (21, 0, 3), (7, 5, 4), (20, 16, 3), (130, 30, 32), (192, 0, 32), (48, 53, 1))
PIXELS = ((3,), (1, 70), (4, 4), (9, 15), (2, 3, 5), (13, 41))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_against_float64(backend, rng, dtype, channels, layout):
    first, second, groups = channels
    for pixels in rng.sample(PIXELS, 3):
        batch, silu = rng.choice([1, 2, 3]), rng.random() < 0.7
        x = laid_out(torch.randn(batch, first, *pixels).to(dtype), layout)
        x2 = torch.randn(batch, second, *pixels).to(dtype) if second else None
        c = first + second
        add = rng.choice([None, torch.randn(c), torch.randn(1, c).to(dtype), torch.randn(batch, c).to(dtype)])
        if x2 is not None:
            x2 = laid_out(x2, rng.choice([layout, "contiguous", "channels_last"]))
        weight = rng.choice([None, numbers(c, torch.float32), numbers(c, dtype)])
        bias = rng.choice([None, numbers(c, torch.float32), numbers(c, dtype)])
        options = {"x2": x2, "add": add, "silu": silu, "eps": rng.choice([1e-5, 1e-3])}
        got = group_norm_silu(x, weight, bias, groups, **options, backend=backend)
        assert_right(got, x, weight, bias, groups, **options)
        last = layout == "channels_last" and x.ndim == 4 and not x.is_contiguous()
        assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(backend, seed, dtype, layout):
    """Strided inputs, slices of channels in both formats, strided vectors: the numbers of contiguous ones."""
    make = torch.randn(3, 18, 7, 6).to(dtype)
    x, x2 = laid_out(make[:, :12], layout), laid_out(make[:, 12:], layout)
    weight, bias, add = torch.randn(18, 2)[:, 0], torch.randn(18, 3)[:, 1], torch.randn(18, 3).to(dtype).T
    got = group_norm_silu(x, weight, bias, 6, x2=x2, add=add, backend=backend)
    assert_right(got, x, weight, bias, 6, x2=x2, add=add)
    whole = laid_out(make, "channels_last" if layout == "channels_last" else "contiguous")
    part = whole[:, 3:12]
    got = group_norm_silu(part, weight[:9], None, 3, add=add[:, :9], silu=False, backend=backend)
    assert_right(got, part, weight[:9], None, 3, add=add[:, :9], silu=False)
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert got.is_contiguous(memory_format=format)
    embedding = torch.randn(3, 36).to(dtype)[:, 18:]  # half of a projection
    got = group_norm_silu(x, None, None, 2, x2=x2, add=embedding, backend=backend)
    assert_right(got, x, None, None, 2, x2=x2, add=embedding)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_means_far_above_the_deviation(backend, seed, layout):
    """|mean| = 1000·std, the mean different in each channel's first rows, and cancelled by ``add``."""
    noise = torch.randn(2, 8, 16, 33)
    x = laid_out(noise + 1000, layout)
    assert_right(group_norm_silu(x, None, None, 2, backend=backend), x, None, None, 2)
    x = noise + torch.randn(1, 8, 1, 1) * 1000
    x[:, :, 0] += 1000
    x = laid_out(x, layout)
    add = -x.mean((0, 2, 3))
    assert_right(group_norm_silu(x, None, None, 8, backend=backend), x, None, None, 8)
    got = group_norm_silu(x, None, None, 4, add=add, backend=backend)
    assert_right(got, x, None, None, 4, add=add)


def test_large_planes_and_groups(backend, seed):
    """Many blocks of rows; a group of more channels than are walked side by side, in both inputs."""
    for layout in ("contiguous", "channels_last"):
        x = laid_out(torch.randn(1, 24, 97, 101) * 3 + 5, layout)
        weight, bias = torch.randn(24), torch.randn(24)
        assert_right(group_norm_silu(x, weight, bias, 3, backend=backend), x, weight, bias, 3)
        x, x2 = (laid_out(torch.randn(2, c, 5, 3), layout) for c in (1500, 1061))
        assert_right(group_norm_silu(x, None, None, 1, x2=x2, backend=backend), x, None, None, 1, x2=x2)


def test_one_pixel(backend, seed):
    for shape in ((4, 30), (4, 30, 1), (4, 30, 1, 1)):
        x = torch.randn(shape)
        assert_right(group_norm_silu(x, None, None, 5, backend=backend), x, None, None, 5)
        x = torch.randn(4, 60, *shape[2:])[:, ::2]
        assert_right(group_norm_silu(x, None, None, 5, backend=backend), x, None, None, 5)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0), (2, 4, 0, 3), (0, 4)])
def test_empty(backend, shape):
    x = torch.zeros(shape)
    assert group_norm_silu(x, None, None, 2, backend=backend).shape == x.shape
    assert group_norm_silu(x, None, None, 2, x2=x, backend=backend).shape == (shape[0], 8, *shape[2:])


def test_extremes(backend):
    """A constant group is its bias; silu of far negative y is 0; infinity and NaN stay in their group."""
    x = torch.full((1, 4, 2, 5), 3.0)
    bias = torch.tensor([-1e30, 1e30, -200.0, 50.0])
    y = group_norm_silu(x, None, bias, 2, backend=backend)
    assert torch.equal(y[0, :, 0, 0].abs() < 1e-30, torch.tensor([True, False, True, False]))
    assert torch.allclose(y[0, 1::2], bias[1::2, None, None].expand(2, 2, 5))
    for bad in (float("nan"), float("inf")):
        for dtype, layout in itertools.product(DTYPES, ("contiguous", "channels_last")):
            x = torch.randn(2, 6, 4, 5).to(dtype)
            x[1, 3, 2, 2] = bad
            y = group_norm_silu(laid_out(x, layout), None, None, 3, backend=backend)
            assert y[1, 2:4].isnan().all()
            assert int(y.isnan().sum()) == 40


# batch, channels, channels of x2, side: a network's, one sample's, and of a group that is wider than a step
NETWORK = ((8, 128, 0, 32), (2, 256, 128, 32), (8, 256, 256, 16), (8, 256, 0, 8), (8, 512, 256, 8), (8, 512, 0, 4))
SPLIT = (*NETWORK, (1, 256, 0, 32), (1, 384, 0, 16), (3, 2304, 0, 4), (2, 33088, 7872, 1))


@pytest.mark.parametrize("shape", SPLIT)
def test_threads_do_not_change_the_result(simd, rng, shape):
    batch, first, second, side = shape
    layout = rng.choice(["channels_last", "channels_last", "contiguous"])
    dtype, c = rng.choice(DTYPES), first + second
    x, x2 = (laid_out(torch.randn(batch, n, side, side).to(dtype), layout) for n in (first, second))
    add = rng.choice([None, torch.randn(c), torch.randn(batch, c).to(dtype)])
    options = {"x2": x2 if second else None, "add": add, "silu": rng.random() < 0.5}
    weight, bias = torch.randn(2, c)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(group_norm_silu(x, weight, bias, 32, **options, backend="native"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(results[0], other)
    assert_right(results[0], x, weight, bias, 32, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_group_is_its_own(simd, seed, dtype, layout):
    """A group's bits do not depend on its neighbours, whichever channel its vectors begin at."""
    x, x2 = (laid_out(torch.randn(2, c, 5, 4).to(dtype), layout) for c in (40, 20))
    weight, bias, add = torch.randn(3, 60)
    got = group_norm_silu(x, weight, bias, 6, x2=x2, add=add, backend="native")
    for i in range(6):
        part = slice(10 * i, 10 * i + 10)
        alone = (x[:, part] if i < 4 else x2[:, 10 * i - 40 : 10 * i - 30], weight[part], bias[part])
        assert_same_bits(got[:, part], group_norm_silu(*alone, 1, add=add[part], backend="native"), f"group {i}")


# ---- gradients, opcheck, torch.compile


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"x": (3, 8, 4, 5), "x2": (3, 4, 4, 5), "add": (3, 12), "weight": (12,), "bias": (12,)}
    return {name: torch.randn(shape).to(dtype).requires_grad_() for name, shape in shapes.items()}


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("each", [True, False])
def test_gradients(backend, seed, silu, each):
    leaves = inputs()
    if not each:
        leaves["add"] = torch.randn(12).requires_grad_()
    upstream = torch.randn(3, 12, 4, 5)
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    (textbook(**exact, groups=3, silu=silu) * upstream).sum().backward()
    (group_norm_silu(**leaves, groups=3, silu=silu, backend=backend) * upstream).sum().backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad.double(), exact[name].grad, rtol=1e-4, atol=1e-5, msg=name)


def test_second_gradients_and_flat_tensors(seed):
    """The gradient is differentiable; without pixels and without the optional tensors too."""
    x = torch.randn(3, 8).requires_grad_()
    found = []
    for function, leaf in ((group_norm_silu, x), (textbook, x.detach().double().requires_grad_())):
        (first,) = torch.autograd.grad(function(leaf, None, None, 2).square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), leaf)[0].double())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_opcheck(backend, seed):
    o = inputs()
    x = o["x"].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    rest = (o["x2"], o["add"], o["weight"], o["bias"], 3, 1e-5, True, backend)
    torch.library.opcheck(torch.ops.fastdiff.group_norm_silu.default, (x, *rest))
    plain = (x.detach().bfloat16(), None, None, None, None, 4, 1e-5, False, backend)
    torch.library.opcheck(torch.ops.fastdiff.group_norm_silu.default, plain)


def test_compiled(backend, seed):
    o = inputs()

    def function(x, x2, add, weight, bias):
        return group_norm_silu(x * 2, weight, bias, 3, x2=x2, add=add, backend=backend) * 2

    torch._dynamo.reset()
    traced = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same_bits(traced(**o), function(**o))
    gradients = []
    for call in (function, traced):
        gradients.append(torch.autograd.grad(call(**o).square().sum(), list(o.values())))
    for a, b in zip(*gradients, strict=True):
        assert_same_bits(a, b)


# ---- what it refuses


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"x": [1.0]}, TypeError, "x must"),
        ({"x": torch.zeros(2, 6, 3, dtype=torch.float64)}, TypeError, "x must"),
        ({"x": torch.zeros(2, 6, 3, dtype=torch.int64)}, TypeError, "x must"),
        ({"x": torch.zeros(2, 6, 3).to_sparse()}, TypeError, "x must"),
        ({"x": torch.zeros(6)}, ValueError, "x must"),
        ({"x": torch.zeros(2, 0, 3)}, ValueError, "x must"),
        ({"x": torch.zeros(2, 6, 3, device="meta")}, RuntimeError, "meta tensors"),
        ({"groups": 4}, ValueError, "groups must"),
        ({"groups": 0}, ValueError, "groups must"),
        ({"groups": 2.0}, TypeError, "groups must"),
        ({"eps": -1e-5}, ValueError, "eps must"),
        ({"eps": float("nan")}, ValueError, "eps must"),
        ({"eps": "1e-5"}, TypeError, "eps must"),
        ({"x2": torch.zeros(2, 3, 3, dtype=torch.float16)}, TypeError, "x2 must"),
        ({"x2": torch.zeros(2, 3, 4)}, ValueError, "x2 must"),
        ({"x2": torch.zeros(1, 3, 3)}, ValueError, "x2 must"),
        ({"x2": torch.zeros(2, 3)}, ValueError, "x2 must"),
        ({"x2": torch.zeros(2, 3, 3, device="meta")}, ValueError, "x2 must"),
        ({"x2": 1.0}, TypeError, "x2 must"),
        ({"x2": torch.zeros(2, 2, 3)}, ValueError, "groups must"),
        ({"weight": torch.zeros(5)}, ValueError, "weight must"),
        ({"weight": torch.zeros(1, 6)}, ValueError, "weight must"),
        ({"weight": 1.0}, TypeError, "weight must"),
        ({"bias": torch.zeros(6, dtype=torch.float16)}, TypeError, "bias must"),
        ({"bias": torch.zeros(6, device="meta")}, ValueError, "bias must"),
        ({"add": torch.zeros(3, 6)}, ValueError, "add must"),
        ({"add": torch.zeros(2, 6, 1)}, ValueError, "add must"),
        ({"add": torch.zeros(2, 6, dtype=torch.int32)}, TypeError, "add must"),
        ({"silu": 1}, TypeError, "silu must"),
        ({"backend": "fast"}, ValueError, "backend"),
    ],
)
def test_refuses(change, error, names):
    arguments = {"x": torch.zeros(2, 6, 3), "weight": None, "bias": None, "groups": 3, **change}
    with pytest.raises(error, match=names):
        group_norm_silu(**arguments)
