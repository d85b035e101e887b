"""Networks that people use, tiny, with calls of them; and how one that was accelerated is judged beside its twin."""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import diffusers
import torch
from helpers import assert_same_bits
from networks import SMALL, VAE, Usual, halved, randomized
from torch import Tensor, nn

import fastdiff

TOLERANCE = 1e-5  # of a float32 result, relative to its largest number


class Case(NamedTuple):
    """A network in eval mode, the method that is called, and its arguments by the names that the method gives them.

    Attributes:
        pick: takes the tensor that is compared out of what the method returns.
        method: "" is the network's own call.
    """

    network: nn.Module
    inputs: dict[str, Any]
    pick: Callable[[Any], Tensor] = lambda out: first_tensor(out)
    method: str = ""

    def call(self, network: nn.Module | None = None, dtype: torch.dtype = torch.float32, keywords: bool = False) -> Any:
        """The result of the network, or of another in its place, with floating inputs of a dtype."""
        network = self.network if network is None else network
        inputs = to(self.inputs, dtype)
        function = getattr(network, self.method) if self.method else network
        if keywords:
            return self.pick(function(**inputs))
        # As far as the method's own order allows, arguments are positional.
        method = getattr(type(network), self.method or "forward")
        names = list(inspect.signature(method).parameters)[1:]
        args = []
        for name in names:
            if name not in inputs:
                break
            args.append(inputs.pop(name))
        return self.pick(function(*args, **inputs))


def exact(case: Case) -> Tensor:
    """The result in float64; of code that casts to float32 by itself, as OpenAI's does, its own result."""
    with torch.no_grad():
        try:
            return case.call(copy.deepcopy(case.network).double(), torch.float64)
        except RuntimeError:
            return case.call()


def rounded(case: Case) -> Tensor:
    """PyTorch's own result in bfloat16: of a bfloat16 network, or under autocast where its code casts by itself."""
    with torch.no_grad():
        try:
            return case.call(halved(case.network), torch.bfloat16)
        except RuntimeError:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return case.call()


def first_tensor(out: Any) -> Tensor:
    """The first floating tensor of a tensor, an output object, a distribution, a list, a tuple or a dict."""
    if isinstance(out, Tensor):
        return out
    if hasattr(out, "latent_dist"):
        return out.latent_dist.parameters
    if hasattr(out, "parameters") and isinstance(out.parameters, Tensor):
        return out.parameters
    values = out.values() if isinstance(out, dict) else out if isinstance(out, (list, tuple)) else vars(out).values()
    return first_tensor(next(v for v in values if v is not None))


def to(value: Any, dtype: torch.dtype) -> Any:
    """The floating tensors of a structure, cast."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: to(v, dtype) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to(v, dtype) for v in value)
    return value


def in_words(error: ValueError) -> bool:
    """Whether a refusal says what is refused and why."""
    return len(str(error).split()) > 5


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest number of b."""
    assert a.shape == b.shape
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def assert_equal(got: Tensor, want: Tensor, what: str = "result", tolerance: float = TOLERANCE) -> None:
    assert got.dtype == want.dtype, f"{what}: {got.dtype} where the network's own code gives {want.dtype}"
    assert got.shape == want.shape, f"{what}: {list(got.shape)} against {list(want.shape)}"
    error = difference(got, want)
    assert error <= tolerance, f"{what} differs by {error:.2e} of its largest number"


Step = Callable[[nn.Module], Any]


