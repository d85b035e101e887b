"""`UNet` against diffusers' `UNet2DModel`, and what it refuses."""

import copy
import random

import pytest
import torch
from torch import Tensor

from fastdiff.models import UNet

CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "attention_head_dim": None,
}
CELEBA256 = {
    **CIFAR10,
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
}
SMALL = {
    **CIFAR10,
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}


@pytest.fixture(autouse=True)
def rng(rng: random.Random) -> random.Random:
    """The run's seed, for every test here."""
    return rng


def small(**fields) -> UNet:
    return UNet(**{**SMALL, **fields}).eval()


def pair(**config):
    """diffusers' model with random weights, and ours with the same."""
    theirs = pytest.importorskip("diffusers").UNet2DModel(**config).eval()
    # Biases and the affine parameters of norms start at constants that would hide a mistake in their place.
    for name, parameter in theirs.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.1)
    ours = UNet(**config).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return (got.double() - expected.double()).abs().max().item()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("config", "size", "parameters"), [(CIFAR10, 32, 35_746_307), (CELEBA256, 64, 113_673_219)])
def test_published_configurations_equal_diffusers(config, size, parameters):
    theirs, ours = pair(**config)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    x, t = torch.randn(1, 3, size, size), torch.randint(1000, [1])
    assert error(ours(x, t), theirs(x, t).sample) < 1e-5


def random_config(rng: random.Random) -> dict:
    levels, groups = rng.randint(1, 3), rng.choice([1, 2, 4])
    channels = tuple(8 * rng.randint(1, 3) for _ in range(levels))
    return {
        "in_channels": rng.randint(1, 4),
        "out_channels": rng.randint(1, 6),
        "center_input_sample": rng.random() < 0.5,
        "time_embedding_dim": rng.choice([None, 20]),
        "freq_shift": rng.randint(0, 1),
        "flip_sin_to_cos": rng.random() < 0.5,
        "down_block_types": tuple(rng.choice(["DownBlock2D", "AttnDownBlock2D"]) for _ in channels),
        "mid_block_type": rng.choice(["UNetMidBlock2D", "UNetMidBlock2D", None]),
        "up_block_types": tuple(rng.choice(["UpBlock2D", "AttnUpBlock2D"]) for _ in channels),
        "block_out_channels": channels,
        "layers_per_block": rng.randint(1, 3),
        "mid_block_scale_factor": rng.choice([1, 1.4142]),
        "downsample_padding": rng.randint(0, 1),
        "dropout": rng.choice([0.0, 0.3]),
        "act_fn": rng.choice(["silu", "swish"]),
        "attention_head_dim": rng.choice([None, 2, 4, 8]),
        "norm_num_groups": groups,
        "attn_norm_num_groups": rng.choice([None, 8]),
        "norm_eps": rng.choice([1e-6, 1e-5, 1e-3]),
        "add_attention": rng.random() < 0.7,
        "num_class_embeds": rng.choice([None, 5]),
        "num_train_timesteps": rng.choice([None, 1000]),
    }


@torch.no_grad()
@pytest.mark.parametrize("_", range(16))
def test_random_configurations_equal_diffusers_in_float64(rng, _):
    config = random_config(rng)
    print(config)
    theirs, ours = (model.double() for model in pair(**config))
    step = 2 ** (len(config["block_out_channels"]) - 1)
    batch, height, width = rng.randint(1, 3), step * rng.randint(1, 4), step * rng.randint(1, 4)
    x, t = torch.randn(batch, config["in_channels"], height, width).double(), torch.rand(batch) * 1000
    labels = torch.randint(5, [batch]) if config["num_class_embeds"] else None
    assert error(ours(x, t, labels), theirs(x, t, labels).sample) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_diffusers(seed, dtype):
    """Root-mean-squares of 6144 numbers, which another CPU's library changes less than the largest of them."""
    theirs, ours = pair(**{**SMALL, "block_out_channels": (32, 64)})
    x, t = torch.randn(8, 3, 16, 16).to(dtype), torch.randint(1000, [8])
    exact = copy.deepcopy(theirs).to(dtype).double()(x.double(), t).sample
    got = ours.to(dtype)(x, t)
    assert got.dtype == dtype
    errors = [(y.double() - exact).square().mean().sqrt() for y in (got, theirs.to(dtype)(x, t).sample)]
    assert float(errors[0]) <= 2 * float(errors[1])


