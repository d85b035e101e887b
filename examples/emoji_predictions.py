"""Flow matching or v-prediction? Both learn the emoji from nothing, for the same steps, and are judged.

    pip install -e ".[text,train]"
    python examples/emoji_predictions.py [--out emoji-predictions] [--steps 2000]        an hour of one core

It needs data/emoji. Both have the packaged autoencoder, the same first weights, captions in the same order and learning
rate. v-prediction draws its timesteps evenly, as `fastdiff train` does; the flow draws σ as the sigmoid of a normal
variable (Esser et al. 2024, Section 3.1). Each is sampled in 20 steps, by two samplers and at three scales of guidance.
Run again, it goes on where it was stopped. Writes emoji_predictions.json, of which emoji_quality.py renders a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from emoji_quality import PREDICTIONS, told
from torch import Tensor

import fastdiff
from fastdiff.evaluation.judge import Judge
from fastdiff.evaluation.run import choose_targets, draw
from fastdiff.files import atomic_write
from fastdiff.training.autoencoder import encoded
from fastdiff.training.captioned import load_captioned
from fastdiff.training.folder import CHECKPOINT
from fastdiff.training.pipeline import TextSettings, noise_schedule
from fastdiff.training.text_to_image import Latents, Reader, TextRun, decoded, new_unet
from fastdiff.training.words import new_text_encoder, new_tokenizer, tokens_of

SAMPLERS, SCALES, HELD_OUT = ("dpmpp_2m", "euler"), (1.0, 2.0, 3.0), 192


class FlowRun(TextRun):
    """Latents on straight lines to noise, whose direction the network learns (Lipman et al. 2023)."""

    def noised(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sigmas = torch.randn(len(latents), generator=self.generator).sigmoid()
        noise = torch.randn(latents.shape, generator=self.generator)
        return torch.lerp(latents, noise, sigmas.view(-1, 1, 1, 1)), 1000 * sigmas, noise - latents


def trained(run: type[TextRun], out: Path, settings: TextSettings) -> tuple[Reader, Any, Any]:
    """The averaged network of a run, which goes on where its folder ends, the autoencoder, and what reads captions."""
    pictures, autoencoder = load_captioned("emoji"), fastdiff.load("emoji", accelerate=False).pipe.vae
    captions = [text for texts in pictures.captions for text in texts]
    tokenizer = new_tokenizer(captions, length=settings.window, vocabulary=settings.vocabulary)
    counts = torch.tensor([len(texts) for texts in pictures.captions])
    scale = autoencoder.config.scaling_factor
    data = Latents(
        encoded(autoencoder, pictures) * scale, tokens_of(tokenizer, captions), counts.cumsum(0) - counts, counts,
        pictures.fingerprint(),
    )  # fmt: skip
    torch.manual_seed(settings.seed)
    encoder = new_text_encoder(tokenizer, width=settings.text_width, layers=settings.text_layers)
    unet = new_unet(data.shape[-1], settings.channels, settings.layers, data.shape[0], settings.text_width)
    made = run(
        Reader(unet, encoder), data, noise_schedule(), settings, out, empty=tokens_of(tokenizer, [""])[0],
        autoencoder=autoencoder, scale=scale, shown={}, device=torch.device("cpu"),
        resume=(out / CHECKPOINT).exists(),
    )  # fmt: skip
    made.write_samples = lambda out: None  # type: ignore[method-assign]
    made.loop()
    reader: Any = made.average.module
    fastdiff.accelerate(reader.unet)
    return reader, autoencoder, lambda texts: tokens_of(tokenizer, texts)


@torch.no_grad()
def drawn(networks: tuple[Reader, Any, Any], how: dict[str, Any], captions: list[str], **more: Any) -> Tensor:
    """Pictures of captions, [N, 3, 64, 64] in [-1, 1]."""
    reader, autoencoder, tokens = networks
    words, nothing = (reader.text_encoder(tokens(texts))[0] for texts in (captions, [""] * len(captions)))
    latents = fastdiff.sample(
        reader.unet, (len(captions), 4, 16, 16), steps=20, model_kwargs={"encoder_hidden_states": words},
        uncond_kwargs={"encoder_hidden_states": nothing}, **how, **more,
    )  # fmt: skip
    return decoded(autoencoder, latents / autoencoder.config.scaling_factor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("emoji-predictions"), help="where the trainings are kept")
    parser.add_argument("--steps", type=int, default=2000, help="of each training")
    options = parser.parse_args()
    torch.set_num_threads(1)  # what the bits of a training depend on
    everything = load_captioned("emoji", part=None, subset=None)
    judge, targets = Judge(everything.rows, everything.pixels), choose_targets(everything.rows, "held_out", HELD_OUT)
    captions = [everything.rows[i]["caption"] for i in targets.tolist()]
    settings = TextSettings(data="emoji", steps=options.steps, dtype="bfloat16")
    found: list[dict[str, Any]] = []
    kinds: tuple[tuple[str, type[TextRun], Any], ...] = (
        ("v_prediction", TextRun, noise_schedule()), ("flow_prediction", FlowRun, "flow"),
    )  # fmt: skip
    for prediction, run, schedule in kinds:
        networks = trained(run, options.out / prediction, settings)
        for sampler, scale in itertools.product(SAMPLERS, SCALES):
            how = {"schedule": schedule, "prediction": prediction, "sampler": sampler, "guidance_scale": scale}
            pictures = draw(partial(drawn, networks, how), captions, 0, progress=True)
            scores = told(judge.judge(pictures, targets))
            found.append({"prediction": prediction, "sampler": sampler, "s": scale, **scores})
            print(json.dumps(found[-1]), flush=True)
    with atomic_write(PREDICTIONS) as file:
        file.write((json.dumps({"steps": options.steps, "rows": found}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