@torch.no_grad()
def history(
    case: Case,
    steps: Sequence[Step],
    at: int,
    *,
    effect: float | None = 1e-3,
    tolerance: float = TOLERANCE,
    dtype: torch.dtype | str = torch.float32,
    called: bool = True,
    refusal: str | None = None,
    bits: bool = True,
) -> Any:
    """What is done to a network is done to its twin, too, which is accelerated before step ``at``; both agree always.

    Args:
        effect: the first step changes the result by more than that; None where it need not.
        called: the accelerated one is called before the next step, so that it has made what it makes of weights.
        refusal: accelerate may raise ValueError with words that match this.
        bits: the restored network's result is that of its twin to the bit.

    Returns:
        The report of accelerate.
    """
    plain, fast = case.network, copy.deepcopy(case.network)
    before, report = case.call(plain), None
    for i in range(len(steps) + 1):
        if i == at:
            try:
                report = fastdiff.accelerate(fast, dtype=dtype)
            except ValueError as error:
                if refusal is None or refusal not in str(error):
                    raise
                assert_equal(case.call(fast), case.call(plain), "a network that was refused", tolerance)
                return None
            if called:
                assert_equal(case.call(fast), case.call(plain), f"before step {i}", tolerance)
        if i == len(steps):
            break
        for network in (plain, fast):
            torch.manual_seed(i)
            steps[i](network)
        want = case.call(plain)
        if i == 0 and effect is not None:
            assert difference(want, before) > effect, "this changes nothing, so it tests nothing"
        for turn in range(2):
            assert_equal(case.call(fast), want, f"call {turn} after step {i}", tolerance)
    if report is not None:
        fastdiff.restore(fast)
        got, want = case.call(fast), case.call(plain)
        assert_same_bits(got, want) if bits else assert_equal(got, want)
        left = [v for m in fast.modules() for v in vars(m).values() if "fastdiff.acceleration" in type(v).__module__]
        assert left == [], "restore leaves something behind"
    return report


def each_of(
    case: Case,
    changes: dict[str, tuple[Step, Step | None]],
    before: bool,
    *,
    effect: float | None = 1e-3,
    tolerance: float = TOLERANCE,
) -> None:
    """One change after another, each undone before the next: where one is wrong, the others are still judged.

    Args:
        changes: what is done, and what undoes it; with None the network is made anew.
        before: ``accelerate`` comes after each change, and ``restore`` after each undoing; else once, before them all.
    """
    pristine, wrong = copy.deepcopy(case.network), {}

    @torch.no_grad()
    def made() -> tuple[nn.Module, nn.Module]:
        plain, fast = copy.deepcopy(pristine), copy.deepcopy(pristine)
        if not before:
            fastdiff.accelerate(fast, dtype=torch.float32)
            case.call(fast)
        return plain, fast

    @torch.no_grad()
    def one(plain: nn.Module, fast: nn.Module, name: str, change: Step, back: Step | None) -> None:
        for network in (plain, fast):
            torch.manual_seed(1)
            change(network)
        want = case.call(plain)
        if effect is not None and difference(want, untouched) <= effect:
            raise RuntimeError(f"{name} changes nothing, so it tests nothing")
        if before:
            fastdiff.accelerate(fast, dtype=torch.float32)
        assert_equal(case.call(fast), want, "changed", tolerance)
        if back is not None:
            back(plain)
            back(fast)
            want = untouched
            assert_equal(case.call(fast), want, "undone", tolerance)
        if before:
            fastdiff.restore(fast)
            assert_equal(case.call(fast), case.call(plain), "restored", 0.0)

    with torch.no_grad():
        untouched = case.call()
    plain, fast = made()
    for name, (change, back) in changes.items():
        try:
            one(plain, fast, name, change, back)
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"[:120]
        if name in wrong or back is None:
            plain, fast = made()
    assert wrong == {}, f"{len(wrong)} of {len(changes)} wrong: {wrong}"


def lora(*names: str, **more: Any) -> Step:
    """peft's LoRA, with random weights, on the layers of these names."""
    from peft import LoraConfig

    def add(network: nn.Module) -> None:
        config = LoraConfig(**({"r": 4, "target_modules": list(names), "init_lora_weights": False} | more))
        network.add_adapter(config)
        network.eval()

    return add


# ---- networks


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Several libraries import torchvision for what no network uses; beside PyTorch's CPU build it may not load.

    Stand-ins of its modules are there for as long as such a library is imported.
    """
    try:
        import torchvision  # noqa: F401

        stubs: dict[str, Any] = {}
    except (ImportError, RuntimeError):
        names = ("", ".transforms", ".transforms.functional", ".utils", ".datasets", ".models")
        stubs = {f"torchvision{name}": MagicMock(__path__=[], __spec__=None) for name in names}
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"] if stubs else ():
        del sys.modules[name]
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            sys.modules.pop(name, None)


CROSS = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "cross_attention_dim": 48,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def filled(network: nn.Module) -> nn.Module:
    """``randomized``, and no weight constant: many start as zeros, and what they scale would be in no result."""
    randomized(network)
    for p in network.parameters():
        if p.is_floating_point() and p.ndim > 1 and p.numel() > 1 and float(p.std()) == 0:
            nn.init.normal_(p, 0.0, (p[0].numel()) ** -0.5)
        elif p.is_floating_point() and p.ndim == 0:
            nn.init.normal_(p, 1.0, 0.2)
    return network


def cross(**more: Any) -> Case:
    """Stable Diffusion's UNet."""
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([5, 700])}
    inputs["encoder_hidden_states"] = torch.randn(2, 7, 48)
    return Case(filled(diffusers.UNet2DConditionModel(**(CROSS | more))), inputs)


