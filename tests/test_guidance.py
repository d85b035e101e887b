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
        ({"uncond_kwargs": {"y": None}}, ValueError, "'y'"),
        ({"uncond_kwargs": {"scale": 3.0}}, ValueError, "'scale'"),
        ({"uncond_kwargs": [1]}, TypeError, "uncond_kwargs"),
        ({"model_kwargs": 3}, TypeError, "model_kwargs"),
        ({"guidance_scale": "2"}, TypeError, "guidance_scale"),
        ({"guidance_scale": True}, TypeError, "guidance_scale"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale"),
        ({"guidance_rescale": 1.5}, ValueError, "guidance_rescale"),
        ({"guidance_scale": (2.0, 3.0)}, ValueError, "uncond_kwargs must be two"),
        ({"guidance_scale": (2.0, "3")}, TypeError, "guidance_scale"),
        ({"guidance_scale": (2.0, 3.0, 4.0)}, ValueError, "guidance_scale"),
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
