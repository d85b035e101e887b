"""The pipeline: encode the prompt and the picture, ``fastdiff.sample`` over latents, decode."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.acceleration.accelerate import accelerate, restore
from fastdiff.acceleration.report import Accelerated
from fastdiff.checks import check_image, check_int, check_number, is_real
from fastdiff.models.trained import TrainedModel, sampling_of
from fastdiff.plan.plan import Plan
from fastdiff.sampling.sample import bind, sample
from fastdiff.text.inputs import mask_of, picture, resolve_size, spread
from fastdiff.text.prompts import check_prompts, keywords, warn_of_losses

STRENGTH = 0.6  # of image to image
DEFAULTS: dict[str, Any] = {
    "sampler": "dpmpp_2m", "steps": 20, "guidance_scale": 7.5, "image_guidance_scale": 1.5, "guidance_interval": None,
}  # fmt: skip
_OURS = ("x_init", "known", "uncond_kwargs", "model_dtype", "device")  # arguments of sample that a call sets itself
_ENDING = ("ddim", "pndm", "lcm", "tcd")  # samplers that end where set_alpha_to_one says; solvers end at σ = 0
_AT_A_TIME = 1 << 20  # pixels that the autoencoder is given


class Beside(nn.Module):
    """A UNet that takes more channels than the state has: ``beside`` [B, …], a picture or mask, follows x."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.planned_network = unet

    def forward(self, x: Tensor, t: Tensor, *, beside: Tensor, **more: Any) -> Any:
        return self.planned_network(torch.cat([x, beside.to(x.dtype)], dim=1), t, **more)


