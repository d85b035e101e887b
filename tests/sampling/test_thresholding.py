"""Dynamic thresholding: each sample's own quantile, against torch.quantile, diffusers and a float64 loop."""

import itertools
import math

import pytest
import torch
from helpers import assert_same_bits

import fastdiff
from fastdiff.sampling.thresholding import Thresholding

SHAPE = (3, 2, 5, 7)
LINEAR = fastdiff.NoiseSchedule.linear()


def model(x, t):
    """Something whose x̂_0 leaves [−1, 1]."""
    return torch.tanh(x * 2) * (t.view(-1, 1, 1, 1) % 7 / 5)


def run(backend="auto", seed=0, network=model, shape=SHAPE, **options):
    arguments = {"sampler": "ddim", "eta": 0.6, "steps": 8, "seed": seed, "backend": backend, "thresholding": 0.9}
    return fastdiff.sample(network, shape, **{**arguments, **options})


@pytest.mark.parametrize("n", [1, 2, 3, 70, 1001])
@pytest.mark.parametrize("ratio", [0.003, 0.5, 0.9, 0.995, 1.0])
def test_the_bound_is_the_quantile(seed, n, ratio):
    x = torch.randn(4, n) * 5
    for maximum in (math.inf, 1.0, 3.0):
        out = torch.full((4, 2), math.nan)
        Thresholding(ratio, maximum).bounds(x, out)
        exact = torch.quantile(x.double().abs(), ratio, dim=1).clamp(1, maximum)
        torch.testing.assert_close(out[:, 0].double(), exact, rtol=1e-6, atol=0)
        assert_same_bits(out[:, 1], 1 / out[:, 0])


def test_more_than_torch_quantile_takes():
    n = (1 << 24) + 2
    x = (torch.arange(n, dtype=torch.float64) * (6 / (n - 1)) - 3).float()[None]
    out = torch.empty(1, 2)
    Thresholding(0.995).bounds(x, out)
    assert float(out[0, 0]) == pytest.approx(3 * 0.995, rel=1e-6)  # |x| is uniform over [0, 3]


@pytest.mark.parametrize(("ratio", "maximum"), [(0.995, 1.0), (0.995, 2.5), (0.8, 100.0)])
def test_the_loop_thresholds_as_diffusers(seed, ratio, maximum):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=maximum, clip_sample=False
    )
    m = torch.randn(SHAPE) * torch.tensor([0.1, 1.0, 4.0]).view(3, 1, 1, 1)
    plan = fastdiff.samplers.ddim(LINEAR, 1, spacing=fastdiff.Spacing(timesteps=[600.0]))
    _, state = fastdiff.sample_iter(lambda x, t: m, SHAPE, sampler=plan, thresholding=(ratio, maximum))
    x, bar = fastdiff.randn(SHAPE), float(LINEAR.alphas_cumprod[600])
    expected = scheduler._threshold_sample((x - math.sqrt(1 - bar) * m) / math.sqrt(bar))
    torch.testing.assert_close(state.x0, expected, rtol=3e-6, atol=3e-6)


def test_a_run_is_the_float64_loop(seed):
    """DDIM with guidance, its rescale and thresholding, written out."""
    y, ratio, scale, phi, eta = torch.tensor([0.3, 0.8, 2.0]), 0.85, 4.0, 0.6, 0.5

    def conditional(x, t, y):
        return torch.tanh(x * 2) * (0.4 + y.view(-1, 1, 1, 1))

    plan = fastdiff.samplers.ddim(LINEAR, 6, eta=eta)
    got = fastdiff.sample(
        conditional, SHAPE, sampler=plan, seed=seed, model_kwargs={"y": y}, uncond_kwargs={"y": y * 0},
        guidance_scale=scale, guidance_rescale=phi, thresholding=ratio,
    )  # fmt: skip
    x = fastdiff.randn(SHAPE, seed=seed).double()
    bars = [float(LINEAR.alphas_cumprod[int(t)]) for t in plan.timesteps] + [1.0]
    for i, (bar, bar_p) in enumerate(itertools.pairwise(bars)):
        u, c = (conditional(x, None, w.double()) for w in (y * 0, y))
        m = u + scale * (c - u)
        stds = [out.flatten(1).std(1).view(-1, 1, 1, 1) for out in (c, m)]
        m = phi * m * stds[0] / stds[1] + (1 - phi) * m
        x0 = (x - math.sqrt(1 - bar) * m) / math.sqrt(bar)
        s = torch.quantile(x0.flatten(1).abs(), ratio, dim=1).clamp(min=1).view(-1, 1, 1, 1)
        x0 = x0.clamp(-s, s) / s
        sigma = eta * math.sqrt((1 - bar_p) / (1 - bar) * (1 - bar / bar_p))
        z = fastdiff.randn(SHAPE, seed=seed, stream=1, draw=i).double()
        x = math.sqrt(bar_p) * x0 + math.sqrt(1 - bar_p - sigma**2) * m + sigma * z
    torch.testing.assert_close(got.double(), x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))


@pytest.mark.parametrize("options", [{}, {"sampler": "ddpm", "eta": None}, {"thresholding": (0.8, 1.5)}])
def test_backends_prefix_and_resume(simd, seed, options):
    whole = run("native", seed, **options)
    assert_same_bits(whole, run("reference", seed, **options))
    assert_same_bits(whole[1:2], run("native", seed, shape=(1, *SHAPE[1:]), sample_offset=1, **options))
    arguments = {"sampler": "ddim", "eta": 0.6, "steps": 8, "seed": seed, "thresholding": 0.9, **options}
    states = list(fastdiff.sample_iter(model, SHAPE, backend="native", **arguments))
    assert_same_bits(states[-1].x, whole)
    assert_same_bits(run("native", seed, resume=states[3], **options), whole)
    assert float(states[1].x0.abs().max()) <= 1 + 1e-6
    assert not torch.equal(whole, run("native", seed, **{**options, "thresholding": None}))


def test_a_network_in_half_precision(seed):
    class Network(torch.nn.Conv2d):
        def forward(self, x, t):
            return super().forward(x)

    network = Network(2, 2, 3, padding=1).to(torch.bfloat16).to(memory_format=torch.channels_last)
    a, b = (run(which, seed, network=network) for which in ("native", "reference"))
    assert_same_bits(a, b)
    assert bool(a.isfinite().all())


def test_an_empty_batch():
    assert run(shape=(0, 2, 3, 3)).shape == (0, 2, 3, 3)


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"thresholding": 0.0}, ValueError, "ratio"),
        ({"thresholding": 1.01}, ValueError, "ratio"),
        ({"thresholding": math.nan}, ValueError, "ratio"),
        ({"thresholding": True}, TypeError, "thresholding"),
        ({"thresholding": "0.995"}, TypeError, "thresholding"),
        ({"thresholding": ()}, TypeError, "thresholding"),
        ({"thresholding": (0.9, 0.5)}, ValueError, "maximum"),
        ({"thresholding": (0.9, math.nan)}, ValueError, "maximum"),
        ({"clip": 1.0}, ValueError, "clip"),
    ],
)
def test_refuses(options, error, names):
    def never(x, t):
        raise AssertionError("called")

    with pytest.raises(error, match=names):
        run(network=never, **options)
