"""Every way to call: keywords, odd arguments, gradients, tracing, transforms, devices, threads, copies."""

import copy
import io
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits
from torch import nn

pytest.importorskip("diffusers")
import diffusers
from matrix import (
    CROSS,
    MAIN,
    Case,
    assert_equal,
    controlled,
    cross,
    decoder,
    difference,
    encoder,
    exact,
    filled,
    first_tensor,
    history,
    in_words,
    motion,
    ours,
    pixels,
    rounded,
    usual,
    vae,
)  # fmt: skip

import fastdiff

pytestmark = pytest.mark.networks

NETWORKS = pytest.mark.parametrize("make", MAIN.values(), ids=MAIN)


def twins(case):
    """(the network, a copy that is accelerated)."""
    fast = copy.deepcopy(case.network)
    fastdiff.accelerate(fast, dtype=torch.float32)
    return case.network, fast


# ---- keywords


@pytest.mark.parametrize("make", [*MAIN.values(), motion, controlled, encoder], ids=lambda f: f.__name__)
@torch.no_grad()
def test_keywords_of_the_whole(seed, make):
    case = make()
    want = case.call()
    fastdiff.accelerate(case.network, dtype=torch.float32)
    assert_equal(case.call(keywords=True), want)


def recorded(network, call):
    """The arguments of every module's call, by the names that its class's forward gives them."""
    import inspect

    seen = []

    def hook(m, args, kwargs):
        try:
            bound = inspect.signature(type(m).forward).bind(m, *args, **kwargs)
        except (TypeError, ValueError):
            return
        if any(p.kind == p.VAR_POSITIONAL and bound.arguments.get(n) for n, p in bound.signature.parameters.items()):
            return
        arguments = dict(list(bound.arguments.items())[1:])
        for name, p in bound.signature.parameters.items():
            if p.kind == p.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
        seen.append((m, arguments))

    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in network.modules()]
    call()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("make", MAIN.values(), ids=MAIN)
@torch.no_grad()
def test_keywords_of_every_module(seed, make):
    """Called by itself, with all its arguments by name, each module gives what its own code gives."""
    case = make()
    names = {m: name for name, m in case.network.named_modules()}
    calls = recorded(case.network, case.call)
    assert len(calls) > 5
    plain = [first(m(**arguments)) for m, arguments in calls]
    fastdiff.accelerate(case.network, dtype=torch.float32)
    wrong = []
    for (m, arguments), want in zip(calls, plain, strict=True):
        try:
            error = difference(first(m(**arguments)), want)
        except TypeError as e:
            error = str(e)
        if isinstance(error, str) or error > 1e-5:
            wrong.append((names[m], type(m).__name__, error))
    assert wrong == []


def first(value):
    return first_tensor(value)


# ---- odd arguments


@pytest.mark.parametrize("extra", [1, 2])
@pytest.mark.parametrize("index", [0, 1])
@torch.no_grad()
def test_more_skips_than_a_block_has_resnets(seed, extra, index):
    """diffusers' blocks take them from the end and leave the rest."""
    case = cross()
    plain, fast = twins(case)
    arguments = {m: a for m, a in recorded(plain, lambda: case.call(plain)) if m is plain.up_blocks[index]}
    arguments = arguments[plain.up_blocks[index]]
    arguments["res_hidden_states_tuple"] = (torch.randn(1),) * extra + tuple(arguments["res_hidden_states_tuple"])
    assert_equal(fast.up_blocks[index](**arguments), plain.up_blocks[index](**arguments))


WIDE = {
    "one head over pixels": (
        diffusers.UNet2DModel,
        dict(block_out_channels=(32, 640), attention_head_dim=None, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
             up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1, sample_size=8),
        {"sample": torch.randn(1, 3, 8, 8), "timestep": 5}, "",
    ),
    "a wide autoencoder": (
        diffusers.AutoencoderKL, dict(block_out_channels=(32, 1024), norm_num_groups=8, layers_per_block=1,
                                      down_block_types=("DownEncoderBlock2D",) * 2,
                                      up_block_types=("UpDecoderBlock2D",) * 2),
        {"z": torch.randn(1, 4, 4, 4)}, "decode",
    ),
    "tokens": (
        diffusers.UNet2DConditionModel, CROSS | dict(block_out_channels=(32, 544), attention_head_dim=1),
        {"sample": torch.randn(1, 4, 8, 8), "timestep": 5, "encoder_hidden_states": torch.randn(1, 5, 48)}, "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_heads_of_more_than_512_channels(seed, name, dtype):
    kind, config, inputs, method = WIDE[name]
    case = Case(filled(kind(**config)), inputs, method=method)
    history(case, [], 0, dtype=dtype, tolerance=1e-5 if dtype == torch.float32 else 0.06, effect=None)


@pytest.mark.parametrize(
    "option", [{"pre_only": True}, {"only_cross_attention": True, "added_kv_proj_dim": 16}, {"bias": True}]
)
@torch.no_grad()
def test_a_bare_attention(seed, option):
    """Alone, with options that leave layers out; also nn.MultiheadAttention's like."""
    from diffusers.models.attention_processor import Attention

    network = filled(Attention(32, heads=2, dim_head=16, **option))
    try:
        fastdiff.accelerate(network, dtype=torch.float32)
    except ValueError as error:
        if not in_words(error):
            raise


@torch.no_grad()
def test_masks(seed):
    case = cross()
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])
    masked = case._replace(inputs=case.inputs | {"encoder_attention_mask": mask})
    plain, fast = twins(case)
    assert difference(masked.call(plain), case.call(plain)) > 1e-3
    assert_equal(masked.call(fast), masked.call(plain))
    assert_equal(case.call(fast), case.call(plain))


