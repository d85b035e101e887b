"""conv2d by every kernel against torch's in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits
from test_bind import image, like, poison

from fastdiff.ops import native
from fastdiff.ops.conv2d import bind, conv2d
from fastdiff.ops.conv2d.choice import select

CASES = {  # channels, features, window, size, and what conv2d is told
    "3x3": (32, 32, 3, (8, 8), {"padding": 1}),
    "one channel": (1, 32, 3, (8, 8), {"padding": 1}),
    "one feature": (32, 1, 3, (8, 8), {"padding": 1}),
    "odd": (20, 12, 3, (7, 5), {"padding": 1}),
    "large": (64, 48, 3, (32, 32), {"padding": 1}),
    "pixel": (24, 40, 1, (6, 7), {}),
    "two": (32, 64, 3, (9, 8), {"stride": 2, "padding": 1}),
    "right and bottom": (32, 64, 3, (8, 8), {"stride": 2, "padding": ((0, 1), (0, 1))}),
    "rows and columns": (8, 8, 3, (6, 9), {"stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)}),
    "groups": (12, 24, 3, (6, 5), {"groups": 4, "padding": 1}),
    "depthwise": (32, 32, 5, (9, 9), {"groups": 32, "padding": 2}),
    "doubled": (32, 32, 3, (4, 5), {"padding": 1, "upsample": True}),
    "doubled, few": (20, 12, 3, (4, 5), {"padding": 1, "upsample": True}),
    "doubled, 5x5": (8, 8, 5, (4, 5), {"padding": 2, "upsample": True}),
}
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def textbook(x, weight, bias, inputs, pointwise, residual, options):
    """In float64, by torch."""
    x = x.double()
    if options.get("upsample"):
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    padding = options.get("padding", 0)
    (top, bottom), (left, right) = [
        p if isinstance(p, tuple) else (p, p) for p in (padding if isinstance(padding, tuple) else (padding, padding))
    ]
    rest = {name: options[name] for name in ("stride", "dilation", "groups") if name in options}
    y = F.conv2d(F.pad(x, (left, right, top, bottom)), weight.double(), None if bias is None else bias.double(), **rest)
    for one, w in zip(inputs, pointwise, strict=True):
        y = y + F.conv2d(one.double(), w.double())
    return y if residual is None else y + residual.double()


def operands(case, batch=2, dtype=torch.float32, layout="contiguous", inputs=0, residual=False):
    channels, features, side, size, options = CASES[case]
    x = image((batch, channels, *size), layout, dtype)
    weight = (torch.randn(features, channels // options.get("groups", 1), side, side) / side).to(dtype)
    bias = torch.randn(features, 2).to(dtype)[:, 1]
    shape = textbook(x, weight, bias, (), (), None, options).shape
    images = tuple(image((batch, c, *shape[2:]), layout, dtype) for c in (8, 5)[:inputs])
    points = tuple(torch.randn(features, i.shape[1], 1, 1).to(dtype) for i in images)
    return (x, weight, bias, images, points, image(shape, layout, dtype) if residual else None), options


def close(got, expected, dtype, terms):
    """Within a few units of roundoff of sums of so many products."""
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    tolerance = TOLERANCE[dtype] * (1 + terms**0.5)
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("case", list(CASES))
def test_against_torch(seed, case, dtype):
    for layout, inputs, residual in itertools.product(
        ("contiguous", "channels_last", "columns", "slice", "offset"), (0, 2), (False, True)
    ):
        given, options = operands(case, 2, dtype, layout, inputs, residual)
        x, weight, bias, images, points, rest = given
        sums = {"inputs": images, "pointwise": points, "residual": rest}
        call = bind(x, weight, bias, **sums, **options)
        poison()
        got = call(x, rest, images)
        close(got, textbook(*given, options), dtype, weight[0].numel() + 13)
        assert_same_bits(got, conv2d(x, weight, bias, **sums, **options))
        x, images = like(x), tuple(map(like, images))
        got = call(x, rest, images)
        close(got, textbook(x, weight, bias, images, points, rest, options), dtype, weight[0].numel() + 13)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("backend", ["torch", "reference", "native"])
@pytest.mark.parametrize("case", list(CASES))
def test_each_backend(seed, case, backend, exact):
    given, options = operands(case, residual=True)
    x, weight, bias, _, _, residual = given
    serves = case in ("3x3", "large", "doubled") and not exact and not isinstance(native.extension(), str)
    if backend == "native" and not serves:
        with pytest.raises(RuntimeError, match="cannot serve this conv2d"):
            conv2d(x, weight, bias, residual=residual, exact=exact, backend=backend, **options)
        return
    got = conv2d(x, weight, bias, residual=residual, exact=exact, backend=backend, **options)
    close(got, textbook(*given, options), torch.float32, weight[0].numel())


def test_one_image(seed):
    """Small convolutions of one image take another kernel."""
    for case in CASES:
        given, options = operands(case, 1)
        x, weight, bias, *_ = given
        close(conv2d(x, weight, bias, **options), textbook(*given, options), torch.float32, weight[0].numel())


def test_shapes_share_weights(seed):
    """Two batch sizes share what is packed where its form is the same, and a layer keeps at most four forms."""
    weight = torch.randn(24, 40, 3, 3)
    packed = {}
    for batch in (2, 3, 2, 5):
        x = torch.randn(batch, 40, 16, 16)
        close(bind(x, weight, padding=1, packed=packed)(x), F.conv2d(x.double(), weight.double(), padding=1),
              torch.float32, 360)  # fmt: skip
    if torch.backends.mkldnn.is_available():
        assert len(packed) == 1
    for height, width in itertools.product((4, 7, 14, 33, 56), (4, 8, 40)):
        x = torch.randn(2, 40, height, width)
        bind(x, weight, padding=1, packed=packed)(x)
    assert len(packed) <= 5  # and torch's own form
    kept = {}
    suited = torch.randn(64, 64, 3, 3)
    for batch in (1, 4):
        x = torch.randn(batch, 64, 8, 8)
        bind(x, suited, torch.randn(64), padding=1, packed=kept)
    assert len(kept) == (2 if not isinstance(native.extension(), str) else len(kept))


@pytest.mark.parametrize("bias", [torch.randn(16)[::2], torch.randn(8, 3)[:, 1], torch.randn(1).expand(8)])
def test_biases_that_are_not_contiguous(seed, bias):
    """oneDNN's operations read them as if they were."""
    for channels, side, options in ((8, 1, {}), (8, 3, {"padding": 1}), (8, 3, {"padding": 1, "upsample": True}),
                                    (32, 3, {"padding": 1})):  # fmt: skip
        for batch in (1, 4):
            x, weight = torch.randn(batch, channels, 16, 16), torch.randn(8, channels, side, side)
            got = bind(x, weight, bias, **options)(x)
            close(got, textbook(x, weight, bias, (), (), None, options), torch.float32, weight[0].numel())


