"""Arguments as JSON has them: every bit comes back, and what was damaged is refused."""

import base64
import json
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SEED, assert_same_bits

from fastdiff.pictures.values import DTYPES, from_plain, to_plain


def random_tensor(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    numbers = torch.randn(shape, generator=generator) * 100
    return numbers > 0 if dtype == "bool" else numbers.to(getattr(torch, dtype))


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 2, 4), (2, 0, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_come_back_to_the_bit(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = random_tensor(dtype, shape)
    back = from_plain(json.loads(json.dumps(to_plain("x", {"a": [tensor, None, 1.5, "word", True]}))))
    assert back["a"][1:] == [None, 1.5, "word", True]
    if tensor.is_floating_point():
        assert_same_bits(back["a"][0], tensor)
    assert back["a"][0].dtype == tensor.dtype
    assert torch.equal(back["a"][0], tensor)


def test_nan_infinity_and_negative_zero_come_back() -> None:
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    assert_same_bits(from_plain(to_plain("x", odd)), odd)


def test_one_image_for_all_samples_is_kept_once() -> None:
    image = random_tensor("float32", (1, 3, 8, 8))
    plain = to_plain("x_init", image.expand(64, 3, 8, 8))
    assert len(json.dumps(plain)) < 2 * image.numel() * 4
    assert_same_bits(from_plain(plain), image.expand(64, 3, 8, 8))
    signs = torch.tensor([[0.0, 1.0], [-0.0, 1.0]])  # equal, but not to the bit
    assert_same_bits(from_plain(to_plain("x", signs)), signs)
    assert to_plain("y", torch.full((9,), 4)) == {"tensor": "int64", "shape": [9], "values": [4]}


def test_numpy_s_numbers_are_numbers() -> None:
    assert to_plain("a", [np.int64(3), np.float32(0.5)]) == [3, 0.5]
    plain = to_plain("a", [np.float64(0.5), np.bool_(True), np.str_("word")])
    assert [type(value) for value in plain] == [float, bool, str]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (lambda: 1, "model_kwargs, a function"),
        ({"f": object()}, r"model_kwargs\['f'\], a object"),
        ([{1: 2}], r"model_kwargs\[0\], a dict"),
        ({"tensor": 3}, "model_kwargs, a dict"),  # which would be taken for a tensor
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.zeros(2, device="meta"), "meta"),
        (torch.eye(2).to_sparse(), "sparse"),
    ],
)
def test_what_is_no_data_is_named(value: Any, told: str) -> None:
    with pytest.raises(ValueError, match=f"a recipe cannot hold .*{told}"):
        to_plain("model_kwargs", value)


def packed(numbers: bytes) -> str:
    return base64.b64encode(zlib.compress(numbers)).decode()


@pytest.mark.parametrize(
    "damage",
    [
        {"tensor": "float32", "shape": [2], "zlib": packed(bytes(12))},  # longer than its shape
        {"tensor": "float32", "shape": [1], "zlib": packed(bytes(1 << 24))},  # a bomb
        {"tensor": "float32", "shape": [1 << 20, 1 << 20], "zlib": packed(bytes(4))},
        {"tensor": "float32", "shape": [4], "zlib": "AAAA"},
        {"tensor": "float32", "shape": [4], "zlib": "é"},
        {"tensor": "float32", "shape": [4]},
        {"tensor": "float32", "shape": [-4], "values": []},
        {"tensor": "float32", "shape": 4, "values": [1]},
        {"tensor": "float32", "shape": [2], "values": ["a", "b"]},
        {"tensor": "load", "shape": [1], "values": [1]},
        {"tensor": ["float32"], "shape": [1], "values": [1]},
        {"tensor": "int8", "shape": [2], "values": [1 << 70, 1]},
        {"tensor": "float32", "shape": [1], "values": [1], "more": 1},
    ],
)
def test_damaged_tensors_are_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a tensor of the recipe is damaged"):
        from_plain({"a": [damage]})
