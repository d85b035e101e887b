"""Layers, forwards and hooks that change before or after ``accelerate``: the network's own result, always."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("diffusers")
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from matrix import (
    MAIN,
    Case,
    assert_equal,
    cross,
    decoder,
    each_of,
    filled,
    first_tensor,
    history,
    lora,
    ours,
    pixels,
    usual,
)

import fastdiff

pytestmark = pytest.mark.networks

# The step before which ``accelerate`` comes, of ``history``: what is done to the network comes after it, or before.
EACH = pytest.mark.parametrize("before", [False, True], ids=["done after", "done before"])
BEFORE_OR_AFTER = pytest.mark.parametrize("at", [0, 1], ids=["done after", "done before"])
# And undone: both after it, or done before and undone after.
UNDOING = pytest.mark.parametrize("at", [0, 1], ids=["done after", "undone after"])


def every(network, end):
    """The modules whose path ends so."""
    found = [(name, m) for name, m in network.named_modules() if f".{name}".endswith(f".{end}")]
    assert found, end
    return found


def one(network, end):
    return every(network, end)[0][1]


# ---- LoRA by peft

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = {
    "attention": ATTENTION,
    "query": ("to_q",),
    "output": ("to_out.0",),
    "convolutions": ("conv1", "conv2", "conv_shortcut"),
    "conv1": ("conv1",),
    "shortcut": ("conv_shortcut",),
    "time": ("time_emb_proj",),
    "ends": ("conv_in", "conv_out"),
    "resolution": ("downsamplers.0.conv", "upsamplers.0.conv"),
    "tokens": ("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    "embedding": ("linear_1", "linear_2"),
    "all": (
        *ATTENTION,
        "conv1",
        "conv2",
        "conv_shortcut",
        "time_emb_proj",
        "proj_in",
        "ff.net.2",
        "linear_1",
        "conv_in",
    ),
}


@pytest.mark.parametrize("targets", TARGETS)
@BEFORE_OR_AFTER
def test_lora(seed, targets, at):
    pytest.importorskip("peft")
    history(cross(), [lora(*TARGETS[targets])], at)


@pytest.mark.parametrize("make", [pixels, decoder], ids=lambda f: f.__name__)
@BEFORE_OR_AFTER
def test_lora_of_other_networks(seed, make, at):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_v", "conv1", "conv2", "conv"], init_lora_weights=False)
    history(make(), [lambda m: peft.inject_adapter_in_model(config, m).eval()], at)


@pytest.mark.parametrize("more", [{"use_dora": True}, {"use_rslora": True, "lora_alpha": 16}, {"bias": "lora_only"}])
@BEFORE_OR_AFTER
def test_kinds_of_lora(seed, more, at):
    pytest.importorskip("peft")
    history(cross(), [lora("to_q", "to_out.0", "conv1", **more)], at)


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig", "OFTConfig", "IA3Config"])
@BEFORE_OR_AFTER
def test_other_adapters_of_peft(seed, kind, at):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(target_modules=["to_k", "to_v", "ff.net.2"])
    if hasattr(config, "init_weights"):
        config.init_weights = False
    if kind == "IA3Config":
        config.feedforward_modules, config.init_ia3_weights = ["ff.net.2"], False
    if kind == "OFTConfig":
        config.oft_block_size, config.r = 8, 0

    def add(network):
        peft.inject_adapter_in_model(config, network).eval()
        for name, p in network.named_parameters():
            if "ia3_" in name or "oft_" in name:
                nn.init.normal_(p, 0.0, 0.3)

    history(cross(), [add], at)


LIFE = [
    lambda m: lora("to_q", "to_k", "to_v", "to_out.0", "conv1", "time_emb_proj")(m),
    lambda m: m.set_adapters(["default"], [2.5]),
    lambda m: m.disable_adapters(),
    lambda m: m.enable_adapters(),
    lambda m: m.fuse_lora(lora_scale=0.5),
    lambda m: m.unfuse_lora(),
    lambda m: m.add_adapter(
        __import__("peft").LoraConfig(r=2, target_modules=["to_q", "conv2"], init_lora_weights=False), "b"),
    lambda m: m.set_adapters(["default", "b"], [0.7, 1.5]),
    lambda m: m.delete_adapters("default"),
    lambda m: m.unload_lora(),
]  # fmt: skip


@pytest.mark.parametrize("at", range(len(LIFE) + 1))
def test_a_loras_life(seed, at):
    """Loaded, scaled, disabled, fused, unfused, joined by another, deleted, unloaded; accelerated at any moment."""
    pytest.importorskip("peft")
    history(cross(), LIFE, at)


@pytest.mark.parametrize("at", range(4))
def test_peft_model_merged(seed, at):
    """get_peft_model's merge and unmerge write through .data; unload puts the layers back."""
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import BaseTunerLayer

    def each(method):
        return lambda m: [getattr(k, method)() for k in m.modules() if isinstance(k, BaseTunerLayer)]

    add = lora("to_q", "to_k", "conv1", "conv_shortcut", "time_emb_proj")
    assert peft
    history(cross(), [add, each("merge"), each("unmerge")], at)


