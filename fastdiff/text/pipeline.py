"""The pipeline: encode the prompt and the picture, ``fastdiff.sample`` over latents, decode."""

from __future__ import annotations

import hashlib
import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.acceleration.accelerate import accelerate, restore
from fastdiff.acceleration.network import RECORD
from fastdiff.acceleration.report import Accelerated
from fastdiff.checks import check_choice, check_image, check_int, check_number, check_real, is_real
from fastdiff.models.trained import TrainedModel, sampling_of
from fastdiff.pictures.network import Identity, identify, weights_sha256
from fastdiff.pictures.recipe import Recipe, Words
from fastdiff.pictures.values import to_plain
from fastdiff.plan.plan import Plan
from fastdiff.sampling.sample import bind, sample
from fastdiff.text.inputs import mask_of, picture, resolve_size, spread
from fastdiff.text.prompts import check_prompts, keywords, vocabulary, warn_of_losses

STRENGTH = 0.6  # of image to image
DEFAULTS: dict[str, Any] = {
    "sampler": "dpmpp_2m", "steps": 20, "guidance_scale": 7.5, "image_guidance_scale": 1.5, "guidance_order": "image",
    "guidance_interval": None,
}  # fmt: skip
_OURS = ("x_init", "known", "uncond_kwargs", "model_dtype", "device")  # arguments of sample that a call sets itself
_OWN = ("sampler", "steps", "guidance_scale", "image_guidance_scale", "guidance_order")  # which have DEFAULTS
_CALL = ("negative_prompt", "image", "mask", "strength", *_OWN)
_OF_THE_PIPELINE = ("force_zeros_for_empty_prompt", "requires_aesthetics_score")  # options that its parts do not show
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
        defaults: what a call takes where it does not say: sampler, steps, the guidance scales and interval.
        source: what ``fastdiff.load`` loaded it from; None for one made otherwise.
    """

    def __init__(self, pipe: Any, defaults: Mapping[str, Any] | None = None, source: str | None = None) -> None:
        self.pipe, self.source = pipe, source
        self.defaults = {**DEFAULTS, **(defaults or {})}
        self._beside = Beside(pipe.unet)
        self._sampling: tuple[Any, dict[str, Any]] = (None, {})  # of a scheduler
        self.sampling  # noqa: B018  # a scheduler that fastdiff does not know is refused here

    def __repr__(self) -> str:
        pixels = "" if self.size is None else f", {self.size} pixels"
        return f"Pipeline({type(self.pipe).__name__}{pixels}, {self.sampling['prediction']}, on {self.pipe.device})"

    @property
    def unet(self) -> nn.Module:
        """The network that ``fastdiff.sample`` calls."""
        unet: nn.Module = self.pipe.unet
        return unet

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

    @property
    def sampling(self) -> dict[str, Any]:
        """The arguments of ``fastdiff.sample`` that the config of the pipeline's present scheduler stands for."""
        scheduler = self.pipe.scheduler
        if self._sampling[0] is not scheduler:
            self._sampling = scheduler, sampling_of({"_class_name": type(scheduler).__name__, **scheduler.config})
        return self._sampling[1]

    @property
    def report(self) -> Accelerated | None:
        """What ``fastdiff.accelerate`` changed; None where nothing is."""
        record = self.pipe.__dict__.get(RECORD)
        return None if record is None else record.report

    def accelerate(self, dtype: torch.dtype | str | None = None, *, batch_invariant: bool = False) -> Accelerated:
        """``fastdiff.accelerate`` of the UNet and the autoencoder; ``fastdiff.load`` does so unless told otherwise.

        dtype: as there; None keeps a float32 pipeline's, and each network's own in others.
        batch_invariant: as there: picture i of a seed then has the same bits in every batch.
        """
        own: torch.dtype | str = torch.float32 if self.pipe.unet.dtype == torch.float32 else "auto"
        return accelerate(self.pipe, dtype=own if dtype is None else dtype, batch_invariant=batch_invariant)

    def restore(self) -> None:
        """Undo ``accelerate``, to the bit."""
        restore(self.pipe)

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
        guidance_order: Literal["image", "words"] | None = None,
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
                of Brooks et al. 2023), or 1.5. guidance_order: "image", as in that equation, follows the picture first
                and then, given it, the words; "words" the words first and then, given them, the picture, which makes
                surer what the words leave open. None is the folder's own, or "image".
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
        asked = {"negative_prompt": negative_prompt, "image": image, "mask": mask, "strength": strength, "steps": steps}
        asked |= {"sampler": sampler, "guidance_scale": guidance_scale, "image_guidance_scale": image_guidance_scale}
        asked["guidance_order"] = guidance_order
        words, pixels, arguments = self._asked(prompt, size, n, asked, more)
        warn_of_losses(self.pipe, [*words.prompts, *(words.negative_prompts or [])])
        network, shape, arguments = self.conditioned(words, pixels, arguments)
        return self.decode(sample(network, shape, **arguments))

    @torch.no_grad()
    def recipe(
        self,
        prompt: str | Sequence[str],
        *,
        size: int | tuple[int, int] | None = None,
        n: int = 1,
        batch_size: int | None = None,
        **asked: Any,
    ) -> Recipe:
        """The recipe of a call with these arguments, which it checks, but does not run; a picture can carry it.

            recipe = pipe.recipe("a lighthouse in a storm", n=4, seed=1)
            pipe.save(recipe.sample(pipe), "lighthouse.png", recipe=recipe)

        batch_size: images at a time, as ``fastdiff.Recipe.of`` has it; raises and warns as a call and that do.
        """
        more = {name: value for name, value in asked.items() if name not in _CALL}
        words, pixels, arguments = self._asked(prompt, size, n, {name: asked.get(name) for name in _CALL}, more)
        warn_of_losses(self.pipe, [*words.prompts, *(words.negative_prompts or [])])
        network, shape, conditioned = self.conditioned(words, pixels, arguments)
        recipe = Recipe.of(network, shape, batch_size=batch_size, **conditioned)
        kept = dict(recipe.arguments)
        for name in ("model_kwargs", "uncond_kwargs"):  # the embeddings are made again of the words
            if name in kept:
                kept[name] = to_plain(name, arguments[name])
            if not kept.get(name):
                kept.pop(name, None)
        return msgspec.structs.replace(
            recipe, shape=[shape[0], 3, *pixels], arguments=kept, network=self.identity(), words=words
        )

    def conditioned(
        self, words: Words, size: Sequence[int], arguments: Mapping[str, Any]
    ) -> tuple[nn.Module, tuple[int, ...], dict[str, Any]]:
        """The network, the shape of latents and the arguments of ``sample``, embeddings among them, that draw words.

        size: (height, width) in pixels; arguments: of ``sample``, as a recipe of words keeps them.
        """
        count, (height, width) = len(words.prompts), resolve_size(tuple(size), None, self.factor)
        negatives: list[Any] = [None] if words.negative_prompts is None else list(words.negative_prompts)
        given, nothing = arguments.get("model_kwargs") or {}, arguments.get("uncond_kwargs") or {}
        cond = keywords(self.pipe, words.prompts, (height, width), unconditional=False)
        uncond = keywords(self.pipe, negatives * (count // len(negatives)), (height, width), unconditional=True)
        starts = [uncond, {**cond, **given} if words.first else uncond]  # of an editing checkpoint
        told = {
            **arguments,
            "model_kwargs": {**cond, **given},
            "uncond_kwargs": {**uncond, **nothing}
            if isinstance(nothing, Mapping)
            else [{**start, **one} for start, one in zip(starts, nothing, strict=True)],
        }
        shape = (count, self.pipe.vae.config.latent_channels, height // self.factor, width // self.factor)
        if "beside" not in given:
            return self.unet, shape, told
        if self._beside.planned_network is not self.unet:  # which somebody exchanged
            self._beside = Beside(self.unet)
        return self._beside, shape, told

    def identity(self) -> Identity:
        """Which networks and tokenizers draw, as a recipe names them."""
        digest = hashlib.sha256()
        for name, part in sorted(self.pipe.components.items()):
            if isinstance(part, nn.Module):
                digest.update(f"{name} {weights_sha256(part)}\n".encode())
            elif name.startswith("tokenizer") and part is not None:
                digest.update(f"{name} {part.model_max_length} {vocabulary(part)}\n".encode())
        told = {name: self.pipe.config.get(name) for name in _OF_THE_PIPELINE}
        digest.update(json.dumps(told, sort_keys=True).encode())
        kind = type(self.pipe)
        return msgspec.structs.replace(
            identify(self.unet), name=f"{kind.__module__}.{kind.__qualname__}", folder=self.source,
            sha256=digest.hexdigest(),
        )  # fmt: skip

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

    def save(
        self,
        images: Tensor,
        path: str | os.PathLike[str],
        *,
        labels: Sequence[str] = (),
        recipe: Recipe | None = None,
    ) -> Path:
        """Write images as one PNG, whole or not at all: a grid, with a row for each of ``labels``, its name beside.

        recipe: how they were made (``recipe``), to be kept in the file, for ``fastdiff.reproduce``.
        """
        from fastdiff.images import save_grid

        if not labels:
            return save_grid(path, images, recipe=recipe)
        if len(images) % len(labels):
            raise ValueError(f"{len(images)} images make no {len(labels)} rows of equal length, one a label")
        names = [textwrap.fill(label, 24, max_lines=4) for label in labels]
        return save_grid(path, images, columns=len(images) // len(labels), names=names, recipe=recipe)

    # ---- what a call asks of sample

    def _check(self, image: Any, mask: Any, strength: Any, more: Mapping[str, Any]) -> None:
        """That arguments go together, and that ``sample`` has those that are passed on."""
        bind(None, (1,), **more)
        for name in _OURS:
            if name in more:
                raise ValueError(f"a pipeline sets {name} itself; it takes image, mask, negative_prompt and size")
        if more.get("return_log_prob"):
            raise ValueError(
                "a pipeline returns pictures alone; return_log_prob is fastdiff.sample's, of pipe.pipe.unet"
            )
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

    def _asked(
        self, prompt: Any, size: Any, n: int, given: Mapping[str, Any], more: Mapping[str, Any]
    ) -> tuple[Words, tuple[int, int], dict[str, Any]]:
        """The words, the size in pixels and the other arguments of ``sample`` that a call stands for, checked."""
        texts = check_prompts("prompt", prompt)
        negatives = given["negative_prompt"]
        if negatives is not None:
            negatives = check_prompts("negative_prompt", negatives)
            if len(negatives) not in (1, len(texts)):
                raise ValueError(f"negative_prompt must be one, or {len(texts)}, one a prompt; got {len(negatives)}")
        count = len(texts) * check_int("n", n, 1, 1 << 20)
        image, mask, strength = given["image"], given["mask"], given["strength"]
        self._check(image, mask, strength, more)
        pixels = resolve_size(size, self.size, self.factor, image, mask)
        shown = None if image is None else spread("image", picture("image", image, pixels), len(texts), count)
        kept = None if mask is None else spread("mask", mask_of(mask, pixels), len(texts), count)
        told = {name: given[name] for name in _OWN if given[name] is not None}
        asked = {**self.defaults, **told, **more}
        check_choice("guidance_order", asked["guidance_order"], ("image", "words"))
        if isinstance(asked["sampler"], Plan) and given["steps"] is None:
            asked["steps"] = None
        begins, beside = self._begins(shown, kept, strength)
        arguments = self._guidance(asked, beside) | begins | _walk(self.sampling, asked)
        if asked.get("resume") is not None:
            arguments.pop("x_init", None)  # the state is there already
        if negatives is not None and len(negatives) > 1:
            negatives = [text for text in negatives for _ in range(n)]
        prompts = [text for text in texts for _ in range(n)]
        first = self.edits and asked["guidance_order"] == "words"
        words = Words(prompts=prompts, negative_prompts=negatives, first=first)
        return words, pixels, arguments

    def _guidance(self, asked: Mapping[str, Any], beside: Tensor | None) -> dict[str, Any]:
        """model_kwargs and uncond_kwargs, but for the words' embeddings, and guidance_scale."""
        scale, given = asked["guidance_scale"], dict(asked.get("model_kwargs") or {})
        if isinstance(scale, (Tensor, np.ndarray, np.generic)):
            scale = scale.tolist()
        if beside is None:
            return {"model_kwargs": given, "uncond_kwargs": {}, "guidance_scale": scale}
        given["beside"] = beside
        if not self.edits:
            return {"model_kwargs": given, "uncond_kwargs": {"beside": beside}, "guidance_scale": scale}
        image_scale, words_first = asked["image_guidance_scale"], asked["guidance_order"] == "words"
        check_real("image_guidance_scale", image_scale)
        pair = lambda s: (image_scale, s) if words_first else (s, image_scale)  # noqa: E731
        pairs: Any = pair(scale)
        if callable(scale):
            pairs = lambda level: pair(scale(level))  # noqa: E731
        elif not is_real(scale):
            pairs = pair(scale[0]) if len(scale) == 1 else [pair(s) for s in scale]
        no_picture = {"beside": torch.zeros_like(beside)}
        nothing = [no_picture, no_picture if words_first else {"beside": beside}]
        return {"model_kwargs": given, "uncond_kwargs": nothing, "guidance_scale": pairs}

    def _parts(self, batch: Tensor, factor: int) -> Sequence[Tensor]:
        """A batch in parts that the autoencoder has room for."""
        pixels = batch.shape[-2] * batch.shape[-1] * factor**2
        return batch.split(max(1, _AT_A_TIME // pixels))


def _walk(sampling: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The other arguments of ``sample``: the plan that the checkpoint's schedule and the call make, and the rest."""
    apart = ("guidance_scale", "image_guidance_scale", "guidance_order", "model_kwargs", "sampler_options")
    rest = {name: value for name, value in asked.items() if name not in apart}
    options = asked.get("sampler_options") or {}
    if isinstance(asked["sampler"], Plan):
        return {**rest, **({"sampler_options": options} if options else {})}
    told = TrainedModel(None, dict(sampling)).arguments(**rest)  # type: ignore[arg-type]
    walk = dict(told.get("sampler_options", {}))
    if not str(asked["sampler"]).lower().startswith(_ENDING):
        walk.pop("final", None)
    return {**told, "sampler_options": {**walk, **options}}
