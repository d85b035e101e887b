"""Pictures from words: a whole call of ``fastdiff.load``'s pipeline beside diffusers' own on the same weights.

Both take 20 steps of DDIM with guidance and then decode. The parts are timed apart: a call of the UNet, as guidance
makes it, for twice the batch, and the decoder. "fastdiff" is the default, float32; where bfloat16 is native,
dtype="auto" stands beside it, and so does diffusers' pipeline in bfloat16. Networks of random weights take the time of
trained ones: they stand in for the package's model where it is not installed.

The gate draws torch's noise from one seed in all pipelines and compares latents after the last step. In float32 each
value is the same to 1e-4 of the largest (5e-3 on a GPU, where PyTorch's convolutions round to tf32 by default); in
bfloat16 the error, in root mean square, is at most twice that of diffusers in bfloat16. A part in bfloat16 is held to
5 % of the largest value, as in bench_unet.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_unet import gate
from gates import GPU, close
from torch import Tensor

import fastdiff
from fastdiff.acceleration.network import computes_bfloat16
from fastdiff.text.load import ASSETS, PACKAGED
from fastdiff.text.prompts import encode

PROMPT = "noto style woman firefighter dark skin tone"
STEPS, SCALE = 20, 3.0
OURS, HALF = "fastdiff", 'fastdiff, dtype="auto"'
THEIRS, THEIR_HALF = "diffusers' default: float32", "diffusers, bfloat16"
QUARTER = {  # of Stable Diffusion 1.5's width: the heads and the norms' groups have the channels that they have there
    "unet": {"block_out_channels": (80, 160, 320, 320), "attention_head_dim": 2, "cross_attention_dim": 192},
    "vae": {"block_out_channels": (32, 64, 128, 128)},
}
CASES = {"emoji": (1, 16), "Stable Diffusion 1.5, a quarter of the width": (1,)}
CONTESTS = [(name, batch) for name, batches in CASES.items() for batch in batches]


def emoji_networks() -> tuple[Any, Any]:
    """(UNet, autoencoder) as ``fastdiff train --data emoji`` makes them, untrained."""
    from fastdiff.training.autoencoder import new_autoencoder
    from fastdiff.training.pipeline import TextSettings
    from fastdiff.training.text_to_image import new_unet

    told = TextSettings(data="emoji")
    latents = told.size // 2 ** (len(told.autoencoder_channels) - 1)
    unet = new_unet(latents, told.channels, told.layers, told.latent_channels, told.text_width)
    return unet, new_autoencoder(told.size, told.autoencoder_channels, told.latent_channels)


def quarter_networks() -> tuple[Any, Any]:
    """(UNet, autoencoder) of Stable Diffusion 1.5 at a quarter of the width, for 256 pixels, untrained."""
    import diffusers

    parts = []
    for name, kind, size in (("unet", "UNet2DConditionModel", 32), ("vae", "AutoencoderKL", 256)):
        config = getattr(diffusers, kind).load_config(ASSETS / "configs" / "sd15" / name)
        more = {"sample_size": size, "norm_num_groups": 8}
        parts.append(getattr(diffusers, kind).from_config({**config, **QUARTER[name], **more}))
    return parts[0], parts[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The folder of each case's pipeline: the package's, or one of random weights."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from fastdiff.training.pipeline import write_pipeline
    from fastdiff.training.words import new_text_encoder, new_tokenizer

    found = {}
    for name, networks, window, layers in zip(
        CASES, (emoji_networks, quarter_networks), (20, 77), (3, 12), strict=True
    ):
        found[name] = PACKAGED.get(name, Path("none"))
        if not found[name].exists():
            found[name] = tmp_path_factory.mktemp("pipeline")
            torch.manual_seed(0)
            unet, autoencoder = networks()
            tokenizer = new_tokenizer([PROMPT], length=window, vocabulary=64)
            reader = new_text_encoder(tokenizer, width=192, layers=layers)
            write_pipeline(found[name], autoencoder, unet, reader, tokenizer, "v_prediction")
    return found


class Pipelines:
    """A case's pipelines, ours by name and diffusers' by name, and calls of them."""

    def __init__(self, folder: Path, batch: int, device: torch.device) -> None:
        import diffusers

        self.batch, self.device = batch, device
        self.ours = {OURS: fastdiff.load(folder, device=device)}
        dtypes = {THEIRS: torch.float32}
        self.half = computes_bfloat16(self.ours[OURS].pipe.unet)
        if self.half:
            self.ours[HALF] = fastdiff.load(folder, device=device, dtype="auto")
            dtypes[THEIR_HALF] = torch.bfloat16
        self.theirs = {}
        for name, dtype in dtypes.items():
            pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
            pipe.set_progress_bar_config(disable=True)
            self.theirs[name] = pipe.to(device)
        self.networks = {name: pipe.pipe for name, pipe in self.ours.items()} | self.theirs

    def draw(self, name: str, **more: Any) -> Tensor:
        """A whole call, to pixels in [-1, 1] or [0, 1]."""
        if name in self.ours:
            pipe = self.ours[name]
            return pipe(PROMPT, n=self.batch, sampler="ddim", steps=STEPS, guidance_scale=SCALE, **more)
        told = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "num_images_per_prompt": self.batch}
        return self.theirs[name](PROMPT, **told, **{"output_type": "pt", **more}).images

    def gate(self) -> None:
        """Equal latents from the same draws of torch's generator."""
        last = {name: self._latents(name) for name in self.networks}
        close(last[OURS], last[THEIRS], 5e-3 if GPU else 1e-4)
        if self.half:
            ours, theirs = (float((last[name].float() - last[THEIRS]).norm()) for name in (HALF, THEIR_HALF))
            assert ours <= 2 * theirs, f"in bfloat16 the error is {ours:.3g}, of diffusers {theirs:.3g}"

    def _latents(self, name: str) -> Tensor:
        """The state after the last step."""
        if name in self.theirs:
            return self.draw(name, generator=self._generator(), output_type="latent")
        states: list[Tensor] = []
        self.draw(name, generator=self._generator(), callback=lambda state: states.append(state.x))
        return states[-1]

    def calls(self) -> dict[str, Callable[[], Tensor]]:
        """A whole call of each, ours first."""
        return {name: lambda name=name: self.draw(name) for name in self.networks}

    def parts(self, part: str) -> dict[str, Callable[[], Tensor]]:
        """The UNet's call for a step with guidance, or the decoder's, of each, on the same numbers."""
        config = self.theirs[THEIRS].unet.config
        generator = self._generator()
        batch = self.batch * (2 if part == "unet" else 1)
        shape = (batch, config.in_channels, config.sample_size, config.sample_size)
        x = torch.randn(shape, generator=generator, device=self.device)
        words = encode(self.theirs[THEIRS], [PROMPT])[PROMPT][0].expand(batch, -1, -1)

        def call(pipe: Any) -> Callable[[], Tensor]:
            network = getattr(pipe, part)
            mine, told = x.to(network.dtype), words.to(network.dtype)

            @torch.no_grad()
            def run() -> Tensor:
                return network.decode(mine).sample if part == "vae" else network(mine, 500, told).sample

            return run

        return {name: call(pipe) for name, pipe in self.networks.items()}

    def _generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(0)


