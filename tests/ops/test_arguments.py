"""What the operations refuse, in words that name the argument; and that NumPy's integers are integers."""

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import ops
from fastdiff.plan.plan import Plan, Row

X = torch.zeros(1, 4, 4, 4)
W = torch.zeros(2, 4, 3, 3)
PLAN = fastdiff.samplers.ddim(fastdiff.NoiseSchedule.linear(), 5)
BEYOND = 10**400

CALLS = {
    "randn": lambda **options: ops.randn((2, 3), **options),
    "add_noise": lambda x=X, **options: ops.add_noise(x, 3, "linear", **options),
    "update": lambda x=X, outputs=X, **options: ops.update(x, outputs, PLAN, 1, **options),
    "group_norm_silu": lambda x=X, eps=1e-5, **options: ops.group_norm_silu(x, None, None, 2, eps, **options),
    "conv_epilogue": lambda x=X, **options: ops.conv_epilogue(x, **options),
    "attention": lambda x=X, scale=None, **options: ops.attention(x, x, x, scale, **options),
    "conv2d": lambda x=X, weight=W, **options: ops.conv2d(x, weight, **options),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", [[], {}, None, 3, "cuda"])
def test_a_backend_that_is_none(name, backend):
    with pytest.raises(ValueError, match="backend is"):
        CALLS[name](backend=backend)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("attention", {"scale": BEYOND}, "scale must be finite; got an int of"),
        ("attention", {"scale": float("nan")}, "scale"),
        ("attention", {"scale": 1e39}, "scale must be finite in float32; got 1e\\+39"),
        ("attention", {"scale": "1"}, "scale"),
        ("conv_epilogue", {"scale": BEYOND}, "scale must be finite; got an int of"),
        ("conv_epilogue", {"scale": True}, "scale"),
        ("group_norm_silu", {"eps": BEYOND}, "eps must be finite and at least 0; got an int of"),
        ("group_norm_silu", {"eps": 1e39}, "eps"),
        ("group_norm_silu", {"eps": -1e-9}, "eps"),
        ("update", {"outputs": [X, X], "guidance": ["a", 1.0]}, r"guidance\[0\] must be a number"),
        ("update", {"outputs": [X, X], "guidance": [1.0, None]}, r"guidance\[1\] must be a number"),
        ("update", {"outputs": [X, X], "guidance": [1.0, BEYOND]}, r"guidance\[1\] must be finite"),
        ("update", {"outputs": [X, X], "guidance": [float("nan"), 1.0]}, r"guidance\[0\] must be finite"),
        ("update", {"return_x0": 2}, "return_x0 must be a bool"),
        ("update", {"return_x0": "yes"}, "return_x0 must be a bool"),
        ("update", {"channels_last": 1}, "channels_last must be a bool"),
        ("update", {"model_dtype": []}, "model_dtype"),
        ("conv2d", {"stride": 0}, "stride"),
        ("conv2d", {"stride": (1,)}, "stride"),
        ("conv2d", {"padding": "same"}, "padding"),
        ("conv2d", {"padding": 1 << 30}, "padding must leave a result"),
        ("conv2d", {"padding": BEYOND}, "padding"),
        ("conv2d", {"dilation": 1.5}, "dilation"),
        ("conv2d", {"groups": 3}, "groups"),
        ("conv2d", {"weight": torch.zeros(2, 3, 3, 3)}, "weight"),
        ("conv2d", {"weight": 3}, "weight"),
        ("conv2d", {"bias": torch.zeros(3)}, "bias"),
        ("conv2d", {"inputs": [X]}, "pointwise"),
        ("conv2d", {"inputs": X, "pointwise": X}, "inputs"),
        ("conv2d", {"inputs": [3], "pointwise": [3]}, r"inputs\[0\]"),
        ("conv2d", {"residual": X}, "residual"),
    ],
)
def test_numbers_and_shapes(name, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        CALLS[name](**options)


NOT_DENSE = {
    "sparse": X.to_sparse(),
    "oneDNN's": X.to_mkldnn(),
    "quantised": torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
    "float8": X.to(torch.float8_e4m3fn),
    "complex": X.to(torch.complex64),
    "ints": X.long(),
    "no tensor": 3,
}
# The argument of each call, and what the message calls it.
TENSORS = [
    ("add_noise", "x", "x0"), ("add_noise", "noise", "noise"), ("update", "x", "x"), ("update", "outputs", "outputs"),
    ("update", "noise", "noise"), ("update", "mask", "mask"), ("group_norm_silu", "x", "x"),
    ("group_norm_silu", "x2", "x2"), ("conv_epilogue", "x", "x"), ("conv_epilogue", "residual", "residual"),
    ("attention", "x", "q"), ("conv2d", "x", "x"), ("conv2d", "weight", "weight"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # torch will drop its quantised tensors
@pytest.mark.parametrize("kind", NOT_DENSE)
@pytest.mark.parametrize(("name", "argument", "called"), TENSORS)
def test_tensors_of_other_kinds(name, argument, called, kind):
    with pytest.raises((TypeError, ValueError), match=rf"\b{called} must"):
        CALLS[name](**{argument: NOT_DENSE[kind]})


@pytest.mark.parametrize("kind", ["sparse", "quantised"])
def test_seeds_of_other_kinds(kind):
    with pytest.raises(TypeError, match="seeds must"):
        ops.randn((1, 3), seeds=NOT_DENSE[kind])


@pytest.mark.parametrize("name", CALLS)
def test_meta_tensors(name):
    """They hold no numbers, so that no backend serves them; a network's shapes are found by fake tensors."""
    options = {"device": "meta"} if name == "randn" else {"x": X.to("meta")}
    options |= {"outputs": X.to("meta")} if name == "update" else {}
    options |= {"weight": W.to("meta")} if name == "conv2d" else {}
    with pytest.raises(RuntimeError, match="meta tensors hold no numbers"):
        CALLS[name](**options)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_numpy_integers(seed, backend):
    """Of a width in which the sums that are made of them would not fit."""
    i8, u8, i32 = np.int8, np.uint8, np.int32
    x = torch.randn(2, 4, 3, 3)
    which, same = {"backend": backend}, torch.equal
    z = ops.randn((2, i32(3)), seed=i32(5), draw=i8(3), stream=u8(2), sample_offset=u8(255), **which)
    assert same(z, ops.randn((2, 3), seed=5, draw=3, stream=2, sample_offset=255, **which))
    z = ops.randn((2, 3), seeds=[u8(255), i32(3)], **which)
    assert same(z, ops.randn((2, 3), seeds=[255, 3], **which))
    got = ops.add_noise(x, i8(100), "linear", seed=i32(5), draw=u8(200), sample_offset=u8(255), **which)
    want = ops.add_noise(x, 100, "linear", seed=5, draw=200, sample_offset=255, **which)
    assert all(map(same, got, want))
    plan = fastdiff.samplers.ddpm(fastdiff.NoiseSchedule.linear(), 5)
    got = ops.update(x, x, plan, u8(1), seed=i32(5), sample_offset=u8(255), **which)
    assert same(got.x, ops.update(x, x, plan, 1, seed=5, sample_offset=255, **which).x)
    assert same(ops.group_norm_silu(x, None, None, u8(2), **which), ops.group_norm_silu(x, None, None, 2, **which))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_row_beyond_float32(backend):
    x = torch.ones(1, 2)
    plan = Plan((Row(t=0, alpha=1, sigma=1, x={"x0": 1.0}, p=1e39, q=1.0),))
    with pytest.raises(ValueError, match="p of row 0 is 1e\\+39"):
        ops.update(x, x, plan, 0, backend=backend)
    wide = ops.update(x.double(), x.double(), plan, 0).x
    assert float(wide[0, 0]) == pytest.approx(1e39)
