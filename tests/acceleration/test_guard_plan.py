"""Embeddings that are made once for a plan: only of the very timestep, and only where the network uses them so."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
import diffusers
from matrix import CROSS, assert_equal, cross, difference, filled, ours, pixels
from networks import SMALL

import fastdiff

pytestmark = pytest.mark.networks

LABELS = torch.tensor([3.0, 900.0])
PROMPT = {"encoder_hidden_states": torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(1))}
CONDITIONED = {
    "time_cond_proj_dim": (dict(time_cond_proj_dim=32), dict(timestep_cond=torch.randn(2, 32))),
    "time_cond_proj_dim, no condition": (dict(time_cond_proj_dim=32), {}),
    "time_cond_proj_dim as wide as the embedding": (
        dict(time_cond_proj_dim=32, time_embedding_dim=32), dict(timestep_cond=torch.randn(2, 32))),
    "timestep_post_act": (dict(timestep_post_act="silu"), {}),
    "time_embedding_act_fn": (dict(time_embedding_act_fn="silu"), {}),
    "time_embedding_type fourier": (dict(time_embedding_type="fourier", time_embedding_dim=32), {}),
    "class_embed_type timestep": (dict(class_embed_type="timestep"), dict(class_labels=LABELS)),
    "class_embed_type timestep, the same numbers": (
        dict(class_embed_type="timestep"), dict(class_labels=torch.tensor([500.0, 500.0]))),
    "class_embed_type identity": (dict(class_embed_type="identity"), dict(class_labels=torch.randn(2, 128))),
    "class_embed_type projection": (
        dict(class_embed_type="projection", projection_class_embeddings_input_dim=20),
        dict(class_labels=torch.randn(2, 20))),
    "class_embeddings_concat": (
        dict(class_embed_type="simple_projection", projection_class_embeddings_input_dim=20,
             class_embeddings_concat=True),
        dict(class_labels=torch.randn(2, 20))),
    "num_class_embeds": (dict(num_class_embeds=5), dict(class_labels=torch.tensor([1, 4]))),
    "text_time": (
        dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80),
        dict(added_cond_kwargs={"text_embeds": torch.randn(2, 32), "time_ids": torch.randint(0, 99, (2, 6)).float()})),
    "text": (dict(addition_embed_type="text", encoder_hid_dim=48, addition_embed_type_num_heads=4), {}),
    "no condition": ({}, {}),
}  # fmt: skip


def sampled(network, seed, options, sampler="ddim", steps=3, channels=4, size=8):
    return fastdiff.sample(
        network, (2, channels, size, size), sampler=sampler, steps=steps, seed=seed, model_kwargs=options
    )


@pytest.mark.parametrize("name", CONDITIONED)
@torch.no_grad()
def test_conditions_beside_the_time(seed, name):
    """Sampled, called directly between samplings, and sampled in another number of steps: as the module's own code."""
    config, more = CONDITIONED[name]
    network = filled(diffusers.UNet2DConditionModel(**(CROSS | config)))
    fast = copy.deepcopy(network)
    fastdiff.accelerate(fast, dtype=torch.float32)
    options = PROMPT | more
    x = torch.randn(2, 4, 8, 8)
    for steps in (3, 2):
        assert_equal(
            sampled(fast, seed, options, steps=steps), sampled(network, seed, options, steps=steps), tolerance=1e-4
        )
        for t in (7, torch.tensor([7, 500])):
            assert_equal(fast(x, t, **options).sample, network(x, t, **options).sample)


@pytest.mark.parametrize("name", [n for n in CONDITIONED if CONDITIONED[n][1]])
@torch.no_grad()
def test_the_condition_matters(seed, name):
    """Two samplings with other conditions differ as they do without acceleration."""
    config, more = CONDITIONED[name]
    network = filled(diffusers.UNet2DConditionModel(**(CROSS | config)))

    def changed(v):
        if isinstance(v, dict):
            return {name: changed(t) for name, t in v.items()}
        return v.flip(0) * (1 if v.dtype == torch.int64 else 2)

    other = {name: changed(v) for name, v in more.items()}
    fast = copy.deepcopy(network)
    fastdiff.accelerate(fast, dtype=torch.float32)
    results = [sampled(fast, seed, PROMPT | o) for o in (more, other)]
    wanted = [sampled(network, seed, PROMPT | o) for o in (more, other)]
    assert difference(wanted[0], wanted[1]) > 1e-4
    for got, want in zip(results, wanted, strict=True):
        assert_equal(got, want, tolerance=1e-4)


