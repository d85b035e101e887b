"""Interpolation: its ends are the reconstructions, its variance the paper's, its t matched to the image's size."""

import math

import pytest
import torch
from helpers import assert_same_bits

import fastdiff
from fastdiff.sampling.interpolate import matched_timesteps, slerp
from fastdiff.sampling.stepper import State

SHAPE = (3, 8, 8)
LINEAR = fastdiff.NoiseSchedule.linear()


def model(x, t):
    return x * 0.5 + t.view(-1, 1, 1, 1) * 1e-4


def images():
    return torch.rand(2, *SHAPE) * 2 - 1


@pytest.mark.parametrize("mix", ["linear", "spherical"])
@pytest.mark.parametrize("noise", ["independent", "shared"])
@pytest.mark.parametrize("t", [1, 30, 500, 1000])
def test_the_ends_are_the_reconstructions(seed, mix, noise, t):
    a, b = images()
    got = fastdiff.interpolate(model, a, b, [0.0, 0.5, 1.0], t=t, noise=noise, mix=mix, seed=seed, clip=1.0)
    assert got.shape == (3, *SHAPE)
    assert got.dtype == torch.float32
    # Each image's own reconstruction: q(x_t | x_0) by hand, then the reverse process with sample 0's noise.
    z = fastdiff.randn((2, *SHAPE), seed=seed, stream=0)
    bar = float(LINEAR.alphas_cumprod[t - 1])
    plan = fastdiff.samplers.ddpm(LINEAR, clip=1.0)
    for image, draw, row in ((a, z[0], got[0]), (b, z[0 if noise == "shared" else 1], got[2])):
        x = image * math.sqrt(bar) + draw * math.sqrt(1 - bar)
        state = State(x.expand(3, *SHAPE).contiguous(), None, None, (None,) * 4, 1000 - t)
        alone = fastdiff.sample(model, (3, *SHAPE), sampler=plan, resume=state, seeds=[seed] * 3)
        assert_same_bits(row, alone[1])
    same = fastdiff.interpolate(model, a, a, [0.0, 0.5, 1.0], t=t, noise="shared", mix=mix, seed=seed, clip=1.0)
    assert_same_bits(same[0], same[2])
    if noise == "shared":
        assert_same_bits(same[0], got[0])


def test_no_timestep_is_the_mix_of_the_pixels(seed):
    a, b = images()

    def never(x, t):
        raise AssertionError("the network is not needed")

    got = fastdiff.interpolate(never, a, b, [0.0, 0.25, 1.0, 1.5], t=0)
    for row, w in zip(got, (0.0, 0.25, 1.0, 1.5), strict=True):
        torch.testing.assert_close(row, (1 - w) * a + w * b)
    assert_same_bits(got[0], a + 0.0)
    assert_same_bits(got[2], b + 0.0)


@pytest.mark.parametrize("noise", ["independent", "shared"])
def test_the_variance_at_the_mix(noise):
    """((1 − λ)² + λ²)(1 − ᾱ_t) for independent noise, 1 − ᾱ_t for shared; the first input tells."""
    seen = []

    def watch(x, t):
        seen.append((x.clone(), t.clone()))
        return x * 0.5

    zero, weights = torch.zeros(1, 500, 500), [0.0, 0.3, 0.5, 1.0]
    fastdiff.interpolate(watch, zero, zero, weights, t=2, noise=noise, seed=4)
    x, t = seen[0]
    assert t.tolist() == [1] * 4
    assert len(seen) == 2
    level = 1 - float(LINEAR.alphas_cumprod[1])
    for row, w in zip(x, weights, strict=True):
        share = (1 - w) ** 2 + w**2 if noise == "independent" else 1.0
        # The variance of 250000 normals has a standard error of sqrt(2/250000).
        assert float(row.double().var()) / (level * share) == pytest.approx(1, abs=5 * (2 / 250_000) ** 0.5)


def test_every_weight_has_the_same_noise(seed):
    """Equal weights in one batch give equal images; the reverse noise is sample 0's for all."""
    a, b = images()
    got = fastdiff.interpolate(model, a, b, [0.4, 0.4], t=100, seed=seed)
    assert_same_bits(got[0], got[1])


def angle(a, b):
    a, b = a.double().flatten(), b.double().flatten()
    return math.acos(float(a @ b / a.norm() / b.norm()))


