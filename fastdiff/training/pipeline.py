"""``fastdiff train`` on captioned pictures: an autoencoder, then a UNet and a text encoder, then diffusers' folder."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta

from fastdiff.checks import named_device
from fastdiff.files import atomic_write, read_json_object
from fastdiff.schedules.discrete import NoiseSchedule
from fastdiff.text.load import PACKAGED, from_folder
from fastdiff.training.autoencoder import AutoencoderRun, encoded, new_autoencoder, psnr, reconstructed
from fastdiff.training.captioned import Captioned, load_captioned
from fastdiff.training.edits import FACTORS, EditRun, Pairs, ProbedReader, instructions, widened, with_words
from fastdiff.training.folder import CHECKPOINT, check_folder, write_json
from fastdiff.training.loop import own_defaults
from fastdiff.training.settings import Count, RunSettings
from fastdiff.training.text_to_image import Latents, Reader, TextRun, new_unet
from fastdiff.training.words import new_text_encoder, new_tokenizer, tokens_of

AUTOENCODER = "autoencoder"  # the folder of the first run, in that of the second
BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.02}
SAMPLING = {"sampler": "dpmpp_2m", "steps": 20, "guidance_scale": 2.0}
EDITING = SAMPLING | {"guidance_scale": 1.5, "image_guidance_scale": 2.0, "guidance_order": "words"}
_SHOWN = 8  # captions of which the grids of a training have a row each

Levels = Annotated[tuple[Annotated[int, Meta(ge=16, multiple_of=16)], ...], Meta(min_length=2)]


@dataclass(frozen=True, kw_only=True)
class TextSettings(RunSettings):
    """What shapes a latent diffusion model of captioned pictures; beside `RunSettings`, which are the UNet's:

    Args:
        data: "emoji", or a folder of pictures with captions; see `load_captioned`.
        size: pixels a side, a multiple of 8.
        autoencoder_steps, autoencoder_lr, autoencoder_batch_size: of the first stage.
        autoencoder_channels: of each level of the autoencoder; each after the first halves the sides.
        latent_channels: of the latents.
        channels, layers: of each level of the UNet, multiples of 16, and its residual blocks.
        text_width, text_layers: of the text encoder; window: tokens of a caption; vocabulary: words at most.
        schedule: of the noise.
        init: "emoji", or the folder of a pipeline that `train_pipeline` wrote, to go on from: its autoencoder as it is,
            its UNet and text encoder as first weights, to which the words of these captions are added. Sizes are then
            its own, and what is said of the autoencoder, channels, layers, the text encoder and vocabulary has no
            effect.
        decoder_steps: with init, steps of its autoencoder's decoder alone, which come first. The encoder stays, so that
            the UNet need not learn other latents.
        skip_broken: leave out pictures that cannot be read.
    """

    data: str = field(kw_only=False)
    init: str | None = None
    decoder_steps: Annotated[int, Meta(ge=0)] = 0
    size: Annotated[int, Meta(ge=16, multiple_of=8)] = 64
    steps: Count = 6400
    batch_size: Count = 32
    lr: Annotated[float, Meta(gt=0, le=sys.float_info.max)] = 1e-3
    cooldown: Annotated[float, Meta(ge=0, lt=1)] = 0.4
    prediction: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"
    autoencoder_steps: Count = 2000
    autoencoder_lr: Annotated[float, Meta(gt=0, le=sys.float_info.max)] = 2e-3
    autoencoder_batch_size: Count = 16
    autoencoder_channels: Levels = (16, 32, 64)
    latent_channels: Annotated[int, Meta(ge=1, le=64)] = 4
    channels: Levels = (96, 160)
    layers: Annotated[int, Meta(ge=1)] = 1
    text_width: Annotated[int, Meta(ge=32, multiple_of=32)] = 192
    text_layers: Annotated[int, Meta(ge=1)] = 3
    window: Annotated[int, Meta(ge=4, le=512)] = 20
    vocabulary: Annotated[int, Meta(ge=8, le=1 << 20)] = 8192
    schedule: Literal["scaled_linear"] = "scaled_linear"
    skip_broken: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_steps and self.init is None:
            raise ValueError(f"decoder_steps is {self.decoder_steps}, which goes with init: there is no decoder yet")

    def autoencoder(self) -> RunSettings:
        """The settings of the first stage."""
        shared = {f.name: getattr(self, f.name) for f in fields(RunSettings)}
        steps = self.autoencoder_steps if self.init is None else self.decoder_steps
        return RunSettings(
            **shared | {"steps": steps, "lr": self.autoencoder_lr, "batch_size": self.autoencoder_batch_size}
        )


def noise_schedule() -> NoiseSchedule:
    """Stable Diffusion's, but with more noise at its end: a picture's mean must not show through at small sizes."""
    return NoiseSchedule.scaled_linear(1000, BETAS["beta_start"], BETAS["beta_end"])


def train_pipeline(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Path:
    """Train pictures from words on captioned pictures; returns the folder `out`, a StableDiffusionPipeline's.

    out: a folder with vae, unet, text_encoder, tokenizer and scheduler, which diffusers and ``fastdiff.load`` read;
        beside them training.json, loss.png, samples/, checkpoint.pt, and the same of the first stage in autoencoder/.
    resume, overwrite, progress: as for `fastdiff.training.unet.train_unet`. **settings: fields of `TextSettings`.

    Raises what `train_unet` raises, and ImportError with the command that helps without diffusers and transformers.
    """
    check_extra()
    chosen, out = TextSettings(data=os.fspath(data), **settings), Path(out)
    first, again = out / AUTOENCODER, resume and (out / CHECKPOINT).exists()
    check_folder(out, resume=again, overwrite=overwrite)
    two_stages, started = chosen.init is None or chosen.decoder_steps > 0, False
    if two_stages:
        started = resume and (first / CHECKPOINT).exists()
        check_folder(first, resume=started, overwrite=overwrite)
        if resume and not started:
            raise FileNotFoundError(f"nothing to resume: {first} holds no {CHECKPOINT}; start without resume")
    elif resume and not again:
        raise FileNotFoundError(f"nothing to resume: {out} holds no {CHECKPOINT}; start without resume")
    device = named_device(chosen.device)
    with own_defaults():
        pictures = load_captioned(data, size=chosen.size, skip_broken=chosen.skip_broken, progress=progress)
        texts = [text for wordings in pictures.captions for text in wordings]
        parts = _new_parts(chosen, texts) if chosen.init is None else _parts_of(chosen.init, texts, chosen)
        if two_stages:
            of_pictures: Any = pictures
            first_run = AutoencoderRun(
                parts.autoencoder, of_pictures, chosen.autoencoder(), first, device=device, resume=started,
                overwrite=overwrite,
            )  # fmt: skip
            parts = replace(parts, autoencoder=_trained(first_run, progress))
        run = _run(chosen, pictures, parts, out, device=device, resume=again, overwrite=overwrite)
        run.loop(progress=progress)
        reader = run.average.module
        write_pipeline(out, parts.autoencoder, reader.unet, reader.text_encoder, parts.tokenizer, chosen.prediction)
    return out


@dataclass(frozen=True, eq=False)
class Parts:
    """What a pipeline consists of, as diffusers and transformers have them."""

    autoencoder: Any
    tokenizer: Any
    text_encoder: Any
    unet: Any


@dataclass(frozen=True, kw_only=True)
class EditSettings(RunSettings):
    """What shapes an editor by instruction; beside `RunSettings`:

    Args:
        data: the emoji, whose rows say what differs between two pictures.
        init: what the editor starts from: "emoji", or the folder of a pipeline that `train_pipeline` wrote; or an
            editor to go on with, "emoji-edit" or the folder of one.
    """

    data: str = field(kw_only=False)
    init: str
    steps: Count = 13000
    batch_size: Count = 32
    lr: Annotated[float, Meta(gt=0, le=sys.float_info.max)] = 1e-3
    cooldown: Annotated[float, Meta(ge=0, lt=1)] = 0.4
    prediction: Literal["epsilon", "v_prediction", "sample"] = "v_prediction"


def train_editor(
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Path:
    """Train editing by instruction on pairs of the emoji; returns `out`, a StableDiffusionInstructPix2PixPipeline's.

    Arguments and errors as `train_pipeline`'s; **settings: fields of `EditSettings`.
    """
    check_extra()
    chosen, out = EditSettings(data=os.fspath(data), **settings), Path(out)
    check_folder(out, resume=resume, overwrite=overwrite)
    device = named_device(chosen.device)
    with own_defaults():
        pictures = load_captioned(data, progress=progress)
        if not pictures.rows:
            raise ValueError(f"{data} does not say what its pictures share: an editor is trained on the emoji")
        asked = [
            wording
            for row in pictures.rows
            for changed in ((name,) for name in FACTORS)
            for wording in instructions(row, changed)
        ]
        parts = _parts_of(chosen.init, [*asked, "and"], chosen, editor=True)
        autoencoder, tokenizer = parts.autoencoder, parts.tokenizer
        scale = autoencoder.config.scaling_factor
        latents = encoded(autoencoder, pictures)
        none = torch.zeros(len(pictures), dtype=torch.int64)
        values = Latents(latents * scale, none[:1].view(1, 1), none, none, pictures.fingerprint())
        pairs, unet = Pairs(pictures.rows), widened(parts.unet, 2 * autoencoder.config.latent_channels)
        run = EditRun(
            ProbedReader(unet, parts.text_encoder, pairs.values), values, noise_schedule(), chosen, out,
            pairs=pairs, read=lambda texts: tokens_of(tokenizer, texts),
            empty=tokens_of(tokenizer, [""])[0], autoencoder=autoencoder, scale=scale, shown={},
            device=device, resume=resume, overwrite=overwrite,
        )  # fmt: skip
        run.loop(progress=progress)
        reader = run.average.module
        write_pipeline(
            out, autoencoder, reader.unet, reader.text_encoder, tokenizer, chosen.prediction,
            kind="StableDiffusionInstructPix2PixPipeline",
        )  # fmt: skip
    return out


def check_extra() -> None:
    """ImportError with the command that helps, where diffusers or transformers are missing."""
    try:
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'pictures from words need diffusers and transformers ({error}): pip install "fastdiff-torch[text]"'
        ) from error


def _trained(run: AutoencoderRun, progress: bool) -> Any:
    """The autoencoder that a run trains; where the run has ended before, it is only read."""
    run.loop(progress=progress)
    trained: Any = run.average.module.eval().requires_grad_(False)
    pictures: Any = run.data
    shown, _ = pictures[torch.arange(min(64, len(pictures)))]
    decibels = psnr(reconstructed(trained, shown.to(run.device)).cpu(), shown).mean().item()
    assert run.out is not None
    write_json(run.out / "quality.json", {"psnr_db_of_64_training_pictures": round(decibels, 2)})
    return trained


def _new_parts(settings: TextSettings, texts: list[str]) -> Parts:
    """Networks of random weights, and the words of the captions."""
    tokenizer = new_tokenizer(texts, length=settings.window, vocabulary=settings.vocabulary)
    side = settings.size // 2 ** (len(settings.autoencoder_channels) - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        autoencoder = new_autoencoder(settings.size, settings.autoencoder_channels, settings.latent_channels)
        torch.manual_seed(settings.seed + 1)
        text_encoder = new_text_encoder(tokenizer, width=settings.text_width, layers=settings.text_layers)
        unet = new_unet(side, settings.channels, settings.layers, settings.latent_channels, settings.text_width)
    return Parts(autoencoder, tokenizer, text_encoder, unet)


def _parts_of(source: str, texts: list[str], settings: RunSettings, *, editor: bool = False) -> Parts:
    """Those of a folder or of the package, whose text encoder learns the words of the texts.

    editor: whether it may be one, too. ValueError for another kind of model.
    """
    folder = PACKAGED.get(source, Path(source))
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(f"init must be the folder of a pipeline; {folder} has no model_index.json")
    start = from_folder(folder, torch.float32)
    prediction = start.scheduler.config.prediction_type
    if NoiseSchedule.from_diffusers(start.scheduler) != noise_schedule() or prediction != settings.prediction:
        raise ValueError(f"{source} was trained on another schedule of noise, or for {prediction}: it cannot be init")
    taken = start.vae.config.latent_channels * (1 + editor)
    if start.unet.config.in_channels not in (start.vae.config.latent_channels, taken):
        raise ValueError(f"the network of {source} takes {start.unet.config.in_channels} channels: it cannot be init")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        tokenizer, text_encoder = with_words(start.tokenizer, start.text_encoder, texts)
    autoencoder = start.vae.to(named_device(settings.device)).eval()
    for encoding in (autoencoder.encoder, autoencoder.quant_conv):
        encoding.requires_grad_(False)
    return Parts(autoencoder, tokenizer, text_encoder, start.unet)


def _run(settings: TextSettings, pictures: Captioned, parts: Parts, out: Path, **options: Any) -> TextRun:
    """The second stage at its first step, or where its checkpoint is."""
    latents = encoded(parts.autoencoder, _flipped(pictures) if settings.flip else pictures)
    if settings.init is None:
        parts.autoencoder.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    scale, tokenizer = parts.autoencoder.config.scaling_factor, parts.tokenizer
    counts = torch.tensor([len(texts) for texts in pictures.captions])
    first, tokens = counts.cumsum(0) - counts, tokens_of(tokenizer, [t for texts in pictures.captions for t in texts])
    copies = len(latents) // len(pictures)  # 2 where mirrored ones are among them
    data = Latents(latents * scale, tokens, first.repeat(copies), counts.repeat(copies), pictures.fingerprint())
    spread = torch.arange(_SHOWN) * len(pictures) // _SHOWN
    return TextRun(
        Reader(parts.unet, parts.text_encoder), data, noise_schedule(), replace(settings, flip=False), out,
        empty=tokens_of(tokenizer, [""])[0], autoencoder=parts.autoencoder, scale=scale,
        shown={pictures.captions[i][0]: int(first[i]) for i in spread.tolist()}, **options,
    )  # fmt: skip


def _flipped(pictures: Captioned) -> Captioned:
    """Each picture, and then each mirrored."""
    return replace(pictures, pixels=torch.cat([pictures.pixels, pictures.pixels.flip(-1)]))


def write_pipeline(
    out: Path, autoencoder: Any, unet: Any, text_encoder: Any, tokenizer: Any, prediction: str, kind: str = ""
) -> None:
    """A pipeline's folder, as diffusers writes it, with the defaults of ``fastdiff.load`` in sampling.json.

    kind: diffusers' class, StableDiffusionPipeline where it is empty.
    """
    import diffusers

    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=1000, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, timestep_spacing="trailing", **BETAS,
    )  # fmt: skip
    pipeline = getattr(diffusers, kind or "StableDiffusionPipeline")(
        vae=autoencoder, unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        pipeline.save_pretrained(place)
        # transformers 5 names its class so that 4 does not know it; both know this name.
        index = read_json_object(Path(place, "model_index.json"))
        index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
        write_json(Path(place, "model_index.json"), index)
        config = Path(place, "tokenizer", "tokenizer_config.json")
        write_json(config, read_json_object(config) | {"tokenizer_class": "PreTrainedTokenizerFast"})
        for config in Path(place).glob("*/config.json"):  # which say where on this machine the weights were read from
            content = read_json_object(config)
            content.pop("_name_or_path", None)
            write_json(config, content)
        for written in sorted(path for path in Path(place).rglob("*") if path.is_file()):
            target = out / written.relative_to(place)
            target.parent.mkdir(exist_ok=True)
            with atomic_write(target) as file:  # diffusers' own files cannot be read by others than who wrote them
                file.write(written.read_bytes())
    write_json(out / "sampling.json", EDITING if "Pix2Pix" in kind else SAMPLING)