def targets(half: bool, float32: float, bfloat16: float) -> list[dict[str, Any]]:
    found = [{"kind": "ratio", "contestant": THEIRS, "goal": float32}]
    return found + ([{"kind": "ratio", "contestant": THEIRS, "ours": HALF, "goal": bfloat16}] if half else [])


@pytest.mark.parametrize(("name", "batch"), CONTESTS, ids=[f"{n}-{b}" for n, b in CONTESTS])
def test_call(contest, device, folders, name, batch):
    pipes = Pipelines(folders[name], batch, device)
    pipes.gate()
    size = pipes.ours[OURS].size
    goals = (1.5, 2.0) if name == "emoji" else (1.6, 2.0)
    contest(
        "pictures from words",
        f"{name}, {STEPS} guided steps",
        pipes.calls(),
        shape=(batch, 3, size, size),
        targets=targets(pipes.half, *goals),
        seconds=2 if GPU else 15 if batch == 1 else 40,
        warm=None if GPU else False,
    )


@pytest.mark.parametrize("part", ["unet", "vae"])
@pytest.mark.parametrize(("name", "batch"), CONTESTS, ids=[f"{n}-{b}" for n, b in CONTESTS])
def test_part(contest, device, folders, name, batch, part):
    pipes = Pipelines(folders[name], batch, device)
    calls = pipes.parts(part)
    gate(calls, calls[THEIRS](), {HALF, THEIR_HALF} & set(calls))
    contest(
        "pictures from words, the parts",
        f"{name}, {'a guided step of the UNet' if part == 'unet' else 'decoding'}",
        calls,
        shape=(batch, *calls[THEIRS]().shape[1:]),
        targets=targets(pipes.half, 2.0, 3.0) if part == "vae" else [],
        seconds=1 if GPU else 5,
    )