@pytest.mark.parametrize("config", [
    dict(class_embed_type="timestep"), dict(class_embed_type="identity"), dict(num_class_embeds=5),
    dict(time_embedding_type="learned", num_train_timesteps=1000), {},
])  # fmt: skip
@torch.no_grad()
def test_unet2d(seed, config):
    network = filled(diffusers.UNet2DModel(**(SMALL | config)))
    kind = config.get("class_embed_type")
    labels = {"timestep": LABELS, "identity": torch.randn(2, 128)}.get(
        kind, torch.tensor([1, 4]) if "num_class_embeds" in config else None
    )
    options = {} if labels is None else {"class_labels": labels}
    try:
        want = sampled(network, seed, options, channels=3, size=16)
    except Exception as error:
        pytest.skip(f"the network itself is not sampled so: {error}")
    fast = copy.deepcopy(network)
    fastdiff.accelerate(fast, dtype=torch.float32)
    assert_equal(sampled(fast, seed, options, channels=3, size=16), want, tolerance=1e-4)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m", "ddpm", "pndm"])
@pytest.mark.parametrize("make", [cross, pixels, ours], ids=lambda f: f.__name__)
@torch.no_grad()
def test_samplers(seed, sampler, make):
    case = make()
    options = {k: v for k, v in case.inputs.items() if k not in ("sample", "timestep")}
    channels, size = case.inputs["sample"].shape[1:3]
    fast = copy.deepcopy(case.network)
    fastdiff.accelerate(fast, dtype=torch.float32)
    arguments = (seed, options, sampler, 4, channels, size)
    want = sampled(case.network, *arguments)
    assert_equal(sampled(fast, *arguments), want, tolerance=2e-4)


class Delayed(nn.Module):
    """Guidance by a network that is called twice in a step, at the step's time and at another."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, t, **kwargs):
        a = self.network(x, t, **kwargs).sample
        return a + 0.1 * self.network(x, t * 0 + 5, **kwargs).sample


@torch.no_grad()
def test_a_network_called_at_another_time_within_a_step(seed):
    case = cross()
    fast = copy.deepcopy(case.network)
    fastdiff.accelerate(fast, dtype=torch.float32)
    want = sampled(Delayed(case.network).eval(), seed, PROMPT)
    assert_equal(sampled(Delayed(fast).eval(), seed, PROMPT), want, tolerance=1e-4)


@torch.no_grad()
def test_a_callback_that_calls_the_network(seed):
    """cond_fn of the same network at a time of its own, between the steps of a sampling."""
    case = pixels()
    fast = copy.deepcopy(case.network)
    fastdiff.accelerate(fast, dtype=torch.float32)

    def run(network):
        def push(x, t):
            return 0.01 * network(x, 17).sample

        return fastdiff.sample(network, (2, 3, 16, 16), sampler="ddim", steps=3, seed=seed, cond_fn=push)

    assert_equal(run(fast), run(case.network), tolerance=1e-4)


@pytest.mark.parametrize("part", ["linear_1", "linear_2", "act", "time_proj", "time_embedding"])
@torch.no_grad()
def test_parts_of_the_embedding_that_change_between_samplings(seed, part):
    case = pixels()
    plain, fast = case.network, copy.deepcopy(case.network)
    fastdiff.accelerate(fast, dtype=torch.float32)
    sampled(fast, seed, {}, channels=3, size=16)
    for m in (plain, fast):
        if part == "act":
            m.time_embedding.act = nn.Tanh()
        elif part in ("time_proj", "time_embedding"):
            getattr(m, part).register_forward_hook(lambda k, args, out: out * 1.5)
        else:
            getattr(m.time_embedding, part).weight.data.mul_(1.3)
    want = sampled(plain, seed, {}, channels=3, size=16)
    assert_equal(sampled(fast, seed, {}, channels=3, size=16), want, tolerance=1e-4)
    fastdiff.restore(fast)
    assert_equal(sampled(fast, seed, {}, channels=3, size=16), want, tolerance=0.0)