def test_slerp_walks_the_great_circle(seed):
    a, b = torch.randn(2, *SHAPE)
    weights = [0.0, 0.25, 0.5, 0.9, 1.0, -0.5, 1.5]
    got = slerp(a, b, weights)
    assert_same_bits(got[0], a)
    assert_same_bits(got[4], b)
    theta = angle(a, b)
    for x, w in zip(got, weights, strict=True):
        exact = (math.sin((1 - w) * theta) * a.double() + math.sin(w * theta) * b.double()) / math.sin(theta)
        torch.testing.assert_close(x.double(), exact, rtol=1e-5, atol=1e-6)
    same = slerp(a, b / b.norm() * a.norm(), weights)  # of equal lengths: the length stays, the angle grows evenly
    for x, w in zip(same, weights, strict=True):
        assert float(x.norm()) == pytest.approx(float(a.norm()), rel=1e-5)
        if 0.2 < w < 1:
            assert angle(a, x) == pytest.approx(w * theta, rel=1e-4)
    assert_same_bits(slerp(b, a, [0.5]), slerp(a, b, [0.5]))


def test_slerp_of_the_undefined_is_linear(seed):
    a = torch.randn(SHAPE)
    for b in (a, 2 * a, -a, torch.zeros(SHAPE)):
        for w in (0.0, 0.3, 1.0):
            torch.testing.assert_close(slerp(a, b, [w])[0], (1 - w) * a + w * b)
    near = slerp(a, a + 1e-4 * torch.randn(SHAPE), [0.5])[0]  # a small angle is still exact
    torch.testing.assert_close(near, a, rtol=1e-3, atol=1e-3)


def test_the_spherical_mix_keeps_the_variance():
    """Of independent noise, at every λ."""
    seen = []

    def watch(x, t):
        seen.append(x.clone())
        return x * 0.5

    zero = torch.zeros(1, 500, 500)
    fastdiff.interpolate(watch, zero, zero, [0.0, 0.3, 0.5, 1.0], t=2, mix="spherical", seed=4)
    level = 1 - float(LINEAR.alphas_cumprod[1])
    for x in seen[0]:
        assert float(x.double().var()) / level == pytest.approx(1, abs=5 * (2 / 250_000) ** 0.5)


def test_the_spherical_mix_is_of_the_noised_images(seed):
    a, b = images()
    t, weights = 40, [0.2, 0.7]
    got = fastdiff.interpolate(model, a, b, weights, t=t, mix="spherical", seed=seed)
    z, bar = fastdiff.randn((2, *SHAPE), seed=seed, stream=0), float(LINEAR.alphas_cumprod[t - 1])
    ends = [image * math.sqrt(bar) + draw * math.sqrt(1 - bar) for image, draw in zip((a, b), z, strict=True)]
    state = State(slerp(*ends, weights), None, None, (None,) * 4, 1000 - t)
    plan = fastdiff.samplers.ddpm(LINEAR)
    alone = fastdiff.sample(model, (2, *SHAPE), sampler=plan, resume=state, seeds=[seed] * 2)
    torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-6)
    pixels = fastdiff.interpolate(model, a, b, weights, t=0, mix="spherical", seed=seed)
    assert_same_bits(pixels, slerp(a, b, weights))


def test_matched_timesteps():
    assert matched_timesteps(LINEAR, 256) == 500
    for size, expected in ((64, 230), (32, 125), (8, 30)):
        assert abs(matched_timesteps(LINEAR, size) - expected) <= 6
    snr = LINEAR.alphas_cumprod / (1 - LINEAR.alphas_cumprod)
    for size in (1, 8, 16, 64, 512):
        t, target = matched_timesteps(LINEAR, size), float(snr[499]) * (256 / size) ** 2
        assert float(snr[t - 1]) <= target * (1 + 1e-9)
        assert t == 1 or float(snr[t - 2]) > target
    assert matched_timesteps(LINEAR, 1 << 20) == 1000


