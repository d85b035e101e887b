"""What the emoji model and its editor do, judged: writes docs/emoji.md and its pictures.

    pip install -e ".[text,train]"
    python examples/emoji_quality.py [--model emoji] [--edit-model emoji-edit] [--n 576] [--only generation]

It needs data/emoji. Each part's figures are kept in examples/emoji_quality.json as they are found; --only makes one of
them again, the page is rendered from all.

*autoencoder*  what encoding and decoding leaves of held-out cells.
*generation*  held-out cells (each pair of factors seen, the three together not), the harder pairs (the subject never
    seen in that style), and training cells, over three seeds.
*guidance*, *samplers*  held-out cells over scales, eta and samplers; the lecture's 200 DDIM steps, η = 1, s = 10.
*edits*  a factor changed by instruction, from any picture of a training cell to a held-out cell.
*pictures*  SDEdit at several strengths, inpainting of a half, interpolations.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff.evaluation.judge import FACTORS, SUBSET, Judge, Scores
from fastdiff.evaluation.run import choose_targets, draw
from fastdiff.files import atomic_write
from fastdiff.training.autoencoder import psnr
from fastdiff.training.captioned import Captioned, load_captioned
from fastdiff.training.edits import instructions

HERE = Path(__file__).resolve().parent
PREDICTIONS = HERE / "emoji_predictions.json"  # which emoji_predictions.py writes
KEPT, PAGE, PICTURES = HERE / "emoji_quality.json", HERE.parent / "docs" / "emoji.md", HERE.parent / "docs" / "emoji"
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0)
CALLS = {"ddim": (10, 20, 50, 200), "euler": (10, 20, 50), "dpmpp_2m": (5, 10, 20, 50), "unipc": (5, 10, 20)}
INTERVAL = (0.3, 5.0)  # σ between which guidance acts (Kynkäänniemi et al. 2024), of which 0.03 … 64 are walked
SHARES = ("exact", *FACTORS, "training")


class Study:
    """A model, the data it is judged by, and what was found."""

    def __init__(self, model: str, editor: str, n: int) -> None:
        self.model, self.editor, self.n = model, editor, n
        self.data: Captioned = load_captioned("emoji", part=None, subset=None)
        self.judge = Judge(self.data.rows, self.data.pixels)
        self.pipe = fastdiff.load(model)
        self.found: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}

    def scores(self, part: str, n: int, seeds: Sequence[int] = (0,), **how: Any) -> dict[str, Any]:
        """The judge's means over a part's cells, with 95% intervals."""
        targets = choose_targets(self.data.rows, part, n)
        captions = [self.data.rows[i]["caption"] for i in targets.tolist()]
        drawn = [draw(self.pipe, captions, seed, progress=True, **how) for seed in seeds]
        return told(Scores.join([self.judge.judge(images, targets) for images in drawn]))

    def keep(self, name: str, value: Any) -> None:
        self.found[name] = value
        with atomic_write(KEPT) as file:
            file.write((json.dumps(self.found, indent=1) + "\n").encode())

    def images(self, rows: Sequence[int] | Tensor) -> Tensor:
        return self.data.images(torch.as_tensor(rows))


def told(scores: Scores) -> dict[str, Any]:
    """Means with the ends of their intervals, rounded."""
    found = {name: [round(value, 4) for value in values] for name, values in scores.means().items()}
    return {"samples": len(scores.targets), **found}


# ---- words


@torch.no_grad()
def autoencoder(study: Study) -> dict[str, Any]:
    truth = study.images(choose_targets(study.data.rows, "held_out", study.n))
    decoded = batches(lambda part: study.pipe.decode(study.pipe.encode(truth[part])), len(truth))
    return {"samples": len(truth), "psnr": round(psnr(decoded, truth).mean().item(), 2)}


def generation(study: Study) -> dict[str, Any]:
    counts = {"held_out": study.n, "held_out_pair": min(study.n, 144), "train": study.n}
    return {part: study.scores(part, n, (0, 1, 2)) for part, n in counts.items()}


def guidance(study: Study) -> list[dict[str, Any]]:
    n, found = min(study.n, 192), []
    for scale in SCALES:
        for name, more in (
            ("dpmpp_2m", {"sampler": "dpmpp_2m", "steps": 20}),
            ("ddim, η = 0", {"sampler": "ddim", "steps": 50, "eta": 0.0}),
            ("ddim, η = 1", {"sampler": "ddim", "steps": 50, "eta": 1.0}),
        ):
            found.append({"s": scale, "sampler": name, **study.scores("held_out", n, guidance_scale=scale, **more)})
        if scale > 1:
            limited = study.scores("held_out", n, guidance_scale=scale, guidance_interval=INTERVAL, sampler="dpmpp_2m",
                                   steps=20)  # fmt: skip
            found.append({"s": scale, "sampler": "dpmpp_2m, σ in an interval", **limited})
    lecture = {"sampler": "ddim", "steps": 200, "eta": 1.0, "guidance_scale": 10.0}
    found.append({"s": 10.0, "sampler": "ddim, 200 steps, η = 1", **study.scores("held_out", n, **lecture)})
    return found


def samplers(study: Study) -> list[dict[str, Any]]:
    n, found = min(study.n, 192), []
    for sampler, counts in CALLS.items():
        for steps in counts:
            scores = study.scores("held_out", n, sampler=sampler, steps=steps)
            found.append({"sampler": sampler, "steps": steps, **scores})
    return found


# ---- pictures


def edits(study: Study) -> dict[str, Any]:
    """Each kind of change apart: what was asked for changed, what was not asked for kept."""
    editor, rng, found = fastdiff.load(study.editor), random.Random(0), {}
    rows = study.data.rows
    targets = choose_targets(rows, "held_out", study.n).tolist()
    cells = {tuple(r[f] for f in FACTORS): i for i, r in enumerate(rows) if r["subset"] == SUBSET}
    values = {f: sorted({r[f] for r in rows if r["subset"] == SUBSET}) for f in FACTORS}
    for changed in (*((f,) for f in FACTORS), ("tone", "style"), ("subject", "tone"), ("subject", "style")):
        sources, texts, chosen = [], [], []
        for target in targets:
            wanted = dict(rows[target])
            for factor in changed:
                wanted[factor] = rng.choice([v for v in values[factor] if v != wanted[factor]])
            source = cells[tuple(wanted[f] for f in FACTORS)]
            if rows[source]["part"] == "train":
                sources.append(source)
                chosen.append(target)
                texts.append(rng.choice(instructions(rows[target], changed)))
        chosen, sources, texts = chosen[:192], sources[:192], texts[:192]
        drawn = batches(partial(edited, editor, texts, study.images(sources)), len(texts))
        found[" and ".join(changed)] = told(study.judge.judge(drawn, torch.tensor(chosen)))
    return found


def edited(editor: Any, texts: list[str], images: Tensor, part: slice) -> Tensor:
    drawn: Tensor = editor(texts[part], image=images[part], sample_offset=part.start)
    return drawn


def batches(make: Callable[[slice], Tensor], count: int, size: int = 64) -> Tensor:
    return torch.cat([make(slice(i, min(i + size, count))).float().cpu() for i in range(0, count, size)])


def image_to_image(study: Study) -> dict[str, Any]:
    """SDEdit from another tone's picture of the same subject and style, with the target's caption."""
    rows, rng = study.data.rows, random.Random(0)
    cells = {tuple(r[f] for f in FACTORS): i for i, r in enumerate(rows) if r["subset"] == SUBSET}
    targets = choose_targets(rows, "held_out", min(study.n, 192)).tolist()
    tones = sorted({r["tone"] for r in rows})
    sources = []
    for target in targets:
        row = rows[target]
        sources.append(cells[row["subject"], rng.choice([t for t in tones if t != row["tone"]]), row["style"]])
    captions = [rows[i]["caption"] for i in targets]
    found = {}
    for strength in (0.4, 0.6, 0.8, 0.9):
        drawn = batches(
            lambda part, s=strength: study.pipe(
                captions[part], image=study.images(sources)[part], strength=s, sample_offset=part.start
            ),
            len(targets),
        )
        found[f"strength {strength}"] = told(study.judge.judge(drawn, torch.tensor(targets)))
    return found


def inpainting(study: Study) -> dict[str, Any]:
    """The right half is drawn anew, with the caption."""
    rows = study.data.rows
    targets = choose_targets(rows, "held_out", min(study.n, 192))
    captions, truth = [rows[i]["caption"] for i in targets.tolist()], study.images(targets)
    mask = torch.zeros(64, 64)
    mask[:, :32] = 1
    drawn = batches(
        lambda part: study.pipe(captions[part], image=truth[part], mask=mask, sample_offset=part.start), len(targets)
    )
    decoded = batches(lambda part: study.pipe.decode(study.pipe.encode(truth[part])), len(targets))
    return {
        "right half drawn anew": told(study.judge.judge(drawn, targets)),
        "psnr of the half that is kept": round(psnr(drawn[..., :30], truth[..., :30]).mean().item(), 2),
        "psnr of that half, encoded and decoded": round(psnr(decoded[..., :30], truth[..., :30]).mean().item(), 2),
        "psnr of the half that is drawn": round(psnr(drawn[..., 32:], truth[..., 32:]).mean().item(), 2),
    }


def pictures(study: Study) -> dict[str, Any]:
    """Grids to look at."""
    PICTURES.mkdir(exist_ok=True)
    pipe, rows = study.pipe, study.data.rows
    people = ["woman firefighter", "man pilot", "woman surfing", "cook", "mermaid", "woman scientist"]
    styles = ["noto", "flat", "fluent", "twemoji"]
    prompts = [f"a {p}, {t} skin, {s} style" for p in people for s in styles for t in ("light", "dark")]
    pipe.save(pipe(prompts, seed=1), PICTURES / "words.png", labels=people)
    targets = choose_targets(rows, "held_out", 96)[::8].tolist()
    drawn = pipe([rows[i]["caption"] for i in targets], seed=0)
    fastdiff.save_grid(PICTURES / "held_out.png", torch.cat([study.images(targets), drawn.cpu()]), columns=len(targets))
    ends = [targets[3], targets[6]]
    a, b = pipe.encode(study.images(ends)).split(1)
    mixed = []
    for mix in ("linear", "spherical"):
        captions = {"encoder_hidden_states": words_between(pipe, [rows[i]["caption"] for i in ends])}
        mixed.append(pipe.decode(fastdiff.interpolate(
            pipe.pipe.unet, a[0], b[0], weights=torch.linspace(0, 1, 9).tolist(), mix=mix, t=500, steps=20,
            sampler="dpmpp_2m", schedule=pipe.sampling["schedule"], prediction=pipe.sampling["prediction"],
            model_kwargs=captions,
        )))  # fmt: skip
    fastdiff.save_grid(PICTURES / "interpolation.png", torch.cat(mixed).cpu(), columns=9)
    return {"seed": 1}


def words_between(pipe: Any, captions: Sequence[str]) -> Tensor:
    """The text encoder's states of two captions and of seven places between them, [9, L, C]."""
    tokens = pipe.pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        one, other = pipe.pipe.text_encoder(tokens)[0]
    return torch.stack([torch.lerp(one, other, weight) for weight in torch.linspace(0, 1, 9)])


