"""A Stable Diffusion folder of random weights: the packaged model's layout, a few thousand parameters."""

from pathlib import Path

import torch

WORDS = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "a", "woman", "man", "firefighter", "pilot", "dark", "light", "skin",
         "noto", "style", ",", "make", "the", "red", "blue", "dragon"]  # fmt: skip
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
             "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}  # fmt: skip


def word_tokenizer(window: int = 24):
    """One token a word, as the packaged model has it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]",
        model_max_length=window,
    )  # fmt: skip


def make(folder: Path, *, in_channels: int = 4, kind: str = "StableDiffusionPipeline", prediction: str = "v_prediction",
         seed: int = 0) -> Path:  # fmt: skip
    """Write the folder: 64 pixels, f = 4, latents 16 × 16 × 4, a word-level tokenizer of 24 tokens."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=in_channels, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16), norm_num_groups=4, latent_channels=4, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, scaling_factor=0.5,
    )  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2,
        max_position_embeddings=24, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    ))  # fmt: skip
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, **SCHEDULER)
    parts = {"unet": unet, "vae": vae, "text_encoder": text, "tokenizer": word_tokenizer(), "scheduler": scheduler}
    more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    getattr(diffusers, kind)(**parts, **more).save_pretrained(folder)
    return folder