@pytest.mark.parametrize("make", [cross, pixels, ours, decoder], ids=lambda f: f.__name__)
@torch.no_grad()
def test_inputs_of_other_layouts_and_sizes(seed, make):
    case = make()
    plain, fast = twins(case)
    name = next(iter(case.inputs))
    x = case.inputs[name]
    for shape in ((1, 2), (3, 4), (2, 2)):
        one = torch.randn(shape[0], x.shape[1], 4 * shape[1], 4 * shape[1] + 4 * (shape[0] % 2))
        forms = [one, one.contiguous(memory_format=torch.channels_last), one.transpose(2, 3), one[..., ::2],
                 one[:, :, :, :1].expand_as(one), one.flip(3)]  # fmt: skip
        for form in forms:
            if form.shape[-1] % 4:
                continue
            inputs = {k: v[:1].expand(shape[0], *v.shape[1:]) if isinstance(v, torch.Tensor) and v.ndim else v
                      for k, v in case.inputs.items()} | {name: form}  # fmt: skip
            here = case._replace(inputs=inputs)
            assert_equal(here.call(fast), here.call(plain))


# ---- memory: biases and weights that are views


VIEWS = {
    "every other": lambda p: small(2 * len(p), *p.shape[1:])[::2],
    "a column": lambda p: small(*p.shape, 3)[..., 1],
    "expanded": lambda p: small(1, *p.shape[1:]).expand_as(p),
    "expanded whole": lambda p: small(1).view(*(1,) * p.ndim).expand_as(p),
    "offset": lambda p: small(p.numel() + 1)[1:].view_as(p),
    "reversed axes": lambda p: small(*reversed(p.shape)).permute(*reversed(range(p.ndim))),
}