def xl() -> Case:
    """SDXL's UNet: Linear projections, and sizes and a pooled prompt beside the time."""
    case = cross(
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    more = {"text_embeds": torch.randn(2, 32), "time_ids": torch.randint(0, 99, (2, 6)).float()}
    return case._replace(inputs=case.inputs | {"added_cond_kwargs": more})


def controlled() -> Case:
    """Stable Diffusion's UNet, with a ControlNet's residuals."""
    case = cross()
    shapes = ((2, 32, 8, 8), (2, 32, 8, 8), (2, 32, 4, 4), (2, 64, 4, 4))
    more = {"down_block_additional_residuals": tuple(map(torch.randn, shapes))}
    return case._replace(inputs=case.inputs | more | {"mid_block_additional_residual": torch.randn(2, 64, 4, 4)})


def pixels(**more: Any) -> Case:
    """DDPM's UNet, with attention over pixels."""
    inputs = {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor([5, 700])}
    return Case(filled(diffusers.UNet2DModel(**(SMALL | more))), inputs)


def scale_shift() -> Case:
    blocks: dict[str, Any] = {"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D")}
    blocks |= {"up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D")}
    return pixels(**blocks, resnet_time_scale_shift="scale_shift")


def ours() -> Case:
    network = filled(fastdiff.models.UNet(**SMALL, num_class_embeds=5, attention_head_dim=16))
    inputs = {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor([5, 700])}
    return Case(network, inputs | {"class_labels": torch.tensor([1, 4])})


def usual() -> Case:
    return Case(filled(Usual()), {"x": torch.randn(2, 3, 16, 16)})


def vae() -> diffusers.AutoencoderKL:
    return filled(diffusers.AutoencoderKL(**VAE))


def decoder() -> Case:
    return Case(vae(), {"z": torch.randn(2, 4, 16, 16)}, method="decode")


def encoder() -> Case:
    return Case(vae(), {"x": torch.randn(2, 3, 16, 16)}, method="encode")


MAIN = {f.__name__: f for f in (cross, pixels, ours, decoder, usual)}


def unet1d() -> Case:
    network = diffusers.UNet1DModel(
        sample_size=32, in_channels=2, out_channels=2, block_out_channels=(32, 32, 64), extra_in_channels=64
    )
    return Case(filled(network), {"sample": torch.randn(2, 2, 32), "timestep": torch.tensor([5, 700])})


def unet3d() -> Case:
    blocks: Any = {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D")}
    blocks |= {"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")}
    network = diffusers.UNet3DConditionModel(**(CROSS | blocks | {"cross_attention_dim": 32}))
    inputs = {"sample": torch.randn(1, 4, 3, 8, 8), "timestep": torch.tensor(5)}
    return Case(filled(network), inputs | {"encoder_hidden_states": torch.randn(1, 7, 32)})


def motion() -> Case:
    """AnimateDiff's UNet, which calls its blocks by keywords."""
    network = diffusers.UNetMotionModel(
        sample_size=16, block_out_channels=(32, 64), norm_num_groups=8, layers_per_block=1, cross_attention_dim=32,
        num_attention_heads=4, motion_num_attention_heads=4, motion_max_seq_length=8,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    )  # fmt: skip
    inputs = {"sample": torch.randn(1, 4, 3, 8, 8), "timestep": torch.tensor(5)}
    return Case(filled(network), inputs | {"encoder_hidden_states": torch.randn(3, 9, 32)})


