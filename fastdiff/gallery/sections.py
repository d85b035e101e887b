"""What a gallery shows: rows of pictures, each with the Python that draws it, which is printed as it is run."""

from __future__ import annotations

from dataclasses import dataclass
from string import Template
from typing import Any

PORTRAIT, OTHER = "noto style woman firefighter dark skin tone", "noto style man pilot light skin tone"


@dataclass(frozen=True)
class Section:
    """Rows of pictures under a title.

    Args:
        title, text: of the section, and what to look at.
        labels: a row each. values: a picture each in every row. name: of a picture, formatted with its value.
        code: Python over ``pipe``, ``editor``, ``fastdiff`` and ``torch`` that draws the row of $label; $values,
            $count (their number), $steps (an argument of the call) and $size (pixels) are filled in. It sets
            ``images``, float32 [pictures, 3, H, W] in [-1, 1], or ``film``, a list of such batches, a frame each.
        before: names of the row's first pictures, which belong to no value.
        steps: those of its calls; None is the model's own.
    """

    title: str
    text: str
    labels: tuple[str, ...]
    values: tuple[Any, ...]
    name: str
    code: str
    before: tuple[str, ...] = ()
    steps: int | None = None

    def rows(self, size: int, *, quick: bool) -> list[tuple[str, list[str], str]]:
        """(label, names, code) of each row; quick: of two, with two pictures in four steps."""
        few = 2 if quick else None
        values, steps = self.values[:few], 4 if quick else self.steps
        given = {"values": values, "count": len(values), "size": size, "steps": f", steps={steps}" if steps else ""}
        names = [*self.before, *(self.name.format(value) for value in values)]
        return [(label, names, Template(self.code).substitute(given, label=label)) for label in self.labels[:few]]


SECTIONS = (
    Section(
        "Prompts × styles", "A row is one prompt, from the same noise in every style.",
        ("woman firefighter dark skin tone", "man pilot light skin tone", "woman mage medium skin tone", "old man",
         "mermaid medium-light skin tone", "thumbs up medium-dark skin tone"),
        ("noto", "flat", "fluent", "twemoji"), "{}", """\
prompts = [f"{style} style $label" for style in $values]
images = pipe(prompts, seeds=[1] * $count$steps)""",
    ),
    Section(
        "Guidance", "The scale s of classifier-free guidance: 1 is the model alone, more keeps closer to the prompt.",
        (PORTRAIT, "twemoji style thumbs up"), (1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0), "s = {:g}", """\
images = torch.cat([pipe("$label", guidance_scale=s, seed=2$steps) for s in $values])""",
    ),
    Section(
        "Samplers × steps", "One prompt and one x_T. Every step calls the network once.",
        ("ddim", "euler", "euler_ancestral", "dpmpp_2m", "unipc"), (2, 4, 8, 20, 50), "{} steps", f"""\
prompt = "{PORTRAIT}"
images = torch.cat([pipe(prompt, sampler="$label", steps=n, seed=3) for n in $values])""",
    ),
    Section(
        "Edits by instruction", "A picture, and what each instruction makes of it.",
        (PORTRAIT, "fluent style man pilot"),
        ("make the skin light", "in twemoji style", "make it a woman mage", "in flat style and medium skin"), "{}", """\
before = pipe("$label", seed=4$steps)
words = $values
images = torch.cat([before, *(editor(text, image=before, seed=5$steps) for text in words)])""",
        before=("before",),
    ),
    Section(
        "Interpolation in latents",
        "Two pictures, noised to t = 600, mixed there, and drawn again from the mixed embeddings of their prompts.",
        ("linear", "spherical"), tuple(i / 8 for i in range(9)), "λ = {:g}", f"""\
from fastdiff.text.prompts import encode
prompts = ["{PORTRAIT}", "{OTHER}"]
a, b = pipe.encode(pipe(prompts, seed=6$steps))
first, second, nothing = (embedding for embedding, _ in encode(pipe.pipe, [*prompts, ""]).values())
weights = $values
words = torch.cat([torch.lerp(first, second, w) for w in weights])
latents = fastdiff.interpolate(
    pipe.pipe.unet, a, b, weights, mix="$label", t=600, seed=7$steps, **pipe.sampling,
    model_kwargs={{"encoder_hidden_states": words}}, guidance_scale=3.0,
    uncond_kwargs={{"encoder_hidden_states": nothing.expand_as(words)}},
)
images = pipe.decode(latents)""",
        steps=20,
    ),
    Section(
        "Image to image", "A picture, noised by the strength, drawn again with another prompt; 1 keeps nothing.",
        (OTHER, "flat style woman mage medium skin tone"), (0.2, 0.4, 0.6, 0.8, 1.0), "strength {:g}", f"""\
before = pipe("{PORTRAIT}", seed=8$steps)
prompt, strengths = "$label", $values
images = torch.cat([before, *(pipe(prompt, image=before, strength=s, seed=9$steps) for s in strengths)])""",
        before=("before",),
    ),
    Section(
        "Inpainting", "The lower half of a picture is kept; the upper half is drawn anew from the prompt.",
        (PORTRAIT, OTHER, "noto style mermaid dark skin tone"), (1, 2, 3, 4), "drawn {}", f"""\
before = pipe("{PORTRAIT}", seed=10$steps)
kept = torch.arange($size)[:, None].expand(-1, $size) >= $size // 2
drawn = pipe("$label", image=before, mask=kept, n=$count, seed=11$steps)
images = torch.cat([before, before * kept, drawn])""",
        before=("before", "kept"),
    ),
    Section(
        "The reverse process", "The states of a run, decoded: x as the network meets it, and x0, what it expects.",
        ("x", "x0"), (PORTRAIT, OTHER, "twemoji style mermaid", "fluent style thumbs up"), "{}", """\
states = []
prompts = $values
pipe(prompts, sampler="ddim", eta=1.0, seed=12$steps, callback=states.append)
film = [pipe.decode(state.$label) for state in states]""",
        steps=50,
    ),
)  # fmt: skip
