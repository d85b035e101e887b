"""Inpainting: masked replacement against a float64 loop, masks of every shape, and what is refused."""

import itertools
import math

import pytest
import torch
from helpers import assert_same_bits, half
from inpaint_cases import LINEAR, SHAPE, bars_of, ddpm_step, hole, model, normal, replaced

import fastdiff


def test_replacement_is_the_float64_loop(seed):
    mask, known = hole()
    plan = fastdiff.samplers.ddpm(LINEAR, 8, clip=1.0)
    got = fastdiff.sample(model, SHAPE, sampler=plan, seed=seed, mask=mask, known=known)
    x = normal(seed, 0, 0)
    for i, (bar, bar_p) in enumerate(itertools.pairwise(bars_of(plan))):
        x = ddpm_step(x, model(x, torch.full((3,), int(plan[i].t))), bar, bar_p, normal(seed, 1, i))
        x = replaced(x, mask.double(), known.double(), bar_p, normal(seed, 3, i))
    torch.testing.assert_close(got.double(), x, rtol=1e-4, atol=1e-4)
    assert_same_bits(got[..., :3], known[..., :3])
    assert float((got - fastdiff.sample(model, SHAPE, sampler=plan, seed=seed))[..., 4:].abs().max()) == 0  # pointwise


OPTIONS = [
    {"sampler": "ddim", "eta": 0.4, "steps": 7},
    {"sampler": "repaint", "steps": 9, "clip": 1.0, "sampler_options": {"jump_length": 3, "jump_n_sample": 3}},
    {"sampler": "repaint", "steps": 8, "eta": 0.0, "sampler_options": {"jump_length": 2}, "thresholding": 0.9},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_backends_prefix_and_resume(simd, seed, options):
    mask, known = hole()
    arguments = {"seed": seed, "mask": mask, "known": known, **options}
    whole = fastdiff.sample(model, SHAPE, backend="native", **arguments)
    assert_same_bits(whole, fastdiff.sample(model, SHAPE, backend="reference", **arguments))
    first = {**arguments, "known": known[1:2]}
    assert_same_bits(fastdiff.sample(model, (1, *SHAPE[1:]), sample_offset=1, **first), whole[1:2])
    states = list(fastdiff.sample_iter(model, SHAPE, backend="native", **arguments))
    assert_same_bits(states[-1].x, whole)
    for state in states[1::6]:
        assert_same_bits(fastdiff.sample(model, SHAPE, resume=state, **arguments), whole)
    each = fastdiff.sample(model, SHAPE, **{**arguments, "seed": None, "seeds": [seed] * 3})
    assert_same_bits(each[:1], whole[:1])


def test_masks_of_every_shape(seed):
    mask, known = hole()
    before = mask.clone(), known.clone()
    arguments = {"steps": 4, "seed": seed, "known": known}
    whole = fastdiff.sample(half, SHAPE, mask=mask, **arguments)
    for same in (mask[None, None], mask.double(), mask.expand(SHAPE), mask.expand(3, 1, 5, 7).contiguous()):
        assert_same_bits(fastdiff.sample(half, SHAPE, mask=same, **arguments), whole)
    assert_same_bits(mask, before[0])
    assert_same_bits(known, before[1])
    binary = mask == 1
    assert_same_bits(fastdiff.sample(half, SHAPE, mask=binary, **arguments),
                     fastdiff.sample(half, SHAPE, mask=binary.half(), **arguments))  # fmt: skip
    plain = fastdiff.sample(half, SHAPE, steps=4, seed=seed)
    assert_same_bits(fastdiff.sample(half, SHAPE, mask=mask * 0, **arguments), plain)
    assert_same_bits(fastdiff.sample(half, SHAPE, mask=torch.tensor(True), **arguments), known)


def test_noise_fn_is_asked_for_the_known_images_noise(seed):
    asked = []

    def noise(stream, draw, shape):
        asked.append((stream, draw))
        return torch.full(shape, 0.25 * (stream + 1))

    plan = fastdiff.samplers.repaint(LINEAR, 3, jump_length=1, jump_n_sample=2)
    mask, known = torch.ones(SHAPE), torch.zeros(SHAPE)
    states = list(fastdiff.sample_iter(half, SHAPE, sampler=plan, noise_fn=noise, mask=mask, known=known))
    assert [row.calls_model for row in plan] == [True, False, True, True, False, True, True]
    # z, then the known image's noise; none in jumps, and no noise at all in the last row.
    expected = [(1, 0), (3, 0), (1, 1), (1, 2), (3, 2), (1, 3), (3, 3), (1, 4), (1, 5), (3, 5)]
    assert asked == [(0, 0), *expected]
    assert_same_bits(states[1].x, torch.full(SHAPE, 1.0) * torch.tensor(plan[1].sigma, dtype=torch.float32))
    drawn = [fastdiff.sample(half, SHAPE, sampler=plan, mask=mask[0], known=known, generator=torch.Generator())
             for _ in range(2)]  # fmt: skip
    assert_same_bits(*drawn)


@pytest.mark.parametrize(
    ("options", "error", "names"),
    [
        ({"mask": None}, ValueError, "mask and known"),
        ({"known": None}, ValueError, "mask and known"),
        ({"mask": 0.5}, TypeError, "mask must be a tensor"),
        ({"mask": torch.ones(SHAPE, dtype=torch.int64)}, TypeError, "mask must be bool"),
        ({"mask": torch.ones(2, 7)}, ValueError, "mask must broadcast"),
        ({"mask": torch.ones(1, *SHAPE)}, ValueError, "mask must broadcast"),
        ({"mask": torch.full(SHAPE, 1.5)}, ValueError, "mask must lie"),
        ({"mask": torch.full(SHAPE, math.nan)}, ValueError, "mask must lie"),
        ({"known": torch.zeros(SHAPE[1:])}, ValueError, "known must have shape"),
        ({"known": torch.zeros(SHAPE, dtype=torch.uint8)}, TypeError, "known must be a floating"),
        ({"known": torch.full(SHAPE, math.inf)}, ValueError, "known must be finite"),
        ({"known": [0.0]}, TypeError, "known must be a tensor"),
        ({"sampler_options": {"jump_length": 0}}, ValueError, "jump_length"),
        ({"sampler_options": {"jump_n_sample": 1.5}}, TypeError, "jump_n_sample"),
        ({"eta": 0.5, "variance": "fixed_large"}, ValueError, "eta"),
    ],
)
def test_refuses(options, error, names):
    def never(x, t):
        raise AssertionError("called")

    arguments = {"mask": torch.ones(SHAPE), "known": torch.zeros(SHAPE), "sampler": "repaint", "steps": 4, **options}
    with pytest.raises(error, match=names):
        fastdiff.sample(never, SHAPE, **arguments)