class Pipeline:
    """A text-to-image checkpoint, ready to draw; ``fastdiff.load`` makes it.

        pipe = fastdiff.load("v1-5-pruned-emaonly.safetensors")
        images = pipe("a lighthouse in a storm", n=4, seed=1)
        pipe.save(images, "lighthouse.png")

    Attributes:
        pipe: diffusers' pipeline, whose unet, vae, text_encoder and tokenizer are used. Load LoRAs into it.
        sampling: the arguments of ``fastdiff.sample`` that its scheduler's config stands for.
        defaults: what a call takes where it does not say: sampler, steps, the guidance scales and interval.
        report: what ``fastdiff.accelerate`` changed; None where nothing was.
    """

    def __init__(self, pipe: Any, defaults: Mapping[str, Any] | None = None) -> None:
        self.pipe = pipe
        self.sampling = sampling_of({"_class_name": type(pipe.scheduler).__name__, **pipe.scheduler.config})
        self.defaults = {**DEFAULTS, **(defaults or {})}
        self.report: Accelerated | None = None
        self._beside = Beside(pipe.unet)

    def __repr__(self) -> str:
        pixels = "" if self.size is None else f", {self.size} pixels"
        return f"Pipeline({type(self.pipe).__name__}{pixels}, {self.sampling['prediction']}, on {self.pipe.device})"

    @property
    def factor(self) -> int:
        """Pixels of a latent, along a side."""
        return 2 ** (len(self.pipe.vae.config.block_out_channels) - 1)

    @property
    def size(self) -> int | None:
        """Pixels of its pictures, along a side, where the config says."""
        latents = self.pipe.unet.config.sample_size
        return latents * self.factor if isinstance(latents, int) else None

    @property
    def edits(self) -> bool:
        """Whether the checkpoint edits by instruction: the UNet takes a picture's latents beside its state."""
        return self.pipe.unet.config.in_channels == 2 * self.pipe.vae.config.latent_channels

    @property
    def fills(self) -> bool:
        """Whether the checkpoint fills in itself: the UNet takes a mask and a picture's latents beside its state."""
        return self.pipe.unet.config.in_channels == 2 * self.pipe.vae.config.latent_channels + 1

    def accelerate(self, dtype: torch.dtype | str | None = None) -> Accelerated:
        """``fastdiff.accelerate`` of the UNet and the autoencoder; ``fastdiff.load`` does so unless told otherwise.

        dtype: as there; None keeps a float32 pipeline's, and each network's own in others.
        """
        own: torch.dtype | str = torch.float32 if self.pipe.unet.dtype == torch.float32 else "auto"
        self.report = accelerate(self.pipe, dtype=own if dtype is None else dtype)
        return self.report

    def restore(self) -> None:
        """Undo ``accelerate``, to the bit."""
        restore(self.pipe)
        self.report = None

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        image: Any = None,
        mask: Any = None,
        strength: float | None = None,
        steps: int | None = None,
        sampler: Any = None,
        guidance_scale: Any = None,
        image_guidance_scale: float | None = None,
        size: int | tuple[int, int] | None = None,
        n: int = 1,
        **more: Any,
    ) -> Tensor:
        """Draw pictures of a prompt, or of several.

        Args:
            prompt: what to draw; of an editing checkpoint (8 channels), what to change in ``image``.
            negative_prompt: what to keep away from: one for all, or one a prompt.
            image: a picture to start from (image to image, SDEdit), to fill in (with ``mask``) or to edit: a path, a
                Pillow image, cropped and resized to ``size``, a tensor [3, H, W] or [B, 3, H, W] in [-1, 1], or a list
                of them; one for all, one a prompt, or one an image.
            mask: where it is white (True, 1) ``image`` is kept, where black drawn anew, as in ``fastdiff sample``;
                diffusers paints where it is white. A path, a Pillow image, or a tensor [H, W] or [B, 1, H, W].
            strength: how much of ``image`` is drawn anew: the last int(steps·strength) steps. 0 is what the
                autoencoder makes of it, 1 draws from noise. None is 0.6; with a mask, and in editing, 1.
            steps, sampler: as ``fastdiff.sample`` has them. None is the folder's own, or 20 of dpmpp_2m.
            guidance_scale: s of classifier-free guidance, as ``fastdiff.sample`` has it. None is the folder's own, or
                7.5. image_guidance_scale: of an editing checkpoint, how closely to keep to ``image`` (s_I in Equation 3
                of Brooks et al. 2023), or 1.5.
            size: pixels, or (height, width). None is that of a tensor given, or the checkpoint's own.
            n: pictures of each prompt, one after another.
            more: everything else that ``fastdiff.sample`` takes: seed, seeds, sample_offset, generator, noise_fn, eta,
                spacing, guidance_interval, guidance_rescale, thresholding, callback, resume, progress, cuda_graph …;
                ``prediction`` and ``schedule`` in place of what the scheduler's config says. States, x_T and noise
                are those of latents, [B, 4, H/8, W/8]; ``pipe.decode(state.x0)`` shows one.

        Returns:
            float32 [prompts·n, 3, H, W] in [-1, 1], on the pipeline's device. Picture i of a seed starts from the same
            noise in every batch.

        Raises:
            TypeError, ValueError: before any work, naming the argument, what it is and what it should be.

        Warns:
            of the end of a prompt that the text encoder's window cuts, and of words that a word-level vocabulary lacks.
        """
        texts = check_prompts("prompt", prompt)
        negatives: list[Any] = [None] if negative_prompt is None else check_prompts("negative_prompt", negative_prompt)
        if len(negatives) not in (1, len(texts)):
            raise ValueError(f"negative_prompt must be one, or {len(texts)}, one a prompt; got {len(negatives)}")
        count = len(texts) * check_int("n", n, 1, 1 << 20)
        self._check(image, mask, strength, more)
        pixels = resolve_size(size, self.size, self.factor, image, mask)
        given = None if image is None else spread("image", picture("image", image, pixels), len(texts), count)
        kept = None if mask is None else spread("mask", mask_of(mask, pixels), len(texts), count)
        asked = {"sampler": sampler, "steps": steps, "guidance_scale": guidance_scale}
        asked["image_guidance_scale"] = image_guidance_scale
        asked = {**self.defaults, **{name: value for name, value in asked.items() if value is not None}, **more}
        if isinstance(asked["sampler"], Plan) and steps is None:
            asked["steps"] = None
        warn_of_losses(self.pipe, [*texts, *filter(None, negatives)])

        begins, beside = self._begins(given, kept, strength)
        cond = keywords(self.pipe, texts, n, pixels, unconditional=False)
        uncond = keywords(self.pipe, negatives * (len(texts) // len(negatives)), n, pixels, unconditional=True)
        arguments = self._guidance(asked, cond, uncond, beside)
        arguments |= begins | _walk(self.sampling, asked)
        if asked.get("resume") is not None:
            arguments.pop("x_init", None)  # the state is there already
        shape = (count, self.pipe.vae.config.latent_channels, *(side // self.factor for side in pixels))
        if self._beside.planned_network is not self.pipe.unet:  # which somebody exchanged
            self._beside = Beside(self.pipe.unet)
        return self.decode(sample(self.pipe.unet if beside is None else self._beside, shape, **arguments))

    # ---- the autoencoder

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents, float32 [B, 4, H/8, W/8], of images [B, 3, H, W] in [-1, 1]: the mean of the posterior, scaled.

        The factor between pixels and latents is the checkpoint's (``factor``).
        """
        check_image(images)
        if len(images) > 1 and images.stride(0) == 0:  # one picture for all
            return self.encode(images[:1]).expand(len(images), -1, -1, -1)
        vae = self.pipe.vae
        parts = [vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mode() for part in self._parts(images, 1)]
        return torch.cat(parts).float() * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images, float32 [B, 3, H, W] in [-1, 1], of latents [B, 4, H/8, W/8]."""
        check_image(latents)
        vae = self.pipe.vae
        parts = [
            vae.decode((part / vae.config.scaling_factor).to(vae.device, vae.dtype)).sample.float()
            for part in self._parts(latents, self.factor)
        ]
        return torch.cat(parts).clamp(-1, 1)

    def save(self, images: Tensor, path: str | os.PathLike[str], *, labels: Sequence[str] = ()) -> Path:
        """Write images as one PNG, whole or not at all: a grid, with a row for each of ``labels``, its name beside."""
        from fastdiff.images import check_writable, save_grid
        from fastdiff.training.folder import save_samples

        if not labels:
            return save_grid(path, images)
        path = check_writable(path, suffix=".png")
        if len(images) % len(labels):
            raise ValueError(f"{len(images)} images make no {len(labels)} rows of equal length, one a label")
        lines = [textwrap.fill(label, 24, max_lines=4) for label in labels]
        save_samples(path, images, len(images) // len(labels), lines)
        return path

    # ---- what a call asks of sample

    def _check(self, image: Any, mask: Any, strength: Any, more: Mapping[str, Any]) -> None:
        """That arguments go together, and that ``sample`` has those that are passed on."""
        bind(None, (1,), **more)
        for name in _OURS:
            if name in more:
                raise ValueError(f"a pipeline sets {name} itself; it takes image, mask, negative_prompt and size")
        if image is None and (mask is not None or strength is not None):
            raise ValueError(f"{'mask' if mask is not None else 'strength'} needs image")
        if strength is not None:
            check_number("strength", strength, 0, 1)
        if self.edits and image is None:
            raise ValueError("image must be given: this checkpoint edits a picture, and the prompt says how")
        if self.fills and (image is None or mask is None):
            raise ValueError("image and mask must be given: this checkpoint fills in what the mask does not keep")

    def _begins(self, image: Tensor | None, kept: Tensor | None, strength: float | None) -> tuple[dict[str, Any], Any]:
        """Where ``sample`` starts from, and what the UNet is given beside its state."""
        if image is None:
            return {}, None
        latents, beside = self.encode(image), None
        begins: dict[str, Any] = {}
        whole = kept is not None or self.edits
        strength = (1.0 if whole else STRENGTH) if strength is None else strength
        if strength < 1:
            begins = {"x_init": latents, "strength": strength}
        if kept is not None:
            cells = F.interpolate(kept.float(), size=latents.shape[-2:]).to(latents.device)  # nearest, as in diffusers
            if self.fills:
                visible = self.encode(image * kept.to(image.device))
                beside = torch.cat([1 - cells, visible], dim=1)
            else:
                begins |= {"mask": cells, "known": latents}
        if self.edits:
            beside = latents / self.pipe.vae.config.scaling_factor  # these networks were trained on it unscaled
        return begins, beside

    def _guidance(self, asked: Mapping[str, Any], cond: Any, uncond: Any, beside: Tensor | None) -> dict[str, Any]:
        """model_kwargs, uncond_kwargs and guidance_scale."""
        scale, cond = asked["guidance_scale"], {**cond, **(asked.get("model_kwargs") or {})}
        if beside is not None:
            cond, uncond = {**cond, "beside": beside}, {**uncond, "beside": beside}
        if not self.edits:
            return {"model_kwargs": cond, "uncond_kwargs": uncond, "guidance_scale": scale}
        image_scale = asked["image_guidance_scale"]
        pairs: Any = (scale, image_scale)
        if callable(scale):
            pairs = lambda level: (scale(level), image_scale)  # noqa: E731
        elif not is_real(scale):
            pairs = [(s, image_scale) for s in scale]
        nothing = {**uncond, "beside": torch.zeros_like(uncond["beside"])}
        return {"model_kwargs": cond, "uncond_kwargs": [nothing, uncond], "guidance_scale": pairs}

    def _parts(self, batch: Tensor, factor: int) -> Sequence[Tensor]:
        """A batch in parts that the autoencoder has room for."""
        pixels = batch.shape[-2] * batch.shape[-1] * factor**2
        return batch.split(max(1, _AT_A_TIME // pixels))


def _walk(sampling: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The other arguments of ``sample``: the plan that the checkpoint's schedule and the call make, and the rest."""
    apart = ("guidance_scale", "image_guidance_scale", "model_kwargs", "sampler_options")
    rest = {name: value for name, value in asked.items() if name not in apart}
    options = asked.get("sampler_options") or {}
    if isinstance(asked["sampler"], Plan):
        return {**rest, **({"sampler_options": options} if options else {})}
    told = TrainedModel(None, dict(sampling)).arguments(**rest)  # type: ignore[arg-type]
    walk = dict(told.get("sampler_options", {}))
    if not str(asked["sampler"]).lower().startswith(_ENDING):
        walk.pop("final", None)
    return {**told, "sampler_options": {**walk, **options}}
