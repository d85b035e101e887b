"""dtypes: of parameters, of the arithmetic, of what goes in and comes out, and all of them changed afterwards."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
import diffusers
import matrix
from matrix import (
    MAIN,
    MAKERS,
    Case,
    assert_equal,
    controlled,
    cross,
    decoder,
    difference,
    exact,
    filled,
    first_tensor,
    history,
    in_words,
    ours,
    pixels,
    rounded,
    svd,
    to,
    usual,
    vae,
    vq,
)  # fmt: skip
from networks import VAE

import fastdiff

pytestmark = pytest.mark.networks

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES, torch.float64)
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.06}
NETWORKS = pytest.mark.parametrize("make", MAIN.values(), ids=MAIN)


def coarser(*dtypes):
    """The tolerance of results that were rounded to each of these dtypes on their way."""
    return max(ROUNDING[dtype] for dtype in dtypes)


@pytest.fixture
def bfloat16_cpu(monkeypatch):
    """A CPU on which "auto" may take bfloat16; the library's kernels ask the real one."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True)


@NETWORKS
@pytest.mark.parametrize("parameters", FLOATS)
@pytest.mark.parametrize("arithmetic", [*FLOATS[:3], "auto"])
@torch.no_grad()
def test_parameters_of_any_dtype(seed, make, parameters, arithmetic):
    """With any ``dtype=``; "auto" keeps float64 and half networks what they are."""
    case = make()
    true = exact(case)
    fast = case.network.to(parameters)
    report = fastdiff.accelerate(fast, dtype=arithmetic)
    used = report.networks[""].dtype
    if arithmetic == "auto" and parameters != torch.float32:
        assert used == parameters
    got = case.call(fast, parameters)
    assert got.dtype == parameters
    error = difference(got, true)
    if parameters == torch.float64 and arithmetic == "auto":
        assert error <= 1e-12
    assert error <= coarser(parameters, used if arithmetic == "auto" else arithmetic)


@NETWORKS
@pytest.mark.parametrize("arithmetic", [*FLOATS[:3], "auto"])
@torch.no_grad()
def test_moved_to_any_dtype_afterwards(seed, make, arithmetic):
    """Each ``.to()`` after ``accelerate``; a wider dtype is computed in, "auto" or not: it was asked for."""
    case = make()
    true = exact(case)
    fast = case.network
    fastdiff.accelerate(fast, dtype=arithmetic)
    case.call(fast)
    first = torch.float32 if arithmetic == "auto" else arithmetic
    rounded = first
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.float32):
        fast.to(dtype)
        # What was rounded once stays rounded.
        rounded = max(rounded, dtype, key=lambda d: ROUNDING[d])
        got = case.call(fast, dtype)
        assert got.dtype == dtype
        assert difference(got, true) <= ROUNDING[rounded], (arithmetic, dtype)