def test_weights_with_any_stride_of_a_dimension_of_one(seed):
    """torch's grouped convolutions of channels_last images read it."""
    x = torch.randn(2, 64, 5, 7)
    dense = torch.randn(10, 32, 1, 3).contiguous(memory_format=torch.channels_last)
    want = textbook(x, dense, None, (), (), None, {"groups": 2})
    for stride in (0, 1, 32, 7):
        weight = dense.as_strided(dense.shape, (96, 1, stride, 32))
        for layout in (torch.contiguous_format, torch.channels_last):
            close(conv2d(x.contiguous(memory_format=layout), weight, groups=2), want, torch.float32, 96)


def test_float32_weights_of_a_float64_image(seed):
    """Their sums, of the doubled image, are float64, too."""
    x, weight = torch.randn(2, 6, 5, 4, dtype=torch.float64), torch.randn(8, 6, 3, 3)
    options = {"padding": 1, "upsample": True}
    want = textbook(x, weight.double(), None, (), (), None, options)
    torch.testing.assert_close(conv2d(x, weight, **options), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", list(CASES))
def test_gradients(seed, case):
    given, options = operands(case, inputs=2, residual=True)
    leaves = [t.detach().clone().requires_grad_() for t in (*given[:3], *given[3], *given[4], given[5])]
    wide = [t.detach().double().requires_grad_() for t in leaves]

    def call(function, t):
        if function is textbook:
            return textbook(t[0], t[1], t[2], t[3:5], t[5:7], t[7], options)
        return conv2d(t[0], t[1], t[2], inputs=t[3:5], pointwise=t[5:7], residual=t[7], **options)

    y, expected = call(conv2d, leaves), call(textbook, wide)
    close(y.detach(), expected.detach(), torch.float32, given[1][0].numel())
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    for a, b in zip(leaves, wide, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-3, atol=1e-3 * float(b.grad.abs().max()))
    with pytest.raises(ValueError, match="no gradients"):
        conv2d(leaves[0], leaves[1], backend="native", **options)


def test_autocast_changes_nothing(seed):
    for case in CASES:
        given, options = operands(case)
        x, weight, bias, *_ = given
        call = bind(x, weight, bias, **options)
        expected = call(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same_bits(call(x), expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": 3}, TypeError, "x must be a tensor"),
        ({"x": torch.zeros(2, 8, 4)}, ValueError, "x must have the shape"),
        ({"x": torch.zeros(2, 8, 4, 4, dtype=torch.int64)}, TypeError, "floating point"),
        ({"weight": torch.zeros(4, 7, 3, 3)}, ValueError, "weight must have the shape"),
        ({"weight": None}, TypeError, "weight must be a tensor"),
        ({"weight": torch.zeros(4, 8, 3, 3, dtype=torch.float16)}, TypeError, "weight must be"),
        ({"weight": torch.zeros(4, 8, 9, 9)}, ValueError, "x must be larger"),
        ({"bias": torch.zeros(5)}, ValueError, "bias must have the shape"),
        ({"stride": 0}, ValueError, "stride must be in"),
        ({"stride": (1, 2, 3)}, ValueError, "stride must be an int or a pair"),
        ({"padding": -1}, ValueError, "padding must be in"),
        ({"padding": "same"}, ValueError, "padding must be an int"),
        ({"padding": ((0, 1), (0, -1))}, ValueError, r"padding\[1\]\[1\] must be in"),
        ({"dilation": 0}, ValueError, "dilation must be in"),
        ({"groups": 3}, ValueError, "weight must have the shape"),
        ({"upsample": 1}, TypeError, "upsample must be a bool"),
        ({"exact": None}, TypeError, "exact must be a bool"),
        ({"inputs": (torch.zeros(2, 3, 4, 4),)}, ValueError, "pointwise must have a weight for each"),
        ({"inputs": torch.zeros(1)}, TypeError, "inputs must be a sequence"),
        ({"inputs": (torch.zeros(2, 3, 4, 4),), "pointwise": (torch.zeros(4, 3, 3, 3),)}, ValueError, "pointwise"),
        ({"inputs": (torch.zeros(2, 3, 5, 4),), "pointwise": (torch.zeros(4, 3, 1, 1),)}, ValueError, "inputs"),
        ({"residual": torch.zeros(2, 4, 5, 4)}, ValueError, "residual must have the shape"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
        ({"backend": "native"}, RuntimeError, "cannot serve this conv2d"),
    ],
)
def test_refusals(change, error, words):
    arguments = {"x": torch.zeros(2, 8, 4, 4), "weight": torch.zeros(4, 8, 3, 3), "padding": 1, **change}
    for function in (conv2d, bind):
        with pytest.raises(error, match=words):
            function(arguments.pop("x"), arguments.pop("weight"), **arguments)
        arguments = {"x": torch.zeros(2, 8, 4, 4), "weight": torch.zeros(4, 8, 3, 3), "padding": 1, **change}


def test_selection_is_by_rule():
    from fastdiff.ops.conv2d.geometry import geometry_of

    def chosen(batch, channels, features, side, size, exact=False, dtype=torch.float32, **options):
        x = torch.empty(batch, channels, size, size, dtype=dtype)
        weight = torch.empty(features, channels // options.get("groups", 1), side, side)
        geometry = geometry_of(
            options.get("stride", 1), side // 2, 1, options.get("groups", 1), options.get("upsample", False)
        )
        return select(x, weight, geometry, (), (), False, exact, "auto")

    native_serves = not isinstance(native.extension(), str) and native.extension().cpu_simd() != "portable"
    if native_serves:
        assert chosen(1, 64, 64, 3, 8) == "winograd"
        assert chosen(1, 64, 64, 3, 8, upsample=True) == "winograd"
    assert chosen(1, 64, 64, 3, 8, exact=True, upsample=True) == "plain"
    assert chosen(2, 20, 20, 3, 8, upsample=True) == "phases"
    assert chosen(1, 16, 16, 3, 8) == "plain"
    assert chosen(4, 64, 64, 1, 8) == "product"
    assert chosen(4, 64, 64, 3, 16, stride=2) == "blocked"
    assert chosen(4, 64, 64, 3, 8, dtype=torch.float64) == "plain"
