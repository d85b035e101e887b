"""``fastdiff.load``: a pipeline of the package, of a folder, or of one file; never from a network."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastdiff.checks import check_dtype, named_device, nearest
from fastdiff.files import read_json_object
from fastdiff.text.pipeline import DEFAULTS, Pipeline

ASSETS = Path(__file__).resolve().parents[1] / "assets"
PACKAGED = {"emoji": ASSETS / "emoji", "emoji-edit": ASSETS / "emoji" / "edit"}
EXTRA = 'pip install "fastdiff-torch[text]"'

# diffusers' pipelines that encode, denoise a UNet2DConditionModel's latents and decode, and nothing else.
_KINDS = ("", "Img2Img", "Inpaint", "InstructPix2Pix")
SERVED = tuple(f"StableDiffusion{size}{kind}Pipeline" for size in ("", "XL") for kind in _KINDS)


def load(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str = torch.float32,
    accelerate: bool = True,
    tokenizer: str | os.PathLike[str] | None = None,
    config: str | os.PathLike[str] | None = None,
) -> Pipeline:
    """A text-to-image pipeline, ready to draw. Nothing is looked for on a network.

        pipe = fastdiff.load("emoji")
        pipe.save(pipe("a woman firefighter, dark skin, noto style"), "firefighter.png")

    Args:
        source: "emoji" or "emoji-edit", the models in the package; a folder that diffusers' ``save_pretrained`` wrote;
            or one .safetensors or .ckpt file of Stable Diffusion 1.x, its inpainting form, InstructPix2Pix, 2.x, SDXL
            base or its refiner, which its keys tell apart.
        device: "auto" is the GPU where there is one.
        dtype: of the weights, float32, bfloat16 or float16; "auto" keeps float32 and lets ``accelerate`` compute in
            bfloat16 where the device does so natively.
        accelerate: put in the fast path (``fastdiff.accelerate``); ``pipe.restore()`` takes it out.
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
    path = PACKAGED.get(os.fspath(source), Path(source))
    if not path.exists():
        if os.fspath(source) in PACKAGED:
            raise FileNotFoundError(f"this installation has no model {source!r}: {path} does not exist")
        raise FileNotFoundError(f"{source} is no file and no folder" + nearest(os.fspath(source), tuple(PACKAGED)))
    kind: Any
    where, kind = named_device(str(device)), torch.float32 if isinstance(dtype, str) and dtype == "auto" else dtype
    check_dtype("dtype", kind)
    if path.is_dir() and (tokenizer is not None or config is not None):
        raise ValueError("tokenizer and config go with a file; a folder has its own")
    try:
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(f"fastdiff.load needs {error.name}: {EXTRA}") from error
    with _quietly():
        if path.is_dir():
            pipe, defaults = _folder(path, kind), _defaults(path)
        else:
            from fastdiff.text.single_file import read

            pipe, defaults = read(path, kind, tokenizer, config), {}
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.to(where)
    if kind == torch.float16 and getattr(pipe.vae.config, "force_upcast", False):
        pipe.vae.to(torch.float32)  # its activations are beyond float16
    if (why := unserved(pipe)) is not None:
        if accelerate:
            from fastdiff.acceleration.accelerate import accelerate as put

            put(pipe, dtype=dtype)
        pipe.fastdiff_left = why
        return pipe
    ready = Pipeline(pipe, defaults)
    if accelerate:
        ready.accelerate(dtype)
    return ready


def unserved(pipe: Any) -> str | None:
    """Why ``Pipeline`` does not draw with a pipeline of diffusers'; None where it does."""
    if type(pipe).__name__ not in SERVED:
        return f"{type(pipe).__name__} is none of {', '.join(SERVED)}"
    unet, vae = pipe.unet.config, pipe.vae.config
    own = (vae.latent_channels, 2 * vae.latent_channels, 2 * vae.latent_channels + 1)
    if unet.in_channels not in own:
        return f"its UNet takes {unet.in_channels} channels, which are none of {own}"
    odd = ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
    found = [name for name in odd if unet.get(name) is not None]
    found += [name for name in ("shift_factor", "latents_mean", "latents_std") if vae.get(name) is not None]
    return f"its config has {', '.join(found)}" if found else None


def _folder(path: Path, dtype: torch.dtype) -> Any:
    """diffusers' pipeline of a folder. What an edit/ folder leaves out, since it is equal, is its parent's."""
    from diffusers import DiffusionPipeline

    index = path / "model_index.json"
    if not index.exists():
        raise FileNotFoundError(f"{path} has no model_index.json: it must be a folder that save_pretrained wrote")
    told = read_json_object(index)
    given: dict[str, Any] = {}
    for name, value in told.items():
        if not isinstance(value, list) or len(value) != 2 or value[0] is None:
            continue
        if name == "safety_checker":
            given |= {"safety_checker": None, "requires_safety_checker": False}
        elif not (path / name).exists() and (path.parent / name).exists():
            kind = getattr(import_module(value[0]), value[1])
            more = {"dtype": dtype} if issubclass(kind, torch.nn.Module) else {}
            given[name] = kind.from_pretrained(path.parent / name, local_files_only=True, **more)
    given["low_cpu_mem_usage"] = find_spec("accelerate") is not None
    return DiffusionPipeline.from_pretrained(path, local_files_only=True, dtype=dtype, **given)


def _defaults(path: Path) -> dict[str, Any]:
    """What a call takes where it does not say, of the folder's training.json."""
    record = path / "training.json"
    told = read_json_object(record).get("sampling", {}) if record.exists() else {}
    if not isinstance(told, dict):
        raise ValueError(f"{record}: sampling must be an object; got {told!r}")
    return {name: value for name, value in told.items() if name in DEFAULTS}


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