@torch.no_grad()
def test_the_report_says_what_fell_back(seed):
    """The report is of now: after a LoRA it names the blocks whose own code runs, and after its end it does not."""
    pytest.importorskip("peft")
    case = cross()
    report = fastdiff.accelerate(case.network, dtype=torch.float32)
    case.call()
    before = str(report)
    lora("to_q")(case.network)
    case.call()
    during = str(report)
    assert during != before
    new = [line for line in during.splitlines() if line not in before.splitlines()]
    assert any("Attention" in line for line in new)
    case.network.unload_lora()
    case.call()
    case.call()
    assert str(report) == before


@torch.no_grad()
def test_only_what_changed_falls_back(seed):
    """A LoRA on attention leaves the convolutions' stand-ins at work: one of them is counted where it runs."""
    pytest.importorskip("peft")
    case = pixels()
    plain = copy.deepcopy(case.network)
    report = fastdiff.accelerate(case.network, dtype=torch.float32)
    case.call()
    before = str(report)
    one(case.network, "attentions.0.to_q").register_forward_hook(lambda *_: None)
    assert_equal(case.call(), case.call(plain))
    new = [line for line in str(report).splitlines() if line not in before.splitlines()]
    assert not any("ResnetBlock2D" in line and "own code" in line for line in new)


# ---- forwards that a library patches


def add_forward(end):
    """kohya's sd-scripts and LyCORIS: ``org_module.forward = self.forward``."""

    def patch(network):
        for _, m in every(network, end):
            down = torch.randn(4, m.weight[0].numel()) / m.weight[0].numel() ** 0.5
            up = torch.randn(len(m.weight), 4) / 2

            def forward(x, *args, m=m, own=m.forward, delta=up @ down, **kwargs):
                y = own(x, *args, **kwargs)
                if x.ndim == 4 and m.weight.ndim == 4:
                    return y + F.conv2d(x, delta.view_as(m.weight), None, m.stride, m.padding)
                return y + F.linear(x, delta)

            m.__dict__["theirs"] = forward, m.forward
            m.forward = forward

    return patch


def put_back(end):
    def unpatch(network):
        for _, m in every(network, end):
            m.forward = m.__dict__.pop("theirs")[1]

    return unpatch


LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "linear_1",
          "downsamplers.0.conv", "upsamplers.0.conv", "proj_in", "ff.net.2")  # fmt: skip


@EACH
def test_a_patched_forward_of_a_layer(seed, before):
    each_of(cross(), {end: (add_forward(end), put_back(end)) for end in LAYERS}, before)


BLOCKS = ("resnets.0", "attn1", "attn2", "transformer_blocks.0", "attentions.0", "downsamplers.0", "upsamplers.0",
          "norm1", "norm2", "nonlinearity", "conv_norm_out", "conv_act", "mid_block", "up_blocks.0", "up_blocks.1",
          "down_blocks.0", "time_proj", "time_embedding", "ff", "norm3")  # fmt: skip


def scaled(value):
    """What a block returns, with its floating tensors half as large again."""
    if isinstance(value, torch.Tensor):
        return value * 1.5 if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(scaled(v) for v in value)
    return value


@EACH
def test_a_patched_forward_of_a_block(seed, before):
    def patch(end):
        def change(network):
            for _, m in every(network, end):
                own = m.forward
                m.__dict__["theirs"] = own
                m.forward = lambda *args, own=own, **kwargs: scaled(own(*args, **kwargs))

        return change

    def unpatch(end):
        def change(network):
            for _, m in every(network, end):
                m.forward = m.__dict__.pop("theirs")

        return change

    each_of(cross(), {end: (patch(end), unpatch(end)) for end in BLOCKS}, before, effect=None)


