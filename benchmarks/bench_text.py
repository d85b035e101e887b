"""Pictures from words: a whole call of ``fastdiff.load``'s pipeline beside diffusers' own on the same weights.

Both take 20 steps of DDIM with guidance and then decode. The parts are timed apart: a call of the UNet, as guidance
makes it, for twice the batch, and the decoder. "fastdiff" is the default, float32; where bfloat16 is native,
dtype="auto" stands beside it, and so does diffusers' pipeline in bfloat16. Networks of random weights take the time of
trained ones: they stand in for the package's model where it is not installed.

The gate draws torch's noise from one seed in all pipelines and compares latents after the last step. In float32 each
value is the same to 1e-4 of the largest (5e-3 on a GPU, where PyTorch's convolutions round to tf32 by default); in
bfloat16 the error, in root mean square, is at most twice that of diffusers in bfloat16. A part in bfloat16 is held to
5 % of the largest value, as in bench_unet.py.

Stable Diffusion 1.5 at its full width takes minutes: a guided step and the decoder, two rounds each. OpenVINO's turns
are blocks of calls in contests of their own, as in bench_unet.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_unet import block, gate, inferred, text
from gates import GPU, close
from memory import held, peak
from report import DECODING, GUIDED_STEP
from torch import Tensor, nn

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
FULL = "Stable Diffusion 1.5"
CASES = {"emoji": (1, 16), f"{FULL}, a quarter of the width": (1,)}
CONTESTS = [(name, batch) for name, batches in CASES.items() for batch in batches]
PARTS = [(name, batch, part) for name in CASES for batch in (1, 16) for part in ("unet", "vae")]
ENDINGS = {"unet": GUIDED_STEP, "vae": DECODING}


def emoji_networks() -> tuple[Any, Any]:
    """(UNet, autoencoder) as ``fastdiff train --data emoji`` makes them, untrained."""
    from fastdiff.training.autoencoder import new_autoencoder
    from fastdiff.training.pipeline import TextSettings
    from fastdiff.training.text_to_image import new_unet

    told = TextSettings(data="emoji")
    latents = told.size // 2 ** (len(told.autoencoder_channels) - 1)
    unet = new_unet(latents, told.channels, told.layers, told.latent_channels, told.text_width)
    return unet, new_autoencoder(told.size, told.autoencoder_channels, told.latent_channels)


def sd15(part: str, **more: Any) -> Any:
    """The UNet ("unet") or autoencoder ("vae") of Stable Diffusion 1.5, untrained, with other fields of its config."""
    import diffusers

    kind = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[part]
    return kind.from_config({**kind.load_config(ASSETS / "configs" / "sd15" / part), **more}).eval()


def quarter_networks() -> tuple[Any, Any]:
    """(UNet, autoencoder) of Stable Diffusion 1.5 at a quarter of the width, for 256 pixels, untrained."""
    unet = sd15("unet", sample_size=32, norm_num_groups=8, **QUARTER["unet"])
    return unet, sd15("vae", sample_size=256, norm_num_groups=8, **QUARTER["vae"])


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

    @torch.no_grad()
    def inputs(self, part: str) -> tuple[Tensor, ...]:
        """What the UNet takes for a step with guidance, or the decoder."""
        config = self.theirs[THEIRS].unet.config
        batch = self.batch * (2 if part == "unet" else 1)
        shape = (batch, config.in_channels, config.sample_size, config.sample_size)
        x = torch.randn(shape, generator=self._generator(), device=self.device)
        words = encode(self.theirs[THEIRS], [PROMPT])[PROMPT][0].repeat(batch, 1, 1)
        return (x, torch.tensor(500), words) if part == "unet" else (x,)

    def parts(self, part: str) -> dict[str, Callable[[], Tensor]]:
        """The UNet's call for a step with guidance, or the decoder's, of each, on the same numbers."""
        told = self.inputs(part)
        return {name: part_call(getattr(pipe, part), part, told) for name, pipe in self.networks.items()}

    def _generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(0)


class Part(nn.Module):
    """The UNet, or the decoder, as a module of positional tensors, whose result is a tensor."""

    def __init__(self, network: Any, part: str) -> None:
        super().__init__()
        self.network, self.part = network, part

    def forward(self, x: Tensor, t: Tensor | None = None, words: Tensor | None = None) -> Tensor:
        if self.part == "vae":
            return self.network.decode(x, return_dict=False)[0]
        return self.network(x, t, words, return_dict=False)[0]


def part_call(network: Any, part: str, inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """A call of a network, with its inputs in its dtype."""
    module, mine = Part(network, part), [t.to(network.dtype) if t.is_floating_point() else t for t in inputs]

    @torch.no_grad()
    def run() -> Tensor:
        return module(*mine)

    return run


def targets(half: bool, float32: float, bfloat16: float) -> list[dict[str, Any]]:
    found = [{"kind": "ratio", "contestant": THEIRS, "goal": float32}]
    return found + ([{"kind": "ratio", "contestant": THEIRS, "ours": HALF, "goal": bfloat16}] if half else [])


@pytest.mark.parametrize(("name", "batch"), CONTESTS, ids=[f"{n}-{b}" for n, b in CONTESTS])
def test_call(contest, device, folders, name, batch):
    pipes = Pipelines(folders[name], batch, device)
    pipes.gate()
    size = pipes.ours[OURS].size
    goals = (1.5, 2.0) if name == "emoji" else (1.6, 2.0)
    calls = pipes.calls()
    contest(
        "pictures from words",
        f"{name}, {STEPS} guided steps",
        calls,
        shape=(batch, 3, size, size),
        targets=targets(pipes.half, *goals),
        seconds=2 if GPU else 15 if batch == 1 else 40,
        warm=None if GPU else False,
        memory={} if GPU else {name: peak(call) for name, call in calls.items()},
    )


@pytest.mark.parametrize(("name", "batch", "part"), PARTS, ids=[f"{n}-{b}-{p}" for n, b, p in PARTS])
def test_part(contest, device, folders, name, batch, part):
    pipes = Pipelines(folders[name], batch, device)
    calls = pipes.parts(part)
    right = calls[THEIRS]()
    gate(calls, right, {HALF, THEIR_HALF} & set(calls))
    contest(
        "pictures from words, the parts",
        f"{name}{ENDINGS[part]}",
        calls,
        shape=(batch, *right.shape[1:]),
        targets=targets(pipes.half, 2.0, 3.0) if part == "vae" else [],
        seconds=1 if GPU else 5,
    )


@pytest.mark.skipif(GPU, reason="on a GPU bench_unet.py has it")
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_full_width(contest, part):
    """Both networks read the same weights, 3.4 GB of the UNet's, so that a machine of 16 GB has room for them."""
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    before = held()
    theirs = sd15(part)
    with torch.device("meta"):
        ours = sd15(part)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    shape = (2 if part == "unet" else 1, 4, 64, 64)
    x, t, words = torch.randn(shape), torch.tensor(500), torch.randn(shape[0], 77, 768)
    told = (x, t, words) if part == "unet" else (x,)
    calls = {OURS: part_call(ours, part, told), THEIRS: part_call(theirs, part, told)}
    results: dict[str, Tensor] = {}
    memory = {THEIRS: peak(lambda: results.update(theirs=calls[THEIRS]()), before)}
    fastdiff.accelerate(ours, dtype=torch.float32)
    memory[OURS] = peak(lambda: results.update(ours=calls[OURS]()), before)
    largest = results["theirs"].abs().max()
    close(results["ours"] / largest, results["theirs"] / largest, 1e-4)
    contest(
        "pictures from words, the parts",
        f"{FULL}, weights and all{ENDINGS[part]}",
        calls,
        shape=(1, *results["theirs"].shape[1:]),
        targets=targets(False, 2.0, 3.0) if part == "vae" else [],
        rounds=2,
        warm=False,
        memory=memory,
    )