def test_the_default_t_is_matched(seed):
    a, b = images()
    t = matched_timesteps(LINEAR, 8)
    assert_same_bits(fastdiff.interpolate(model, a, b, [0.3], seed=1),
                     fastdiff.interpolate(model, a, b, [0.3], seed=1, t=t))  # fmt: skip


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpmpp_2m", "unipc"])
def test_any_sampler_goes_back(seed, sampler):
    """From its first timestep below t: the ends are the reconstructions by q(x_t | x_0) there."""
    a, b = images()
    got = fastdiff.interpolate(model, a, b, [0.0, 1.0], t=450, sampler=sampler, steps=10, seed=seed)
    plan = fastdiff.samplers.SAMPLERS[sampler](LINEAR, 10)
    row = next(row for row in plan if row.t <= 449)
    ends = torch.stack([a, b])
    z = fastdiff.randn(ends.shape, seed=seed)
    rest = {"sampler": sampler, "steps": 10, "seeds": [seed] * 2, "x_T": ends * row.alpha + z * row.sigma}
    skip = sum(other.t > row.t for other in fastdiff.samplers.ddim(LINEAR, 10, spacing=spacing_of(sampler)))
    again = fastdiff.sample(model, ends.shape, sampler_options={"skip": skip}, **rest)
    torch.testing.assert_close(got, again, rtol=1e-5, atol=1e-5)
    fixed = fastdiff.samplers.ddim(LINEAR, 10)
    same = fastdiff.interpolate(model, a, b, [0.3], t=450, sampler="ddim", steps=10, seed=seed)
    assert_same_bits(fastdiff.interpolate(model, a, b, [0.3], t=450, sampler=fixed, seed=seed), same)


def spacing_of(sampler):
    return "leading" if sampler == "ddim" else "trailing"


def test_a_folders_arguments(seed):
    """What ``fastdiff.sample`` takes of a trained model, this takes too."""
    trained = fastdiff.models.digits()
    arguments = trained.arguments(torch.tensor([3, 3]), steps=5)
    assert {"sampler", "steps", "schedule"} <= set(arguments)
    a, b = torch.rand(2, *trained.image_shape) * 2 - 1
    got = fastdiff.interpolate(trained.unet, a, b, [0.2, 0.8], seed=seed, **arguments)
    assert got.shape == (2, *trained.image_shape)
    assert bool(got.isfinite().all())


def test_a_class_is_no_network():
    for t in (0, 10):
        with pytest.raises(TypeError, match="the class Identity: make one"):
            fastdiff.interpolate(torch.nn.Identity, torch.zeros(SHAPE), torch.zeros(SHAPE), [0.5], t=t)


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"a": torch.zeros(3, 8)}, ValueError, "a and b"),
        ({"a": torch.zeros(SHAPE, dtype=torch.int64)}, TypeError, "a must"),
        ({"b": 1.0}, TypeError, "b must"),
        ({"weights": []}, ValueError, "weights"),
        ({"weights": [float("nan")]}, ValueError, "weights"),
        ({"weights": ["x"]}, (TypeError, ValueError), "weights"),
        ({"weights": 0.5}, TypeError, "weights"),
        ({"t": -1}, ValueError, "t must"),
        ({"t": 1001}, ValueError, "t must"),
        ({"t": 1.0}, TypeError, "t must"),
        ({"noise": "same"}, ValueError, "noise"),
        ({"mix": "slerp"}, ValueError, "mix"),
        ({"strength": 0.5}, ValueError, "strength"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seeds": [1]}, ValueError, "seeds"),
        ({"sampler_options": {"timesteps": [900, 500]}}, ValueError, "t is 10, but the plan 'ddpm' does not lead"),
        ({"sampler": "ddim_inverse", "steps": 10}, ValueError, "'ddim_inverse' does not lead to an image"),
        ({"sampler": "pndm", "steps": 10, "t": 500}, ValueError, "'pndm' reads a history"),
        ({"sampler": fastdiff.samplers.dpmpp_2m(LINEAR, 10), "t": 500}, ValueError, "'dpmpp_2m' reads a history"),
        ({"t": 0, "seed": -1}, ValueError, "seed"),
        ({"t": 0, "clipp": 1.0}, TypeError, "clipp"),
        ({"prediction": "noise"}, ValueError, "prediction"),
        ({"weights": [10**400]}, ValueError, "weights must be finite"),
        ({"a": torch.full(SHAPE, math.nan)}, ValueError, "a must be finite"),
        ({"a": torch.full(SHAPE, math.nan), "t": 0}, ValueError, "a must be finite"),
        ({"b": torch.zeros(SHAPE).to_sparse()}, TypeError, "b must be a dense"),
        ({"b": torch.zeros(SHAPE, device="meta")}, TypeError, "b must be .* on meta"),
        ({"a": torch.tensor(1.0), "b": torch.tensor(1.0)}, ValueError, r"a and b must be \[C, …\]"),
    ],
)
def test_refuses(options, error, names):
    arguments = {"a": torch.zeros(SHAPE), "b": torch.zeros(SHAPE), "weights": [0.5], "t": 10, **options}
    with pytest.raises(error, match=names):
        fastdiff.interpolate(model, arguments.pop("a"), arguments.pop("b"), arguments.pop("weights"), **arguments)