@pytest.mark.parametrize("make", MAIN.values(), ids=MAIN)
@pytest.mark.parametrize("at", range(3), ids=["before", "after", "removed"])
@torch.no_grad()
def test_a_patched_forward_of_the_root(seed, make, at):
    """An offload hook, DeepCache or a user's own: called while accelerated, and there after restore."""
    case = make()
    plain, fast = case.network, copy.deepcopy(case.network)
    calls = []

    def root(network):
        return network.decoder if make is decoder else network

    def patch(network, seen):
        own = root(network).forward

        def forward(*args, **kwargs):
            seen.append(1)
            out = own(*args, **kwargs)
            if isinstance(out, torch.Tensor):
                return out * 1.5
            out.sample = out.sample * 1.5
            return out

        root(network).forward = forward
        return own, forward

    if at == 0:
        _, forward = patch(fast, calls)
    fastdiff.accelerate(fast, dtype=torch.float32)
    if at:
        case.call(fast)
        own, forward = patch(fast, calls)
    patch(plain, [])
    want = case.call(plain)
    assert_equal(case.call(fast), want)
    assert len(calls) == 1
    if at == 2:
        root(fast).forward = own
        assert_equal(case.call(fast) * 1.5, want)
        root(fast).forward = forward
    fastdiff.restore(fast)
    calls.clear()
    assert_equal(case.call(fast), want, "restored", 0.0)
    assert len(calls) == 1
    if at == 0:
        assert root(fast).forward is forward


@pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
@UNDOING
def test_lycoris(seed, algo, at):
    lycoris = pytest.importorskip("lycoris")

    def add(network):
        net = lycoris.create_lycoris(network, 1.0, linear_dim=4, linear_alpha=2.0, algo=algo)
        net.apply_to()
        for p in net.parameters():
            nn.init.normal_(p, 0.0, 0.2)
        network.__dict__["theirs"] = net.eval()

    def remove(network):
        network.__dict__.pop("theirs").restore()

    history(cross(), [add, remove], at)


@BEFORE_OR_AFTER
def test_lycoris_merged(seed, at):
    lycoris = pytest.importorskip("lycoris")

    def merge(network):
        net = lycoris.create_lycoris(network, 1.0, linear_dim=4, linear_alpha=2.0, algo="lora")
        for p in [p for part in net.loras for p in part.parameters()]:
            nn.init.normal_(p, 0.0, 0.2)
        net.merge_to(1.0)

    history(cross(), [merge], at)


def asymmetric(self, x, weight, bias):
    """The tiling of web interfaces: circular along x, zeros along y."""
    if self.padding == (0, 0):
        return F.conv2d(x, weight, bias, self.stride)
    x = F.pad(F.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))
    return F.conv2d(x, weight, bias, self.stride)


@BEFORE_OR_AFTER
def test_a_convolutions_inner_method_is_patched(seed, at):
    def patch(network):
        for m in network.modules():
            if type(m) is nn.Conv2d:
                m._conv_forward = types.MethodType(asymmetric, m)

    history(cross(), [patch, lambda m: [k.__dict__.pop("_conv_forward", None) for k in m.modules()]], at)


@pytest.mark.parametrize(
    ("owner", "name", "new"),
    [
        (nn.Conv2d, "_conv_forward", asymmetric),
        (nn.Conv2d, "forward", lambda self, x: 1.5 * self._conv_forward(x, self.weight, self.bias)),
        (nn.Linear, "forward", lambda self, x: 1.5 * F.linear(x, self.weight, self.bias)),
        (nn.GroupNorm, "forward", lambda self, x: 1.5 * F.group_norm(x, self.num_groups, self.weight, self.bias)),
        (nn.LayerNorm, "forward", lambda self, x: 1.5 * F.layer_norm(x, self.normalized_shape)),
        (nn.SiLU, "forward", lambda self, x: torch.tanh(x)),
        (AttnProcessor2_0, "__call__", lambda self, attn, hidden_states, *a, **k: 1.5 * hidden_states),
        (ResnetBlock2D, "forward", lambda self, input_tensor, temb, *a, **k: self.conv1(input_tensor)),
    ],
)
@torch.no_grad()
def test_a_class_is_patched(seed, monkeypatch, owner, name, new):
    """For all instances at once, as seamless tiling does; and back."""
    if owner is ResnetBlock2D:
        case = decoder()
        new = lambda self, input_tensor, temb, *a, **k: (  # noqa: E731
            (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)) * 1.5
        )
    else:
        case = cross()
    plain, fast = case.network, copy.deepcopy(case.network)
    before = case.call(plain)
    fastdiff.accelerate(fast, dtype=torch.float32)
    assert_equal(case.call(fast), before)
    monkeypatch.setattr(owner, name, new)
    want = case.call(plain)
    assert not torch.allclose(want, before, 1e-3, 1e-3)
    assert_equal(case.call(fast), want)
    monkeypatch.undo()
    assert_equal(case.call(fast), before)