def svd() -> Case:
    network = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, in_channels=8,
        num_attention_heads=4, addition_time_embed_dim=32, projection_class_embeddings_input_dim=96, num_frames=2,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )  # fmt: skip
    inputs = {"sample": torch.randn(1, 2, 8, 8, 8), "timestep": torch.tensor(5.0)}
    inputs |= {"encoder_hidden_states": torch.randn(1, 1, 32), "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]])}
    return Case(filled(network), inputs)


def kandinsky3() -> Case:
    network = diffusers.Kandinsky3UNet(
        in_channels=4, time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=3,
        block_out_channels=(32, 64), cross_attention_dim=4, encoder_hid_dim=32,
    )  # fmt: skip
    inputs = {"sample": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([5, 700])}
    inputs |= {"encoder_hidden_states": torch.randn(2, 7, 32), "encoder_attention_mask": torch.ones(2, 7)}
    return Case(filled(network), inputs)


def controlnet() -> Case:
    names = ("block_out_channels", "norm_num_groups", "layers_per_block", "cross_attention_dim", "attention_head_dim")
    more: Any = {name: CROSS[name] for name in (*names, "down_block_types")}
    network = diffusers.ControlNetModel(**more, conditioning_embedding_out_channels=(16, 32))
    inputs = cross().inputs | {"controlnet_cond": torch.randn(2, 3, 16, 16)}
    return Case(filled(network), inputs, lambda out: out.mid_block_res_sample)


def adapter() -> Case:
    network = diffusers.T2IAdapter(in_channels=3, channels=[32, 64], num_res_blocks=1, downscale_factor=2)
    return Case(filled(network), {"x": torch.randn(2, 3, 32, 32)}, lambda out: out[-1])


def dit(**more: Any) -> Case:
    network = diffusers.DiTTransformer2DModel(
        num_layers=2, sample_size=16, num_attention_heads=2, attention_head_dim=32, **more
    )
    inputs = {"hidden_states": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([5, 700])}
    return Case(filled(network), inputs | {"class_labels": torch.tensor([1, 2])})


def pixart() -> Case:
    network = diffusers.PixArtTransformer2DModel(
        num_layers=1, sample_size=16, num_attention_heads=2, attention_head_dim=16, out_channels=8,
        cross_attention_dim=32, caption_channels=24, use_additional_conditions=False,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 4, 16, 16), "encoder_hidden_states": torch.randn(2, 7, 24)}
    more = {"timestep": torch.tensor([5, 700]), "added_cond_kwargs": {"aspect_ratio": None, "resolution": None}}
    return Case(filled(network), inputs | more)


def sd3() -> Case:
    network = diffusers.SD3Transformer2DModel(
        sample_size=16, num_layers=2, num_attention_heads=2, attention_head_dim=16, caption_projection_dim=32,
        joint_attention_dim=24, pooled_projection_dim=40, out_channels=4, in_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 4, 16, 16), "encoder_hidden_states": torch.randn(2, 7, 24)}
    return Case(
        filled(network), inputs | {"pooled_projections": torch.randn(2, 40), "timestep": torch.tensor([5, 700])}
    )


def flux() -> Case:
    network = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=40, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 64, 4), "encoder_hidden_states": torch.randn(2, 7, 24)}
    inputs |= {"pooled_projections": torch.randn(2, 40), "timestep": torch.tensor([0.5, 0.9])}
    return Case(filled(network), inputs | {"img_ids": torch.rand(64, 3).round(), "txt_ids": torch.zeros(7, 3)})


def wan() -> Case:
    network = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=64, ffn_dim=32, num_layers=1, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(1, 4, 2, 16, 16), "timestep": torch.tensor([5])}
    return Case(filled(network), inputs | {"encoder_hidden_states": torch.randn(1, 7, 16)})


def ltx() -> Case:
    network = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=1, caption_channels=24,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 32, 4), "encoder_hidden_states": torch.randn(2, 7, 24)}
    inputs |= {"timestep": torch.randint(0, 999, (2,)), "encoder_attention_mask": torch.ones(2, 7).bool()}
    return Case(filled(network), inputs | {"num_frames": 2, "height": 4, "width": 4})


def cogvideox() -> Case:
    network = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=8, num_layers=1, sample_width=8, sample_height=8, sample_frames=8, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=8,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(1, 2, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 8, 8)}
    return Case(filled(network), inputs | {"timestep": torch.tensor([5])})


