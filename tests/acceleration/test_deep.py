"""Deep features that a UNet keeps and takes: the network by hand around them, DeepCache's package, refusals."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

pytest.importorskip("diffusers")
import diffusers
from networks import SD15, SMALL, close, randomized, small

import fastdiff
from fastdiff.sampling.reuse import deep_calls

PROMPT = torch.randn(2, 5, 16)
THREE = SD15 | {
    "sample_size": 16, "block_out_channels": (16, 32), "cross_attention_dim": 16, "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


def ours():
    return small(num_class_embeds=5, attention_head_dim=16), {"class_labels": torch.tensor([1, 4])}


def unet_2d():
    return randomized(diffusers.UNet2DModel(**SMALL)), {}


def with_prompt():
    return randomized(diffusers.UNet2DConditionModel(**THREE)), {"encoder_hidden_states": PROMPT}


NETWORKS = {"ours": ours, "UNet2DModel": unet_2d, "UNet2DConditionModel": with_prompt}


@pytest.fixture(params=NETWORKS)
def case(request, seed):
    """(network, keywords of its calls, x, t)."""
    network, kwargs = NETWORKS[request.param]()
    x = torch.randn(2, network.conv_in.in_channels, 16, 16)
    return network, kwargs, x, torch.tensor([300, 20])


def by_hand(network, x, t, branch, deep=None, residuals=(), **kwargs):
    """(output, the main branch's features at a skip branch) of a plain UNet, layer by layer.

    With ``deep`` in their place, and nothing computed that lies deeper.
    """
    emb = network.time_embedding(network.time_proj(t).to(x.dtype))
    if "class_labels" in kwargs:
        emb = emb + network.class_embedding(kwargs["class_labels"])
    prompt = kwargs.get("encoder_hidden_states")
    prompt = None if prompt is None else prompt.to(x.dtype)

    def layer(block, i, h):
        h = block.resnets[i](h, emb)
        attention = (getattr(block, "attentions", None) or [None] * len(block.resnets))[i]
        if attention is None:
            return h
        return attention(h) if prompt is None else attention(h, encoder_hidden_states=prompt, return_dict=False)[0]

    steps = []
    for block in network.down_blocks:
        steps += [lambda h, b=block, i=i: layer(b, i, h) for i in range(len(block.resnets))]
        steps += list(block.downsamplers or ())
    h = network.conv_in(x)
    skips = [h]
    for step in steps[:branch] if deep is not None else steps:
        h = step(h)
        skips.append(h)
    if residuals:
        skips = [skip + residual for skip, residual in zip(skips, residuals, strict=False)]
    if deep is None:
        middle = network.mid_block
        h = middle.resnets[0](h, emb)
        attention = middle.attentions[0]
        plain = prompt is None
        h = attention(h) if plain else attention(h, encoder_hidden_states=prompt, return_dict=False)[0]
        h = middle.resnets[1](h, emb)
    ups = [(block, i) for block in network.up_blocks for i in range(len(block.resnets))]
    for k, (block, i) in enumerate(ups):
        left = len(ups) - k - 1  # layers after this one
        if left == branch:
            features = h if deep is None else deep
            h = features
        if deep is not None and left > branch:
            continue
        h = layer(block, i, torch.cat([h, skips.pop()], dim=1))
        if i == len(block.resnets) - 1:
            for upsample in block.upsamplers or ():
                h = upsample(h)
    return network.conv_out(network.conv_act(network.conv_norm_out(h))), features


def output(out):
    return out if isinstance(out, torch.Tensor) else out.sample


@torch.no_grad()
def test_shallow_calls_are_the_network_around_given_features(case):
    """Each skip branch, beside float64; the features are those of another call."""
    network, kwargs, x, t = case
    exact = copy.deepcopy(network).double()
    earlier, before = torch.randn_like(x), t + 50
    fastdiff.accelerate(network, dtype=torch.float32)
    branches = sum(len(block.resnets) for block in network.up_blocks)
    for branch in range(branches):
        call = deep_calls(network, branch)
        whole, kept = call(earlier, before, None, **kwargs)
        want, features = by_hand(exact, earlier.double(), before, branch, **kwargs)
        assert close(kept.double(), features)
        assert close(output(whole).double(), want)
        assert_same_bits(output(whole), output(network(earlier, before, **kwargs)))
        shallow, same = call(x, t, features.float(), **kwargs)
        want, _ = by_hand(exact, x.double(), t, branch, deep=features, **kwargs)
        assert close(output(shallow).double(), want)
        assert_same_bits(same, features.float())
        again, _ = call(earlier, before, kept, **kwargs)
        assert_same_bits(output(again), output(whole))  # its own features: nothing else is missing
    with pytest.raises(ValueError, match=f"branch is {branches}, but this {type(network).__name__} has"):
        deep_calls(network, branches)


@torch.no_grad()
def test_deep_layers_do_not_run(case):
    network, kwargs, x, t = case
    fastdiff.accelerate(network, dtype=torch.float32)
    call = deep_calls(network, 0)
    _, deep = call(x, t, None, **kwargs)
    for name, parameter in network.named_parameters():  # all but the shallow ones become NaN
        last = f"up_blocks.{len(network.up_blocks) - 1}"
        final = f"{last}.resnets.{len(network.up_blocks[-1].resnets) - 1}"
        attention = f"{last}.attentions.{len(network.up_blocks[-1].resnets) - 1}"
        if not name.startswith(("conv_", "time_", "class_", final, attention)):
            parameter.fill_(float("nan"))
    fastdiff.refresh(network)
    assert output(call(x, t, deep, **kwargs)[0]).isfinite().all()
    assert output(call(x, t, None, **kwargs)[0]).isnan().any()


@torch.no_grad()
def test_whole_runs(case, seed, tmp_path):
    """A plan with deep rows by ``sample`` is the same by hand; with guidance, and from every state."""
    network, kwargs, x, _ = case
    plain, shape = copy.deepcopy(network), x.shape
    plan = fastdiff.samplers.ddim(fastdiff.NoiseSchedule.linear(), 7, clip=1.0).reuse(every=3, kind="deep", branch=1)
    fastdiff.accelerate(network, dtype=torch.float32)
    with pytest.raises(ValueError, match="is not accelerated"):
        fastdiff.sample(plain, shape, sampler=plan)
    deep, h = None, fastdiff.randn(shape, seed=seed)
    for i, row in enumerate(plan):
        times = torch.full((2,), int(row.t))
        out, features = by_hand(plain, h, times, 1, deep=deep if row.reuse else None, **kwargs)
        deep = deep if row.reuse else features
        h = fastdiff.ops.update(h, out, plan, i).x
    options = {"sampler": plan, "seed": seed, "model_kwargs": kwargs}
    states = list(fastdiff.sample_iter(network, shape, **options))
    assert close(states[-1].x, h, 1e-4)  # of seven steps, the first of which divides by α
    for state in states:
        again = fastdiff.State.load(state.save(tmp_path / "state.safetensors"))
        assert_same_bits(fastdiff.sample(network, shape, resume=again, **options), states[-1].x)
        assert state.deep is None or again.deep.stride() == state.deep.stride()
    if not kwargs:
        return
    ((name, value),) = kwargs.items()
    guided = {"uncond_kwargs": {name: value * 0}, "guidance_scale": 2.0, **options}
    states = list(fastdiff.sample_iter(network, shape, **guided))
    assert len(states[-1].deep) == 4
    assert_same_bits(fastdiff.sample(network, shape, resume=states[5], **guided), states[-1].x)
    alone = fastdiff.sample(network, shape, **{**guided, "guidance_interval": (1.0, 1e4)})  # unguided rows reuse guided
    assert alone.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("branch", [0, *(pytest.param(b, marks=pytest.mark.slow) for b in (1, 2, 3))])
def test_deepcaches_package(seed, branch):
    """The same run by the package: its branches are ours where a block has two layers and a down-sampling."""
    helper = pytest.importorskip("DeepCache").DeepCacheSDHelper
    network, kwargs = with_prompt()
    twin = copy.deepcopy(network)
    plan = fastdiff.samplers.ddim(fastdiff.NoiseSchedule.linear(), 7, clip=1.0)
    pipe = SimpleNamespace(unet=twin, scheduler=SimpleNamespace(timesteps=torch.tensor(plan.timesteps)))
    theirs = helper(pipe=pipe)
    theirs.set_params(cache_interval=3, cache_branch_id=branch)
    theirs.enable()
    shape, options = (2, 4, 16, 16), {"seed": seed, "model_kwargs": kwargs}
    want = fastdiff.sample(lambda x, t, **more: twin(x, t[0], **more), shape, sampler=plan, **options)
    fastdiff.accelerate(network, dtype=torch.float32)
    got = fastdiff.sample(network, shape, sampler=plan.reuse(every=3, kind="deep", branch=branch), **options)
    assert close(got, want, 1e-4)
    assert not close(got, fastdiff.sample(network, shape, sampler=plan, **options), 1e-3)


@torch.no_grad()
def test_a_controlnets_residuals(seed):
    """Those of shallow skip connections are this step's; the deep ones belong to the features."""
    network, kwargs = with_prompt()
    exact, x, t = copy.deepcopy(network).double(), torch.randn(2, 4, 16, 16), torch.tensor([300, 20])
    fastdiff.accelerate(network, dtype=torch.float32)
    shapes = [(16, 16)] * 3 + [(16, 8)] + [(32, 8)] * 2
    residuals = [torch.randn(2, channels, side, side) for channels, side in shapes]
    more = {"down_block_additional_residuals": residuals, "mid_block_additional_residual": torch.randn(2, 32, 8, 8)}
    for branch in (0, 2, 4):
        call = deep_calls(network, branch)
        _, deep = call(x, t, None, **kwargs, **more)
        got = call(x, t, deep, **kwargs, **more)[0].sample
        residuals64 = [r.double() for r in residuals]
        want, _ = by_hand(exact, x.double(), t, branch, deep=deep.double(), residuals=residuals64, **kwargs)
        assert close(got.double(), want)
        assert_same_bits(got, network(x, t, **kwargs, **more).sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@torch.no_grad()
def test_features_have_the_networks_dtype(case, dtype):
    network, kwargs, x, t = case
    fastdiff.accelerate(network, dtype=dtype)
    call = deep_calls(network, 1)
    whole, deep = call(x, t, None, **kwargs)
    assert deep.dtype == dtype
    assert output(whole).dtype == torch.float32
    assert_same_bits(output(call(x, t, deep, **kwargs)[0]), output(whole))


class Around(nn.Module):
    """A network around one, which it calls ``times`` times."""

    def __init__(self, network, times=1):
        super().__init__()
        self.network, self.times = network, times

    def forward(self, x, t, **kwargs):
        for _ in range(self.times):
            out = self.network(x, t, **kwargs)
        return out


@torch.no_grad()
def test_a_network_around_it(case):
    network, kwargs, x, t = case
    fastdiff.accelerate(network, dtype=torch.float32)
    whole, deep = deep_calls(Around(network), 0)(x, t, None, **kwargs)
    assert_same_bits(output(deep_calls(Around(network), 0)(x, t, deep, **kwargs)[0]), output(whole))
    with pytest.raises(RuntimeError, match="deep features were kept 2 times in one call"):
        deep_calls(Around(network, 2), 0)(x, t, None, **kwargs)
    twin = copy.deepcopy(network)
    with pytest.raises(ValueError, match="this ModuleList holds 2 accelerated networks"):
        deep_calls(nn.ModuleList([network, twin]), 0)


# ---- what cannot reuse, and what must not go wrong silently


@torch.no_grad()
def test_restore_takes_all_of_it_out(case):
    network, kwargs, x, t = case
    want = output(network(x, t, **kwargs))
    fastdiff.accelerate(network, dtype=torch.float32)
    assert "cut short where deep features are given" not in str(fastdiff.accelerate(network, dtype=torch.float32))
    call = deep_calls(network, 0)
    report = str(fastdiff.accelerate(network, dtype=torch.float32))
    assert "cut short where deep features are given" in report
    assert "left out where deep features are given" in report
    _, deep = call(x, t, None, **kwargs)
    fastdiff.restore(network)
    assert not [module for module in network.modules() if "forward" in module.__dict__]
    assert_same_bits(output(network(x, t, **kwargs)), want)
    with pytest.raises(RuntimeError, match=r"deep features cannot be reused any more: .* its forward is not"):
        call(x, t, deep, **kwargs)
    fastdiff.accelerate(network, dtype=torch.float32)
    assert output(deep_calls(network, 0)(x, t, deep, **kwargs)[0]).isfinite().all()


def hook(network):
    network.up_blocks[0].register_forward_hook(lambda *_: None)


def patch(network):
    own = network.down_blocks[0].forward
    network.down_blocks[0].forward = lambda *args, **kwargs: own(*args, **kwargs)


def free_u(network):
    for name in ("s1", "s2", "b1", "b2"):
        setattr(network.up_blocks[0], name, 1.1)


def train(network):
    network.up_blocks[1].train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hook, "has hooks"),
        (patch, "not its class|replaced"),
        (free_u, "FreeU is at work"),
        (train, "training|own code"),
    ],
)
@torch.no_grad()
def test_networks_that_changed(seed, change, message):
    network, kwargs = with_prompt()
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([300, 20])
    fastdiff.accelerate(network, dtype=torch.float32)
    call = deep_calls(network, 0)
    _, deep = call(x, t, None, **kwargs)
    change(network)
    for features in (None, deep):
        with pytest.raises(RuntimeError, match=message):
            call(x, t, features, **kwargs)
    network(x, t, **kwargs)  # still works without
    if change is not train:
        with pytest.raises(ValueError, match=message):
            deep_calls(network, 0)