def small(*shape):
    return 0.1 * torch.randn(shape)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("which", ["biases", "weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@NETWORKS
@torch.no_grad()
def test_parameters_that_are_views(seed, make, view, which, dtype):
    """Read with their strides, and nothing beyond them."""
    case = make()
    for module in case.network.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if (p.ndim == 1) == (which == "biases"):
                setattr(module, name, nn.Parameter(VIEWS[view](p), requires_grad=False))
    want, true = case.call(), exact(case)
    half = rounded(case) if dtype == torch.bfloat16 else None
    fastdiff.accelerate(case.network, dtype=dtype)
    for _ in range(2):
        got = case.call()
        assert torch.isfinite(got).all()
        # Channels that are all alike leave a norm nothing but rounding errors to divide by.
        own = difference(want, true) if dtype == torch.float32 else difference(half, true)
        assert difference(got, true) <= (1e-5 if dtype == torch.float32 else 0.08) + 4 * own
    fastdiff.restore(case.network)
    assert_same_bits(case.call(), want)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bias", ["every other", "a column", "expanded whole"])
@torch.no_grad()
def test_a_viewed_bias_of_one_convolution(seed, kernel, groups, bias):
    for transposed in (False, True):
        kind = nn.ConvTranspose2d if transposed else nn.Conv2d
        network = nn.Sequential(kind(16, 16, kernel, padding=kernel // 2, groups=groups), nn.Linear(8, 8)).eval()
        network[0].bias = nn.Parameter(VIEWS[bias](network[0].bias), requires_grad=False)
        network[1].bias = nn.Parameter(VIEWS[bias](network[1].bias), requires_grad=False)
        x = torch.randn(2, 16, 8, 8)
        want = network(x)
        fastdiff.accelerate(network, dtype=torch.float32)
        assert_equal(network(x), want)


# ---- a Sequential whose parts are used apart


class Apart(nn.Module):
    """OpenAI's scale and shift with a plain GroupNorm: the Sequential is sliced."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1))

    def forward(self, x):
        norm, rest = self.layers[0], self.layers[1:]
        return rest(norm(x) * 1.5 + 0.25)


class Tapped(Apart):
    def forward(self, x):
        h = self.layers[0](x)
        return self.layers[2](self.layers[1](h)) + h


class Both(Apart):
    def forward(self, x):
        return self.layers(x) + self.layers[0](x)


class Activation(Apart):
    def forward(self, x):
        return self.layers(x) + self.layers[1](x)


class ByLoop(Apart):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x) + (x if isinstance(layer, nn.SiLU) else 0)
        return x


class Shared(Apart):
    def __init__(self):
        super().__init__()
        self.other = nn.Sequential(self.layers[1], self.layers[2])

    def forward(self, x):
        return self.layers(x) + self.other(x)


class Nested(Apart):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Sequential(nn.Identity(), nn.GroupNorm(8, 32)), nn.SiLU(), nn.GroupNorm(4, 32), nn.SiLU()
        )

    def forward(self, x):
        return self.layers(x) + self.layers[0](x) + self.layers[2:](x)


class Grown(Apart):
    """Layers that are put in after the network was made."""

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize(
    "kind", [Apart, Tapped, Both, Activation, ByLoop, Shared, Nested, Grown], ids=lambda k: k.__name__
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_parts_of_a_sequential_used_apart(seed, kind, dtype):
    case = Case(filled(kind()), {"x": torch.randn(2, 32, 8, 8)})
    steps = []
    if kind is Grown:
        steps = [
            lambda m: m.layers.insert(1, nn.Tanh()),
            lambda m: m.layers.__delitem__(2),
            lambda m: m.layers.append(nn.SiLU()),
        ]
    history(case, steps, 0, dtype=dtype, tolerance=1e-5 if dtype == torch.float32 else 0.06, effect=None)


@pytest.mark.parametrize("make", [pixels, cross, decoder, ours], ids=lambda f: f.__name__)
@torch.no_grad()
def test_last_norm_and_activation_used_apart(seed, make):
    """Code of others that calls conv_norm_out and conv_act itself, with something between them."""
    case = make()
    plain, fast = twins(case)
    if make is decoder:
        plain, fast = plain.decoder, fast.decoder
    h = torch.randn(2, 32, 8, 8)
    for m in (plain, fast):
        assert_equal(m.conv_norm_out(h), F.group_norm(h, m.conv_norm_out.num_groups, m.conv_norm_out.weight,
                                                      m.conv_norm_out.bias, m.conv_norm_out.eps))  # fmt: skip
        assert_equal(m.conv_act(h), F.silu(h))


# ---- gradients


def residuals(requires_grad):
    shapes = ((2, 32, 8, 8), (2, 32, 8, 8), (2, 32, 4, 4), (2, 64, 4, 4))
    return [torch.randn(s).requires_grad_(requires_grad) for s in shapes]


def with_container(kind, wanted):
    """ControlNet's residuals, IP-Adapter's embeddings: tensors that need gradients, in a list, a tuple or a dict."""
    case = cross()
    inputs = dict(case.inputs, sample=torch.randn(2, 4, 8, 8))
    leaves = residuals(wanted)
    if kind in ("list", "tuple"):
        inputs["down_block_additional_residuals"] = list(leaves) if kind == "list" else tuple(leaves)
        inputs["mid_block_additional_residual"] = torch.zeros(2, 64, 4, 4)
    elif kind == "dict":
        leaves = [torch.randn(2, 7, 48).requires_grad_(wanted)]
        inputs["encoder_hidden_states"] = leaves[0].detach()
        inputs["cross_attention_kwargs"] = {}
        inputs["added_cond_kwargs"] = {"image_embeds": [torch.randn(2, 1, 24).requires_grad_(wanted)]}
        leaves = inputs["added_cond_kwargs"]["image_embeds"]
    return case._replace(inputs=inputs), leaves


@pytest.mark.parametrize("kind", ["list", "tuple", "dict"])
def test_gradients_through_containers(seed, kind):
    case, leaves = with_container(kind, True)
    if kind == "dict":
        from test_guard_layers import ip_adapter

        ip_adapter(case.network)
        case.network.requires_grad_(False)
    wanted = torch.autograd.grad(case.call().square().sum(), leaves)
    fast = copy.deepcopy(case.network)
    fastdiff.accelerate(fast, dtype=torch.float32)
    with torch.no_grad():
        case.call(fast)
    y = case.call(fast)
    assert y.requires_grad
    for g, w in zip(torch.autograd.grad(y.square().sum(), leaves), wanted, strict=True):
        assert_equal(g, w)


WAYS = (
    "input hook",
    "output hook",
    "closure in a forward",
    "pre-hook of the root",
    "buffer",
    "processor",
    "default argument",
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("after", [True, False])
def test_gradients_of_what_no_argument_shows(seed, way, after):
    """A learnable tensor that a hook, a closure, a processor or a buffer brings in."""
    case = cross()
    leaf = torch.randn(1, requires_grad=True)

    def bring(network):
        target = network.mid_block.resnets[0]
        if way == "input hook":
            target.register_forward_pre_hook(lambda m, args: (args[0] * leaf, *args[1:]))
        elif way == "output hook":
            target.register_forward_hook(lambda m, args, out: out * leaf)
        elif way == "pre-hook of the root":
            network.register_forward_pre_hook(
                lambda m, args, kwargs: ((args[0] * leaf, *args[1:]), kwargs), with_kwargs=True
            )
        elif way == "closure in a forward":
            own = target.forward
            target.forward = lambda *args, **kwargs: own(*args, **kwargs) * leaf
        elif way == "default argument":
            own = network.conv_out.forward
            network.conv_out.forward = lambda x, scale=leaf: own(x * scale)
        elif way == "buffer":
            target.conv1.register_buffer("scale", leaf)
            target.conv1.register_forward_hook(lambda m, args, out: out * m.scale)
        else:

            class Mine:
                def __call__(self, attn, hidden_states, *args, **kwargs):
                    return hidden_states * leaf

            network.set_attn_processor(Mine())

    plain, fast = case.network, copy.deepcopy(case.network)
    if not after:
        bring(fast)
    fastdiff.accelerate(fast, dtype=torch.float32)
    with torch.no_grad():
        case.call(fast)
    if after:
        bring(fast)
    bring(plain)
    (wanted,) = torch.autograd.grad(case.call(plain).square().sum(), leaf)
    y = case.call(fast)
    assert y.requires_grad
    assert_equal(torch.autograd.grad(y.square().sum(), leaf)[0], wanted)
    with torch.no_grad():
        assert not case.call(fast).requires_grad


@NETWORKS
def test_gradients_of_inputs_and_of_one_parameter(seed, make):
    case = make()
    plain, fast = twins(case)
    name = next(iter(case.inputs))
    results = []
    for network in (plain, fast):
        x = case.inputs[name].clone().requires_grad_()
        here = case._replace(inputs=case.inputs | {name: x})
        results.append(torch.autograd.grad(here.call(network).square().sum(), x)[0])
        last = list(network.parameters())[-1].requires_grad_()
        results.append(torch.autograd.grad(case.call(network).square().sum(), last)[0])
        last.requires_grad_(False)
    assert_equal(results[2], results[0])
    assert_equal(results[3], results[1])


@torch.no_grad()
def test_checkpointing(seed):
    case = pixels()
    plain, fast = twins(case)
    with torch.enable_grad():
        for network in (plain, fast):
            network.enable_gradient_checkpointing()
            network.train().requires_grad_(True)
            case.call(network).square().mean().backward()
            network.eval()
    for p, q in zip(plain.parameters(), fast.parameters(), strict=True):
        assert_equal(q.grad, p.grad)
    assert_equal(case.call(fast), case.call(plain))


# ---- tracing and function transforms


def tensor_call(case):
    """(a function of the network and one tensor, the tensor)."""
    name = next(iter(case.inputs))
    rest = {k: v for k, v in case.inputs.items() if k != name}

    def call(network, x):
        function = getattr(network, case.method) if case.method else network
        return case.pick(function(**{name: x}, **rest))

    return call, case.inputs[name]


class Wrapped(nn.Module):
    def __init__(self, network, call):
        super().__init__()
        self.network, self.call = network, call

    def forward(self, x):
        return self.call(self.network, x)


TRACED = pytest.mark.parametrize("make", [pixels, ours, decoder, usual, cross], ids=lambda f: f.__name__)


@pytest.mark.filterwarnings("ignore")
@TRACED
@torch.no_grad()
def test_jit_trace(seed, make):
    """The traced graph computes of other numbers what the network does."""
    case = make()
    call, x = tensor_call(case)
    plain, fast = twins(case)
    traced = torch.jit.trace(Wrapped(fast, call).eval(), x, check_trace=False)
    for y in (x, torch.randn_like(x)):
        assert_equal(traced(y), call(plain, y))
    assert_equal(call(fast, x), call(plain, x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strict", [False, True])
@TRACED
@torch.no_grad()
def test_export(seed, make, strict):
    case = make()
    call, x = tensor_call(case)
    plain, fast = twins(case)
    try:
        torch.export.export(Wrapped(plain, call).eval(), (x,), strict=strict)
    except Exception as error:
        pytest.skip(f"the network itself is not exported: {type(error).__name__}")
    program = torch.export.export(Wrapped(fast, call).eval(), (x,), strict=strict)
    y = torch.randn_like(x)
    assert_equal(program.module()(y), call(plain, y))


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_export_of_the_network_itself(seed, strict):
    network = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1)).eval()
    x, y = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    want = network(y)
    fastdiff.accelerate(network)
    program = torch.export.export(network, (x,), strict=strict)
    assert_equal(program.module()(y), want)


@TRACED
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@torch.no_grad()
def test_make_fx(seed, make, mode):
    from torch.fx.experimental.proxy_tensor import make_fx

    case = make()
    call, x = tensor_call(case)
    plain, fast = twins(case)
    try:
        make_fx(lambda t: call(plain, t), tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    except Exception as error:
        pytest.skip(f"the network itself is not traced: {type(error).__name__}")
    graph = make_fx(lambda t: call(fast, t), tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    y = torch.randn_like(x)
    assert_equal(graph(y), call(plain, y))


@pytest.mark.parametrize("make", [ours, usual, decoder], ids=lambda f: f.__name__)
@torch.no_grad()
def test_vmap(seed, make):
    case = make()
    if make is ours:
        case = case._replace(inputs=case.inputs | {"timestep": 5, "class_labels": torch.tensor([1, 4])})
    call, x = tensor_call(case)
    plain, fast = twins(case)
    xs = torch.randn(3, *x.shape)
    if not refused_alike(lambda m: torch.func.vmap(lambda t: call(m, t))(xs), plain, fast):
        want = torch.func.vmap(lambda t: call(plain, t))(xs)
        assert_equal(torch.func.vmap(lambda t: call(fast, t))(xs), want)


@torch.no_grad()
def test_vmap_over_an_ensemble(seed):
    """torch.func.stack_module_state: the weights have a dimension more."""
    networks = [usual().network for _ in range(3)]
    x = torch.randn(2, 3, 16, 16)
    want = torch.stack([m(x) for m in networks])
    state, buffers = torch.func.stack_module_state(networks)
    state = {k: v.detach() for k, v in state.items()}
    fast = copy.deepcopy(networks[0])
    fastdiff.accelerate(fast, dtype=torch.float32)
    got = torch.func.vmap(lambda s, b: torch.func.functional_call(fast, (s, b), (x,)))(state, buffers)
    assert_equal(got, want)


def refused_alike(run, plain, fast) -> bool:
    """Whether torch itself cannot do this to the plain network, in which case the accelerated one says the same."""
    try:
        run(plain)
    except Exception as error:
        with pytest.raises(type(error)):
            run(fast)
        return True
    return False


@TRACED
@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode(seed, make, grad):
    """jvp: log-likelihoods and consistency training; without it being noticed a tangent is lost."""
    case = make()
    call, x = tensor_call(case)
    plain, fast = twins(case)
    v = torch.randn_like(x)
    if refused_alike(lambda m: torch.func.jvp(lambda t: call(m, t), (x,), (v,)), plain, fast):
        return
    with torch.set_grad_enabled(grad):
        want = torch.func.jvp(lambda t: call(plain, t), (x,), (v,))
        got = torch.func.jvp(lambda t: call(fast, t), (x,), (v,))
        assert_equal(got[0].detach(), want[0].detach())
        assert_equal(got[1].detach(), want[1].detach(), "the tangent")
        import torch.autograd.forward_ad as ad

        with ad.dual_level():
            if not refused_alike(lambda m: call(m, ad.make_dual(x, v)), plain, fast):
                tangent = ad.unpack_dual(call(fast, ad.make_dual(x, v))).tangent
                assert tangent is not None
                assert_equal(tangent.detach(), want[1].detach(), "the dual tensor's")


@pytest.mark.parametrize("make", [ours, usual], ids=lambda f: f.__name__)
def test_reverse_mode_transforms(seed, make):
    case = make()
    call, x = tensor_call(case)
    plain, fast = twins(case)
    v = torch.randn_like(call(plain, x))
    with torch.no_grad():
        want = torch.func.vjp(lambda t: call(plain, t), x)[1](v)[0]
        assert_equal(torch.func.vjp(lambda t: call(fast, t), x)[1](v)[0], want)
        want = torch.func.grad(lambda t: call(plain, t).square().sum())(x)
        assert_equal(torch.func.grad(lambda t: call(fast, t).square().sum())(x), want)


@TRACED
@torch.no_grad()
def test_fake_tensors(seed, make):
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = make()
    call, x = tensor_call(case)
    plain, fast = twins(case)
    want = call(plain, x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        if not refused_alike(lambda m: call(m, mode.from_tensor(x)), plain, fast):
            y = call(fast, mode.from_tensor(x))
            assert (y.shape, y.dtype) == (want.shape, want.dtype)
    assert_equal(call(fast, x), want)


@TRACED
@torch.no_grad()
def test_meta(seed, make):
    """Shapes of results, without numbers: a network on meta."""
    case = make()
    call, x = tensor_call(case)
    want = call(case.network, x)
    plain, fast = twins(case)
    fast.to("meta")
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in case.inputs.items()}
    y = case._replace(inputs=meta).call(fast)
    assert y.device.type == "meta"
    assert (y.shape, y.dtype) == (want.shape, want.dtype)
    with torch.device("meta"):
        pass
    fast = fast.to_empty(device="cpu")
    fast.load_state_dict(plain.state_dict())
    assert_equal(call(fast, x), want)


class Logged(torch.Tensor):
    """A tensor subclass that looks on."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


@TRACED
@torch.no_grad()
def test_a_tensor_subclass_goes_in(seed, make):
    case = make()
    call, x = tensor_call(case)
    plain, fast = twins(case)
    want = call(plain, x.as_subclass(Logged))
    got = call(fast, x.as_subclass(Logged))
    assert type(got) is type(want)
    assert_equal(got.as_subclass(torch.Tensor), want.as_subclass(torch.Tensor))


@torch.no_grad()
def test_modes_that_look_on(seed):
    """FlopCounter, a dispatch mode: they see what the network's own code does, or the numbers are right at least."""
    from torch.utils.flop_counter import FlopCounterMode

    case = pixels()
    plain, fast = twins(case)
    with FlopCounterMode(display=False) as counter:
        want = case.call(plain)
    with FlopCounterMode(display=False) as seen:
        assert_equal(case.call(fast), want)
    assert seen.get_total_flops() == counter.get_total_flops()


# ---- devices


SCRIPT = """
import torch, fastdiff
from torch import nn
torch.manual_seed(0)
torch.set_num_threads(1)
if {kind!r} == "unet":
    m = fastdiff.models.UNet(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")).eval()
    args = torch.randn(1, 3, 8, 8), 5
else:
    m = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.SiLU(), nn.Upsample(scale_factor=2),
        nn.Conv2d(64, 64, 3, padding=1), nn.ConvTranspose2d(64, 8, 2), nn.Linear(17, 8)).eval()
    args = (torch.randn(1, 64, 8, 8),)
with torch.no_grad():
    want = m(*args)
    def turn(call):
        torch.set_default_device("meta")
        try: return call()
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as e: return e
        finally: torch.set_default_device("cpu")
    plain = turn(lambda: m(*args))
    if {when!r} == "accelerated under it":
        put = turn(lambda: fastdiff.accelerate(m, dtype=torch.{dtype}))
        assert not isinstance(put, Exception), put
    else:
        fastdiff.accelerate(m, dtype=torch.{dtype})
        if {when!r} == "called before": m(*args)
    got = turn(lambda: m(*args))
    tolerance = 1e-5 if "{dtype}" == "float32" else 0.05
    if isinstance(plain, Exception):  # the network itself does not run so
        assert type(got) is type(plain) or float((got - want).abs().max()) <= tolerance * float(want.abs().max()), got
    else:
        assert isinstance(got, torch.Tensor), got
        assert got.device.type == "cpu" and float((got - want).abs().max()) <= tolerance * float(want.abs().max())
    got = m(*args)
    assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())
print("right")
"""


@pytest.mark.parametrize("kind", ["unet", "sequence"])
@pytest.mark.parametrize("when", ["at once", "called before", "accelerated under it"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_default_device(kind, when, dtype):
    """In a process of its own, which a wrong pointer would end: what is allocated is where x is."""
    script = SCRIPT.format(kind=kind, when=when, dtype=dtype)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, f"exit code {run.returncode}: {run.stderr[-500:]}"
    assert "right" in run.stdout


# ---- copies, threads, twice


@NETWORKS
@torch.no_grad()
def test_copies(seed, make):
    """deepcopy, pickle, torch.save: copies are right and independent, with what was changed in them."""
    case = make()
    plain, fast = twins(case)
    case.call(fast)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(fast), torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(fast))]
    want = case.call(plain)
    for twin in copies:
        assert_equal(case.call(twin), want)
        changed = copy.deepcopy(plain)
        for m in (twin, changed):
            for p in m.parameters():
                p.data.mul_(1.1)
            for conv in m.modules():
                if isinstance(conv, nn.Conv2d):
                    conv.padding_mode = "circular"
        assert_equal(case.call(twin), case.call(changed))
        assert_equal(case.call(fast), want)
        fastdiff.restore(twin)
        assert_same_bits(case.call(twin), case.call(changed))
    fastdiff.restore(fast)
    assert_same_bits(case.call(fast), want)


@torch.no_grad()
def test_a_copy_of_an_accelerated_network_with_a_patched_forward(seed):
    case = usual()
    own = case.network.first.forward
    case.network.first.forward = lambda x: own(x) * 1.5
    want = case.call()
    fastdiff.accelerate(case.network, dtype=torch.float32)
    assert_equal(case.call(), want)
    assert_equal(case.call(copy.copy(case.network)), want)


def test_threads_while_weights_change(seed):
    """Each thread's own network, accelerated, called, changed and restored at once; and one network by four threads."""
    cases = [pixels() for _ in range(3)]
    errors = []

    def work(case):
        try:
            with torch.no_grad():
                plain, fast = case.network, copy.deepcopy(case.network)
                for _ in range(3):
                    fastdiff.accelerate(fast, dtype=torch.float32)
                    assert_equal(case.call(fast), case.call(plain))
                    for m in (plain, fast):
                        for p in m.parameters():
                            p.data.mul_(1.02)
                    assert_equal(case.call(fast), case.call(plain))
                    fastdiff.restore(fast)
        except Exception as error:
            errors.append(error)

    run_all([threading.Thread(target=work, args=(case,)) for case in cases])
    assert errors == []


def run_all(threads):
    for t in threads:
        t.start()
    for t in threads:
        t.join()


def test_threads_with_other_inputs(seed):
    case = cross()
    plain, fast = twins(case)
    inputs = [case._replace(inputs=case.inputs | {
        "sample": torch.randn(1 + i % 2, 4, 8, 8), "timestep": 100 * i,
        "encoder_hidden_states": torch.randn(1 + i % 2, 7, 48),
    }) for i in range(4)]  # fmt: skip
    with torch.no_grad():
        wanted = [c.call(plain) for c in inputs]
    errors = []

    def work(i):
        try:
            with torch.no_grad():
                for _ in range(4):
                    assert_equal(inputs[i].call(fast), wanted[i])
        except Exception as error:
            errors.append(error)

    run_all([threading.Thread(target=work, args=(i,)) for i in range(4)])
    assert errors == []


def test_threads_that_accelerate_one_network(seed):
    case = pixels()
    want = case.call().detach()
    reports, errors = [], []
    start = threading.Barrier(4)

    def work():
        start.wait()
        try:
            reports.append(fastdiff.accelerate(case.network, dtype=torch.float32))
        except ValueError as error:
            errors.append(error)

    run_all([threading.Thread(target=work) for _ in range(4)])
    assert errors == []
    assert all(r is reports[0] for r in reports)
    with torch.no_grad():
        assert_equal(case.call(), want)
    fastdiff.restore(case.network)
    assert not any("forward" in m.__dict__ for m in case.network.modules())


@NETWORKS
@torch.no_grad()
def test_accelerate_twice(seed, make):
    """A notebook's cell that runs twice: the same report; other arguments are refused in words."""
    case = make()
    want = case.call()
    report = fastdiff.accelerate(case.network, dtype=torch.float32)
    assert fastdiff.accelerate(case.network, dtype=torch.float32) is report
    with pytest.raises(ValueError, match="restore"):
        fastdiff.accelerate(case.network, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="restore"):
        fastdiff.accelerate(case.network, dtype=torch.float32, exact_convolutions=True)
    assert_equal(case.call(), want)
    fastdiff.restore(case.network)
    assert_same_bits(case.call(), want)
    assert not any("forward" in m.__dict__ for m in case.network.modules())
    again = fastdiff.accelerate(case.network, dtype=torch.float32, exact_convolutions=True)
    assert again is not report
    assert_equal(case.call(), want)


@torch.no_grad()
def test_a_part_accelerated_before_the_whole(seed):
    """The part's own, then the whole: right, or refused in words; restored from the inside or the outside."""
    case = decoder()
    want = case.call()
    fastdiff.accelerate(case.network.decoder, dtype=torch.float32)
    assert_equal(case.call(), want)
    try:
        fastdiff.accelerate(case.network, dtype=torch.float32)
    except ValueError as error:
        if "accelerated" not in str(error):
            raise
    assert_equal(case.call(), want)
    fastdiff.restore(case.network.decoder)
    assert_equal(case.call(), want)


@torch.no_grad()
def test_a_part_shared_by_two_networks(seed):
    """One encoder in two models, of which one is accelerated and restored."""

    class Two(nn.Module):
        def __init__(self, body, scale):
            super().__init__()
            self.body, self.scale = body, scale

        def forward(self, x):
            return self.body(x) * self.scale

    body = usual().network
    a, b = Two(body, 1.0).eval(), Two(body, 2.0).eval()
    x = torch.randn(2, 3, 16, 16)
    want = body(x)
    fastdiff.accelerate(a, dtype=torch.float32)
    assert_equal(b(x), want * 2)
    try:
        fastdiff.accelerate(b, dtype=torch.float32)
    except ValueError as error:
        if "accelerated" not in str(error):
            raise
    fastdiff.restore(a)
    assert_equal(b(x), want * 2)
    assert_equal(a(x), want)


# ---- compiled parts


def compile_part(path, backend="eager"):
    def change(network):
        torch._dynamo.reset()
        parent, _, leaf = path.rpartition(".")
        owner = network.get_submodule(parent)
        setattr(owner, leaf, torch.compile(getattr(owner, leaf), backend=backend))

    return change


def compiled_in_place(path):
    def change(network):
        torch._dynamo.reset()
        network.get_submodule(path).compile(backend="eager")

    return change


def unwrap(path):
    def change(network):
        parent, _, leaf = path.rpartition(".")
        owner = network.get_submodule(parent)
        part = getattr(owner, leaf)
        if hasattr(part, "_orig_mod"):
            setattr(owner, leaf, part._orig_mod)

    return change


COMPILED = {
    "mid_block": (cross, compile_part("mid_block"), unwrap("mid_block")),
    "a resnet": (pixels, compile_part("mid_block.resnets.0"), unwrap("mid_block.resnets.0")),
    "a convolution": (usual, compile_part("first"), unwrap("first")),
    "conv_in": (pixels, compile_part("conv_in"), unwrap("conv_in")),
    "the decoder": (decoder, compile_part("decoder"), unwrap("decoder")),
    "mid_block in place": (cross, compiled_in_place("mid_block"), lambda m: None),
    "repeated blocks": (
        cross, lambda m: (torch._dynamo.reset(), m.compile_repeated_blocks(backend="eager")), lambda m: None
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("at", range(3), ids=["compiled after", "unwrapped after", "unwrapped before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_parts(seed, name, at, dtype):
    make, change, back = COMPILED[name]
    tolerance = 1e-5 if dtype == torch.float32 else 0.06
    history(make(), [change, back], at, effect=None, dtype=dtype, tolerance=tolerance, bits=False)


@torch.no_grad()
def test_a_graph_break(seed):
    """torch.compile of a network in which something cannot be traced."""

    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = usual().network, usual().network

        def forward(self, x):
            h = self.a(x)
            torch._dynamo.graph_break()
            return self.b(h)

    network = Broken().eval()
    x = torch.randn(2, 3, 16, 16)
    want = network(x)
    for dtype in (torch.float32, torch.bfloat16):
        torch._dynamo.reset()
        compiled = torch.compile(network, backend="eager")
        fastdiff.accelerate(network, dtype=dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 0.06
        assert_equal(compiled(x), want, tolerance=tolerance)
        assert_equal(network(x), want, tolerance=tolerance)
        fastdiff.restore(network)
        assert_same_bits(network(x), want)


@torch.no_grad()
def test_data_parallel_replicas(seed):
    """A replica computes with its own weights, not with those of the network that it was made of."""
    case = usual()
    fastdiff.accelerate(case.network, dtype=torch.float32)
    want = case.call()
    replica = case.network._replicate_for_data_parallel()
    for name, m in case.network.named_children():
        twin = copy.deepcopy(m)
        for p in twin.parameters():
            p.data.mul_(1.1)
        setattr(replica, name, twin)
    changed = copy.deepcopy(case.network)
    fastdiff.restore(changed)
    for m in changed.children():
        for p in m.parameters():
            p.data.mul_(1.1)
    replica.scale = case.network.scale
    assert_equal(replica(case.inputs["x"]), changed(case.inputs["x"]))
    assert_equal(case.call(), want)


@torch.no_grad()
def test_save_pretrained(seed, tmp_path):
    case = Case(vae(), {"z": torch.randn(1, 4, 8, 8)}, method="decode")
    want = case.call()
    fastdiff.accelerate(case.network, dtype=torch.float32)
    case.network.save_pretrained(tmp_path)
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path).eval()
    assert_same_bits(case.call(again), want)


@torch.no_grad()
def test_attention_that_needs_a_prompt(seed):
    case = cross()
    plain, fast = twins(case)
    attention = fast.mid_block.attentions[0].transformer_blocks[0].attn2
    own = plain.mid_block.attentions[0].transformer_blocks[0].attn2
    x = torch.randn(2, 16, attention.to_q.in_features)
    for prompt, error in ((None, RuntimeError), (torch.ones(2, 5, attention.to_k.in_features).long(), TypeError)):
        with pytest.raises(RuntimeError):
            own(x, prompt)
        with pytest.raises(error, match=r"mat1 and mat2 shapes|floating point"):
            attention(x, prompt)