def hunyuan_video() -> Case:
    network = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(1, 4, 1, 16, 16), "timestep": torch.tensor([5])}
    inputs |= {"encoder_hidden_states": torch.randn(1, 7, 16), "pooled_projections": torch.randn(1, 8)}
    return Case(filled(network), inputs | {"encoder_attention_mask": torch.ones(1, 7), "guidance": torch.tensor([6.0])})


def sana() -> Case:
    # Linear attention jumps to 0 where all of a query's channels are negative: of four that is one query in sixteen, of
    # which a rounding turns some over.
    network = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=8,
        sample_size=16,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 4, 16, 16), "encoder_hidden_states": torch.randn(2, 7, 8)}
    return Case(filled(network), inputs | {"timestep": torch.tensor([5, 700])})


def prior() -> Case:
    network = diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=4, num_layers=2, embedding_dim=8,
        num_embeddings=7, additional_embeddings=4)  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 8), "timestep": torch.tensor(2), "proj_embedding": torch.randn(2, 8)}
    return Case(filled(network), inputs | {"encoder_hidden_states": torch.randn(2, 7, 8)})


def tiny_vae() -> Case:
    network = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(32, 32), decoder_block_out_channels=(32, 32), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4, in_channels=3, out_channels=3,
    )  # fmt: skip
    return Case(filled(network), {"x": torch.randn(2, 4, 16, 16)}, method="decode")


def tiny_vae_encoder() -> Case:
    return tiny_vae()._replace(inputs={"x": torch.randn(2, 3, 16, 16)}, method="encode")


def asymmetric_vae() -> Case:
    network = diffusers.AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, down_block_out_channels=(32, 64), layers_per_down_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, up_block_out_channels=(32, 64), layers_per_up_block=1,
        norm_num_groups=8, latent_channels=4, sample_size=16,
    )  # fmt: skip
    return Case(filled(network), {"z": torch.randn(2, 4, 8, 8)}, method="decode")


def vq() -> diffusers.VQModel:
    return filled(diffusers.VQModel(**VAE, num_vq_embeddings=32, vq_embed_dim=4))


def vq_decoder() -> Case:
    return Case(vq(), {"h": torch.randn(2, 4, 8, 8), "force_not_quantize": True}, method="decode")


def vq_encoder() -> Case:
    return Case(vq(), {"x": torch.randn(2, 3, 16, 16)}, method="encode")


def temporal_vae() -> Case:
    network = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), latent_channels=4, layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2
    )
    return Case(filled(network), {"z": torch.randn(2, 4, 8, 8), "num_frames": 2}, method="decode")


def wan_vae() -> Case:
    network = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return Case(filled(network), {"z": torch.randn(1, 4, 2, 4, 4)}, method="decode")


def dc_vae() -> Case:
    # Heads of 16 channels for the reason that sana has.
    network = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=16, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(32, 32),
        decoder_block_out_channels=(32, 32), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate",
    )  # fmt: skip
    return Case(filled(network), {"z": torch.randn(2, 4, 8, 8)}, method="decode")


def lucidrains() -> Case:
    with importing():
        from denoising_diffusion_pytorch import Unet

    inputs = {"x": torch.randn(2, 3, 16, 16), "time": torch.tensor([5.0, 700.0])}
    return Case(filled(Unet(dim=32, dim_mults=(1, 2), flash_attn=False)), inputs)


def karras_lucidrains() -> Case:
    with importing():
        from denoising_diffusion_pytorch.karras_unet import KarrasUnet

    network = KarrasUnet(image_size=16, dim=16, dim_max=32, num_downsamples=2, attn_res=(8,), num_blocks_per_stage=1)
    return Case(filled(network), {"x": torch.randn(2, 4, 16, 16), "time": torch.tensor([0.3, 0.7])})


def guided(**more: Any) -> Case:
    """OpenAI's UNet; CompVis' latent diffusion and torchcfm have copies of it."""
    with importing():
        from guided_diffusion.unet import UNetModel

    options = {"channel_mult": (1, 2), "num_heads": 2, "num_classes": 5} | more
    network = UNetModel(16, 3, 32, 3, 1, (2,), **options)
    inputs = {"x": torch.randn(2, 3, 16, 16), "timesteps": torch.tensor([5, 700]), "y": torch.tensor([1, 4])}
    return Case(filled(network), inputs)


