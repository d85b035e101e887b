"""Guidance inside an interval of noise levels, by two scales, and against a negative prompt."""

import pytest
import torch
from guidance_cases import PLAN, SHAPE, Conditional, conditions
from helpers import assert_same_bits

import fastdiff

# ---- an interval


def ratio(row):
    return row.sigma / row.alpha


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_an_interval_guides_the_rows_inside(backend, seed, rescale):
    """Kynkäänniemi et al. 2024: σ in (low, high] is guided; elsewhere the conditional output counts, called alone."""
    y, null = conditions()
    ratios = [ratio(row) for row in PLAN]
    low, high = ratios[4], ratios[1]  # rows 1, 2 and 3: the low end is left out, the high end is not
    model, scale = Conditional(), 3.0
    options = {"sampler": PLAN, "seed": seed, "model_kwargs": {"y": y}, "uncond_kwargs": {"y": null},
               "guidance_scale": scale, "guidance_rescale": rescale, "guidance_interval": (low, high)}  # fmt: skip
    got = fastdiff.sample(model, SHAPE, backend=backend, **options)
    assert [len(x) for x, _, _ in model.calls] == [3, 6, 6, 6, 3, 3]
    for (_, t, labels), row in zip(model.calls, PLAN, strict=True):
        assert t.tolist() == [int(row.t)] * len(t)
        assert labels.tolist() == ([*null.tolist(), *y.tolist()] if len(t) == 6 else y.tolist())
    x = fastdiff.randn(SHAPE, seed=seed).double()
    for i in range(len(PLAN)):
        c, u = (model(x, torch.zeros(3), label.double()) for label in (y, null))
        m = u + scale * (c - u) if 1 <= i <= 3 else c
        stds = [out.flatten(1).std(1).view(-1, 1, 1, 1) for out in (c, m)]
        m = m * (rescale * stds[0] / stds[1] + 1 - rescale)
        noise = fastdiff.randn(SHAPE, seed=seed, stream=1, draw=i).double()
        # A float64 output stands for the guided one.
        x = fastdiff.ops.update(x, m, PLAN, i, noise=noise).x
    torch.testing.assert_close(got.double(), x, rtol=1e-5, atol=1e-5)
    states = list(fastdiff.sample_iter(Conditional(), SHAPE, backend=backend, **options))
    for state in states:
        assert_same_bits(fastdiff.sample(Conditional(), SHAPE, resume=state, backend=backend, **options), got)


def test_an_interval_of_everything_and_of_nothing(seed):
    y, null = conditions()
    options = {"sampler": PLAN, "seed": seed, "model_kwargs": {"y": y}}
    guided = {"uncond_kwargs": {"y": null}, "guidance_scale": 3.0, **options}
    everything = fastdiff.sample(Conditional(), SHAPE, guidance_interval=(0.0, float("inf")), **guided)
    assert_same_bits(everything, fastdiff.sample(Conditional(), SHAPE, **guided))
    nothing = fastdiff.sample(Conditional(), SHAPE, guidance_interval=(1e6, 1e7), **guided)
    assert_same_bits(nothing, fastdiff.sample(Conditional(), SHAPE, **options))
    zero = fastdiff.samplers.ddim(fastdiff.NoiseSchedule.linear().rescale_zero_terminal_snr(), 4,
                                  prediction="v_prediction", spacing="trailing")  # fmt: skip
    model = Conditional()  # σ/α is infinite in the first row
    fastdiff.sample(model, SHAPE, guidance_interval=(1e6, float("inf")), **{**guided, "sampler": zero})
    assert [len(x) for x, _, _ in model.calls] == [6, 3, 3, 3]