def test_gradients_equal_diffusers():
    theirs, ours = (model.double().train() for model in pair(**SMALL))
    x, t = torch.randn(2, 3, 8, 8).double(), torch.randint(1000, [2])
    theirs(x, t).sample.square().sum().backward()
    ours(x, t).square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert error(parameter.grad, expected[name].grad) < 1e-9 * (1 + expected[name].grad.abs().max()), name


@torch.no_grad()
def test_memory_format_changes_no_more_than_rounding():
    model, x, t = small().double(), torch.randn(3, 3, 8, 8).double(), 500
    expected = model(x, t)
    x_last = x.to(memory_format=torch.channels_last)
    assert error(model(x_last, t), expected) < 1e-10
    got = model.to(memory_format=torch.channels_last)(x_last, t)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert error(got, expected) < 1e-10
    wide = torch.randn(3, 6, 8, 16).double()[:, ::2, :, ::2]  # strides of neither format
    assert error(model(wide, t), model(wide.contiguous(), t)) < 1e-10


@torch.no_grad()
def test_every_form_of_timestep_means_the_same(rng):
    model, x = small(), torch.randn(3, 3, 8, 8)
    t = rng.randrange(1000)
    expected = model(x, torch.full([3], t))
    forms = [t, float(t), torch.tensor(t), torch.tensor(float(t)), torch.full([3], float(t)), torch.full([3], t).int()]
    for form in forms:
        assert torch.equal(model(x, form), expected), form
    assert error(model(x, t + 0.5), model(x, torch.full([3], t + 0.5))) == 0
    assert error(model(x, t + 0.5), expected) > 0


def test_time_embedding_is_the_formula(rng):
    t = torch.rand(50) * 1000
    for shift, flip in [(0, True), (1, False)]:
        model = small(freq_shift=shift, flip_sin_to_cos=flip)
        angle = t.double()[:, None] * 10_000.0 ** (-torch.arange(8).double() / (8 - shift))
        halves = [angle.cos(), angle.sin()] if flip else [angle.sin(), angle.cos()]
        got = model.to(torch.bfloat16).time_proj(t)
        assert got.dtype == torch.float32
        assert error(got, torch.cat(halves, 1)) < 1000 * 2**-23  # the rounding of an angle near 1000


@torch.no_grad()
def test_null_head_dim_is_one_head():
    one, many = small(attention_head_dim=None), small(attention_head_dim=8)
    many.load_state_dict(one.state_dict())  # the shapes do not tell them apart
    x = torch.randn(2, 3, 8, 8)
    assert one.mid_block.attentions[0].heads == 1
    assert many.mid_block.attentions[0].heads == 4
    assert error(one(x, 10), many(x, 10)) > 1e-4


@torch.no_grad()
def test_absent_labels_mean_the_null_class(rng):
    null = rng.randrange(11)
    model, x = small(num_class_embeds=11, null_class=null), torch.randn(3, 3, 8, 8)
    assert model.null_class == null
    expected = model(x, 7, torch.full([3], null))
    assert torch.equal(model(x, 7), expected)
    assert torch.equal(model(x, 7, torch.full([3], null, dtype=torch.int32)), expected)
    assert error(model(x, 7, torch.full([3], (null + 1) % 11)), expected) > 0


@torch.no_grad()
def test_samples_of_a_batch_do_not_meet():
    model, x, t = small(num_class_embeds=4).double(), torch.randn(4, 3, 8, 8).double(), torch.randint(1000, [4])
    whole = model(x, t, torch.arange(4))
    for i in range(4):
        assert error(model(x[i : i + 1], t[i : i + 1], torch.tensor([i])), whole[i : i + 1]) < 1e-10
    assert model(x[:0], 3, torch.arange(0)).shape == (0, 3, 8, 8)


@pytest.mark.slow
@torch.no_grad()
def test_one_graph_without_breaks():
    model, x = small(num_class_embeds=3, null_class=2), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for t in (5, torch.tensor(5), torch.tensor([5, 900])):
        assert torch.equal(compiled(x, t), model(x, t))
    labels = torch.tensor([0, 2])
    assert torch.equal(compiled(x, 5, labels), model(x, 5, labels))


@torch.no_grad()
def test_autocast_takes_float32_inputs():
    model, x = small(), torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x, 5)
    assert got.dtype == torch.bfloat16
    assert 0 < error(got, model(x, 5)) < 0.1


