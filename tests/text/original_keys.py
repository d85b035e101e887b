"""The names that Stable Diffusion's own files have for weights, of networks as diffusers and transformers name them."""

import re
from pathlib import Path

import torch

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
WHOLE = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
         "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
         "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "text_projection.weight": "text_projection",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def of_unet(key: str, layers: int, attends: list[bool]) -> str:
    """One name; ``attends`` says of each up block whether it has attention."""
    for ours, theirs in WHOLE.items():
        if key.startswith(ours + "."):
            return theirs + key.removeprefix(ours)
    where, kind, *rest = re.match(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(\w+)\.(\d+)\.(.*)", key).groups()
    number, tail = int(rest[0]), rest[1]
    if kind == "resnets":
        part = tail.split(".")[0]
        tail = tail.replace(part, RESNET[part], 1)
    if where == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{tail}"
    block = int(where.split(".")[1])
    if kind == "downsamplers":
        return f"input_blocks.{1 + block * (layers + 1) + layers}.0.op.{tail.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if attends[block] else 1}.{tail}"
    place = int(kind == "attentions")
    if where.startswith("down"):
        return f"input_blocks.{1 + block * (layers + 1) + number}.{place}.{tail}"
    return f"output_blocks.{block * (layers + 1) + number}.{place}.{tail}"


def of_vae(key: str, blocks: int) -> str:
    """One name; the decoder's blocks count from the other end."""
    key = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}", key).replace("down_blocks", "down")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    for ours, theirs in (("mid_block.attentions.0", "mid.attn_1"), ("resnets", "block"), ("to_out.0", "proj_out"),
                         ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"), ("group_norm", "norm"),
                         ("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"), ("to_", "")):  # fmt: skip
        key = key.replace(ours, theirs)
    return key


def open_clip(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """OpenCLIP's text encoder: queries, keys and values are one weight, the projection is transposed."""
    renamed = {}
    for key, value in weights.items():
        name = key.removeprefix("text_model.")
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        if ".self_attn.q_proj" in name:
            parts = [weights[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            renamed[prefix + name.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(parts)
        elif ".self_attn." not in name:
            renamed[prefix + name] = value.T.contiguous() if name == "text_projection" else value
    width = renamed[prefix + "positional_embedding"].shape[1]
    device = renamed[prefix + "positional_embedding"].device
    renamed.setdefault(prefix + "text_projection", torch.ones(width, width, device=device))
    return renamed


def networks(folder: Path, device: str) -> dict[str, torch.nn.Module]:
    """The networks of a folder of configs, of random weights or of none (the meta device)."""
    import json

    import diffusers
    import transformers

    index, found = json.loads((folder / "model_index.json").read_text()), {}
    for name, value in index.items():
        if name in ("unet", "vae", "text_encoder", "text_encoder_2") and value[0] is not None:
            kind = getattr(diffusers if value[0] == "diffusers" else transformers, value[1])
            with torch.device(device):
                if value[0] == "diffusers":
                    found[name] = kind.from_config(kind.load_config(folder / name)).eval()
                else:
                    found[name] = kind(kind.config_class.from_pretrained(folder / name)).eval()
    return found


def original(parts: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint's file."""
    unet, vae = parts["unet"], parts["vae"]
    attends = ["CrossAttn" in kind for kind in unet.config.up_block_types]
    layers, blocks = unet.config.layers_per_block, len(vae.config.block_out_channels)
    weights = {
        f"model.diffusion_model.{of_unet(key, layers, attends)}": value for key, value in unet.state_dict().items()
    }
    for key, value in vae.state_dict().items():
        name = of_vae(key, blocks)
        wide = ".attn_1." in name and value.ndim == 2  # 1×1 convolutions there
        weights[f"first_stage_model.{name}"] = value[:, :, None, None] if wide else value
    second = "text_encoder_2" in parts
    if "text_encoder" in parts:
        text = parts["text_encoder"].state_dict()
        if parts["text_encoder"].config.hidden_act == "gelu":
            weights |= open_clip(text, "cond_stage_model.model.")
        else:
            place = "conditioner.embedders.0." if second else "cond_stage_model."
            weights |= {f"{place}transformer.text_model.{k.removeprefix('text_model.')}": v for k, v in text.items()}
    if second:
        place = f"conditioner.embedders.{int('text_encoder' in parts)}.model."
        weights |= open_clip(parts["text_encoder_2"].state_dict(), place)
    return {key: value.contiguous() for key, value in weights.items()}