def test_an_interval_in_half_precision(seed):
    """The plain call's input is the stacked one's first part, in the network's dtype and memory format."""
    seen = []

    class Network(torch.nn.Conv2d):
        def forward(self, x, t, y):
            seen.append((len(x), x.is_contiguous(memory_format=torch.channels_last)))
            return super().forward(x) + y.view(-1, 1, 1, 1)

    model = Network(2, 2, 3, padding=1).to(torch.bfloat16).to(memory_format=torch.channels_last)
    y, null = (t.bfloat16() for t in conditions())
    got = [
        fastdiff.sample(model, SHAPE, sampler=PLAN, model_kwargs={"y": y}, uncond_kwargs={"y": null}, backend=which,
                        guidance_scale=2.0, guidance_interval=(0.0, ratio(PLAN[3])), seed=seed)
        for which in ("native", "reference")
    ]  # fmt: skip
    assert seen[:6] == [(3, True)] * 3 + [(6, True)] * 3
    assert_same_bits(*got)


# ---- two scales, negative prompts


class Edit:
    """InstructPix2Pix's network: an image and a text condition, either of which may be null."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, image, text):
        self.calls.append(len(x))
        return x * (0.4 + 0.3 * text.view(-1, 1, 1, 1)) + 0.2 * image


@pytest.mark.parametrize("rescale", [0.0, 0.5])
@pytest.mark.parametrize("interval", [None, (1.0, 20.0)])
def test_two_scales(backend, seed, rescale, interval):
    """Brooks et al. 2023, Equation 3: e(∅, ∅) + s_I (e(I, ∅) − e(∅, ∅)) + s_T (e(I, T) − e(I, ∅))."""
    image, text = torch.rand(SHAPE), torch.tensor([0.5, 1.0, 1.5])
    s_text, s_image, model = 4.0, 1.5, Edit()
    got = fastdiff.sample(
        model, SHAPE, sampler=PLAN, seed=seed, backend=backend, model_kwargs={"image": image, "text": text},
        uncond_kwargs=[{"image": image * 0, "text": text * 0}, {"text": text * 0}], guidance_scale=(s_text, s_image),
        guidance_rescale=rescale, guidance_interval=interval,
    )  # fmt: skip
    inside = [interval is None or interval[0] < ratio(row) <= interval[1] for row in PLAN]
    assert model.calls == [9 if guided else 3 for guided in inside]
    x = fastdiff.randn(SHAPE, seed=seed).double()
    for i, guided in enumerate(inside):
        nothing, picture, both = (
            model(x, None, a * image.double(), b * text.double()) for a, b in ((0, 0), (1, 0), (1, 1))
        )
        m = nothing + s_image * (picture - nothing) + s_text * (both - picture) if guided else both
        stds = [out.flatten(1).std(1).view(-1, 1, 1, 1) for out in (both, m)]
        m = m * (rescale * stds[0] / stds[1] + 1 - rescale)
        noise = fastdiff.randn(SHAPE, seed=seed, stream=1, draw=i).double()
        x = fastdiff.ops.update(x, m, PLAN, i, noise=noise).x
    torch.testing.assert_close(got.double(), x, rtol=1e-5, atol=1e-5)


def test_equal_scales_of_one_are_one_plain_call():
    image, text, model = torch.rand(SHAPE), torch.ones(3), Edit()
    fastdiff.sample(model, SHAPE, sampler=PLAN, model_kwargs={"image": image, "text": text},
                    uncond_kwargs=[{"image": image * 0, "text": text * 0}, {"text": text * 0}],
                    guidance_scale=(1.0, 1.0))  # fmt: skip
    assert model.calls == [3] * 6


def test_a_negative_prompt(seed):
    """uncond_kwargs with another condition than none: n + s (c − n)."""
    y, negative = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, -0.3, 0.2])
    model = Conditional()
    got = fastdiff.sample(model, SHAPE, sampler=PLAN, seed=seed, model_kwargs={"y": y},
                          uncond_kwargs={"y": negative}, guidance_scale=2.5)  # fmt: skip
    x = fastdiff.randn(SHAPE, seed=seed).double()
    for i in range(len(PLAN)):
        n, c = (model(x, torch.zeros(3), label.double()) for label in (negative, y))
        noise = fastdiff.randn(SHAPE, seed=seed, stream=1, draw=i).double()
        x = fastdiff.ops.update(x, n + 2.5 * (c - n), PLAN, i, noise=noise).x
    torch.testing.assert_close(got.double(), x, rtol=1e-5, atol=1e-5)