CLASSES = ("conv1", "to_q", "norm1", "attn1", "attn2", "resnets.0", "upsamplers.0", "downsamplers.0",
           "transformer_blocks.0", "up_blocks.1", "time_embedding", "time_proj")  # fmt: skip


@EACH
def test_a_modules_class_is_exchanged(seed, before):
    """tomesd: ``module.__class__ = ...``, a subclass of the same name made on the spot."""

    def patch(end):
        def change(network):
            for _, m in every(network, end):
                kind = type(m)
                forward = lambda *a, own=kind.forward, **k: scaled(own(*a, **k))  # noqa: E731
                new = type(kind.__name__, (kind,), {"forward": forward})
                new.__module__ = kind.__module__
                m.__class__ = new

        return change

    def back(end):
        def change(network):
            for _, m in every(network, end):
                m.__class__ = type(m).__mro__[1]

        return change

    each_of(cross(), {end: (patch(end), back(end)) for end in CLASSES}, before, effect=None)


# ---- hooks


@pytest.mark.parametrize("make", MAIN.values(), ids=MAIN)
@pytest.mark.parametrize("at", range(2), ids=["before", "after"])
@pytest.mark.parametrize("pre", [False, True], ids=["hook", "pre-hook"])
@torch.no_grad()
def test_every_hook_runs(seed, make, at, pre):
    """As often, in the order, and with inputs and outputs that the module's own code gives them."""
    case = make()
    plain, fast = case.network, copy.deepcopy(case.network)

    def watch(network, seen):
        for name, m in network.named_modules():
            if pre:
                m.register_forward_pre_hook(lambda m, args, name=name: seen.append((name, *shapes(args))))
            else:
                m.register_forward_hook(
                    lambda m, args, out, name=name: seen.append((name, *shapes(args), *shapes(out)))
                )

    wanted, seen = [], []
    if at == 0:
        watch(fast, seen)
    fastdiff.accelerate(fast, dtype=torch.float32)
    case.call(fast)
    if at:
        watch(fast, seen)
    seen.clear()
    watch(plain, wanted)
    want = case.call(plain)
    assert_equal(case.call(fast), want)
    assert seen == wanted


def shapes(value):
    if isinstance(value, torch.Tensor):
        return [tuple(value.shape)]
    if isinstance(value, (tuple, list)):
        return [s for v in value for s in shapes(v)]
    return []


@pytest.mark.parametrize("kind", ["output", "input", "keywords"])
@EACH
def test_a_hook_that_changes_what_passes(seed, kind, before):
    """Steering: the output, the input (of a block that reads two tensors: all of it), or a keyword's."""

    def both(m, args, kwargs):
        first = next(iter(kwargs), None)
        if not args and first is not None:
            return args, kwargs | {first: scaled(kwargs[first])}
        return (scaled(args[0]), *args[1:]), kwargs

    def watch(end):
        def change(network):
            handles = network.__dict__.setdefault("theirs", [])
            for _, m in every(network, end):
                if kind == "output":
                    handles.append(m.register_forward_hook(lambda m, args, out: scaled(out)))
                elif kind == "input":
                    handles.append(
                        m.register_forward_pre_hook(lambda m, args: (scaled(args[0]), *args[1:]) if args else None)
                    )
                else:
                    handles.append(m.register_forward_pre_hook(both, with_kwargs=True))

        return change

    def unwatch(network):
        for handle in network.__dict__.pop("theirs"):
            handle.remove()

    each_of(cross(), {end: (watch(end), unwatch) for end in (*LAYERS, *BLOCKS)}, before, effect=None)