@pytest.mark.parametrize("make", [cross, pixels, decoder], ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_half_network_that_is_moved_to_float32_is_computed_in_it(seed, make):
    """What SDXL's pipelines do to their VAE before decoding, and what a user does who wants exact numbers."""
    for half in HALVES:
        case = make()
        plain = case.network.to(half)
        fast = copy.deepcopy(plain)
        fastdiff.accelerate(fast)
        case.call(fast, half)
        for dtype in (torch.float32, half, torch.float32):
            fast.to(dtype)
            plain.to(dtype)
            tolerance = 1e-5 if dtype == torch.float32 else coarser(half)
            assert_equal(case.call(fast, dtype), case.call(plain, dtype), tolerance=tolerance)


@pytest.mark.parametrize("method", ["decode", "encode"])
@pytest.mark.parametrize("first", [False, True], ids=["moved at once", "called before"])
@torch.no_grad()
def test_force_upcast(seed, method, first):
    """A VAE whose float16 overflows, accelerated as float16, moved to float32 for decoding: finite, and right."""
    plain = vae()
    half = plain.decoder if method == "decode" else plain.encoder
    half.conv_in.weight.mul_(3e4)
    plain.half()
    fast = copy.deepcopy(plain)
    fastdiff.accelerate(fast)
    x = torch.randn(1, 4, 16, 16) * 5 if method == "decode" else torch.randn(1, 3, 16, 16) * 5
    call = lambda m, dtype: first_tensor(getattr(m, method)(x.to(dtype)))  # noqa: E731
    if first:
        assert not torch.isfinite(call(plain, torch.float16)).all()
        call(fast, torch.float16)
    for m in (plain, fast):
        m.to(torch.float32)
    assert_equal(call(fast, torch.float32), call(plain, torch.float32))


@torch.no_grad()
def test_parts_of_a_vae_that_are_moved(seed):
    """SDXL's ``upcast_vae`` moves the whole, then some of its parts back."""
    plain = vae().half()
    fast = copy.deepcopy(plain)
    fastdiff.accelerate(fast)
    z = torch.randn(1, 4, 8, 8)
    for m in (plain, fast):
        m.to(torch.float32)
        m.post_quant_conv.half()
        m.decoder.conv_in.half()
    call = lambda m: first_tensor(m.decoder.mid_block(m.decoder.conv_in(m.post_quant_conv(z.half())).float()))  # noqa: E731
    assert_equal(call(fast), call(plain), tolerance=0.01)


@NETWORKS
@pytest.mark.parametrize("arithmetic", [torch.float32, torch.bfloat16, torch.float16, "auto"])
@pytest.mark.parametrize("cast", HALVES)
@torch.no_grad()
def test_autocast_around(seed, make, arithmetic, cast):
    """Around an accelerated network: as exact as the network's own code under the same autocast, or better."""
    case = make()
    true = exact(case)
    used = fastdiff.accelerate(case.network, dtype=arithmetic).networks[""].dtype
    for turn in range(2):
        with torch.autocast("cpu", dtype=cast):
            got = case.call()
        assert difference(got, true) <= coarser(cast, used), turn
    got = case.call()
    assert got.dtype == torch.float32
    assert difference(got, true) <= coarser(used), "afterwards"


@pytest.mark.parametrize("cast", HALVES)
@torch.no_grad()
def test_autocast_inside(seed, cast):
    """A network that enters autocast itself, as OpenAI's and CompVis' do around their bodies."""

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = usual().network

        def forward(self, x):
            with torch.autocast("cpu", dtype=cast):
                h = self.body(x)
            with torch.autocast("cpu", enabled=False):
                return h.float() + self.body(x)

    case = Case(Inside().eval(), {"x": torch.randn(2, 3, 16, 16)})
    true = case.call()
    fastdiff.accelerate(case.network, dtype=torch.float32)
    assert difference(case.call(), true) <= ROUNDING[cast]


@torch.no_grad()
def test_autocast_around_sample(seed):
    case = ours()
    run = lambda: fastdiff.sample(case.network, (2, 3, 16, 16), sampler="ddim", steps=2, seed=seed,  # noqa: E731
                                  model_kwargs={"class_labels": torch.tensor([1, 4])})  # fmt: skip
    want = run()
    fastdiff.accelerate(case.network, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run()
    assert difference(got, want) <= ROUNDING[torch.bfloat16]
    assert_equal(run(), want, tolerance=1e-4)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@NETWORKS
@torch.no_grad()
def test_default_dtype(seed, make, default):
    case = make()
    want = case.call()
    torch.set_default_dtype(default)
    try:
        plain = case.call()
        fastdiff.accelerate(case.network, dtype=torch.float32)
        got = case.call()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal(got, plain, tolerance=max(1e-5, 2 * difference(plain, want)))


# ---- residuals and skips


@pytest.mark.parametrize("arithmetic", [torch.float32, *HALVES])
@pytest.mark.parametrize("residuals", FLOATS[:3])
@torch.no_grad()
def test_residuals_of_any_dtype(seed, arithmetic, residuals):
    """ControlNet's are summed into skips by the network, which promotes them."""
    case = controlled()
    want = case.call()
    fastdiff.accelerate(case.network, dtype=arithmetic)
    more = {name: to(v, residuals) if "residual" in name else v for name, v in case.inputs.items()}
    got = case.pick(case.network(**more))
    assert difference(got, want) <= coarser(arithmetic, residuals, torch.float32)


@pytest.mark.parametrize("arithmetic", [torch.float32, *HALVES])
@torch.no_grad()
def test_adapter_residuals(seed, arithmetic):
    """T2I-Adapter's, on the way down."""
    case = cross()
    states = [torch.randn(2, 32, 8, 8), torch.randn(2, 64, 4, 4)]
    call = lambda: first_tensor(  # noqa: E731
        case.network(**case.inputs, down_intrablock_additional_residuals=[s.clone() for s in states])
    )
    want = call()
    fastdiff.accelerate(case.network, dtype=arithmetic)
    assert difference(call(), want) <= coarser(arithmetic, torch.float32)


@pytest.mark.parametrize("arithmetic", [torch.float32, *HALVES])
@pytest.mark.parametrize("skips", FLOATS[:3])
@torch.no_grad()
def test_skips_of_any_dtype_given_to_a_block(seed, arithmetic, skips):
    """Code such as DeepCache's calls up blocks itself, with skips that it kept."""
    case = cross()
    block = case.network.up_blocks[0]
    x, temb = torch.randn(2, 64, 8, 8), torch.randn(2, 128)
    states = (torch.randn(2, 32, 8, 8), torch.randn(2, 64, 8, 8))
    want = block(x, states, temb)
    fastdiff.accelerate(case.network, dtype=arithmetic)
    got = block(x, tuple(s.to(skips) for s in states), temb)
    assert difference(got, want) <= coarser(arithmetic, skips)


# ---- what comes out


def kl(**more):
    return filled(diffusers.AutoencoderKL(**VAE, **more))


METHODS = {
    "AutoencoderKL.decode": (vae, "decode", (1, 4, 8, 8), {}),
    "AutoencoderKL.encode": (vae, "encode", (1, 3, 16, 16), {}),
    "AutoencoderKL": (vae, "", (1, 3, 16, 16), {}),
    "AutoencoderKL, tiled": (lambda: tiled(vae()), "decode", (1, 4, 16, 16), {}),
    "AutoencoderKL, tiled encode": (lambda: tiled(vae()), "encode", (1, 3, 32, 32), {}),
    "AutoencoderKL, sliced": (lambda: sliced(vae()), "decode", (2, 4, 8, 8), {}),
    "AutoencoderKL without quant_conv": (
        lambda: kl(use_quant_conv=False, use_post_quant_conv=False), "decode", (1, 4, 8, 8), {}),
    "AsymmetricAutoencoderKL.decode": (lambda: matrix.asymmetric_vae().network, "decode", (1, 4, 8, 8), {}),
    "AsymmetricAutoencoderKL.encode": (lambda: matrix.asymmetric_vae().network, "encode", (1, 3, 16, 16), {}),
    "AutoencoderTiny.decode": (lambda: matrix.tiny_vae().network, "decode", (1, 4, 8, 8), {}),
    "AutoencoderTiny.encode": (lambda: matrix.tiny_vae().network, "encode", (1, 3, 16, 16), {}),
    "AutoencoderTiny": (lambda: matrix.tiny_vae().network, "", (1, 3, 16, 16), {}),
    "VQModel.decode": (vq, "decode", (1, 4, 8, 8), {}),
    "VQModel.decode, not quantised": (vq, "decode", (1, 4, 8, 8), {"force_not_quantize": True}),
    "VQModel.encode": (vq, "encode", (1, 3, 16, 16), {}),
    "VQModel": (vq, "", (1, 3, 16, 16), {}),
    "AutoencoderKLTemporalDecoder.decode": (
        lambda: matrix.temporal_vae().network, "decode", (2, 4, 8, 8), {"num_frames": 2}),
    "AutoencoderKLTemporalDecoder.encode": (lambda: matrix.temporal_vae().network, "encode", (2, 3, 16, 16), {}),
    "AutoencoderDC.decode": (lambda: matrix.dc_vae().network, "decode", (1, 4, 8, 8), {}),
    "AutoencoderDC.encode": (lambda: matrix.dc_vae().network, "encode", (1, 3, 16, 16), {}),
    "AutoencoderKLWan.decode": (lambda: matrix.wan_vae().network, "decode", (1, 4, 2, 4, 4), {}),
    "AutoencoderKLWan.encode": (lambda: matrix.wan_vae().network, "encode", (1, 3, 5, 32, 32), {}),
}  # fmt: skip


def tiled(network):
    network.enable_tiling()
    network.tile_sample_min_size, network.tile_latent_min_size = 16, 8
    return network


def sliced(network):
    network.enable_slicing()
    return network


def dtypes_of(value):
    """Of every floating tensor that a result holds."""
    if isinstance(value, torch.Tensor):
        return [value.dtype] if value.is_floating_point() else []
    if isinstance(value, (list, tuple)):
        return [d for v in value for d in dtypes_of(v)]
    values = value.values() if isinstance(value, dict) else vars(value).values() if hasattr(value, "__dict__") else ()
    return [d for v in values for d in dtypes_of(v)]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("arithmetic", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("as_dict", [True, False])
@torch.no_grad()
def test_results_of_autoencoders(seed, name, arithmetic, as_dict):
    """The dtype that the network's own code gives, in every tensor of every form of output."""
    make, method, shape, more = METHODS[name]
    network = make()
    x = torch.randn(shape)
    call = lambda: (getattr(network, method) if method else network)(x, return_dict=as_dict, **more)  # noqa: E731
    wanted = call()
    try:
        fastdiff.accelerate(network, dtype=arithmetic)
    except ValueError as error:
        if not in_words(error):
            raise
        return
    got = call()
    assert type(got) is type(wanted)
    assert dtypes_of(got) == dtypes_of(wanted)
    assert difference(first_tensor(got), first_tensor(wanted)) <= ROUNDING[arithmetic] * (2 if "VQ" in name else 1)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("as_dict", [True, False])
@torch.no_grad()
def test_results_of_networks(seed, name, as_dict):
    """ControlNet's lists, a prior's embedding, transformers' hidden states: float32 where float32 went in."""
    try:
        case = MAKERS[name]()
    except ImportError as error:
        pytest.skip(f"not installed: {error.name}")
    import inspect

    function = getattr(type(case.network), case.method or "forward")
    options = {"return_dict": as_dict} if "return_dict" in inspect.signature(function).parameters else {}
    call = lambda: (getattr(case.network, case.method) if case.method else case.network)(**case.inputs, **options)  # noqa: E731
    wanted = call()
    try:
        fastdiff.accelerate(case.network, dtype=torch.bfloat16)
    except ValueError as error:
        if not in_words(error):
            raise
        return
    got = call()
    assert type(got) is type(wanted)
    assert dtypes_of(got) == dtypes_of(wanted)


# ---- "auto"


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_auto_runs_every_network(seed, name, bfloat16_cpu):
    """On a CPU that has bfloat16: none that runs crashes, and none is less exact than PyTorch's bfloat16 twice."""
    try:
        case = MAKERS[name]()
    except ImportError as error:
        pytest.skip(f"not installed: {error.name}")
    true = exact(case)
    half = rounded(case)
    plain = case.call()
    try:
        report = fastdiff.accelerate(case.network)
    except ValueError as error:
        if not in_words(error):
            raise
        return
    got = case.call()
    assert got.dtype == plain.dtype
    if report.networks[""].dtype == torch.float32:
        assert difference(got, true) <= 1e-5 + difference(plain, true)
    else:
        assert rms(got, true) <= 2 * rms(half, true)


def rms(y, true):
    return float((y.double() - true).square().mean().sqrt())


WHOLE = ("cross", "xl", "controlled", "pixels", "ours", "decoder", "encoder")


@pytest.mark.parametrize("name", WHOLE)
def test_auto_takes_bfloat16_for_networks_that_it_knows(seed, name, bfloat16_cpu):
    """Every block of these is known, so the speed of bfloat16 is taken."""
    assert fastdiff.accelerate(MAKERS[name]().network).networks[""].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["usual", "dit", "tokens", "normed", "volumes", "svd", "vq_decoder"])
def test_auto_keeps_the_dtype_of_others(seed, name, bfloat16_cpu):
    case = MAKERS[name]()
    try:
        report = fastdiff.accelerate(case.network)
    except ValueError:
        return
    assert report.networks[""].dtype == torch.float32


@pytest.mark.parametrize(
    "name",
    [
        "dit",
        "ltx",
        "svd",
        "lucidrains",
        "guided",
        "torchcfm_unet",
        "vq_encoder",
        "tokens",
        "normed",
        "k_diffusion",
        "sd3",
    ],
)
@pytest.mark.parametrize("arithmetic", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_networks_that_mix_dtypes_in_their_own_code(seed, name, arithmetic):
    """With a half dtype asked for by name: right within its rounding, or refused in words."""
    try:
        case = MAKERS[name]()
    except ImportError as error:
        pytest.skip(f"not installed: {error.name}")
    want = case.call()
    try:
        fastdiff.accelerate(case.network, dtype=arithmetic)
    except ValueError as error:
        if not in_words(error):
            raise
        return
    got = case.call()
    assert got.dtype == want.dtype
    assert rms(got, want.double()) <= 0.05 * float(want.double().square().mean().sqrt())


@pytest.mark.parametrize("kind", ["float64", "float64 with GroupNorm", "mixed"])
@torch.no_grad()
def test_float64_stays_float64(seed, kind, bfloat16_cpu):
    if kind == "float64":
        network, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)), torch.randn(4, 64)
    else:
        network, x = usual().network, torch.randn(2, 3, 16, 16)
    network, x = network.eval().double(), x.double()
    if kind == "mixed":
        network.tokens.float()
        network.tokens.register_forward_pre_hook(lambda m, args: (args[0].float(),))
        network.tokens.register_forward_hook(lambda m, args, out: out.double())
    want = network(x)
    fastdiff.accelerate(network)
    assert_equal(network(x), want, tolerance=1e-5 if kind == "mixed" else 1e-12)


@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.bfloat16])
def test_a_restored_network_has_its_bits(seed, dtype):
    for make in (svd, usual, cross):
        history(make(), [], 0, dtype=dtype, tolerance=0.06)