@pytest.mark.skipif(GPU, reason="OpenVINO's turn is on a CPU")
@pytest.mark.parametrize(("name", "batch", "part"), PARTS, ids=[f"{n}-{b}-{p}" for n, b, p in PARTS])
def test_openvino(contest, device, folders, name, batch, part):
    """Beside OpenVINO with static shapes, converted from the very weights: each turn is a warm call and a block."""
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    pipes = Pipelines(folders[name], batch, device)
    told, network = pipes.inputs(part), getattr(pipes.theirs[THEIRS], part)
    shapes = [list(t.shape) for t in told]
    graph = openvino.convert_model(Part(network, part).eval(), example_input=told, input=shapes)
    calls, goals = {}, []
    for ours, dtype in ((OURS, torch.float32), *(((HALF, torch.bfloat16),) if pipes.half else ())):
        rival = f"OpenVINO, {text(dtype)}"
        calls[ours] = part_call(getattr(pipes.networks[ours], part), part, told)
        calls[rival] = inferred(openvino, graph, dtype, told)
        goals.append({"kind": "ratio", "contestant": rival, "ours": ours, "goal": 1.0})
    right = part_call(network, part, told)()
    gate(calls, right, {name for name in calls if "bfloat16" in name or name == HALF})
    repeats = 4 if batch == 1 else 1
    contest(
        "pictures from words, beside OpenVINO",
        f"{name}, {'the UNet' if part == 'unet' else 'the decoder'}",
        {name: block(call, repeats) for name, call in calls.items()},
        shape=(batch, *right.shape[1:]),
        targets=goals,
        seconds=10,
        warm=True,
        repeats=repeats,
    )