# ---- the page


def table(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """A Markdown table of scores: shares with their intervals' halves, PSNR in dB."""
    head = "| | " + " | ".join(SHARES).replace("training", "nearest is a training picture") + " | PSNR | samples |\n"
    lines = [head, "|---" * (len(SHARES) + 3) + "|\n"]
    for name, scores in rows:
        shares = [f"{scores[s][0]:.3f} ({scores[s][1]:.3f}–{scores[s][2]:.3f})" for s in SHARES]
        lines.append(f"| {name} | {' | '.join(shares)} | {scores['psnr'][0]:.1f} | {scores['samples']} |\n")
    return "".join(lines)


def render(found: dict[str, Any]) -> str:
    names = {
        "held_out": "held out: the three factors never together",
        "held_out_pair": "held out: the subject never in that style",
        "train": "trained on",
    }
    parts = [
        "# Emoji: what the packaged model draws, judged\n\n"
        "Rendered by `examples/emoji_quality.py`. The data are `emoji-240`: 240 subjects × 6 tones × 4 styles, of\n"
        "which 10% of the cells are held out (each pair of factors was seen, the three never together), and 24 pairs\n"
        "of a subject and a style in every tone. A sample is judged by the nearest of all 15,307 real pictures, in\n"
        "pooled pixels: is that the cell that was asked for, or has it its subject, its tone, its style? In brackets\n"
        "are 95% intervals.\n\n![words](emoji/words.png)\n\n"
        "Rows: a subject each; columns: four styles, each in light and dark.\n\n"
        "The model was trained by four commands on one core of a CPU with AMX or AVX-512-BF16, in three and a half\n"
        "hours together. The second went on from the first; the third is the decoder's alone, whose folder gave the\n"
        "autoencoder; the last that of the words and the UNet (`training.json` beside the model has its curve):\n\n"
        "```sh\nfastdiff train --data emoji --out emoji --dtype bfloat16 --threads 1 --steps 3600 --save-every 600\n"
        "fastdiff train --data emoji --out emoji --dtype bfloat16 --threads 1 --steps 6400 --save-every 1000 --resume\n"
        "fastdiff train --data emoji --init emoji --out decoder --dtype bfloat16 --threads 1 --lr 8e-4 \\\n"
        "    --decoder-steps 3000 --steps 1 --save-every 500\n"
        "fastdiff train --data emoji --init emoji --out more --dtype bfloat16 --threads 1 --lr 8e-4 \\\n"
        "    --steps 6000 --save-every 500\n"
        "```\n"
    ]
    if "autoencoder" in found:
        parts.append(
            f"\nThe autoencoder gives {found['autoencoder']['samples']} held-out cells back at "
            f"{found['autoencoder']['psnr']} dB.\n"
        )
    if "generation" in found:
        parts.append("\n## From words\n\nThe defaults of the model, three seeds of each cell.\n\n")
        parts.append(table([(names[part], scores) for part, scores in found["generation"].items()]))
        parts.append("\n![above what held-out cells are, below what is drawn](emoji/held_out.png)\n")
    if "guidance" in found:
        parts.append("\n## Guidance\n\nHeld-out cells, one seed; dpmpp_2m at 20 steps, ddim at 50.\n\n")
        parts.append(table([(f"s = {row['s']:g}, {row['sampler']}", row) for row in found["guidance"]]))
    if "samplers" in found:
        parts.append("\n## Samplers\n\nHeld-out cells, one seed, the model's own scale.\n\n")
        parts.append(table([(f"{row['sampler']}, {row['steps']} steps", row) for row in found["samplers"]]))
    if PREDICTIONS.exists():
        compared = json.loads(PREDICTIONS.read_text())
        parts.append(
            "\n## v-prediction or flow matching\n\n"
            f"Each learnt the emoji from nothing in {compared['steps']:,} steps, a sixth of what the model in the\n"
            "package had, from the same first weights, with the packaged autoencoder\n"
            "(`python examples/emoji_predictions.py`). Held-out cells, one seed, 20 steps.\n\n"
        )
        rows = [(f"{row['prediction']}, {row['sampler']}, s = {row['s']:g}", row) for row in compared["rows"]]
        parts.append(table(rows))
        parts.append(
            "\nThe flow learns faster, and both samplers walk it alike; how much of that is the distribution of its\n"
            "timesteps was not measured apart. The model in the package has v-prediction, which diffusers'\n"
            "StableDiffusionPipeline runs; it has no flow.\n"
        )
    if "edits" in found:

        def least(asked: bool) -> float:
            kinds = found["edits"].items()
            return min(scores[f][0] for kind, scores in kinds for f in FACTORS if (f in kind.split(" and ")) == asked)

        parts.append(
            "\n## Edits by instruction\n\nFrom a training cell to a held-out one that differs in what is asked for.\n"
            "The share of the factor asked for is how often it changed as asked, those of the others how often they\n"
            'were kept. The editor, `fastdiff.load("emoji-edit")`, began as the model after the second command above,\n'
            "has the decoder of the third, and was trained by five commands. The first three drew every kind of\n"
            "change and every timestep equally often; the last two are what `fastdiff train --edits` does now:\n"
            "another subject or style oftener, half of the examples from the noisier half, where only the picture\n"
            "tells what is to be kept, and linear maps of two blocks, asked for the edited picture's factors while it\n"
            "learns (`fastdiff/training/edits.py`):\n\n"
            "```sh\nfastdiff train --data emoji --edits --init emoji --out edit --dtype bfloat16 --threads 1 \\\n"
            "    --steps 7500 --lr 1e-3 --save-every 1000\n"
            "fastdiff train --data emoji --edits --init emoji --out edit --dtype bfloat16 --threads 1 \\\n"
            "    --steps 13000 --lr 8e-4 --save-every 1000 --resume\n"
            "fastdiff train --data emoji --edits --init emoji-edit --out more --dtype bfloat16 --threads 1 \\\n"
            "    --steps 5400 --lr 1e-3 --save-every 500\n"
            "fastdiff train --data emoji --edits --init emoji-edit --out probed --dtype bfloat16 --threads 1 \\\n"
            "    --steps 5000 --lr 8e-4 --save-every 500\n"
            "fastdiff train --data emoji --edits --init emoji-edit --out longer --dtype bfloat16 --threads 1 \\\n"
            "    --steps 11000 --lr 8e-4 --save-every 500\n```\n\n"
            'It follows the words first and then, given them, the picture (`guidance_order="words"`).\n\n'
        )
        parts.append(table([(f"change {name}", scores) for name, scores in found["edits"].items()]))
        parts.append(
            f"\nOf every kind, {least(True):.0%} or more changed as asked, and each factor that was not asked for was\n"
            f"kept in {least(False):.0%} or more. Before the last command these were 84% and 75%: what another\n"
            "subject or style keeps has to be read from the picture, and that is learnt late.\n"
        )
    if "image_to_image" in found:
        parts.append("\n## Image to image\n\nFrom another tone's picture, with the caption of the held-out one.\n\n")
        parts.append(table(list(found["image_to_image"].items())))
    if "inpainting" in found:
        scores = found["inpainting"]
        parts.append("\n## Inpainting\n\n" + table([("right half drawn anew", scores["right half drawn anew"])]) + "\n")
        parts += [f"- {name}: {value} dB\n" for name, value in scores.items() if name.startswith("psnr")]
    if "pictures" in found:
        parts.append("\n## Between two pictures\n\nLinearly above, along the sphere below.\n\n"
                     "![interpolations](emoji/interpolation.png)\n")  # fmt: skip
    return "".join(parts)


PARTS: dict[str, Callable[[Study], Any]] = {
    "autoencoder": autoencoder, "pictures": pictures, "generation": generation, "edits": edits,
    "image_to_image": image_to_image, "inpainting": inpainting, "samplers": samplers, "guidance": guidance,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--edit-model", default="emoji-edit")
    parser.add_argument("--n", type=int, default=576, help="cells a part")
    parser.add_argument("--only", choices=PARTS, action="append")
    options = parser.parse_args()
    study = Study(options.model, options.edit_model, options.n)
    for name in options.only or PARTS:
        study.keep(name, PARTS[name](study))
        print(name, json.dumps(study.found[name]), flush=True)
        with atomic_write(PAGE) as file:
            file.write(render(study.found).encode())


if __name__ == "__main__":
    main()
