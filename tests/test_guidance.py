"""Classifier-free guidance: one stacked call against two, the rescale, and keywords that cannot be stacked."""

import warnings

import pytest
import torch
from helpers import assert_same_bits

import fastdiff

SHAPE = (3, 2, 4, 4)
PLAN = fastdiff.samplers.ddim(fastdiff.NoiseSchedule.linear(), 6, eta=0.5, clip=1.0)


class Conditional:
    """x, t and a class embedding make an output, element by element; the calls are kept."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y, scale=1.0):
        self.calls.append((x.clone(), t.clone(), y.clone()))
        return x * (0.5 + y.view(-1, 1, 1, 1) * scale)


def conditions():
    return torch.tensor([1.0, 2.0, 3.0]) / 8, torch.zeros(3)


def manual(backend, seed, scale, rescale=0.0):
    """Two calls a row, and the formula of Lin et al. 2024, Equations 14-16, for the rescale."""
    y, null = conditions()
    x, model = fastdiff.randn(SHAPE, seed=seed), Conditional()
    for row in range(len(PLAN)):
        t = torch.full((3,), int(PLAN[row].t))
        u, c = model(x, t, null), model(x, t, y)
        gain = None
        if rescale:
            guided = (1 - scale) * u + scale * c
            factor = c.flatten(1).std(1) / guided.flatten(1).std(1)
            gain = rescale * factor + (1 - rescale)
        x = fastdiff.ops.update(
            x, (u, c), PLAN, row, guidance=(1 - scale, scale), seed=seed, gain=gain, backend=backend
        ).x
    return x


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
        ({"uncond_kwargs": {"y": None}}, ValueError, "'y'"),
        ({"uncond_kwargs": {"scale": 3.0}}, ValueError, "'scale'"),
        ({"uncond_kwargs": [1]}, TypeError, "uncond_kwargs"),
        ({"model_kwargs": 3}, TypeError, "model_kwargs"),
        ({"guidance_scale": "2"}, TypeError, "guidance_scale"),
        ({"guidance_scale": True}, TypeError, "guidance_scale"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale"),
        ({"guidance_rescale": 1.5}, ValueError, "guidance_rescale"),
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
