"""Keywords of two calls: stacked for one at any depth of dicts, lists and tuples, or given to a call each."""

import copy
from collections import OrderedDict, namedtuple

import pytest
import torch
from helpers import assert_same_bits

import fastdiff

LINEAR = fastdiff.NoiseSchedule.linear()
SHAPE = (2, 3, 4, 4)
STEPS = 4
PLAN = fastdiff.samplers.ddim(LINEAR, STEPS)
Pair = namedtuple("Pair", "first second")


def by_hand(model, x, cond, uncond, scale):
    """DDIM with two calls a step, in float64 throughout."""
    x, times = x.double(), [int(row.t) for row in PLAN]
    for t, following in zip(times, [*times[1:], -1], strict=True):
        u, c = (model(x, torch.full((len(x),), t), **kwargs) for kwargs in (uncond, cond))
        x = fastdiff.textbook.ddim_step(x, u + scale * (c - u), t, following, LINEAR)
    return x


def network(x, t, prompt=None, more=None, residuals=(), factor=1.0):
    """Reads every keyword; the prompt by its mean over a sequence of any length."""
    calls.append(len(x))
    out = x * 0.5
    if prompt is not None:
        out = out + prompt.to(x).mean(dim=1).view(-1, 1, 1, 1)
    if more is not None:
        out = out * more["scale"].to(x).view(-1, 1, 1, 1) + more["ids"][0].to(x).view(-1, 1, 1, 1)
    for residual in residuals:
        out = out + residual.to(x)
    return out * factor


calls: list[int] = []


def compare(cond, uncond, seed, expected_calls, scale=3.0, whole=None):
    """``whole``: the unconditional call's keywords in full."""
    calls.clear()
    got = fastdiff.sample(
        network, SHAPE, sampler=PLAN, seed=seed, model_kwargs=cond, uncond_kwargs=uncond, guidance_scale=scale
    )
    assert calls == expected_calls * STEPS
    x = fastdiff.randn(SHAPE, seed=seed)
    exact = by_hand(network, x, cond, {**cond, **uncond} if whole is None else whole, scale)
    # float32 rounds to the largest number on the way, which guidance and 1/α make much larger than some here.
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5 * max(1.0, float(exact.abs().max())))


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("mapping", [dict, OrderedDict])
def test_nested_keywords_are_stacked(seed, kind, mapping):
    """SDXL's added_cond_kwargs, ControlNet's lists of residuals."""

    def keywords():
        more = mapping({"scale": torch.rand(2), "ids": Pair(torch.rand(2), "kept")})
        return {"prompt": torch.rand(2, 5), "more": more, "residuals": kind([torch.rand(SHAPE), torch.rand(SHAPE)])}

    cond, uncond = keywords(), keywords()
    compare(cond, uncond, seed, [4])
    # What an inner mapping lacks is as the conditional call has it.
    partial = {"more": {"scale": uncond["more"]["scale"]}}
    compare(cond, partial, seed, [4], whole={**cond, "more": {**cond["more"], **partial["more"]}})
    compare(cond, {}, seed, [4])


def test_the_stacked_keywords_keep_their_classes(seed):
    seen = []

    def watch(x, t, more):
        seen.append(more)
        return x * more["pair"].first.view(-1, 1, 1, 1)

    cond, uncond = (OrderedDict(pair=Pair(torch.full((2,), v), "text"), flags=[True, None]) for v in (1.0, 2.0))
    fastdiff.sample(watch, SHAPE, sampler=PLAN, model_kwargs={"more": cond}, uncond_kwargs={"more": uncond},
                    guidance_scale=2.0)  # fmt: skip
    assert type(seen[0]) is OrderedDict
    assert type(seen[0]["pair"]) is Pair
    assert seen[0]["pair"].first.tolist() == [2.0, 2.0, 1.0, 1.0]  # [uncond, cond]
    assert (seen[0]["pair"].second, seen[0]["flags"]) == ("text", [True, None])


def test_prompts_of_other_lengths_are_two_calls(seed):
    cond = {"prompt": torch.rand(2, 7), "residuals": [torch.rand(SHAPE)]}
    compare(cond, {"prompt": torch.rand(2, 5)}, seed, [2, 2])
    compare(cond, {"prompt": torch.rand(2, 5), "residuals": []}, seed, [2, 2])
    compare(cond, {"prompt": None}, seed, [2, 2])
    compare({"prompt": None}, {"prompt": torch.rand(2, 5)}, seed, [2, 2])
    compare({**cond, "factor": 0.9}, {"factor": 0.8}, seed, [2, 2])