@torch.no_grad()
def test_hooks_of_all_modules(seed):
    """torch.nn.modules.module's global hooks, as profilers and activation loggers set them."""
    from torch.nn.modules.module import register_module_forward_hook

    case = pixels()
    plain, fast = case.network, copy.deepcopy(case.network)
    fastdiff.accelerate(fast, dtype=torch.float32)
    case.call(fast)
    seen = []
    with register_module_forward_hook(lambda m, args, out: seen.append(type(m).__name__)):
        want = case.call(plain)
        wanted, seen = seen, []
        assert_equal(case.call(fast), want)
    assert seen == wanted


# ---- layers and attributes exchanged


class Scaled(nn.Linear):
    def forward(self, x):
        return 1.5 * super().forward(x)


class ScaledConv(nn.Conv2d):
    def forward(self, x):
        return 1.5 * super().forward(x)


def like(linear, convolution):
    def make(m):
        kind = linear if isinstance(m, nn.Linear) else convolution
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
        if isinstance(m, nn.Linear):
            new = kind(m.in_features, m.out_features, m.bias is not None)
        else:
            new = kind(*(getattr(m, name) for name in names), bias=m.bias is not None)
        return new.eval().requires_grad_(False)

    return make


EXCHANGED = {
    **{f"{end}: another": (end, like(nn.Linear, nn.Conv2d)) for end in LAYERS},
    **{f"{end}: a subclass": (end, like(Scaled, ScaledConv)) for end in LAYERS},
    "conv1: wrapped": ("conv1", lambda m: nn.Sequential(m, nn.Tanh())),
    "to_q: wrapped": ("to_q", lambda m: nn.Sequential(m, nn.Tanh())),
    "to_out.0: wrapped": ("to_out.0", lambda m: nn.Sequential(m, nn.Tanh())),
    "norm1: other groups": ("norm1", lambda m: filled(nn.GroupNorm(4, 32)) if isinstance(m, nn.GroupNorm) and
                            m.num_channels == 32 else m),
    "norm2: none": ("norm2", lambda m: nn.Identity()),
    "nonlinearity: GELU": ("nonlinearity", lambda m: nn.GELU()),
    "nonlinearity: a SiLU in place": ("nonlinearity", lambda m: nn.SiLU(inplace=True)),
    "conv_act: Tanh": ("conv_act", lambda m: nn.Tanh()),
    "conv_norm_out: none": ("conv_norm_out", lambda m: nn.Identity()),
    "resnets.0: wrapped": ("mid_block.resnets.0", lambda m: Passing(m)),
    "attn1: none": ("attn1", lambda m: First()),
    "ff: none": ("ff", lambda m: First()),
    "time_embedding: wrapped": ("time_embedding", lambda m: Passing(m)),
    "time_proj: wrapped": ("time_proj", lambda m: Passing(m)),
}  # fmt: skip


