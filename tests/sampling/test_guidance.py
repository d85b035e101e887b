"""Classifier-free guidance: one stacked call against two, the rescale, and keywords that cannot be stacked."""

import warnings

import pytest
import torch
from guidance_cases import PLAN, SHAPE, Conditional, conditions, manual
from helpers import assert_same_bits

import fastdiff


@pytest.mark.parametrize("scale", [0.0, 3.0, -1.5])
def test_one_call_is_two(backend, seed, scale):
    y, null = conditions()
    model = Conditional()
    got = fastdiff.sample(
        model, SHAPE, sampler=PLAN, seed=seed, backend=backend, model_kwargs={"y": y}, uncond_kwargs={"y": null},
        guidance_scale=scale,
    )  # fmt: skip
    assert_same_bits(got, manual("reference", seed, scale))
    assert len(model.calls) == len(PLAN)
    for x, t, labels in model.calls:
        assert x.shape == (6, *SHAPE[1:])
        assert_same_bits(x[:3], x[3:])
        assert t.shape == (6,)
        assert labels.tolist() == [*null.tolist(), *y.tolist()]  # [uncond, cond]


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescale(backend, seed, rescale):
    y, null = conditions()
    got = fastdiff.sample(
        Conditional(), SHAPE, sampler=PLAN, seed=seed, backend=backend, model_kwargs={"y": y},
        uncond_kwargs={"y": null}, guidance_scale=4.0, guidance_rescale=rescale,
    )  # fmt: skip
    expected = manual("reference", seed, 4.0, rescale)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert float((got - manual("reference", seed, 4.0)).abs().max()) > 1e-3


# ---- what it is given


def test_half_precision_and_channels_last(seed):
    """The stacked input of a bfloat16 channels_last network is one tensor of twice the batch."""
    seen = []

    class Network(torch.nn.Conv2d):
        def forward(self, x, t, y):
            seen.append((x.shape[0], x.dtype, x.is_contiguous(memory_format=torch.channels_last)))
            return super().forward(x) + y.view(-1, 1, 1, 1)

    model = Network(2, 2, 3, padding=1).to(torch.bfloat16).to(memory_format=torch.channels_last)
    y, null = (t.bfloat16() for t in conditions())
    got = fastdiff.sample(model, SHAPE, sampler=PLAN, model_kwargs={"y": y}, uncond_kwargs={"y": null},
                          guidance_scale=2.0)  # fmt: skip
    assert seen == [(6, torch.bfloat16, True)] * 6
    assert got.dtype == torch.float32
    assert bool(got.isfinite().all())


def test_learned_variance_is_the_conditional_ones(seed):
    plan = fastdiff.samplers.ddpm(fastdiff.NoiseSchedule.linear(), 4, variance="learned_range")

    def model(x, t, y):
        return torch.cat([x * 0.5, y.view(-1, 1, 1, 1).expand_as(x)], dim=1)

    y, null = conditions()
    a = fastdiff.sample(model, SHAPE, sampler=plan, model_kwargs={"y": y}, uncond_kwargs={"y": null}, guidance_scale=2)
    b = fastdiff.sample(model, SHAPE, sampler=plan, model_kwargs={"y": y})
    torch.testing.assert_close(a, b)  # the means are equal, and so is the variance


def test_one_plain_call(seed):
    y, null = conditions()
    for options in ({"uncond_kwargs": {"y": null}, "guidance_scale": 1.0}, {"uncond_kwargs": {"y": null}}, {}):
        model = Conditional()
        fastdiff.sample(model, SHAPE, sampler=PLAN, model_kwargs={"y": y}, **options)
        assert [x.shape[0] for x, _, _ in model.calls] == [3] * 6
    with pytest.warns(UserWarning, match="no effect without uncond_kwargs"):
        fastdiff.sample(Conditional(), SHAPE, sampler=PLAN, model_kwargs={"y": y}, guidance_scale=5.0)