def guided_scale_shift() -> Case:
    return guided(use_scale_shift_norm=True, resblock_updown=True)


def torchcfm_unet() -> Case:
    with importing():
        from torchcfm.models.unet.unet import UNetModelWrapper

    network = UNetModelWrapper(dim=(3, 16, 16), num_channels=32, num_res_blocks=1, channel_mult=(1, 2))
    return Case(filled(network), {"t": torch.tensor([0.3, 0.7]), "x": torch.randn(2, 3, 16, 16)})


def k_diffusion() -> Case:
    with importing():
        from k_diffusion.models import ImageDenoiserModelV1

    network = ImageDenoiserModelV1(3, 32, (1, 1), (32, 64), (False, True), patch_size=1)
    return Case(filled(network), {"input": torch.randn(2, 3, 16, 16), "sigma": torch.tensor([0.5, 3.0])})


def smalldiffusion_unet() -> Case:
    with importing():
        from smalldiffusion import Unet

    network = Unet(16, 3, 3, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,))
    return Case(filled(network), {"x": torch.randn(2, 3, 16, 16), "sigma": torch.tensor(0.7)})


def smalldiffusion_dit() -> Case:
    with importing():
        from smalldiffusion import DiT

    network = DiT(16, 3, patch_size=2, depth=2, head_dim=16, num_heads=2)
    return Case(filled(network), {"x": torch.randn(2, 3, 16, 16), "sigma": torch.tensor(0.7)})


def clip_text() -> Case:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16)  # fmt: skip
    return Case(filled(CLIPTextModel(config)), {"input_ids": torch.randint(0, 49, (2, 9))})


def t5() -> Case:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=50, d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2)
    return Case(filled(T5EncoderModel(config)), {"input_ids": torch.randint(0, 49, (2, 9))})


def vit() -> Case:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16,
        patch_size=4)  # fmt: skip
    return Case(filled(ViTModel(config)), {"pixel_values": torch.randn(2, 3, 16, 16)})


class Tokens(nn.Module):
    """torch's own transformer behind a Linear: its fast path reads the weights, and calls no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.first(x))


def tokens() -> Case:
    return Case(filled(Tokens()), {"x": torch.randn(2, 9, 8)})


class Normed(nn.Module):
    """Layers whose weights are computed in each call, with biases."""

    def __init__(self) -> None:
        super().__init__()
        from torch.nn.utils import parametrizations as p

        self.a = p.weight_norm(nn.Conv2d(3, 16, 3, padding=1))
        self.b = p.spectral_norm(nn.Conv2d(16, 16, 3, padding=1))
        self.c = p.orthogonal(nn.Linear(16, 16))
        self.d = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.b(self.a(x)))
        return self.d(self.c(h.movedim(1, 3)).movedim(3, 1))


def normed() -> Case:
    return Case(Normed().eval().requires_grad_(False), {"x": torch.randn(2, 3, 16, 16)})


class Volumes(nn.Module):
    """Layers of one and three dimensions, transposed ones, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(8, 8, 3, padding=1)
        self.volume = nn.Conv3d(1, 4, 3, padding=1)
        self.flat = nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.volume(x[:, None]).mean(2)
        h = self.depthwise(torch.relu(self.norm(self.flat(h))))
        h = self.line(h.flatten(2)).view_as(h)
        return self.up(h)


def volumes() -> Case:
    return Case(filled(Volumes()), {"x": torch.randn(2, 3, 16, 16)})


MAKERS = {
    f.__name__: f
    for f in (
        cross, xl, controlled, pixels, scale_shift, ours, usual, encoder, decoder, unet1d, unet3d, motion, svd,
        kandinsky3, controlnet, adapter, dit, pixart, sd3, flux, wan, ltx, cogvideox, hunyuan_video, sana, prior,
        tiny_vae, tiny_vae_encoder, asymmetric_vae, vq_decoder, vq_encoder, temporal_vae, wan_vae, dc_vae, lucidrains,
        karras_lucidrains, guided, guided_scale_shift, torchcfm_unet, k_diffusion, smalldiffusion_unet,
        smalldiffusion_dit, clip_text, t5, vit, tokens, normed, volumes,
    )
}  # fmt: skip