def test_dropout_acts_in_training_only():
    model, x = small(dropout=0.5), torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x, 5), model(x, 5))
    model.train()
    assert not torch.equal(model(x, 5), model(x, 5))


X = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("args", "kind", "message"),
    [
        ((X[0], 1), ValueError, r"sample has shape \[3, 8, 8\]"),
        ((X[:, :2], 1), ValueError, r"needs \[B, 3, H, W\]"),
        ((X[..., :7], 1), ValueError, "divide by 2"),
        ((X[..., :0], 1), ValueError, "divide by 2"),
        ((X.double(), 1), TypeError, "sample is torch.float64"),
        ((X.long(), 1), TypeError, "sample is torch.int64"),
        ((X.numpy(), 1), TypeError, "sample is a ndarray"),
        ((X.to("meta"), 1), ValueError, "sample is on meta"),
        ((X, "1"), TypeError, "timestep is a str"),
        ((X, True), TypeError, "timestep is a bool"),
        ((X, None), TypeError, "timestep is a NoneType"),
        ((X, torch.tensor([True, False])), TypeError, "timestep is torch.bool"),
        ((X, torch.zeros(3)), ValueError, r"timestep has shape \[3\]"),
        ((X, torch.zeros(1)), ValueError, r"timestep has shape \[1\]"),
        ((X, torch.zeros(2, 1)), ValueError, r"timestep has shape \[2, 1\]"),
        ((X, torch.zeros(2, device="meta")), ValueError, "timestep is on meta"),
        ((X, 1), ValueError, "class_labels needed"),
        ((X, 1, 0), TypeError, "class_labels is a int"),
        ((X, 1, torch.zeros(2)), TypeError, "class_labels is torch.float32"),
        ((X, 1, torch.tensor(0)), ValueError, r"class_labels has shape \[\]"),
        ((X, 1, torch.zeros(3).long()), ValueError, r"class_labels has shape \[3\]"),
        ((X, 1, torch.zeros(2, device="meta").long()), ValueError, "class_labels is on meta"),
        ((X, 1, torch.tensor([0, 4])), ValueError, "class_labels range from 0 to 4"),
        ((X, 1, torch.tensor([-1, 0])), ValueError, "class_labels range from -1 to 0"),
    ],
)
def test_bad_input_is_refused_before_any_work(args, kind, message):
    model = small(num_class_embeds=4)
    model.conv_in.register_forward_hook(lambda *_: pytest.fail("the network ran"))
    with pytest.raises(kind, match=message):
        model(*args)


def test_labels_without_classes_are_refused():
    with pytest.raises(ValueError, match="network without classes"):
        small()(X, 1, torch.tensor([0, 0]))


@pytest.mark.parametrize(
    "field",
    [
        {"time_embedding_type": "fourier"},
        {"time_embedding_type": "learned"},
        {"class_embed_type": "timestep"},
        {"class_embed_type": "identity"},
        {"resnet_time_scale_shift": "scale_shift"},
        {"downsample_type": "resnet"},
        {"upsample_type": "resnet"},
        {"downsample_padding": 2},
        {"downsample_padding": True},
        {"act_fn": "gelu"},
        {"mid_block_type": "UNetMidBlock2DCrossAttn"},
        {"down_block_types": ("DownBlock2D", "SkipDownBlock2D")},
        {"down_block_types": ("DownBlock2D",)},
        {"up_block_types": ("AttnSkipUpBlock2D", "UpBlock2D")},
        {"block_out_channels": (16, 36)},
        {"block_out_channels": ()},
        {"attention_head_dim": 12},
        {"attention_head_dim": 0},
        {"norm_num_groups": None},
        {"attn_norm_num_groups": 5},
        {"layers_per_block": 0},
        {"layers_per_block": True},
        {"in_channels": -1},
        {"norm_eps": 0.0},
        {"mid_block_scale_factor": 0},
        {"dropout": 1.0},
        {"freq_shift": 8},
        {"num_class_embeds": 0},
        {"null_class": 0},
        {"num_class_embeds": 4, "null_class": 4},
        {"num_class_embeds": 4, "null_class": True},
    ],
    ids=str,
)
def test_unsupported_fields_are_named(field):
    name, value = list(field.items())[-1]
    with pytest.raises(ValueError) as caught:
        small(**field)
    assert f"{name}={value!r}" in str(caught.value)


def test_unknown_fields_are_named():
    with pytest.raises(TypeError, match="cross_attention_dim"):
        small(cross_attention_dim=8)