class Passing(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return scaled(self.inner(*args, **kwargs))


class First(nn.Module):
    def forward(self, x, *args, **kwargs):
        return x * 0.5


@EACH
def test_a_layer_is_exchanged(seed, before):
    def exchange(end, make):
        def change(network):
            for path, m in every(network, end):
                parent, _, leaf = path.rpartition(".")
                setattr(network.get_submodule(parent), leaf, make(m))

        return change

    each_of(cross(), {name: (exchange(*what), None) for name, what in EXCHANGED.items()}, before, effect=None)


def set_on(end, **values):
    def change(network):
        for _, m in every(network, end):
            for name, value in values.items():
                assert hasattr(m, name)
                setattr(m, name, value)

    return change


def circular(network):
    for m in network.modules():
        if isinstance(m, nn.Conv2d):
            m.padding_mode = "circular"


ATTRIBUTES = {
    "padding_mode of all": (cross, circular),
    "padding_mode of all, ours": (ours, circular),
    "padding_mode of all, decoder": (decoder, circular),
    "padding_mode of all, usual": (usual, circular),
    "padding_mode of a down-sampler": (cross, set_on("downsamplers.0.conv", padding_mode="circular")),
    "padding_mode of an up-sampler": (cross, set_on("upsamplers.0.conv", padding_mode="reflect")),
    "eps of norms": (cross, set_on("norm1", eps=0.5)),
    "groups of norms": (cross, set_on("resnets.0.norm2", num_groups=4)),
    "eps of the last norm": (pixels, set_on("conv_norm_out", eps=0.5)),
    "eps of an attention's norm": (pixels, set_on("group_norm", eps=0.5)),
    "dilation": (cross, set_on("conv1", dilation=(2, 2), padding=(2, 2))),
    "dilation of conv_in": (cross, set_on("conv_in", dilation=(2, 2), padding=(2, 2))),
    "output_scale_factor": (cross, set_on("resnets.0", output_scale_factor=1.7)),
    "use_in_shortcut": (cross, set_on("mid_block.resnets.0", conv_shortcut=None, output_scale_factor=1.3)),
    "rescale_output_factor": (pixels, set_on("attentions.0", rescale_output_factor=1.7)),
    "residual_connection": (pixels, set_on("attentions.0", residual_connection=False)),
    "heads": (cross, set_on("attn1", heads=2)),
    "heads over pixels": (pixels, set_on("attentions.0", heads=1)),
    "activation by function": (decoder, set_on("nonlinearity", forward=torch.tanh)),
    "skip_time_act": (cross, set_on("mid_block.resnets.0", skip_time_act=True)),
    "an up-sampler interpolates no more": (decoder, lambda m: set_on("upsamplers.0", use_conv=False)(m)),
    "flip_sin_to_cos": (cross, set_on("time_proj", flip_sin_to_cos=False)),
    "downscale_freq_shift": (pixels, set_on("time_proj", downscale_freq_shift=3.0)),
    "act of the time": (cross, set_on("time_embedding", act=nn.Tanh())),
    "post_act of the time": (cross, set_on("time_embedding", post_act=nn.Tanh())),
    "nonlinearity, ours": (ours, lambda m: [setattr(k, "nonlinearity", nn.GELU()) for k in m.modules()
                                            if hasattr(k, "nonlinearity")]),
    "conv_act, ours": (ours, lambda m: setattr(m, "conv_act", nn.GELU())),
}  # fmt: skip


@pytest.mark.parametrize("make", [cross, pixels, ours, decoder, usual], ids=lambda f: f.__name__)
@EACH
def test_an_attribute_is_exchanged(seed, make, before):
    changes = {name: (change, None) for name, (kind, change) in ATTRIBUTES.items() if kind is make}
    each_of(make(), changes, before)


@pytest.mark.parametrize("make", [pixels, cross, ours], ids=lambda f: f.__name__)
@torch.no_grad()
def test_dropout_in_an_eval_network(seed, make):
    """Monte Carlo dropout is at work, as random as in the network's own code. Its mask lies in the order of memory,
    which is another one in channels_last, so that the same seed gives other numbers.
    """
    case = make(**({"dropout": 0.3})) if make is not ours else make()
    if make is ours:
        for m in case.network.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.3
    plain, fast = case.network, copy.deepcopy(case.network)
    before = case.call(plain)
    fastdiff.accelerate(fast, dtype=torch.float32)
    case.call(fast)
    results = []
    for network in (plain, fast):
        found = [m for m in network.modules() if isinstance(m, nn.Dropout)]
        if not found:
            pytest.skip("this network has no dropout")
        for m in found:
            m.train()
        for draw in range(2):
            torch.manual_seed(draw)
            results.append(case.call(network))
    for i, result in enumerate(results):
        assert not torch.allclose(result, before, 1e-2, 1e-2)
        assert all(not torch.allclose(result, other, 1e-2, 1e-2) for other in results[:i])
    for network in (plain, fast):
        network.eval()
    assert_equal(case.call(fast), before)


# ---- parametrisations


def parametrised(kind, end):
    from torch.nn.utils import parametrizations, prune, weight_norm

    def change(network):
        for _, m in every(network, end):
            if kind == "scale":
                nn.utils.parametrize.register_parametrization(m, "weight", First())
            elif kind == "old weight_norm":
                weight_norm(m)
                m.weight_g.mul_(1.5)
            elif kind == "prune":
                prune.random_unstructured(m, "weight", 0.5)
            else:
                getattr(parametrizations, kind)(m)
                if kind == "weight_norm":
                    m.parametrizations.weight.original0.data.mul_(1.5)
        network.eval()

    def back(network):
        for _, m in every(network, end):
            if kind == "old weight_norm":
                nn.utils.remove_weight_norm(m)
            elif kind == "prune":
                prune.remove(m, "weight")
            else:
                nn.utils.parametrize.remove_parametrizations(m, "weight")

    return [change, back]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal", "scale", "old weight_norm", "prune"])
@EACH
def test_weights_that_are_computed(seed, kind, before):
    ends = ("conv1", "to_q", "to_out.0", "time_emb_proj", "conv_in", "upsamplers.0.conv", "proj_in")
    each_of(cross(), {end: (parametrised(kind, end)[0], None) for end in ends}, before, effect=None)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "scale", "old weight_norm", "prune"])
