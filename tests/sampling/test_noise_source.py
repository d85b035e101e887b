"""Whose noise a run has: the stream by image, seeds, and a function of yours."""

import pytest
import torch
from helpers import assert_same_bits, half

import fastdiff

SHAPE = (4, 3, 8, 8)


@pytest.mark.parametrize("options", [{"sampler": "ddpm", "steps": 20}, {"sampler": "ddim", "steps": 9, "eta": 0.8}])
def test_an_image_is_its_number(backend, seed, options):
    whole = fastdiff.sample(half, SHAPE, seed=seed, backend=backend, **options)
    for first, count in ((0, 1), (0, 3), (3, 1), (1, 3)):
        part = fastdiff.sample(half, (count, *SHAPE[1:]), seed=seed, sample_offset=first, backend=backend, **options)
        assert_same_bits(part, whole[first : first + count])


def test_acceptance():
    a = fastdiff.sample(half, (64, 3, 32, 32), steps=5, seed=42)[17]
    assert_same_bits(a, fastdiff.sample(half, (1, 3, 32, 32), steps=5, seed=42, sample_offset=17)[0])


def test_seeds(seed):
    seeds = [9, 2**64 - 1, 9]
    images = fastdiff.sample(half, (3, 3, 8, 8), steps=5, seeds=seeds)
    for k, value in enumerate(seeds):
        assert_same_bits(images[k], fastdiff.sample(half, (1, 3, 8, 8), steps=5, seed=value)[0])
    assert not torch.equal(images[0], images[1])


def test_default_seed_is_zero():
    assert_same_bits(fastdiff.sample(half, SHAPE, steps=5), fastdiff.sample(half, SHAPE, steps=5, seed=0))
    assert not torch.equal(fastdiff.sample(half, SHAPE, steps=5, seed=1), fastdiff.sample(half, SHAPE, steps=5))


def test_noise_fn():
    asked = []

    def noise(stream, draw, shape):
        asked.append((stream, draw, shape))
        return torch.full(shape, 0.5, dtype=torch.float64)

    plan = fastdiff.samplers.ddpm(fastdiff.NoiseSchedule.linear(), 4)
    got = fastdiff.sample(half, (2, 5), sampler=plan, noise_fn=noise)
    assert asked == [(0, 0, (2, 5)), (1, 0, (2, 5)), (1, 1, (2, 5)), (1, 2, (2, 5))]
    x = torch.full((2, 5), 0.5)
    for row in range(4):
        x = fastdiff.ops.update(x, x * 0.5, plan, row, noise=torch.full((2, 5), 0.5)).x
    assert_same_bits(got, x)
    for bad, error in ((lambda *a: torch.zeros(2, 4), ValueError), (lambda *a: 1.0, TypeError),
                       (lambda *a: torch.zeros(2, 5, dtype=torch.int64), ValueError)):  # fmt: skip
        with pytest.raises(error, match=r"noise_fn\(0, 0"):
            fastdiff.sample(half, (2, 5), steps=4, noise_fn=bad)


def test_noise_fn_keeps_its_tensor(seed):
    noise = torch.randn(SHAPE)
    before = noise.clone()
    got = fastdiff.sample(half, SHAPE, steps=5, noise_fn=lambda stream, draw, shape: noise)
    assert_same_bits(noise, before)
    assert_same_bits(got, fastdiff.sample(half, SHAPE, steps=5, noise_fn=lambda *a: before.clone()))


def test_the_stream_is_the_plain_randn(seed):
    """x_T is stream 0, row i's noise is (stream 1, draw i)."""
    plan = fastdiff.samplers.ddpm(fastdiff.NoiseSchedule.linear(), 4)
    got = fastdiff.sample(half, SHAPE, sampler=plan, seed=seed)
    streams = fastdiff.sample(
        half, SHAPE, sampler=plan, noise_fn=lambda stream, draw, shape: fastdiff.randn(shape, seed=seed, draw=draw,
                                                                                         stream=stream)
    )  # fmt: skip
    assert_same_bits(got, streams)
