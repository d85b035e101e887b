"""``fastdiff.load``: a pipeline of the package, of a folder, or of one file; never from a network."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastdiff.acceleration.accelerate import accelerate as put
from fastdiff.checks import check_dtype, named_device, nearest
from fastdiff.files import read_json_object
from fastdiff.text.pipeline import DEFAULTS, Pipeline

ASSETS = Path(__file__).resolve().parents[1] / "assets"
PACKAGED = {"emoji": ASSETS / "emoji", "emoji-edit": ASSETS / "emoji" / "edit"}

# diffusers' pipelines that encode, denoise latents by a UNet2DConditionModel and decode, and nothing else.
_KINDS = ("", "Img2Img", "Inpaint", "InstructPix2Pix")
SERVED = tuple(f"StableDiffusion{size}{kind}Pipeline" for size in ("", "XL") for kind in _KINDS)
# What their networks may have that ``Pipeline`` does not give them.
_ODD = ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")


def load(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str = torch.float32,
    accelerate: bool = True,
    batch_invariant: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
    config: str | os.PathLike[str] | None = None,
) -> Pipeline:
    """A text-to-image pipeline, ready to draw. Nothing is looked for on a network.

        pipe = fastdiff.load("emoji")
        pipe.save(pipe("a woman firefighter, dark skin, noto style"), "firefighter.png")

    Args:
        source: "emoji", the model in the package, or "emoji-edit", its editor by instruction; a folder that diffusers'
            ``save_pretrained`` wrote; or one .safetensors or .ckpt file of Stable Diffusion 1.x, its inpainting form,
            InstructPix2Pix, 2.x, SDXL base or its refiner, which its keys tell apart. (2.x of 512 pixels predicts
            epsilon, which keys do not tell: ``pipe(…, prediction="epsilon")``.)
        device: "auto" is the GPU where there is one.
        dtype: of the weights, float32, bfloat16 or float16; "auto" keeps float32 and lets ``accelerate`` compute in
            bfloat16 where the device does so natively.
        accelerate: put in the fast path (``fastdiff.accelerate``); ``pipe.restore()`` takes it out.
        batch_invariant: as ``fastdiff.accelerate`` has it: a picture's bits are the same in every batch.
        tokenizer: of a file, which holds none: a folder with CLIP's vocab.json and merges.txt, or tokenizer.json. None
            looks beside the file, in the Hugging Face cache and in the packages open_clip and clip.
        config: of a file of other sizes: a folder of diffusers' configs, with model_index.json.

    Returns:
        A ``Pipeline``; for a folder of another pipeline (Flux, Stable Diffusion 3, video …) diffusers' own object,
        accelerated where fastdiff knows its parts. A safety checker is left out: images are as the network drew them.

    Raises:
        ImportError: diffusers or transformers is missing; with the command that installs both.
        FileNotFoundError, ValueError, TypeError: naming what is wrong, before networks are built; of a file also which
            architecture is the nearest and which weights differ.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"source must be a name, a folder or a file; got {type(source).__name__}")
    name = os.fspath(source)
    path = PACKAGED.get(name, Path(source))
    if not path.exists():
        why = "; this installation lacks it" if name in PACKAGED else nearest(name, tuple(PACKAGED))
        raise FileNotFoundError(f"there is no file and no folder {path}{why}")
    if path.is_dir() and (tokenizer is not None or config is not None):
        raise ValueError("tokenizer and config go with a file; a folder has its own")
    if not isinstance(batch_invariant, bool):
        raise TypeError(f"batch_invariant must be a bool; got {type(batch_invariant).__name__}")
    if batch_invariant and not accelerate:
        raise ValueError("batch_invariant=True is a promise of accelerate; accelerate is False")
    kind: Any = torch.float32 if isinstance(dtype, str) and dtype == "auto" else dtype
    check_dtype("dtype", kind)
    where = named_device(str(device))
    for package in ("diffusers", "transformers"):
        if find_spec(package) is None:
            raise ImportError(f'fastdiff.load needs {package}: pip install "fastdiff-torch[text]"')
    with _quietly():
        if path.is_dir():
            pipe = from_folder(path, kind)
        else:
            from fastdiff.text.single_file import read

            pipe = read(path, kind, tokenizer, config)
        pipe.to(where)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    if not _served(pipe):
        try:
            if accelerate:
                put(pipe, dtype=dtype, batch_invariant=batch_invariant)
        except ValueError as error:
            if batch_invariant:
                raise
            warnings.warn(f"it is left as diffusers has it: {error}", stacklevel=2)
        return pipe
    if kind == torch.float16 and pipe.vae.config.force_upcast:
        pipe.vae.to(torch.float32)  # its activations are beyond float16
    ready = Pipeline(pipe, _defaults(path), name)
    if accelerate:
        # An upcast autoencoder is not float16.
        ready.accelerate(dtype if isinstance(dtype, str) else None, batch_invariant=batch_invariant)
    return ready


def _served(pipe: Any) -> bool:
    """Whether ``Pipeline`` draws with a pipeline of diffusers'."""
    if type(pipe).__name__ not in SERVED:
        return False
    unet, vae = pipe.unet.config, pipe.vae.config
    odd = [unet.get(name) for name in _ODD]
    odd += [vae.get(name) for name in ("shift_factor", "latents_mean", "latents_std")]
    beside = unet.in_channels - vae.latent_channels
    return beside in (0, vae.latent_channels, vae.latent_channels + 1) and all(value is None for value in odd)


def from_folder(path: Path, dtype: torch.dtype) -> Any:
    """diffusers' pipeline of a folder. What an edit/ folder leaves out, since it is equal, is its parent's."""
    from diffusers import DiffusionPipeline

    if not (path / "model_index.json").exists():
        raise FileNotFoundError(f"{path} has no model_index.json: it must be a folder that save_pretrained wrote")
    few = {"low_cpu_mem_usage": find_spec("accelerate") is not None}  # diffusers warns where it is left to choose
    given: dict[str, Any] = {**few}
    for name, value in read_json_object(path / "model_index.json").items():
        if name == "safety_checker":
            given |= {"safety_checker": None, "requires_safety_checker": False}
        elif path.name == "edit" and not (path / name).exists() and (path.parent / name).exists():
            kind = getattr(import_module(value[0]), value[1])
            more = {"dtype": dtype, **few} if issubclass(kind, torch.nn.Module) else {}
            given[name] = kind.from_pretrained(path.parent / name, local_files_only=True, **more)
        elif isinstance(value, list) and value[0] is not None and not (path / name).exists():
            raise FileNotFoundError(f"{path} lacks the folder {name}, which its model_index.json names")
    return DiffusionPipeline.from_pretrained(path, local_files_only=True, dtype=dtype, **given)


def _defaults(path: Path) -> dict[str, Any]:
    """What a call takes where it does not say, of a folder's sampling.json."""
    record = path / "sampling.json"
    told = read_json_object(record) if record.exists() else {}
    if unknown := sorted(set(told) - set(DEFAULTS)):
        raise ValueError(f"{record} has {', '.join(unknown)}; it may have {', '.join(DEFAULTS)}")
    return told


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the bars that diffusers and transformers draw while they load, and advice on packages not needed here."""
    logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [log for log in (of_diffusers, of_transformers) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()