@UNDOING
def test_weights_that_are_computed_no_more(seed, kind, at):
    history(cross(), [*parametrised(kind, "conv1"), *parametrised(kind, "to_q")], at)


# ---- attention's processors


class Halves:
    """A user's processor."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return 0.5 * hidden_states + attn.to_out[0](attn.to_q(hidden_states))


def namesake():
    """Of the name of diffusers' own, and another function."""
    return type("AttnProcessor2_0", (Halves,), {})()


PROCESSORS = {
    "own": lambda m: m.set_attn_processor(Halves()),
    "a namesake": lambda m: m.set_attn_processor(namesake()),
    "of one layer": lambda m: setattr(one(m, "attn2"), "processor", Halves()),
    "without the fused kernel": lambda m: m.set_attn_processor(AttnProcessor()),
    "sliced": lambda m: m.set_attention_slice(2),
    "fused projections": lambda m: m.fuse_qkv_projections(),
    "FreeU": lambda m: m.enable_freeu(0.9, 0.2, 1.4, 1.6),
    "chunked feed-forward": lambda m: one(m, "transformer_blocks.0").set_chunk_feed_forward(4, 1),
}
UNDONE = {
    "own": lambda m: m.set_attn_processor(AttnProcessor2_0()),
    "fused projections": lambda m: m.unfuse_qkv_projections(),
    "FreeU": lambda m: m.disable_freeu(),
    "sliced": lambda m: m.set_default_attn_processor(),
}


@pytest.mark.parametrize(("name", "at"), [(n, at) for n in PROCESSORS for at in (0, 1)])
def test_processors(seed, name, at):
    steps = [PROCESSORS[name], *([UNDONE[name]] if name in UNDONE else [])]
    effect = 1e-3 if name in ("own", "a namesake", "of one layer", "FreeU") else None
    history(cross(), steps, at, effect=effect)


def ip_adapter(network):
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    processors = {}
    for name, processor in network.attn_processors.items():
        processors[name] = processor
        if name.endswith("attn2.processor"):
            width = network.get_submodule(name.removesuffix(".processor")).to_q.in_features
            processors[name] = filled(IPAdapterAttnProcessor2_0(width, 48, num_tokens=(4,), scale=[0.7]))
    network.set_attn_processor(processors)
    projection = ImageProjection(image_embed_dim=24, cross_attention_dim=48, num_image_text_embeds=4)
    network.encoder_hid_proj = filled(MultiIPAdapterImageProjection([projection]))
    network.config.encoder_hid_dim_type = "ip_image_proj"