def test_one_entry_stands_for_all(seed):
    """[1, …] beside [B, …] is expanded, in one stacked call and in two."""
    many, one = torch.rand(2, 7), torch.rand(1, 7)
    compare({"prompt": many}, {"prompt": one}, seed, [4], whole={"prompt": one.expand(2, -1)})
    compare({"prompt": one}, {"prompt": many}, seed, [4], whole={"prompt": many})
    short = torch.rand(1, 5)
    compare({"prompt": many}, {"prompt": short}, seed, [2, 2], whole={"prompt": short.expand(2, -1)})
    # Two of one entry each may be no samples' at all: the network is given them as they are.
    other = torch.rand(1, 7)
    compare({"prompt": one}, {"prompt": other}, seed, [2, 2])


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_calls_have_the_bits_of_one(backend, seed, rescale, dtype):
    """For a network without sums over samples; under an interval, a rescale and thresholding too."""
    ratios = [row.sigma / row.alpha for row in PLAN]
    prompt, null = torch.rand(2, 4), torch.rand(2, 4)
    options = {"sampler": PLAN, "seed": seed, "backend": backend, "guidance_scale": 3.0, "guidance_rescale": rescale,
               "model_dtype": dtype, "thresholding": 0.9, "guidance_interval": (ratios[3], ratios[0])}  # fmt: skip
    one = fastdiff.sample(network, SHAPE, model_kwargs={"prompt": prompt}, uncond_kwargs={"prompt": null}, **options)
    calls.clear()
    two = fastdiff.sample(network, SHAPE, model_kwargs={"prompt": prompt, "factor": 1.0},
                          uncond_kwargs={"prompt": null, "factor": 1}, **options)  # fmt: skip
    assert calls == [2, 2] * 3 + [2]
    assert_same_bits(one, two)
    state = list(fastdiff.sample_iter(network, SHAPE, model_kwargs={"prompt": prompt, "factor": 1.0},
                                      uncond_kwargs={"prompt": null, "factor": 1}, **options))[2]  # fmt: skip
    again = fastdiff.sample(network, SHAPE, model_kwargs={"prompt": prompt, "factor": 1.0}, resume=state,
                            uncond_kwargs={"prompt": null, "factor": 1}, **options)  # fmt: skip
    assert_same_bits(again, one)


def test_a_network_that_returns_the_same_memory_each_time(seed):
    """As one compiled into a CUDA graph does: the first call's output is kept."""
    memory = torch.empty(SHAPE)

    def reused(x, t, factor):
        return memory.copy_(x * factor)

    options = {"sampler": PLAN, "seed": seed, "guidance_scale": 2.0}
    got = fastdiff.sample(reused, SHAPE, model_kwargs={"factor": 0.5}, uncond_kwargs={"factor": 0.25}, **options)
    fresh = fastdiff.sample(lambda x, t, factor: x * factor, SHAPE, model_kwargs={"factor": 0.5},
                            uncond_kwargs={"factor": 0.25}, **options)  # fmt: skip
    assert_same_bits(got, fresh)


def test_a_network_that_changes_the_input_of_two_calls(seed):
    """Its own copy of the input is the next call's, too."""
    with pytest.raises(ValueError, match="in place"):
        fastdiff.sample(lambda x, t, factor: x.mul_(factor), SHAPE, sampler=PLAN, model_dtype=torch.bfloat16,
                        model_kwargs={"factor": 0.5}, uncond_kwargs={"factor": 0.25}, guidance_scale=2.0)  # fmt: skip


@pytest.mark.parametrize(
    ("uncond", "names"),
    [
        ({"more": {"scale": torch.zeros(3)}}, r"uncond_kwargs\['more'\]\['scale'\] must match"),
        ({"more": {"size": 1}}, r"uncond_kwargs\['more'\] has size, which model_kwargs\['more'\] lacks"),
        ({"residuals": [torch.zeros(2, 3)]}, r"uncond_kwargs\['residuals'\]\[0\] must match"),
        ({"residuals": [torch.zeros(SHAPE).long()]}, r"'residuals'\]\[0\] must match"),
        ({"prompt": torch.zeros(3, 5)}, "2 entries or 1"),
    ],
)
def test_refuses(uncond, names):
    cond = {"prompt": torch.rand(2, 5), "more": {"scale": torch.rand(2)}, "residuals": [torch.rand(SHAPE)]}
    calls.clear()
    with pytest.raises(ValueError, match=names):
        fastdiff.sample(network, SHAPE, sampler=PLAN, model_kwargs=cond, uncond_kwargs=uncond, guidance_scale=2.0)
    assert calls == []


# ---- SDXL's network


@pytest.mark.slow
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("length", [5, 9])
def test_an_sdxl_unet(seed, accelerated, length):
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
        transformer_layers_per_block=(1, 1), cross_attention_dim=16, norm_num_groups=8,
    ).eval().requires_grad_(False)  # fmt: skip
    exact, shape = copy.deepcopy(unet).double(), (2, 4, 8, 8)
    ids = torch.rand(2, 6)
    cond = {"encoder_hidden_states": torch.randn(2, 5, 16),
            "added_cond_kwargs": {"text_embeds": torch.randn(2, 32), "time_ids": ids}}  # fmt: skip
    uncond = {"encoder_hidden_states": torch.randn(2, length, 16),
              "added_cond_kwargs": {"text_embeds": torch.randn(2, 32)}}  # fmt: skip
    whole = {**uncond, "added_cond_kwargs": {**uncond["added_cond_kwargs"], "time_ids": ids}}

    def double(x, t, **kwargs):
        return exact(x, t, **_in_double(kwargs)).sample

    if accelerated:
        fastdiff.accelerate(unet, dtype=torch.float32)
    got = fastdiff.sample(unet, shape, sampler=PLAN, seed=seed, model_kwargs=cond, uncond_kwargs=uncond,
                          guidance_scale=5.0)  # fmt: skip
    with torch.no_grad():
        want = by_hand(double, fastdiff.randn(shape, seed=seed), cond, whole, 5.0)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def _in_double(value):
    if isinstance(value, dict):
        return {key: _in_double(entry) for key, entry in value.items()}
    return value.double()