def test_not_under_batch_invariant(case):
    network, *_ = case
    fastdiff.accelerate(network, dtype=torch.float32, batch_invariant=True)
    with pytest.raises(ValueError, match="batch_invariant=True, which reuses no deep features"):
        deep_calls(network, 0)


@torch.no_grad()
def test_where_the_networks_own_code_runs(case):
    """Under autocast it knows nothing of deep features, which is said; with gradients likewise."""
    network, kwargs, x, t = case
    fastdiff.accelerate(network, dtype=torch.float32)
    call = deep_calls(network, 0)
    _, deep = call(x, t, None, **kwargs)
    for features in (None, deep):
        with torch.autocast("cpu"), pytest.raises(RuntimeError, match="times in one call"):
            call(x, t, features, **kwargs)
        with torch.enable_grad(), pytest.raises(RuntimeError, match="times in one call"):
            call(x, t, features, **kwargs)
    assert call(x, t, deep, **kwargs)[0] is not None


def test_networks_without_deep_features(seed):
    blocks = {"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D")}
    blocks |= {"up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D")}
    other = randomized(diffusers.UNet2DModel(**(SMALL | blocks)))
    fastdiff.accelerate(other, dtype=torch.float32)
    with pytest.raises(ValueError, match="cannot reuse deep features: of a ResnetDownsampleBlock2D in it"):
        deep_calls(other, 0)
    plain = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 3, 1)).eval()
    fastdiff.accelerate(plain, dtype=torch.float32)
    with pytest.raises(ValueError, match="a Sequential has no deep features to reuse"):
        deep_calls(plain, 0)