@pytest.mark.parametrize("at", [0, 1], ids=["before", "after"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_ip_adapter(seed, at, dtype):
    case = cross()
    image = {"image_embeds": [torch.randn(2, 1, 24)]}
    with_image = case._replace(inputs=case.inputs | {"added_cond_kwargs": image})
    plain, fast = case.network, copy.deepcopy(case.network)
    if at == 0:
        torch.manual_seed(1)
        ip_adapter(fast)
    fastdiff.accelerate(fast, dtype=dtype)
    if at:
        case.call(fast)
        torch.manual_seed(1)
        ip_adapter(fast)
    torch.manual_seed(1)
    ip_adapter(plain)
    assert_equal(with_image.call(fast), with_image.call(plain), tolerance=1e-5 if dtype == torch.float32 else 0.05)
    fastdiff.restore(fast)
    assert_equal(with_image.call(fast), with_image.call(plain), "restored", 0.0)


# ---- quantised, cast and offloaded weights


def torchao_quantize(name):
    def quantize(network):
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(network, getattr(quantization, name)())

    return quantize


@pytest.mark.parametrize("make", [cross, pixels, usual], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
@BEFORE_OR_AFTER
def test_torchao(seed, make, name, at):
    history(make(), [torchao_quantize(name)], at, effect=None)


@BEFORE_OR_AFTER
def test_torchao_activations(seed, at):
    """Activations are rounded to 255 levels: what differs by rounding errors may take the next level."""
    history(pixels(), [torchao_quantize("Int8DynamicActivationInt8WeightConfig")], at, effect=None, tolerance=0.02)


@pytest.mark.parametrize("make", [cross, pixels], ids=lambda f: f.__name__)
@BEFORE_OR_AFTER
def test_quanto(seed, make, at):
    quanto = pytest.importorskip("optimum.quanto")

    def quantize(network):
        quanto.quantize(network, weights=quanto.qint8)
        quanto.freeze(network)

    history(make(), [quantize], at, effect=None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [cross, usual], ids=lambda f: f.__name__)
@BEFORE_OR_AFTER
def test_quantize_dynamic(seed, make, at):
    quantize = lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, torch.qint8, inplace=True)  # noqa: E731
    history(make(), [quantize], at, effect=None, tolerance=0.02)


@pytest.mark.parametrize("make", [cross, pixels, decoder], ids=lambda f: f.__name__)
@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
@BEFORE_OR_AFTER
def test_layerwise_casting(seed, make, storage, at):
    cast = lambda m: m.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)  # noqa: E731
    history(make(), [cast], at)


@pytest.mark.parametrize("make", [cross, pixels, decoder], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@BEFORE_OR_AFTER
def test_group_offload(seed, make, kind, at):
    pytest.importorskip("accelerate")  # diffusers' hooks need it to move what a layer is given
    options = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu"), "offload_type": kind}
    if kind == "block_level":
        options["num_blocks_per_group"] = 1
    # Hooks on every layer leave nothing that could be accelerated.
    history(make(), [lambda m: m.enable_group_offload(**options)], at, effect=None, refusal="nothing in this")


@pytest.mark.parametrize("make", MAIN.values(), ids=MAIN)
@UNDOING
def test_cpu_offload(seed, make, at):
    """accelerate's, which pipelines' enable_sequential_cpu_offload uses: weights are on meta between the calls."""
    offload = pytest.importorskip("accelerate")
    from accelerate.hooks import remove_hook_from_module

    case = make()
    if make is decoder:  # it is entered by its decoder
        case = Case(case.network.decoder, {"sample": torch.randn(2, 4, 16, 16)}, first_tensor)
    steps = [lambda m: offload.cpu_offload(m, torch.device("cpu")), lambda m: remove_hook_from_module(m, recurse=True)]
    history(case, steps, at, effect=None, refusal="nothing in this")


@pytest.mark.parametrize("make", [cross, pixels, ours], ids=lambda f: f.__name__)
@pytest.mark.parametrize("at", range(3), ids=["before", "after", "removed"])
@torch.no_grad()
def test_offload_hook_of_the_whole(seed, make, at):
    """accelerate's cpu_offload_with_hook, which enable_model_cpu_offload uses: the hook runs in every call."""
    hooks = pytest.importorskip("accelerate.hooks")
    calls = []

    class Counting(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    case = make()
    plain, fast = case.network, copy.deepcopy(case.network)
    want = case.call(plain)
    if at == 0:
        hooks.add_hook_to_module(fast, Counting())
    fastdiff.accelerate(fast, dtype=torch.float32)
    if at:
        case.call(fast)
        hooks.add_hook_to_module(fast, Counting())
    assert_equal(case.call(fast), want)
    assert calls == [fast]
    if at == 2:
        hooks.remove_hook_from_module(fast)
        assert_equal(case.call(fast), want)
        assert calls == [fast]
        fastdiff.restore(fast)
        assert_equal(case.call(fast), want, "restored", 0.0)
        return
    fastdiff.restore(fast)
    assert_equal(case.call(fast), want, "restored", 0.0)
    assert calls == [fast, fast]
    hooks.remove_hook_from_module(fast)
    assert_equal(case.call(fast), want, "without hooks", 0.0)
    assert calls == [fast, fast]