def test_keywords_that_are_equal_pass_through(seed):
    y, null = conditions()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for uncond in ({"y": null}, {"y": null, "scale": 2.0}):
            fastdiff.sample(Conditional(), SHAPE, sampler=PLAN, model_kwargs={"y": y, "scale": 2.0},
                            uncond_kwargs=uncond, guidance_scale=2.0)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"uncond_kwargs": {"z": torch.zeros(3)}}, ValueError, "z, which model_kwargs lacks"),
        ({"uncond_kwargs": {"y": torch.zeros(2)}}, ValueError, "'y'"),
        ({"uncond_kwargs": {"y": torch.zeros(3, 1)}}, ValueError, "'y'"),
        ({"uncond_kwargs": {"y": torch.zeros(3, dtype=torch.float64)}}, ValueError, "'y'"),
        ({"uncond_kwargs": [1]}, TypeError, "uncond_kwargs"),
        ({"model_kwargs": 3}, TypeError, "model_kwargs"),
        ({"guidance_scale": "2"}, TypeError, "guidance_scale"),
        ({"guidance_scale": True}, TypeError, "guidance_scale"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale"),
        ({"guidance_rescale": 1.5}, ValueError, "guidance_rescale"),
        ({"guidance_scale": (2.0, 3.0)}, ValueError, "uncond_kwargs must be two"),
        ({"guidance_scale": (2.0, "3")}, TypeError, "guidance_scale"),
        ({"guidance_scale": (2.0, 3.0, 4.0)}, ValueError, "guidance_scale has 3 entries; .* 6 of them, one a network"),
        ({"guidance_scale": [2.0, 2.0, 2.0, 2.0, 2.0, "3"]}, TypeError, "guidance_scale"),
        ({"guidance_scale": [2.0, 2.0, 2.0, 2.0, 2.0, (1.0, 2.0)]}, ValueError, "numbers alone, or pairs alone"),
        ({"guidance_scale": lambda level: None}, TypeError, "guidance_scale"),
        ({"guidance_scale": lambda level: float("nan")}, ValueError, "guidance_scale"),
        ({"guidance_scale": [(2.0, 3.0)] * 6}, ValueError, "uncond_kwargs must be two"),
        ({"uncond_kwargs": [{"y": torch.zeros(3)}] * 2}, ValueError, "uncond_kwargs must be one"),
        (
            {"uncond_kwargs": [{"y": torch.zeros(3)}, {"y": torch.zeros(2)}], "guidance_scale": (2.0, 3.0)},
            ValueError,
            r"uncond_kwargs\[1\]\['y'\]",
        ),
        (
            {"uncond_kwargs": [{"y": torch.zeros(3)}, {"z": 1}], "guidance_scale": (2.0, 3.0)},
            ValueError,
            r"uncond_kwargs\[1\] has z",
        ),
        ({"uncond_kwargs": "none"}, TypeError, "uncond_kwargs"),
        ({"guidance_interval": (2.0, 1.0)}, ValueError, "guidance_interval"),
        ({"guidance_interval": (-1.0, 1.0)}, ValueError, "guidance_interval"),
        ({"guidance_interval": (float("nan"), 1.0)}, ValueError, "guidance_interval"),
        ({"guidance_interval": 1.0}, TypeError, "guidance_interval"),
        ({"guidance_interval": (1.0,)}, TypeError, "guidance_interval"),
        ({"guidance_interval": ("0", 1.0)}, TypeError, "guidance_interval"),
        ({"guidance_interval": (0.0, 1.0), "uncond_kwargs": None}, ValueError, "guidance_interval needs"),
        ({"guidance_rescale": float("nan")}, ValueError, "guidance_rescale"),
    ],
)
def test_refuses(options, error, names):
    model = Conditional()
    arguments = {
        "model_kwargs": {"y": torch.ones(3), "scale": 2.0}, "uncond_kwargs": {"y": torch.zeros(3)},
        "guidance_scale": 2.0, **options,
    }  # fmt: skip
    with pytest.raises(error, match=names):
        fastdiff.sample(model, SHAPE, sampler=PLAN, **arguments)
    assert model.calls == []


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (3, 1), (4,)])
def test_rescale_of_a_constant_output_changes_nothing(shape):
    """There is no scale to restore where the guided output has none."""
    labels = torch.arange(shape[0])
    arguments = {
        "sampler": "ddim", "steps": 3, "model_kwargs": {"y": labels}, "uncond_kwargs": {"y": labels}, "seed": 1,
    }  # fmt: skip
    plain = fastdiff.sample(lambda x, t, y: torch.zeros_like(x), shape, guidance_scale=2.0, **arguments)
    got = fastdiff.sample(
        lambda x, t, y: torch.zeros_like(x), shape, guidance_scale=2.0, guidance_rescale=0.7, **arguments
    )
    assert got.isfinite().all()
    assert torch.equal(got, plain)


def test_rescale_needs_an_unconditional_call():
    with pytest.raises(ValueError, match=r"guidance_rescale=0\.5 needs uncond_kwargs"):
        fastdiff.sample(lambda x, t: x, (1, 3), sampler="ddim", steps=2, guidance_rescale=0.5)
