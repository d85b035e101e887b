"""A recipe makes the images that ``sample`` made, to the bit, also after it was text."""

import inspect
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SEED, Affine, assert_same_bits
from torch import Tensor, nn

import fastdiff
from fastdiff import FlowSchedule, NoiseSchedule, Recipe, samplers
from fastdiff.files import parse_json
from fastdiff.pictures.recipe import BESIDE, IN_THE_PLAN, KEPT, WITHOUT_EFFECT, from_object

SHAPE = (5, 3, 4, 4)


class Labelled(nn.Module):
    """Every image by itself, so that the batch does not change its bits."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.75, dtype=dtype))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, more: Any = None) -> Tensor:
        out = x * self.weight + t.view(-1, 1, 1, 1) * 1e-4
        return out if y is None else out + y.view(-1, 1, 1, 1).to(x.dtype) * 0.01


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


Y = torch.tensor([3, 1, 4, 1, 5])
NONE = torch.zeros(5, dtype=torch.int64)
MASK = torch.zeros(4, 4, dtype=torch.bool)
MASK[1:3] = True
GUIDED = {"model_kwargs": {"y": Y}, "uncond_kwargs": {"y": NONE}}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "nothing": {"steps": 3},
    "seed": {"sampler": "ddim", "steps": 4, "seed": 2**63 + 5, "sample_offset": 3, "eta": 0.5},
    "seeds": {"steps": 4, "seeds": [7, 7, 2**64 - 1, 0, 3]},
    "a range of seeds": {"steps": 2, "seeds": range(5)},
    "numpy's numbers": {"sampler": "ddim", "steps": 3, "eta": np.float32(0.5), "thresholding": np.float64(0.9)},
    "a tensor of seeds": {"steps": 2, "seeds": torch.tensor([5, 4, 3, 2, 1])},
    "options": {"sampler": "unipc", "steps": 5, "sampler_options": {"order": 3, "disable_corrector": (0, 2)}},
    "clip": {"sampler": "ddim", "steps": 3, "clip": 1.0, "variance": "fixed_small"},
    "schedule": {"sampler": "heun", "steps": 3, "schedule": FlowSchedule(3.0), "prediction": "flow_prediction"},
    "spacing": {"sampler": "dpmpp_2m", "steps": 4, "schedule": "cosine", "spacing": fastdiff.Spacing("karras", rho=5)},
    "plan": {"sampler": samplers.dpmpp_sde(NoiseSchedule.cosine(), 4)},
    "function": {"sampler": lambda schedule, steps: samplers.euler(schedule, steps), "steps": 3},
    "x_T": {"sampler": "ddim", "steps": 4, "x_T": randn(*SHAPE)},
    "x_T at a row": {"sampler": "ddim", "steps": 4, "x_T": randn(*SHAPE), "start_step": 2},
    "image": {"sampler": "ddim", "steps": 4, "x_init": randn(1, 3, 4, 4).expand(SHAPE), "start_step": 1},
    "strength": {"sampler": "dpmpp_2m", "steps": 10, "x_init": randn(*SHAPE), "strength": 0.6},
    "no strength": {"sampler": "ddim", "steps": 10, "x_init": randn(*SHAPE), "strength": 0.0},
    "full strength": {"sampler": "ddim", "steps": 10, "x_init": randn(*SHAPE), "strength": 1.0},
    "mask": {"steps": 4, "mask": MASK, "known": randn(*SHAPE)},
    "a mask each": {"steps": 4, "mask": torch.rand(5, 1, 4, 4), "known": randn(*SHAPE)},
    "guidance": {
        "sampler": "ddim", "steps": 6, "model_kwargs": {"y": Y, "more": None}, "uncond_kwargs": {"y": NONE},
        "guidance_scale": 2.5, "guidance_rescale": 0.5, "guidance_interval": (0.1, math.inf),
    },
    "two scales": {
        "sampler": "ddim", "steps": 3, "model_kwargs": {"y": Y}, "guidance_scale": (3.0, 1.5),
        "uncond_kwargs": ({"y": NONE}, {"y": NONE + 1}),
    },
    "a scale a call": {"sampler": "ddim", "steps": 3, **GUIDED, "guidance_scale": [1, 2.5, 3]},
    "an array of scales": {"sampler": "ddim", "steps": 3, **GUIDED, "guidance_scale": np.array([1.0, 2.5, 3.0])},
    "a scale a step of two calls": {"sampler": "heun", "steps": 3, **GUIDED, "guidance_scale": [1, 2.5, 3]},
    "two scales a call": {
        "sampler": "ddim", "steps": 2, "model_kwargs": {"y": Y}, "guidance_scale": [(3.0, 1.5), (2.0, 1.1)],
        "uncond_kwargs": ({"y": NONE}, {"y": NONE + 1}),
    },
    "a function of the level": {
        "sampler": "heun", "steps": 3, **GUIDED, "guidance_scale": lambda level: 1 + level.t / 500,
        "guidance_interval": (0.1, 5.0),
    },
    "one scale in every row": {"sampler": "ddim", "steps": 3, **GUIDED, "guidance_scale": lambda level: 2.5},
    "keywords in lists": {
        "sampler": "ddim", "steps": 2, "model_kwargs": {"y": Y, "more": [{"a": Y}, (Y, None)]}, "guidance_scale": 2.0,
        "uncond_kwargs": {"y": NONE, "more": [{"a": NONE}, (NONE, None)]},
    },
    "thresholding": {"sampler": "ddim", "steps": 3, "thresholding": (0.9, 2.0)},
    "dtype": {"sampler": "ddim", "steps": 3, "model_dtype": torch.bfloat16},
    "how": {"sampler": "ddim", "steps": 3, "backend": "reference", "progress": False, "device": "cpu"},
}  # fmt: skip


@pytest.fixture(params=ARGUMENTS)
def arguments(request: pytest.FixtureRequest) -> dict[str, Any]:
    return ARGUMENTS[request.param]


def network(arguments: dict[str, Any]) -> nn.Module:
    return Labelled(arguments.get("model_dtype", torch.float32))


def test_a_recipe_makes_the_images_again_also_as_text(arguments: dict[str, Any]) -> None:
    model = network(arguments)
    images = fastdiff.sample(model, SHAPE, **arguments)
    recipe = Recipe.of(model, SHAPE, **arguments)
    assert_same_bits(recipe.sample(model), images)
    text = recipe.to_json()
    again = from_object(parse_json(text, infinities=True))
    assert again == recipe
    assert again.to_json() == text
    assert text.isascii()
    assert_same_bits(again.sample(model, backend="reference"), images)


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_batches_are_cut_from_every_argument(arguments: dict[str, Any], size: int) -> None:
    model = network(arguments)
    recipe = Recipe.of(model, SHAPE, batch_size=size, **arguments)
    assert_same_bits(recipe.sample(model), fastdiff.sample(model, SHAPE, **arguments))


def test_states_are_those_of_sample_iter() -> None:
    arguments, model = ARGUMENTS["guidance"], Labelled()
    recipe = Recipe.of(model, SHAPE, **arguments)
    own, theirs = list(recipe.states(model)), list(fastdiff.sample_iter(model, SHAPE, **arguments))
    assert [state.row for state in own] == [state.row for state in theirs] == list(range(7))
    for a, b in zip(own, theirs, strict=True):
        assert_same_bits(a.x, b.x)
    with pytest.raises(ValueError, match="one batch"):
        Recipe.of(model, SHAPE, batch_size=2, **arguments).states(model)


def test_every_argument_of_sample_has_its_place() -> None:
    """Whoever adds an argument to ``sample`` says here what becomes of it."""
    refused = {"generator", "noise_fn", "resume", "cond_fn"}
    places = ["model", "shape", *IN_THE_PLAN, *KEPT, *WITHOUT_EFFECT, *BESIDE, *refused]
    assert sorted(places) == sorted(inspect.signature(fastdiff.sample).parameters)


@pytest.mark.parametrize(
    "bad",
    [
        {"generator": torch.Generator()},
        {"noise_fn": lambda stream, draw, shape: torch.zeros(shape)},
        {"cond_fn": lambda x, t: x},
        {"resume": fastdiff.State(randn(*SHAPE), None, None, (None,) * 4, 1)},
        {"model_kwargs": {"more": lambda: 1}},
    ],
)
def test_what_is_no_data_is_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"a recipe cannot hold {next(iter(bad))}"):
        Recipe.of(Labelled(), SHAPE, sampler="ddim", steps=3, **bad)


def test_wrong_arguments_are_refused_as_sample_refuses_them() -> None:
    for bad in (
        {"seeds": 5},
        {"seeds": [1.5] * 5},
        {"steps": 0},
        {"sampler": "dpmp_2m"},
        {"seed": -1},
        {"sample_offset": 2**32 - 4},
        {"guidance_interval": (2, 1)},
        {"x_T": randn(2)},
    ):
        with pytest.raises((ValueError, TypeError)) as ours:
            Recipe.of(Labelled(), SHAPE, **bad)
        with pytest.raises((ValueError, TypeError)) as theirs:
            fastdiff.sample(Labelled(), SHAPE, **bad)
        assert str(ours.value) == str(theirs.value)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        Recipe.of(Labelled(), SHAPE, colour="red")
    with pytest.raises(TypeError, match="a recipe fixes seed; it takes device, backend"):
        Recipe.of(Labelled(), SHAPE, steps=2).sample(Labelled(), seed=3)


def test_defaults_that_are_given_make_the_same_recipe() -> None:
    model = Labelled()
    plain = Recipe.of(model, SHAPE, steps=3)
    told = Recipe.of(model, SHAPE, steps=3, seed=0, sample_offset=0, guidance_scale=1.0, start_step=0, device="cpu")
    assert plain == told
    assert plain != Recipe.of(model, SHAPE, steps=3, seed=1)


def test_a_recipe_prints_as_one_line() -> None:
    recipe = Recipe.of(Labelled(), SHAPE, sampler="heun", steps=3, seed=9, sample_offset=4)
    assert repr(recipe) == "5 images [3, 4, 4], seed 9, numbers 4 … 8, heun in 5 network calls, Labelled"
    for strength, calls in ((0.5, 4), (0.0, 0)):  # those that are made, of an image's way back
        recipe = Recipe.of(Labelled(), SHAPE, sampler="ddim", steps=8, x_init=torch.zeros(SHAPE), strength=strength)
        assert f"ddim in {calls} network calls" in str(recipe)


def test_networks_are_told_apart_by_weights_and_configuration() -> None:
    model = Labelled()
    first = Recipe.of(model, SHAPE, steps=2).network
    assert first == Recipe.of(model, SHAPE, steps=5).network
    with torch.no_grad():
        model.weight += 1
    changed = Recipe.of(model, SHAPE, steps=2).network
    assert (changed.sha256 == first.sha256, changed.name) == (False, first.name)
    assert Recipe.of(Labelled(torch.bfloat16), SHAPE, steps=2).network.dtype == "bfloat16"
    fields = {"sample_size": 4, "block_out_channels": (8,), "down_block_types": ("DownBlock2D",),
              "up_block_types": ("UpBlock2D",), "norm_num_groups": 4}  # fmt: skip
    nets = [fastdiff.models.UNet(**fields, norm_eps=eps) for eps in (1e-5, 1e-6)]
    nets[1].load_state_dict(nets[0].state_dict())
    hashes = [Recipe.of(net, SHAPE, steps=2).network.sha256 for net in nets]
    assert hashes[0] != hashes[1]  # an option that no weight shows
    nets[0].to(memory_format=torch.channels_last)
    moved = Recipe.of(nets[0], SHAPE, steps=2).network
    assert (moved.sha256, moved.channels_last) == (hashes[0], True)
    fastdiff.accelerate(nets[0].eval(), dtype=torch.float32)
    fast = Recipe.of(nets[0], SHAPE, steps=2).network
    assert fast.sha256 == hashes[0]
    assert fast.accelerated is not None
    assert (fast.accelerated.dtype, fast.accelerated.exact_convolutions) == ("float32", False)


def test_a_function_has_a_name_but_no_hash() -> None:
    def predict(x: Tensor, t: Tensor) -> Tensor:
        return x * 0.5

    found = Recipe.of(predict, SHAPE, steps=2).network
    assert found.name.endswith("predict")
    assert found.sha256 is None


def damaged(**changes: Any) -> dict[str, Any]:
    content = json.loads(Recipe.of(Affine(), (2, 1, 4, 4), steps=2).to_json())
    return {name: value for name, value in (content | changes).items() if value != "gone"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"format": "fastdiff.plan"}, "format must be"),
        ({"version": 2}, "format must be"),
        ({"version": True}, "format must be"),
        ({"shape": "gone"}, "shape"),
        ({"shape": [2, 1, 0, 4]}, r"\$\.shape"),
        ({"shape": []}, r"\$\.shape"),
        ({"shape": [1 << 40]}, r"\$\.shape"),
        ({"batch_size": 0}, r"\$\.batch_size"),
        ({"arguments": {"seed": 0, "callback": "os.system"}}, "does not keep: callback"),
        ({"arguments": {}}, "seed"),
        ({"arguments": {"seed": 1, "seeds": [1, 2]}}, "seed"),
        ({"arguments": {"seeds": 4}}, "seed"),
        ({"arguments": {"seed": 1, "sample_offset": "2"}}, "sample_offset"),
        ({"arguments": {"seed": 1, "model_dtype": "load"}}, "model_dtype"),
        ({"arguments": {"seed": 1, "model_dtype": ["float32"]}}, "model_dtype"),
        (
            {"arguments": {"seed": 1, "x_T": [{"tensor": "int8", "shape": [1 << 30], "values": [0]}]}},
            "1,073,741,824 by",
        ),
        ({"arguments": {"seed": 1, "x_T": {"tensor": "int8", "shape": "ab"}}}, "damaged"),
        ({"network": {}}, "name"),
        ({"network": {"name": "a", "path": "b"}}, "path"),
        ({"made_with": {"torch": 2}}, "made_with"),
        ({"plan": "gone"}, "plan"),
        ({"plan": {"format": "fastdiff.plan", "version": 1}}, "plan"),
        ({"code": "import os"}, "code"),
    ],
)
def test_damaged_recipes_are_refused_with_the_place(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        from_object(damaged(**changes))
